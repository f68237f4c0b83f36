"""Whether to guess, with which drafter, how far: decided before every round.

A round drafts `k` tokens and checks them in one target pass of `k + 1` rows. Let `a` be the
agreement: the chance that a draft is what the target chooses, taken as independent from one draft
to the next (Leviathan et al. 2023, arXiv 2211.17192, eq. 1). Then a round yields
1 + a + a^2 + ... + a^k tokens. Costs are counted in plain decode steps of the target, so tokens
over cost is the speed-up.

At first a draft's cost is estimated from the bytes that each pass reads; then it follows the
times measured here. Agreement starts from what is usual for the kind of guess, and follows how
many guesses held. The policy takes the round with the best expected speed-up, or a plain step
where no round has one. So a drafter that does not pay is off after a few rounds; it is tried
again as old evidence loses weight.

An allowance limits what such trials may lose. Every token adds a little to it; every round takes
its loss from it, or adds its gain, at the costs measured lately. A round is only started if the
allowance would cover it with no draft held. The allowance, not the estimates, keeps the loss of
useless guessing to about 3%.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_cerebrum.model.forward import Model

MARGIN = 1.03  # a round must promise this much: estimates are noisy, and a plain step is safe
MOST_DRAFTS = 16
_MEMORY = 0.98  # what evidence keeps of its weight with each token; 200 tokens leave 2%
_PRIOR_TRIALS = 3.0  # how many trials an expectation is worth
_REFRESH = 64  # rounds after which a plain step is timed again
_FIRST = 3  # plain steps timed before the first round: of three, a slow first one does not count
_FORGET = 100  # plain steps in a row after which costs are again what was predicted
# The allowance, in plain steps: at first, for every token, at most, at least. 100 tokens: 2.5.
_AT_FIRST, _PER_TOKEN, _AT_MOST, _AT_LEAST = 0.5, 0.02, 5.0, -5.0
_LEAST = 0.01  # what a draft costs at least; noise can make one look free
_UNSEEN = 0.25  # what a draft may turn out to cost, until one was timed
# A chunk of a prompt read in company: seconds that the others wait for it, if it does not take less
# than so many of their plain steps, which it delays; tokens of the first, and at least.
_GAP, _LONGER = 0.25, 6.0
_FIRST_CHUNK, _LEAST_CHUNK = 64, 16
# Expected agreement by kind of guess: the longer a run that was seen before, the more often it
# goes on as it did.
PRIORS = {"ngram-2": 0.4, "ngram-3": 0.5, "ngram-4": 0.6}
MODEL_PRIOR = 0.75


@dataclass(frozen=True)
class Costs:
    """In plain decode steps of the target."""

    draft: float  # one drafted token
    row: float  # each row of a target pass after its first


def expected_tokens(agreement: float, drafts: int) -> float:
    """Tokens a round of `drafts` yields, the target's own one included."""
    return sum(agreement**i for i in range(drafts + 1))


def speedup(agreement: float, drafts: int, costs: Costs) -> float:
    """Of rounds of `drafts`, over plain decoding."""
    return expected_tokens(agreement, drafts) / (1 + drafts * (costs.draft + costs.row))


def best_drafts(agreement: float, costs: Costs, most: int) -> tuple[int, float]:
    """`(drafts, speed-up)` of the best round of at most `most`; `(0, 1.0)` where none pays."""
    rounds = [(speedup(agreement, drafts, costs), drafts) for drafts in range(1, most + 1)]
    gain, drafts = max(rounds, default=(1.0, 0))
    return (drafts, gain) if gain > 1 else (0, 1.0)


def bytes_read(model: Model) -> int:
    """Bytes of weights that a decode step reads: every position's block, and the head."""
    blocks = [_nbytes(block) for block in model.model.layers]
    tied = model.config.tie_word_embeddings
    head = _nbytes(model.model.embed_tokens if tied else model.lm_head)
    return head + sum(blocks[block] for block in model.config.layer_map)


def _nbytes(module: nn.Module) -> int:
    arrays = cast(list[tuple[str, mx.array]], tree_flatten(module.parameters()))
    return sum(array.nbytes for _, array in arrays)


@dataclass
class Agreement:
    """How often a kind of guess comes true: recent hits over trials, and what was expected."""

    prior: float
    hits: float = 0.0
    trials: float = 0.0

    @property
    def rate(self) -> float:
        return (self.hits + self.prior * _PRIOR_TRIALS) / (self.trials + _PRIOR_TRIALS)

    def seen(self, accepted: int, drafts: int) -> None:
        """Of `drafts` checked in order, `accepted` held; what follows the first miss is unknown."""
        self.hits += accepted
        self.trials += accepted + (accepted < drafts)

    def age(self, tokens: int) -> None:
        self.hits *= _MEMORY**tokens
        self.trials *= _MEMORY**tokens


