"""Who may ask: the checks that come before anything of a request is read.

A local server is reachable by every page the browser has open. Three things stand against
them: the Host must be ours (a page whose name was made to resolve to this machine, "DNS
rebinding", has another), the Origin must be the page we served or one that was allowed, and
bodies must be JSON by their Content-Type, which a page can't send elsewhere without a preflight.
"""

import hmac
import ipaddress
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from hashlib import sha256

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_cerebrum.server.faults import ApiError
from mlx_cerebrum.server.ignored import HEADER as IGNORED

CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "Content-Security-Policy": CONTENT_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-DNS-Prefetch-Control": "off",  # a link in an answer is no reason to look a name up
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
OWNER = "cerebrum.owner"  # in an ASGI scope: whose request it is, "" without a key

_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s:\[\]/@]+)(?::\d{1,5})?")
_HEADER_NAMES = re.compile(r"[\w!#$%&'*+.^`|~, -]{0,1000}", re.ASCII)


@dataclass(frozen=True)
class Rules:
    """Whom to let in.

    public: whether a path needs no key (the page and /health).
    hosts: names to answer to besides loopback ones, without ports, in lower case.
    origins: of pages elsewhere that may call, as browsers write them.
    """

    public: Callable[[str], bool]
    api_key: str | None = None
    hosts: Collection[str] = ()
    origins: Collection[str] = ()


class Guard:
    """ASGI middleware: refuses what the rules do not allow, and adds the security headers."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self._app, self._rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        extra = dict(SECURITY_HEADERS)
        if self._rules.origins:
            extra["Vary"] = "Origin"

        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(extra)
            await send(message)

        app = self._app
        try:
            self._check_host(headers, scope.get("server"))
            extra |= self._check_origin(headers, scope["path"])
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                app = _preflight(headers)
            else:
                scope[OWNER] = self._check_key(headers, scope["path"])
        except ApiError as refused:
            app = refused.response
        await app(scope, receive, secured)

    def _check_host(self, headers: Headers, server: tuple[str, int | None] | None) -> None:
        """The Host must be a loopback name or address, the address that was connected to, or a
        name that was allowed."""
        given = headers.getlist("host")
        match = _HOST.fullmatch(given[0]) if len(given) == 1 else None
        host = match[1].strip("[]").lower() if match else ""
        if not (
            host == "localhost"
            or is_loopback(host)
            or host in self._rules.hosts
            or (server is not None and same_address(host, server[0]))
        ):
            message = (
                "this Host is not one the server answers to; start it with --allowed-host NAME"
            )
            raise ApiError(403, message, code="host_not_allowed")

    def _check_origin(self, headers: Headers, path: str) -> Mapping[str, str]:
        """The CORS headers that the answer needs. Raises ApiError for a page that may not ask."""
        given = headers.getlist("origin")
        if len(given) == 1 and given[0] in self._rules.origins:
            return {
                "Access-Control-Allow-Origin": given[0],
                "Access-Control-Expose-Headers": f"X-Request-Id, Retry-After, {IGNORED}",
            }
        foreign = given and given != [f"http://{headers['host']}"]
        # Without an Origin: images, scripts and the like of a page elsewhere.
        if foreign or (not given and path != "/" and headers.get("sec-fetch-site") == "cross-site"):
            message = "pages of other sites may not ask; to allow one: --cors-origin ORIGIN"
            raise ApiError(403, message, code="origin_not_allowed")
        return {}

    def _check_key(self, headers: Headers, path: str) -> str:
        """Whose request it is. Raises ApiError without the right key, where one is needed."""
        key = self._rules.api_key
        if key is None or self._rules.public(path):
            return ""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), key.encode())
        if scheme.lower() != "bearer" or not right:
            what = "this key is not the server's" if given else "an API key is needed"
            message = f"{what}: send it as Authorization: Bearer KEY"
            challenge = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, message, code="invalid_api_key", headers=challenge)
        return sha256(key.encode()).hexdigest()[:16]


def _preflight(headers: Headers) -> Response:
    """The answer to what a browser asks first for a page elsewhere: which methods and headers it
    may use. The headers that allow its origin are added only for one that is allowed."""
    allowed = {"Access-Control-Max-Age": "600"}
    allowed["Access-Control-Allow-Methods"] = "GET, POST"
    asked = headers.get("access-control-request-headers", "")
    if _HEADER_NAMES.fullmatch(asked):
        allowed["Access-Control-Allow-Headers"] = asked
    return Response(status_code=204, headers=allowed)


def parsed(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a host is written as; an IPv4 one where IPv6 only wraps it (a socket
    for every address sees clients so)."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def is_loopback(host: str) -> bool:
    address = parsed(host)
    return address is not None and address.is_loopback


def same_address(one: str, other: str) -> bool:
    address = parsed(one)
    return address is not None and address == parsed(other)


def check_key(key: str) -> None:
    """Raise ValueError for a key that no header could carry."""
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError("an API key must be printable ASCII without spaces, and not empty")
