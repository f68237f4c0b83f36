"""Answers on their way to a client: in one piece, or as server-sent events."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from mlx_cerebrum.server.faults import ApiError
from mlx_cerebrum.server.jobs import NO_TOKEN, Engine, Event, Failed, Job, Loading, Piece, Reading
from mlx_cerebrum.server.metrics import Metrics
from mlx_cerebrum.server.shapes import Choice, Json, Shape

MOST_PENDING = 4096  # tokens kept for a client that does not read them
_AT_ONCE = 256  # tokens taken together: others want their turn of the event loop
TOKENS = "cerebrum.tokens"  # in an ASGI scope: (prompt, generated), for the log
GONE = "cerebrum.gone"  # and whether the client went away before its answer was whole


class RunningRequest:
    """One request's jobs, from their submission until every choice has ended.

    The engine's thread adds events, one coroutine takes them out; neither blocks the other. A
    client that falls `most_pending` tokens behind loses its answer, so that memory stays bounded.
    `failure` makes a job's last event into what the client is told.
    """

    def __init__(
        self,
        engine: Engine,
        jobs: Sequence[Job],
        metrics: Metrics,
        failure: Callable[[Failed], ApiError],
        most_pending: int = MOST_PENDING,
    ) -> None:
        self.prompt_tokens = sum(len(job.prompt) for job in jobs)  # once, whatever `n`
        self.generated_tokens = 0
        self._cached_tokens: dict[int, int] = {}  # job's number -> of its prompt
        self._jobs = jobs
        self._metrics = metrics
        self._failure = failure
        self._most_pending = most_pending
        self._loop = asyncio.get_running_loop()
        self._events: deque[tuple[float, int, Event]] = deque()
        # Only each prompt's newest matters. Not a dict: the engine's thread must not resize it.
        self._reading: list[Reading | None] = [None] * len(jobs)
        self.loading: Loading | None = None  # of the model, while the jobs wait for it
        self._read_more = False  # since the last `take`
        self._news = asyncio.Event()
        self._told = False  # `_news` is set, or will be
        self._open = {(job, choice) for job, of in enumerate(jobs) for choice in range(of.n)}
        self._last: dict[tuple[int, int], float] = {}  # when each choice's newest token came
        self._started = time.perf_counter()
        self._cancelled = False
        self._taking = True  # False while what was taken is being sent
        self._cancels: list[Callable[[], None]] = []  # of each job
        try:
            for number, job in enumerate(jobs):
                deliver = partial(self._deliver, number)
                self._cancels.append(engine.submit(job, deliver, follows=number > 0))
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
        return done, max(done, self.prompt_tokens)

    @property
    def usage(self) -> Json:
        """The tokens so far, as OpenAI counts them."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.generated_tokens,
            "total_tokens": self.prompt_tokens + self.generated_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached_tokens.values())},
        }

    def cancel(self) -> None:
        """Free the places of jobs that have not ended."""
        if self._cancelled:
            return
        self._cancelled = True
        going = {job for job, _ in self._open}
        for job, cancel in enumerate(self._cancels):
            if job in going:
                cancel()

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
                raise self._failure(event)
            self._events.popleft()
            if isinstance(event, Piece):
                taken.append((self._count(when, job, event), event))
        return taken

    def _count(self, when: float, job: int, piece: Piece) -> int:
        key = (job, piece.choice)
        if piece.token != NO_TOKEN:
            if key in self._last:
                self._metrics.token_seconds.observe(when - self._last[key])
            elif not self._last:
                self._metrics.first_token_seconds.observe(when - self._started)
            self._last[key] = when
            self.generated_tokens += 1
        # The first choice's: the others can find what it has just computed.
        self._cached_tokens.setdefault(job, piece.cached_tokens)
        if piece.finish_reason is not None:
            self._open.discard(key)
        return sum(before.n for before in self._jobs[:job]) + piece.choice

    def _deliver(self, job: int, event: Event) -> None:
        """On the engine's thread."""
        if self._cancelled:
            return
        if isinstance(event, Loading):
            self.loading, self._read_more = event, True
        elif isinstance(event, Reading):
            self._reading[job], self.loading = event, None
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
        # During `take` the event loop is what is late, not the client.
        if behind and not self._taking and not self._cancelled:
            self.cancel()
            self._events.clear()
            message = f"the answer was not read: {self._most_pending} tokens were waiting"
            self._events.append((0.0, 0, Failed(message)))
            self._news.set()


