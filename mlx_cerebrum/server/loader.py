"""Loads checkpoints while others answer: one at a time, a matrix at a time.

All of it runs on the engine's thread. Between two matrices those who answer get as much time as the
last one took.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from mlx_cerebrum.machine.pressure import would_swap
from mlx_cerebrum.model.memory import human
from mlx_cerebrum.server.holding import Holding, Laid, Source
from mlx_cerebrum.server.log import write
from mlx_cerebrum.weights.opening import Opened

_TELL = 2.0  # seconds between two lines of a load that takes long


@dataclass(eq=False)
class Coming:
    """A model that is asked for and not there yet.

    over: called by `end`, with None once it is there, or with why it can't be.
    """

    name: str
    laid: Laid
    source: Source
    opened: Opened | None  # until it is its turn: it keeps files open
    over: Callable[[str | None], None]
    holding: Holding | None = None  # once it is its turn
    ended: bool = False

    def end(self, problem: str | None) -> None:
        self.over(problem)
        self.ended = True


class Loader:
    """`begin`, then `go_on` until it says that the checkpoint is there. It raises what loading
    raises."""

    def __init__(self) -> None:
        self.holding: Holding | None = None  # what is being loaded
        self.coming: deque[Coming] = deque()  # put in by any thread
        self._next = self._began = self._told = 0.0  # by time.monotonic

    @property
    def reserved(self) -> int:
        """Bytes that what is being loaded will take, or has."""
        source = None if self.holding is None else self.holding.source
        return 0 if source is None else source.needed

    def begin(self, holding: Holding, opened: Opened | None = None) -> None:
        """Raises CerebrumError for what can't be loaded."""
        holding.begin(opened)
        self.holding = holding
        self._next = self._began = self._told = time.monotonic()
        assert holding.source is not None
        nbytes = holding.source.storage.nbytes
        if (warning := would_swap(nbytes, holding.name)) is not None:
            write(f"warning: {warning}")
        write(f"{holding.name}: loading {human(nbytes)}")

    def go_on(self, company: bool) -> bool:
        """A matrix more, or none if it is the turn of others; whether that was the last."""
        holding, now = self.holding, time.monotonic()
        assert holding is not None
        assert holding.pieces is not None
        if company and now < self._next:
            return False
        try:
            holding.ready = next(holding.pieces)
        except StopIteration as whole:
            holding.take(whole.value)
        except BaseException:
            holding.drop()
            self.holding = None
            raise
        done = time.monotonic()
        self._next = done + (done - now)
        if holding.models is not None:
            self.holding = None
            write(f"{holding.name}: loaded in {done - self._began:.1f} s")
            return True
        if done - self._told > _TELL:
            self._told = done
            ready, total = holding.loading or (0, 0)
            write(f"{holding.name}: loading, {human(ready)} of {human(total)}")
        return False
