"""Log-probabilities of tokens, as they are reported: natural, before filters and temperature."""

from dataclasses import dataclass
from typing import cast

import mlx.core as mx

ROWS = 128  # whose log-probabilities are computed at once: 32000 float32 each, 16 MB together


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability, and the likeliest tokens in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token, logprob), likeliest first


class Logprobs:
    """Those of tokens `[L]` chosen from logits `[L, V]`, with `k` alternatives each; on the device
    until they are read."""

    def __init__(self, logits: mx.array, tokens: mx.array, k: int) -> None:
        logits = logits.astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        self._tokens = tokens
        self.arrays = [mx.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]]
        if k:
            likeliest = mx.argpartition(-logprobs, kth=min(k, logits.shape[-1]) - 1)[:, :k]
            self.arrays += [likeliest, mx.take_along_axis(logprobs, likeliest, axis=-1)]

    def read(self) -> list[TokenLogprob]:
        tokens = cast(list[int], self._tokens.tolist())
        chosen, *top = [cast(list[float], array.tolist()) for array in self.arrays]
        ids, values = cast(list[list[list[float]]], top or [[[] for _ in tokens]] * 2)
        found = []
        for row, token in enumerate(tokens):
            pairs = [(int(i), v) for i, v in zip(ids[row], values[row], strict=True)]
            pairs.sort(key=lambda pair: (-pair[1], pair[0]))
            found.append(TokenLogprob(token, chosen[row], tuple(pairs)))
        return found
