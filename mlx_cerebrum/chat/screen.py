"""What the chat shows, on a full terminal and as plain text."""

import os
import sys
from collections.abc import Sequence
from typing import Protocol

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlx_cerebrum.chat.columns import LEAST_WIDTH, Columns, figures
from mlx_cerebrum.chat.render import MarkdownStream, Region
from mlx_cerebrum.chat.reply import Reply
from mlx_cerebrum.chat.signals import quiet_keys
from mlx_cerebrum.text import clean, say, tell

Rows = Sequence[tuple[str, str]]


class Screen(Protocol):
    def notice(self, text: str) -> None:
        """Something the chat itself says."""

    def error(self, text: str) -> None:
        """What went wrong, in a line."""

    def table(self, rows: Rows) -> None:
        """Names and what belongs to them."""

    def show(self, reply: Reply) -> None:
        """An answer as it comes, to its end or until it is stopped."""

    def compare(self, replies: tuple[Reply, Reply]) -> None:
        """Two answers as they come."""


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

    def show(self, reply: Reply) -> None:
        begun = False
        for piece in reply:
            if piece and not begun:
                say("\n" * (self._answers > 0), end="")  # an empty line between answers
                self._answers, begun = self._answers + 1, True
            say(piece, end="")
        if begun:
            say()

    def compare(self, replies: tuple[Reply, Reply]) -> None:
        for number, reply in enumerate(replies, start=1):
            self.notice(f"{number} {reply.answer.model}:")
            self.show(reply)
            self.notice(figures(reply.answer))


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

    def show(self, reply: Reply) -> None:
        with quiet_keys(self._region.leave):
            self._show(reply)

    def _show(self, reply: Reply) -> None:
        stream = MarkdownStream(self._region)
        stream.status("reading the question")
        reply.progress = lambda done, total: stream.status(f"reading: {done} of {total} tokens")
        try:
            for piece in reply:
                stream.add(piece)
        finally:
            stream.finish()

    def compare(self, replies: tuple[Reply, Reply]) -> None:
        with quiet_keys(self._region.leave):
            if self._console.width >= LEAST_WIDTH:
                self._side_by_side(replies)
                return
            for number, reply in enumerate(replies, start=1):
                self._console.print(Text(f"{number} {clean(reply.answer.model)}", style="bold"))
                self._show(reply)
                self.notice(figures(reply.answer))

    def _side_by_side(self, replies: tuple[Reply, Reply]) -> None:
        columns = Columns(self._region, [reply.answer for reply in replies])
        try:
            columns.draw()
            coming = list(replies)
            while coming:
                coming = [reply for reply in coming if next(reply, None) is not None]
                columns.draw()
        finally:
            columns.draw(final=True)


def is_full(plain: bool) -> bool:
    """Whether there is a person at a terminal that can do more than print."""
    dumb = os.environ.get("TERM", "dumb").lower() in ("", "dumb", "unknown")
    return not plain and not dumb and sys.stdin.isatty() and sys.stdout.isatty()
