"""The process that formulas and code are worked on in: what takes for ever ends it, not us.

It is started by the first of them, does one after the other, and ends with this process.
"""

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from contextlib import suppress
from typing import Any

from mlx_cerebrum.typeset import code, tex

SECONDS = 0.5  # of CPU for a formula or a block of code
PATIENCE = 20.0  # seconds for an answer, its process's start included
KEPT = 500  # formulas and blocks that are remembered
LARGEST = 20_000  # bytes of an answer that is remembered
STACK = 64 << 20  # bytes: more than a formula of the allowed length can take

# ["tex", source] or ["code", language, text], and the tree or the parts as JSON; null: none.
Job = tuple[str, ...]


class Worker:
    """Answers of the process, remembered; any thread may ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._kept: OrderedDict[Job, bytes] = OrderedDict()

    def ask(self, job: Job) -> bytes:
        """The answer to one job as JSON; `null` where there is none, or it took too much."""
        if sum(map(len, job)) > max(tex.LONGEST, code.LONGEST) + 100:
            return b"null"
        with self._lock:
            if job in self._kept:
                self._kept.move_to_end(job)
                return self._kept[job]
            answer = self._work(job)
            if len(answer) <= LARGEST:  # null too: what took too long is not tried again
                self._kept[job] = answer
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return answer

    def _work(self, job: Job) -> bytes:
        child = self._child or self._start()
        assert child.stdin is not None
        try:
            child.stdin.write(json.dumps(job).encode() + b"\n")
            child.stdin.flush()
            if answer := self._line(child):
                return answer
        except OSError:
            pass
        self.close()
        return b"null"

    def _line(self, child: "subprocess.Popen[bytes]") -> bytes:
        """The line that comes; empty where none does."""
        assert child.stdout is not None
        got = bytearray()
        while select.select([child.stdout], [], [], PATIENCE)[0]:
            piece = os.read(child.stdout.fileno(), 1 << 16)
            got += piece
            if not piece or got.endswith(b"\n"):
                return bytes(got[:-1]) if piece else b""
        return b""

    def _start(self) -> "subprocess.Popen[bytes]":
        path = os.pathsep.join(filter(None, sys.path))
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {__name__} import child; child()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C at a terminal is not for it
        )
        return self._child

    def close(self) -> None:
        """End the process; the next job starts another."""
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        child.wait()


_worker = Worker()
atexit.register(_worker.close)


def ask(job: Job) -> bytes:
    """The answer to a job, as JSON."""
    return _worker.ask(job)


def formula(source: str) -> tex.Element | None:
    """`tex.formula`, within the bounds."""
    found: tex.Element | None = _tree(json.loads(_worker.ask(("tex", source))))
    return found


def highlighted(language: str, text: str) -> list[code.Part] | None:
    """`code.code`, within the bounds."""
    parts = json.loads(_worker.ask(("code", language, text)))
    return None if parts is None else [(kind, piece) for kind, piece in parts]


def close() -> None:
    """End the process, if there is one."""
    _worker.close()


def _tree(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    name, attributes, children = value
    return tex.Element(name, attributes, [_tree(child) for child in children])


def child() -> None:
    """Answer the lines of standard input until there are no more."""
    import resource

    import math_core  # noqa: F401, here and now: what follows is timed
    import pygments.lexers  # noqa: F401

    os.nice(10)  # who waits for words comes first
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK)
    work = threading.Thread(target=_answer)
    work.start()
    work.join()


def _answer() -> None:
    for line in sys.stdin.buffer:
        kind, *values = json.loads(line)
        # Whatever it is busy with then, the signal ends the process.
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        found = tex.formula(*values) if kind == "tex" else code.code(*values)
        written = json.dumps(found)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(written.encode() + b"\n")  # to a program, not a person
        sys.stdout.buffer.flush()
