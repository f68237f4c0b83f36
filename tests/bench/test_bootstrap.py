"""bench.bootstrap: intervals cover as often as they say, and blocks are what they are for."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from conftest import slow

from bench import bootstrap
from bench.bootstrap import Interval, Values, interval, paired, sign_test, standard_error


def coverage(draws: Sequence[Values], block: int) -> float:
    """The share of samples, all of mean 0, whose interval has 0 in it."""
    found = [interval(draw, block=block) for draw in draws]
    return float(np.mean([one.low <= 0 <= one.high for one in found]))


def alike(rows: int) -> list[Values]:
    """Samples of mean 0 whose neighbours are alike over 8 values."""
    noise = np.random.default_rng(2).standard_normal((rows, 1024))
    return [np.convolve(row, np.ones(8), "valid") for row in noise]


@slow
def test_an_interval_of_95_percent_covers_about_as_often() -> None:
    random = np.random.default_rng(1)
    for size in (16, 100):
        assert 0.90 < coverage(list(random.standard_normal((300, size))), 1) < 0.99


@slow
def test_blocks_are_needed_where_neighbours_are_alike() -> None:
    draws = alike(200)
    assert coverage(draws[:40], 1) < 0.7
    assert 0.90 < coverage(draws, 32) < 0.99
    # About one mean in 20 lies more than two standard errors away; by tokens, one in 2.
    assert sum(abs(draw.mean()) > 2 * standard_error(draw) for draw in draws) < 30


def test_the_standard_error_is_of_blocks() -> None:
    random = np.random.default_rng(1)
    hard = random.standard_normal(10)
    error = standard_error(np.repeat(hard, 32))  # 10 values, however many tokens say them
    assert error == pytest.approx(hard.std(ddof=1) / math.sqrt(10))
    # A last token alone is a block that weighs a 320th of the others' sum.
    assert standard_error(np.append(np.repeat(hard, 32), 5.0)) == pytest.approx(error, rel=0.1)
    few = random.standard_normal(63)  # of fewer than 64, the tokens'
    assert standard_error(few) == pytest.approx(few.std(ddof=1) / math.sqrt(63))
    assert standard_error(few[:1]) == math.inf


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
    with pytest.raises(ValueError, match="no values"):
        interval([])


def test_pairs_cancel_what_is_hard_for_both() -> None:
    random = np.random.default_rng(3)
    hard = 100 * random.standard_normal(64)
    found = paired(hard, hard + 1 + 0.1 * random.standard_normal(64))
    assert found.value == pytest.approx(1, abs=0.05)
    assert found.high - found.low < 0.1
    assert found.sign == 1
    assert paired(hard, hard) == Interval(0, 0, 0, 64, 0)


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


def test_json_and_back() -> None:
    found = paired([1.0, 2.0, 4.0], [2.0, 4.5, 4.0])
    assert Interval.from_json(found.as_json()).nonzero == 2
    assert Interval.from_json(found.as_json()).value == pytest.approx(found.value, rel=1e-4)
    assert interval([0.5] * 8).text(1, sign=True, scale=100) == "+50.0 (+50.0 to +50.0)"
    assert interval([0.5]).text() == "0.500 (too few to say)"
