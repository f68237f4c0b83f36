"""What earlier requests computed, for prompts that begin with exactly the same tokens."""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_cerebrum.files.open_files import limit_kept
from mlx_cerebrum.model.config import ModelConfig

with limit_kept():
    from mlx_lm.models.cache import (
        KVCache,
        RotatingKVCache,
        can_trim_prompt_cache,
        trim_prompt_cache,
    )

Caches = list[Any]  # mlx-lm's KVCache or RotatingKVCache, one for each position
Key = tuple[str, str]  # owner, model
Tokens = npt.NDArray[np.int64]


def make_caches(config: ModelConfig) -> Caches:
    """Empty caches that mlx-lm's batches can take in (`merge`), one for each position."""
    window = config.sliding_window
    if window is None:
        return [KVCache() for _ in config.layer_map]
    return [RotatingKVCache(max_size=window, keep=0) for _ in config.layer_map]


@dataclass(frozen=True)
class _Entry:
    tokens: Tokens  # those the caches have seen
    caches: Caches  # never handed out, only copies of them
    nbytes: int


class PrefixCache:
    """Caches by the tokens they have seen, the least recently used given up first.

    `max_bytes` bounds what is really allocated: entries are copies without room to grow, so
    none keeps a larger buffer alive. For one thread only.

    A cache can go back to an earlier token as long as its window has lost nothing. After that it
    serves only prompts that begin with all its tokens.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._most = max_bytes
        self._entries: OrderedDict[tuple[Key, bytes], _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: Key, prompt: Sequence[int]) -> tuple[Caches | None, int]:
        """Caches that hold the first tokens of `prompt`, as many as any entry does, and how many.

        Never the last token: the answer begins with its logits. `(None, 0)` where none fits.
        """
        wanted = np.asarray(prompt[:-1], dtype=np.int64)
        found, reach = None, 0
        for name, entry in self._entries.items():
            if name[0] != key:
                continue
            shared = _shared(entry.tokens, wanted)
            whole = shared == len(entry.tokens) or can_trim_prompt_cache(entry.caches)
            if whole and shared > reach:
                found, reach = name, shared
        if found is None:
            return None, 0
        self._entries.move_to_end(found)
        entry = self._entries[found]
        caches: Caches = copy.deepcopy(entry.caches)  # shares the arrays until they are written to
        if spare := len(entry.tokens) - reach:
            trim_prompt_cache(caches, spare)
        if spare > KVCache.step:  # room that no prediction counts, and the next write would copy
            for c in caches:
                c.keys, c.values = (mx.contiguous(kv[..., :reach, :]) for kv in (c.keys, c.values))
            mx.eval([c.state for c in caches])
        return caches, reach

    def store(self, key: Key, tokens: Sequence[int], caches: Caches) -> None:
        """Keep a copy of `caches`, which have seen exactly `tokens`, where it fits at all."""
        if not tokens or min(c.nbytes for c in caches) == 0:
            return
        seen = np.asarray(tokens, dtype=np.int64)
        name = (key, seen.tobytes())
        if name in self._entries:
            self._entries.move_to_end(name)
            return
        # What it will take, asked before it is copied.
        needed = sum(c.nbytes * c.size() // c.keys.shape[2] for c in caches)
        if needed > self._most:
            return
        if can_trim_prompt_cache(caches):  # they can go back to what shorter entries hold
            covered = [
                other
                for other, entry in self._entries.items()
                if other[0] == key and _shared(entry.tokens, seen) == len(entry.tokens)
            ]
            for other in covered:
                self._drop(other)
        self._make_room(needed)
        compact = [c.merge([c]).extract(0) for c in caches]  # in time order, no room to grow
        mx.eval([c.state for c in compact])
        nbytes = sum(c.nbytes for c in compact)
        self._entries[name] = _Entry(seen, compact, nbytes)
        self.nbytes += nbytes
        self._make_room(0)

    def limit(self, nbytes: int) -> None:
        """Hold no more than this from now on (`max_bytes` at most): the memory is needed."""
        self._most = max(0, min(self.max_bytes, nbytes))
        self._make_room(0)

    def clear(self) -> None:
        """Give up all entries."""
        self._entries.clear()
        self.nbytes = 0

    def _make_room(self, needed: int) -> None:
        while self._entries and self.nbytes + needed > self._most:
            self._drop(next(iter(self._entries)))

    def _drop(self, name: tuple[Key, bytes]) -> None:
        self.nbytes -= self._entries.pop(name).nbytes


def _shared(one: Tokens, other: Tokens) -> int:
    """How many tokens both begin with."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if differ.size else length
