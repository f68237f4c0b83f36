"""Points a cache can go back to after its window has left them: what to set aside, and how."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_cerebrum.model.entries import each, nbytes


class Stretch(NamedTuple):
    """Keys and values `[B, H, T, D]` of the tokens `start` to `end`; T may be more."""

    keys: Any
    values: Any
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return nbytes(self.keys) + nbytes(self.values)

    def part(self, start: int, end: int, copy: bool = False) -> "Stretch":
        """Those of the tokens `start` to `end`. What is not copied keeps the whole alive."""
        first, last = start - self.start, end - self.start

        def cut(array: mx.array) -> mx.array:
            if copy:  # a gather: a slice may stay a view
                return mx.take(array, mx.arange(first, last), axis=2)
            return array[..., first:last, :]

        return Stretch(each(cut, self.keys), each(cut, self.values), start, end)

    @staticmethod
    def joined(stretches: Sequence["Stretch"]) -> "Stretch":
        """Stretches that follow each other, each without room, as one."""

        def join(*arrays: mx.array) -> mx.array:
            return mx.concatenate(list(arrays), axis=2)

        keys, values = [s.keys for s in stretches], [s.values for s in stretches]
        first, last = stretches[0].start, stretches[-1].end
        return Stretch(each(join, *keys), each(join, *values), first, last)


class Marks:
    """Marked points of one cache, and the entries they need that have left its buffer.

    Going back to a point needs the `window - 1` entries before it; without a window, all of them.
    Marks near each other share entries. What the buffer still holds is not held here too.
    """

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.points: tuple[int, ...] = ()  # ascending
        # Ascending and apart. Where Ctrl-C came before their buffer was moved, they are in it too.
        self.aside: list[Stretch] = []

    def add(self, point: int) -> None:
        self.points = tuple(sorted({*self.points, point}))

    def drop_oldest(self) -> None:
        self.points = self.points[1:]
        self._tidy()

    def keep(self, points: Sequence[int]) -> None:
        """Have these marks and no others."""
        self.points = tuple(sorted(points))
        self._tidy()

    def forget_after(self, point: int) -> None:
        self.points = tuple(p for p in self.points if p <= point)
        self._tidy()

    def first_seen(self, point: int) -> int:
        """The first token that the one after `point` tokens can see."""
        return 0 if self.window is None else max(0, point - (self.window - 1))

    def earliest(self, start: int) -> int:
        """The earliest point that the entries from token `start` on are enough for."""
        return start if start == 0 or self.window is None else start + self.window - 1

    def needed(self) -> list[tuple[int, int]]:
        """Whose entries the marks need: tokens `start` to `end`, ascending and apart."""
        found: list[tuple[int, int]] = []
        for point in self.points:
            start = self.first_seen(point)
            if found and start <= found[-1][1]:
                start, _ = found.pop()
            found.append((start, point))
        return found

    def leave(self, stretch: Stretch) -> None:
        """`stretch` leaves the buffer: set aside the parts of it that marks need."""
        first = max([stretch.start, *(s.end for s in self.aside[-1:])])
        if first < stretch.end:
            self.aside += self._copied(stretch.part(first, stretch.end))

    def before(self, start: int) -> list[Stretch]:
        """What is set aside of the tokens before `start`, where the buffer begins."""
        ends = ((s, min(s.end, start)) for s in self.aside)
        return [s if end == s.end else s.part(s.start, end) for s, end in ends if s.start < end]

    def _copied(self, stretch: Stretch) -> list[Stretch]:
        both = [(max(a, stretch.start), min(b, stretch.end)) for a, b in self.needed()]
        parts = [stretch.part(start, end, copy=True) for start, end in both if start < end]
        if parts:
            mx.async_eval(parts)  # until it is done the whole of `stretch` stays
        return parts

    def _tidy(self) -> None:
        kept: list[Stretch] = []
        for stretch in self.aside:
            whole = any(a <= stretch.start and stretch.end <= b for a, b in self.needed())
            kept += [stretch] if whole else self._copied(stretch)
        self.aside = kept

    def reachable(self, point: int, start: int, end: int) -> int:
        """The latest point, up to this one, that can be gone back to. 0 always can be.

        The buffer holds the entries of tokens `start` to `end`.
        """
        return self._latest(point, [*((s.start, s.end) for s in self.before(start)), (start, end)])

    def surely_reachable(self, point: int, start: int, end: int) -> int:
        """The same for any buffer that holds the tokens `start` to `end` at least, as far as no
        buffer is looked into: what marks need is set aside, or still there."""
        needed = [(first, min(last, end)) for first, last in self.needed()]
        needed = [(first, last) for first, last in needed if first < last]
        return self._latest(point, sorted([*needed, (start, end)]))

    def _latest(self, point: int, held: Sequence[tuple[int, int]]) -> int:
        runs: list[tuple[int, int]] = []  # without a gap
        for first, last in held:
            if runs and first <= runs[-1][1]:
                before, end = runs.pop()
                first, last = before, max(end, last)
            runs.append((first, last))
        ends = ((a, min(point, b)) for a, b in runs)
        return max((end for a, end in ends if self.earliest(a) <= end), default=0)

    def take_back(self, point: int, live: Stretch) -> Stretch:
        """The entries needed at a reachable point, out of `aside` and `live`."""
        start = self.first_seen(point)
        held = [*self.before(live.start), live]
        held = [s for s in held if s.start <= point and start <= s.end]
        self.aside = [s for s in self.aside if s.end < start]
        return Stretch.joined([s.part(s.start, min(s.end, point)) for s in held])
