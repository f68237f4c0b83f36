"""Where guesses of the next tokens come from. A wrong guess costs time, never the answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from mlx_cerebrum import device
from mlx_cerebrum.decoding.decode import Sampler
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.cache import WindowedKVCache
from mlx_cerebrum.model.forward import Model


@dataclass(frozen=True)
class Draft:
    """Guesses, and what making them already computed of the pass that will check them."""

    tokens: mx.array  # [K]
    # The target's hidden states after its first `shared` positions, for the last token seen and
    # all drafts but the last, [1, K, D]; those positions' caches have taken these tokens.
    hidden: mx.array | None = None
    shared: int = 0


class Drafter(Protocol):
    name: str

    def offer(self, tokens: Sequence[int], most: int) -> tuple[str, int]:
        """`(kind of guess, how many)` it can make after `tokens`, at most `most`; 0 for none.

        Kinds are told apart because they come true at different rates.
        """

    def draft(
        self,
        tokens: Sequence[int],
        count: int,
        cache: Sequence[WindowedKVCache],
        sampler: Sampler,
        number: int,
    ) -> Draft:
        """`count` guesses for what follows `tokens`, the first being token `number` of the answer.

        `cache` is the target's and holds all but the last of `tokens`.
        """


class NGramDrafter:
    """Prompt lookup: what followed the last few tokens where they stood before.

    Saxena 2023, "Prompt Lookup Decoding"; llama.cpp's and transformers' drafters by n-grams do
    the same. It reads no weights and pays where answers quote: summaries, edits, code. One
    drafter is for one request, whose tokens only grow.
    """

    name = "ngram"

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        self.longest, self.shortest = longest, shortest
        self._forget()

    def _forget(self) -> None:
        # For each n: n tokens -> where they ended last.
        self._ends: list[dict[tuple[int, ...], int]] = [{} for _ in range(self.longest + 1)]
        self._read_to = 1  # runs that end before this are indexed

    def offer(self, tokens: Sequence[int], most: int) -> tuple[str, int]:
        length, end = self._match(tokens)
        return f"ngram-{length}", most if end else 0

    def draft(
        self,
        tokens: Sequence[int],
        count: int,
        cache: Sequence[WindowedKVCache],
        sampler: Sampler,
        number: int,
    ) -> Draft:
        return Draft(mx.array(self.guesses(tokens, count), dtype=mx.int32))

    def guesses(self, tokens: Sequence[int], count: int) -> list[int]:
        """The tokens of `draft`."""
        _, end = self._match(tokens)
        period = len(tokens) - end  # what is repeated may be repeated again
        return [tokens[end + i % period] for i in range(count)]

    def _match(self, tokens: Sequence[int]) -> tuple[int, int]:
        """`(n, where it ends)` of the longest run at the end of `tokens` that came before."""
        self._read(tokens)
        for n in range(min(self.longest, len(tokens) - 1), self.shortest - 1, -1):
            end = self._ends[n].get(tuple(tokens[-n:]), 0)
            if end:
                return n, end
        return 0, 0

    def _read(self, tokens: Sequence[int]) -> None:
        """Index the runs that end before the last token, each once."""
        if len(tokens) < self._read_to:  # another request after all
            self._forget()
        for end in range(self._read_to, len(tokens)):
            for n in range(self.shortest, min(self.longest, end) + 1):
                self._ends[n][tuple(tokens[end - n : end])] = end
        self._read_to = max(self._read_to, len(tokens))


class ModelDrafter:
    """Another model over the same blocks: fewer positions of them, or fewer bits, or both.

    It has no cache of its own. Each of its positions uses the cache of a target's position that
    runs the same block, and takes its entries back afterwards; so the prompt is computed once, and
    a drafter costs no memory but its own weights, if it has any. Where its first positions are the
    target's own, weights and all, the target goes on from what they computed.
    """

    def __init__(self, model: Model, target: Model, name: str = "model") -> None:
        """Raises RequestError where the model runs a block more often than the target does."""
        self.model, self.name = model, name
        self.positions = borrowed(model.config.layer_map, target.config.layer_map)
        same = model.model is target.model
        # The last position is never shared, so that there is always one left to run.
        self.shared = min(_common_prefix(model, target), len(self.positions) - 1) if same else 0

    def offer(self, tokens: Sequence[int], most: int) -> tuple[str, int]:
        return self.name, most

    def draft(
        self,
        tokens: Sequence[int],
        count: int,
        cache: Sequence[WindowedKVCache],
        sampler: Sampler,
        number: int,
    ) -> Draft:
        own = [cache[position] for position in self.positions]
        token = mx.array([tokens[-1]], dtype=mx.int32)
        drafts, hidden = [], []
        for i in range(count):
            h = self.model.run(self.model.embed(token[None]), own, 0, self.shared)
            hidden.append(h)
            h = self.model.run(h, own, self.shared)
            token = sampler(self.model.logits(h)[0], number + i)
            drafts.append(token)
            if device.on_gpu():  # the device draws this one while the host builds the next
                mx.async_eval(token)
        for layer_cache in own[self.shared :]:
            layer_cache.trim(count)
        states = mx.concatenate(hidden, axis=1) if self.shared else None
        return Draft(mx.concatenate(drafts), states, self.shared)


def borrowed(draft_map: Sequence[int], target_map: Sequence[int]) -> tuple[int, ...]:
    """For each position of a draft, the target's position whose cache it uses: of the same block.

    Raises RequestError where a block occurs more often in the draft than in the target.
    """
    left: dict[int, list[int]] = {}
    for position, block in enumerate(target_map):
        left.setdefault(block, []).append(position)
    positions = []
    for block in draft_map:
        if not left.get(block):
            raise RequestError(
                f"the draft plan runs block {block} more often than the model does;"
                " a draft must be part of the model's own plan"
            )
        positions.append(left[block].pop(0))
    return tuple(positions)


def _common_prefix(model: Model, target: Model) -> int:
    """Positions from the first on that are the same in both, blocks and scales."""
    count = 0
    for mine, theirs in zip(_positions(model), _positions(target), strict=False):
        if mine != theirs:
            break
        count += 1
    return count


def _positions(model: Model) -> list[tuple[int, tuple[float, float]]]:
    config = model.config
    scales = config.residual_scales or ((1.0, 1.0),) * config.num_positions
    return list(zip(config.layer_map, scales, strict=True))
