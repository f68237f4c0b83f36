"""The flags of `python -m mlx_cerebrum.generate`, and the question they describe."""

import argparse
import sys
from pathlib import Path
from typing import Any

from mlx_cerebrum import cli, hub
from mlx_cerebrum.cache import KV_BITS, REWIND
from mlx_cerebrum.conversation import read_messages
from mlx_cerebrum.decode import PREFILL_STEP
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model_args import add_model_flags, add_sampling_flags
from mlx_cerebrum.policy import MOST_DRAFTS
from mlx_cerebrum.quantize import AFFINE_BITS
from mlx_cerebrum.template import check_length

DEFAULT_PLAN = "cerebrum-12.25b"


def parser() -> cli.ArgumentParser:
    p = cli.ArgumentParser(
        prog="python -m mlx_cerebrum.generate",
        description="Answer one prompt with Cerebrum or another Mistral or Llama model.",
    )
    add_model_flags(p, f"{hub.DEFAULT_REPO} laid out as {DEFAULT_PLAN}")
    p.add_argument(
        "--plan",
        metavar="NAME|FILE",
        help="layer plan: a named one or mergekit YAML (default: the checkpoint's own order)",
    )
    p.add_argument("--prompt", metavar="TEXT|-", help="the question; - reads standard input")
    p.add_argument("--system", metavar="TEXT", help="system text (default: the template's own)")
    p.add_argument(
        "--messages",
        type=Path,
        metavar="FILE.json",
        help='a conversation, [{"role": "user", "content": "..."}, ...], which --prompt goes on'
        " where it ends with an answer (default: none)",
    )
    p.add_argument("--raw", action="store_true", help="continue the prompt itself: no template")
    add_sampling_flags(p, 100)
    p.add_argument(
        "--seed", type=cli.seed, help="of the random draws (default: a new one every run)"
    )
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
    p.add_argument(
        "--kv-bits",
        type=int,
        choices=KV_BITS,
        help="bits a cached key or value; 8 costs the demo model 0 to 0.5%% of perplexity, 4 costs"
        " it 8 to 10%% (default: as the activations)",
    )
    p.add_argument(
        "--prompt-cache",
        type=Path,
        metavar="FILE.safetensors",
        help="reuse what this file holds of the prompt, and save prompt and answer to it"
        " (default: none)",
    )
    p.add_argument(
        "--draft",
        choices=("none", "auto", "ngram"),
        help="guess several tokens, check them at once: from the text itself (ngram), or also with"
        " a shorter model where that should pay (auto); the answer stays the same"
        " (default: none, auto with --draft-plan or --draft-bits)",
    )
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
    p.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    p.add_argument("--quiet", action="store_true", help="print the answer only")
    p.add_debug()
    return p


def question(args: argparse.Namespace) -> str | list[Any]:
    """The raw prompt, or the conversation, that the flags describe."""
    if args.prompt is None and args.messages is None:
        raise RequestError("give the question as --prompt TEXT (or -), or as --messages FILE.json")
    before = [] if args.system is None else [{"role": "system", "content": args.system}]
    if args.messages is not None:
        if args.raw or args.system is not None:
            raise RequestError("--messages is a whole conversation: no --raw or --system with it")
        before = read_messages(args.messages)
        asked = before[-1]["role"] == "user"
        if asked and args.prompt is not None:
            raise RequestError(f"--messages {args.messages} ends with a question: no --prompt too")
        if asked:
            return before
        if args.prompt is None:
            raise RequestError(
                f"{args.messages} ends with no question to answer; add one as --prompt TEXT"
            )
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
