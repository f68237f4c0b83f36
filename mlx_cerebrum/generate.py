"""`python -m mlx_cerebrum.generate`: one prompt, answered as it comes."""

import argparse
import json
import sys
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from mlx_cerebrum import cli
from mlx_cerebrum.decoding.decode import prefill_step
from mlx_cerebrum.decoding.draft_models import check_draft, copy_bytes, draft_model, stored_order
from mlx_cerebrum.decoding.policy import MOST_DRAFTS
from mlx_cerebrum.decoding.prompt_cache import PromptCache
from mlx_cerebrum.decoding.prompt_cache_file import (
    check_destination,
    check_prompt_cache,
    load_prompt_cache,
    save_prompt_cache,
)
from mlx_cerebrum.decoding.sampling import Sampling
from mlx_cerebrum.decoding.speculative import Speculation, speculation
from mlx_cerebrum.decoding.stream import (
    Response,
    check_request,
    generate,
    stream_generate,
)
from mlx_cerebrum.decoding.text import StopText
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.flags import (
    add_draft_flag,
    add_kv_bits_flag,
    add_machines_flags,
    add_max_tokens_flag,
    add_model_flags,
    add_plan_flag,
    add_prefill_flag,
    add_sampling_flags,
    add_seed_flag,
    add_stop_flag,
    add_system_flag,
    asked_model,
    asked_sampling,
    machines,
    memory_limit,
    model_spec,
    say_assumed,
)
from mlx_cerebrum.machine.awake import awake
from mlx_cerebrum.model.cache import REWIND
from mlx_cerebrum.model.entries import check_kv_bits
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.limits import limits
from mlx_cerebrum.model.memory import Weights, Workload, fits, human, require
from mlx_cerebrum.progress import progress
from mlx_cerebrum.ranks import backend
from mlx_cerebrum.text import say, tell
from mlx_cerebrum.tokenizer.conversation import read_messages
from mlx_cerebrum.tokenizer.messages import Message, check_length, ends_with_answer
from mlx_cerebrum.weights import hub
from mlx_cerebrum.weights.identity import identity_of
from mlx_cerebrum.weights.opening import ModelSpec, Opened, open_model
from mlx_cerebrum.weights.quantize import AFFINE_BITS
from mlx_cerebrum.weights.storage import Storage, dtype_name

__all__ = ["generate", "main", "stream_generate"]

DEFAULT_PLAN = "cerebrum-12.25b"


def parser() -> cli.ArgumentParser:
    p = cli.ArgumentParser(
        prog="python -m mlx_cerebrum.generate",
        description="Answer one prompt with Cerebrum or another Mistral or Llama model.",
    )
    add_model_flags(p, f"{hub.DEFAULT_REPO} laid out as {DEFAULT_PLAN}")
    add_plan_flag(p, "the checkpoint's own order")
    p.add_argument("--prompt", metavar="TEXT|-", help="the question; - reads standard input")
    add_system_flag(p)
    p.add_argument(
        "--messages",
        type=Path,
        metavar="FILE.json",
        help='a conversation, [{"role": "user", "content": "..."}, ...]; where it ends with an'
        " answer, --prompt asks on, and without one the answer is continued (default: none)",
    )
    p.add_argument("--raw", action="store_true", help="continue the prompt itself: no template")
    add_max_tokens_flag(p, 100)
    add_sampling_flags(p)
    add_seed_flag(p)
    add_stop_flag(p)
    add_prefill_flag(p)
    add_kv_bits_flag(p)
    p.add_argument(
        "--prompt-cache",
        type=Path,
        metavar="FILE.safetensors",
        help="reuse what this file holds of the prompt, and save prompt and answer to it"
        " (default: none)",
    )
    add_draft_flag(p, None, "none, auto with --draft-plan or --draft-bits")
    p.add_argument(
        "--draft-plan",
        metavar="NAME|FILE",
        help="layer plan of a shorter model that guesses too (default: none)",
    )
    p.add_argument(
        "--draft-bits",
        type=int,
        choices=AFFINE_BITS,
        help="bits a weight of a packed copy that guesses too (default: no copy)",
    )
    p.add_argument(
        "--draft-tokens",
        type=int,
        metavar="N",
        help=f"guesses at once, at most (default: {MOST_DRAFTS})",
    )
    add_machines_flags(p)
    p.add_json()
    p.add_argument("--quiet", action="store_true", help="print the answer only")
    p.add_debug()
    return p


