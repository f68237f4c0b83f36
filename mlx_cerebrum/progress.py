"""One live line for long work, on stderr, and only where a person is watching."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from mlx_cerebrum.text import one_line


class Report(Protocol):
    """Say how far the work is: `done` of `total`, and what is being worked on."""

    def __call__(self, done: int, total: int, item: str = "") -> None: ...


@contextmanager
def progress(what: str, show: bool, unit: str = "bytes") -> Iterator[Report | None]:
    """A callback that draws `what` with done, total, pace and time left; None when not shown."""
    if not (show and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    class Cursor(Console):
        """Leaves the cursor alone: after Ctrl-Z or a kill nobody would show it again."""

        def show_cursor(self, show: bool = True) -> bool:
            return False

    amount = (
        (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(),)
    )
    words = TextColumn("{task.description}", markup=False)
    columns = (words, BarColumn(), *amount, TimeRemainingColumn())
    with Progress(*columns, console=Cursor(stderr=True), transient=True) as bar:
        task = bar.add_task(what)

        def report(done: int, total: int, item: str = "") -> None:
            # Names of one width, or the bar would jump.
            text = f"{what} {one_line(item):<33}".lstrip() if item else what
            bar.update(task, completed=done, total=total, description=text)

        yield report
