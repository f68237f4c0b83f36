"""What the lead tells the others: bounded whole numbers, and nothing that could be run.

An announcement begins with `HEAD` numbers of 32 bits, 1 KB, which hold nearly every step's body
too; what is longer follows in a second array. Whoever reads one checks every number against what
it can be: a peer that is not one of ours, or not in step, is refused and never obeyed.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from mlx_cerebrum.errors import MachineError
from mlx_cerebrum.ranks.links import Numbers

HEAD = 256  # numbers
MOST_BODY = 1 << 20  # numbers
MOST_TOKENS = 1 << 20  # of a step
MAGIC = 0x4D4C5843  # "MLXC"
_FIXED = 6  # numbers before the body


class Kind(IntEnum):
    BEAT = 0  # nothing to do; `number` milliseconds until the next word
    STEP = 1  # run `number` tokens, whose hidden states follow
    END = 2  # the program is over
    ROUND = 3  # a beat that the last machine hands back to the lead


BEATS = (Kind.BEAT, Kind.ROUND)


class What(IntEnum):
    """What became of a sequence's caches since the last step."""

    BEGUN = 0  # sequence, view, kv bits (0: not packed)
    COPIED = 1  # sequence, of which, 0
    COMPACTED = 2  # sequence, 0, 0
    DROPPED = 3  # sequence, 0, 0


@dataclass(frozen=True)
class View:
    """An order of the blocks, and where it is cut."""

    number: int
    layer_map: tuple[int, ...]
    cuts: tuple[int, ...]
    scales: tuple[tuple[float, float], ...] | None = None


@dataclass(frozen=True)
class Part:
    """A sequence's tokens in a step. Its caches have seen `offset` before, and keep `marks`."""

    sequence: int
    view: int
    length: int
    offset: int
    marks: tuple[int, ...]
    wanted: bool  # whether its hidden states are to come back


@dataclass(frozen=True)
class Step:
    """Everything a follower must know to run its part of a step."""

    parts: list[Part]
    changes: list[tuple[What, int, int, int]] = field(default_factory=list)  # in this order
    views: list[View] = field(default_factory=list)  # new ones

    @property
    def tokens(self) -> int:
        return sum(part.length for part in self.parts)

    def body(self) -> list[int]:
        out = [len(self.views), len(self.changes), len(self.parts)]
        for view in self.views:
            out += [view.number, len(view.layer_map), len(view.cuts), int(view.scales is not None)]
            out += [*view.layer_map, *view.cuts]
            for pair in view.scales or ():
                out += struct.unpack("<4i", struct.pack("<2d", *pair))
        for change in self.changes:
            out += [int(number) for number in change]
        for part in self.parts:
            out += [part.sequence, part.view, part.length, part.offset, int(part.wanted)]
            out += [len(part.marks), *part.marks]
        return out

    @classmethod
    def of(cls, body: Sequence[int]) -> "Step":
        """Raises MachineError for what is no step."""
        reader = _Reader(body)
        counts = [reader.upto(MOST_BODY) for _ in range(3)]
        views = [_view(reader) for _ in range(counts[0])]
        changes = [
            (What(reader.upto(max(What))), reader.upto(), reader.upto(), reader.upto())
            for _ in range(counts[1])
        ]
        parts = []
        for _ in range(counts[2]):
            sequence, view, length = reader.upto(), reader.upto(), reader.upto(MOST_TOKENS)
            offset, wanted = reader.upto(), bool(reader.upto(1))
            marks = tuple(reader.upto() for _ in range(reader.upto(MOST_BODY)))
            parts.append(Part(sequence, view, length, offset, marks, wanted))
        reader.end()
        return cls(parts, changes, views)


def _view(reader: "_Reader") -> View:
    number, positions, cuts = reader.upto(), reader.upto(MOST_BODY), reader.upto(MOST_BODY)
    scaled = reader.upto(1)
    layer_map = tuple(reader.upto() for _ in range(positions))
    where = tuple(reader.upto(positions) for _ in range(cuts))
    scales = tuple(reader.pair() for _ in range(positions)) if scaled else None
    return View(number, layer_map, where, scales)


class _Reader:
    def __init__(self, body: Sequence[int]) -> None:
        self._left: Iterator[int] = iter(body)

    def upto(self, most: int = 2**31 - 1) -> int:
        """The next number, 0 to `most`."""
        number = self._next()
        if not 0 <= number <= most:
            raise MachineError(f"a machine sent {number} where 0 to {most} can be")
        return number

    def pair(self) -> tuple[float, float]:
        numbers = [self._next() for _ in range(4)]
        first, second = struct.unpack("<2d", struct.pack("<4i", *numbers))
        if not (abs(first) < 1e30 and abs(second) < 1e30):
            raise MachineError("a machine sent a scale that is no number")
        return first, second

    def _next(self) -> int:
        try:
            return next(self._left)
        except StopIteration:
            raise MachineError("a machine sent a step that ends early") from None

    def end(self) -> None:
        if next(self._left, None) is not None:
            raise MachineError("a machine sent a step with more than it says")


@dataclass(frozen=True)
class Announcement:
    kind: Kind
    serial: int  # of all but beats, from 0
    number: int = 0  # see Kind
    body: list[int] = field(default_factory=list)

    def packed(self) -> list[Numbers]:
        """The first array, and a second where the body is long."""
        most = HEAD - _FIXED
        head = np.zeros(HEAD, dtype=np.int32)
        head[:5] = MAGIC, self.kind, self.serial, self.number, len(self.body)
        first = self.body[:most]
        head[_FIXED : _FIXED + len(first)] = first
        rest = self.body[most:]
        return [head, np.asarray(rest, dtype=np.int32)] if rest else [head]

    @staticmethod
    def more(head: Numbers) -> int:
        """How many numbers follow in a second array. Raises MachineError for no announcement."""
        length = int(head[4])
        if head[0] != MAGIC or not 0 <= length <= MOST_BODY:
            raise MachineError("a machine sent what is no announcement: it runs another program")
        return max(0, length - (HEAD - _FIXED))

    @classmethod
    def of(cls, head: Numbers, rest: Numbers | None, serial: int) -> "Announcement":
        """Raises MachineError for what is none, or not the next one."""
        kind, number, length = int(head[1]), int(head[3]), int(head[4])
        if kind not in [*Kind] or not 0 <= number <= MOST_TOKENS:
            raise MachineError("a machine sent what is no announcement: it runs another program")
        if kind not in BEATS and int(head[2]) != serial:
            raise MachineError(f"a machine is at step {int(head[2])}, this one at {serial}")
        body = [int(each) for each in head[_FIXED : _FIXED + min(length, HEAD - _FIXED)]]
        if rest is not None:
            body += [int(each) for each in rest]
        return cls(Kind(kind), serial, number, body)
