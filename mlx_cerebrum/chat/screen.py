"""What the chat shows, as plain text or drawn in place: answers as they come, two in columns."""

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, zip_longest
from time import perf_counter
from typing import Protocol

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.segment import Segment, SegmentLines
from rich.table import Table
from rich.text import Text

from mlx_cerebrum.chat.render import AnswerMarkdown, finished, markdown_parser
from mlx_cerebrum.chat.session import Answer, AnswerStream
from mlx_cerebrum.chat.signals import quiet_keys
from mlx_cerebrum.text import clean, say, tell

Line = list[Segment]
Rows = Sequence[tuple[str, str]]

REDRAW_SECONDS = 0.08  # at least, between two pictures
REDRAW_SHARE = 0.1  # of the time, at most, spent on drawing
LEAST_WIDTH = 60  # of a terminal that two columns fit in, cells


class Screen(Protocol):
    def notice(self, text: str) -> None:
        """Something the chat itself says."""

    def error(self, text: str) -> None:
        """What went wrong, in a line."""

    def table(self, rows: Rows) -> None:
        """Names and what belongs to them."""

    def show(self, stream: AnswerStream) -> None:
        """An answer as it comes, to its end or until it is stopped."""

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

    def show(self, stream: AnswerStream) -> None:
        self._show(stream)

    def _show(self, pieces: Iterable[str]) -> None:
        begun = False
        for piece in pieces:
            if piece and not begun:
                say("\n" * (self._answers > 0), end="")  # an empty line between answers
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
        self._region = Region(self._console)

    def notice(self, text: str) -> None:
        self._console.print(Text(clean(text), style="dim"))

    def error(self, text: str) -> None:
        self._console.print(Text(clean(text), style="red"))

    def table(self, rows: Rows) -> None:
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(style="bold", max_width=max(8, self._console.width // 2))
        grid.add_column()
        for name, text in rows:
            grid.add_row(Text(clean(name)), Text(clean(text)))
        self._console.print(grid)

    def show(self, stream: AnswerStream) -> None:
        with quiet_keys(self._region.leave):
            self._show(stream)

    def _show(self, stream: AnswerStream, pieces: Iterable[str] | None = None) -> None:
        drawn = MarkdownStream(self._region)
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


def _wraps_anew() -> bool:
    """Whether the terminal wraps what it shows anew when it gets narrower. Nearly all do."""
    xterm = "XTERM_VERSION" in os.environ and os.environ.get("TERM", "").startswith("xterm")
    return not xterm and os.environ.get("TERM") != "linux"


class Region:
    """The last lines of the screen, drawn over again and again; what is above them stays."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._widths: list[int] = []  # cells, of the lines that are drawn
        self._wraps_anew = _wraps_anew()

    def leave(self) -> None:
        """Let what is drawn stand: something else has been written below it."""
        self._widths = []

    def draw(self, live: Sequence[Line], above: Sequence[Line] = ()) -> None:
        """Draw `live` where it was, after printing `above` for good.

        Where it is taller than the screen its end is shown: what has scrolled away can't be drawn
        over.
        """
        width, height = self.console.size
        up = sum(
            max(1, -(-cells // max(1, width))) if self._wraps_anew else 1 for cells in self._widths
        )
        shown = live[-max(1, height - 1) :]
        # Terminals disagree on how wide some characters are. What stays may wrap, so that nothing
        # of it is lost; a line to be drawn over must not, or it would be counted wrong.
        drawn = self._written(above) + "\x1b[?7l" + self._written(shown) + "\x1b[?7h"
        self.console.file.write((f"\x1b[{up}A" if up else "") + "\r" + drawn + "\x1b[J")
        self.console.file.flush()
        self._widths = [min(width, Segment.get_line_length(line)) for line in shown]

    def _written(self, lines: Sequence[Line]) -> str:
        """Line by line over what is there, so that nothing flickers."""
        with self.console.capture() as captured:
            self.console.print(SegmentLines(lines, new_lines=True), end="", crop=False)
        return "".join(f"\x1b[2K{line}\n" for line in captured.get().split("\n")[:-1])

    def lines(self, renderable: RenderableType) -> list[Line]:
        """`renderable` as it is drawn, without empty lines around it."""
        lines = [
            _stripped([Segment(clean(s.text), s.style) for s in line])
            for line in self.console.render_lines(renderable, pad=False)
        ]
        while lines and not lines[0]:
            lines.pop(0)
        while lines and not lines[-1]:
            lines.pop()
        return lines


def _stripped(line: Line) -> Line:
    """Without the spaces that only fill the line up; nobody wants to copy them."""
    while line:
        text, style, _ = line.pop()
        if text := text.rstrip(" "):
            return [*line, Segment(text, style)]
    return line


class Pacer:
    """Says when to draw again: not too often, and less often where it takes long."""

    def __init__(self) -> None:
        self._next = 0.0

    def due(self) -> bool:
        return perf_counter() >= self._next

    def drawn(self, started: float) -> None:
        now = perf_counter()
        self._next = now + max(REDRAW_SECONDS, (now - started) / REDRAW_SHARE)


class MarkdownStream:
    """A growing Markdown text: finished blocks are printed for good, the last one is redrawn."""

    def __init__(self, region: Region) -> None:
        self._region = region
        self._parser = markdown_parser()
        self._pending = ""
        self._begun = False  # something has been printed for good
        self._in_list = False  # the pending text goes on with a list
        self._pacer = Pacer()

    def status(self, text: str) -> None:
        """Show a line until the text comes."""
        if self._pacer.due():
            started = perf_counter()
            self._region.draw(self._region.lines(Text(clean(text), style="dim")))
            self._pacer.drawn(started)

    def add(self, text: str) -> None:
        self._pending += clean(text)
        if self._pacer.due():
            started = perf_counter()
            cut, in_list = finished(self._pending, self._parser)
            above = self._block(self._pending[:cut])
            if cut:
                self._pending, self._in_list = self._pending[cut:], in_list
            self._begun = self._begun or bool(above)
            self._region.draw(self._block(self._pending), above)
            self._pacer.drawn(started)

    def finish(self) -> None:
        """Print the rest for good."""
        self._region.draw([], self._block(self._pending))
        self._pending = ""

    def _block(self, text: str) -> list[Line]:
        lines = self._region.lines(AnswerMarkdown(text)) if text.strip() else []
        space = lines and self._begun and not self._in_list
        return [[], *lines] if space else lines


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
    return f"{counted(answer.last.generation_tokens, 'token')}{pace}"


def counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def wrap(text: str, width: int) -> Iterator[tuple[int, int]]:
    """`(start, end)` of each line of `text` in `width` cells; a line's break is not in it.

    Only the last line can change when text is added.
    """
    at = 0
    for line in text.split("\n"):
        yield from ((at + start, at + end) for start, end in _wrap_line(line, width))
        at += len(line) + 1


def _wrap_line(line: str, width: int) -> Iterator[tuple[int, int]]:
    start, used = 0, 0
    for word in re.finditer(r"\s*\S+", line):
        length = cell_len(word[0])
        if used + length <= width:
            used += length
            continue
        begin = word.start()
        if used:  # what separates two words stays at the end of the line
            begin = word.end() - len(word[0].lstrip())
            yield start, begin
            start, used = begin, 0
        for index in range(begin, word.end()):
            cells = cell_len(line[index])
            if used + cells > width and used:
                yield start, index
                start, used = index, 0
            used += cells
    yield start, len(line)


def first_difference(texts: tuple[str, str], done: tuple[bool, bool]) -> int | None:
    """Where two growing texts first differ; None while that is not known."""
    shortest = min(map(len, texts))
    for index in range(shortest):
        if texts[0][index] != texts[1][index]:
            return index
    ended = any(len(text) == shortest and over for text, over in zip(texts, done, strict=True))
    return shortest if ended and len(texts[0]) != len(texts[1]) else None
