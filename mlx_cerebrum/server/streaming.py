"""Answers on their way to a client: in one piece, or as server-sent events."""

import asyncio
import json
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from mlx_cerebrum.server.answers import Choice, Shape
from mlx_cerebrum.server.faults import ApiError
from mlx_cerebrum.server.running import Running

TOKENS = "cerebrum.tokens"  # in an ASGI scope: (prompt, generated), for the log
GONE = "cerebrum.gone"  # and whether the client went away before its answer was whole


class Whole(Response):
    """The whole answer as JSON, once it is there."""

    def __init__(self, running: Running, shape: Shape) -> None:
        super().__init__()
        self._running, self._shape = running, shape

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
        return JSONResponse(self._shape.whole(choices, self._running.tally.usage))


class Stream(Response):
    """The answer's pieces as server-sent events, with comments while there is nothing to say.

    usage: whether a last object tells the tokens used. keep_alive: seconds of silence at most.
    """

    def __init__(self, running: Running, shape: Shape, *, usage: bool, keep_alive: float) -> None:
        self._running, self._shape, self._usage = running, shape, usage
        self._keep_alive = keep_alive
        self.status_code, self.background = 200, None  # no super().__init__: no content-length
        self.media_type = "text/event-stream"
        # No proxy may collect what is meant to be seen as it comes.
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

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
        openings = filter(None, map(self._shape.opening, self._running.choices))
        await self._write(send, [self._event(choice) for choice in openings])
        told = None
        while not self._running.ended:
            try:
                pieces = await self._running.take(self._keep_alive)
            except ApiError as failed:  # too late for a status
                await self._write(send, [_data(failed.body)])
                break
            events = []
            for index, piece in pieces:
                events.append(self._event(self._shape.chunk(index, piece)))
                if piece.finish_reason is not None:
                    events.append(self._event(self._shape.closing(index, piece.finish_reason)))
            if not pieces:  # only more of the prompt, or nothing
                reading = self._running.reading
                if reading is None or reading == told:
                    events.append(b": keep-alive\n\n")
                else:
                    events.append(b": reading %d/%d\n\n" % reading)
                told = reading
            await self._write(send, events)
        else:
            usage = self._running.tally.usage
            last = [_data(self._shape.frame([], usage))] if self._usage else []
            await self._write(send, [*last, b"data: [DONE]\n\n"])
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return True

    def _event(self, choice: dict[str, Any] | None) -> bytes:
        return b"" if choice is None else _data(self._shape.frame([choice], None))

    async def _write(self, send: Send, events: list[bytes]) -> None:
        if body := b"".join(events):
            await send({"type": "http.response.body", "body": body, "more_body": True})


def _data(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def _note(scope: Scope, running: Running) -> None:
    scope[TOKENS] = (sum(running.tally.prompts), running.tally.generated)


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
