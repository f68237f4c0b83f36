"""Caches of several sequences together: one buffer for all of them at every position.

Keys carry their rotary position, so the columns of a buffer need not be in any row's order:
`columns` says which token's entry a row has in each, or that it has none there. A shorter row's
padding, what has left the window, and guesses taken back are then all the same, holes, and one
mask hides them. When the buffer is full, each row's live entries move to its front.

B sequences (rows), T columns.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_cerebrum.model.cache import Mask, WindowedKVCache
from mlx_cerebrum.model.entries import each, nbytes, pack
from mlx_cerebrum.model.rewind import Stretch

_NONE = -1  # in `columns`: no token's entry


class RowsCache:
    """One position's keys and values of all rows, `[B, H, T, D]`, as attention asks for them."""

    def __init__(self, rows: "Rows", keys: Any = None, values: Any = None) -> None:
        self.rows = rows
        self.keys, self.values = keys, values  # Entries

    @property
    def offset(self) -> mx.array:
        """The position of each row's next token, `[B]`; one array for all positions."""
        return self.rows.next_positions

    @property
    def state(self) -> tuple[Any, Any]:
        return self.keys, self.values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        return self.rows.mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Write `[B, H, L, D]` into the next L columns; return all columns up to there."""
        first, end = self.rows.used, self.rows.used + keys.shape[2]

        def write(buffer: mx.array, entries: mx.array) -> mx.array:
            buffer[..., first:end, :] = entries
            return buffer

        bits = self.rows.kv_bits
        self.keys = each(write, self.keys, pack(keys, bits))
        self.values = each(write, self.values, pack(values, bits))

        def seen(buffer: mx.array) -> mx.array:
            return buffer[..., :end, :]

        return each(seen, self.keys), each(seen, self.values)

    def trim(self, n: int) -> int:
        raise ValueError("rows take back tokens together: Rows.take_back")


class Rows:
    """The caches of sequences that run one layer map, all positions of them.

    A sequence comes with a cache of its own for every position (`join`). They give up their
    entries while it is here, and get them back when it leaves (`leave`). A step is announced
    (`begin`), run over `caches`, and then counted (`commit`); until it is counted nothing has
    changed. The last `rewind` tokens of any row can be taken back. Entries that marks of a row's
    own caches need are set aside there when they leave the buffer.
    """

    def __init__(self, like: Sequence[WindowedKVCache]) -> None:
        self.window, self.rewind, self.step = like[0].window, like[0].rewind, like[0].step
        self.kv_bits = like[0].kv_bits
        self.own: list[Sequence[WindowedKVCache]] = []  # of each row, without entries
        self.caches = [RowsCache(self) for _ in like]
        self.offsets = np.zeros(0, dtype=np.int64)  # [B], tokens each row has seen
        self.columns = np.zeros((0, 0), dtype=np.int64)  # [B, room], tokens
        self.used = 0  # columns with entries; the rest is room
        self.next_positions = mx.array([], dtype=mx.int32)
        self.mask: mx.array | None = None
        self._announced = np.zeros(0, dtype=np.int64)  # [B], new tokens of the step under way

    def __len__(self) -> int:
        return len(self.own)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, room to grow included."""
        return sum(nbytes(c.keys) + nbytes(c.values) for c in self.caches if c.keys is not None)

    # ---- A step

    def begin(self, lengths: Sequence[int]) -> None:
        """The next step has `max(lengths)` tokens of every row, of which `lengths` count.

        The others are padding: each sees its own entry only, which nothing else ever does.
        """
        self._announced = np.asarray(lengths)
        most = int(self._announced.max())
        if self.used + most > self.columns.shape[1]:
            self._repack(most)
        positions = self.offsets[:, None] + np.arange(most)  # [B, L]
        real = np.arange(most) < self._announced[:, None]
        end = self.used + most
        self.columns[:, self.used : end] = np.where(real, positions, _NONE)
        seen, queries = self.columns[:, None, :end], positions[:, :, None]
        visible = (seen >= 0) & (seen <= queries)  # [B, L, T]
        if self.window is not None:
            visible &= seen > queries - self.window
        if not real.all():
            row, column = np.nonzero(~real)
            visible[row, column] = False
            visible[row, column, self.used + column] = True
        self.mask = None if visible.all() else mx.array(visible[:, None])
        self.next_positions = mx.array(self.offsets.astype(np.int32))

    def commit(self) -> None:
        """The announced step has been run over all positions."""
        self.used += int(self._announced.max())
        self.offsets = self.offsets + self._announced

    def take_back(self, counts: Sequence[int]) -> None:
        """Take back so many of each row's last tokens, `rewind` at most."""
        if max(counts) > self.rewind:
            raise ValueError(f"can take back {self.rewind} tokens, not {max(counts)}")
        self.offsets = self.offsets - np.asarray(counts)
        self.columns[self.columns >= self.offsets[:, None]] = _NONE

    def _kept(self) -> np.ndarray[Any, Any]:
        """The first token of each row whose entry is still needed, `[B]`."""
        first = self.columns[:, : self.used].copy()
        first[first < 0] = np.iinfo(np.int64).max
        earliest = first.min(axis=1) if self.used else self.offsets
        if self.window is None:
            return earliest
        return np.maximum(earliest, self.offsets - (self.window - 1 + self.rewind))

    def _repack(self, length: int) -> None:
        """Move what is still needed to the front of new buffers with room for `length` more."""
        kept = self._kept()
        live = self.columns[:, : self.used] >= kept[:, None]
        keep = int(live.sum(axis=1).max()) if self.used else 0
        # Each row's live columns in their order, then any others: a hole is copied as it is.
        order = np.argsort(~live, axis=1, kind="stable")[:, :keep]
        room = keep + max(length + 1, self.step)
        columns = np.full((len(self), room), _NONE)
        columns[:, :keep] = np.take_along_axis(
            np.where(live, self.columns[:, : self.used], _NONE), order, axis=1
        )
        self._set_aside(kept)
        in_place = bool((order == np.arange(keep)).all())
        index = mx.array(order.astype(np.int32))[:, None, :, None]

        def moved(old: mx.array) -> mx.array:
            B, H, _, D = old.shape
            front = old[..., :keep, :] if in_place else mx.take_along_axis(old, index, axis=2)
            return mx.concatenate([front, mx.zeros((B, H, room - keep, D), old.dtype)], axis=2)

        caches = [RowsCache(self, each(moved, c.keys), each(moved, c.values)) for c in self.caches]
        # In one line, that Ctrl-C finds all moved or nothing.
        self.caches, self.columns, self.used = caches, columns, keep

    def _set_aside(self, kept: np.ndarray[Any, Any]) -> None:
        """Give each row's own caches the entries before `kept` that their marks need."""
        for row, own in enumerate(self.own):
            tokens = self.columns[row, : self.used]
            leaving = np.nonzero((tokens >= 0) & (tokens < kept[row]))[0]
            if leaving.size and own[0].marks:
                start, end = int(tokens[leaving[0]]), int(kept[row])
                for c, mine in zip(self.caches, own, strict=True):
                    mine.set_aside(self._stretch(c, row, leaving, start, end))

    # ---- Rows that come and go

    def join(self, own: Sequence[WindowedKVCache]) -> None:
        """Take in a sequence with its own caches, which have seen at least one token.

        It goes below the others. Where memory runs out in the middle, all are as they were, and
        the error is raised.
        """
        if len(self):  # all is copied anyway: holes need not be
            self._repack(0)
        arrived = [mine.lent() for mine in own]
        count, wide = len(self), self.columns.shape[1]
        start, end = arrived[0].start, arrived[0].end
        used = max(self.used, end - start)
        room = max(wide, used + self.step)

        def widened(entries: mx.array) -> mx.array:
            B, H, T, D = entries.shape
            if room == T:
                return entries
            more = mx.zeros((B, H, room - T, D), entries.dtype)
            return mx.concatenate([entries, more], axis=2)

        def below(new: mx.array, *above: mx.array) -> mx.array:
            return mx.concatenate([widened(entries) for entries in (*above, new)], axis=0)

        columns = np.full((count + 1, room), _NONE)
        columns[:-1, : self.used] = self.columns[:, : self.used]
        columns[-1, : end - start] = np.arange(start, end)
        rows, offsets = [*self.own, own], np.append(self.offsets, end)
        try:
            for c, new in zip(self.caches, arrived, strict=True):
                above = ((c.keys,), (c.values,)) if count else ((), ())
                keys, values = each(below, new.keys, *above[0]), each(below, new.values, *above[1])
                mx.eval(keys, values)  # one position's memory at a time
                c.keys, c.values = keys, values
            self.own, self.columns, self.used, self.offsets = rows, columns, used, offsets
        except BaseException:
            for c in self.caches:
                c.keys, c.values = (
                    each(lambda a: a[:count, :, :wide], kv) if count else None
                    for kv in (c.keys, c.values)
                )
            raise
        for mine in own:
            mine.give_up()

    def leave(self, row: int, keep: bool = True) -> None:
        """A sequence goes: its own caches get its entries back, and the rows below it move up.

        Where memory runs out, it has not left. Without `keep` its caches are left empty.
        """
        live = np.nonzero(self.columns[row, : self.used] >= 0)[0]
        end = int(self.offsets[row])
        if keep:
            back = [self._stretch(c, row, live, end - live.size, end) for c in self.caches]
            mx.eval([(stretch.keys, stretch.values) for stretch in back])
            for mine, stretch in zip(self.own[row], back, strict=True):
                mine.take_over(stretch)
        else:
            for mine in self.own[row]:
                mine.rewind_to(0)
        rest = [r for r in range(len(self)) if r != row]
        own, columns, offsets = [self.own[r] for r in rest], self.columns[rest], self.offsets[rest]

        def kept(buffer: mx.array) -> mx.array:
            return buffer[mx.array(rest)]

        caches = [
            RowsCache(self, each(kept, c.keys), each(kept, c.values)) if rest else RowsCache(self)
            for c in self.caches
        ]
        self.own, self.columns, self.offsets, self.caches = own, columns, offsets, caches

    @staticmethod
    def _stretch(
        cache: RowsCache, row: int, columns: np.ndarray[Any, Any], start: int, end: int
    ) -> Stretch:
        """A copy of what one row has in these columns, the tokens `start` to `end`."""
        index = mx.array(columns.astype(np.int32))

        def taken(buffer: mx.array) -> mx.array:
            return mx.take(buffer[row : row + 1], index, axis=2)

        return Stretch(each(taken, cache.keys), each(taken, cache.values), start, end)
