"""`python -m mlx_cerebrum.generate`: one prompt, answered as it comes."""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlx_cerebrum import cli, hub
from mlx_cerebrum.checkpoint import open_checkpoint
from mlx_cerebrum.decode import PREFILL_STEP
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.load import (
    DTYPES,
    SMALLER,
    choose_storage,
    load_model,
    load_tokenizer,
    planned_config,
)
from mlx_cerebrum.memory import human, request_bytes, require, wired
from mlx_cerebrum.progress import progress
from mlx_cerebrum.quantize import AFFINE_BITS, AFFINE_GROUPS, Packing
from mlx_cerebrum.sampling import make_sampler
from mlx_cerebrum.stream import Response, StopText, check_request, generate, stream_generate

__all__ = ["generate", "main", "stream_generate"]

DEFAULT_PLAN = "cerebrum-12.25b"


def parser() -> cli.ArgumentParser:
    p = cli.ArgumentParser(
        prog="python -m mlx_cerebrum.generate",
        description="Answer one prompt with Cerebrum or another Mistral or Llama model.",
    )
    p.add_argument(
        "--model",
        metavar="DIR|FILE.gguf|HUBID|demo",
        help=f"what to run (default: {hub.DEFAULT_REPO} laid out as {DEFAULT_PLAN})",
    )
    p.add_argument("--revision", help="hub branch, tag or commit (default: main)")
    p.add_argument(
        "--plan",
        metavar="NAME|FILE",
        help="layer plan: a named one or mergekit YAML (default: the checkpoint's own order)",
    )
    p.add_argument(
        "--q-bits",
        type=int,
        choices=AFFINE_BITS,
        help="bits a weight to quantize to while loading (default: as stored)",
    )
    p.add_argument(
        "--q-group-size",
        type=int,
        choices=AFFINE_GROUPS,
        help="weights per quantization group (default: 64)",
    )
    p.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="of activations and dense weights (default: auto, the checkpoint's own on a GPU)",
    )
    p.add_argument(
        "--window",
        type=int,
        metavar="TOKENS",
        help="sliding window in tokens, 0 for none (default: the checkpoint's)",
    )
    p.add_argument("--prompt", metavar="TEXT|-", help="the question; - reads standard input")
    p.add_argument("--system", metavar="TEXT", help="system text (default: the template's own)")
    p.add_argument(
        "--messages",
        type=Path,
        metavar="FILE.json",
        help='a conversation, [{"role": "user", "content": "..."}, ...], instead of --prompt',
    )
    p.add_argument("--raw", action="store_true", help="continue the prompt itself: no template")
    p.add_argument(
        "--max-tokens", type=int, default=100, metavar="N", help="tokens at most (default: 100)"
    )
    p.add_argument("--temp", type=float, default=0.0, help="temperature; 0 is greedy (default: 0)")
    p.add_argument(
        "--top-p", type=float, default=1.0, help="probability mass to draw from (default: 1, all)"
    )
    p.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        help="least probability, as a share of the best token's (default: 0)",
    )
    p.add_argument("--seed", type=int, help="of the random draws (default: a new one every run)")
    p.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the answer before this text; may be repeated (default: the template's)",
    )
    p.add_argument(
        "--prefill-step-size",
        type=int,
        default=PREFILL_STEP,
        metavar="TOKENS",
        help=f"prompt tokens computed at once (default: {PREFILL_STEP})",
    )
    p.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    p.add_argument("--quiet", action="store_true", help="print the answer only")
    p.add_debug()
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    # Everything that can be refused is, cheapest first, before weights are read.
    sampler = make_sampler(args.temp, args.top_p, args.min_p, args.seed)
    question = _question(args)
    StopText(args.stop)
    if args.q_bits is None and args.q_group_size is not None:
        raise RequestError("--q-group-size only means something with --q-bits")
    packing = None if args.q_bits is None else Packing(args.q_bits, args.q_group_size or 64)
    plan = DEFAULT_PLAN if args.model is None and args.plan is None else args.plan
    name = hub.DEFAULT_REPO if args.model is None else args.model
    checkpoint = open_checkpoint(hub.resolve(name, args.revision))
    config = planned_config(checkpoint.config, plan, args.window)
    tokenizer = load_tokenizer(checkpoint)
    if isinstance(question, str):
        ids = tokenizer.encode(question)
    else:
        ids = tokenizer.apply_chat_template(question)
    check_request(config, len(ids), args.max_tokens, args.prefill_step_size)

    storage = choose_storage(checkpoint, packing, args.dtype)
    request = request_bytes(
        config, len(ids), args.max_tokens, storage.dtype.size, args.prefill_step_size
    )
    require(
        storage.nbytes + max(request, storage.transient),
        f"the model ({human(storage.nbytes)}) with {len(ids)} + {args.max_tokens} tokens"
        f" ({human(request)})",
        f"{SMALLER}, a smaller --window, or fewer --max-tokens",
    )
    show = not (args.quiet or args.json)
    with progress("loading", show) as report:
        model = load_model(checkpoint, config, storage, report)
    with wired():
        with progress("reading the prompt", show, "tokens") as report:
            responses = stream_generate(
                model,
                tokenizer,
                ids,
                max_tokens=args.max_tokens,
                sampler=sampler,
                stop=args.stop if args.raw else [*args.stop, *tokenizer.stop_strings],
                prefill_step_size=args.prefill_step_size,
                progress=report,
            )
            first = next(responses)
        answer = _stream(first, responses, echo=not args.json)
    facts = {
        "model": name,
        "plan": plan,
        "positions": config.num_positions,
        "window": config.sliding_window,
        "dtype": str(storage.dtype).removeprefix("mlx.core."),
    }
    if args.json:
        print(json.dumps(answer | facts, ensure_ascii=False))
    elif not args.quiet:
        print(_closing_line(answer | facts), file=sys.stderr)
    return cli.INTERRUPTED if answer["finish_reason"] == "interrupted" else 0


