"""Drawing tokens: filters as mlx-lm has them, draws that are each token's own."""

import math
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

from mlx_cerebrum.decoding.decode import greedy
from mlx_cerebrum.decoding.sampling import (
    Sampling,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    make_sampler,
)
from mlx_cerebrum.errors import RequestError


def test_sampler_is_greedy_at_zero_and_seeded_above() -> None:
    logits = mx.array([[0.1, 2.0, 1.9, -3.0]])
    assert make_sampler()(logits, 0).tolist() == [1]
    draws = [[make_sampler(1.0, seed=s)(logits, 0).item() for s in range(50)] for _ in range(2)]
    assert draws[0] == draws[1]
    assert len(set(draws[0])) > 1


def test_a_draw_is_its_tokens_own() -> None:
    """Whatever is drawn with it, before it or again."""
    logits = mx.random.normal((6, 40), key=mx.random.key(1))
    together: Any = make_sampler(1.0, top_p=0.9, seed=5)(logits, 3).tolist()
    sampler = make_sampler(1.0, top_p=0.9, seed=5)
    for row in (5, 0, 2, 2, 4, 1, 3):
        assert sampler(logits[row : row + 1], 3 + row).tolist() == [together[row]]
    assert sampler(logits, 4).tolist() != together


def test_filters_cut_the_tail() -> None:
    logits = mx.log(mx.array([[0.5, 0.3, 0.15, 0.05]]))

    def seen(**options: float) -> set[Any]:
        sampler = make_sampler(1.0, seed=1, **options)
        return {sampler(logits, number).item() for number in range(200)}

    assert seen() == {0, 1, 2, 3}
    assert seen(top_p=0.7) == {0, 1}
    assert seen(min_p=0.25) == {0, 1, 2}


@pytest.mark.parametrize("top_p", [1e-4, 1e-9, 1e-320])
def test_a_tiny_top_p_leaves_the_most_likely(top_p: float) -> None:
    logits = mx.array([[0.1, 2.0, 1.9, -3.0], [0.1, 0.2, 0.3, 3.0]])
    assert make_sampler(1.0, top_p=top_p)(logits, 0).tolist() == [1, 3]


def test_draws_follow_the_distribution() -> None:
    probabilities = [0.5, 0.3, 0.15, 0.05]
    logits = mx.repeat(mx.log(mx.array([probabilities])), 5_000, axis=0)
    draws = make_sampler(1.0, seed=3)(logits, 0)
    for token, p in enumerate(probabilities):
        share = float(mx.mean(draws == token).item())  # type: ignore[arg-type]
        assert abs(share - p) < 4 * (p * (1 - p) / 5_000) ** 0.5


@pytest.mark.parametrize(
    "options",
    [
        {"temp": -1.0},
        {"temp": float("nan")},
        {"temp": 1.0, "top_p": 0.0},
        {"temp": 1.0, "top_p": 1.5},
        {"temp": 1.0, "min_p": 1.0},
        {"temp": 0.0, "top_p": 0.5},
        {"temp": 0.0, "seed": 1},
        {"temp": 1.0, "seed": -1},
        {"temp": 1.0, "seed": 2**64},
    ],
)
def test_sampling_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        make_sampler(**options)


@pytest.mark.parametrize("top_k", [0, -1])
def test_no_likeliest_token_at_all(top_k: int) -> None:
    with pytest.raises(RequestError, match="top-k must be at least 1"):
        Sampling(1.0, top_k=top_k)


def test_top_k_cuts_the_tail() -> None:
    logits = mx.log(mx.array([[0.5, 0.3, 0.15, 0.05]]))
    for top_k in (1, 2, 3, 4, 5):
        sampler = Sampling(1.0, seed=1, top_k=top_k).sampler()
        seen = {sampler(logits, number).item() for number in range(200)}
        assert seen == set(range(min(top_k, 4)))


def test_greedy_whatever_the_rest_says() -> None:
    assert Sampling(0.0, top_p=0.5, min_p=0.1, seed=3, top_k=2).sampler() is greedy


# Beside mlx-lm's.


@pytest.fixture(autouse=True, scope="module")
def _uncompiled() -> Iterator[None]:
    """mlx-lm's filters are compiled anew for each new number they are given."""
    mx.disable_compile()
    yield
    mx.enable_compile()


# Ties, equal steps, one token that has it all, what is as good as impossible.
SHAPES = st.one_of(
    st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=60),
    st.lists(st.integers(-4, 4).map(float), min_size=2, max_size=60),
    st.lists(st.sampled_from([0.0, -100.0, -math.inf, 80.0]), min_size=2, max_size=20).map(
        lambda row: [*row, 0.0]
    ),
)


def kept(logprobs: mx.array) -> Any:
    return np.isfinite(np.array(logprobs))


def logprobs_of(row: list[float]) -> mx.array:
    logits = mx.array([row, row[::-1]], dtype=mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


@settings(deadline=None)
@given(SHAPES, st.one_of(st.sampled_from([1e-6, 0.5, 0.9, 1 - 2**-24]), st.floats(1e-6, 0.999)))
def test_top_p_keeps_what_mlx_lm_keeps(row: list[float], top_p: float) -> None:
    logprobs = logprobs_of(row)
    ours, theirs = keep_top_p(logprobs, top_p), apply_top_p(logprobs, top_p)
    assert np.array_equal(kept(ours), kept(theirs))
    assert np.array_equal(np.array(ours)[kept(ours)], np.array(logprobs)[kept(ours)])


@settings(deadline=None)
@given(SHAPES, st.floats(1e-9, 0.999))
def test_min_p_keeps_what_mlx_lm_keeps(row: list[float], min_p: float) -> None:
    logprobs = logprobs_of(row)
    assert np.array_equal(kept(keep_min_p(logprobs, min_p)), kept(apply_min_p(logprobs, min_p)))


@settings(deadline=None)
@given(SHAPES, st.integers(1, 70))
def test_top_k_keeps_what_mlx_lm_keeps_and_its_equals(row: list[float], top_k: int) -> None:
    logprobs = logprobs_of(row)
    ours = keep_top_k(logprobs, top_k)
    if top_k >= len(row):
        assert np.array_equal(np.array(ours), np.array(logprobs))
        return
    theirs = apply_top_k(logprobs, top_k)
    assert not np.any(kept(theirs) & ~kept(ours))
    for mine, given_row, other in zip(*map(np.array, (ours, logprobs, theirs)), strict=True):
        least = other[np.isfinite(other)].min(initial=math.inf)
        assert np.array_equal(np.isfinite(mine), np.isfinite(given_row) & (given_row >= least))
