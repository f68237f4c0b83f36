"""Lines on stderr, written by a thread of their own.

A stopped terminal (Ctrl-S) and a pipe that nobody reads are full after a while. Whoever writes to
one then waits, and that must not be the event loop. Lines that nobody takes are dropped.
"""

import contextlib
import io
import logging
import os
import sys
import threading
from queue import SimpleQueue

from mlx_cerebrum.text import clean

MOST = 1000  # lines that may wait

_lines: SimpleQueue[str | threading.Event] = SimpleQueue()  # may be put to by a signal's handler
_started = threading.Lock()


class Handler(logging.Handler):
    """For what other modules log: the thread that generates must not wait either."""

    def emit(self, record: logging.LogRecord) -> None:
        write(self.format(record))


def write(text: str) -> None:
    """Write the text, clean, and a line's end, soon, if it can be."""
    if _lines.qsize() < MOST:
        _put(clean(text))


def flush(seconds: float) -> None:
    """Wait until what came before is written, but no longer than this."""
    done = threading.Event()
    _put(done)
    done.wait(seconds)


def _put(item: str | threading.Event) -> None:
    _lines.put(item)
    if _started.acquire(blocking=False):
        threading.Thread(target=_run, name="log", daemon=True).start()


def _run() -> None:
    while True:
        item = _lines.get()
        if isinstance(item, threading.Event):
            item.set()
            continue
        with contextlib.suppress(OSError, ValueError):  # nobody reads the log any more
            _write(item + "\n")


def _write(text: str) -> None:
    try:
        file = sys.stderr.fileno()
    except io.UnsupportedOperation:  # a test's
        sys.stderr.write(text)
        return
    # Not through Python's buffer: its lock, held while this waits, would stop the exit too.
    data = text.encode(errors="backslashreplace")
    while data:
        data = data[os.write(file, data) :]
