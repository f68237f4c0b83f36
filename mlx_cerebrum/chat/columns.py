"""Two answers side by side, as they come."""

from collections.abc import Sequence
from itertools import zip_longest
from time import perf_counter

from rich.text import Text

from mlx_cerebrum.chat.render import Line, Pacer, Region
from mlx_cerebrum.chat.reply import Answer
from mlx_cerebrum.chat.text import first_difference, wrap
from mlx_cerebrum.text import clean

LEAST_WIDTH = 60  # of a terminal that two columns fit in, cells


class Columns:
    """Rows that can't change any more are printed for good; the others are redrawn.

    The texts are shown as they are written. A mark stands where they first differ.
    """

    def __init__(self, region: Region, answers: Sequence[Answer]) -> None:
        self._region = region
        self._answers = answers
        self._pacer = Pacer()
        plain = not region.console.encoding.lower().startswith("utf")
        self._rule, self._mark = ("|", ">>") if plain else ("\u2502", "\u25b6")
        self._texts = ["", ""]  # as shown, the mark in its place
        self._printed = [0, 0]  # characters of them
        self._difference: int | None = None
        titles = (f"{number} {answer.model}" for number, answer in enumerate(answers, start=1))
        self._region.draw([], [self._row(*(Text(clean(t), style="bold") for t in titles))])

    def draw(self, final: bool = False) -> None:
        """Show what has come since. `final`: all of it, for good."""
        if not (final or self._pacer.due()):
            return
        started = perf_counter()
        self._update_texts()
        width = self._width()
        lines = [self._lines(column, width) for column in (0, 1)]
        ended = [bool(answer.reason) or final for answer in self._answers]
        # The last line of a text may still change.
        settled = [
            max(map(len, lines)) if over else len(own) - 1
            for own, over in zip(lines, ended, strict=True)
        ]
        rows = list(zip_longest(*lines))
        count = len(rows) if final else max(0, min(settled))
        above = [self._row(*(line[1] if line else Text() for line in row)) for row in rows[:count]]
        for column, own in enumerate(lines):
            if own[:count]:
                self._printed[column] = own[:count][-1][0]
        below = [self._row(*(line[1] if line else Text() for line in row)) for row in rows[count:]]
        paces = self._row(*(Text(figures(answer), style="dim") for answer in self._answers))
        if final:
            self._region.draw([], [*above, paces])
        else:
            self._region.draw([*below, paces], above)
        self._pacer.drawn(started)

    def _update_texts(self) -> None:
        raw = self._shown(0), self._shown(1)
        ended = bool(self._answers[0].reason), bool(self._answers[1].reason)
        self._difference = first_difference(raw, ended)
        at = self._difference
        self._texts = [t if at is None else t[:at] + self._mark + t[at:] for t in raw]

    def _shown(self, column: int) -> str:
        return clean(self._answers[column].text).expandtabs(4)

    def _width(self) -> int:
        return max(1, (self._region.console.width - 3) // 2)

    def _lines(self, column: int, width: int) -> list[tuple[int, Text]]:
        """What is not printed for good: `(where the next line begins, line)`."""
        begin = self._printed[column]
        rest = self._texts[column][begin:]
        marked = -1 if self._difference is None else self._difference - begin
        found: list[tuple[int, Text]] = []
        for start, end in wrap(rest, width) if rest else ():
            line = Text(rest[start:end].rstrip())
            if start <= marked < end:
                line.stylize("bold red", marked - start, marked - start + len(self._mark))
            following = end + 1 if rest[end : end + 1] == "\n" else end
            found.append((begin + following, line))
        return found

    def _row(self, left: Text, right: Text) -> Line:
        width = self._width()
        left = left.copy()
        left.truncate(width, pad=True)
        right = right.copy()
        right.truncate(width)
        row = Text.assemble(left, (f" {self._rule} ", "dim"), right, no_wrap=True)
        return self._region.lines(row)[0]


def figures(answer: Answer) -> str:
    """How many tokens an answer has, and how fast they came."""
    if answer.last is None:
        return "reading the question"
    pace = f", {answer.pace:.1f}/s" if answer.pace else ""
    count = answer.last.generation_tokens
    return f"{count} token{'' if count == 1 else 's'}{pace}"
