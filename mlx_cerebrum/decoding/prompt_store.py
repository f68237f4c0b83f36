"""What earlier requests computed, for prompts that begin with exactly the same tokens."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mlx_cerebrum.decoding.prompt_cache import PromptCache
from mlx_cerebrum.model.cache import STEP

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Entry:
    key: Hashable
    tokens: Tokens  # those the caches hold
    cache: PromptCache  # never written to: only copies of it are handed out
    nbytes: int = 0


class PromptStore:
    """Prompt caches by the tokens they hold, the least recently used given up first.

    `max_bytes` bounds what is really allocated: entries have no room to grow. Caches are found
    under the key they were kept under only (an owner and a model, say). For one thread.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self.room = max_bytes  # what `limit` leaves of it
        self._entries: OrderedDict[tuple[Hashable, bytes], _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def find(
        self, key: Hashable, prompt: Sequence[int], room: int | None = None
    ) -> PromptCache | None:
        """A copy of the entry that can go back to the most of `prompt`, there; None where none can.

        Never to its last token: the answer begins with its logits. `room`: hold no more than this
        from now on (`limit`). An entry that has to go for it is handed over, nothing copied.
        """
        wanted = np.asarray(prompt[:-1], dtype=np.int64)
        found, most = None, 0
        for name, entry in self._entries.items():
            reach = _reach(entry, wanted) if entry.key == key else 0
            if reach > most:
                found, most = name, reach
        cache = None
        if found is not None:
            self._entries.move_to_end(found)  # the last to be given up
            cache = self._entries[found].cache.copy()
        if room is not None:
            self.limit(room)
        if cache is not None:
            spare = len(cache.tokens) - most
            cache.go_back(most)
            if spare > STEP:  # the next write would copy them all
                cache.compact()
        return cache

    def keep(self, key: Hashable, cache: PromptCache) -> None:
        """Take a cache over, without its room to grow, where it fits at all."""
        new = _Entry(key, np.asarray(cache.tokens, dtype=np.int64), cache)
        name = key, new.tokens.tobytes()
        if not cache.tokens or cache.held_bytes > self.room:
            return
        cache.compact()
        # What an entry holds that this one can go back to is there twice.
        for other, entry in list(self._entries.items()):
            if entry.key == key and _reach(new, entry.tokens) == len(entry.tokens):
                self._drop(other)
        self._make_room(cache.nbytes)
        self._entries[name] = replace(new, nbytes=cache.nbytes)
        self.nbytes += cache.nbytes
        self._make_room(0)

    def limit(self, nbytes: int) -> None:
        """Hold no more than this from now on (`max_bytes` at most): the memory is needed."""
        self.room = max(0, min(self.max_bytes, nbytes))
        self._make_room(0)

    def forget(self, of: Callable[[Hashable], bool]) -> None:
        """Give up the entries that were kept under a key that `of` is true for."""
        for name, entry in list(self._entries.items()):
            if of(entry.key):
                self._drop(name)

    def clear(self) -> None:
        """Give up all entries."""
        self._entries.clear()
        self.nbytes = 0

    def _make_room(self, needed: int) -> None:
        while self._entries and self.nbytes + needed > self.room:
            self._drop(next(iter(self._entries)))

    def _drop(self, name: tuple[Hashable, bytes]) -> None:
        self.nbytes -= self._entries.pop(name).nbytes


def _reach(entry: _Entry, wanted: Tokens) -> int:
    """How many of the `wanted` tokens an entry can go back to."""
    length = min(len(entry.tokens), len(wanted))
    differ = np.flatnonzero(entry.tokens[:length] != wanted[:length])
    return entry.cache.reachable(int(differ[0]) if differ.size else length)
