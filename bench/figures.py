"""Figures in documents, filled in from results, so that the two can't disagree.

Between the lines `<!-- figures: NAME -->` and `<!-- end -->` a document's text is made by the
function NAME of `bench.blocks` from what lies in bench/results/. `python -m bench render
--figures` writes it anew; a test fails where it was not, and where a figure that can only have
been measured stands outside such a block.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from bench.blocks import BLOCKS
from bench.runs import Runs
from mlx_cerebrum.errors import RequestError

ROOT = Path(__file__).parent.parent
INDEX = "bench/results/README.md"
DOCUMENTS = ("README.md", "bench/README.md", INDEX)  # may have blocks
GUARDED = (*DOCUMENTS, "CHANGELOG.md")  # may have no measured figure outside them

_OPEN = re.compile(r"^<!-- figures: *(.*?) *-->$", re.M)
_BLOCK = re.compile(r"^<!-- figures: *(.*?) *-->\n(.*?)^<!-- end -->$", re.M | re.S)
# What is no prose: code, comments, where links point to.
_ASIDE = re.compile(r"^```.*?^```|`[^`\n]*`|<!--.*?-->|\]\([^)]*\)", re.M | re.S)
_COUNTED = "two|three|four|five|six|seven|eight|nine|ten|twenty|a hundred"
_UNITS = r"tokens/s|tok/s|tokens a second|[kMGT]i?B(?:/s)?|m?s|seconds?|minutes?|percent|x|times"
_FIGURE = re.compile(
    rf"(?<![\w.])(?<![A-Za-z]-)\d[\d,]*(?:\.\d+)?(?: ?%| ?(?:{_UNITS})(?![\w-]))"
    r"|(?<![\w.])(?<![A-Za-z]-)\d+\.\d+(?!\w|\.\d|-[A-Za-z])"  # a decimal, but no version or name
    rf"|\b(?:{_COUNTED}) times (?:as|faster|slower|the)\b"
    r"|\b(?:half|a third|a quarter) of (?:the|our)\b",
    re.I,
)


def filled(text: str, runs: Runs, where: str) -> str:
    """The text with its blocks made from the results.

    Raises RequestError for a block that no function makes, or that lacks its end or its results.
    """
    if len(_OPEN.findall(text)) != len(_BLOCK.findall(text)):
        raise RequestError(f"{where}: a block of figures has no line <!-- end --> of its own")

    def make(match: re.Match[str]) -> str:
        name = match[1]
        if name not in BLOCKS:
            raise RequestError(
                f"{where}: no figures are named {name!r}; there are {', '.join(BLOCKS)}"
            )
        try:
            body = BLOCKS[name](runs)
        except RequestError as error:
            raise RequestError(f"{where}, figures {name}: {error}") from error
        except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise RequestError(
                f"{where}, figures {name}: the results lack something:"
                f" {type(error).__name__}: {error}"
            ) from error
        return f"<!-- figures: {name} -->\n\n{body}\n\n<!-- end -->"

    return _BLOCK.sub(make, text)


def rewrite(root: Path, only: str | None = None) -> list[Path]:
    """Fill in the documents' blocks; returns the documents that changed."""
    changed = []
    for path, text, wanted in _documents(root, only):
        if text != wanted:
            path.write_text(wanted, encoding="utf-8")
            changed.append(path)
    return changed


def stale(root: Path) -> str:
    """Where documents and results disagree, as a diff; empty where they don't."""
    lines: list[str] = []
    for path, text, wanted in _documents(root, None):
        name = str(path.relative_to(root))
        lines += difflib.unified_diff(
            text.splitlines(), wanted.splitlines(), name, f"{name} as measured", lineterm=""
        )
    return "\n".join(lines)


def _documents(root: Path, only: str | None) -> list[tuple[Path, str, str]]:
    runs = Runs(root / "bench" / "results")
    found = []
    for name in (only,) if only else DOCUMENTS:
        path = root / name
        text = path.read_text(encoding="utf-8")
        found.append((path, text, filled(text, runs, name)))
    return found


def typed(text: str, allowed: Sequence[str] = ()) -> list[tuple[int, str]]:
    """Figures with their line numbers that stand outside the blocks and look measured.

    Left out are the `allowed` phrases, and code.
    """

    def blank(match: re.Match[str]) -> str:
        return "\n" * match[0].count("\n")

    text = _ASIDE.sub(blank, _BLOCK.sub(blank, text))
    for phrase in sorted(allowed, key=len, reverse=True):
        text = re.sub(rf"(?<![\w.]){re.escape(phrase)}(?![\w]|\.\d)", "", text)
    return [
        (number, match[0])
        for number, line in enumerate(text.splitlines(), 1)
        for match in _FIGURE.finditer(line)
    ]
