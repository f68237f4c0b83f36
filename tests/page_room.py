"""A stand-in for the server, with scripted answers, and a browser to look at its page with."""

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from playwright.sync_api import Browser, BrowserContext, Dialog, Page, sync_playwright
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import mlx_cerebrum.server
from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.server.security import SECURITY_HEADERS
from mlx_cerebrum.server.typesetting import PATH as TYPESET
from mlx_cerebrum.server.typesetting import Typesetter
from mlx_cerebrum.weights.hub import demo_path

some = pytest.mark.one_in(10)  # of all that drive a browser
FOLDER = Path(mlx_cerebrum.server.__file__).parent / "page"
BROWSERS = ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser")
MAC_BROWSERS = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# Which block runs at each position of the two models.
MAPS = {
    "cerebrum-12.25b": [start + n for start in (0, 4, 8, 12, 16, 20, 24) for n in range(8)],
    "cerebrum-7b": list(range(32)),
}
MODELS = [
    {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "mlx-cerebrum",
        "cerebrum": {
            "positions": len(layer_map),
            "blocks": 32,
            "sliding_window": 4096,
            "context_length": 32768,
            "layer_map": layer_map,
            "bits": 4,
        },
        "defaults": {"temperature": 0.0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 1024},
    }
    for name, layer_map in MAPS.items()
]


@dataclass(frozen=True)
class Hold:
    """Say nothing until the test lets go."""


@dataclass(frozen=True)
class Raw:
    """Bytes as they are, between the pieces."""

    data: str


@dataclass(frozen=True)
class Script:
    """How one request is answered."""

    pieces: Sequence[str | Hold | Raw] = ("Hello", " world", ".")
    status: int = 200
    error: str | None = None  # a body or, with pieces, an event after them
    headers: dict[str, str] = field(default_factory=dict)
    finish: str | None = "stop"  # None: the connection closes without a word
    prompt_tokens: int = 12
    completion_tokens: int | None = None  # None: as many as pieces


def words(text: str) -> list[str]:
    """A text in pieces of a word each."""
    return [part if index == 0 else f" {part}" for index, part in enumerate(text.split(" "))]


async def _page(request: Request) -> Response:
    path = FOLDER / (request.path_params["name"] or "index.html")
    return FileResponse(path) if path.is_file() else Response(status_code=404)


