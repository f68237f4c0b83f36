"""What ends a machine that would wait for ever: MLX's own waits have no limit, and end for nobody.

A thread looks on. Where a wait takes longer than it may, or the program that started this one is
gone, it says so in one line and ends the process: nothing else can, since a wait inside MLX hears
no signal.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from mlx_cerebrum.text import tell

LOST = 1  # the exit code where another machine is gone
_LOOK = 0.2  # seconds
_LAST_WORDS = 1.5  # seconds that `on_end` may take


class Watch:
    """`patience`: seconds that a wait may take.

    on_end: told the line that is printed, before the process ends: to answer who still waits.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.on_end: Callable[[str], None] | None = None
        self._deadline: float | None = None
        self._what = ""
        # With nohup it is meant to outlive the program that started it.
        stays = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        self._parent = None if stays else os.getppid()
        self._ended = threading.Event()
        threading.Thread(target=self._look_on, name="watch", daemon=True).start()

    @contextmanager
    def waiting(self, what: str, patience: float | None = None) -> Iterator[None]:
        """Inside, this thread waits for another machine; `what` says what did not happen."""
        seconds = self.patience if patience is None else patience
        self._what, self._deadline = f"{what} for {seconds:g} s", time.monotonic() + seconds
        try:
            yield
        finally:
            self._deadline = None

    def close(self) -> None:
        self._ended.set()

    def end(self, line: str) -> None:
        """End the process, from any thread."""
        words = threading.Thread(target=self._say, args=(line,), daemon=True)
        words.start()
        words.join(_LAST_WORDS)
        os._exit(LOST)

    def _say(self, line: str) -> None:
        with suppress(OSError, ValueError):
            tell(f"error: {line}")
        if self.on_end is not None:
            self.on_end(line)

    def _look_on(self) -> None:
        while not self._ended.wait(_LOOK):
            deadline = self._deadline
            if deadline is not None and time.monotonic() > deadline:
                self.end(self._what)
            if self._parent is not None and os.getppid() != self._parent:
                self.end("the program that started this one is gone")
