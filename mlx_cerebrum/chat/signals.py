"""Keys and signals while the chat runs: no text is lost, and the terminal is put back."""

import os
import signal
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from mlx_cerebrum.cli import on_end_signals

if TYPE_CHECKING:
    from mlx_cerebrum.ranks.watch import Watch

_HEARD = 1.0  # seconds in which a signal ends the chat, unless it hears none


@contextmanager
def orderly_end() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP end the program as an exception does, so all is put back."""

    def end(signum: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + signum)  # as shells report it

    with on_end_signals(end):
        yield


@contextmanager
def ends(stop: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM and SIGHUP only call `stop`; the program ends on the way out.

    For an event loop: an exception out of its middle would leave the terminal as the loop has set
    it. Yields a function that says whether a signal came. Raises SystemExit at the end if one did.
    """
    noted: int | None = None

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal noted
        noted = signum
        stop()

    try:
        with on_end_signals(note):
            yield lambda: noted is not None
    finally:
        if noted is not None:
            raise SystemExit(128 + noted)


@contextmanager
def ends_at(watch: "Watch") -> Iterator[None]:
    """Inside `orderly_end`: where other machines run a part of the model, and one is gone, all is
    put back before `watch` says so and ends the process."""
    ending, left = threading.Event(), threading.Event()
    shown = termios.tcgetattr(sys.stdin.fileno()) if sys.stdin.isatty() else None

    def end(line: str) -> None:
        ending.set()
        os.kill(os.getpid(), signal.SIGTERM)
        if not left.wait(_HEARD) and shown is not None:  # the chat waits for what does not come
            with suppress(termios.error):
                termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, shown)

    watch.on_end = end
    try:
        yield
    finally:
        left.set()
        watch.on_end = None
        if ending.is_set():  # the process ends any moment
            threading.Event().wait()


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C raises nothing. Yields a function that says whether it was pressed."""
    pressed = False

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, as by nohup
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def quiet_keys(resumed: Callable[[], None]) -> Iterator[None]:
    """Inside, keys are not shown as they are typed; they wait for the next prompt.

    Ctrl-Z gives the shell its terminal as it was; `resumed` is called when it is ours again.
    """
    handle = sys.stdin.fileno()
    shown = termios.tcgetattr(handle)
    quiet = termios.tcgetattr(handle)
    quiet[3] &= ~(termios.ECHO | termios.ICANON)

    def pause(signum: int, frame: FrameType | None) -> None:
        termios.tcsetattr(handle, termios.TCSADRAIN, shown)
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTSTP)  # until `fg`
        signal.signal(signal.SIGTSTP, pause)
        termios.tcsetattr(handle, termios.TCSADRAIN, quiet)
        resumed()

    stops = signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL  # else there is no job control
    if stops:
        signal.signal(signal.SIGTSTP, pause)
    try:
        termios.tcsetattr(handle, termios.TCSADRAIN, quiet)
        yield
    finally:
        with suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(handle, termios.TCSADRAIN, shown)
        if stops:
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)
