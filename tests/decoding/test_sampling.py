"""Drawing tokens: what may be asked, draws that are each token's own, temperatures of any size."""

import math
from typing import Any

import mlx.core as mx
import pytest

from mlx_cerebrum.decoding.decode import greedy
from mlx_cerebrum.decoding.sampling import Sampling, make_sampler
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


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"temp": -1.0}, "temp must be 0 (greedy) or above, not -1.0"),
        ({"temp": math.nan}, "temp must be 0 (greedy) or above, not nan"),
        ({"temp": math.inf}, "temp must be 0 (greedy) or above, not inf"),
        ({"top_p": 0.0}, "top-p must be above 0 and at most 1, not 0.0"),
        ({"top_p": 1.5}, "top-p must be above 0 and at most 1, not 1.5"),
        ({"min_p": 1.0}, "min-p must be from 0 to below 1, not 1.0"),
        ({"seed": -1}, "seed must be from 0 to 2^64 - 1, not -1"),
        ({"seed": 2**64}, "seed must be from 0 to 2^64 - 1, not 18446744073709551616"),
        ({"top_k": -1}, "top-k must be at least 0 (all), not -1"),
        ({"repetition_penalty": 0.0}, "repetition-penalty must be above 0, not 0.0"),
        ({"repetition_penalty": math.inf}, "repetition-penalty must be above 0, not inf"),
        ({"repetition_context": 0}, "repetition-context must be at least 1, not 0"),
        ({"frequency_penalty": 2.1}, "frequency-penalty must be from -2 to 2, not 2.1"),
        ({"presence_penalty": math.nan}, "presence-penalty must be from -2 to 2, not nan"),
        ({"logit_bias": ((-1, 1.0),)}, "logit-bias must name a token id, not -1"),
        ({"logit_bias": ((2**31, 1.0),)}, "logit-bias must name a token id, not 2147483648"),
        ({"logit_bias": ((1, 101.0),)}, "logit-bias must be from -100 to 100, not 101.0"),
        ({"logit_bias": ((1, math.nan),)}, "logit-bias must be from -100 to 100, not nan"),
        ({"logit_bias": ((1, 1.0), (1, 2.0))}, "logit-bias names a token twice"),
        ({"min_tokens": -1}, "min-tokens must be at least 0, not -1"),
    ],
)
def test_out_of_range(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as error:
        Sampling(**{"temp": 1.0} | asked)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"top_p": 0.5}, "change nothing at temp 0; set --temp above 0"),
        ({"min_p": 0.5}, "change nothing at temp 0; set --temp above 0"),
        ({"top_k": 5}, "change nothing at temp 0; set --temp above 0"),
        ({"seed": 1}, "change nothing at temp 0; set --temp above 0"),
        ({"repetition_context": 9}, "changes nothing without --repetition-penalty"),
        ({"ignore_eos": True, "min_tokens": 9}, "changes nothing with --ignore-eos"),
    ],
)
def test_what_would_change_nothing_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Sampling(**asked).check_used()


def test_what_changes_a_greedy_choice_is_not_refused() -> None:
    Sampling(top_k=0).check_used()
    Sampling(
        repetition_penalty=1.1, repetition_context=9, logit_bias=((1, 2.0),), min_tokens=3
    ).check_used()
    Sampling(frequency_penalty=0.1, presence_penalty=-0.1, ignore_eos=True).check_used()


def test_make_sampler_refuses_too() -> None:
    with pytest.raises(RequestError):
        make_sampler(-1.0)
    with pytest.raises(RequestError):
        make_sampler(0.0, top_p=0.5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("temp", [1e-4, 1e-30, 5e-324])
def test_a_tiny_temperature_draws_the_likeliest(temp: float, dtype: mx.Dtype) -> None:
    """Also at both ends of what float16 holds; of two that are as likely, either."""
    logits = mx.array(
        [
            [65504, 65280, -65504, 0],
            [-65504, -65280, -65504, -math.inf],
            [-0.5, -0.25, 0, 0.25],
            [65504, -65504, 65504, 0],
        ]
    ).astype(dtype)
    draws: Any = [Sampling(temp, seed=s).sampler()(logits, 0).tolist() for s in range(40)]
    assert {tuple(draw[:3]) for draw in draws} == {(0, 1, 3)}
    assert {draw[3] for draw in draws} == {0, 2}


@pytest.mark.parametrize("temp", [1e-30, 1e-4, 0.5, 1.0, 1e4, 1e30])
@pytest.mark.one_in(8)
def test_draws_follow_the_distribution(temp: float) -> None:
    probabilities = [0.5, 0.3, 0.15, 0.05]
    logits = mx.repeat(mx.log(mx.array([probabilities])) * temp, 5_000, axis=0)
    draws = Sampling(temp, seed=3).sampler()(logits, 0)
    for token, p in enumerate(probabilities):
        share = float(mx.mean(draws == token).item())  # type: ignore[arg-type]
        assert abs(share - p) < 4 * (p * (1 - p) / 5_000) ** 0.5


@pytest.mark.parametrize("temp", [1e30, 1e300])
def test_a_huge_temperature_draws_evenly_what_is_left(temp: float) -> None:
    logits = mx.array([[65504.0, 0.0, 65280.0, -65504.0, -math.inf]]).astype(mx.float16)
    sampler = Sampling(temp, top_k=3, seed=1).sampler()
    draws = [sampler(logits, number).item() for number in range(300)]
    assert {token: draws.count(token) > 70 for token in draws} == dict.fromkeys((0, 1, 2), True)


def test_top_k_cuts_the_tail() -> None:
    logits = mx.log(mx.array([[0.5, 0.3, 0.15, 0.05]]))
    for top_k in (1, 2, 3, 4, 5, 0, None):
        sampler = Sampling(1.0, seed=1, top_k=top_k).sampler()
        seen = {sampler(logits, number).item() for number in range(200)}
        assert seen == set(range(min(top_k or 4, 4)))


def test_greedy_whatever_the_rest_says() -> None:
    assert Sampling(0.0, top_p=0.5, min_p=0.1, seed=3, top_k=2).sampler() is greedy
