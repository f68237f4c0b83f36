"""What ends a machine that would wait for ever: MLX's own waits have no limit, and end for nobody.

A thread looks on. Where a wait takes longer than it may, or the launcher that started this program
is gone, it says so in one line and ends the process: nothing else can, since a wait inside MLX
hears no signal.
"""

import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from mlx_cerebrum.errors import MachineError
from mlx_cerebrum.text import tell

_LOOK = 0.2  # seconds
_GRACE = 1.0  # seconds in which machines hear of each other who waits too
_LAST_WORDS = 1.5  # seconds that `on_end` may take


@dataclass
class _Wait:
    line: Callable[[], str]
    deadline: float
    ask: Callable[[], None] | None


class Watch:
    """`patience`: seconds that a wait may take.

    on_end: told the line that is printed, before it is and the process ends: to answer who still
    waits, or put a terminal back.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.on_end: Callable[[str], None] | None = None
        self._wait: _Wait | None = None
        self._launcher = None if by_hand() else os.getppid()  # not to be outlived
        self._ended = threading.Event()
        self._ending = threading.Lock()
        threading.Thread(target=self._look_on, name="watch", daemon=True).start()

    @contextmanager
    def waiting(
        self,
        line: Callable[[], str],
        patience: float | None = None,
        ask: Callable[[], None] | None = None,
    ) -> Iterator[None]:
        """Inside, this thread waits for another machine; `line` says what did not happen.

        ask: called when the wait takes too long, before the process ends; what comes of it is
        waited for.
        """
        seconds = self.patience if patience is None else patience
        self._wait = _Wait(line, time.monotonic() + seconds, ask)
        try:
            yield
        finally:
            self._wait = None

    def hurry(self) -> None:
        """The wait that goes on now may only take what it takes to hear of the other machines."""
        if (wait := self._wait) is not None:
            self._hurry(wait)

    def _hurry(self, wait: _Wait) -> None:
        if wait.ask is not None:
            wait.ask, wait.deadline = None, time.monotonic() + _GRACE

    def close(self) -> None:
        self._ended.set()

    def end(self, line: str) -> None:
        """End the process, from any thread; the first line counts."""
        self._ending.acquire()  # never released
        if (told := self.on_end) is not None:
            words = threading.Thread(target=told, args=(line,), daemon=True)
            words.start()
            words.join(_LAST_WORDS)
        with suppress(OSError, ValueError):
            tell(f"error: {line}")
        os._exit(MachineError.exit_code)

    def _look_on(self) -> None:
        while not self._ended.wait(_LOOK):
            wait = self._wait
            if wait is not None and time.monotonic() > wait.deadline:
                if (ask := wait.ask) is None:
                    self.end(wait.line())
                else:
                    self._hurry(wait)
                    ask()
            if self._launcher is not None and os.getppid() != self._launcher:
                self.end("the program that started this one is gone")


def by_hand() -> bool:
    """Whether a person started this program, at a terminal or to go on without one, as `nohup`
    does: a launcher hands its input on."""
    with suppress(OSError):
        kept = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        return kept or not stat.S_ISFIFO(os.fstat(0).st_mode)
    return True
