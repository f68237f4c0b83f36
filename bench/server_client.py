"""Asking a server, and what came back with its times, by the standard library's HTTP alone.

A bench of a server must see what is really sent, and when; and it must be rude on purpose: hang
up in the middle, read slowly, send what is no JSON. So no client library stands between.
"""

import json
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any
from urllib.parse import urlsplit

from mlx_cerebrum.errors import CerebrumError, RequestError

END = "[DONE]"
_PIECE = 4096  # bytes read at once at most
_HANG_UP = struct.pack("ii", 1, 0)  # SO_LINGER: no goodbye, as from a killed process


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> "Address":
        """Raises RequestError for what is no http://host:port."""
        parts = urlsplit(url)
        try:
            port = parts.port or 80
        except ValueError:
            port = 0
        if parts.scheme != "http" or not parts.hostname or not port:
            raise RequestError(f"{url!r} is no address of a server; give http://HOST:PORT")
        return cls(parts.hostname, port)


@dataclass(frozen=True)
class Manner:
    """How a client behaves; as it stands here, well."""

    timeout: float = 600.0  # seconds of silence that it bears
    leave_after: int | None = None  # events, and then it hangs up
    leave_within: float | None = None  # seconds, however many events came
    pause: float = 0.0  # seconds between one event read and the next
    buffer: int | None = None  # bytes that its side of the connection takes unread


@dataclass
class Reply:
    """What came back. Times are of `time.perf_counter`."""

    asked: float = 0.0  # when the request was sent
    status: int = 0
    retry_after: float | None = None  # seconds
    kind: str = ""  # the content type
    events: list[tuple[float, Any]] = field(default_factory=list)  # a stream's, with their times
    ended: bool = False  # the stream's [DONE] came, and nothing after it
    body: Any = None  # of an answer that is no stream
    left: bool = False  # we hung up
    broken: str | None = None  # how the connection or the format failed
    finished: float = 0.0


def ask(
    address: Address, path: str, body: bytes | dict[str, Any], manner: Manner | None = None
) -> Reply:
    """POST `body` and read the answer to its end, or as far as `manner` says. Never raises for
    what the server or the network does: that is what a reply tells."""
    manner = manner or Manner()
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = Reply(asked=time.perf_counter())
    wait = manner.timeout if manner.leave_within is None else manner.leave_within
    connection = HTTPConnection(address.host, address.port, timeout=wait)
    response: HTTPResponse | None = None
    try:
        connection.connect()
        if manner.buffer is not None:
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, manner.buffer)
        if manner.leave_after is not None or manner.leave_within is not None:
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _HANG_UP)
        connection.request("POST", path, data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        _read(response, reply, manner)
    except TimeoutError:
        if manner.leave_within is None:
            reply.broken = f"silent for {wait:.0f} s"
        else:
            reply.left = True
    except (OSError, HTTPException, ValueError) as error:
        reply.broken = f"{type(error).__name__}: {str(error)[:100]}"
    finally:
        if response is not None:
            response.close()  # it may hold the socket alone
        connection.close()
        reply.finished = time.perf_counter()
    return reply


def get(address: Address, path: str, timeout: float = 10.0) -> str:
    """The body of a GET. Raises CerebrumError where it fails."""
    connection = HTTPConnection(address.host, address.port, timeout=timeout)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        text = response.read().decode()
    except (OSError, HTTPException, ValueError) as error:
        raise CerebrumError(f"GET {path}: {type(error).__name__}: {error}") from None
    finally:
        connection.close()
    if response.status != 200:
        raise CerebrumError(f"GET {path}: status {response.status}")
    return text


def raw(address: Address, data: bytes, timeout: float) -> int | None:
    """Send bytes that need not be HTTP, and no more of them. The status of the answer; None
    where the server closes, or is silent for `timeout` seconds (it may wait for the rest)."""
    with suppress(OSError), socket.create_connection((address.host, address.port), timeout) as s:
        s.sendall(data)
        s.settimeout(timeout)
        words = s.recv(64).split()
        if len(words) > 1 and words[0].startswith(b"HTTP/") and words[1].isdigit():
            return int(words[1])
    return None


def _read(response: HTTPResponse, reply: Reply, manner: Manner) -> None:
    reply.status = response.status
    reply.kind = response.headers.get_content_type()
    with suppress(ValueError):
        reply.retry_after = float(response.headers.get("Retry-After", ""))
    if reply.kind != "text/event-stream":
        text = response.read()
        with suppress(ValueError):
            reply.body = json.loads(text)
        return
    for data in _events(response):
        if reply.ended:
            raise ValueError(f"{data[:40]!r} after {END}")
        if data == END:
            reply.ended = True
            continue
        reply.events.append((time.perf_counter(), json.loads(data)))
        if _leaves(reply, manner):
            reply.left = True
            return
        if manner.pause:
            time.sleep(manner.pause)


def _leaves(reply: Reply, manner: Manner) -> bool:
    if len(reply.events) == manner.leave_after:
        return True
    within = manner.leave_within
    return within is not None and time.perf_counter() - reply.asked > within


def _events(response: HTTPResponse) -> Iterator[str]:
    """The data of each server-sent event; comments are passed over."""
    data: list[str] = []
    for line in _lines(response):
        text = line.decode().rstrip("\r")
        if not text and data:
            yield "\n".join(data)
            data = []
        elif text.startswith("data:"):
            data.append(text.removeprefix("data:").removeprefix(" "))
        elif text and not text.startswith(":"):
            raise ValueError(f"{text[:40]!r} is no line of an event stream")
    if data:
        raise ValueError("the stream ends within an event")


def _lines(response: HTTPResponse) -> Iterator[bytes]:
    # Its own readline takes a connection that ends between two chunks for a body's end.
    rest = b""
    while data := response.read1(_PIECE):
        *lines, rest = (rest + data).split(b"\n")
        yield from lines
    if rest:
        yield rest
