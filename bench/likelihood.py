"""What a model says of a text, token by token, and how far two models are apart.

A text is cut into windows of C tokens, and there are two ways to score it:

- *strided*: windows that don't overlap, every token scored. Cheap, but biased upwards: the
  first tokens of a window have almost no context.
- *sliding*: windows that advance by C/2, of each only the second half scored, so that every token
  has at least C/2 tokens of context. It costs twice as much and is the less biased of the two.
  (transformers' documentation calls it a strided sliding window.)

Every second sliding window is a strided one, so both come from one pass. Log-probabilities pass
through as chunks `[n, V]`, so that those of a long window are never in memory.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from bench import bootstrap
from bench.bootstrap import Values
from mlx_cerebrum.decoding.decode import prefill_step
from mlx_cerebrum.errors import CerebrumError, RequestError
from mlx_cerebrum.model.cache import Cache
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer

Ids = list[int]
Chunks = Iterable[mx.array]  # log-probabilities [n, V] in float32, in the text's order
# Not those that `convert --calibrate` is meant to be given.
TEXTS = tuple(Path(__file__).parent / "data" / name for name in ("austen.txt", "newton.txt"))


def text_ids(tokenizer: Tokenizer, file: Path) -> tuple[Ids, Ids]:
    """What the tokenizer begins a text with (BOS, or nothing), and the file's own ids.

    Raises RequestError for a file that is no UTF-8 text.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{file} can't be read as UTF-8 text: {error}") from None
    start = tokenizer.encode("")
    return start, tokenizer.encode(text)[len(start) :]


def windows(start: Ids, ids: Ids, context: int, count: int) -> list[Ids]:
    """At most `count` whole windows of `context` tokens, each half a window after the last.

    `start` is what a text begins with; every window does. It counts as context, and the text's own
    tokens are a whole number of halves. Raises RequestError for a context that leaves no token to
    score.
    """
    half = (context - len(start)) // 2
    if half < 1:
        raise RequestError(f"a context of {context} tokens leaves none to score")
    firsts = range(0, len(ids) - 2 * half + 1, half)[:count]
    return [start + ids[first : first + 2 * half] for first in firsts]


def strided(start: Ids, ids: Ids, context: int, tokens: int) -> list[Ids]:
    """Windows that don't overlap and score `tokens` together, or as many as the text has.

    Raises RequestError for a text shorter than one window.
    """
    scored = len(start) + (context - len(start)) // 2 * 2 - 1
    count = max(1, -(-tokens // max(1, scored)))
    found = windows(start, ids, context, 2 * count - 1)[::2]
    if not found:
        raise RequestError(
            f"a text has {len(ids)} tokens, a window {context}: give a longer text or a smaller"
            " --context"
        )
    return found


def log_softmax(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def log_probs(
    model: Model, ids: Sequence[int], cache: Sequence[Cache] | None = None
) -> Iterator[mx.array]:
    """Of what follows each of `ids`: `[n, V]`, float32, in chunks. `cache` has seen what is before
    them."""
    cache, step = model.make_cache() if cache is None else cache, prefill_step()
    for first in range(0, len(ids), step):
        tokens = mx.array(list(ids[first : first + step]), dtype=mx.int32)
        yield log_softmax(model(tokens[None], cache)[0])
        mx.clear_cache()


def losses(model: Model, window: Sequence[int]) -> Values:
    """Negative log-likelihoods, nats, of all tokens of `window` but its first."""
    chunks = with_targets(log_probs(model, window[:-1]), window[1:])
    return _finite(np.concatenate([np.array(loss(*each), dtype=np.float64) for each in chunks]))


def compare(a: Chunks, b: Chunks, window: Sequence[int]) -> Values:
    """Two models on the tokens of one window (see `compared`)."""
    return _finite(compared(a, b, window[1:]))


def compared(a: Chunks, b: Chunks, ids: Sequence[int]) -> Values:
    """`[4, tokens]`: a's loss of what does follow and b's, in nats, KL(a || b) of the next token's
    distribution, and 1 where both have the same most likely token."""
    found = []
    for ours, (theirs, targets) in zip(a, with_targets(b, ids), strict=True):
        kl = (mx.exp(ours) * (ours - theirs)).sum(axis=-1)
        agrees = (ours.argmax(axis=-1) == theirs.argmax(axis=-1)).astype(mx.float32)
        rows = mx.stack([loss(ours, targets), loss(theirs, targets), kl, agrees])
        found.append(np.array(rows, dtype=np.float64))
    return np.concatenate(found, axis=1)


def figures(found: Sequence[Values]) -> dict[str, Any]:
    """Of what `compare` gave for each window: losses of both, b's minus a's, KL and agreement."""
    a, b, kl, agrees = zip(*found, strict=True)
    more = [theirs - ours for ours, theirs in zip(a, b, strict=True)]

    def over(parts: Sequence[Values]) -> dict[str, float]:
        return bootstrap.interval(*parts, block=bootstrap.TOKENS).as_json()

    return {
        "tokens": sum(map(len, a)),
        "loss_a": over(a)["value"],
        "loss_b": over(b)["value"],
        "difference": over(more),
        "kl": over(kl),
        "agreement": over(agrees),
    }


def with_targets(chunks: Chunks, ids: Sequence[int]) -> Iterator[tuple[mx.array, mx.array]]:
    """Each chunk with the ids `[n]` that do follow."""
    at = 0
    for chunk in chunks:
        yield chunk, mx.array(list(ids[at : at + len(chunk)]), dtype=mx.int32)
        at += len(chunk)


def loss(chunk: mx.array, targets: mx.array) -> mx.array:
    return -mx.take_along_axis(chunk, targets[:, None], axis=-1)[:, 0]


def _finite(values: Values) -> Values:
    """Raises CerebrumError for what can't be reported: a 16-bit model that overflows."""
    if not np.isfinite(values).all():
        raise CerebrumError("the model's logits are not finite; try another dtype or plan")
    return values
