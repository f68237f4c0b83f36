"""Which tokens stay: the filters beside mlx-lm's."""

import math
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

from mlx_cerebrum.decoding.filters import keep_min_p, keep_top_k, keep_top_p


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
