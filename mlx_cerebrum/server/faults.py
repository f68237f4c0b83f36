"""What a client is told when a request can't be served: OpenAI's error bodies."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class ApiError(Exception):
    """A request that ends with an error; `param` names what is at fault, where one thing is."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        kind = _KINDS.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, headers=self.headers)


def queue_full(message: str) -> ApiError:
    return ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": "2"})


def closing() -> ApiError:
    message = "the server is shutting down; it takes no more requests"
    return ApiError(503, message, code="shutting_down", headers={"Retry-After": "10"})


def closed(message: str) -> ApiError:
    return ApiError(503, message, code="unavailable", headers={"Retry-After": "10"})


def internal(request_id: str) -> ApiError:
    """A fault of the server itself. The client is not told what; the log says it."""
    return ApiError(500, f"the server failed (request {request_id})", code="internal_error")
