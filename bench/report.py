"""What every bench shares: interleaved rounds, medians with their spread, one way to report.

A machine's speed drifts (heat, other processes), so the sides of a comparison take turns,
and each round gives one ratio of neighbours in time: the drift cancels. The median stands
for the rounds, the lowest and highest show how far to trust it.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from bench import machine
from mlx_cerebrum import cli
from mlx_cerebrum.text import say

T = TypeVar("T")
CPU = (
    "**MLX's CPU backend: these times and ratios of times say nothing about Metal.**"
    " Bytes and ratios of bytes carry over."
)
_PLUMBING = ("json", "debug", "no_openblas", "keep")  # flags that change no result


@dataclass(frozen=True)
class Spread:
    """The median of some measurements, with the lowest and the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(median(values), min(values), max(values))

    @classmethod
    def read(cls, found: Mapping[str, float]) -> "Spread":
        """From its JSON form, which may say more besides."""
        return cls(found["median"], found["low"], found["high"])

    def text(self, digits: int = 1) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"

    def as_json(self) -> dict[str, float]:
        return {key: float(f"{value:.5g}") for key, value in asdict(self).items()}


def ratio(ours: Sequence[float], peers: Sequence[float]) -> Spread:
    """Ours over the peer's, round by round."""
    return Spread.of([a / b for a, b in zip(ours, peers, strict=True)])


def rounds(
    sides: Mapping[str, Callable[[], T]],
    count: int,
    *,
    seconds: float = math.inf,
    warm: bool = True,
) -> dict[str, list[T]]:
    """Run every side once to warm up, then `count` times in turns.

    Every second round goes backwards, so that no side always follows the same other. No round
    begins after `seconds` (one always does), so a slow machine gives fewer rounds: the length
    of the lists says how many. `warm=False` where every kernel has just run.
    """
    for run in sides.values() if warm else ():
        run()
    results: dict[str, list[T]] = {name: [] for name in sides}
    started = time.perf_counter()
    for number in range(count):
        if number and time.perf_counter() - started > seconds:
            break
        for name in list(sides) if number % 2 == 0 else reversed(list(sides)):
            results[name].append(sides[name]())
    return results


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that reads well as plain text too; the first column is the labels."""
    cells = [list(header), *(list(row) for row in rows)]
    # Two at least: Markdown's rule of an aligned column is a dash and a colon.
    widths = [max(2, *(len(row[i]) for row in cells)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        aligned = [row[0].ljust(widths[0])]
        aligned += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return f"| {' | '.join(aligned)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(cells[0]), f"| {' | '.join(rule)} |", *map(line, cells[1:])])


def columns(rows: Iterable[T], *of: tuple[str, Callable[[T], str]]) -> str:
    """A table with a line for each of `rows`, from pairs of a heading and what is under it."""
    return table([head for head, _ in of], [[cell(row) for _, cell in of] for row in rows])


def parser(module: str, question: str) -> cli.ArgumentParser:
    """A bench's command line with the flags that all of them have."""
    p = cli.ArgumentParser(prog=f"bench.{module}", description=question)
    add_common(p)
    return p


def add_common(p: cli.ArgumentParser) -> None:
    p.add_argument("--json", action="store_true", help="print one JSON line, nothing else")
    p.add_argument(
        "--no-openblas",
        action="store_true",
        help="on Linux without a GPU: keep MLX's own BLAS instead of preloading OpenBLAS",
    )
    p.add_debug()


def run(
    p: cli.ArgumentParser,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    text: Callable[[dict[str, Any]], Sequence[str]],
    argv: Sequence[str] | None = None,
) -> int:
    """A bench from its command line, of `parser`, to its exit code: 1 where a criterion failed.

    Prints the machine, the paragraphs of `text`, and all of it as a JSON line at the end. The flags
    go into the JSON: machine, settings and results are enough to repeat it.
    """
    args = p.parse_args(argv)
    if argv is None:  # else the process is a test's, and not ours to start over
        machine.use_openblas(not args.no_openblas)

    def body() -> int:
        results, card = measure(args), machine.card()
        bench = p.prog.removeprefix("bench.")
        settings = {
            key: _public(value) for key, value in vars(args).items() if key not in _PLUMBING
        }
        document = {"bench": bench, "machine": card, "settings": settings, "results": results}
        if not args.json:
            say("\n\n".join([f"## {bench}", machine_text(card), *text(results)]) + "\n")
        say(json.dumps(document, ensure_ascii=False))
        return int(any(one["passed"] is False for one in results.get("criteria", ())))

    return cli.run(body, args.debug)


def public(word: str) -> str:
    """A word of a command line without the folders of this machine: results are for others."""
    flag, equals, value = word.rpartition("=")
    outside = value.startswith(("/", "~", "..")) or Path(value).is_absolute()
    return f"{flag}{equals}{Path(value).name}" if outside else word


def _public(value: Any) -> Any:
    if isinstance(value, list):
        return [_public(one) for one in value]
    return public(str(value)) if isinstance(value, str | Path) else value


def machine_text(card: Mapping[str, Any]) -> str:
    rows = [[key.replace("_", " "), str(value)] for key, value in card.items()]
    return table(["machine", ""], rows) + (f"\n\n{CPU}" if card["backend"] == "cpu" else "")
