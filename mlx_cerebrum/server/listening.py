"""From an address to a running web server, and its orderly end."""

import asyncio
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn

from mlx_cerebrum.cli import describe, on_end_signals
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.server import log
from mlx_cerebrum.server.app import Service
from mlx_cerebrum.server.connections import AT_ONCE, HEAD_BYTES, Connection, Gate, State
from mlx_cerebrum.server.security import is_loopback
from mlx_cerebrum.text import one_line

_SAY_AGAIN = 10.0  # seconds
_LAST_WORDS = 0.5  # seconds, for the log to be written at the end
_BACKLOG = 1024  # connections that wait to be accepted


def bind(host: str, port: int, has_key: bool) -> socket.socket:
    """A socket for the address, before anything slow is done.

    Raises RequestError for an address that others can reach without a key, one that is not
    this machine's, or a port that is taken.
    """
    if not 0 <= port < 65536:
        raise RequestError(f"port must be from 0 to 65535, not {port}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM) if host else []
    except (socket.gaierror, UnicodeError):
        found = []
    if not found:
        raise RequestError(f"{host!r} is not an address or a name of this machine")
    # IPv4 first: of localhost's two addresses, the one every client tries.
    family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    if not (has_key or is_loopback(str(address[0]))):
        raise RequestError(
            f"{host} can be reached by others: set an API key (--api-key), or use 127.0.0.1"
        )
    listening = socket.socket(family, kind, protocol)
    try:
        if sys.platform != "win32":  # there it would share the port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        # At once: two sockets can bind to one port, and only the second's `listen` would fail.
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        reason = error.strerror or str(error)
        raise RequestError(f"can't listen on {host} port {port}: {reason}") from None
    return listening


def url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    # A browser can't open "every address of this machine".
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn, serving `service` until a signal; then answers get `grace` seconds to end.

    ready: called once requests are taken.
    """

    def __init__(
        self, service: Service, grace: float, ready: Callable[[], None] = lambda: None
    ) -> None:
        config = uvicorn.Config(
            service.app,
            http=Connection,
            backlog=AT_ONCE,
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",  # the journal has what there is to say
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=math.ceil(grace) + 3,  # for clients that do not read
            h11_max_incomplete_event_size=HEAD_BYTES,
        )
        super().__init__(config)
        self._service, self._grace, self._ready = service, grace, ready
        self._gate = Gate(service.settings.room, service.settings.patience)
        self.server_state = State(self._gate)
        self._said = -math.inf  # when a fault was last written down

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(self._fault)
        await super().startup(sockets)
        for listening in sockets or ():  # uvicorn's backlog is how many are accepted together
            listening.listen(_BACKLOG)
        self._ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # Not uvicorn's own: it takes what is ignored too, leaves SIGHUP, and raises the signal
        # again at the end, which is no exit code 0.
        with on_end_signals(self.handle_exit, signal.SIGINT):
            yield

    async def on_tick(self, counter: int) -> bool:
        self._gate.tick(asyncio.get_running_loop().time())
        return await super().on_tick(counter)

    def _fault(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A connection failed, or no more can be opened: a line, not one for each try."""
        if loop.time() - self._said < _SAY_AGAIN:
            return
        self._said = loop.time()
        error = context.get("exception")
        what = describe(error) if error else ""
        log.write(f"{one_line(context['message'])}: {what}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.closing = True
        # A thread of our own: one of the event loop's would be waited for after a second Ctrl-C.
        close = threading.Thread(
            target=self._service.engine.close, args=(self._grace,), daemon=True
        )
        close.start()
        ticking = asyncio.create_task(self._tick())  # uvicorn's ticks are over
        await super().shutdown(sockets)
        while close.is_alive() and not self.force_exit:
            await asyncio.sleep(0.02)
        ticking.cancel()
        self._gate.close()
        await asyncio.sleep(0.01)  # for the sockets to be closed
        log.flush(_LAST_WORDS)

    async def _tick(self) -> None:
        while True:
            self._gate.tick(asyncio.get_running_loop().time())
            await asyncio.sleep(0.1)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.closing = True
        if self.should_exit:
            # The second: nobody waits for the step that the generating thread is in.
            log.write("interrupted")
            log.flush(_LAST_WORDS)
            os._exit(128 + sig)  # as shells report it
        self.should_exit = True
