"""Whether to guess, with which drafter, how far: decided before every round.

Costs start from the bytes each pass reads and follow what passes are seen to take here;
agreement starts from an expectation for the kind of guess and follows what comes true. The
choice is the round with the best expected speed-up, or a plain step where none has one. So a
drafter that does not pay is off after a few rounds, and gets another try as evidence ages.

What such tries may lose is limited too: by an allowance that every token adds a little to, every
round takes its loss from or adds its gain to, by the costs seen lately, and no round may overdraw
if nothing of it holds. That, and not the estimates, keeps guessing in vain to about 3%.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from mlx_cerebrum.decoding.cost import Costs, best_drafts

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
# Expected agreement by kind of guess; runs of n tokens seen before go on alike more often the
# longer they are.
PRIORS = {"ngram-2": 0.4, "ngram-3": 0.5, "ngram-4": 0.6}
MODEL_PRIOR = 0.75


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
    """Chooses rounds. `draft` costs are by drafter, in plain steps, as bytes predict them."""

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

    def choose(self, offers: Mapping[str, tuple[str, int]]) -> tuple[str, int] | None:
        """`(drafter, drafts)` of the next round, or None for a plain step.

        `offers` are each drafter's kind of guess and how many there can be.
        """
        if len(self._plain.last) < _FIRST or self._since_plain >= _REFRESH:
            return None
        best, choice = MARGIN, None
        for name, (kind, most) in offers.items():
            most = min(most, self.most, self._affordable(name))
            drafts, gain = best_drafts(self._agreement(kind).rate, self.costs(name), most)
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
        costs = self.costs(name)
        gained = accepted - drafts * (costs.draft + costs.row)
        # A round in which kernels were loaded, or the machine slept, must not count for ever.
        self._allowance = max(_AT_LEAST, min(_AT_MOST, self._allowance + gained))

    def _affordable(self, name: str) -> int:
        """Drafts of a round that does not overdraw the allowance if none of them holds."""
        costs = self.costs(name)
        seen = (self._draft[name] if self.draft[name] else self._row).last
        return int(self._allowance / max(costs.draft + costs.row, _LEAST if seen else _UNSEEN))

    def _agreement(self, kind: str) -> Agreement:
        return self.agreement.setdefault(kind, Agreement(PRIORS.get(kind, MODEL_PRIOR)))

    def _age(self, tokens: int) -> None:
        self._allowance = min(_AT_MOST, self._allowance + tokens * _PER_TOKEN)
        for agreement in self.agreement.values():
            agreement.age(tokens)
