"""One request to a server: how it is asked, what came back and when, and what is wrong with that.

A bench of a server must see what is really sent, and when; and it must be rude on purpose: hang
up in the middle, read slowly, send what is no JSON. So no client library stands between.
"""

import json
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any

from mlx_cerebrum.errors import CerebrumError

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_SILENCE = 600.0  # seconds of it that a client bears
_HANG_UP = struct.pack("ii", 1, 0)  # SO_LINGER: no goodbye, as from a killed process


@dataclass(frozen=True)
class Question:
    """A request, and how its client behaves; if nothing else is said, well."""

    body: dict[str, Any]
    path: str = CHAT
    kind: str = ""  # of `bench.server_mix.KINDS`
    name: str = ""  # of a question whose answer is always the same text
    then: tuple[str, ...] = ()  # what the user says after each answer
    malformed: bytes | None = None  # sent instead of the body; it must be refused
    leave_after: int | None = None  # events, and then the client hangs up
    leave_within: float | None = None  # seconds, however many events came
    pause: float = 0.0  # seconds between one event read and the next
    buffer: int | None = None  # bytes that its side of the connection takes unread

    @property
    def n(self) -> int:
        return int(self.body.get("n", 1))

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def data(self) -> bytes:
        return json.dumps(self.body).encode() if self.malformed is None else self.malformed


# How many tokens a question's prompt has.
Count = Callable[[Question], int]


@dataclass
class Choice:
    text: str = ""
    finish: str | None = None
    times: list[float] = field(default_factory=list)  # when pieces of its text came


@dataclass
class Heard:
    """An answer put together, and all that is wrong with it. Times are of `time.perf_counter`."""

    sent: float  # when it was asked for
    choices: list[Choice]
    status: int = 0
    retry_after: float = 1.0  # seconds
    usage: dict[str, Any] | None = None
    left: bool = False  # the client hung up
    faults: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> dict[str, int]:
        """By the server's own count; cached: of the prompt, known from earlier ones."""
        usage = self.usage or {}
        details = usage.get("prompt_tokens_details") or {}
        return {
            "prompt": usage.get("prompt_tokens", 0),
            "completion": usage.get("completion_tokens", 0),
            "cached": details.get("cached_tokens") or 0,
        }

    @property
    def first(self) -> float | None:
        """When the first piece of text came."""
        return min((choice.times[0] for choice in self.choices if choice.times), default=None)


