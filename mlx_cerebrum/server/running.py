"""A request's jobs in the engine, as one task of the event loop sees them."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from mlx_cerebrum.server.answers import Tally
from mlx_cerebrum.server.faults import ApiError
from mlx_cerebrum.server.jobs import Engine, Event, Failed, Job, Piece, Reading, Ticket
from mlx_cerebrum.server.metrics import Metrics

MOST_PENDING = 4096  # tokens kept for a client that does not read them
_AT_ONCE = 256  # tokens taken together: others want their turn of the event loop


class Running:
    """One request's jobs, from their submission until every choice has ended.

    The engine's thread puts events in, one task takes them out; neither waits for the other. A
    client that falls `most_pending` tokens behind loses its answer, so that memory stays bounded.
    `failure` makes of a job's last message what the client is told.
    """

    def __init__(
        self,
        engine: Engine,
        jobs: Sequence[Job],
        metrics: Metrics,
        failure: Callable[[str], ApiError],
        most_pending: int = MOST_PENDING,
    ) -> None:
        self.tally = Tally([len(job.prompt) for job in jobs])
        self._jobs = jobs
        self._metrics = metrics
        self._failure = failure
        self._most_pending = most_pending
        self._loop = asyncio.get_running_loop()
        self._events: deque[tuple[float, int, Event]] = deque()
        # Only the newest of each prompt matters. No dict: the engine's thread would add to it.
        self._reading: list[Reading | None] = [None] * len(jobs)
        self._read_more = False  # since the last `take`
        self._news = asyncio.Event()
        self._told = False  # `_news` is set, or will be
        self._open = {(job, choice) for job, of in enumerate(jobs) for choice in range(of.n)}
        self._last: dict[tuple[int, int], float] = {}  # when each choice's newest token came
        self._started = time.perf_counter()
        self._cancelled = False
        self._taking = True  # not so while what was taken is being sent
        self._tickets: list[Ticket] = []
        try:
            for number, job in enumerate(jobs):
                self._tickets.append(engine.submit(job, partial(self._deliver, number)))
        except BaseException:
            self.cancel()
            raise

    @property
    def ended(self) -> bool:
        return not self._open

    @property
    def choices(self) -> range:
        return range(sum(job.n for job in self._jobs))

    @property
    def reading(self) -> tuple[int, int] | None:
        """`(done, total)` of all prompts' tokens, once there is news of one."""
        if not any(self._reading):
            return None
        done = sum(reading.done for reading in self._reading if reading is not None)
        return done, max(done, sum(self.tally.prompts))

    def cancel(self) -> None:
        """Free the places of jobs that have not ended."""
        if self._cancelled:
            return
        self._cancelled = True
        going = {job for job, _ in self._open}
        for job, ticket in enumerate(self._tickets):
            if job in going:
                ticket.cancel()

    async def take(self, seconds: float | None = None) -> list[tuple[int, Piece]]:
        """What came, as `(choice's number in the answer, piece)`; empty after `seconds`, or when
        only more of a prompt has been read. Raises ApiError for a job that failed."""
        self._taking = True
        await asyncio.sleep(0)  # or an engine that is always ahead would keep the event loop busy
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self._events and not self._read_more:
                    await self._news.wait()
                    self._news.clear()
                    self._told = False  # before the events are looked at: none can be missed
        self._taking = self._read_more = False
        taken: list[tuple[int, Piece]] = []
        while self._events and len(taken) < _AT_ONCE:
            when, job, event = self._events[0]
            if isinstance(event, Failed):
                if taken:  # first what came before it
                    break
                raise self._failure(event.message)
            self._events.popleft()
            if isinstance(event, Piece):
                taken.append((self._count(when, job, event), event))
        return taken

    def _count(self, when: float, job: int, piece: Piece) -> int:
        key = (job, piece.choice)
        if key in self._last:
            self._metrics.token_seconds.observe(when - self._last[key])
        elif not self._last:
            self._metrics.first_token_seconds.observe(when - self._started)
        self._last[key] = when
        self.tally.add(job, piece)
        if piece.finish_reason is not None:
            self._open.discard(key)
        return sum(before.n for before in self._jobs[:job]) + piece.choice

    def _deliver(self, job: int, event: Event) -> None:
        """On the engine's thread."""
        if self._cancelled:
            return
        if isinstance(event, Reading):
            self._reading[job] = event
            self._read_more = True
        else:
            self._events.append((time.perf_counter(), job, event))
        if len(self._events) > self._most_pending:
            self._call(self._fall_behind)
        elif not self._told:
            self._told = True
            self._call(self._news.set)

    def _call(self, what: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, the client long gone
            self._loop.call_soon_threadsafe(what)

    def _fall_behind(self) -> None:
        behind = len(self._events) > self._most_pending
        # While it takes, it is the event loop that was late, not the client.
        if behind and not self._taking and not self._cancelled:
            self.cancel()
            self._events.clear()
            message = f"the answer was not read: {self._most_pending} tokens were waiting"
            self._events.append((0.0, 0, Failed(message)))
            self._news.set()
