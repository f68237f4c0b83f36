"""The caches of a sequence whose other positions are cached on other machines.

The lead decides how far a sequence goes back, and only has its own caches to look at. Where a
buffer happens to hold more than it must, another machine's may not. So the first cache of a
sequence answers by what every machine is sure to hold.
"""

import copy
from collections import deque
from typing import Any

import mlx.core as mx

from mlx_cerebrum.model.cache import WindowedKVCache
from mlx_cerebrum.ranks.announcement import What

Change = tuple[What, int, int, int]


class Journal:
    """What became of sequences since the last step. Dropped ones come from any thread."""

    def __init__(self) -> None:
        self._changes: deque[Change] = deque()
        self._sequences = 0

    def __len__(self) -> int:
        return len(self._changes)

    def begin(self, view: int, kv_bits: int | None) -> int:
        """The number of a new sequence."""
        return self._add(What.BEGUN, view, kv_bits or 0)

    def copy(self, sequence: int) -> int:
        return self._add(What.COPIED, sequence, 0)

    def note(self, what: What, sequence: int) -> None:
        self._changes.append((what, sequence, 0, 0))

    def take(self) -> list[Change]:
        return [self._changes.popleft() for _ in range(len(self._changes))]

    def _add(self, what: What, first: int, second: int) -> int:
        self._sequences += 1
        self._changes.append((what, self._sequences, first, second))
        return self._sequences


class LeadCache(WindowedKVCache):
    """The first position's cache of a sequence; it stands for those of all machines."""

    def __init__(
        self, journal: Journal, view: int, window: int | None, kv_bits: int | None, count: int = 1
    ) -> None:
        """count: positions whose bytes it stands for, its own and those on other machines."""
        super().__init__(window, kv_bits=kv_bits)
        self.journal, self.view, self.count = journal, view, count
        self.sequence = journal.begin(view, kv_bits)
        self.told = 0  # tokens that the other machines have seen too
        self._sure = 0  # the first token whose entry every buffer holds

    def __del__(self) -> None:
        if hasattr(self, "sequence"):
            self.journal.note(What.DROPPED, self.sequence)

    def __deepcopy__(self, memo: dict[int, Any]) -> "LeadCache":
        memo[id(self)] = other = object.__new__(LeadCache)
        other.__dict__.update(
            {k: v if k == "journal" else copy.deepcopy(v, memo) for k, v in self.__dict__.items()}
        )
        other.sequence = self.journal.copy(self.sequence)
        return other

    @property
    def nbytes(self) -> int:
        return super().nbytes * self.count

    @property
    def held_bytes(self) -> int:
        return self.nbytes - self._spare_bytes() * self.count

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        found = super().update_and_fetch(keys, values)
        if self.window is not None:
            self._sure = max(self._sure, self.offset - (self.window - 1 + self.rewind))
        return found

    def compact(self) -> None:
        super().compact()
        self.journal.note(What.COMPACTED, self.sequence)

    def mark(self, offset: int | None = None) -> None:
        """As before, but a point that is out of reach already would be reachable here alone."""
        point = self.offset if offset is None else offset
        if point >= self.offset or self.reachable(point) == point:
            super().mark(point)

    def rewindable(self) -> int:
        return self.offset - self._marks.earliest(self._sure)

    def reachable(self, offset: int) -> int:
        return self._marks.surely_reachable(min(offset, self.told), self._sure, self.offset)

    def rewind_to(self, offset: int) -> None:
        super().rewind_to(offset)
        self._sure = min(self._sure, self._marks.first_seen(offset))
        self.told = min(self.told, offset)

    def trim(self, n: int) -> int:
        taken = super().trim(n)
        self.told = min(self.told, self.offset)
        return taken
