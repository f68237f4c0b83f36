"""What every command line shares: one-line errors, exit codes, strict flags."""

import argparse
import contextlib
import errno
import io
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from types import FrameType
from typing import Any, NoReturn

from mlx_cerebrum import installed
from mlx_cerebrum.errors import CerebrumError, RequestError, cut, shown
from mlx_cerebrum.text import one_line, tell, tell_traceback

BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
PIPE_CLOSED = 141  # 128 + SIGPIPE: the reader (`| head`) had enough
# Flags by the names they have in other programs, and what they may be here.
_ELSEWHERE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("--temperature", "-t"), ("--temp",)),
    **dict.fromkeys(("--max-new-tokens", "--n-predict", "--num-predict", "-n"), ("--max-tokens",)),
    **dict.fromkeys(("--model", "--source", "--input", "-m"), ("--model", "--hf-path")),
    **dict.fromkeys(("--out", "--output", "--outfile", "-o"), ("--mlx-path",)),
    **dict.fromkeys(("-q", "--quantize", "--quant"), ("--q-bits", "--bits", "--quantize")),
    **dict.fromkeys(("--q-bits", "--quantization"), ("--bits", "--q-bits")),
    **dict.fromkeys(("-p",), ("--prompt", "--port")),
    **dict.fromkeys(("--text", "--question"), ("--prompt",)),
    **dict.fromkeys(("--tokens", "--num-tokens", "--length"), ("--max-tokens",)),
    **dict.fromkeys(("--system-prompt", "--sys", "-sys"), ("--system",)),
    **dict.fromkeys(("--context", "--ctx-size", "--num-ctx", "-c"), ("--window",)),
    **dict.fromkeys(("--chat-template",), ("--template",)),
    **dict.fromkeys(("--repeat-penalty",), ("--repetition-penalty",)),
    **dict.fromkeys(("-y", "-f", "--force", "--assume-yes"), ("--yes",)),
    **dict.fromkeys(("--ignore-eos-token",), ("--ignore-eos",)),
}
# Flags of other programs for what is done here anyway.
_NEEDLESS = {
    "--stream": "answers are shown as they come",
    "--prompt": "for one question: `generate NAME --prompt TEXT`",
    **dict.fromkeys(("-ngl", "--n-gpu-layers", "--gpu-layers"), "the GPU is used by itself"),
    **dict.fromkeys(("-v", "--verbose"), "--debug shows the traceback of an error"),
    **dict.fromkeys(("-f", "--force", "-y", "--yes"), "nothing is asked here"),
    **dict.fromkeys(("-a", "--all"), "it stands for nothing here; name what you mean"),
}
_FLAG = re.compile(r"--[A-Za-z][\w-]*|-[A-Za-z]+")
_STRAY = re.compile(r"unrecognized arguments: ([^-].*)")
_ALONE = {  # what to do instead of giving a command one word more
    "chat": "ask when it runs, or one question with `generate NAME --prompt TEXT`",
    "pull": "name one model at a time",
    "show": "name one model at a time",
    "verify": "name one model at a time",
    "list": "of one model, `show NAME` says more",
    "convert": "the source is --hf-path, what is written --mlx-path",
}
_NUMBER_OF_Q = re.compile(r"unrecognized arguments: (\d)")
_MOST_WHOLE = 2**31  # MLX counts in 32 bits
_MOST_NUMBER = 1e18


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose complaints are one line, and which never guesses an abbreviated flag.

    As `type=int` and `type=float` it takes numbers that can be computed with: finite, and none
    that overflows where it is multiplied or handed on.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        self.register("type", int, _whole)
        self.register("type", float, _number)

    def add_debug(self) -> None:
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def add_json(self) -> None:
        self.add_argument("--json", action="store_true", help="print one JSON object, nothing else")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse, but what a flag is called elsewhere is answered with what it is here."""
        given = sys.argv[1:] if args is None else list(args)
        if not any(
            action.nargs in (argparse.REMAINDER, argparse.PARSER) for action in self._actions
        ):
            self._refuse_unknown(given)
        return super().parse_known_args(given, namespace)

    def _refuse_unknown(self, given: list[str]) -> None:
        known = self._option_string_actions
        for word, after in zip(given, [*given[1:], ""], strict=False):
            flag, equals, given_value = word.partition("=")
            if word == "--":
                return
            if not _FLAG.fullmatch(flag) or flag in known:
                continue
            meant = next((f for f in _ELSEWHERE.get(flag, ()) if f in known), None)
            if meant is None and flag not in _NEEDLESS:
                near = get_close_matches(flag, [f for f in known if f.startswith("--")], 1, 0.75)
                meant = near[0] if near else None
            takes = meant and known[meant].nargs != 0 and after and after[0] != "-"
            value = f"={given_value}" if equals else f" {after}" if takes else ""
            hint = f"; did you mean {meant}{value}?" if meant else ""
            hint = hint or (f"; {_NEEDLESS[flag]}" if flag in _NEEDLESS else "")
            self.error(f"unrecognized arguments: {word}{hint}")

    def format_help(self) -> str:
        return _spelled_here(super().format_help())

    def error(self, message: str) -> NoReturn:
        if (more := _NUMBER_OF_Q.fullmatch(message)) and "--q-bits" in self._option_string_actions:
            message = f"-q takes no number; did you mean -q --q-bits {more[1]}?"
        if stray := _STRAY.fullmatch(message):
            name = re.split(r"[ .]", self.prog)[-1]
            if "--prompt" in self._option_string_actions:
                message += f"; did you mean --prompt {shown(stray[1])}?"
            elif name in _ALONE:
                message += f"; {_ALONE[name]}"
        see = _spelled_here(f"{self.prog} --help")
        self.exit(BAD_INPUT, f"error: {one_line(message)} (see {see})\n")


_spellings: Mapping[str, str] = {}


@contextlib.contextmanager
def spelled(spellings: Mapping[str, str]) -> Iterator[None]:
    """Inside, commands are called what the user typed: `python -m ...` -> its other name.

    Where one begins like another, the longer stands first.
    """
    global _spellings
    before, _spellings = _spellings, spellings
    try:
        yield
    finally:
        _spellings = before


def _spelled_here(text: str) -> str:
    for module, typed in _spellings.items():
        text = re.sub(rf"{re.escape(module)}(?![\w.])", typed, text)
    return text


def seed(text: str) -> int:
    """The type of a --seed: `decoding.sampling.Sampling` says how large it may be."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number") from None