def question(args: argparse.Namespace) -> str | list[Message]:
    """The raw prompt, or the conversation, that the flags describe."""
    if args.prompt is None and args.messages is None:
        raise RequestError("give the question as --prompt TEXT (or -), or as --messages FILE.json")
    before: list[Message] = []
    if args.system is not None:
        before = [{"role": "system", "content": args.system}]
    if args.messages is not None:
        if args.raw or args.system is not None:
            raise RequestError("--messages is a whole conversation: no --raw or --system with it")
        before = read_messages(args.messages)
        if args.prompt is None:
            return before
        if before[-1]["role"] in ("user", "tool"):
            raise RequestError(f"--messages {args.messages} ends with a question: no --prompt too")
    if args.prompt == "-" and backend() is not None:  # what is read below would never end
        raise RequestError("a launcher hands on no end of input: give the --prompt itself, not -")
    if args.prompt == "-" and sys.stdin is None:
        raise RequestError("standard input is closed; pipe the prompt into it")
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not (prompt if args.raw else prompt.strip()):
        raise RequestError("the prompt is empty; there is nothing to answer")
    check_length(len(prompt))
    if args.raw:
        for flag in ("system", "template"):
            if getattr(args, flag) is not None:
                raise RequestError(f"--raw takes no template: no --{flag} with it")
        return str(prompt)
    return [*before, {"role": "user", "content": prompt}]


def check_drafting(args: argparse.Namespace) -> None:
    """Raise RequestError for drafting flags that would be ignored, or can't be honoured."""
    given = args.draft_plan is not None or args.draft_bits is not None
    if given and args.draft in ("none", "ngram"):
        raise RequestError(
            f"--draft {args.draft} uses no model: drop it, or --draft-plan and --draft-bits"
        )
    if args.draft_tokens is not None:
        if not given and args.draft in (None, "none"):
            raise RequestError("--draft-tokens only means something with --draft auto or ngram")
        if not 1 <= args.draft_tokens < REWIND:
            raise RequestError(
                f"draft-tokens must be from 1 to {REWIND - 1}, not {args.draft_tokens}"
            )


def most_drafts(args: argparse.Namespace) -> int:
    """Guesses a round at most; 0 without drafting."""
    given = args.draft_plan is not None or args.draft_bits is not None
    if args.draft == "none" or (args.draft is None and not given):
        return 0
    return args.draft_tokens or MOST_DRAFTS


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    # Everything that can be refused is, cheapest first, before weights are read.
    sampling = asked_sampling(args)
    asked = question(args)
    check_drafting(args)
    prefill_step(args.prefill_step_size)
    StopText(args.stop)
    plan = DEFAULT_PLAN if asked_model(args) is None and args.plan is None else args.plan
    spec, memory = model_spec(args, plan), memory_limit(args)
    if args.prompt_cache is not None:
        check_destination(args.prompt_cache)
    several = machines(args)
    with limits(memory, wiring=not args.no_wire):
        if several is not None and several.follows:
            return several.follow(spec)
        if several is None:
            return _answer(args, open_model(spec), sampling, asked)
        with several.led():
            return _answer(args, several.open(spec), sampling, asked)


