"""What a conversation's caches already hold, so that each turn computes only what is new."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx

from mlx_cerebrum.decoding.decode import prefill_step
from mlx_cerebrum.model.cache import WindowedKVCache, common_point
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.memory import Workload

# The caches can also go back to this many tokens before a prompt's end, so that the question at
# the end of a long text can be reworded. It costs as many entries, once they are out of the window.
REWORD = 256


class PromptCache:
    """The caches of one conversation, and the tokens they hold.

    Where a prompt begins like the tokens held, only the rest of it is computed: the caches go
    back to the point where the two differ. They can go back to any point within the window, and
    to any at all without a window. Further back they can go to a marked point, and to any point
    between two marks less than a window apart. `begin` marks where the new part of the
    prompt begins (to edit the question) and where the prompt ends (to answer again).

    `max_bytes` limits the caches: the oldest marks are dropped when marks could need more than
    that. The window in use is always kept; 0 means no marks. By default marks may take twice the
    window's entries. That is enough for the two marks of a question as long as the window; marks
    closer together share entries, so with shorter questions every turn of the last `window`
    tokens can be edited. For the 12.25B in bfloat16 that is 3.0 GB at most, 1.1 of it the window
    in use.
    """

    def __init__(
        self, model: Model, kv_bits: int | None = None, max_bytes: int | None = None
    ) -> None:
        self.model = model
        self.kv_bits = kv_bits
        self.tokens: list[int] = []  # those the caches hold
        self.cache: list[WindowedKVCache] = model.make_cache(kv_bits)
        self.max_bytes = max_bytes
        window, step = model.config.sliding_window, prefill_step()
        self._sizes = Workload(model.config, model.dtype.size, 1, 1, step, kv_bits)
        # How many entries of a position marks may need, besides those of the window in use.
        self._bound = 0 if window is None else 2 * window + REWORD  # 0: all is there anyway
        if window is not None and max_bytes is not None:
            used = replace(self._sizes, prompt=2 * (window + step)).cache_bytes
            self._bound = min(self._bound, max(0, max_bytes - used) // self._sizes.entry_bytes)
        self._most = self._bound

    def marks_bytes(self, tokens: int) -> int:
        """Bytes that marks may come to take once this many tokens are held, at most."""
        window = self.model.config.sliding_window
        if window is None or tokens <= window:
            return 0  # all is there anyway
        return min(self._most, tokens) * self._sizes.entry_bytes

    def allow_marks(self, nbytes: int) -> None:
        """Let marks take this many bytes from now on, within `max_bytes`."""
        self._most = min(self._bound, max(0, nbytes) // self._sizes.entry_bytes)
        self._drop_marks()

    def _drop_marks(self) -> None:
        """Give up the oldest marks, as many as could need more than they may."""
        while self.cache[0].entries_for_marks() > self._most:
            for c in self.cache:
                c.drop_mark()

    @property
    def nbytes(self) -> int:
        """Bytes allocated, room to grow included."""
        return sum(c.nbytes for c in self.cache)

    @property
    def held_bytes(self) -> int:
        """Bytes of the entries that `compact` would leave."""
        return sum(c.held_bytes for c in self.cache)

    def compact(self) -> None:
        """Give up the room to grow."""
        for c in self.cache:
            c.compact()
            mx.eval(c.state[:2])

    def copy(self) -> "PromptCache":
        """Another cache of the same tokens. Their entries are shared until either side writes."""
        other = copy.copy(self)
        other.tokens, other.cache = list(self.tokens), copy.deepcopy(self.cache)
        return other

    def reachable(self, point: int) -> int:
        """The latest point at or before this one that all positions can go back to."""
        return common_point(self.cache, point)

    def begin(self, prompt: Sequence[int]) -> list[int]:
        """Go back to what `prompt` shares with the tokens held; return the rest, to be computed.

        The last token is always computed again: its logits give the first token of the answer.
        """
        most = min(len(self.tokens), max(0, len(prompt) - 1))
        self.go_back(next((i for i in range(most) if self.tokens[i] != prompt[i]), most))
        begun, end = len(self.tokens), len(prompt) - 1
        if self._most:
            for c in self.cache:
                for point in (begun, max(begun, end - REWORD), end):
                    c.mark(point)
            self._drop_marks()
        return list(prompt[begun:])

    def end(self, tokens: Sequence[int]) -> None:
        """A request is over: `tokens` are all it read and generated, from the first one on."""
        self.tokens = list(tokens)
        self.go_back(min(len(tokens), *(c.offset for c in self.cache)))

    def go_back(self, point: int) -> None:
        """Rewind to the latest point at or before this one that all positions can go to."""
        point = self.reachable(point)
        self.tokens = self.tokens[:point]
        for c in self.cache:
            c.rewind_to(point)
