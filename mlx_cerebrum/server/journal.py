"""Around every request: an id, a line on stderr, a count, and an answer should the server fail."""

import secrets
import time
import traceback
from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_cerebrum.server import faults, log
from mlx_cerebrum.server.metrics import Metrics
from mlx_cerebrum.server.streaming import GONE, TOKENS
from mlx_cerebrum.text import one_line

CLIENT_GONE = 499  # as nginx counts it; never sent
ID = "cerebrum.id"  # of the request, in its ASGI scope
_UNLOGGED = ("/health", "/metrics", "/typeset", "/shelf")  # asked for many times a minute


class Journal:
    """ASGI middleware, the outermost.

    route: the name to count a path under. closing: whether new requests are refused.
    most_posts: how many may be in the works; more are refused.
    log, debug: whether to write a line for each request, and the traceback of a fault.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        route: Callable[[str], str],
        closing: Callable[[], bool],
        most_posts: int,
        *,
        log: bool = False,
        debug: bool = False,
    ) -> None:
        self._app, self._metrics, self._route, self._closing = app, metrics, route, closing
        self._log, self._debug = log, debug
        self._most_posts, self._posts = most_posts, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = scope[ID] = f"req_{secrets.token_hex(8)}"
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        app, post = self._app, scope["method"] == "POST"
        if self._closing():
            app = faults.closing().response
        elif post and self._posts >= self._most_posts:
            app = faults.queue_full("too many requests at once; try again later").response
        self._posts += post
        try:
            await app(scope, receive, watched)
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            log.write(f"{request_id}: {one_line(what)}")
            if self._debug:
                log.write(traceback.format_exc())
            if status == 0:
                await faults.internal(request_id).response(scope, receive, watched)
        finally:
            self._posts -= post
            if scope.get(GONE) or status == 0:
                status = CLIENT_GONE
            self._metrics.requests.labels(self._route(scope["path"]), str(status)).inc()
            if self._log and scope["path"] not in _UNLOGGED:
                self._write(scope, status, time.perf_counter() - started)

    def _write(self, scope: Scope, status: int, seconds: float) -> None:
        # A path as it came: percent-encoded, so that it can't write lines of its own.
        path = scope.get("raw_path", b"?").decode("ascii", "replace")[:100]
        tokens = "{} + {} tokens, ".format(*scope[TOKENS]) if TOKENS in scope else ""
        log.write(f"{scope['method'][:20]} {path} {status}, {tokens}{seconds:.2f} s")
