"""The web application: routes, and the layers around them."""

import asyncio
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from mlx_cerebrum import __version__
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.server import faults, page_files
from mlx_cerebrum.server.answers import (
    ApiObject,
    ChatCompletion,
    ChatShape,
    Error,
    Head,
    Health,
    Layout,
    ModelCard,
    ModelList,
    Shape,
    Spelling,
    TextCompletion,
    TextShape,
    streamed,
)
from mlx_cerebrum.server.connections import Patience, Room
from mlx_cerebrum.server.faults import ApiError
from mlx_cerebrum.server.intake import Defaults, Intake
from mlx_cerebrum.server.jobs import BusyError, ClosedError, Engine, Job
from mlx_cerebrum.server.journal import ID, Journal
from mlx_cerebrum.server.metrics import Metrics
from mlx_cerebrum.server.schema import ChatRequest, CompletionRequest, Sampled
from mlx_cerebrum.server.security import OWNER, Guard, Rules
from mlx_cerebrum.server.streaming import (
    GONE,
    MOST_PENDING,
    RunningRequest,
    StreamResponse,
    WholeResponse,
)
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer

API = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics")
Responses = dict[int | str, dict[str, Any]]
_ERRORS: Responses = {
    400: {"description": "A parameter is wrong, or can't be honoured"},
    401: {"description": "The API key is missing or wrong"},
    403: {"description": "This Host or Origin may not ask"},
    404: {"description": "No such model"},
    408: {"description": "The body did not arrive in time"},
    413: {"description": "The body is too large"},
    415: {"description": "The body must be application/json"},
    429: {"description": "The queue is full; Retry-After says when to try again"},
    500: {"description": "The server failed"},
    503: {"description": "The server is shutting down"},
}


@dataclass(frozen=True)
class Settings:
    """What the command line decides. Sizes in bytes, times in seconds."""

    api_key: str | None = None
    allowed_hosts: Collection[str] = ()
    cors_origins: Collection[str] = ()
    max_body: int = 2_000_000
    keep_alive: float = 5.0  # seconds of silence in a stream before a comment is sent
    most_pending: int = MOST_PENDING
    room: Room = field(default_factory=Room)
    patience: Patience = field(default_factory=Patience)
    defaults: Defaults = field(default_factory=Defaults)
    log: bool = False
    debug: bool = False
    page: Path = page_files.FOLDER


