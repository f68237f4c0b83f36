"""What the chat shows, as plain text or drawn in place: answers as they come, two in columns."""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Protocol

from rich.console import Console
from rich.padding import Padding
from rich.segment import SegmentLines
from rich.table import Table
from rich.text import Text

from mlx_cerebrum.chat import palette
from mlx_cerebrum.chat.columns import Columns
from mlx_cerebrum.chat.drawing import MarkdownStream, Region
from mlx_cerebrum.chat.session import AnswerStream
from mlx_cerebrum.chat.signals import quiet_keys
from mlx_cerebrum.chat.wording import figures
from mlx_cerebrum.text import clean, one_line, say, tell

Rows = Sequence[tuple[str, str]]

LEAST_WIDTH = 60  # of a terminal that things fit side by side in, cells


class Screen(Protocol):
    def notice(self, text: str) -> None:
        """Something the chat itself says."""

    def error(self, text: str) -> None:
        """What went wrong, in a line."""

    def table(self, rows: Rows) -> None:
        """Names and what belongs to them."""

    def show(self, stream: AnswerStream, before: str | None = None) -> None:
        """An answer as it comes, to its end or until it is stopped.

        before: what was shown of it already, where it goes on.
        """

    def recall(self, question: str, answer: str) -> None:
        """The end of a conversation that is gone on with."""

    def compare(self, streams: tuple[AnswerStream, AnswerStream]) -> None:
        """Two answers as they come."""


def one_after_the_other(
    first: AnswerStream, second: AnswerStream
) -> tuple[Iterator[str], Iterator[str]]:
    """Two answers to be shown in turn, though both are written at once: while the first is taken,
    the second's pieces are put by."""
    kept: list[str] = []

    def of_first() -> Iterator[str]:
        for piece in first:
            kept.extend(islice(second, 1))
            yield piece

    return of_first(), chain(kept, second)


def _beyond(pieces: Iterable[str], shown: str) -> Iterator[str]:
    """What comes after `shown`, which the pieces begin with; all of it where they don't."""
    held = ""
    for piece in pieces:
        held += piece
        if len(held) >= len(shown) or not shown.startswith(held):
            yield held.removeprefix(shown)
            held, shown = "", ""
    yield held


class PlainScreen:
    """Answers to standard output, everything else to standard error."""

    def __init__(self) -> None:
        self._answers = 0

    def notice(self, text: str) -> None:
        tell(text)

    error = notice

    def table(self, rows: Rows) -> None:
        width = max(len(name) for name, _ in rows)
        for name, text in rows:
            self.notice(f"{name:<{width}}  {text}")

    def recall(self, question: str, answer: str) -> None:
        pass  # only answers go to standard output

    def show(self, stream: AnswerStream, before: str | None = None) -> None:
        if before is None:
            self._show(stream)
        else:  # its end is shown again where the cut had gone through a character or a stop string
            self._show(_beyond(stream, before[len(stream.answer.text) :]), "")

    def _show(self, pieces: Iterable[str], apart: str = "\n") -> None:
        begun = False
        for piece in pieces:
            if piece and not begun:
                say(apart * (self._answers > 0), end="")  # an empty line between answers
                self._answers, begun = self._answers + 1, True
            say(piece, end="")
        if begun:
            say()

    def compare(self, streams: tuple[AnswerStream, AnswerStream]) -> None:
        in_turn = zip(streams, one_after_the_other(*streams), strict=True)
        for number, (stream, pieces) in enumerate(in_turn, start=1):
            self.notice(f"{number} {stream.answer.model}:")
            self._show(pieces)
            self.notice(figures(stream.answer))


class FullScreen:
    """Markdown, colours and columns on a terminal that can draw over what it shows."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._styles = palette.of_terminal(self._console)
        self._region = Region(self._console, self._styles)

    def notice(self, text: str) -> None:
        self._console.print(Text(clean(text), style=self._styles["notice"]))

    def error(self, text: str) -> None:
        self._console.print(Text(clean(text), style=self._styles["error"]))

    def table(self, rows: Rows) -> None:
        if self._console.width < LEAST_WIDTH:  # below each other
            for name, text in rows:
                self._console.print(Text(clean(name), style="bold"))
                self._console.print(Padding(Text(clean(text), overflow="fold"), (0, 0, 0, 2)))
            return
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(style="bold", max_width=self._console.width // 2, overflow="fold")
        grid.add_column(overflow="fold")
        for name, text in rows:
            grid.add_row(Text(clean(name)), Text(clean(text)))
        # Without spaces at their ends, which would be lines of their own in a narrower window.
        lines = SegmentLines(self._region.lines(grid), new_lines=True)
        self._console.print(lines, end="")

    def recall(self, question: str, answer: str) -> None:
        self._console.print(Text(f"> {one_line(question, 200)}", style="bold"))
        drawn = MarkdownStream(self._region)
        drawn.add(answer)
        drawn.finish()

    def show(self, stream: AnswerStream, before: str | None = None) -> None:
        with quiet_keys(self._region.leave):
            self._show(stream)

    def _show(self, stream: AnswerStream, pieces: Iterable[str] | None = None) -> None:
        drawn = MarkdownStream(self._region, stream.answer.text)
        drawn.status("reading the question")
        stream.progress = lambda done, total: drawn.status(f"reading: {done} of {total} tokens")
        try:
            for piece in stream if pieces is None else pieces:
                drawn.add(piece)
        finally:
            drawn.finish()

    def compare(self, streams: tuple[AnswerStream, AnswerStream]) -> None:
        with quiet_keys(self._region.leave):
            if self._console.width >= LEAST_WIDTH:
                self._side_by_side(streams)
                return
            in_turn = zip(streams, one_after_the_other(*streams), strict=True)
            for number, (stream, pieces) in enumerate(in_turn, start=1):
                self._console.print(Text(f"{number} {clean(stream.answer.model)}", style="bold"))
                self._show(stream, pieces)
                self.notice(figures(stream.answer))

    def _side_by_side(self, streams: tuple[AnswerStream, AnswerStream]) -> None:
        columns = Columns(self._region, [stream.answer for stream in streams])
        try:
            columns.draw()
            coming = list(streams)
            while coming:
                coming = [stream for stream in coming if next(stream, None) is not None]
                columns.draw()
        finally:
            columns.draw(final=True)


def is_full(plain: bool) -> bool:
    """Whether there is a person at a terminal that can do more than print."""
    dumb = os.environ.get("TERM", "dumb").lower() in ("", "dumb", "unknown")
    return not plain and not dumb and sys.stdin.isatty() and sys.stdout.isatty()
