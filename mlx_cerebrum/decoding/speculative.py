"""Speculative decoding: cheap guesses, checked by the model several at a time, exactly.

Leviathan et al. 2023 (arXiv 2211.17192). The model's own choice of every token decides, so what
comes out is what plain decoding gives: a guess is kept while it equals the choice made from the
same row of logits, with that token's own random draw. For greedy decoding this is the usual
rule. For sampling it is a coupling of the two (Daliri et al. 2024, arXiv 2408.07978): draft and
target draw with the same random numbers, so they often agree, and a seed gives the same text
with any drafter or none. Where a guess is certain (n-grams), it is the rejection rule itself:
`p(guess)` is the chance to keep it, and what replaces it follows `p` without it.

Rows computed together are rounded differently from rows computed alone. So where the two best
logits are equal but for the last bits, the other token can win. On a CPU it won for none of 480
tokens of the demo, computed alone and 8 together: in float32 no logit moved by more than 7e-5, in
bfloat16 none at all. A GPU's 16 bits were not measured.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx

from mlx_cerebrum.decoding.drafters import Draft, Drafter, ModelDrafter, NGramDrafter
from mlx_cerebrum.decoding.policy import MOST_DRAFTS, Policy, bytes_read
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.cache import REWIND, WindowedKVCache
from mlx_cerebrum.model.forward import Model


@dataclass
class Speculation:
    """The drafters of one request, what decides between them, and how it went."""

    drafters: dict[str, Drafter]
    policy: Policy
    model: Model | None = None  # whose tokens are guessed; None: not checked
    # (drafter, drafts, accepted) -> rounds that went so; ("plain", 0, 0) -> plain steps
    rounds: Counter[tuple[str, int, int]] = field(default_factory=Counter)
    _last: tuple[str, str, int] | None = None  # what `guess` chose

    def choose(self, tokens: Sequence[int], most: int) -> tuple[str, str, int] | None:
        """`(drafter, kind of guess, drafts)` for the next round, or None for a plain step."""
        return self._choose(self.drafters, tokens, most)

    def _choose(
        self,
        drafters: Mapping[str, Drafter],
        tokens: Sequence[int],
        most: int,
        row: float | None = None,
    ) -> tuple[str, str, int] | None:
        offers = {name: drafter.offer(tokens, most) for name, drafter in drafters.items()}
        able = {name: offer for name, offer in offers.items() if offer[1]}
        choice = self.policy.choose(able, row)
        return None if choice is None else (choice[0], offers[choice[0]][0], choice[1])

    def guess(self, tokens: Sequence[int], most: int, row: float) -> list[int]:
        """Guesses for a round in company, where only those count that no model is run for. `row`
        is what each costs (`Pace.row`)."""
        free = {name: d for name, d in self.drafters.items() if isinstance(d, NGramDrafter)}
        self._last = self._choose(free, tokens, most, row)
        if self._last is None:
            return []
        name, _, count = self._last
        return free[name].guesses(tokens, count)

    def guessed(self, held: int, row: float) -> None:
        """The last `guess` was seen to go like this."""
        if self._last is not None:
            name, kind, drafts = self._last
            self.policy.round_in_company(kind, drafts, held, row)
            self.rounds[name, drafts, held] += 1

    def counted(self, name: str, kind: str, drafts: int, held: int, seconds: float) -> None:
        """A round was seen to go like this."""
        self.policy.round(name, kind, drafts, held, seconds)
        self.rounds[name, drafts, held] += 1

    def plain(self, seconds: float | None) -> None:
        """A plain step was seen to take so long; None: in company."""
        if seconds is None:
            self.policy.plain_in_company()
        else:
            self.policy.plain(seconds)
        self.rounds["plain", 0, 0] += 1

    def check_unused(self, model: Model) -> None:
        """Raise RequestError where it was made for another model, or has served a request."""
        if self.model is not None and self.model is not model:
            raise RequestError("this speculation was made for another model; make one for this")
        if self.rounds:
            raise RequestError("a speculation serves one request; make another for this")

    def summary(self) -> dict[str, Any]:
        """For a report: the target's passes, tokens a pass, guesses by drafter, how many held."""
        passes = sum(self.rounds.values())
        held = sum(count * accepted for (_, _, accepted), count in self.rounds.items())
        by_drafter: dict[str, list[int]] = {}
        for (name, drafts, accepted), count in self.rounds.items():
            if drafts:
                total = by_drafter.setdefault(name, [0, 0])
                total[0] += count * drafts
                total[1] += count * accepted
        return {
            "passes": passes,
            "tokens_per_pass": round((passes + held) / max(passes, 1), 3),
            "drafted_and_held": by_drafter,
        }


def speculation(
    model: Model, drafts: Sequence[Model] = (), ngrams: bool = True, most: int = MOST_DRAFTS
) -> Speculation:
    """Drafters for one request to `model`: n-grams, and models over the same blocks.

    Raises RequestError for a draft model that can't serve, or more drafts than can be undone.
    """
    if not 1 <= most < REWIND:
        raise RequestError(f"draft-tokens must be from 1 to {REWIND - 1}, not {most}")
    drafters: dict[str, Drafter] = {"ngram": NGramDrafter()} if ngrams else {}
    costs = dict.fromkeys(drafters, 0.0)
    for number, draft in enumerate(drafts):
        name = f"model-{number}" if number else "model"
        drafters[name] = ModelDrafter(draft, model, name)
        costs[name] = bytes_read(draft) / bytes_read(model)
    return Speculation(drafters, Policy(costs, most=most), model)


def held_guesses(guesses: Sequence[int], chosen: Sequence[int]) -> int:
    """How many guesses, up to the first that is not what was chosen in its place."""
    return next((i for i, guess in enumerate(guesses) if guess != chosen[i]), len(guesses))


def verify(
    model: Model,
    token: int,
    draft: Draft,
    cache: Sequence[WindowedKVCache],
    choose: Callable[[mx.array, mx.array], mx.array],
) -> list[int]:
    """The drafts that the model would choose too, up to the first it would not, and one more token.

    `cache` takes `token` and the drafts that hold. `choose` says what follows tokens `[L]`, given
    their logits `[L, V]`.
    """
    tokens = mx.concatenate([mx.array([token], dtype=mx.int32), draft.tokens.astype(mx.int32)])
    if draft.hidden is None:
        h = model.run(model.embed(tokens[None]), cache)
    else:
        last = model.run(model.embed(tokens[None, -1:]), cache, 0, draft.shared)
        h = model.run(mx.concatenate([draft.hidden, last], axis=1), cache, draft.shared)
    choices = choose(model.logits(h)[0], tokens)
    mx.eval(choices, draft.tokens)
    chosen, guessed = cast(list[int], choices.tolist()), cast(list[int], draft.tokens.tolist())
    held = held_guesses(guessed, chosen)
    for layer_cache in cache:
        layer_cache.trim(len(guessed) - held)
    return chosen[: held + 1]