class Service:
    """All that stands between the engine and HTTP; `app` is the ASGI application.

    models: each one's `views.describe`, the one to use by default first. Setting `closing`
    refuses what comes from then on.
    """

    def __init__(
        self,
        engine: Engine,
        models: Mapping[str, Mapping[str, int | None]],
        tokenizer: Tokenizer,
        settings: Settings | None = None,
        dtype: str = "float32",
    ) -> None:
        self.engine = engine
        self.settings = Settings() if settings is None else settings
        self.closing = False
        self._started = int(time.time())
        layouts = {name: Layout.model_validate(model) for name, model in models.items()}
        self._intake = Intake(tokenizer, layouts, dtype, self.settings.defaults)
        self._spelling = Spelling(tokenizer)
        self._metrics = Metrics(engine)
        self._page = page_files.files(self.settings.page)
        rules = Rules(
            public=lambda path: path == "/health" or path in self._page,
            api_key=self.settings.api_key,
            hosts={host.lower() for host in self.settings.allowed_hosts},
            origins=self.settings.cors_origins,
        )
        self.app: ASGIApp = Journal(
            Guard(self._routes(), rules),
            self._metrics,
            self._route,
            lambda: self.closing,
            self.settings.room.posts,
            log=self.settings.log,
            debug=self.settings.debug,
        )

    def _routes(self) -> FastAPI:
        # No /docs and /redoc: they would fetch their scripts from elsewhere.
        app = _Application(
            title="mlx-cerebrum",
            version=__version__,
            docs_url=None,
            redoc_url=None,
            redirect_slashes=False,
        )
        app.add_exception_handler(ApiError, _refused)
        app.add_exception_handler(HTTPException, _not_here)
        app.add_exception_handler(Exception, _failed)
        errors: Responses = {status: of | {"model": Error} for status, of in _ERRORS.items()}
        common: Responses = {status: errors[status] for status in (401, 403, 500, 503)}

        def get(path: str, kind: type[ApiObject], endpoint: Callable[..., Any], *more: int) -> None:
            found: Responses = common | {status: errors[status] for status in more}
            app.add_api_route(path, endpoint, response_model=kind, responses=found)
            app.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)

        def post(path: str, asked: type[Sampled], kind: type[ApiObject], endpoint: Any) -> None:
            extra = {"requestBody": {"required": True, "content": _json_of(asked)}}
            found: Responses = {200: streamed(kind), **errors}
            app.add_api_route(
                path, endpoint, methods=["POST"], responses=found, openapi_extra=extra
            )

        post("/v1/chat/completions", ChatRequest, ChatCompletion, self._chat)
        post("/v1/completions", CompletionRequest, TextCompletion, self._completion)
        get("/v1/models", ModelList, self._models)
        get("/v1/models/{model}", ModelCard, self._model, 404)
        get("/health", Health, self._health)
        app.add_route("/metrics", self._text_metrics, include_in_schema=False)
        app.router.routes.extend(page_files.routes(self._page))
        return app

    async def _chat(self, request: Request) -> Response:
        body = await self._body(request)
        asked, jobs = await asyncio.to_thread(self._intake.chat, body, request.scope[OWNER])
        shape = ChatShape(self._head(asked, jobs, "chatcmpl"), self._spelling, bool(asked.logprobs))
        return self._answer(asked, jobs, shape)

    async def _completion(self, request: Request) -> Response:
        body = await self._body(request)
        asked, jobs = await asyncio.to_thread(self._intake.completion, body, request.scope[OWNER])
        head = self._head(asked, jobs, "cmpl")
        echo = [job.prompt for job in jobs for _ in range(job.n) if job.echo]
        shape = TextShape(head, self._spelling, asked.logprobs is not None, echo)
        return self._answer(asked, jobs, shape)

    def _head(self, asked: Sampled, jobs: list[Job], prefix: str) -> Head:
        model = jobs[0].model
        return Head(
            id=f"{prefix}-{secrets.token_hex(12)}",
            created=int(time.time()),
            model=model,
            system_fingerprint=self._intake.fingerprints[model],
            usage=asked.wants_usage,
        )

    def _answer(self, asked: Sampled, jobs: list[Job], shape: Shape) -> Response:
        settings = self.settings
        try:
            running = RunningRequest(
                self.engine, jobs, self._metrics, self._failure, settings.most_pending
            )
        except ClosedError as error:
            raise faults.closed(str(error)) from None
        except BusyError as error:
            raise faults.queue_full(str(error)) from None
        except RequestError as error:
            raise ApiError(400, str(error), code="invalid_value") from None
        if not asked.stream:
            return WholeResponse(running, shape)
        return StreamResponse(
            running, shape, usage=asked.wants_usage, keep_alive=settings.keep_alive
        )

    def _failure(self, message: str) -> ApiError:
        code = "shutting_down" if self.closing else "generation_failed"
        return ApiError(503 if self.closing else 500, message, code=code)

    async def _body(self, request: Request) -> bytes:
        """The request's JSON, read no further than the largest allowed."""
        kinds = request.headers.getlist("content-type")
        if len(kinds) != 1 or kinds[0].partition(";")[0].strip().lower() != "application/json":
            message = "the body must be JSON, sent as Content-Type: application/json"
            raise ApiError(415, message, code="unsupported_media_type")
        most = self.settings.max_body
        too_large = ApiError(413, f"the body is larger than {most} bytes", code="request_too_large")
        length = request.headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length[:20]) > most:
            raise too_large
        body = bytearray()
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise too_large
        except ClientDisconnect:
            request.scope[GONE] = True
            raise ApiError(400, "the body ends early") from None
        return bytes(body)

    async def _models(self) -> ModelList:
        return ModelList(data=[self._card(name) for name in self._intake.layouts])

    async def _model(self, model: str) -> ModelCard:
        return self._card(self._intake.find(model))

    def _card(self, name: str) -> ModelCard:
        return ModelCard(id=name, created=self._started, cerebrum=self._intake.layouts[name])

    async def _health(self) -> Health:
        if self.engine.closed:
            raise faults.closed("the engine takes no more requests")
        return Health()

    async def _text_metrics(self, _: Request) -> Response:
        return Response(self._metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    def _route(self, path: str) -> str:
        """The name to count a path under: few, whatever clients ask for."""
        if path.startswith("/v1/models/"):
            return "/v1/models/{model}"
        return path if path in API else "/" if path in self._page else "other"


class _Application(FastAPI):
    """Its OpenAPI document fits routes that read and check bodies themselves: it has the bodies'
    schemas, and not the error that FastAPI's own check would give."""

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for kind in (ChatRequest, CompletionRequest):
            schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= {**schema.pop("$defs", {}), kind.__name__: schema}
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        return document


def _json_of(kind: type[Sampled]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}


async def _refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.response


async def _failed(request: Request, _: Exception) -> JSONResponse:
    """What the client sees of a fault; the journal gets it too."""
    return faults.internal(request.scope[ID]).response


async def _not_here(_: Request, error: Exception) -> JSONResponse:
    """404 and 405 of the router itself."""
    assert isinstance(error, HTTPException)
    messages = {404: "there is nothing at this path", 405: "this path takes another method"}
    message = messages.get(error.status_code, error.detail)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    return ApiError(error.status_code, message, code=code, headers=error.headers).response
