"""One answer under way, from its prompt to its last token."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import mlx.core as mx

from mlx_cerebrum.decoding.constraint import Constraint
from mlx_cerebrum.decoding.decode import Sampler, greedy
from mlx_cerebrum.decoding.logprobs import TokenLogprob
from mlx_cerebrum.decoding.sampling import Adjust
from mlx_cerebrum.decoding.speculative import Speculation
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.cache import WindowedKVCache
from mlx_cerebrum.model.forward import Model


@dataclass(eq=False)
class Generation:
    """A sequence: what one answer needs.

    `caches`, one for each position, hold the first of `tokens`; `before` them they may have seen
    others that are not known. Raises RequestError for a `constraint` with an `adjust` that rules
    end tokens out.
    """

    model: Model
    tokens: list[int]  # the prompt, then what was chosen
    caches: Sequence[WindowedKVCache]
    max_tokens: int
    sampler: Sampler = greedy
    speculation: Speculation | None = None
    before: int = 0
    adjust: Adjust | None = None
    top_logprobs: int | None = None  # alternatives to each token of the answer; None: no report
    scored: int | None = None  # the same for the prompt's tokens, from the second that is read on
    constraint: Constraint | None = None  # what its tokens are held to
    asked: float = field(default_factory=time.monotonic)  # when; prompts are read by that
    prompt_logprobs: list[TokenLogprob] = field(init=False, default_factory=list)
    prompt: int = field(init=False)  # tokens of it
    sure: bool = field(init=False, default=False)  # of the guesses under way: no other can come
    # What `Decoder.run` has yet to hand out, with the time it was there.
    ready: deque[tuple[int, float]] = field(init=False, default_factory=deque)

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)
        if self.constraint is not None and self.adjust is not None and self.adjust.endless:
            raise RequestError("ignore-eos and min-tokens can't be had with a grammar; it ends it")

    @property
    def read(self) -> int:
        """Tokens of the prompt that its caches hold."""
        return min(int(self.caches[0].offset) - self.before, self.prompt)

    @property
    def chosen(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.prompt

    @property
    def left(self) -> int:
        """Tokens of the answer that may still come."""
        held = self.held_to()
        return 0 if held is not None and held.over else self.max_tokens - self.chosen

    @property
    def failure(self) -> RequestError | None:
        """Why no more comes though the answer is not complete."""
        held = self.held_to()
        return None if held is None else held.failure

    def held_to(self) -> Constraint | None:
        """The constraint, told of all tokens there are: so whatever became of a step, it knows
        those that were kept."""
        held = self.constraint
        if held is not None and held.read < self.chosen:
            held.accept(self.tokens[self.prompt + held.read :])
        return held

    def choose(
        self,
        logits: mx.array,
        inputs: mx.array,
        ahead: bool = False,
        guesses: Sequence[int] | None = None,
    ) -> mx.array:
        """The tokens `[L]` that follow `inputs` `[L]`, given logits `[L, V]`. `ahead`: `inputs`
        come after all of `tokens`, else the first is the last of them, and the others are
        `guesses`, where the host knows them."""
        number = self.chosen + ahead
        if self.adjust is not None:
            seen = self.tokens if ahead else self.tokens[:-1]
            logits = self.adjust(logits, seen, inputs, number)
        if (held := self.held_to()) is not None:
            if guesses is None:
                guesses = cast(list[int], inputs[1:].tolist())
            logits = held.apply(logits, guesses)
        return self.sampler(logits, number)
