"""How the next token is chosen: the likeliest, or a draw from what the filters leave."""

import math
import secrets
from dataclasses import dataclass

import mlx.core as mx

from mlx_cerebrum.decoding.decode import Sampler, greedy
from mlx_cerebrum.errors import RequestError, shown


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. At `temp` 0 it is always the likeliest, whatever the rest says.

    temp: 0, or at least 0.001; the log-probabilities that the filters leave are divided by it.
    top_p: keep the smallest set of tokens that holds at least this probability; 1 keeps all.
    min_p: keep tokens with at least this share of the likeliest token's probability; 0 keeps all.
    seed: the same seed gives the same draws; None gives new ones each time.
    top_k: keep this many of the likeliest tokens; None keeps all.

    The filters act before the temperature, in the order top-p, min-p, top-k, as mlx-lm's do.
    Raises RequestError for values out of range.
    """

    temp: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.temp) or self.temp < 0 or 0 < self.temp < 1e-3:
            raise RequestError(f"temp must be 0 (greedy) or at least 0.001, not {self.temp}")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise RequestError(f"seed must be from 0 to 2^64 - 1, not {shown(self.seed)}")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top-p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.min_p < 1:
            raise RequestError(f"min-p must be from 0 to below 1, not {self.min_p}")
        if self.top_k is not None and self.top_k < 1:
            raise RequestError(f"top-k must be at least 1, not {shown(self.top_k)}")

    def check_used(self) -> None:
        """Raise RequestError for a setting that a greedy choice would not use."""
        if self.temp == 0 and self != GREEDY:
            raise RequestError("top-p, min-p and seed change nothing at temp 0; set --temp above 0")

    def sampler(self) -> Sampler:
        """What draws the tokens of one answer.

        It has a random key of its own, from which each token of the answer gets one. So a seed
        gives the same draws whatever else runs, however often one place of the answer is drawn.
        """
        return greedy if self.temp == 0 else _Draws(self)


GREEDY = Sampling()


class _Draws:
    """Draws from the tempered, filtered distribution: a Sampler."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self._rest = mx.random.key(seed)
        self._keys: list[mx.array] = []  # of each token's draw

    def __call__(self, logits: mx.array, number: int) -> mx.array:
        sampling = self._sampling
        logits = logits.astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        if sampling.top_p < 1:
            logprobs = keep_top_p(logprobs, sampling.top_p)
        if sampling.min_p > 0:
            logprobs = keep_min_p(logprobs, sampling.min_p)
        if sampling.top_k is not None:
            logprobs = keep_top_k(logprobs, sampling.top_k)
        # Not mx.random.categorical: it looks one number up in the sums of the probabilities, where
        # a small change to a token moves all that come after it. With noise of its own for each
        # token (Gumbel's), two like distributions mostly draw alike: drafts hold more often.
        rows, vocabulary = logits.shape
        noise = [mx.random.gumbel((vocabulary,), key=self._key(number + r)) for r in range(rows)]
        return mx.argmax(logprobs / sampling.temp + mx.stack(noise), axis=-1)

    def _key(self, number: int) -> mx.array:
        while len(self._keys) <= number:
            self._rest, draw = mx.random.split(self._rest)
            self._keys.append(draw)
        return self._keys[number]


def keep_top_p(logprobs: mx.array, top_p: float) -> mx.array:
    """Log-probabilities `[..., V]`, float32, with -inf for all but the smallest set of tokens that
    holds `top_p` of the probability (Holtzman et al. 2020, arXiv 1904.09751).

    A token stays while those likelier than it hold less; tokens as likely as the last stay too.
    """
    rising = mx.sort(logprobs, axis=-1)
    probabilities = mx.exp(rising)
    likelier = mx.cumsum(probabilities, axis=-1, reverse=True, inclusive=False)
    total = likelier[..., :1] + probabilities[..., :1]  # 1 but for rounding
    wanted = max(top_p, 1e-30)  # not 0 in float32: the likeliest stays
    least = mx.where(likelier < wanted * total, rising, mx.inf).min(axis=-1, keepdims=True)
    return mx.where(logprobs < least, -mx.inf, logprobs)


def keep_min_p(logprobs: mx.array, min_p: float) -> mx.array:
    """Log-probabilities `[..., V]` with -inf for tokens less likely than `min_p` times the
    likeliest (Nguyen et al. 2024, arXiv 2407.01082)."""
    least = logprobs.max(axis=-1, keepdims=True) + math.log(min_p)
    return mx.where(logprobs < least, -mx.inf, logprobs)


def keep_top_k(logprobs: mx.array, top_k: int) -> mx.array:
    """Log-probabilities `[..., V]` with -inf for all but the `top_k` likeliest tokens; those as
    likely as the last of them stay too, so that a draw does not depend on an order of equals."""
    if top_k >= logprobs.shape[-1]:
        return logprobs
    least = mx.topk(logprobs, top_k, axis=-1).min(axis=-1, keepdims=True)
    return mx.where(logprobs < least, -mx.inf, logprobs)


def make_sampler(
    temp: float = 0.0, top_p: float = 1.0, min_p: float = 0.0, seed: int | None = None
) -> Sampler:
    """`Sampling(...).sampler()`, for programs. Raises RequestError for values out of range, and
    for settings that would change nothing."""
    sampling = Sampling(temp, top_p, min_p, seed)
    sampling.check_used()
    return sampling.sampler()
