"""bench.bootstrap: intervals cover as often as they say, and blocks are what they are for."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import bootstrap
from bench.bootstrap import Interval, Values, interval, paired, sign_test


def coverage(draws: Sequence[Values], block: int) -> float:
    """The share of samples, all of mean 0, whose interval has 0 in it."""
    found = [interval(draw, block=block) for draw in draws]
    return float(np.mean([one.low <= 0 <= one.high for one in found]))


def test_an_interval_of_95_percent_covers_about_as_often() -> None:
    random = np.random.default_rng(1)
    for size in (16, 100):
        draws = list(random.standard_normal((300, size)))
        assert 0.90 < coverage(draws, 1) < 0.99


def test_blocks_are_needed_where_neighbours_are_alike() -> None:
    random = np.random.default_rng(2)
    noise = random.standard_normal((200, 1024))
    draws = [np.convolve(row, np.ones(8), "valid") for row in noise]  # alike over 8 tokens
    assert coverage(draws[:40], 1) < 0.7
    assert 0.90 < coverage(draws, 32) < 0.99


def test_the_interval_of_few_blocks_is_widened() -> None:
    values = [1.0, 2.0, 3.0, 4.0]
    drawn = np.random.default_rng(0).integers(0, 4, (bootstrap.RESAMPLES, 4))
    low, high = np.quantile(np.array(values)[drawn].mean(axis=1), [0.025, 0.975])
    found = interval(values)
    assert found.value == 2.5
    assert found.high - found.low == pytest.approx((high - low) * (4 / 3) ** 0.5)
    assert (found.blocks, found.nonzero, found.enough) == (4, 4, False)


def test_parts_are_cut_into_blocks_of_their_own() -> None:
    parts = ([0.0] * 5, [10.0] * 5)
    assert interval(*parts, block=4).blocks == 4  # 4 + 1, twice: none has both
    assert interval(*parts, block=5).blocks == 2
    assert interval(*parts, block=4).value == 5.0  # a short block weighs less


def test_pairs_cancel_what_is_hard_for_both() -> None:
    random = np.random.default_rng(3)
    hard = 100 * random.standard_normal(64)
    found = paired(hard, hard + 1 + 0.1 * random.standard_normal(64))
    assert found.value == pytest.approx(1, abs=0.05)
    assert found.high - found.low < 0.1
    assert found.sign == 1
    assert paired(hard, hard) == Interval(0, 0, 0, 64, 0)
    with pytest.raises(ValueError, match="paired"):
        paired([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="no values"):
        interval([])


def test_few_that_differ_show_nothing() -> None:
    """4 questions of 20, all for one side: the interval leaves 0 out, a sign test would not."""
    found = paired([1.0] * 4 + [0.0] * 16, [0.0] * 20)
    assert found.high < 0
    assert found.sign == 0
    assert paired([1.0] * 6 + [0.0] * 14, [0.0] * 20).sign == -1
    assert paired([1.0] * 6, [0.0] * 6).sign == 0  # too few questions in all


@pytest.mark.parametrize("few", range(7))
def test_the_sign_test_is_a_coin_s(few: int) -> None:
    for many in range(few, 10):
        heads = [bin(k).count("1") for k in range(2 ** (few + many))]
        as_clear = sum(min(k, few + many - k) <= few for k in heads) / len(heads)
        assert sign_test(few, many) == sign_test(many, few) == pytest.approx(as_clear)


def test_the_interval_alone_says_too_much_of_few_outcomes() -> None:
    for few, many in ((1, 7), (2, 9), (3, 11)):
        found = paired([0.0] * 60, [1.0] * many + [-1.0] * few + [0.0] * (60 - few - many))
        assert found.sign == 1
        assert sign_test(few, many) > bootstrap.UNLIKELY
    assert sign_test(0, 6) < bootstrap.UNLIKELY
    assert sign_test(0, 0) == sign_test(500, 500) == 1
    assert 0 <= sign_test(0, 5000) < 1e-300


def test_json_and_back() -> None:
    found = paired([1.0, 2.0, 4.0], [2.0, 4.5, 4.0])
    assert Interval.from_json(found.as_json()).nonzero == 2
    assert Interval.from_json(found.as_json()).value == pytest.approx(found.value, rel=1e-4)
    assert interval([0.5] * 8).text(1, sign=True, scale=100) == "+50.0 (+50.0 to +50.0)"
    assert interval([0.5]).text() == "0.500 (too few to say)"


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40), st.integers(1, 9))
def test_the_mean_lies_within(values: list[float], block: int) -> None:
    found = interval(values, block=block)
    assert found.value == pytest.approx(np.mean(values), abs=1e-6)
    assert found.low <= found.value + 1e-9
    assert found.high >= found.value - 1e-9
    assert found.blocks == -(-len(values) // block)
    assert found == interval(values, block=block)  # the same draws every time
