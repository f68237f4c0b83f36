"""Several machines: what a pipeline of two gains, run as processes of one core each.

python -m bench.ranks                      all of it, minutes
python -m bench.ranks --only prompt        one part

A computer stands in for two: each process has a core of its own, and their messages go over its
loopback. Every run is of new processes, and both ways take turns. Asked is:

- prompt: a long prompt, whose chunks flow through the machines.
- apart: how much two can gain here. Two processes hold the whole model each, know nothing of each
  other, and read a prompt at the same time.
- answers: decoding, of one answer and of several at once. Each token passes both machines in turn,
  so what is to see is what the messages cost.
- beside: several answers while another's prompt is read.

What is said must be the same on one machine and on two.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from bench.report import Spread, parser, ratio, rounds, run, table
from bench.suite import Results
from mlx_cerebrum.errors import CerebrumError, RequestError
from mlx_cerebrum.text import tell

PARTS = ("prompt", "apart", "answers", "beside")
ONE, TWO, APART = "one machine", "two machines", "two that are strangers"


def main(argv: list[str] | None = None) -> int:
    p = parser("ranks", "A pipeline of two machines against one.")
    p.add_argument("--model", default="demo", metavar="DIR|demo", help="which (default: demo)")
    plan = "layer plan (default: the card's formula)"
    p.add_argument("--plan", metavar="NAME|FILE", help=plan)
    p.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts (default: all)")
    p.add_argument("--prompt", type=int, default=4096, metavar="N", help="tokens (default: 4096)")
    short = "of the prompt that is read beside answers (default: 1024)"
    p.add_argument("--beside", type=int, default=1024, metavar="N", help=short)
    p.add_argument("--rows", type=int, default=4, metavar="N", help="answers at once (default: 4)")
    p.add_argument("--tokens", type=int, default=64, help="an answer and run (default: 64)")
    p.add_argument("--rounds", type=int, default=3, help="of each comparison (default: 3)")
    return run(p, _measure, text, argv)


def _measure(args: argparse.Namespace) -> Results:
    if min(args.prompt, args.beside, args.rows, args.tokens, args.rounds) < 1:
        raise RequestError("--prompt, --beside, --rows, --tokens and --rounds must be at least 1")
    model = ["--model", args.model, *(["--plan", args.plan] if args.plan else [])]
    found: Results = {"prompt_tokens": args.prompt, "beside_tokens": args.beside, "rows": args.rows}

    def sides(*words: Any) -> dict[str, partial[list[Results]]]:
        said = [str(word) for word in words] + model
        return {ONE: partial(processes, said), TWO: partial(processes, said, 2, linked=True)}

    if "prompt" in args.only:
        found["prompt"] = _compared(sides("prompt", "--prompt", args.prompt), args)
    if "apart" in args.only:
        one = sides("prompt", "--prompt", args.prompt)[ONE]
        found["apart"] = _compared({ONE: one, APART: partial(one, 2)}, args)
    if "answers" in args.only:
        for rows in dict.fromkeys((1, args.rows)):
            words = sides("answers", "--rows", rows, "--tokens", args.tokens)
            found.setdefault("answers", {})[str(rows)] = _compared(words, args)
    if "beside" in args.only:
        words = sides("beside", "--rows", args.rows, "--prompt", args.beside)
        found["beside"] = _compared(words, args)
    return found


def _compared(sides: dict[str, partial[list[Results]]], args: argparse.Namespace) -> Results:
    """What each side measured, by figure and round, and whether all said the same."""
    tell("; ".join(sides) + ": " + " ".join(sides[ONE].args[0]))
    runs = rounds(sides, args.rounds, warm=False)
    every = [process for each in runs.values() for one in each for process in one]
    same = all(process["answers"] == every[0]["answers"] for process in every)
    figures = [name for name in every[0] if name != "answers"]
    return {
        "same": same,
        "sides": {
            side: {name: [sum(p[name] for p in one) for one in each] for name in figures}
            for side, each in runs.items()
        },
    }


def processes(words: Sequence[str], count: int = 1, linked: bool = False) -> list[Results]:
    """What so many processes of bench.ranks_work found, each on a core of its own. `linked`: as the
    machines of one model, of which the first says what was found; else each has all of it.

    Raises CerebrumError with the last line of what went wrong.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(count)]))
        started = []
        for rank in range(count):
            more = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)} if linked else {}
            started.append(stack.enter_context(_started(words, rank, more)))
        ended = [(*process.communicate(), process.returncode) for process in started]
    for _, wrong, code in ended:
        if code != 0:
            last = (wrong.strip() or "it printed nothing").splitlines()[-1]
            raise CerebrumError(f"bench.ranks_work: {last.removeprefix('error: ')}")
    return [json.loads(out) for out, _, _ in (ended[:1] if linked else ended)]


def _started(words: Sequence[str], core: int, more: dict[str, str]) -> "subprocess.Popen[str]":
    """It keeps to the core, where the system lets us say so."""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more
    pinned = hasattr(os, "sched_setaffinity")
    cores = os.sched_getaffinity(0) if pinned else set()
    if pinned:  # a process has its parent's
        os.sched_setaffinity(0, {sorted(cores)[core % len(cores)]})
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "bench.ranks_work", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
    finally:
        if pinned:
            os.sched_setaffinity(0, cores)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in held:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in held]


def text(results: Results) -> list[str]:
    rows, parts = results["rows"], []
    for part in (part for part in PARTS[:2] if part in results):
        found = results[part]
        lines = [[side, *_paces(found, side)] for side in found["sides"]]
        prompt = f"a prompt of {results['prompt_tokens']} tokens"
        parts += [_same(found), table((prompt, "tokens/s", "of one machine's"), lines)]
    if "answers" in results:
        lines = [
            [f"{number} at once, {side}", *_paces(found, side)]
            for number, found in results["answers"].items()
            for side in found["sides"]
        ]
        parts += [
            " ".join(dict.fromkeys(_same(found) for found in results["answers"].values())),
            table(("answers", "tokens/s of all", "of one machine's"), lines),
        ]
    if "beside" in results:
        found = results["beside"]
        lines = []
        for side, figures in found["sides"].items():
            more = [Spread.of(figures[name]).text(2) for name in ("first", "gap")]
            lines.append([side, *_paces(found, side), *more])
        beside = f"{rows} answers, while a prompt of {results['beside_tokens']} tokens is read"
        head = "tokens/s of theirs", "of one machine's", "its first token, s", "between theirs, s"
        parts += [_same(found), table((beside, *head), lines)]
    return parts


def _paces(found: Results, side: str) -> list[str]:
    paces = found["sides"][side]["pace"]
    against = "" if side == ONE else ratio(paces, found["sides"][ONE]["pace"]).text(2)
    return [Spread.of(paces).text(), against]


def _same(found: Results) -> str:
    return "All said the same." if found["same"] else "NOT all said the same."


if __name__ == "__main__":
    sys.exit(main())