def ask(address: str, asked: Question, count: Count | None = None) -> Heard:
    """Ask host:port, and check the answer as far as the client reads it. Never raises for what
    the server or the network does: that is a fault."""
    heard = Heard(time.perf_counter(), [Choice() for _ in range(asked.n)])
    connection = HTTPConnection(address, timeout=asked.leave_within or _SILENCE)
    response: HTTPResponse | None = None
    try:
        connection.connect()
        if asked.buffer is not None:
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, asked.buffer)
        if asked.leave_after is not None or asked.leave_within is not None:
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _HANG_UP)
        connection.request("POST", asked.path, asked.data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        heard.status = response.status
        heard.retry_after = float(response.headers.get("Retry-After", 1))
        _read(asked, response, heard)
        if asked.malformed is None and not heard.left and not heard.faults:
            _check(asked, heard, count)
    except TimeoutError:
        heard.left = asked.leave_within is not None
        if not heard.left:
            heard.faults.append(f"silent for {_SILENCE:.0f} s")
    except (OSError, HTTPException) as error:
        heard.faults.append(f"{type(error).__name__}: {str(error)[:100]}")
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        heard.faults.append(f"misshapen: {type(error).__name__}: {str(error)[:100]}")
    finally:
        if response is not None:
            response.close()  # it may hold the socket alone
        connection.close()
    return heard


def get(address: str, path: str) -> str:
    """The body of a GET. Raises CerebrumError where it fails."""
    with closing(HTTPConnection(address, timeout=60)) as connection:
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            text = response.read().decode()
        except (OSError, HTTPException) as error:
            raise CerebrumError(f"GET {path}: {type(error).__name__}: {error}") from None
    if response.status != 200:
        raise CerebrumError(f"GET {path}: status {response.status}")
    return text


def _read(asked: Question, response: HTTPResponse, heard: Heard) -> None:
    if asked.malformed is not None and 400 <= heard.status < 500:
        error = json.loads(response.read())["error"]
        if not isinstance(error["message"], str) or not error["type"]:
            heard.faults.append(f"status {heard.status} without an error's message and type")
    elif asked.malformed is not None or heard.status != 200:
        text = response.read()[:200].decode(errors="replace")
        heard.faults.append(f"status {heard.status} for {asked.data[:60]!r}: {text}")
    elif not asked.streams:
        _put_together(asked, [json.loads(response.read())], heard)
    elif (kind := response.headers.get_content_type()) != "text/event-stream":
        heard.faults.append(f"a stream of type {kind}")
    else:
        _put_together(asked, _events(response), heard)


def _events(response: HTTPResponse) -> Iterator[Any]:
    """The data of each server-sent event. Raises ValueError for what is no whole stream."""
    rest, ended = b"", False
    # Its own readline takes a connection that ends between two chunks for a body's end.
    while data := response.read1(4096):
        *events, rest = (rest + data).split(b"\n\n")
        for event in events:
            if event.startswith(b":"):  # a comment
                continue
            if ended or not event.startswith(b"data:"):
                raise ValueError(f"{event[:40]!r} is no event, or after the last")
            ended = event.split() == [b"data:", b"[DONE]"]
            if not ended:
                yield json.loads(event[5:])
    if rest or not ended:
        raise ValueError("the stream has no [DONE] as its last event")


def _put_together(asked: Question, events: Iterable[Any], heard: Heard) -> None:
    """Of a stream's events, or of the only one that an answer in one piece is."""
    ids, part = set(), "delta" if asked.streams else "message"
    for number, event in enumerate(events, 1):
        when = time.perf_counter()
        if "error" in event:
            heard.faults.append(f"error in the stream: {str(event['error'])[:100]}")
            return
        ids.add((event["id"], event["model"]))
        heard.usage = event.get("usage") or heard.usage
        for found in event["choices"]:
            choice = heard.choices[found["index"]]
            piece = (found[part].get("content") or "") if asked.path == CHAT else found["text"]
            if choice.finish is not None:
                heard.faults.append("more after a finish reason")
            if piece and asked.streams:
                choice.times.append(when)
            choice.text += piece
            choice.finish = found.get("finish_reason")
        late = asked.leave_within is not None and when - heard.sent > asked.leave_within
        if number == asked.leave_after or late:
            heard.left = True
            return
        if asked.pause:
            time.sleep(asked.pause)
    if len(ids) != 1 or {model for _, model in ids} != {asked.body["model"]}:
        heard.faults.append("it names several answers, or another model")
    options = asked.body.get("stream_options") or {}
    wanted = not asked.streams or bool(options.get("include_usage"))
    if wanted != (heard.usage is not None):
        heard.faults.append("no usage" if wanted else "a usage that nobody asked for")


def _check(asked: Question, heard: Heard, count: Count | None) -> None:
    """What holds of every right answer: finish reasons, stop strings, counts of tokens."""
    finishes = [choice.finish for choice in heard.choices]
    if not set(finishes) <= {"stop", "length"}:
        heard.faults.append(f"finish reasons {finishes}")
    stop = asked.body.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if any(stop in choice.text for stop in stops for choice in heard.choices):
        heard.faults.append("a text goes on past a stop string")
    if heard.usage is None:
        return
    prompt, said, total = (
        heard.usage[f"{key}_tokens"] for key in ("prompt", "completion", "total")
    )
    if count is not None and prompt != (known := count(asked)):
        heard.faults.append(f"usage: {prompt} prompt tokens, not {known}")
    if total != prompt + said:
        heard.faults.append(f"usage: {prompt} and {said} are not {total}")
    limit = asked.body["max_tokens"]
    if not max(1, finishes.count("length") * limit) <= said <= asked.n * limit:
        heard.faults.append(f"usage: {said} tokens for finish reasons {finishes}")
    if not 0 <= heard.tokens["cached"] < max(1, prompt):
        heard.faults.append(f"usage: {heard.tokens['cached']} cached of {prompt} prompt tokens")
