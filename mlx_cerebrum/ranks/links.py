"""The links between machines: the only place that sends and receives.

MLX does not check the order of these calls: one that is missing, or swapped, gives garbage in
silence. So one thread at a time holds the links, for a whole exchange. Every array is computed
before it is sent, and there before it is used: on Metal a graph that waits for a peer is killed.

Machines stand in a ring, since MLX's ring only reaches neighbours: `after` is the next rank, and
`before` the one whose hidden states come here. While the lead has nothing to say, its heartbeat
does: who waits in MLX for a message uses a whole core, so followers sleep until the next beat is
due. Beats become rarer with rest.
"""

import atexit
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TypeVar, cast

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_cerebrum.cli import INTERRUPTED, on_end_signals
from mlx_cerebrum.errors import CerebrumError, MachineError
from mlx_cerebrum.ranks.last_words import MOST_MACHINES, REPEATED, SEEN, Why, Word, silent
from mlx_cerebrum.ranks.meet import meet
from mlx_cerebrum.ranks.watch import Watch
from mlx_cerebrum.text import tell

T = TypeVar("T")
Numbers = npt.NDArray[np.int32]

PATIENCE = 60.0  # seconds without a word from a machine that should have one
_LATE = "connection to a peer was lost"
_CLOSING = 2.0  # seconds that the end may take
_UTTERED = 0.3  # seconds that last words may take


class LeadEndedError(Exception):
    """Machine 0 has ended, and says why where people see it: this one has nothing more to do."""


