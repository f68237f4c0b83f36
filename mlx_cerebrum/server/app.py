"""The web application: routes, and the layers around them."""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.server import faults, page_files
from mlx_cerebrum.server.answers import (
    ChatCompletion,
    DrawnBy,
    Health,
    Layout,
    ModelCard,
    ModelList,
    ShelfList,
    ShelfModel,
    TextCompletion,
)
from mlx_cerebrum.server.bodies import parse_body
from mlx_cerebrum.server.connections import Patience, Room
from mlx_cerebrum.server.faults import ApiError
from mlx_cerebrum.server.ignored import Ignored
from mlx_cerebrum.server.intake import Accepted, Defaults, Intake
from mlx_cerebrum.server.jobs import BusyError, ClosedError, Engine, Failed
from mlx_cerebrum.server.journal import ID, Journal
from mlx_cerebrum.server.menu import LoadRequest, Menu
from mlx_cerebrum.server.metrics import Metrics
from mlx_cerebrum.server.openapi import Operation, document
from mlx_cerebrum.server.responses import ResponseObject, ResponsesRequest, ResponsesShape
from mlx_cerebrum.server.schema import ChatRequest, CompletionRequest, Drawn
from mlx_cerebrum.server.security import OWNER, Guard, Rules
from mlx_cerebrum.server.shapes import ChatShape, Head, Shape, TextShape
from mlx_cerebrum.server.spelling import Spelling
from mlx_cerebrum.server.streaming import (
    GONE,
    MOST_PENDING,
    RunningRequest,
    StreamResponse,
    WholeResponse,
)
from mlx_cerebrum.server.tokens import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from mlx_cerebrum.server.typesetting import PATH as TYPESET
from mlx_cerebrum.server.typesetting import Typesetter
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer

API = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/tokenize",
    "/v1/detokenize",
    "/v1/models",
    "/shelf",
    "/shelf/load",
    "/health",
    "/metrics",
)
Taken = TypeVar("Taken", bound=Drawn)
Endpoint = Callable[[Request], Awaitable[Response]]


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
        spelling = Spelling(tokenizer)
        self._intake = Intake(tokenizer, spelling, layouts, dtype, self.settings.defaults)
        self._menu: Menu | None = None
        self._ignored = Ignored()
        self._metrics = Metrics(engine)
        self._typesetter = Typesetter()
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

    def use(self, menu: Menu) -> None:
        """Let clients see the shelf, and load from it."""
        self._menu, self._intake.also = menu, menu.meant

    def serve(
        self, name: str, model: Mapping[str, int | None], tokenizer: Tokenizer, dtype: str
    ) -> None:
        """Take requests for one more model of the engine's. From any thread."""
        layouts = {name: Layout.model_validate(model)}
        self._intake.add(tokenizer, Spelling(tokenizer), layouts, dtype)

    def _routes(self) -> Starlette:
        operations = {
            Operation(
                "/v1/chat/completions",
                "Answer a conversation",
                ChatCompletion,
                ChatRequest,
                streams=True,
            ): self._chat,
            Operation(
                "/v1/completions",
                "Continue texts",
                TextCompletion,
                CompletionRequest,
                streams=True,
            ): self._completion,
            Operation(
                "/v1/responses",
                "Answer, by OpenAI's newer API",
                ResponseObject,
                ResponsesRequest,
                streams=True,
            ): self._responses,
            Operation(
                "/v1/tokenize", "A text's token ids", Tokenized, TokenizeRequest
            ): self._tokenize,
            Operation(
                "/v1/detokenize", "The text of token ids", Detokenized, DetokenizeRequest
            ): self._detokenize,
            Operation("/v1/models", "The models", ModelList): self._models,
            Operation("/v1/models/{model}", "One model", ModelCard, errors=(404,)): self._model,
            Operation("/shelf", "The models on the shelf", ShelfList, errors=(404,)): self._shelf,
            Operation(
                "/shelf/load",
                "Answer with one of them too",
                ShelfModel,
                LoadRequest,
                errors=(409,),
            ): self._load,
            Operation("/health", "Whether requests are taken", Health): self._health,
        }
        described = cache(lambda: document(list(operations)))  # few ask; the start need not wait

        async def openapi(_: Request) -> Response:
            return JSONResponse(described())

        # Clients whose base address lacks the /v1 find the same.
        routes = [
            Route(path, endpoint, methods=["GET" if of.body is None else "POST"])
            for of, endpoint in operations.items()
            for path in dict.fromkeys((of.path, of.path.removeprefix("/v1")))
        ]
        routes.append(Route("/openapi.json", openapi))
        routes.append(Route("/metrics", self._text_metrics))
        routes.append(Route(TYPESET, self._typeset, methods=["POST"]))
        app = Starlette(
            routes=[*routes, *page_files.routes(self._page)],
            exception_handlers={
                ApiError: _refused,
                HTTPException: _not_here,
                Exception: _failed,
            },
        )
        app.router.redirect_slashes = False
        return app

    async def _chat(self, request: Request) -> Response:
        accepted = await self._taken(request, partial(self._intake.talk, ChatRequest))
        asked = accepted.request
        head = self._head(accepted, "chatcmpl", asked.wants_usage, asked.return_token_ids)
        logprobs = bool(asked.logprobs)
        return self._answer(
            accepted, ChatShape(head, self._spelling(head), logprobs, accepted.calls)
        )

    async def _responses(self, request: Request) -> Response:
        accepted = await self._taken(request, partial(self._intake.talk, ResponsesRequest))
        head = self._head(accepted, "resp")
        asked, calls = accepted.request, accepted.calls is not None
        return self._answer(accepted, ResponsesShape(head, self._spelling(head), asked, calls))

    async def _completion(self, request: Request) -> Response:
        accepted = await self._taken(request, self._intake.completion)
        asked = accepted.request
        head = self._head(accepted, "cmpl", asked.wants_usage, asked.return_token_ids)
        echo = [job.prompt for job in accepted.jobs for _ in range(job.n) if job.echo]
        shape = TextShape(head, self._spelling(head), asked.logprobs is not None, echo)
        return self._answer(accepted, shape)

    async def _tokenize(self, request: Request) -> Response:
        return await self._at_once(request, self._intake.tokenize)

    async def _detokenize(self, request: Request) -> Response:
        return await self._at_once(request, self._intake.detokenize)

    async def _at_once(
        self, request: Request, answer: Callable[[bytes], tuple[BaseModel, str]]
    ) -> Response:
        """What needs no engine."""
        answered, ignored = await asyncio.to_thread(answer, await self._body(request))
        return _json(answered, self._ignored.headers(ignored))

    async def _typeset(self, request: Request) -> Response:
        return await self._typesetter(await self._body(request))

    async def _taken(
        self, request: Request, take: Callable[[bytes, str], Accepted[Taken]]
    ) -> Accepted[Taken]:
        """What a body asks for; slow for long prompts, so not on the event loop."""
        return await asyncio.to_thread(take, await self._body(request), request.scope[OWNER])

    def _head(
        self,
        accepted: Accepted[Any],
        prefix: str,
        usage: bool = False,
        prompts: bool | None = False,
    ) -> Head:
        jobs, model = accepted.jobs, accepted.jobs[0].model
        return Head(
            id=f"{prefix}{'_' if prefix == 'resp' else '-'}{secrets.token_hex(12)}",
            created=int(time.time()),
            model=model,
            system_fingerprint=self._intake.models[model].fingerprint,
            usage=usage,
            prompts=[job.prompt for job in jobs for _ in range(job.n)] if prompts else None,
        )

    def _spelling(self, head: Head) -> Spelling:
        return self._intake.models[head.model].spelling

    def _answer(self, accepted: Accepted[Any], shape: Shape) -> Response:
        asked, settings = accepted.request, self.settings
        try:
            running = RunningRequest(
                self.engine, accepted.jobs, self._metrics, self._failure, settings.most_pending
            )
        except ClosedError as error:
            raise faults.closed(str(error)) from None
        except BusyError as error:
            raise faults.queue_full(str(error)) from None
        except RequestError as error:
            raise ApiError(400, str(error), code="invalid_value") from None
        headers = self._ignored.headers(accepted.ignored)
        if not asked.stream:
            return WholeResponse(running, shape, headers)
        return StreamResponse(running, shape, headers, keep_alive=settings.keep_alive)

    def _failure(self, failed: Failed) -> ApiError:
        if failed.asked:  # not 500, after which clients ask again
            return ApiError(400, failed.message, code="invalid_value")
        if failed.unavailable:
            return faults.closed(failed.message)
        code = "shutting_down" if self.closing else "generation_failed"
        return ApiError(503 if self.closing else 500, failed.message, code=code)

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

    async def _models(self, _: Request) -> Response:
        return _json(ModelList(data=[self._card(name) for name in self._intake.models]))

    async def _model(self, request: Request) -> Response:
        asked = request.path_params["model"]
        return _json(self._card(await asyncio.to_thread(self._intake.find, asked)))

    def _card(self, name: str) -> ModelCard:
        layout = self._intake.models[name].layout
        max_tokens, drawn = self.settings.defaults.max_tokens, self.settings.defaults.sampling
        return ModelCard(
            id=name,
            created=self._started,
            context_length=layout.context_length,
            max_model_len=layout.context_length,
            cerebrum=layout,
            defaults=DrawnBy(
                max_tokens=max_tokens,
                temperature=drawn.temp,
                top_p=drawn.top_p,
                min_p=drawn.min_p,
            ),
        )

    async def _shelf(self, _: Request) -> Response:
        if self._menu is None:
            raise ApiError(404, "this server has no shelf", code="not_found")
        return _json(await asyncio.to_thread(self._menu.list))

    async def _load(self, request: Request) -> Response:
        asked = parse_body(LoadRequest, await self._body(request))
        if self._menu is None:
            raise ApiError(404, "this server has no shelf", code="not_found")
        try:
            return _json(await asyncio.to_thread(self._menu.load, asked.id))
        except ClosedError as error:
            raise faults.closed(str(error)) from None

    async def _health(self, _: Request) -> Response:
        if self.engine.closed:
            raise faults.closed("the engine takes no more requests")
        return _json(Health())

    async def _text_metrics(self, _: Request) -> Response:
        return Response(self._metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    def _route(self, path: str) -> str:
        """The name to count a path under: few, whatever clients ask for."""
        path = path if path in API else f"/v1{path}" if f"/v1{path}" in API else path
        if path.removeprefix("/v1").startswith("/models/"):
            return "/v1/models/{model}"
        return path if path in (*API, TYPESET) else "/" if path in self._page else "other"


def _json(value: BaseModel, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse(value.model_dump(mode="json"), headers=headers)


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