class Secured:
    """The real server's headers, its policy for scripts among them."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        await self._app(scope, receive, secured)


class Room:
    """The stand-in server, in a thread of its own."""

    def __init__(self) -> None:
        self._port = 0
        self._typesetter = Typesetter()
        self.forget()
        self.start()

    def forget(self) -> None:
        """Be as new, for the next test."""
        self.script: Callable[[dict[str, Any]], Script] = lambda body: Script()
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.key: str | None = None
        self.models: list[dict[str, Any]] = MODELS
        self.hold = threading.Event()
        self.left = threading.Event()  # a client went away in the middle of its answer

    def start(self) -> None:
        """Listen, the second time on the port of the first."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self._port))
        self._port = listener.getsockname()[1]
        app = Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route(TYPESET, self._typeset, methods=["POST"]),
                Route("/{name:path}", _page),
            ],
            middleware=[Middleware(Secured)],
        )
        config = uvicorn.Config(app, log_level="error", ws="none", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Go away, with every connection."""
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/"

    def _refusal(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return JSONResponse({"error": {"message": "an API key is needed"}}, 401)

    async def _models(self, request: Request) -> Response:
        return self._refusal(request) or JSONResponse({"object": "list", "data": self.models})

    async def _typeset(self, request: Request) -> Response:
        return self._refusal(request) or await self._typesetter(await request.body())

    async def _chat(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        body = await request.json()
        self.asked.append(body)
        self.headers.append(dict(request.headers))
        script = self.script(body)
        if script.status != 200:
            error = {"error": {"message": script.error}}
            return JSONResponse(error, script.status, headers=script.headers)
        return StreamingResponse(self._stream(script), media_type="text/event-stream")

    async def _stream(self, script: Script) -> AsyncIterator[str]:
        def event(value: Any) -> str:
            return f"data: {json.dumps(value)}\n\n"

        def delta(content: str | None, finish: str | None = None) -> str:
            piece = {} if content is None else {"content": content}
            return event({"choices": [{"index": 0, "delta": piece, "finish_reason": finish}]})

        hold, left = self.hold, self.left
        try:
            yield event({"choices": [{"index": 0, "delta": {"role": "assistant"}}]})
            for piece in script.pieces:
                if isinstance(piece, Hold):
                    while not hold.is_set():
                        await asyncio.sleep(0.01)
                elif isinstance(piece, Raw):
                    yield piece.data
                else:
                    yield delta(piece)
                    await asyncio.sleep(0)
        except asyncio.CancelledError:
            left.set()
            raise
        if script.error is not None:
            yield event({"error": {"message": script.error}})
            return
        if script.finish is None:
            return
        yield delta(None, script.finish)
        tokens = script.completion_tokens
        tokens = sum(isinstance(p, str) for p in script.pieces) if tokens is None else tokens
        usage = {
            "prompt_tokens": script.prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": script.prompt_tokens + tokens,
            "prompt_tokens_details": {"cached_tokens": 3},
        }
        yield event({"choices": [], "usage": usage})
        yield "data: [DONE]\n\n"


@contextmanager
def stand_in() -> Iterator[Room]:
    room = Room()
    try:
        yield room
    finally:
        room.hold.set()
        room.stop()


@contextmanager
def real_server() -> Iterator[str]:
    """The real one on the demo model; skips where that is not installed. Yields its address."""
    try:
        demo_path()
    except CheckpointError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-m", "mlx_cerebrum.server", "--model", "demo", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"http://\S+", server.stdout.readline())
            assert found
            yield f"{found[0]}/"
        finally:
            server.terminate()
            server.communicate(timeout=30)


def browser_path() -> str:
    """An installed Chromium or Chrome; skips where there is none, but fails in CI."""
    for name in (*BROWSERS, *MAC_BROWSERS):
        if found := shutil.which(name):
            return found
    missing = "no Chromium or Chrome is installed here to look at the page with"
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)


@contextmanager
def browser() -> Iterator[Browser]:
    path = browser_path()
    with pytest.MonkeyPatch.context() as environment, ExitStack() as stack:
        # The BLAS that `make test` loads for MLX hangs a browser that inherits it.
        environment.delenv("LD_PRELOAD", raising=False)
        playwright = stack.enter_context(sync_playwright())
        environment.undo()
        launched = playwright.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield launched
        finally:
            launched.close()


WATCH = """
window.reports = [];
addEventListener("securitypolicyviolation", (event) => reports.push(event.violatedDirective));
"""


class Watched:
    """A page, and everything it did that it must not do."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.origin = url
        self.outside: list[str] = []
        self.faults: list[str] = []
        context.add_init_script(WATCH)
        context.on("request", self._request)
        context.on("weberror", lambda error: self.faults.append(str(error.error)))
        context.on("dialog", self._dialog)
        context.set_default_timeout(8000)
        self.context = context

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self.origin, "data:", "blob:")):
            self.outside.append(request.url)

    def _dialog(self, dialog: Dialog) -> None:
        self.faults.append(dialog.message)
        dialog.dismiss()

    def check(self) -> None:
        """Fail for an outside request, an uncaught error, a dialog, or a policy's report."""
        for page in self.context.pages:
            self.faults += page.evaluate("window.reports ?? []")
        assert self.outside == []
        assert self.faults == [], self.faults


@contextmanager
def visit(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """A fresh context with the page open; what it did is checked at the end."""
    context = browser.new_context(**options)
    watched = Watched(context, url)
    try:
        page = context.new_page()
        page.goto(url)
        page.wait_for_selector("#model-0 option", state="attached")
        yield page
        watched.check()
    finally:
        context.close()
