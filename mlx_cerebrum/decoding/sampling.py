"""Choosing other than the most likely token. Filters are mlx-lm's (its sample_utils)."""

import math
import secrets

import mlx.core as mx

from mlx_cerebrum.decoding.decode import Sampler, greedy
from mlx_cerebrum.errors import RequestError, shown
from mlx_cerebrum.files.open_files import limit_kept


def check_sampling(temp: float, top_p: float, min_p: float, seed: int | None) -> None:
    """Raise RequestError for values out of range."""
    if not math.isfinite(temp) or temp < 0 or 0 < temp < 1e-3:
        raise RequestError(f"temp must be 0 (greedy) or at least 0.001, not {temp}")
    if seed is not None and not 0 <= seed < 2**64:
        raise RequestError(f"seed must be from 0 to 2^64 - 1, not {shown(seed)}")
    if not 0 < top_p <= 1:
        raise RequestError(f"top-p must be above 0 and at most 1, not {top_p}")
    if not 0 <= min_p < 1:
        raise RequestError(f"min-p must be from 0 to below 1, not {min_p}")


def make_sampler(
    temp: float = 0.0, top_p: float = 1.0, min_p: float = 0.0, seed: int | None = None
) -> Sampler:
    """Greedy at `temp` 0, else a draw from the tempered, filtered distribution.

    Filters act on the untempered distribution, as mlx-lm's do: `top_p` keeps the smallest set
    of tokens that holds that much probability, `min_p` those at least that share of the most
    likely one's. Every sampler has its own random key, and of it one for each token of the
    answer: a `seed` gives the same draws whatever else runs, and however often a token's place
    is drawn for. Raises RequestError for values out of range.
    """
    check_sampling(temp, top_p, min_p, seed)
    if temp == 0:
        if top_p < 1 or min_p > 0 or seed is not None:
            raise RequestError("top-p, min-p and seed change nothing at temp 0; set --temp above 0")
        return greedy

    if top_p < 1 or min_p > 0:
        with limit_kept():
            from mlx_lm.sample_utils import apply_min_p, apply_top_p  # 1.4 s: only where used

    rest = mx.random.key(secrets.randbits(63) if seed is None else seed)
    keys: list[mx.array] = []  # of each token's draw

    def key(number: int) -> mx.array:
        nonlocal rest
        while len(keys) <= number:
            rest, draw = mx.random.split(rest)
            keys.append(draw)
        return keys[number]

    def sample(logits: mx.array, number: int) -> mx.array:
        logits = logits.astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        if top_p < 1:
            logprobs = apply_top_p(logprobs, max(top_p, 1e-30))  # not 0 in float32
        if min_p > 0:
            logprobs = apply_min_p(logprobs, min_p)
        # Not mx.random.categorical: it looks one number up in the sums of the probabilities, where
        # a small change to a token moves all that come after it. With noise of its own for each
        # token (Gumbel's), two like distributions mostly draw alike: drafts hold more often.
        rows, vocabulary = logits.shape
        noise = [mx.random.gumbel((vocabulary,), key=key(number + row)) for row in range(rows)]
        return mx.argmax(logprobs / temp + mx.stack(noise), axis=-1)

    return sample
