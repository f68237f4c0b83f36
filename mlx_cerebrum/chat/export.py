"""A conversation as Markdown, for people to read; the page reads it again, and writes it so."""

import re
from collections.abc import Sequence
from itertools import count

from mlx_cerebrum.chat.kept import Turn
from mlx_cerebrum.chat.render import markdown_parser

_OPENING = re.compile(r" *(`{3,}|~{3,})")


def as_markdown(title: str, system: str, turns: Sequence[Turn]) -> str:
    """Comments, which no reader of Markdown shows, say where each message begins."""
    texts = [system, *(turn.text for turn in turns)]
    marks = (f"cerebrum{number if number > 1 else ''}" for number in count(1))
    mark = next(m for m in marks if not any(f"<!-- {m} " in text for text in texts))
    parts = [f"<!-- {mark}-conversation 1 -->\n# {_line(title) or 'Conversation'}"]

    def add(head: str, heading: str, text: str) -> None:
        fence = _left_open(text)
        closed = f" closed {fence}" if fence else ""
        end = f"\n{fence}" if fence else ""
        parts.append(f"<!-- {mark} {head}{closed} -->\n## {heading}\n\n{text}{end}")

    if system.strip():
        add("system", "System text", system)
    for turn in turns:
        model = turn.model.encode(errors="replace").decode()  # a folder's name may be no text
        by = _line(model).replace("--", "- -")[:200]
        if turn.role == "user":
            add("question", "Question", turn.text)
        else:
            add(f"answer{by and f' by {by}'}", f"Answer by {by}" if by else "Answer", turn.text)
    return "\n\n".join(parts) + "\n"


def _line(text: str) -> str:
    return " ".join(text.split())


def _left_open(text: str) -> str:
    """The fence that an answer leaves open: all that comes after it would be code."""
    last = next((t for t in reversed(markdown_parser().parse(text)) if t.level == 0), None)
    if last is None or last.type != "fence" or last.map is None:
        return ""
    lines = text.split("\n")[last.map[0] :]
    found = _OPENING.match(lines[0])
    assert found is not None
    closes = re.compile(rf" {{0,3}}{re.escape(found[1][0])}{{{len(found[1])},}}\s*")
    return "" if any(closes.fullmatch(line) for line in lines[1:]) else found[1]
