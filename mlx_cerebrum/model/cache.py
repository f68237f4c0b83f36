"""One KV cache per position, bounded by the sliding window, that can be rolled back.

Keys stay in time order in a linear buffer. When it fills up, the entries that can still
matter (`window - 1 + rewind`) move to the front of a new one, so decoding reads a plain
slice, and taking back up to `rewind` tokens is always exact. A rotating buffer, which
overwrites in place, has lost those entries by then.

Call signatures are those of mlx-lm's caches (its models/cache.py), so that either side's
generation loop runs on the other's caches.
"""

from collections.abc import Sequence
from typing import Any, Protocol, Self

import mlx.core as mx

from mlx_cerebrum.model.entries import Entries, Packed, each, nbytes, pack
from mlx_cerebrum.model.rewind import Marks, Stretch

Mask = mx.array | str | None
State = tuple[Any, Any, int, int, int, int, int, int]  # what WindowedKVCache.state says


class Cache(Protocol):
    """What attention asks of a cache; mlx-lm's caches answer it too."""

    @property
    def offset(self) -> Any: ...
    @property
    def state(self) -> Any: ...
    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]: ...
    def trim(self, n: int) -> int: ...
    def make_mask(self, N: int, return_array: bool, window_size: int | None) -> Mask: ...


def causal_mask(length: int, start: int, window: int | None) -> mx.array:
    """Which keys each query sees: boolean `[length, start + length]`.

    Query `i` (counted from key 0, so the first is `start`) sees key `j` when
    `i - window < j <= i`: the window counts the query's own key.
    """
    keys = mx.arange(start + length)[None]
    queries = mx.arange(start, start + length)[:, None]
    mask = keys <= queries
    return mask if window is None else mask & (keys > queries - window)


def attention_mask(length: int, start: int, window: int | None) -> Mask:
    """The cheapest mask that is right for `length` queries after `start` visible keys."""
    if window is not None and start + length > window:
        return None if length == 1 else causal_mask(length, start, window)
    return None if length == 1 else "causal"


REWIND = 64  # tokens that can always be taken back
STEP = 256  # least number of entries a full buffer grows by


