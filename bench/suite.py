"""What a suite is, and the file that the suites of one run share.

A suite is a module that answers one question, the first line of its docstring:
measure(pair, effort) -> results, text(results) -> Markdown paragraphs and tables,
plots(results, machine) -> pictures by file name, where it has any. Everything it finds is plain
data, and tables and pictures are made from that alone, so that `results.json` is the result and the
rest can be drawn again.
"""

import contextlib
import datetime
import getpass
import importlib
import json
import platform
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import machine
from bench.pair import Pair
from bench.report import public
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.files.replacing import replacing
from mlx_cerebrum.text import tell

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
    say: Callable[[str], None] = tell  # one line of progress, for a person


def module(name: str) -> Any:
    """The suite, bench or command by that name."""
    return importlib.import_module(f"bench.{name}")


def pictures(module: Any, results: Results, machine: Results) -> dict[str, Any]:
    """What a suite has to draw, by file name; tables say all that many have."""
    found: dict[str, Any] = module.plots(results, machine) if hasattr(module, "plots") else {}
    return found


def origin(model: str, machine: Results, date: str) -> str:
    """Of what a picture's figures are: they are no others'."""
    return f"{model}; {machine['processor']}, {machine['cores']} cores, {machine['device']}; {date}"


def begun(command: Sequence[str], pair: Pair, directory: Path | None) -> Results:
    """The document to measure into, with what `directory` has of this machine and model already.

    It names no path of this machine. Raises RequestError where the directory holds results of
    another machine or model, which a table must not mix, or other files.
    """
    document: Results = {
        "schema": 1,
        "command": shlex.join(public(word) for word in command),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine.card(),
        "model": pair.card(),
        "seconds": {},
        "runs": {},
        "suites": {},
    }
    if directory is None or not directory.exists():
        return document
    if not (directory / FILE).exists():
        # What single benches printed with --json may lie there already.
        if any(path.suffix != ".json" for path in directory.iterdir()):
            raise RequestError(f"{directory} is in use and holds no {FILE}; name another")
        return document
    kept = ("seconds", "runs", "suites")
    before = read(directory / FILE, "machine", "model", *kept)
    for key in ("machine", "model"):
        found = [one[key] | {"load_average": None} for one in (document, before)]
        if found[0] != found[1]:
            raise RequestError(f"{directory} holds results of another {key}; name another --out")
    return document | {key: before[key] for key in kept}


def record(document: Results, name: str, results: Results, seconds: float) -> None:
    """Put a suite's results into the document, with what made them."""
    document["suites"][name] = results
    document["seconds"][name] = round(seconds, 1)
    document["runs"][name] = {
        "command": document["command"],
        "date": document["date"],
        "commit": machine.commit(),
    }


def read(path: Path, *keys: str) -> Results:
    """A JSON object with these keys. Raises RequestError for anything else."""
    try:
        document: Results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{path} can't be read as results: {error}") from None
    if not isinstance(document, dict) or not all(key in document for key in keys):
        raise RequestError(f"{path} has no results: {', '.join(keys)}")
    return document


def write(directory: Path, document: Results) -> None:
    """`document` as results.json: whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory / FILE, directory / f".{FILE}.partial") as file:
        file.write(f"{json.dumps(document, indent=1, ensure_ascii=False)}\n".encode())


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Inside, results that are not as we write them raise RequestError, one line."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise RequestError(f"{what} can't be read: {type(error).__name__}: {error}") from error


def escaped(value: Any) -> Any:
    """Plain data whose strings, keys too, are one line and no markup, also in a table's cell.

    Results come from anyone who sends them.
    """
    if isinstance(value, str):
        return re.sub(r'[<>&"|[\]\\`~#$]', lambda c: f"&#{ord(c[0])};", " ".join(value.split()))
    if isinstance(value, dict):
        return {escaped(str(key)): escaped(one) for key, one in value.items()}
    return [escaped(one) for one in value] if isinstance(value, list) else value


def private(value: Any) -> list[str]:
    """Strings of plain data that name a path, this machine or its user: nobody else's business."""
    if isinstance(value, dict):
        return [found for pair in value.items() for one in pair for found in private(one)]
    if isinstance(value, list):
        return [found for one in value for found in private(one)]
    if not isinstance(value, str):
        return []
    names = {platform.node(), platform.node().partition(".")[0], getpass.getuser()} - {"", "root"}
    # A path begins a word; "tokens/s" and "ours / theirs" are none.
    path = r"""(?:^|[\s'"=(,:])(?:~?/[\w.-]+/|~/\w|\.\./|[A-Za-z]:\\)"""
    marks = [path, *(rf"(?<!\w){re.escape(name)}(?!\w)" for name in names)]
    return [value] if any(re.search(mark, value) for mark in marks) else []
