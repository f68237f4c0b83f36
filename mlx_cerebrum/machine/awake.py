"""A Mac that nobody touches goes to sleep, also while it works. Here it does not."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

LINGER = 5.0  # seconds: the next request often comes at once


class Awake:
    """`hold` while there is work; `settle` lets go some seconds after the last.

    macOS's caffeinate(8) does it: `-i` is no sleep for want of a user, `-w` until this process
    ends, however it ends. Elsewhere, and without it, nothing is done. For one thread.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._last = 0.0

    @property
    def held(self) -> bool:
        return self._process is not None

    @property
    def running(self) -> bool:
        """Whether the program that does it is there now."""
        return self._process is not None and self._process.poll() is None

    def hold(self) -> None:
        self._last = time.monotonic()
        if self._process is not None or sys.platform != "darwin":
            return
        if (program := shutil.which("caffeinate")) is None:
            return
        with suppress(OSError):  # no more processes: it sleeps, then
            self._process = subprocess.Popen(
                [program, "-i", "-w", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C is not for it: answers may still go on
            )

    def settle(self) -> None:
        if self.held and time.monotonic() - self._last >= LINGER:
            self.release()

    def release(self) -> None:
        """Let go at once."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(OSError):
                process.kill()
            process.wait()


@contextmanager
def awake() -> Iterator[None]:
    """Inside, the machine does not go to sleep by itself."""
    holder = Awake()
    holder.hold()
    try:
        yield
    finally:
        holder.release()
