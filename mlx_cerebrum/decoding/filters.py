"""Which tokens may be drawn: functions that leave the likely ones of a distribution.

Each takes log-probabilities `[..., V]` in float32, to which a number may have been added that is
the same for all tokens of a row, and returns them with -inf for the tokens that may not be drawn.
"""

import math

import mlx.core as mx


def in_float32(value: float) -> float:
    """A factor above 0, as near to it as neither it nor its inverse is 0 or infinite in float32."""
    return min(max(value, 1e-30), 1e30)


def keep_top_p(logprobs: mx.array, top_p: float) -> mx.array:
    """Keep the smallest set of tokens that holds `top_p` of the probability (Holtzman et al. 2020,
    arXiv 1904.09751).

    A token stays while those likelier than it hold less; tokens as likely as the last stay too.
    """
    rising = mx.sort(logprobs, axis=-1)
    probabilities = mx.exp(rising)
    likelier = mx.cumsum(probabilities, axis=-1, reverse=True, inclusive=False)
    total = likelier[..., :1] + probabilities[..., :1]
    wanted = in_float32(top_p)  # not 0: the likeliest stays
    least = mx.where(likelier < wanted * total, rising, mx.inf).min(axis=-1, keepdims=True)
    return mx.where(logprobs < least, -mx.inf, logprobs)


def keep_min_p(logprobs: mx.array, min_p: float) -> mx.array:
    """Keep tokens with at least `min_p` times the likeliest's probability (Nguyen et al. 2024,
    arXiv 2407.01082)."""
    least = logprobs.max(axis=-1, keepdims=True) + math.log(min_p)
    return mx.where(logprobs < least, -mx.inf, logprobs)


def keep_top_k(logprobs: mx.array, top_k: int) -> mx.array:
    """Keep the `top_k` likeliest tokens; those as likely as the last of them stay too, so that a
    draw does not depend on an order of equals."""
    if top_k >= logprobs.shape[-1]:
        return logprobs
    least = mx.topk(logprobs, top_k, axis=-1).min(axis=-1, keepdims=True)
    return mx.where(logprobs < least, -mx.inf, logprobs)
