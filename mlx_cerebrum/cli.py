"""What every command line shares: one-line errors, exit codes, strict flags."""

import argparse
import contextlib
import errno
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from mlx_cerebrum.errors import CerebrumError

BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
PIPE_CLOSED = 141  # 128 + SIGPIPE: the reader (`| head`) had enough


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose complaints are one line, and which never guesses an abbreviated flag."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def add_debug(self) -> None:
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"error: {one_line(message)} (see {self.prog} --help)\n")


def run(main_body: Callable[[], int], debug: bool = False) -> int:
    """Run a command and turn what a user can mend into one line on stderr.

    Returns the exit code: the body's own, 2 for bad input and failed reads or writes, 130
    after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP. A fault of the program itself is left to
    raise.
    """
    code = INTERRUPTED

    def end(signum: int, frame: FrameType | None) -> NoReturn:
        nonlocal code
        code = 128 + signum
        raise KeyboardInterrupt  # what is kept or tidied after Ctrl-C, is

    if isinstance(sys.stdout, io.TextIOWrapper):  # a C locale must not lose a whole answer
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if sys.stdout is None or sys.stderr is None:  # started with `>&-`
            raise CerebrumError("standard output or error is closed; redirect it to /dev/null")
        with on_end_signals(end):
            done = main_body()
        sys.stdout.flush()  # a closed pipe or full disk must show here, not at exit
        return code if done == INTERRUPTED else done
    except BrokenPipeError:
        _drop_stdout()
        return PIPE_CLOSED
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):  # the terminal is gone
            print("interrupted", file=sys.stderr)
        return code
    except (CerebrumError, OSError) as error:
        if debug:
            traceback.print_exc()
        if sys.stderr is None or sys.stdout is None:
            return BAD_INPUT
        with contextlib.suppress(OSError):
            print(f"error: {describe(error)}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:
            _drop_stdout()
        return BAD_INPUT


@contextlib.contextmanager
def on_end_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP are `handler`'s, but one that is ignored: nohup asked for it.

    Nothing changes outside the main thread, where Python has no signals.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) not in (None, signal.SIG_IGN):
                before[signum] = signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


def describe(error: BaseException) -> str:
    """The error as one line; a system error as `FILE: what went wrong`."""
    if not isinstance(error, OSError) or error.strerror is None:
        return one_line(str(error)) or type(error).__name__
    text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if error.errno == errno.ENOSPC:
        text += "; free some space or write elsewhere"
    return one_line(text)


def one_line(text: str) -> str:
    """The text with its line breaks (every kind str.splitlines knows) made spaces."""
    return " ".join(line.strip() for line in text.splitlines()).strip()


def _drop_stdout() -> None:  # so that the interpreter's own last flush is quiet
    with contextlib.suppress(OSError, ValueError):  # not a file when a test captures it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Ctrl-C while modules are still being imported, before `run` can catch it."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _uncaught  # only command lines import this module, and first