def entries_held(window: int | None, prompt: int, generated: int, prefill_step: int) -> int:
    """The most entries that one position's buffer has room for during a request.

    Computed, not run: what `update_and_fetch` would allocate for `prompt - 1` tokens in chunks,
    then for one at a time. It takes as long for billions of tokens as for one.
    """
    whole, rest = divmod(max(0, prompt - 1), prefill_step)
    used = room = most = 0
    for length, chunks in ((prefill_step, whole), (rest, 1), (1, generated)):
        if used + length * chunks <= room:
            used += length * chunks
            continue
        fitting = (room - used) // length
        used, chunks = used + fitting * length, chunks - fitting
        keep = used + length * chunks if window is None else window - 1 + REWIND
        more = max(length + 1, STEP)  # a buffer's room for new entries: so many chunks each time
        last = (chunks - 1) // (more // length)
        used = min(min(used, keep) + last * (more // length) * length, keep)
        room = used + more
        most = max(most, room)
        used += (chunks - last * (more // length)) * length
    return most


class WindowedKVCache:
    """Keys and values `[B, H, T, D]` of one position; `offset` counts the tokens seen.

    After `mark`, `rewind_to` can come back to that point however far the window has moved on: the
    `window - 1` entries before it are set aside when they leave the buffer. Marks that are near
    each other share them. With `kv_bits` 8 or 4, entries are packed.
    """

    def __init__(
        self,
        window: int | None = None,
        rewind: int = REWIND,
        step: int = STEP,
        kv_bits: int | None = None,
    ) -> None:
        self.window = window
        self.rewind = rewind
        self.step = step
        self.kv_bits = kv_bits
        self.keys: Any = None  # Entries
        self.values: Any = None
        self.offset = 0
        self._start = 0  # which token the buffer's first entry belongs to
        self._marks = Marks(window)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Append `[B, H, L, D]`; return the `size() + L` entries these L queries may see."""
        length = keys.shape[2]
        new = pack(keys, self.kv_bits), pack(values, self.kv_bits)
        if self.keys is None or self._used() + length > self._room():
            self._make_room(*new)
        used = self._used()
        first, end = used - self.size(), used + length

        def write(buffer: mx.array, entries: mx.array) -> mx.array:
            buffer[..., used:end, :] = entries
            return buffer

        self.keys, self.values = each(write, self.keys, new[0]), each(write, self.values, new[1])
        self.offset += length
        return self._slice(self.keys, first, end), self._slice(self.values, first, end)

    @staticmethod
    def _slice(entries: Entries, first: int, end: int) -> Entries:
        sliced: Entries = each(lambda array: array[..., first:end, :], entries)
        return sliced

    def _used(self) -> int:
        """Entries in the buffer: those kept for `trim`, then the visible ones; then room."""
        return self.offset - self._start

    def _room(self) -> int:
        keys = self.keys.weight if isinstance(self.keys, Packed) else self.keys
        return int(keys.shape[2])

    def _make_room(self, keys: Entries, values: Entries) -> None:
        """Move what is still needed to the front of a new buffer with room for `keys`."""
        used = self._used()
        keep = used if self.window is None else min(used, self.window - 1 + self.rewind)
        self._marks.leave(Stretch(self.keys, self.values, self._start, self.offset - keep))

        def moved(new: mx.array, old: mx.array | None = None) -> mx.array:
            B, H, L, D = new.shape
            # One entry more than `keys` has. A write that fills an array whole is no copy in MLX:
            # the buffer would become a view of qkv_proj's output, and keep all of that.
            room = mx.zeros((B, H, max(L + 1, self.step), D), new.dtype)
            if old is None:
                return room
            return mx.concatenate([old[..., used - keep : used, :], room], axis=2)

        old = ((), ()) if self.keys is None else ((self.keys,), (self.values,))
        larger = each(moved, keys, *old[0]), each(moved, values, *old[1])
        # Together: Ctrl-C must not find a buffer that begins elsewhere than `_start` says.
        self.keys, self.values, self._start = *larger, self.offset - keep

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        """The mask for the next N queries, over the entries `update_and_fetch` will return.

        Raises ValueError for a window other than the one the cache keeps entries for.
        """
        if window_size is not None and window_size != self.window:
            raise ValueError(f"this cache keeps a window of {self.window}, not {window_size}")
        if return_array:
            return causal_mask(N, self.size(), self.window)
        return attention_mask(N, self.size(), self.window)

    def size(self) -> int:
        """Entries the next query can see besides its own."""
        return self.offset if self.window is None else min(self.offset, self.window - 1)

    def empty(self) -> bool:
        return self.keys is None

    @property
    def nbytes(self) -> int:
        """Bytes allocated: room to grow included, and what is kept for marks."""
        live = 0 if self.keys is None else nbytes(self.keys) + nbytes(self.values)
        return live + sum(stretch.nbytes for stretch in self._marks.aside)

    def is_trimmable(self) -> bool:
        return True

    def rewindable(self) -> int:
        """How many tokens `trim` can take back: `min(offset, rewind)` at least."""
        return self.offset - self._marks.earliest(self._start)

    def trim(self, n: int) -> int:
        """Take back the last `n` tokens, as if they had never been seen.

        Raises ValueError beyond `rewindable()`, where the entries are gone.
        """
        if n < 0:
            raise ValueError(f"can't take back {n} tokens")
        n = min(n, self.offset)
        if n > self.rewindable():
            raise ValueError(f"can take back {self.rewindable()} tokens, not {n}")
        self.offset -= n
        return n

    @property
    def marks(self) -> tuple[int, ...]:
        """The marked points, ascending."""
        return self._marks.points

    def mark(self, offset: int | None = None) -> None:
        """Keep this point, or one yet to come, reachable for `rewind_to`.

        Costs nothing until the window leaves it, then `window - 1` entries at most. Marked points
        less than a window apart share them, and keep every point between them reachable.
        """
        self._marks.add(self.offset if offset is None else offset)

    def keep_marks(self, points: Sequence[int]) -> None:
        """Have these marks and no others."""
        self._marks.keep(points)

    def drop_mark(self) -> None:
        """Give up the oldest mark, and what was kept for it alone."""
        self._marks.drop_oldest()

    def entries_for_marks(self) -> int:
        """How many entries the marks need: in the buffer, set aside, or yet to come."""
        return sum(end - start for start, end in self._marks.needed())

    def reachable(self, offset: int) -> int:
        """The latest point at or before `offset` that `rewind_to` can go to; 0 always can be."""
        return self._marks.reachable(offset, self._start, self.offset)

    def rewind_to(self, offset: int) -> None:
        """Go back to when `offset` tokens had been seen; later marks are forgotten.

        Raises ValueError for a point that is not `reachable`.
        """
        if self.reachable(offset) != offset:
            raise ValueError(f"the entries before token {offset} are gone")
        if offset == 0:
            self.keys, self.values, self._start = None, None, 0
        elif offset < self._marks.earliest(self._start):
            self.keys, self.values, self._start, _ = self._marks.take_back(offset, self._live())
        self.offset = offset
        self._marks.forget_after(offset)

    def _live(self) -> Stretch:
        return Stretch(self.keys, self.values, self._start, self.offset)

    @property
    def held_bytes(self) -> int:
        """Bytes of `nbytes` that `compact` would leave, or a little more."""
        return self.nbytes - self._spare_bytes()

    def _spare_bytes(self) -> int:
        live = 0 if self.keys is None else nbytes(self.keys) + nbytes(self.values)
        return live - live * self._used() // self._room() if live else 0

    def compact(self) -> None:
        """Give up the room to grow; the next token takes new room."""

        def copied(entries: mx.array) -> mx.array:  # a slice may stay a view of the whole
            return mx.contiguous(entries)

        if self.keys is not None:
            keys, values, *where = self.lent()
            self.take_over(Stretch(each(copied, keys), each(copied, values), *where))

    def lent(self) -> Stretch:
        """The live entries, to go on elsewhere (`rows.Rows`). Once they do, `give_up` leaves the
        cache its marks and what these need besides; `take_over` brings entries back."""
        used = self._used()
        keep = used if self.window is None else min(used, self.window - 1 + self.rewind)
        self.set_aside(Stretch(self.keys, self.values, self._start, self.offset - keep))
        return self._live().part(self.offset - keep, self.offset)

    def give_up(self) -> None:
        """Hold no entries until `take_over`."""
        self.keys, self.values = None, None

    def set_aside(self, stretch: Stretch) -> None:
        """Entries that follow those set aside before are given up: keep what marks need of them."""
        self._marks.leave(stretch)

    def take_over(self, live: Stretch) -> None:
        """Go on with these entries, lent before, and perhaps grown meanwhile."""
        self.keys, self.values, self._start, self.offset = live

    def whole(self) -> Stretch:
        """The buffer's entries with those set aside right before them: what a file holds."""
        run = [self._live().part(self._start, self.offset)]
        for stretch in reversed(self._marks.before(self._start)):
            if stretch.end == run[0].start:
                run.insert(0, stretch)
        return Stretch.joined(run)

    @property
    def state(self) -> State:
        """What a saved cache holds: keys, values, offset, start, window (0: none), rewind, step,
        bits (0: not packed). Marks are not part of it."""
        keys, values = self.keys, self.values
        if keys is not None:
            keys = self._slice(keys, 0, self._used())
            values = self._slice(values, 0, self._used())
        settings = (self.window or 0, self.rewind, self.step, self.kv_bits or 0)
        return (keys, values, self.offset, self._start, *settings)

    @state.setter
    def state(self, value: State) -> None:
        self.keys, self.values, self.offset, self._start, *settings = value
        window, self.rewind, self.step, bits = settings
        self.window, self.kv_bits = window or None, bits or None
        self._marks = Marks(self.window)

    @classmethod
    def from_state(cls, state: State) -> Self:
        cache = cls()
        cache.state = state
        return cache


def common_point(caches: Sequence[WindowedKVCache], offset: int) -> int:
    """The latest point at or before `offset` that all of them can go back to.

    Not all can go back equally far: one that has come further, or that a draft used too, may have
    given up what another still holds.
    """
    while (found := min((c.reachable(offset) for c in caches), default=offset)) < offset:
        offset = found
    return offset
