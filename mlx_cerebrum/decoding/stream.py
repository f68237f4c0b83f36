"""Text in, text out, as it comes: what joins the tokenizer to the decoding loop."""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_cerebrum.decoding.decode import Sampler, check_prompt, greedy, prefill_step
from mlx_cerebrum.decoding.decoder import Decoder
from mlx_cerebrum.decoding.generation import Generation
from mlx_cerebrum.decoding.prompt_cache import PromptCache
from mlx_cerebrum.decoding.sampling import Adjust
from mlx_cerebrum.decoding.speculative import Speculation
from mlx_cerebrum.decoding.text import AnswerText
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.limits import limits, wire
from mlx_cerebrum.model.memory import Workload, require
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Response:
    """One generated token, the text that became final with it, and the figures so far."""

    text: str
    token: int
    finish_reason: str | None  # "stop" or "length" on the last one
    prompt_tokens: int
    prompt_tps: float  # prompt tokens per second, until the first token was there
    generation_tokens: int
    generation_tps: float  # tokens per second after the first
    time_to_first_token: float  # seconds
    peak_memory: int  # bytes
    cached_tokens: int  # of the prompt, found in the prompt cache


def check_request(
    config: ModelConfig, prompt: Sequence[int], max_tokens: int, least: int = 1
) -> None:
    """Raise RequestError for a request that is empty, longer than the model's positions, or has
    tokens that the model does not."""
    check_prompt(prompt)
    if max_tokens < least:
        raise RequestError(f"max-tokens must be at least {least}, not {max_tokens}")
    if len(prompt) + max_tokens > config.max_position_embeddings:
        raise RequestError(
            f"prompt ({len(prompt)} tokens) and max-tokens ({max_tokens}) are more than the"
            f" model's {config.max_position_embeddings} positions; shorten one of them"
        )
    outside = [token for token in prompt if not 0 <= token < config.vocab_size]
    if outside:
        raise RequestError(f"token id {outside[0]} is not below {config.vocab_size}")


def stream_generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    max_tokens: int = 256,
    sampler: Sampler = greedy,
    stop: Sequence[str] = (),
    speculation: Speculation | None = None,
    prompt_cache: PromptCache | None = None,
    prefill_step_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    adjust: Adjust | None = None,
    decoder: Decoder | None = None,
    joined: bool = False,
    begun: int = 0,
) -> Generator[Response, None, None]:
    """Yield a Response per token until an EOS id, a `stop` string, or `max_tokens`.

    A `str` prompt is encoded as plain text (with BOS where the tokenizer wants one); for a
    conversation pass `tokenizer.apply_chat_template(messages)`. Neither EOS nor the stop string
    is in the text. With a `prompt_cache`, only what it does not hold of the prompt is computed;
    it then holds prompt and answer. `adjust` changes logits before a choice (`Sampling.adjust`).
    The text is to stand alone; with `joined`, right after the prompt's, so that it keeps its space.
    The prompt's last `begun` tokens are of an answer that was cut: its text and stop strings go on
    as if it had not been.
    Streams of several models over the same weights that are given
    one `decoder` take their steps together. Raises RequestError for an empty or overlong request,
    MemoryBudgetError when its caches and a forward pass can't fit.
    """
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    chunk = prefill_step(prefill_step_size)
    check_request(model.config, ids, max_tokens)
    if prompt_cache is None:
        prompt_cache = PromptCache(model, max_bytes=0)  # nothing will be taken back
    elif prompt_cache.model is not model:
        raise RequestError("this prompt cache is another model's; its entries mean nothing here")
    drafts = 0 if speculation is None else speculation.policy.most
    sizes = len(ids), max_tokens, chunk, prompt_cache.kv_bits, drafts
    require(
        Workload(model.config, model.dtype.size, *sizes).bytes - prompt_cache.nbytes,
        f"the cache for {len(ids)} + {max_tokens} tokens, with what computing them takes,",
        "use a smaller window, fewer tokens or a smaller prefill step",
    )
    if speculation is not None:
        speculation.check_unused(model)
    before, said = ids[: len(ids) - begun], ids[len(ids) - begun :]
    answer = AnswerText(tokenizer, begun + max_tokens, stop, before if joined else ())
    for token in said:
        answer.add(token)
    rest = prompt_cache.begin(ids)
    started = time.perf_counter()
    first = started
    generation = Generation(
        model, list(ids), prompt_cache.cache, max_tokens, sampler, speculation, adjust=adjust
    )
    steps = (Decoder(chunk) if decoder is None else decoder).run(generation, progress)
    tokens: list[int] = []
    with limits():  # a caller's own stay as they are
        wire(model)
        try:
            for count, (token, now) in enumerate(steps, start=1):
                if count == 1:
                    first = now
                tokens.append(token)
                text, finish_reason = answer.add(token)
                yield Response(
                    text=text,
                    token=token,
                    finish_reason=finish_reason,
                    prompt_tokens=len(ids),
                    prompt_tps=len(rest) / max(first - started, 1e-9),
                    generation_tokens=count,
                    generation_tps=(count - 1) / max(now - first, 1e-9) if count > 1 else 0.0,
                    time_to_first_token=first - started,
                    peak_memory=mx.get_peak_memory(),
                    cached_tokens=len(ids) - len(rest),
                )
                if finish_reason is not None:
                    return
        finally:
            steps.close()  # it leaves in the cache what was handed out, no more
            prompt_cache.end([*ids, *tokens])


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    max_tokens: int = 256,
    sampler: Sampler = greedy,
    stop: Sequence[str] = (),
    prefill_step_size: int | None = None,
) -> str:
    """The whole text `stream_generate` yields for the same arguments."""
    responses = stream_generate(
        model,
        tokenizer,
        prompt,
        max_tokens=max_tokens,
        sampler=sampler,
        stop=stop,
        prefill_step_size=prefill_step_size,
    )
    return "".join(response.text for response in responses)
