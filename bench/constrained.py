"""What it costs to hold an answer to a grammar: a mask, compiling, memory, a token.

python -m bench.constrained                      the demo model's vocabulary, and a token of it
python -m bench.constrained --tokenizer DIR      another vocabulary: masks and compiling alone
"""

import argparse
import json
import random
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench import machine
from mlx_cerebrum import cli
from mlx_cerebrum.decoding.constraint import Constraint, Grammar, Grammars
from mlx_cerebrum.decoding.decoder import Decoder
from mlx_cerebrum.decoding.generation import Generation
from mlx_cerebrum.decoding.grammar_text import Ask
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.text import tell
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights.opening import load

PROMPT = "A list of ten people, as JSON, each with a name, an age and a city:\n"
PERSON = {
    "type": "object",
    "properties": {
        "full_name": {"type": "string"},
        "age_in_years": {"type": "integer", "minimum": 0, "maximum": 150},
        "city_of_residence": {"type": "string"},
        "occupation": {"enum": ["student", "teacher", "engineer", "retired"]},
    },
    "required": ["full_name", "age_in_years", "city_of_residence", "occupation"],
    "additionalProperties": False,
}
PEOPLE = {"type": "array", "items": PERSON, "minItems": 1000}
FREE = {"type": "array", "items": {"type": "string"}, "minItems": 1000}
ASKED = {
    "json_object": Ask("json_object"),
    "people": Ask("json_schema", json.dumps(PEOPLE)),
    "strings": Ask("json_schema", json.dumps(FREE)),
    "pattern": Ask("regex", r"([A-Z][a-z]{2,12} ){3,9}\d{4}-\d\d-\d\d(, [a-z]+@[a-z]+\.com){1,9}"),
    "call": Ask("call", json.dumps([{"name": "find", "parameters": PERSON}, {"name": "stop"}])),
}


def peak() -> float:
    """MB that this process has had at most."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def masks(grammar: Grammar, walks: int, most: int = 120) -> Iterator[float]:
    """Seconds of each mask of random answers: tokens as they may come, ends too."""
    for seed in range(walks):
        held, draw = grammar.start(), random.Random(seed)
        for _ in range(most):
            started = time.perf_counter()
            row = held.masks()[0]
            yield time.perf_counter() - started
            choices = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
            held.accept([int(draw.choice(choices))])
            if held.finished or held.over:
                break


def vocabulary(tokenizer: Tokenizer, size: int) -> dict[str, Any]:
    before, found = peak(), dict[str, Any]()
    for name, ask in ASKED.items():
        grammars = Grammars(tokenizer, size)
        started = time.perf_counter()
        grammars.compile(Ask("regex", "a"))
        ready = time.perf_counter()
        grammar = grammars.compile(ask)
        compiled = time.perf_counter() - ready
        took = sorted(masks(grammar, 20))
        found[name] = {
            "vocabulary_ms": round(1e3 * (ready - started), 1),
            "compile_ms": round(1e3 * compiled, 1),
            "masks": len(took),
            "mask_ms_p50": round(1e3 * took[len(took) // 2], 3),
            "mask_ms_p99": round(1e3 * took[len(took) * 99 // 100], 3),
        }
    return {"size": size, "more_memory_mb": round(peak() - before), "grammars": found}


def pace(model: Model, prompt: list[int], held: Constraint | None, tokens: int) -> float:
    """Seconds a token, after the first."""
    g = Generation(model, list(prompt), model.make_cache(), tokens, constraint=held)
    times = [now for _, now in Decoder().run(g)]
    return (times[-1] - times[0]) / (len(times) - 1)


def tokens(model: Model, tokenizer: Tokenizer, rounds: int, count: int) -> dict[str, Any]:
    """Free and constrained answers in turn; each round's ratio."""
    grammars, prompt = Grammars(tokenizer, model.config.vocab_size), tokenizer.encode(PROMPT)
    found: dict[str, Any] = {}
    for name in ("strings", "people"):
        grammar = grammars.compile(ASKED[name])
        sides: dict[str, list[float]] = {"free": [], "held": []}
        for _ in range(rounds):
            sides["free"].append(pace(model, prompt, None, count))
            sides["held"].append(pace(model, prompt, grammar.start(), count))
        ratios = [b / a for a, b in zip(sides["free"], sides["held"], strict=True)]
        found[name] = {side: round(1e3 * median(values), 2) for side, values in sides.items()}
        found[name] |= {"ratio": round(median(ratios), 3), "ratios": [round(r, 3) for r in ratios]}
    return found


def main(argv: list[str] | None = None) -> int:
    p = cli.ArgumentParser(prog="python -m bench.constrained", description=__doc__)
    p.add_argument("--model", default="demo", help="default: demo, a small trained model")
    p.add_argument("--tokenizer", type=Path, metavar="DIR", help="a vocabulary; no model is loaded")
    p.add_argument("--rounds", type=int, default=7, metavar="N", help="each side (default: 7)")
    p.add_argument("--tokens", type=int, default=96, metavar="N", help="an answer (default: 96)")
    p.add_argument("--debug", action="store_true", help="show tracebacks")
    args = p.parse_args(argv)
    machine.use_openblas(True)
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    if args.tokenizer is not None:
        tokenizer = Tokenizer.from_directory(args.tokenizer)
        results = {"vocabulary": vocabulary(tokenizer, tokenizer.vocab_size)}
    else:
        model, tokenizer = load(args.model)
        results = {
            "vocabulary": vocabulary(tokenizer, model.config.vocab_size),
            "ms_a_token": tokens(model, tokenizer, args.rounds, args.tokens),
        }
    tell(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
