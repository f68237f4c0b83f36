"""Where a layer map is cut, so that several machines in a row each run a part of its positions.

Machine 0 runs positions 0 to cuts[0] - 1, machine 1 from there to cuts[1] - 1, and so on. A machine
holds the blocks of its own positions. A block that runs on both sides of a cut is held twice, so
where a map is cut decides how much memory all of them need:

    choose_cuts(LayerPlan.named("cerebrum-12.25b").layer_map(32), (1.0, 1.0))  # (28,): 16 + 16
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence, Set
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from mlx_cerebrum.errors import PlanError, shown

_Totals = npt.NDArray[np.int64]
_Loads = npt.NDArray[np.float64]
# For each end of a segment, from 0: what it costs and how full it fills its machine, by its start.
_Segments = Iterator[tuple[_Totals, _Loads]]

_NEVER = 2**60  # the cost of what can't be; two of them still fit in 64 bits
_ALIKE = 1.1  # loads this near to the best are as good: the even share of the positions is faster
_CUTS = re.compile(r"\s*[0-9]{1,6}\s*(,\s*[0-9]{1,6}\s*)*")


def choose_cuts(
    layer_map: Sequence[int],
    memory: Sequence[float],
    block_bytes: float = 1.0,
    position_bytes: float = 0.0,
    first_bytes: float = 0.0,
) -> tuple[int, ...]:
    """The best ascending positions to cut at, one fewer than machines; none is left without any.

    What counts, in this order: that every machine's part fits in its memory, where a cut does
    that; the fewest blocks held in all, so none twice where possible; the least worst load, to
    within a tenth, a load being a part's bytes over the machine's memory; the most even number of
    positions, which is what the pace at a prompt hangs on. All cuts are compared, in a time that
    grows with machines x positions^2.

    memory: bytes of each machine that the model may take, machine 0 first. Where they are not
        known, 1.0 for each: machines count as alike, and nothing as too large.
    block_bytes: weights of one block.
    position_bytes: what a position takes besides, held by the machine that runs it (its cache).
    first_bytes: what machine 0 holds besides its blocks (embedding, head and final norm).

    Raises PlanError for no machine, more machines than positions, or a memory that is not above
    zero.
    """
    positions, machines = len(layer_map), len(memory)
    check_machines(positions, machines)
    for machine, size in enumerate(memory):
        if not (math.isfinite(size) and size > 0):
            raise PlanError(f"machine {machine} has a memory of {size:g}; it must be above zero")

    def segments_within(most: float, even: bool) -> Callable[[int], _Segments]:
        def by_machine(machine: int) -> _Segments:
            extra = first_bytes if machine == 0 else 0.0
            for held, lengths in _held(layer_map):
                load = (held * block_bytes + lengths * position_bytes + extra) / memory[machine]
                cost = held * (positions**2 + 1) + lengths**2 if even else held
                yield np.where((load <= most) & (lengths > 0), cost, _NEVER), load

        return by_machine

    for most in (1.0, math.inf):  # what fits, else all
        found = _cheapest(positions, machines, segments_within(most, even=False))
        if found is not None:
            break
    assert found is not None
    alike = min(most, found[1] * _ALIKE)
    even = _cheapest(positions, machines, segments_within(alike, even=True))
    assert even is not None
    return even[0]


def check_machines(positions: int, machines: int) -> None:
    """Raise PlanError unless so many machines can each run a position at least."""
    if not 1 <= machines <= positions:
        raise PlanError(
            f"{positions} positions can be shared out to 1 to {positions} machines, not {machines}"
        )


def parse_split(text: str, positions: int, machines: int) -> tuple[int, ...]:
    """The cuts a person asked for, as `20,36`. Raises PlanError, one line, for any others."""
    wanted, said = machines - 1, f"--split {shown(text)}"
    if machines == 1:
        raise PlanError(f"{said}: one machine runs all positions; leave it out")
    if not _CUTS.fullmatch(text):
        raise PlanError(f"{said} is not a list of positions such as 20,36")
    cuts = tuple(int(cut) for cut in text.split(","))
    if len(cuts) != wanted:
        raise PlanError(
            f"{said} cuts at {_count(len(cuts), 'position')}; {machines} machines need {wanted}"
        )
    for cut in cuts:
        if not 0 < cut < positions:
            raise PlanError(
                f"{said}: can't cut at {cut}; the {positions} positions can be cut at 1 to"
                f" {positions - 1}"
            )
    for cut, later in pairwise(cuts):
        if later <= cut:
            raise PlanError(f"{said}: {later} comes after {cut}; positions must ascend")
    return cuts


def segments(layer_map: Sequence[int], cuts: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The part of the map that each machine runs: a block for each of its positions."""
    ends = (0, *cuts, len(layer_map))
    return tuple(tuple(layer_map[a:b]) for a, b in pairwise(ends))


