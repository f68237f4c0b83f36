"""What is drawn over itself at the end of the screen: an answer as it comes."""

import os
from collections.abc import Mapping, Sequence
from time import perf_counter

from rich.console import Console, RenderableType
from rich.segment import Segment, SegmentLines
from rich.style import Style
from rich.text import Text

from mlx_cerebrum.chat import palette
from mlx_cerebrum.chat.render import AnswerMarkdown, finished, markdown_parser
from mlx_cerebrum.text import clean

Line = list[Segment]

REDRAW_SECONDS = 0.08  # at least, between two pictures
REDRAW_SHARE = 0.1  # of the time, at most, spent on drawing


def _wraps_anew() -> bool:
    """Whether the terminal wraps what it shows anew when it gets narrower. Nearly all do."""
    xterm = "XTERM_VERSION" in os.environ and os.environ.get("TERM", "").startswith("xterm")
    return not xterm and os.environ.get("TERM") != "linux"


class Region:
    """The last lines of the screen, drawn over again and again; what is above them stays."""

    def __init__(self, console: Console, styles: Mapping[str, Style] = palette.PLAIN) -> None:
        self.console, self.styles = console, styles
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

    def lines(self, renderable: RenderableType, width: int | None = None) -> list[Line]:
        """`renderable` as it is drawn, without empty lines around it.

        width: cells a line, by default the window's.
        """
        options = self.console.options
        options = options if width is None else options.update(width=width)
        lines = [
            _stripped([Segment(clean(s.text), s.style) for s in line])
            for line in self.console.render_lines(renderable, options, pad=False)
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
    """A growing Markdown text: finished blocks are printed for good, the last one is redrawn.

    `before` has been shown: of it only the last block is drawn again, since it may go on.
    """

    def __init__(self, region: Region, before: str = "") -> None:
        self._region = region
        self._parser = markdown_parser()
        before = clean(before)
        cut, self._in_list = finished(before, self._parser)  # in the midst of a list
        self._pending = before[cut:]
        self._begun = False  # something has been printed for good
        self._pacer = Pacer()

    def status(self, text: str) -> None:
        """Show a line until the text comes."""
        if self._pacer.due():
            started = perf_counter()
            self._region.draw(
                self._region.lines(Text(clean(text), style=self._region.styles["notice"]))
            )
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
        lines = self._markdown(text) if text.strip() else []
        space = lines and self._begun and not self._in_list
        return [[], *lines] if space else lines

    def _markdown(self, text: str) -> list[Line]:
        return self._region.lines(AnswerMarkdown(text, self._region.styles))
