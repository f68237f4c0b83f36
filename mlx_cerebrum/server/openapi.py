"""The OpenAPI document: of every route, the body it takes and what it answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from mlx_cerebrum import __version__
from mlx_cerebrum.server.answers import Error

Json = dict[str, Any]
_REFERENCE = "#/components/schemas/{model}"
_ERRORS = {
    400: "A parameter is wrong, or can't be honoured",
    401: "The API key is missing or wrong",
    403: "This Host or Origin may not ask",
    404: "No such model",
    409: "The model can't be loaded now",
    408: "The body did not arrive in time",
    413: "The body is too large",
    415: "The body must be application/json",
    429: "The queue is full; Retry-After says when to try again",
    500: "The server failed",
    503: "The server is shutting down",
}
_OF_ALL = (401, 403, 500, 503)


@dataclass(frozen=True)
class Operation:
    """What a path does.

    body: what it takes, by POST; None: nothing, by GET. streams: whether its answer may come in
    pieces. errors: the statuses it may have besides those of every GET, or every POST.
    """

    path: str
    summary: str
    answer: type[BaseModel]
    body: type[BaseModel] | None = None
    streams: bool = False
    errors: Sequence[int] = ()


def document(operations: Sequence[Operation]) -> Json:
    """OpenAPI 3.1's description of these."""
    taken: list[type[BaseModel]] = [of.body for of in operations if of.body]
    given: list[type[BaseModel]] = [Error, *(of.answer for of in operations)]
    mode: Literal["validation"] = "validation"
    kinds = dict.fromkeys([*taken, *given])
    _, found = models_json_schema([(kind, mode) for kind in kinds], ref_template=_REFERENCE)
    paths: dict[str, Json] = {}
    for of in operations:
        paths[of.path] = {"get" if of.body is None else "post": _described(of)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "mlx-cerebrum", "version": __version__},
        "paths": paths,
        "components": {"schemas": found["$defs"]},
    }


def _described(of: Operation) -> Json:
    content = _json(of.answer)
    if of.streams:
        content["text/event-stream"] = {}  # a schema would be taken for that of each event
    common = _ERRORS.keys() - {409} if of.body else set(_OF_ALL)
    statuses = {status: _ERRORS[status] for status in sorted(common | set(of.errors))}
    responses: Json = {"200": {"description": "The answer", "content": content}}
    for status, text in statuses.items():
        responses[str(status)] = {"description": text, "content": _json(Error)}
    described: Json = {"summary": of.summary, "responses": responses}
    if of.body is not None:
        described["requestBody"] = {"required": True, "content": _json(of.body)}
    names = [part[1:-1] for part in of.path.split("/") if part.startswith("{")]
    if names:
        described["parameters"] = [_in_path(name) for name in names]
    return described


def _in_path(name: str) -> Mapping[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _json(kind: type[BaseModel]) -> Json:
    return {"application/json": {"schema": {"$ref": _REFERENCE.format(model=kind.__name__)}}}