def _whole(text: str) -> int:
    value = seed(text)
    if abs(value) >= _MOST_WHOLE:
        raise argparse.ArgumentTypeError(f"{shown(text)} is too large")
    return value


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a number")
    if abs(value) >= _MOST_NUMBER:
        raise argparse.ArgumentTypeError(f"{shown(text)} is too large")
    return value


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

    if sys.stdout is None or sys.stderr is None:  # started with `>&-`
        if sys.stderr is not None:
            tell("error: standard output is closed; redirect it to /dev/null")
        return BAD_INPUT
    if isinstance(sys.stdout, io.TextIOWrapper):  # a C locale must not lose a whole answer
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with on_end_signals(end):
            done = main_body()
        sys.stdout.flush()  # a closed pipe or full disk must show here, not at exit
        return code if done == INTERRUPTED else done
    except BrokenPipeError:
        _drop_stdout()
        return PIPE_CLOSED
    except SystemExit:
        _flush_stdout()
        raise
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):  # the terminal is gone
            tell("interrupted")
        _flush_stdout()
        return code
    except (CerebrumError, OSError) as error:
        if debug:
            tell_traceback(error)
        with contextlib.suppress(OSError):
            tell(f"error: {describe(error)}")
        _flush_stdout()
        return error.exit_code if isinstance(error, CerebrumError) else BAD_INPUT


def ask(question: str) -> str:
    """What the person at the terminal answers: one line. Raises RequestError where they leave.

    Read past sys.stdin, whose way with odd bytes the chat can only set before its first read.
    """
    tell(question, end="")
    line = os.read(sys.stdin.fileno(), 4096)
    if not line:  # Ctrl-D
        tell()
        raise RequestError("there was no answer, and nothing was done")
    return line.decode(errors="replace").strip()


@contextlib.contextmanager
def on_end_signals(
    handler: Callable[[int, FrameType | None], None], *more: signal.Signals
) -> Iterator[None]:
    """Inside, `handler` gets SIGTERM, SIGHUP and `more`; what nohup had ignored stays ignored.

    Nothing changes outside the main thread, where Python has no signals.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGTERM, signal.SIGHUP, *more):
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
    return one_line(cut(text))


def _flush_stdout() -> None:
    """As the interpreter does at its end; but where it can't, that would change the exit code."""
    try:
        sys.stdout.flush()
    except OSError:
        _drop_stdout()


def _drop_stdout() -> None:  # so that the interpreter's own last flush is quiet
    with contextlib.suppress(OSError, ValueError):  # not a file when a test captures it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Ctrl-C while modules are still being imported, before `run` can catch it; what is not
    installed; and faults."""
    if issubclass(kind, KeyboardInterrupt):
        tell("interrupted")
        return
    if isinstance(error, ImportError) and (line := installed.remedy(error)) is not None:
        if "--debug" in sys.argv:
            tell_traceback(error)
        tell(f"error: {one_line(line)}")
        raise SystemExit(BAD_INPUT)
    tell_traceback(error)


sys.excepthook = _uncaught  # programs import this module first; libraries never