class WholeResponse(Response):
    """The whole answer as JSON, once it is there."""

    def __init__(self, running: RunningRequest, shape: Shape, headers: Mapping[str, str]) -> None:
        super().__init__()
        self._running, self._shape, self._more = running, shape, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            answered = await until_gone(receive, self._gather())
        finally:
            self._running.cancel()
            _note(scope, self._running)
        if answered is None:
            scope[GONE] = True
        else:
            await answered(scope, receive, send)

    async def _gather(self) -> Response:
        choices = [Choice(index) for index in self._running.choices]
        while not self._running.ended:
            for index, piece in await self._running.take():
                choices[index].add(piece)
        # Log-probabilities can be a million objects: not on the event loop.
        return await asyncio.to_thread(self._written, choices)

    def _written(self, choices: list[Choice]) -> Response:
        whole = self._shape.whole(choices, self._running.usage)
        return JSONResponse(whole, headers=dict(self._more))


class StreamResponse(Response):
    """The answer's pieces as server-sent events, with comments while there is nothing to say.

    keep_alive: seconds of silence at most.
    """

    def __init__(
        self,
        running: RunningRequest,
        shape: Shape,
        headers: Mapping[str, str],
        *,
        keep_alive: float,
    ) -> None:
        self._running, self._shape, self._keep_alive = running, shape, keep_alive
        self.status_code, self.background = 200, None  # no super().__init__: no content-length
        self.media_type = "text/event-stream"
        # No proxy may collect what is meant to be seen as it comes.
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = False
        try:
            gone = await until_gone(receive, self._send(send)) is None
        finally:
            self._running.cancel()
            _note(scope, self._running)
            scope[GONE] = gone

    async def _send(self, send: Send) -> bool:
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        await self._write(send, self._shape.opening(self._running.choices))
        told = None
        while not self._running.ended:
            try:
                pieces = await self._running.take(self._keep_alive)
            except ApiError as failed:  # too late for a status
                await self._write(send, self._shape.failing(failed.body))
                break
            if any(piece.scores for _, piece in pieces):  # thousands: not on the event loop
                events = await asyncio.to_thread(self._said, pieces)
            else:
                events = self._said(pieces)
            loading = self._running.loading
            if not pieces and loading is not None:
                events.append(b": loading %d/%d\n\n" % (loading.done, loading.total))
            elif not pieces:  # only more of the prompt, or nothing
                reading = self._running.reading
                if reading is None or reading == told:
                    events.append(b": keep-alive\n\n")
                else:
                    events.append(b": reading %d/%d\n\n" % reading)
                told = reading
            await self._write(send, events)
        else:
            await self._write(send, self._shape.ending(self._running.usage))
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return True

    def _said(self, pieces: Sequence[tuple[int, Piece]]) -> list[bytes]:
        return [data for index, piece in pieces for data in self._shape.pieces(index, piece)]

    async def _write(self, send: Send, events: list[bytes]) -> None:
        if body := b"".join(events):
            await send({"type": "http.response.body", "body": body, "more_body": True})


def _note(scope: Scope, running: RunningRequest) -> None:
    scope[TOKENS] = (running.prompt_tokens, running.generated_tokens)


Result = TypeVar("Result")


async def until_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result | None:
    """What `work` returns; None, and `work` cancelled, where the client goes first."""
    gone = asyncio.ensure_future(_disconnected(receive))
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({gone, task}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (gone, task):
            each.cancel()
        await asyncio.gather(gone, task, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
