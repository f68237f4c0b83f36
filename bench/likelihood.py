"""What a model says of a text, token by token, and how far two models are apart.

A text is cut into windows of C tokens, and there are two ways to score it:

- *strided*: windows that don't overlap, every token scored. Cheap, but biased upwards: the
  first tokens of a window have almost no context.
- *sliding*: windows that advance by C/2, of each only the second half scored, so that every token
  has at least C/2 tokens of context. It costs twice as much and is the less biased of the two,
  closer to what a model says of a long text. (transformers' documentation calls it a strided
  sliding window.)

Every second sliding window is a strided one, so both come from one pass.

Log-probabilities pass through as chunks `[n, V]`, so that those of a whole window are never in
memory; those a later model is compared with go to a file.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from bench import bootstrap
from mlx_cerebrum.decoding.decode import prefill_step
from mlx_cerebrum.errors import CerebrumError, RequestError
from mlx_cerebrum.model.forward import Model

Values = npt.NDArray[np.float64]
Chunks = Iterable[mx.array]  # log-probabilities [n, V] in float32, in the text's order


@dataclass(frozen=True)
class Comparison:
    """Two models on the tokens of one window, in the order of the text.

    a, b: negative log-likelihoods, nats. kl: KL(a || b) of the next token's distribution, nats.
    agrees: 1 where both have the same most likely token.
    """

    a: Values
    b: Values
    kl: Values
    agrees: Values


def windows(start: Sequence[int], ids: Sequence[int], context: int, count: int) -> list[list[int]]:
    """At most `count` whole windows of `context` tokens, each half a window after the last.

    `start` is what a text begins with (BOS, or nothing); every window does. It counts as context,
    and the text's own tokens are a whole number of halves. Raises RequestError for a context that
    leaves no token to score.
    """
    half = (context - len(start)) // 2
    if half < 1:
        raise RequestError(f"a context of {context} tokens leaves none to score")
    firsts = range(0, len(ids) - 2 * half + 1, half)[:count]
    return [[*start, *ids[first : first + 2 * half]] for first in firsts]


def log_probs(model: Model, ids: Sequence[int], step: int | None = None) -> Iterator[mx.array]:
    """Of what follows each of `ids`: `[n, V]`, float32, for `step` of them at a time."""
    cache, step = model.make_cache(), prefill_step(step)
    for first in range(0, len(ids), step):
        tokens = mx.array(list(ids[first : first + step]), dtype=mx.int32)
        logits = model(tokens[None], cache)[0].astype(mx.float32)
        yield logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def losses(model: Model, window: Sequence[int]) -> Values:
    """Negative log-likelihoods, nats, of all tokens of `window` but its first."""
    found = [
        np.array(_loss(chunk, targets), dtype=np.float64)
        for chunk, targets in _with_targets(log_probs(model, window[:-1]), window)
    ]
    return _finite(np.concatenate(found))


def compare(a: Chunks, b: Chunks, window: Sequence[int]) -> Comparison:
    """Of two models' log-probabilities on the same window (see `log_probs`)."""
    found = []
    for ours, (theirs, targets) in zip(a, _with_targets(b, window), strict=True):
        kl = (mx.exp(ours) * (ours - theirs)).sum(axis=-1)
        agrees = (ours.argmax(axis=-1) == theirs.argmax(axis=-1)).astype(mx.float32)
        rows = mx.stack([_loss(ours, targets), _loss(theirs, targets), kl, agrees])
        found.append(np.array(rows, dtype=np.float64))
        mx.clear_cache()
    return Comparison(*_finite(np.concatenate(found, axis=1)))


def keep(chunks: Chunks, file: Path) -> Iterator[mx.array]:
    """Hand the chunks on, and write them to `file`, 4 bytes a number.

    Half precision would round them by up to 0.008 nats, and the demo model in 8 bits is only
    0.002 away from itself (KL, measured).
    """
    with file.open("wb") as out:
        for chunk in chunks:
            out.write(np.asarray(chunk).data)
            yield chunk


def kept(file: Path, vocab_size: int, step: int | None = None) -> Iterator[mx.array]:
    """What `keep` wrote, in chunks of `step`, as they are asked for."""
    step = prefill_step(step)
    stored = np.memmap(file, np.float32, "r").reshape(-1, vocab_size)
    for first in range(0, len(stored), step):
        yield mx.array(stored[first : first + step])


def figures(found: Sequence[Comparison]) -> dict[str, Any]:
    """Losses of both, b's minus a's, KL and agreement: each with its interval."""

    def over(name: str) -> dict[str, float]:
        parts = [getattr(each, name) for each in found]
        return bootstrap.interval(*parts, block=bootstrap.TOKENS).as_json()

    more = [each.b - each.a for each in found]
    return {
        "tokens": sum(each.a.size for each in found),
        "loss_a": over("a")["value"],
        "loss_b": over("b")["value"],
        "difference": bootstrap.interval(*more, block=bootstrap.TOKENS).as_json(),
        "kl": over("kl"),
        "agreement": over("agrees"),
    }


def _with_targets(chunks: Chunks, window: Sequence[int]) -> Iterator[tuple[mx.array, mx.array]]:
    """Each chunk with the ids `[n]` that do follow."""
    at = 1
    for chunk in chunks:
        yield chunk, mx.array(list(window[at : at + chunk.shape[0]]), dtype=mx.int32)
        at += chunk.shape[0]
        mx.clear_cache()


def _loss(chunk: mx.array, targets: mx.array) -> mx.array:
    return -mx.take_along_axis(chunk, targets[:, None], axis=-1)[:, 0]


def _finite(values: Values) -> Values:
    """Raises CerebrumError for what can't be reported: a 16-bit model that overflows."""
    if not np.isfinite(values).all():
        raise CerebrumError("the model's logits are not finite; try another dtype or plan")
    return values