@awake()
def _answer(
    args: argparse.Namespace, opened: Opened, sampling: Sampling, asked: str | list[Message]
) -> int:
    config, storage = opened.config, opened.storage
    check_kv_bits(config, args.kv_bits)
    draft = check_draft(config, args.draft_plan, args.draft_bits)
    tokenizer = opened.tokenizer
    joined = False  # to the text of an answer that the conversation ends with
    if isinstance(asked, str):
        ids = tokenizer.encode(asked)
    else:
        begun = ends_with_answer(asked)
        joined = begun and asked[-1]["content"] != ""
        ids = tokenizer.apply_chat_template(asked, continue_final_message=begun)
    check_request(config, ids, args.max_tokens)
    sampling.check_vocabulary(config.vocab_size)

    more = copy_bytes(draft, args.draft_bits, storage.dtype.size) if args.draft_bits else 0
    kept, same = args.prompt_cache, {}
    if kept is not None:
        same = identity_of(opened.checkpoint, config, storage, tokenizer.format.source)
        more += check_prompt_cache(kept, same, args.kv_bits) if kept.exists() else 0
    _check_memory(args, opened, len(ids), more)
    show = not (args.quiet or args.json)
    with progress("loading", show) as report:
        model = opened.load(report)
    if not args.quiet and not args.raw:
        say_assumed(tokenizer)
    drafting = _drafting(args, model)
    # One answer, which is never taken back: the cache keeps no points to return to.
    prompt_cache = PromptCache(model, args.kv_bits, max_bytes=0)
    if kept is not None and kept.exists():
        prompt_cache = load_prompt_cache(kept, model, same, args.kv_bits, max_bytes=0)
    try:
        with progress("reading the prompt", show, "tokens") as report:
            responses = stream_generate(
                model,
                tokenizer,
                ids,
                max_tokens=args.max_tokens,
                sampler=sampling.sampler(),
                adjust=sampling.adjust(ids, tokenizer.eos_token_ids),
                stop=args.stop if args.raw else [*args.stop, *tokenizer.stop_strings],
                speculation=drafting,
                prompt_cache=prompt_cache,
                prefill_step_size=args.prefill_step_size,
                progress=report,
                joined=joined,
            )
            first = next(responses)
        with closing(responses):  # always: the cache then holds what was printed, no more
            answer = _stream(first, responses, echo=not args.json)
        _report(args, model, opened.spec, answer, drafting)
    finally:  # what was computed is kept, also of a prompt that Ctrl-C cut short
        if kept is not None and prompt_cache.tokens:
            save_prompt_cache(prompt_cache, kept, same)
    return cli.INTERRUPTED if answer["finish_reason"] == "interrupted" else 0


def _check_memory(args: argparse.Namespace, opened: Opened, prompt: int, more: int) -> None:
    """Raise MemoryBudgetError, naming settings that fit, where the request does not.

    `more` bytes are held besides: a packed copy to draft with, a prompt cache as it is read.
    """
    storage = opened.storage
    sizes = prompt, args.max_tokens, args.prefill_step_size, args.kv_bits, most_drafts(args)
    request = Workload(opened.here, storage.dtype.size, *sizes)

    def way(flags: str, storage: Storage) -> Weights:
        return Weights(flags, storage.nbytes + more, storage.transient, storage.dtype.size)

    asked = way("", storage)
    needed = asked.bytes_with(request)
    if fits(needed):
        return
    require(
        needed,
        f"the model ({human(storage.nbytes)}) with {prompt} + {args.max_tokens} tokens"
        f" ({human(request.bytes)})",
        "use a smaller model, or fewer --max-tokens",
        settings=request.smaller([asked, *(way(*smaller) for smaller in opened.smaller())]),
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


def _report(
    args: argparse.Namespace,
    model: Model,
    spec: ModelSpec,
    answer: dict[str, Any],
    drafting: Speculation | None,
) -> None:
    """Say what ran and how it went: as JSON with --json, else as a line on stderr."""
    facts = answer | {
        "model": spec.name,
        "plan": spec.plan,
        "positions": model.config.num_positions,
        "window": model.config.sliding_window,
        "dtype": dtype_name(model.dtype),
        "kv_bits": args.kv_bits,
        "draft": None if drafting is None else drafting.summary(),
    }
    if args.json:
        say(json.dumps(facts, ensure_ascii=False))
    elif not args.quiet:
        tell(_closing_line(facts))
        if answer["finish_reason"] == "length":
            tell(f"note: cut at {args.max_tokens} tokens; --max-tokens N lets it go on")


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