class Links:
    """This machine's place among `size`. Raises MachineError where the others can't be reached."""

    def __init__(self, backend: str, patience: float = PATIENCE):
        _without_noise()
        self._group = meet(backend, patience)
        self.watch = Watch(patience)
        self.broken = False  # another machine is gone
        self.names: list[str] = []  # of the machines, once they have said them
        self.rank, self.size = self._group.rank(), self._group.size()
        self.after, self.before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        self.heart: Heart | None = None  # the lead's, once the work has begun
        # Other links than the ring's carry arrays, not bytes.
        self.has_words = backend == "ring" and self.size <= MOST_MACHINES
        self._waiting = 0  # machines that have waited too long, a bit each
        self._lock = threading.RLock()
        self._own = threading.local()  # MLX's streams belong to threads
        if self.rank == 0:
            atexit.register(self.over)

    def name(self, rank: int) -> str:
        """As people are told of a machine."""
        return f"machine {rank} ({self.names[rank]})" if self.names else f"machine {rank}"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, nobody else uses the links, and Ctrl-C waits: an exchange is whole."""
        with self._lock, uninterrupted():
            yield

    def send(self, array: mx.array, to: int) -> None:
        """Hand over an array that is computed. Blocks until it is on its way."""
        with self._lost(to), self.watch.waiting(lambda: self._took_nothing(to)):
            mx.eval(mx.distributed.send(array, to, group=self._group, stream=self._stream))

    def receive(
        self, shape: Sequence[int], dtype: mx.Dtype, source: int, patience: float | None = None
    ) -> mx.array:
        """The next array that `source` sends, of a shape and dtype that both sides know.

        Raises MachineError where a machine is gone, and LeadEndedError where machine 0
        has ended without one.
        """
        seconds = self.watch.patience if patience is None else patience
        ask = self._ask if self.has_words else None
        with self.watch.waiting(lambda: self._silent(seconds), seconds, ask):
            while True:
                with self._lost(source):
                    found = mx.distributed.recv(
                        shape, dtype, source, group=self._group, stream=self._stream
                    )
                    mx.eval(found)
                word = self._word(found)
                if word is not None:
                    self._obey(word)
                elif self._waiting:  # too late: last words were said, which are no arrays
                    raise MachineError(self._silent(seconds))
                else:
                    return found

    def gather(self, numbers: Sequence[int], patience: float | None = None) -> Numbers:
        """What every machine gives, `[size, len(numbers)]`: equally many of each."""
        row = mx.array(np.asarray(numbers, dtype=np.int32))

        def rows() -> Numbers:
            """Each hands on what came, so that it goes all round."""
            found, said = {self.rank: np.array(row)}, row
            for back in range(1, self.size):
                if self.rank == 0:
                    self.send(said, self.after)
                came = self.receive(row.shape, mx.int32, self.before, patience)
                if self.rank != 0:
                    self.send(said, self.after)
                found[(self.rank - back) % self.size] = np.array(came)
                said = came
            return np.stack([found[rank] for rank in range(self.size)])

        return heard(rows)

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Inside, a step is computed that may ask for sums: others are waited for."""
        with self._lost(self.before), self.watch.waiting(self._not_over):
            yield

    @contextmanager
    def bound(self, summing: bool) -> Iterator[None]:
        """Inside, the others run what this machine does: where it can't, nobody can go on. Raises
        MachineError then. summing: they may wait for a sum, and would take words for it; so they
        hear of it when they have waited long enough."""
        try:
            yield
        except (CerebrumError, LeadEndedError):
            raise
        except Exception as error:
            if not summing:
                self.failed()
            self.broken = True
            raise MachineError(f"this machine could not run its part: {error}") from error

    def close(self, say: Callable[[], None]) -> None:
        """Have the last thing said. Who does not take it now is not waited for."""
        self.watch.patience = _CLOSING
        with uninterrupted():
            if not self._lock.acquire(timeout=_CLOSING):
                self.watch.end(self.unheard())
            if not self.broken:
                with suppress(MachineError):
                    say()
            self._lock.release()
        del self._group  # MPI counts it as a failure where it is not let go of
        self.watch.close()

    def unheard(self) -> str:
        """What is said where the end can't be."""
        return f"{self.name(self.before)} does not answer: it was not told that this is over"

    def over(self) -> None:
        """Machine 0 ends before the work has begun: the others end quietly."""
        if not self.broken:
            self._utter(Word(Why.OVER, 0))

    def failed(self) -> None:
        """This machine ends by an error that it says itself: the others say that it did."""
        if not self.broken:
            self._utter(Word(Why.FAILED, self.rank))

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
            if self._waiting >> rank & 1:  # it waited for another, and has given up
                raise MachineError(self._silent(self.watch.patience)) from None
            if rank == self.before != self.after:
                self._utter(Word(Why.GONE, rank))
            elif rank == self.after != self.before:
                self._listen()
            raise MachineError(self._gone(rank)) from None

    def _listen(self) -> None:
        """The next machine has ended: hear from the one before whether it was because of another.
        Raises MachineError where it was."""
        if not self.has_words:
            return
        heard: list[Word | None] = []

        def listen() -> None:
            try:
                found = mx.distributed.recv(
                    (SEEN,), mx.int32, self.before, group=self._group, stream=self._stream
                )
                mx.eval(found)
                heard.append(self._word(found))
            except RuntimeError:  # it was killed: else it would have said something
                heard.append(Word(Why.GONE, self.before))

        thread = threading.Thread(target=listen, name="listening", daemon=True)
        thread.start()
        thread.join(_UTTERED)
        if heard and heard[0] is not None and heard[0].why in (Why.GONE, Why.FAILED):
            self._obey(heard[0])

    def _word(self, found: mx.array) -> Word | None:
        """The last words that came in place of an array, if they did."""
        if not self.has_words:
            return None
        # Its bytes as they are: an operation of MLX's would take longer than the message.
        data = memoryview(cast(Any, found)).cast("B")[: 4 * SEEN]
        return Word.of(np.frombuffer(data[: len(data) // 4 * 4], dtype=np.int32), self.size)

    def _obey(self, word: Word) -> None:
        """Hand on what another machine said, and end, or go on to wait. Raises MachineError."""
        why, value = word
        if why == Why.WAITING:
            if (known := value | self._waiting) != self._waiting:
                self._waiting = known | 1 << self.rank
                self.watch.hurry()
                self._utter(Word(Why.WAITING, self._waiting))
            return
        self.broken = True
        if self.after != value:
            self._utter(word)
        if why == Why.OVER:
            raise LeadEndedError
        raise MachineError(self._gone(value) if why == Why.GONE else self._ended(value))

    def _ask(self) -> None:
        """Too long: say so to the next machine, whom it may spare from naming this one."""
        self._waiting |= 1 << self.rank
        self._utter(Word(Why.WAITING, self._waiting))

    def _utter(self, word: Word) -> None:
        """Last words to the next machine, as far as it takes them."""
        if not self.has_words:
            return

        def say() -> None:
            with suppress(RuntimeError):
                said = mx.full((REPEATED,), word.number, mx.int32, stream=self._stream)
                mx.eval(said)
                sent = mx.distributed.send(said, self.after, group=self._group, stream=self._stream)
                mx.eval(sent)

        thread = threading.Thread(target=say, name="last words", daemon=True)
        thread.start()
        thread.join(_UTTERED)

    def _gone(self, rank: int) -> str:
        return f"{self.name(rank)} is gone: start all of them again"

    def _ended(self, rank: int) -> str:
        return f"{self.name(rank)} has ended by an error, which it says itself"

    def _silent(self, seconds: float) -> str:
        rank = silent(self._waiting, self.rank, self.size)
        if rank is None:
            return f"all machines waited for each other for {seconds:g} s: start all of them again"
        return f"no word from {self.name(rank)} for {seconds:g} s: {_SILENT}"

    def _took_nothing(self, rank: int) -> str:
        return f"{self.name(rank)} took nothing for {self.watch.patience:g} s: {_SILENT}"

    def _not_over(self) -> str:
        seconds = f"for {self.watch.patience:g} s"
        if self.size == 2:
            return f"no word from {self.name(self.before)} {seconds}: {_SILENT}"
        return f"a machine left the others waiting in a step {seconds}: {_SILENT}"


_SILENT = "start all of them again, with more --patience if it was only slow"


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
    came: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        came.append(signum)

    try:
        with on_end_signals(note, signal.SIGINT):
            yield
    finally:
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
        links.heart = self
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
        """No beats any more. Ends the process where one is not answered."""
        self._stopped.set()
        self._thread.join(_CLOSING)
        if self._thread.is_alive():
            self._links.watch.end(self._links.unheard())

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
