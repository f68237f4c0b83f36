"""How far a mean would move if the text or the questions had been others: bootstrap intervals.

The middle 95% of the means of resamples (Efron's percentile interval), widened by what few blocks
make it too narrow: sqrt(1 - 1/blocks) (Hesterberg 2015, arXiv 1411.5279, "narrowness bias"). A hard
passage is hard for many tokens, so blocks of consecutive tokens are drawn, not tokens. Two models
are compared token by token (question by question): what is hard for both cancels.

A difference that few questions make is not trusted, whatever its interval: as long as fewer than 6
tell the two apart, a fair coin would favour one side as clearly once in 16 times (sign test,
2 x 0.5^5). Of outcomes that are 0 or 1 the interval stays too narrow beyond that (7 against 1 of 60
leaves 0 out, and a fair coin does that 7 times in 100), so `sign_test` has to agree.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import comb, inf
from typing import Any

import numpy as np
import numpy.typing as npt

RESAMPLES = 4000
FEWEST = 8  # blocks; from fewer no interval says much
DIFFERENT = 6  # of them, at least, before a difference counts as shown
TOKENS = 32  # consecutive tokens in a block
UNLIKELY = 0.05  # a sign test below this shows a difference

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean, its 95% interval, and how many blocks it comes from, how many of them not 0."""

    value: float
    low: float
    high: float
    blocks: float
    nonzero: float

    @property
    def enough(self) -> bool:
        return self.blocks >= FEWEST

    @property
    def sign(self) -> int:
        """1 or -1 where the mean is shown to be above or below 0, else 0."""
        shown = self.enough and self.nonzero >= DIFFERENT
        return int(self.low > 0) - int(self.high < 0) if shown else 0

    def as_json(self) -> dict[str, float]:
        return {key: float(f"{value:.5g}") for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Interval":
        return cls(**found)

    def text(self, digits: int = 3, sign: bool = False, scale: float = 1.0) -> str:
        form = f"{'+' if sign else ''}.{digits}f"
        value, low, high = (format(scale * x, form) for x in (self.value, self.low, self.high))
        return f"{value} ({low} to {high})" if self.enough else f"{value} (too few to say)"


def interval(*parts: npt.ArrayLike, block: int = 1) -> Interval:
    """The mean of all values, each of `parts` cut into blocks of its own.

    A part's last block may be shorter. Raises ValueError for no value at all.
    """
    arrays = [np.asarray(part, dtype=np.float64) for part in parts]
    blocks = [part[k : k + block] for part in arrays for k in range(0, len(part), block)]
    if not blocks:
        raise ValueError("no values to take the mean of")
    sums = np.array([each.sum() for each in blocks])
    counts = np.array([each.size for each in blocks])
    mean = float(sums.sum() / counts.sum())
    nonzero = int(np.count_nonzero(sums))
    if len(blocks) == 1:
        return Interval(mean, mean, mean, 1, nonzero)
    drawn = np.random.default_rng(0).integers(0, len(blocks), (RESAMPLES, len(blocks)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    wider = (len(blocks) / (len(blocks) - 1)) ** 0.5
    low, high = mean + wider * (np.quantile(means, [0.025, 0.975]) - mean)
    return Interval(mean, float(low), float(high), len(blocks), nonzero)


def paired(a: Sequence[float] | Values, b: Sequence[float] | Values, block: int = 1) -> Interval:
    """The mean of b - a, value by value. Raises ValueError for unequal lengths."""
    return interval(np.subtract(b, a), block=block)


def standard_error(values: Values) -> float:
    """Of their mean: from the means of blocks of 32, from the values where they are under 64.

    A shorter last block weighs less.
    """
    block = TOKENS if len(values) >= 2 * TOKENS else 1
    off = np.add.reduceat(values - values.mean(), range(0, len(values), block))
    n = len(off)
    return float((np.square(off).sum() * n / (n - 1)) ** 0.5) / len(values) if n > 1 else inf


def sign_test(a: int, b: int) -> float:
    """Exact two-sided p of `a` items for one side and `b` for the other, were a coin to decide."""
    n = a + b
    return float(min(1.0, 2 * sum(comb(n, i) for i in range(min(a, b) + 1)) / 2**n))
