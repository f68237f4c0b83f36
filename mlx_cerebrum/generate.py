"""`python -m mlx_cerebrum.generate`: one prompt, answered as it comes."""

import argparse
import json
import sys
from collections.abc import Iterable
from contextlib import closing
from typing import Any

from mlx_cerebrum import cli, hub
from mlx_cerebrum.attention import check_kv_bits
from mlx_cerebrum.chat_formats import read_format
from mlx_cerebrum.checkpoint import Checkpoint, open_checkpoint
from mlx_cerebrum.config import ModelConfig
from mlx_cerebrum.decode import Sampler
from mlx_cerebrum.draft_models import check_draft, copy_bytes, draft_model, stored_order
from mlx_cerebrum.generate_args import DEFAULT_PLAN, check_drafting, most_drafts, parser, question
from mlx_cerebrum.load import (
    Storage,
    choose_storage,
    load_model,
    load_tokenizer,
    planned_config,
    smaller_weights,
)
from mlx_cerebrum.memory import fits, human, request_bytes, require, what_fits
from mlx_cerebrum.memory_limits import limits
from mlx_cerebrum.model import Model
from mlx_cerebrum.model_args import check_model_flags, say_assumed
from mlx_cerebrum.progress import progress
from mlx_cerebrum.prompt_cache import PromptCache
from mlx_cerebrum.prompt_cache_file import check, check_destination, load, save
from mlx_cerebrum.prompt_cache_identity import identity
from mlx_cerebrum.quantize import Packing
from mlx_cerebrum.sampling import make_sampler
from mlx_cerebrum.speculative import Speculation, speculation
from mlx_cerebrum.stream import Response, StopText, check_request, generate, stream_generate
from mlx_cerebrum.text import say, tell

__all__ = ["generate", "main", "stream_generate"]


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    # Everything that can be refused is, cheapest first, before weights are read.
    sampler = make_sampler(args.temp, args.top_p, args.min_p, args.seed)
    asked = question(args)
    check_drafting(args)
    StopText(args.stop)
    memory = check_model_flags(args)
    if args.prompt_cache is not None:
        check_destination(args.prompt_cache)
    with limits(memory):
        return _answer(args, sampler, asked)


def _answer(args: argparse.Namespace, sampler: Sampler, asked: str | list[Any]) -> int:
    packing = None if args.q_bits is None else Packing(args.q_bits, args.q_group_size or 64)
    plan = DEFAULT_PLAN if args.model is None and args.plan is None else args.plan
    name = hub.DEFAULT_REPO if args.model is None else args.model
    checkpoint = open_checkpoint(hub.resolve(name, args.revision))
    config = planned_config(checkpoint.config, plan, args.window)
    check_kv_bits(config, args.kv_bits)
    draft = check_draft(config, args.draft_plan, args.draft_bits)
    chosen = None if args.template is None else read_format(args.template)
    tokenizer = load_tokenizer(checkpoint, chosen)
    if isinstance(asked, str):
        ids = tokenizer.encode(asked)
    else:
        ids = tokenizer.apply_chat_template(asked)
    check_request(config, len(ids), args.max_tokens, args.prefill_step_size)

    storage = choose_storage(checkpoint, packing, args.dtype)
    more = copy_bytes(draft, args.draft_bits, storage.dtype.size) if args.draft_bits else 0
    kept, same = args.prompt_cache, {}
    if kept is not None:
        same = identity(checkpoint, config, storage, tokenizer.format.source)
        more += check(kept, same, args.kv_bits) if kept.exists() else 0
    _check_memory(args, checkpoint, packing, config, storage, len(ids), more)
    show = not (args.quiet or args.json)
    with progress("loading", show) as report:
        model = load_model(checkpoint, config, storage, report)
    if not args.quiet and not args.raw:
        say_assumed(tokenizer)
    drafting = _drafting(args, model)
    # One answer: nothing will be taken back, so nothing is kept for it.
    prompt_cache = PromptCache(model, args.kv_bits, max_bytes=0)
    if kept is not None and kept.exists():
        prompt_cache = load(kept, model, same, args.kv_bits, max_bytes=0)
    try:
        with progress("reading the prompt", show, "tokens") as report:
            responses = stream_generate(
                model,
                tokenizer,
                ids,
                max_tokens=args.max_tokens,
                sampler=sampler,
                stop=args.stop if args.raw else [*args.stop, *tokenizer.stop_strings],
                speculation=drafting,
                prompt_cache=prompt_cache,
                prefill_step_size=args.prefill_step_size,
                progress=report,
            )
            first = next(responses)
        with closing(responses):  # whatever ends it: the cache must hold what was printed, no more
            answer = _stream(first, responses, echo=not args.json)
        facts = {
            "model": name,
            "plan": plan,
            "positions": config.num_positions,
            "window": config.sliding_window,
            "dtype": str(storage.dtype).removeprefix("mlx.core."),
            "kv_bits": args.kv_bits,
            "draft": None if drafting is None else drafting.summary(),
        }
        if args.json:
            say(json.dumps(answer | facts, ensure_ascii=False))
        elif not args.quiet:
            tell(_closing_line(answer | facts))
    finally:  # what was computed is kept, also of a prompt that Ctrl-C cut short
        if kept is not None and prompt_cache.tokens:
            save(prompt_cache, kept, same)
    return cli.INTERRUPTED if answer["finish_reason"] == "interrupted" else 0


