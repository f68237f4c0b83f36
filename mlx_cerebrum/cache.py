"""One KV cache per position, bounded by the sliding window, that can be rolled back.

Keys stay in time order in a linear buffer. When it fills up, the entries that can still
matter (`window - 1 + rewind`) move to the front of a new one, so decoding reads a plain
slice, and taking back up to `rewind` tokens is always exact. A rotating buffer, which
overwrites in place, has lost those entries by then.

Call signatures are those of mlx-lm's caches (its models/cache.py), so that either side's
generation loop runs on the other's caches.
"""

from typing import Self

import mlx.core as mx

Mask = mx.array | str | None


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
    """Most entries one position's buffer has room for in a request, without running it.

    What `update_and_fetch` allocates for `prompt - 1` tokens in chunks, then one at a time.
    """
    chunks = [min(prefill_step, prompt - 1 - i) for i in range(0, prompt - 1, prefill_step)]
    used = room = most = 0
    for length in [*chunks, *([1] * generated)]:
        if used + length > room:
            used = used if window is None else min(used, window - 1 + REWIND)
            room = used + max(length + 1, STEP)
            most = max(most, room)
        used += length
    return most


class WindowedKVCache:
    """Keys and values `[B, H, T, D]` of one position; `offset` counts the tokens seen."""

    def __init__(self, window: int | None = None, rewind: int = REWIND, step: int = STEP) -> None:
        self.window = window
        self.rewind = rewind
        self.step = step
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.offset = 0
        self._start = 0  # which token the buffer's first entry belongs to

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append `[B, H, L, D]`; return the `size() + L` entries these L queries may see."""
        length = keys.shape[2]
        if self.keys is None or self._used() + length > self.keys.shape[2]:
            self._make_room(keys, values)
        assert self.keys is not None
        assert self.values is not None
        used = self._used()
        first, end = used - self.size(), used + length
        self.keys[..., used:end, :] = keys
        self.values[..., used:end, :] = values
        self.offset += length
        return self.keys[..., first:end, :], self.values[..., first:end, :]

    def _used(self) -> int:
        """Entries in the buffer: those kept for `trim`, then the visible ones; then room."""
        return self.offset - self._start

    def _make_room(self, keys: mx.array, values: mx.array) -> None:
        """Move what is still needed to the front of a new buffer with room for `keys`."""
        used = self._used()
        keep = used if self.window is None else min(used, self.window - 1 + self.rewind)
        # One entry more than `keys` has: what fills an array whole, MLX does not copy into it. The
        # buffer would be a view of qkv_proj's output, and keep all of that, several times as much.
        spare = max(keys.shape[2] + 1, self.step)

        def moved(old: mx.array | None, new: mx.array) -> mx.array:
            B, H, _, D = new.shape
            room = mx.zeros((B, H, spare, D), new.dtype)
            if old is None:
                return room
            return mx.concatenate([old[..., used - keep : used, :], room], axis=2)

        self.keys, self.values = moved(self.keys, keys), moved(self.values, values)
        self._start = self.offset - keep

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
        """Bytes allocated, room to grow included."""
        if self.keys is None or self.values is None:
            return 0
        return self.keys.nbytes + self.values.nbytes

    def is_trimmable(self) -> bool:
        return True

    def rewindable(self) -> int:
        """How many tokens `trim` can take back: `min(offset, rewind)` at least."""
        if self._start == 0 or self.window is None:
            return self.offset
        return self._used() - (self.window - 1)

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
    def state(self) -> tuple[mx.array | None, mx.array | None, int, int, int, int, int]:
        """What a saved cache holds: arrays, then offset, start, window (0: none), rewind, step."""
        keys, values = self.keys, self.values
        if keys is not None and values is not None:
            keys, values = keys[..., : self._used(), :], values[..., : self._used(), :]
        numbers = (self.offset, self._start, self.window or 0, self.rewind, self.step)
        return (keys, values, *numbers)

    @state.setter
    def state(
        self, value: tuple[mx.array | None, mx.array | None, int, int, int, int, int]
    ) -> None:
        self.keys, self.values, self.offset, self._start, window, self.rewind, self.step = value
        self.window = window or None

    @classmethod
    def from_state(
        cls, state: tuple[mx.array | None, mx.array | None, int, int, int, int, int]
    ) -> Self:
        cache = cls()
        cache.state = state
        return cache
