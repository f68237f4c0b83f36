"""The links between machines: the only place that sends and receives.

MLX does not check the order of these calls: one that is missing, or swapped, gives garbage in
silence. So one thread at a time holds the links, for a whole exchange. Every array is computed
before it is sent, and there before it is used: on Metal a graph that waits for a peer is killed.

Machines stand in a ring, since MLX's ring only reaches neighbours: `after` is the next rank, and
`before` the one whose hidden states come here. While the lead has nothing to say, its heartbeat
does: who waits in MLX for a message uses a whole core, so followers sleep until the next beat is
due. Beats become rarer with rest.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_cerebrum.errors import MachineError
from mlx_cerebrum.ranks.watch import Watch
from mlx_cerebrum.text import tell

T = TypeVar("T")
Numbers = npt.NDArray[np.int32]

PATIENCE = 60.0  # seconds without a word from a machine that should have one
_STARTING = 120.0  # seconds in which all machines must have come
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
_LATE = "connection to a peer was lost"


class Links:
    """This machine's place among `size`. Raises MachineError where the others can't be reached."""

    def __init__(self, backend: str, patience: float = PATIENCE, starting: float = _STARTING):
        self.watch = Watch(patience)
        self.broken = False  # another machine is gone
        _without_noise()
        self.names: list[str] = []  # of the machines, once they have said them
        try:
            with self.watch.waiting("not all machines came; start them together: waited", starting):
                self._group = heard(lambda: mx.distributed.init(strict=True, backend=backend))
        except RuntimeError as error:
            raise MachineError(f"the other machines can't be reached: {error}") from None
        self.rank, self.size = self._group.rank(), self._group.size()
        self.after, self.before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        self.sent = 0  # messages, of all kinds but beats
        self._lock = threading.RLock()
        self._own = threading.local()  # MLX's streams belong to threads

    def name(self, rank: int) -> str:
        """As people are told of a machine."""
        return f"machine {rank} ({self.names[rank]})" if self.names else f"machine {rank}"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, nobody else uses the links, and Ctrl-C waits: an exchange is whole."""
        with self._lock, uninterrupted():
            yield

    def send(self, array: mx.array, to: int, beat: bool = False) -> None:
        """Hand over an array that is computed. Blocks until it is on its way."""
        self.sent += not beat
        with self._lost(to), self.watch.waiting(f"{self.name(to)} took nothing"):
            mx.eval(mx.distributed.send(array, to, group=self._group, stream=self._stream))

    def receive(
        self, shape: Sequence[int], dtype: mx.Dtype, source: int, patience: float | None = None
    ) -> mx.array:
        """The next array that `source` sends, of a shape and dtype that both sides know."""
        with self._lost(source), self.watch.waiting(f"no word from {self.name(source)}", patience):
            found = mx.distributed.recv(
                shape, dtype, source, group=self._group, stream=self._stream
            )
            mx.eval(found)
        return found

    def gather(self, numbers: Sequence[int], patience: float | None = None) -> Numbers:
        """What every machine gives, `[size, len(numbers)]`: equally many of each."""
        row = mx.array(np.asarray(numbers, dtype=np.int32)[None])

        def rows() -> Numbers:
            found = mx.distributed.all_gather(row, group=self._group, stream=self._stream)
            return np.array(found)

        with self._lost(self.before), self.watch.waiting("not all machines answered", patience):
            return heard(rows)

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Inside, a step is computed that may ask for sums: others are waited for."""
        with self._lost(self.before), self.watch.waiting("a step was not over"):
            yield

    def summed(self, x: mx.array) -> mx.array:
        """The sum of every machine's `x`, in a graph; all must ask for it, in one order."""
        return mx.distributed.all_sum(x, group=self._group)

    @property
    def _stream(self) -> Any:
        if not hasattr(self._own, "stream"):
            self._own.stream = mx.new_stream(mx.cpu)
        return self._own.stream

    @contextmanager
    def _lost(self, rank: int) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if _LATE not in str(error):
                raise
            self.broken = True
            raise MachineError(f"{self.name(rank)} is gone: start all of them again") from None


def heard(wait: Callable[[], T]) -> T:
    """What `wait` gives. Ctrl-C meanwhile ends the process: a wait inside MLX hears no signal, so
    it runs in another thread, and nothing can be tidied while that goes on."""
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(wait())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="waiting", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.1)
    except KeyboardInterrupt:
        tell("interrupted")
        os._exit(INTERRUPTED)
    if failed:
        raise failed[0]
    return done[0]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside, the signals that end a program wait; they are heard on the way out."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        came.append(signum)

    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    ours = (each for each in ends if signal.getsignal(each) is not None)
    before: dict[signal.Signals, Any] = {each: signal.signal(each, note) for each in ours}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        for signum in came:
            signal.raise_signal(signum)


def _without_noise() -> None:
    """Leave out what MLX's ring prints, ten lines for each peer that is gone: one line of ours says
    it. Other programs' output, and whatever else MLX has to say, goes where it went."""
    shown = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    try:
        kept = subprocess.Popen(
            ["grep", "--line-buffered", "-v", r"^\[ring\] "],
            stdin=subprocess.PIPE,
            stdout=shown,
            start_new_session=True,  # Ctrl-C is not for it
        )
    except OSError:  # no grep
        return
    assert kept.stdin is not None
    os.dup2(kept.stdin.fileno(), 2)
    kept.stdin.close()
    sys.stderr = shown


class Heart:
    """The lead's heartbeat: `beat(seconds until the next)` is called while the links are idle."""

    def __init__(self, links: Links, beat: Callable[[int], None]) -> None:
        self._links, self._beat = links, beat
        self._last = time.monotonic()
        self._stopped = threading.Event()
        self.in_step = False
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Inside, the lead computes: the next word comes any moment, and nobody is to sleep."""
        self.in_step = True
        try:
            yield
        finally:
            self.in_step = False
            self._last = time.monotonic()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        rested = time.monotonic()
        pace = _BUSY
        while not self._stopped.wait(pace / 1000):
            if self._last > rested:
                rested = self._last
            pace = _BUSY if time.monotonic() - rested < _REST_AFTER else _RESTING
            with self._links.held():
                if self._links.broken:  # whoever found it out says so
                    return
                if time.monotonic() - self._last < pace / 2000 or self._stopped.is_set():
                    continue
                try:
                    self._beat(0 if self.in_step else pace)
                except MachineError as error:
                    self._links.watch.end(str(error))


_BUSY, _RESTING = 100, 400  # milliseconds between beats
_REST_AFTER = 10.0  # seconds without a step
