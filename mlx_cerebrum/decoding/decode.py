"""Token ids in, token ids out: prefill, then one token at a time. Knows no text."""

from collections.abc import Callable, Generator, Sequence
from typing import cast

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


def decode_step(
    model: Model, token: mx.array, cache: Sequence[Cache], sampler: Sampler, number: int
) -> mx.array:
    """Start computing what follows `token [1]`: the answer's token `number`, `[1]`.

    Not compiled as a whole (mx.compile). On a CPU that would run the demo 1.03 times as fast, and a
    small model of 56 positions 1.29 times, but takes 2 to 5 s of a C++ compiler: repaid after some
    1400 tokens. On Metal the compiled step launches just as many kernels.
    """
    following = sampler(model(token[None], cache)[0, -1:], number)
    mx.async_eval(following)
    return following


def check_prompt(prompt: Sequence[int]) -> None:
    """Raise RequestError for an empty prompt."""
    if not prompt:
        raise RequestError("the prompt is empty; there is nothing to continue")


def generate_step(
    prompt: Sequence[int],
    model: Model,
    *,
    max_tokens: int = 256,
    sampler: Sampler = greedy,
    cache: Sequence[Cache] | None = None,
    prefill_step_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Generator[int, None, None]:
    """Yield up to `max_tokens` tokens that continue `prompt`; the caller decides when to stop.

    On a GPU the step after the current one is already running when a token is yielded, so the
    host's work (detokenizing, printing) hides behind the device's. `cache` resumes a conversation:
    `prompt` is then what comes after the cached tokens, and the cache always holds the first
    `offset` of all tokens seen and yielded.

    Raises RequestError for an empty `prompt`, or a prefill step below 1.
    """
    chunk = prefill_step(prefill_step_size)
    check_prompt(prompt)
    cache = model.make_cache() if cache is None else cache
    seen = cache[0].offset + len(prompt)
    tokens = mx.array(list(prompt), dtype=mx.int32)
    # The CPU's queue is short: launching a step there waits for most of it, and delays a token.
    ahead = device.on_gpu()

    def step(token: mx.array, number: int) -> mx.array:
        return decode_step(model, token, cache, sampler, number)

    try:
        # The last token is left to the decode step: prefill would compute it with another
        # kernel, whose rounding can flip a tie between the two best tokens.
        prefill(model, tokens[:-1], cache, chunk, progress)
        token = step(tokens[-1:], 0)
        for n in range(1, max_tokens + 1):
            following = step(token, n) if ahead and n < max_tokens else token
            value = cast(int, token.item())
            seen += 1
            yield value
            if n < max_tokens:
                token = following if ahead else step(token, n)
            if n % 256 == 0:
                mx.clear_cache()
    except BaseException:  # Ctrl-C: all caches end at one token, at most the last yielded
        least = min([seen, *(c.offset for c in cache)])
        for c in cache:
            if c.offset > least:
                c.trim(c.offset - least)
        raise
