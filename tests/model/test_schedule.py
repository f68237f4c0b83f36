"""One order of blocks that several layer maps lie in."""

import itertools
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_cerebrum.model import schedule as module
from mlx_cerebrum.model.schedule import Map, schedule, shortest_common_supersequence
from mlx_cerebrum.plan.layer_plan import resolve

SEVEN: Map = tuple(range(32))
TWELVE: Map = resolve("cerebrum-12.25b").layer_map(32)
REPEATS = [
    (*range(j + 1), *range(i, 32)) for i in range(32) for j in range(i, 32)
]  # one run of blocks i to j comes twice

maps = st.lists(st.integers(0, 4), min_size=1, max_size=12).map(tuple)


def within(part: Map, whole: Map) -> bool:
    at = 0
    for block in whole:
        at += at < len(part) and part[at] == block
    return at == len(part)


def longest_common(a: Map, b: Map) -> int:
    """By trying all subsequences of the shorter."""
    a, b = sorted((a, b), key=len)
    return next(
        count
        for count in range(len(a), -1, -1)
        if any(within(part, b) for part in itertools.combinations(a, count))
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(maps, min_size=1, max_size=5))
def test_every_map_lies_in_it(wanted: list[Map]) -> None:
    found = schedule(wanted)
    distinct = set(wanted)
    if found is None:
        assert len(distinct) > 1
        return
    assert all(within(one, found) for one in distinct)
    assert len(distinct) == 1 or len(found) <= 0.9 * sum(map(len, distinct))
    assert schedule([*reversed(wanted), *wanted]) == found


@settings(max_examples=80, deadline=None)
@given(maps.map(lambda m: m[:8]), maps)
def test_for_two_it_is_the_shortest(a: Map, b: Map) -> None:
    found = shortest_common_supersequence(a, b)
    assert within(a, found)
    assert within(b, found)
    assert len(found) == len(a) + len(b) - longest_common(a, b)


def test_the_7b_lies_in_the_12b() -> None:
    assert len(TWELVE) == 56
    assert schedule([SEVEN, TWELVE]) == TWELVE


def test_of_one_map_it_is_the_map() -> None:
    assert schedule([TWELVE, TWELVE]) == TWELVE


def test_all_single_repeats_take_twice_the_blocks() -> None:
    """Each stays within the 32 blocks run twice; taken in shortest first it would be far longer."""
    assert len(REPEATS) == 528
    found = schedule(REPEATS)
    assert found is not None
    assert len(found) == 64
    assert all(within(one, found) for one in REPEATS)


def test_maps_with_too_little_in_common_have_none() -> None:
    assert schedule([(0, 1, 2), (3, 4, 5)]) is None
    # 0.9 of both lengths together is enough.
    assert schedule([(0, 1, 2, 3, 4), (5, 6, 7, 3, 8)]) == (0, 1, 2, 5, 6, 7, 3, 4, 8)
    assert schedule([(0, 1, 2, 3, 4, 9), (5, 6, 7, 3, 8)]) is None


def test_four_long_maps_take_little_time() -> None:
    """5 ms are wanted; another program on this machine may take most of its time."""
    draw = random.Random(1)
    four = [
        TWELVE,
        *(tuple(sorted(draw.choices(range(32), k=56))) for _ in range(2)),
        (*SEVEN, *SEVEN[:24]),
    ]
    taken = []
    for _ in range(5):
        module._schedule.cache_clear()
        started = time.thread_time()
        schedule(four)
        taken.append(time.thread_time() - started)
    assert min(taken) < 0.05


@pytest.mark.parametrize("at", [0, 10, 30])
def test_two_entries_swapped_would_be_noticed(at: int) -> None:
    found = list(TWELVE)
    found[at], found[at + 1] = found[at + 1], found[at]
    assert not within(TWELVE, tuple(found))