class Average:
    """Of the last few values, so that one disturbed pass does not decide."""

    def __init__(self, expected: float = 0.0) -> None:
        self.expected = expected
        self.last: list[float] = []

    @property
    def value(self) -> float:
        return sorted(self.last)[len(self.last) // 2] if self.last else self.expected

    def add(self, value: float) -> None:
        self.last = [*self.last[-6:], value]


@dataclass
class Policy:
    """Chooses rounds. `draft`: what a guess of each drafter costs in plain steps, as predicted."""

    draft: Mapping[str, float]
    row: float = 0.05
    most: int = MOST_DRAFTS
    agreement: dict[str, Agreement] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._plain = Average()
        self._row = Average(self.row)
        self._draft = {name: Average(cost) for name, cost in self.draft.items()}
        self._since_plain = 0  # rounds
        self._since_round = 0  # plain steps
        self._allowance = _AT_FIRST

    def choose(
        self, offers: Mapping[str, tuple[str, int]], row: float | None = None
    ) -> tuple[str, int] | None:
        """`(drafter, drafts)` of the next round, or None for a plain step.

        `offers` are each drafter's kind of guess and how many there can be. `row`: what a row
        costs, where it is measured for several answers together (`Pace.row`).
        """
        unsure = len(self._plain.last) < _FIRST or self._since_plain >= _REFRESH
        if row is None and unsure:
            return None
        best, choice = MARGIN, None
        for name, (kind, most) in offers.items():
            costs = self.costs(name) if row is None else Costs(0.0, row)
            most = min(most, self.most, self._affordable(name, costs))
            drafts, gain = best_drafts(self._agreement(kind).rate, costs, most)
            if gain > best:
                best, choice = gain, (name, drafts)
        return choice

    def costs(self, name: str) -> Costs:
        """As measured where they were, else as predicted."""
        return Costs(draft=self._draft[name].value, row=self._row.value)

    def plain(self, seconds: float) -> None:
        """A plain step was seen to take this long."""
        self._plain.add(seconds)
        self._since_plain = 0
        self._since_round += 1
        if self._since_round % _FORGET == 0:
            for average in (self._row, *self._draft.values()):
                average.last = []
        self._age(1)

    def round(self, name: str, kind: str, drafts: int, accepted: int, seconds: float) -> None:
        """A round was seen to go like this."""
        self._agreement(kind).seen(accepted, drafts)
        self._age(accepted + 1)
        self._since_plain += 1
        self._since_round = 0
        plain = self._plain.value
        if not plain:
            return
        extra = (seconds / plain - 1) / drafts  # what a draft and its row cost together
        if self.draft[name]:
            self._draft[name].add(max(_LEAST, extra - self._row.value))
        else:
            self._row.add(max(_LEAST, extra))
        self._gain(accepted, drafts, self.costs(name))

    def round_in_company(self, kind: str, drafts: int, accepted: int, row: float) -> None:
        """A round was seen to go like this, in a step that was timed for all who were in it."""
        self._agreement(kind).seen(accepted, drafts)
        self._age(accepted + 1)
        self._gain(accepted, drafts, Costs(0.0, row))

    def plain_in_company(self) -> None:
        """A plain step was taken with others."""
        self._age(1)

    def _gain(self, accepted: int, drafts: int, costs: Costs) -> None:
        gained = accepted - drafts * (costs.draft + costs.row)
        # A round in which kernels were loaded, or the machine slept, must not count for ever.
        self._allowance = max(_AT_LEAST, min(_AT_MOST, self._allowance + gained))

    def _affordable(self, name: str, costs: Costs) -> int:
        """Drafts of a round that does not overdraw the allowance if none of them holds."""
        seen = (self._draft[name] if self.draft[name] else self._row).last
        return int(self._allowance / max(costs.draft + costs.row, _LEAST if seen else _UNSEEN))

    def _agreement(self, kind: str) -> Agreement:
        return self.agreement.setdefault(kind, Agreement(PRIORS.get(kind, MODEL_PRIOR)))

    def _age(self, tokens: int) -> None:
        self._allowance = min(_AT_MOST, self._allowance + tokens * _PER_TOKEN)
        for agreement in self.agreement.values():
            agreement.age(tokens)


class Pace:
    """How long the steps of several answers take, as measured: what chunks of a prompt and guesses
    cost there."""

    def __init__(self) -> None:
        self._plain: dict[int, Average] = {}  # seconds of a step, by its number of answers
        self._row = Average()  # seconds that a guess adds
        self._token = Average()  # seconds that a token of a prompt adds
        self._since_plain = 0  # steps

    def plain(self, answers: int) -> float:
        """Seconds of a step without guesses; of the nearest number of answers that was seen, 0
        where none was."""
        near = min(self._plain, key=lambda seen: abs(seen - answers), default=None)
        return 0.0 if near is None else self._plain[near].value

    def row(self, answers: int) -> float | None:
        """What a guess costs, in an answer's share of a plain step; None where none should be made
        now, since that step is to be timed."""
        plain = self._plain.get(answers, Average()).value
        if not plain or self._since_plain >= _REFRESH:
            return None
        row = self._row.value if self._row.last else Policy.row * plain
        return max(_LEAST, answers * row / plain)

    def chunk(self, answers: int) -> int:
        """Tokens of a prompt that a step with so many answers reads."""
        if not self._token.last:
            return _FIRST_CHUNK
        seconds = max(_GAP, _LONGER * self.plain(answers))
        return max(_LEAST_CHUNK, int(seconds / self._token.value))

    def saw(self, answers: int, guesses: int, chunk: int, seconds: float) -> None:
        """A step of so many answers, guesses and tokens of a prompt took this long."""
        more = max(seconds - self.plain(answers), 1e-6)
        if chunk:
            self._token.add(more / chunk)
        elif guesses:
            self._row.add(more / guesses)
            self._since_plain += 1
        else:
            self._plain.setdefault(answers, Average()).add(seconds)
            self._since_plain = 0
