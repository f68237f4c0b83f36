"""Log-probabilities of generated tokens, for the jobs that ask for them."""

from collections.abc import Sequence
from typing import cast

import mlx.core as mx

from mlx_cerebrum.server.jobs import TokenLogprob


def token_logprobs(
    rows: Sequence[tuple[int, mx.array, int | None]],
) -> list[TokenLogprob | None]:
    """For each `(token, log-probabilities [V], alternatives)`; None where alternatives are None.

    One round trip to the device for all of them, and none where nobody asks.
    """
    wanted: list[tuple[mx.array, ...]] = []
    for token, row, k in rows:
        if k is None:
            wanted.append(())
            continue
        arrays: tuple[mx.array, ...] = (row[token],)
        if k:
            likeliest = mx.argpartition(-row, kth=min(k, row.size) - 1)[:k]
            arrays += (likeliest, row[likeliest])
        wanted.append(arrays)
    if any(wanted):
        mx.eval(wanted)
    return [
        _read(token, arrays) if arrays else None
        for (token, _, _), arrays in zip(rows, wanted, strict=True)
    ]


def _read(token: int, arrays: tuple[mx.array, ...]) -> TokenLogprob:
    chosen, *top = [cast(list[float], array.tolist()) for array in arrays]
    pairs = [(int(other), logprob) for other, logprob in zip(*top, strict=True)]
    pairs.sort(key=lambda pair: (-pair[1], pair[0]))
    return TokenLogprob(token, cast(float, chosen), tuple(pairs))