def segments_of_view(
    view_map: Sequence[int], blocks_of_each: Sequence[Set[int]]
) -> tuple[tuple[int, ...], ...] | None:
    """Another map over the same blocks, shared out to machines that already hold theirs.

    blocks_of_each: the blocks that each machine holds, machine 0 first.
    Returns the part each machine runs, in their order, with as few empty parts as possible, then
    the most even; None where no cuts give every machine blocks that it holds.
    """
    positions = len(view_map)

    def by_machine(machine: int) -> _Segments:
        first = 0  # of the positions up to the end that this machine could run in a row
        for end in range(positions + 1):
            if end and view_map[end - 1] not in blocks_of_each[machine]:
                first = end
            lengths = np.arange(end, -1, -1)
            cost = np.where(lengths > 0, lengths**2, positions**2 + 1)
            cost[:first] = _NEVER
            yield cost, np.zeros(end + 1)

    found = _cheapest(positions, len(blocks_of_each), by_machine)
    return None if found is None else segments(view_map, found[0])


def _held(layer_map: Sequence[int]) -> Iterator[tuple[_Totals, _Totals]]:
    """For each end, from 0: how many blocks, and positions, it has from each start up to it."""
    held = np.zeros(len(layer_map) + 1, np.int64)
    last: dict[int, int] = {}
    yield held[:1], held[:1]
    for end, block in enumerate(layer_map, 1):
        held[last.get(block, -1) + 1 : end] += 1  # new to what starts after it ran last
        last[block] = end - 1
        yield held[: end + 1], np.arange(end, -1, -1)


def _cheapest(
    positions: int, machines: int, segments_of: Callable[[int], _Segments]
) -> tuple[tuple[int, ...], float] | None:
    """The cuts with the least sum of costs and, of those, the least worst load; and that load.

    Exact, by dynamic programming: the best way to end at a position with one machine more begins
    with a best way to end where that machine starts. None where all cost _NEVER.
    """
    total = np.full(positions + 1, _NEVER)
    total[0] = 0
    worst = np.zeros(positions + 1)
    starts = []  # for each machine, where its best segment up to each end begins
    for machine in range(machines):
        ends, ends_worst = np.full_like(total, _NEVER), np.zeros_like(worst)
        start = np.zeros(positions + 1, np.int64)
        for end, (cost, load) in enumerate(segments_of(machine)):
            sums = total[: end + 1] + cost
            least = sums.min()
            if least < _NEVER:
                fill = np.where(sums == least, np.maximum(worst[: end + 1], load), np.inf)
                at = fill.argmin()
                ends[end], ends_worst[end], start[end] = least, fill[at], at
        total, worst = ends, ends_worst
        starts.append(start)
    if total[positions] >= _NEVER:
        return None
    cuts = [positions]
    for start in reversed(starts[1:]):
        cuts.append(int(start[cuts[-1]]))
    return tuple(reversed(cuts[1:])), float(worst[positions])


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
