"""What a selftest found, as a page and as a document for programs. It names nobody and no folder.

The page is made from the document alone: `markdown`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_cerebrum.doctor.check import Check, Found
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.files import json_file
from mlx_cerebrum.files.replacing import replacing
from mlx_cerebrum.machine.facts import memory_bytes, processor

SCHEMA = 1
FILE, PAGE = "selftest.json", "README.md"
_PATH = re.compile(r"(?<![\w.%)])~?(?:/[^\s'\":;,()/]+)+/?")  # not tokens/s, not owner/name
SAID = {True: "passed", False: "FAILED", None: "not here"}
_HEAD = ["check", "", "what it shows", "found", "bound", "if not", "s"]

Document = dict[str, Any]


def machine_name() -> str:
    """A folder's name for this machine: `apple-m2-pro-16gb`."""
    words = re.sub(r"\(r\)|\(tm\)|cpu|processor|@.*", " ", processor().lower())
    slug = "-".join(re.findall(r"[a-z0-9]+", words))
    return f"{slug}-{memory_bytes() / 2**30:.0f}gb"


def impersonal(text: str) -> str:
    """The text with only the last part of every path in it, and without this user's folder."""
    text = text.replace(str(Path.home()), "~")
    return _PATH.sub(lambda path: path[0].rstrip("/").rpartition("/")[2], text)


def row(check: Check, found: Found, seconds: float) -> Document:
    """A check's line in the document."""
    own = asdict(found) | {"words": impersonal(found.words)}
    about = {"name": check.name, "shows": check.shows, "bound": check.bound}
    return about | own | {"remedy": check.remedy, "seconds": round(seconds, 1)}


def verdict(document: Document) -> str:
    """One line: how many passed, and which did not."""
    rows: list[Document] = document["checks"]
    counts = {said: sum(r["passed"] is said for r in rows) for said in SAID}
    words = f"{counts[True]} passed, {counts[False]} failed"
    words += f", {counts[None]} can't be shown here" if counts[None] else ""
    missing = document["checks_in_all"] - len(rows)
    return words + (f", {missing} not run" if missing else "")


def passed(document: Document) -> bool:
    """Whether all were run and none failed."""
    rows = document["checks"]
    whole = len(rows) == document["checks_in_all"]
    return whole and all(r["passed"] is not False for r in rows)


def markdown(document: Document) -> str:
    """The page."""
    settings = document["settings"]
    rows = document["checks"]
    quick = ", quick" if settings["quick"] else ""
    parts = [
        f"# Selftest: {document['machine_name']}",
        f"`mlx-cerebrum doctor --selftest` on {document['date']}, model {settings['model']}{quick};"
        f" {document['seconds']:.0f} s. **{verdict(document)}.**",
        table([["machine", ""], *document["facts"]]),
        table([_HEAD, *map(_line, rows)]),
    ]
    for r in rows:
        if r["table"]:
            parts += [f"## {r['name'].capitalize()}", table(r["table"])]
    return "\n\n".join(parts) + "\n"


def _line(row: Document) -> list[str]:
    about = [row[key] for key in ("shows", "words", "bound", "remedy")]
    return [row["name"], SAID[row["passed"]], *about, f"{row['seconds']:.0f}"]


def table(rows: Sequence[Sequence[str]]) -> str:
    """In Markdown; the first row is the heading."""
    lines = [f"| {' | '.join(_cell(cell) for cell in each)} |" for each in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def _cell(text: str) -> str:
    """One line, in which nothing is Markdown or HTML."""
    line = " ".join(text.split())
    for char in "&<>|[]\\`*$":
        line = line.replace(char, f"&#{ord(char)};")
    return line


def check_folder(directory: Path) -> None:
    """Raises RequestError where it holds what is no selftest's."""
    if directory.exists() and not directory.is_dir():
        raise RequestError(f"{directory} is a file; name a folder with --out")
    if directory.is_dir() and not (directory / FILE).exists() and any(directory.iterdir()):
        raise RequestError(f"{directory} is in use and holds no {FILE}; name another with --out")


def write(directory: Path, document: Document) -> None:
    """Document and page, each replaced as a whole."""
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    for name, content in ((FILE, text), (PAGE, markdown(document))):
        with replacing(directory / name, directory / f".{name}.partial") as file:
            file.write(content.encode())


def read(directory: Path) -> Document:
    """What `write` wrote. Raises RequestError for anything else."""
    document = json_file.read_object(directory / FILE, RequestError)
    if document.get("schema") != SCHEMA:
        raise RequestError(f"{directory / FILE} is no selftest of schema {SCHEMA}")
    return document


def begun(
    facts: Sequence[tuple[str, str]],
    data: Mapping[str, Any],
    settings: Mapping[str, Any],
    **more: Any,
) -> Document:
    """A document without checks yet."""
    return {
        "schema": SCHEMA,
        "machine_name": machine_name(),
        "facts": [[label, impersonal(words)] for label, words in facts],
        "machine": dict(data),
        "settings": dict(settings),
        "seconds": 0.0,
        "checks": [],
    } | more
