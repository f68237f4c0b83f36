"""Connections: how long each may take, how many there may be, and which go when all are taken.

A connection costs a file and memory before anybody knows whose it is. So one that waits (for the
rest of a request, for the next one, for a client that does not read) has a deadline, and is the
first to go when there is no room: the oldest, of the address that has most of them. One whose
request is there and being answered is never dropped for another's sake.
"""

from asyncio import AbstractEventLoop, Transport
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from http import HTTPStatus
from ipaddress import IPv6Address
from sys import exception
from typing import Any

from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from mlx_cerebrum.files.open_files import raise_limit
from mlx_cerebrum.server import faults
from mlx_cerebrum.server.faults import ApiError
from mlx_cerebrum.server.security import parsed

HEAD_BYTES = 32_768  # of a request's line and headers, at most
AT_ONCE = 16  # connections accepted in one turn of the event loop
_OTHER_FILES = 80  # weights being read, modules, what is accepted and not yet counted
_LEAST_FILES = 128
_SPARE = 16  # connections that no POST may take: for /health and the page
_STEP = 0.5  # seconds that pass at most between two looks, however long the process stood still


@dataclass(frozen=True)
class Patience:
    """Seconds to wait for a client. The time for which the process is stopped (Ctrl-Z, a machine
    asleep) does not count: what came meanwhile is read first."""

    head: float = 10.0  # for a request's head, from the connection's start
    idle: float = 15.0  # for the next one's, from the end of an answer
    body: float = 60.0  # for a body, from its head
    unread: float = 60.0  # while none of what was sent is taken
    leave: float = 2.0  # for a client that was refused to read why