def _check_memory(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    packing: Packing | None,
    config: ModelConfig,
    storage: Storage,
    prompt: int,
    more: int,
) -> None:
    """Raise MemoryBudgetError, naming settings that fit, where the request does not.

    `more` bytes are held besides: a packed copy to draft with, a prompt cache as it is read.
    """
    sizes = (config, prompt, args.max_tokens)
    kinds = {"kv_bits": args.kv_bits, "drafts": most_drafts(args)}
    item_bytes = storage.dtype.size
    request = request_bytes(*sizes, item_bytes, args.prefill_step_size, **kinds)
    needed = storage.nbytes + more + max(request, storage.transient)
    if fits(needed):
        return
    ways = [("", storage), *smaller_weights(checkpoint, packing, args.dtype)]
    weights = [(flag, s.nbytes + more, s.transient, s.dtype.size) for flag, s in ways]
    require(
        needed,
        f"the model ({human(storage.nbytes)}) with {prompt} + {args.max_tokens} tokens"
        f" ({human(request)})",
        "use a smaller model, or fewer --max-tokens",
        settings=what_fits(weights, *sizes, args.prefill_step_size, **kinds),
    )


def _drafting(args: argparse.Namespace, model: Model) -> Speculation | None:
    """The drafters that the flags ask for."""
    if not most_drafts(args):
        return None
    drafts = []
    if args.draft_plan is not None or args.draft_bits is not None:
        drafts.append(draft_model(model, args.draft_plan, args.draft_bits))
    elif args.draft == "auto" and (shorter := stored_order(model)) is not None:
        drafts.append(shorter)
    return speculation(model, drafts, most=most_drafts(args))


def _stream(first: Response, rest: Iterable[Response], echo: bool) -> dict[str, Any]:
    """Print the text as it comes; what `--json` reports. Ctrl-C keeps what there is."""
    got = [first]
    reason = "interrupted"
    try:
        if echo:
            say(first.text, end="")
        for response in rest:
            got.append(response)
            if echo:
                say(response.text, end="")
        reason = got[-1].finish_reason or reason
    except KeyboardInterrupt:
        pass
    if echo:
        say()
    last = got[-1]
    return {
        "text": "".join(response.text for response in got),
        "token_ids": [response.token for response in got],
        "finish_reason": reason,
        "prompt_tokens": last.prompt_tokens,
        "cached_tokens": last.cached_tokens,
        "prompt_tps": round(last.prompt_tps, 3),
        "generation_tokens": last.generation_tokens,
        "generation_tps": round(last.generation_tps, 3),
        "time_to_first_token_s": round(last.time_to_first_token, 4),
        "peak_memory_bytes": last.peak_memory,
    }


def _closing_line(facts: dict[str, Any]) -> str:
    window, cached, draft = facts["window"], facts["cached_tokens"], facts["draft"]
    per_pass = draft["tokens_per_pass"] if draft else 1
    return (
        f"[{facts['finish_reason']}] prompt {facts['prompt_tokens']} tokens"
        f"{f' ({cached} from the prompt cache)' if cached else ''} at"
        f" {facts['prompt_tps']:.1f}/s, first token after {facts['time_to_first_token_s']:.2f} s;"
        f" {facts['generation_tokens']} generated at {facts['generation_tps']:.1f}/s"
        f"{f' ({per_pass:.2f} a pass)' if draft else ''}; peak memory"
        f" {human(facts['peak_memory_bytes'])}; {facts['positions']} positions,"
        f" {f'window {window}' if window else 'no window'}, {facts['dtype']}"
    )


if __name__ == "__main__":
    sys.exit(main())