def _stream(first: Response, rest: Iterable[Response], echo: bool) -> dict[str, Any]:
    """Print the text as it comes; what `--json` reports. Ctrl-C keeps what there is."""
    got = [first]
    reason = "interrupted"
    try:
        if echo:
            print(first.text, end="", flush=True)
        for response in rest:
            got.append(response)
            if echo:
                print(response.text, end="", flush=True)
        reason = got[-1].finish_reason or reason
    except KeyboardInterrupt:
        pass
    if echo:
        print()
    last = got[-1]
    return {
        "text": "".join(response.text for response in got),
        "token_ids": [response.token for response in got],
        "finish_reason": reason,
        "prompt_tokens": last.prompt_tokens,
        "prompt_tps": round(last.prompt_tps, 3),
        "generation_tokens": last.generation_tokens,
        "generation_tps": round(last.generation_tps, 3),
        "time_to_first_token_s": round(last.time_to_first_token, 4),
        "peak_memory_bytes": last.peak_memory,
    }


def _closing_line(facts: dict[str, Any]) -> str:
    window = facts["window"]
    return (
        f"[{facts['finish_reason']}] prompt {facts['prompt_tokens']} tokens at"
        f" {facts['prompt_tps']:.1f}/s, first token after {facts['time_to_first_token_s']:.2f} s;"
        f" {facts['generation_tokens']} generated at {facts['generation_tps']:.1f}/s; peak memory"
        f" {human(facts['peak_memory_bytes'])}; {facts['positions']} positions,"
        f" {f'window {window}' if window else 'no window'}, {facts['dtype']}"
    )


def _question(args: argparse.Namespace) -> str | list[Any]:
    """The raw prompt, or the conversation, that the flags describe."""
    if (args.prompt is None) == (args.messages is None):
        raise RequestError("give the question as --prompt TEXT (or -), or as --messages FILE.json")
    if args.messages is not None:
        if args.raw or args.system is not None:
            raise RequestError("--messages is a whole conversation: no --raw or --system with it")
        return _read_messages(args.messages)
    if args.prompt == "-" and sys.stdin is None:
        raise RequestError("standard input is closed; pipe the prompt into it")
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not (prompt if args.raw else prompt.strip()):
        raise RequestError("the prompt is empty; there is nothing to answer")
    if args.raw:
        if args.system is not None:
            raise RequestError("--raw has no template to put --system into")
        return str(prompt)
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    return [*system, {"role": "user", "content": prompt}]


def _read_messages(path: Path) -> list[Any]:
    try:
        messages = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(messages, list):
        raise RequestError(f"{path} must hold a list of messages, not a {type(messages).__name__}")
    return messages


if __name__ == "__main__":
    sys.exit(main())