@dataclass(frozen=True)
class Room:
    """Connections at most."""

    all: int = 1000
    bodies: int = 250  # of them with a body on its way: each can be as large as is allowed

    @property
    def address(self) -> int:
        """From one address: some are left for others without anybody being dropped."""
        return self.all * 3 // 4

    @property
    def posts(self) -> int:
        """Requests that may be in the works together."""
        return self.address - _SPARE

    @staticmethod
    def within_limits() -> "Room":
        """As many as open files allow. Raises RequestError where that is too few."""
        files = raise_limit(Room.all + _OTHER_FILES, _LEAST_FILES, "the server")
        connections = files - _OTHER_FILES
        return Room(connections, min(Room.bodies, connections // 4))


class Phase(Enum):
    """What a connection is waiting for."""

    HEAD = auto()
    IDLE = auto()  # the next request
    BODY = auto()
    ANSWER = auto()  # the server
    UNREAD = auto()  # the client, to take some of its answer
    LEAVING = auto()  # the client, to close


class _Line:
    """Waiting connections by address, those of each in the order in which they began to wait."""

    def __init__(self) -> None:
        self._of: dict[str, dict[Connection, None]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, one: "Connection") -> None:
        self._of.setdefault(one.address, {})[one] = None
        self._count += 1

    def remove(self, one: "Connection") -> None:
        del self._of[one.address][one]
        self._count -= 1
        if not self._of[one.address]:
            del self._of[one.address]

    def first(self, address: str | None = None) -> "Connection | None":
        """The oldest of this address; by default of the one that has most here."""
        most = max(self._of.values(), key=len, default={})
        return next(iter(most if address is None else self._of.get(address, {})), None)


class Gate:
    """All connections of a server; `tick` is to be called several times a second."""

    def __init__(self, room: Room, patience: Patience) -> None:
        self.patience = patience
        self.now = 0.0  # seconds, by a clock that stands while the process does
        self._room = room
        self._looked: float | None = None
        self._all: dict[Connection, None] = {}
        self._addresses: Counter[str] = Counter()
        self._waiting, self._bodies = _Line(), _Line()
        self._lines = {phase: self._waiting for phase in Phase if phase is not Phase.ANSWER}
        self._lines[Phase.BODY] = self._bodies

    def enter(self, one: "Connection") -> None:
        """Count a new connection in. Another goes, or this one is refused, if there is no room."""
        self._all[one] = None
        self._addresses[one.address] += 1
        crowded = self._addresses[one.address] > self._room.address
        if crowded or len(self._all) > self._room.all:
            of = one.address if crowded else None
            other = self._waiting.first(of) or self._bodies.first(of)
            if other is None:
                self.place(one, Phase.HEAD)
                one.refuse(faults.closed("there are too many connections; try again later"))
                return
            self.drop(other)
        self.place(one, Phase.HEAD)

    def place(self, one: "Connection", phase: Phase) -> None:
        if one not in self._all:  # it was dropped; there may be a last event
            return
        self._unplace(one)
        one.phase, one.since = phase, self.now
        if phase in self._lines:
            self._lines[phase].add(one)
        if len(self._bodies) > self._room.bodies and (oldest := self._bodies.first()):
            oldest.refuse(faults.closed("too many bodies are on their way; try again later"))

    def leave(self, one: "Connection") -> None:
        """Count a connection out."""
        if one in self._all:
            self._unplace(one)
            del self._all[one]
            self._addresses[one.address] -= 1
            if not self._addresses[one.address]:
                del self._addresses[one.address]

    def drop(self, one: "Connection") -> None:
        self.leave(one)
        one.transport.abort()

    def close(self) -> None:
        """Drop all that are left."""
        for one in list(self._all):
            self.drop(one)

    def tick(self, now: float) -> None:
        """End what has waited too long."""
        self.now += 0.0 if self._looked is None else min(now - self._looked, _STEP)
        self._looked = now
        for one in list(self._all):
            one.look()

    def _unplace(self, one: "Connection") -> None:
        if one.phase in self._lines:
            self._lines[one.phase].remove(one)
        one.phase = None


class State(ServerState):
    """What a server's connections share."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = gate


class Connection(H11Protocol):
    """uvicorn's, with deadlines; it says why where it refuses."""

    def __init__(
        self,
        config: Config,
        server_state: State,
        app_state: dict[str, Any],
        _loop: AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._gate = server_state.gate
        self.address = ""
        self.phase: Phase | None = None
        self.since = 0.0  # when the phase began
        self._heard = False
        self._unsent = 0  # bytes, and since when that many
        self._unsent_since = 0.0

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        # asyncio's own is 256 KB: 40,000 chunks of a byte, or a head far past its limit, at once.
        transport.max_size = HEAD_BYTES  # type: ignore[attr-defined]
        super().connection_made(transport)
        self.address = _household(self.client[0]) if self.client else ""
        self._gate.enter(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._gate.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.phase is not Phase.LEAVING:
            self._heard = True
            super().data_received(data)
            self._settle()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._unset_keepalive_if_required()  # the gate's business; it would outlive a reset
        self._settle()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._settle()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._settle()

    def _settle(self) -> None:
        """Tell the gate what is waited for now. More of the same changes no deadline."""
        cycle = self.cycle
        if self.phase is Phase.LEAVING:
            return
        if cycle is None:
            phase = Phase.HEAD
        elif cycle.response_complete:
            phase = Phase.IDLE
        elif cycle.more_body:
            phase = Phase.BODY
        else:
            phase = Phase.UNREAD if self.flow.write_paused else Phase.ANSWER
        if phase is not self.phase:
            self._gate.place(self, phase)

    def look(self) -> None:
        """Act on what has taken too long."""
        gate, patience = self._gate, self._gate.patience
        waited = gate.now - self.since
        unsent = self.transport.get_write_buffer_size()
        if unsent != self._unsent:
            self._unsent, self._unsent_since = unsent, gate.now
        elif unsent and gate.now - self._unsent_since > patience.unread:
            gate.drop(self)
            return
        if self.phase is Phase.HEAD and waited > patience.head:
            if self._heard:
                self.refuse(ApiError(408, "the request did not arrive in time", code="timeout"))
            else:
                gate.drop(self)
        elif self.phase is Phase.BODY and waited > patience.body:
            self.refuse(ApiError(408, "the body did not arrive in time", code="timeout"))
        elif self.phase is Phase.IDLE and waited > patience.idle:
            self.transport.close()  # once all is sent
        elif self.phase is Phase.LEAVING and waited > patience.leave:
            gate.drop(self)

    def send_400_response(self, msg: str) -> None:
        # uvicorn calls it while it handles h11's error.
        status = getattr(exception(), "error_status_hint", 400)
        if status == 431:
            message = f"the request's head is larger than {HEAD_BYTES} bytes"
        else:
            message = "this is no request of HTTP/1.1"
        self.refuse(ApiError(status, message, code="invalid_request"))

    def refuse(self, error: ApiError) -> None:
        """Say why, where no answer has begun, and close.

        What the client still sends is read and dropped for a moment: a close with bytes unread
        would take the answer from it (RFC 9112, 9.6).
        """
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True  # what the application still says goes nowhere
            cycle.message_event.set()
            if cycle.response_started:
                self._gate.drop(self)
                return
        body = error.response.body
        headers = {
            **error.headers,
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
        }
        lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        with suppress(OSError):  # it has read enough and is gone
            self.transport.write_eof()
        self.flow.resume_reading()
        self._gate.place(self, Phase.LEAVING)

    def shutdown(self) -> None:
        if self.phase is Phase.BODY:
            self.refuse(faults.closing())
        elif self.phase in (Phase.ANSWER, Phase.UNREAD):
            self.cycle.keep_alive = False
        elif self.phase is not Phase.LEAVING:
            self.transport.close()


def _household(host: str) -> str:
    """What a connection counts under: its address, or an IPv6 address's network, all of which one
    customer has."""
    address = parsed(host)
    return address.packed[:8].hex() if isinstance(address, IPv6Address) else str(address)
