"""Perplexity of one or more models on the same text.

Perplexity is exp of the mean negative log-likelihood a token, in nats. The text is cut into
windows that don't overlap; each starts with BOS where the tokenizer adds one, and the first
token of a window without one is only context. Models that share a vocabulary are compared token by
token with the first: what one word is harder than another cancels in the difference, so that
its standard error is far smaller than that of either perplexity. It comes from the means of blocks
of 32 consecutive tokens: a hard passage is hard for many tokens, and taken one by one they would
promise more than they know.

The default texts are not those that `convert --calibrate` is meant to be given. What a figure
says of a large model has to be measured on that model.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from bench import likelihood, machine
from bench.bootstrap import TOKENS
from bench.report import parser, publish, table
from mlx_cerebrum import cli
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights import hub
from mlx_cerebrum.weights.checkpoint import Checkpoint
from mlx_cerebrum.weights.opening import load, open_checkpoint

DATA = Path(__file__).parent / "data"
TEXTS = (DATA / "austen.txt", DATA / "newton.txt")


def main(argv: list[str] | None = None) -> int:
    p = parser("perplexity", "Perplexity of one or more models on the same text.")
    p.add_argument(
        "--model",
        nargs="+",
        default=["demo"],
        metavar="DIR|FILE.gguf|HUBID|demo",
        help="models; all are compared with the first",
    )
    p.add_argument("--plan", metavar="NAME|FILE", help="a layer plan to run them in")
    p.add_argument(
        "--text", nargs="+", default=[str(t) for t in TEXTS], metavar="FILE", help="UTF-8 text"
    )
    p.add_argument("--tokens", type=int, default=4096, metavar="N", help="of each (default: 4096)")
    p.add_argument("--context", type=int, default=512, metavar="N", help="a window (default: 512)")
    args = p.parse_args(argv)
    machine.use_openblas(not args.no_openblas)
    return cli.run(lambda: _run(args), args.debug)


def token_losses(
    model: Model, tokenizer: Tokenizer, text: str, tokens: int = 4096, context: int = 512
) -> list[float]:
    """Negative log-likelihoods, in nats, of the first `tokens` tokens of `text` that are scored.

    Raises RequestError for a text with none.
    """
    start, ids = split(tokenizer, text)
    step = context - len(start)
    if step < 2:
        raise RequestError(f"a context of {context} tokens leaves none to score")
    losses: list[float] = []
    for first in range(0, len(ids), step):
        window = start + ids[first : first + step]
        if len(window) < 2 or len(losses) >= tokens:
            break
        losses += likelihood.losses(model, window).tolist()
    if not losses:
        raise RequestError("the text has no token to score")
    return losses[:tokens]


def split(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    """What the tokenizer begins a text with (BOS, or nothing), and the text's own ids."""
    start = tokenizer.encode("")
    return start, tokenizer.encode(text)[len(start) :]


def read(file: Path) -> str:
    """Raises RequestError for a file that is no UTF-8 text."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{file} can't be read as UTF-8 text: {error}") from None


def perplexity(losses: Sequence[float]) -> float:
    return math.exp(fmean(losses))


def compare(losses: Sequence[float], reference: Sequence[float]) -> tuple[float, float]:
    """Mean difference in nats a token, and its standard error.

    The error is that of means of blocks of 32 tokens; of fewer than 64 tokens, of the tokens. A
    shorter last block weighs less.
    """
    pairs = [a - b for a, b in zip(losses, reference, strict=True)]
    mean = fmean(pairs)
    block = TOKENS if len(pairs) >= 2 * TOKENS else 1
    sums = [math.fsum(pairs[k : k + block]) for k in range(0, len(pairs), block)]
    if len(sums) < 2:
        return mean, math.inf
    sizes = [min(block, len(pairs) - k) for k in range(0, len(pairs), block)]
    squares = math.fsum((s - mean * n) ** 2 for s, n in zip(sums, sizes, strict=True))
    return mean, math.sqrt(squares * len(sums) / (len(sums) - 1)) / len(pairs)


def measure(
    path: str, plan: str | None, texts: Sequence[Path], tokens: int, context: int
) -> dict[str, list[float]]:
    """A model's losses on each text, by the text's name."""
    model, tokenizer = load(path, plan)
    return {
        file.stem: token_losses(model, tokenizer, read(file), tokens, context) for file in texts
    }


def stored_bits(checkpoint: Checkpoint) -> float:
    """Bits per weight as stored: all bytes times 8 over all parameters."""
    extents = (
        checkpoint.extents(module) for module in {n.rpartition(".")[0] for n in checkpoint.shapes}
    )
    nbytes = sum(extent.nbytes for parts in extents for extent in parts.values())
    return 8 * nbytes / checkpoint.config.stored_parameters


def _run(args: argparse.Namespace) -> int:
    if args.tokens < 2 or args.context < 2:
        raise RequestError("--tokens and --context must be at least 2")
    results = report(args.model, args.plan, [Path(t) for t in args.text], args.tokens, args.context)
    publish(args, "perplexity", results, lines(results))
    return 0


def report(
    models: Sequence[str], plan: str | None, texts: Sequence[Path], tokens: int, context: int
) -> dict[str, Any]:
    """Each model's bits per weight and, by text, perplexity and difference to the first."""
    results: dict[str, Any] = {}
    first: dict[str, list[float]] = {}
    for model in models:
        losses = measure(model, plan, texts, tokens, context)
        first = first or losses
        results[model] = {"bits_per_weight": stored_bits(open_checkpoint(hub.resolve(model)))}
        for text, each in losses.items():
            more, error = compare(each, first[text])
            results[model][text] = {
                "perplexity": perplexity(each),
                "more_nats": more,
                "standard_error": error,
                "tokens": len(each),
            }
    return results


def lines(results: dict[str, Any]) -> list[str]:
    """The table for a person."""
    texts = [key for key in next(iter(results.values())) if key != "bits_per_weight"]
    header = ["model", "bits per weight"]
    header += [column for text in texts for column in (text, "nats above the first")]
    rows = []
    for model, found in results.items():
        row = [Path(model).name, f"{found['bits_per_weight']:.3f}"]
        for text in texts:
            one = found[text]
            row += [f"{one['perplexity']:.3f}"]
            row += [f"{one['more_nats']:+.4f} (s.e. {one['standard_error']:.4f})"]
        rows.append(row)
    counts = ", ".join(f"{next(iter(results.values()))[t]['tokens']} of {t}" for t in texts)
    return [f"Tokens scored: {counts}.", table(header, rows)]


if __name__ == "__main__":
    sys.exit(main())
