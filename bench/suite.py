"""What a suite is, and the file that the suites of one run share.

A suite is a module that answers one question. Everything it finds is plain data, and the
tables and plots are made from that data alone, so that `results.json` is the result and the
rest can be drawn again.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bench.pair import Pair
from bench.plots import Picture
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.files.replacing import replacing

Results = dict[str, Any]  # plain data, as JSON has it
FILE = "results.json"


@dataclass(frozen=True)
class Effort:
    """How long to measure, and where to write what only the measurement needs."""

    work: Path  # a folder for temporary files
    rounds: int = 5  # of each side of a comparison
    seconds: float = 20.0  # after which no further round of one comparison begins
    tokens: int = 32  # to decode where a pace is measured
    texts: tuple[Path, ...] = ()  # to measure perplexity on; none: the texts in bench/data
    text_tokens: int = 2048  # of each text
    tasks: tuple[str, ...] = ()  # of lm-evaluation-harness; none: those in bench/tasks
    task_dir: Path | None = None  # more task files for it
    limit: int | None = None  # questions of each task; None: all of them
    say: Callable[[str], None] = print  # one line of progress, for a person


class Suite(Protocol):
    """The interface of speed, memory, context, peers, quality and plans."""

    def measure(self, pair: Pair, settings: Effort) -> Results:
        """Raises a CerebrumError for a pair it can't measure."""

    def text(self, results: Results) -> list[str]:
        """Markdown paragraphs and tables."""

    def plots(self, results: Results, machine: Results) -> dict[str, Picture]:
        """What to draw, by file name without its ending."""


def read(directory: Path) -> Results:
    """A run's document. Raises RequestError for a directory without one."""
    path = directory / FILE
    try:
        document: Results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{path} can't be read as results: {error}") from None
    if not isinstance(document, dict) or "suites" not in document:
        raise RequestError(f"{path} is not a results file of python -m bench")
    return document


def write(directory: Path, document: Results) -> None:
    """`document` as results.json: whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory / FILE, directory / f".{FILE}.partial") as file:
        file.write(f"{json.dumps(document, indent=1, ensure_ascii=False)}\n".encode())
