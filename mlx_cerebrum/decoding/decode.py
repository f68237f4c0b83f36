"""What every way of decoding shares: how a prompt is read, and what chooses a token."""

from collections.abc import Callable, Sequence

import mlx.core as mx

from mlx_cerebrum import device
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.cache import Cache
from mlx_cerebrum.model.forward import Model

# Logits [L, V] of the answer's tokens number n, n + 1, ... -> their ids [L].
Sampler = Callable[[mx.array, int], mx.array]


def prefill_step(asked: int | None = None) -> int:
    """Prompt tokens to compute at once: as many as asked for, or what is fastest here.

    Raises RequestError below 1.
    """
    if asked is None:
        # Measured (bench.speed): on the CPU small chunks waste less on keys a causal mask hides.
        return 512 if device.on_gpu() else 256
    if asked < 1:
        raise RequestError(f"prefill-step-size must be at least 1, not {asked}")
    return asked


def greedy(logits: mx.array, number: int = 0) -> mx.array:
    """The most likely tokens: `[L, V]` -> `[L]`. No softmax: it would not change the order."""
    return mx.argmax(logits, axis=-1)


def prefill(
    model: Model,
    tokens: mx.array,
    cache: Sequence[Cache],
    step: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill the cache with `tokens [L]`, in chunks of `step` (see `prefill_step`).

    Each chunk is evaluated before the next is built, so the graph stays small and memory
    bounded; no logits are computed (MLX is lazy and nothing asks for them).
    """
    step = prefill_step(step)
    for start in range(0, tokens.size, step):
        end = min(start + step, tokens.size)
        model(tokens[None, start:end], cache)
        mx.eval([c.state for c in cache])
        mx.clear_cache()
        if progress is not None:
            progress(end, tokens.size)


def check_prompt(prompt: Sequence[int]) -> None:
    """Raise RequestError for an empty prompt."""
    if not prompt:
        raise RequestError("the prompt is empty; there is nothing to continue")
