"""An order of blocks that serves several layer maps at once.

Every map is a subsequence of it, so each sequence meets the blocks of its own map in their order,
and a block that several need at the same entry is read once for all of them. The 7B's map lies
within the 12.25B's: together they read 56 blocks a token, not 88.
"""

from collections.abc import Iterable
from functools import lru_cache

Map = tuple[int, ...]
_WORTH = 0.9  # of the maps' lengths together; a longer schedule shares too little


def schedule(maps: Iterable[Map]) -> Map | None:
    """A short order of blocks that has every map as a subsequence; None where it saves too little.

    For two maps it is the shortest. More are taken in one after the other, longest first: the
    shortest for many is hard to find, and nothing but time depends on it.
    """
    return _schedule(frozenset(maps))


@lru_cache(maxsize=64)
def _schedule(maps: frozenset[Map]) -> Map | None:
    merged: Map = ()
    for one in sorted(maps, key=lambda m: (-len(m), m)):
        merged = shortest_common_supersequence(merged, one)
    shared = len(maps) > 1 and len(merged) > _WORTH * sum(map(len, maps))
    return None if shared else merged


def shortest_common_supersequence(a: Map, b: Map) -> Map:
    """The shortest sequence that has both as subsequences (dynamic programming, O(|a| |b|))."""
    if _within(b, a):
        return a
    # longest[i][j]: of the longest common subsequence of a[i:] and b[j:]
    longest = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in range(len(a) - 1, -1, -1):
        row, below = longest[i], longest[i + 1]
        for j in range(len(b) - 1, -1, -1):
            row[j] = below[j + 1] + 1 if a[i] == b[j] else max(below[j], row[j + 1])
    found: list[int] = []
    i = j = 0
    while i < len(a) and j < len(b):
        if a[i] == b[j]:
            found.append(a[i])
            i, j = i + 1, j + 1
        elif longest[i + 1][j] >= longest[i][j + 1]:
            found.append(a[i])
            i += 1
        else:
            found.append(b[j])
            j += 1
    return (*found, *a[i:], *b[j:])


def _within(part: Map, whole: Map) -> bool:
    blocks = iter(whole)
    return all(block in blocks for block in part)
