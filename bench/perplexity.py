"""Perplexity of one or more models on the same text.

Perplexity is exp of the mean negative log-likelihood a token, in nats. The text is cut into
windows that don't overlap (bench/likelihood.py). Models that share a vocabulary are compared token
by token with the first: what one word is harder than another cancels in the difference, so that
its standard error is far smaller than that of either perplexity. It comes from the means of blocks
of 32 consecutive tokens: a hard passage is hard for many tokens, and taken one by one they would
promise more than they know.

What a figure says of a large model has to be measured on that model.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.bootstrap import Values, standard_error
from bench.likelihood import TEXTS, losses, strided, text_ids
from bench.report import parser, run, table
from bench.suite import Results
from mlx_cerebrum import cli
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.weights import hub
from mlx_cerebrum.weights.checkpoint import Checkpoint
from mlx_cerebrum.weights.opening import load, open_checkpoint


def main(argv: list[str] | None = None) -> int:
    p = parser("perplexity", "Perplexity of one or more models on the same text.")
    names, model = "DIR|FILE.gguf|HUBID|demo", "all are compared with the first (default: demo)"
    p.add_argument("--model", nargs="+", default=["demo"], metavar=names, help=model)
    p.add_argument("--plan", metavar="NAME|FILE", help="a layer plan to run them in")
    add_text(p)
    return run(p, lambda args: measure(args.model, args.plan, args), text, argv)


def add_text(p: cli.ArgumentParser) -> None:
    text = "UTF-8 (default: two that come along)"
    p.add_argument("--text", nargs="+", type=Path, default=[*TEXTS], metavar="FILE", help=text)
    p.add_argument("--tokens", type=int, default=4096, metavar="N", help="of each (default: 4096)")
    p.add_argument("--context", type=int, default=512, metavar="N", help="a window (default: 512)")


def measure(models: Sequence[str], plan: str | None, args: argparse.Namespace) -> Results:
    """Each model's bits per weight and, by text, perplexity and difference to the first.

    `args` has the flags of `add_text`. Raises RequestError for a text shorter than a window.
    """
    if args.tokens < 2:
        raise RequestError("--tokens must be at least 2")
    results: Results = {}
    first: dict[str, Values] = {}
    for path in models:
        model, tokenizer = load(path, plan)
        results[path] = {"bits_per_weight": stored_bits(open_checkpoint(hub.resolve(path)))}
        for file in args.text:
            windows = strided(*text_ids(tokenizer, file), args.context, args.tokens)
            each = np.concatenate([losses(model, window) for window in windows])[: args.tokens]
            more = each - first.setdefault(file.stem, each)
            results[path][file.stem] = {
                "perplexity": math.exp(each.mean()),
                "more_nats": float(more.mean()),
                "standard_error": standard_error(more),
                "tokens": len(each),
            }
        del model  # before the next is loaded
    return results


def stored_bits(checkpoint: Checkpoint) -> float:
    """Bits per weight as stored: all bytes times 8 over all parameters."""
    modules = {name.rpartition(".")[0] for name in checkpoint.shapes}
    extents = (part for module in modules for part in checkpoint.extents(module).values())
    return 8 * sum(part.nbytes for part in extents) / checkpoint.config.stored_parameters


def text(results: Results) -> list[str]:
    """The table for a person."""
    first = next(iter(results.values()))
    texts = [key for key in first if key != "bits_per_weight"]
    header = ["model", "bits per weight"]
    header += [column for text in texts for column in (text, "nats above the first")]
    rows = []
    for model, found in results.items():
        rows.append([Path(model).name, f"{found['bits_per_weight']:.3f}"])
        for one in (found[text] for text in texts):
            error = f"(s.e. {one['standard_error']:.4f})"
            rows[-1] += [f"{one['perplexity']:.3f}", f"{one['more_nats']:+.4f} {error}"]
    counts = ", ".join(f"{first[text]['tokens']} of {text}" for text in texts)
    return [f"Tokens scored: {counts}.", table(header, rows)]


if __name__ == "__main__":
    sys.exit(main())
