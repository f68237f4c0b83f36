"""Bad neighbours: clients that are silent, slow, many, or speak something else."""

import json
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import httpx
import pytest
from conftest import slow
from server_room import (
    WAIT,
    FakeEngine,
    FakeTask,
    Running,
    ask,
    chat,
    piece,
    post,
    serving,
    tokenizer_in,
    until_closed,
)

from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.server import connections
from mlx_cerebrum.server.connections import HEAD_BYTES, Connection, Patience, Phase, Room
from mlx_cerebrum.server.jobs import Event
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_in(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def engine(tokenizer: Tokenizer) -> FakeEngine:
    return FakeEngine(tokenizer)


def connect(server: Running, data: bytes = b"", source: str = "127.0.0.1") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", server.port), WAIT, (source, 0))
    client.sendall(data)
    return client


def rest(client: socket.socket) -> bytes:
    """All that comes until the server closes."""
    found = b""
    try:
        while data := client.recv(1 << 16):
            found += data
    except ConnectionResetError:
        pass
    return found


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def held(server: Running) -> int:
    return len(server.server.server_state.connections)


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@slow
def test_a_head_has_a_deadline(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    with (
        serving(engine, tokenizer, patience=Patience(head=0.3)) as server,
        connect(server) as silent,
        connect(server, HEALTH[:30]) as half,
        connect(server, HEALTH[:1]) as dripping,
    ):
        over = threading.Event()

        def drip() -> None:
            for byte in HEALTH[1:] * 100:
                if over.wait(0.05):
                    return
                try:
                    dripping.sendall(bytes([byte]))
                except OSError:
                    return

        dropping = threading.Thread(target=drip)
        dropping.start()
        try:
            assert rest(silent) == b""  # a browser's spare connection: no answer to nothing
            assert status(rest(half)) == 408
            assert status(rest(dripping)) == 408
        finally:
            over.set()
            dropping.join()
        until(lambda: held(server) == 0)


@slow
def test_between_requests_too(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    """Neither the next head nor what is left of an answered request's body may drip in."""
    refused = b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999\r\n\r\n{"
    with serving(engine, tokenizer, patience=Patience(idle=0.3)) as server:
        for first, more, expected in ((HEALTH, HEALTH[:20], 200), (refused, b" " * 20, 404)):
            with connect(server, first) as client:
                found = client.recv(1 << 16)
                assert status(found) == expected
                for byte in more:
                    time.sleep(0.05)
                    try:
                        client.sendall(bytes([byte]))
                    except OSError:
                        break
                rest(client)
        until(lambda: held(server) == 0)


@pytest.mark.parametrize("source", ["127.0.0.1", "127.0.0.2"])
def test_the_silent_keep_nobody_out(engine: FakeEngine, tokenizer: Tokenizer, source: str) -> None:
    if source != "127.0.0.1" and sys.platform != "linux":
        pytest.skip("one loopback address")
    with serving(engine, tokenizer, room=Room(40)) as server, ExitStack() as stack:
        clients = [stack.enter_context(connect(server)) for _ in range(100)]
        with connect(server, HEALTH, source) as client:
            assert status(client.recv(1 << 16)) == 200
        assert post(server, **chat()).status_code == 200
        assert held(server) <= 40
        assert rest(clients[0]) == b""  # the oldest went
        clients[-1].sendall(HEALTH)
        assert status(clients[-1].recv(1 << 16)) == 200


def test_bodies_that_drip_keep_nobody_out(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    with (
        serving(engine, tokenizer, room=Room(40, bodies=4)) as server,
        ExitStack() as stack,
    ):
        clients = [stack.enter_context(ask(server, b"{", 1000)) for _ in range(10)]
        assert status(rest(clients[0])) == 503
        assert post(server, **chat()).status_code == 200


def test_answers_leave_room_for_health(
    engine: FakeEngine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.script = until_closed(engine)
    room = Room(40)
    with serving(engine, tokenizer, room=room) as server, ExitStack() as stack:
        for _ in range(room.posts):
            stack.enter_context(ask(server, chat(stream=True)))
            engine.task()
        answer = post(server, **chat())
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert not any(task.cancelled.is_set() for task in engine.tasks)
        engine.ended.set()
    # Were all places taken by answers, who comes would be told.
    monkeypatch.setattr(Room, "posts", 100)
    engine.ended.clear()
    with serving(engine, tokenizer, room=Room(4)) as server, ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(ask(server, chat(stream=True)))
            engine.task()
        with connect(server) as client:
            answered = rest(client)
        assert status(answered) == 503
        assert json.loads(answered.partition(b"\r\n\r\n")[2])["error"]["code"] == "unavailable"
        engine.ended.set()


@pytest.mark.parametrize("stream", [True, False])
@slow
def test_an_answer_that_is_not_read(engine: FakeEngine, tokenizer: Tokenizer, stream: bool) -> None:
    def script(task: FakeTask) -> Iterator[Event]:
        yield piece(task.job, 0, 5, "H" * 20_000_000, "stop")

    engine.script = script
    with (
        serving(engine, tokenizer, patience=Patience(unread=0.3)) as server,
        ask(server, chat(stream=stream)) as client,
    ):
        assert client.recv(12) == b"HTTP/1.1 200"
        until(lambda: held(server) == 0)


@slow
def test_an_answer_that_is_not_read_goes_first(
    engine: FakeEngine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def script(task: FakeTask) -> Iterator[Event]:
        while True:
            yield piece(task.job, 0, 5, "H" * 100_000)

    engine.script = script
    monkeypatch.setattr(Room, "posts", 100)
    with (
        serving(engine, tokenizer, room=Room(8), most_pending=100) as server,
        ask(server, chat(stream=True)),
        ExitStack() as stack,
    ):
        assert engine.task().cancelled.wait(WAIT)  # it fell behind
        for _ in range(6):
            stack.enter_context(connect(server))
        until(lambda: held(server) == 6)


@pytest.mark.parametrize(
    ("data", "expected", "code"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)), 400, None),
        (b"\r\n" * 5000, 400, None),
        (b"hello\r\n\r\n", 400, None),
        (b"GET /\r\n\r\n", 400, None),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nno colon\r\n\r\n", 400, None),
        (
            b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n",
            400,
            None,
        ),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", 501, None),
        (b"GET /" + b"a" * 200_000, 431, None),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 30_000 + b"\r\n", 431, None),
        (HEALTH[:-2] + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n", 200, None),
        (HEALTH[:-2] + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n", 200, None),
        (b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n", 404, "not_found"),
        (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", 404, "not_found"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 403, "host_not_allowed"),
    ],
)
@slow
def test_what_is_not_http(
    engine: FakeEngine,
    tokenizer: Tokenizer,
    capfd: pytest.CaptureFixture[str],
    data: bytes,
    expected: int,
    code: str | None,
) -> None:
    patience = Patience(idle=0.1, leave=0.3)
    with serving(engine, tokenizer, patience=patience) as server, connect(server, data) as client:
        head, _, body = rest(client).partition(b"\r\n\r\n")
        assert status(head) == expected
        if expected != 200:
            found = json.JSONDecoder().raw_decode(body.decode())[0]["error"]
            assert found["code"] == (code or "invalid_request")
            if expected == 431:
                assert str(HEAD_BYTES) in found["message"]
        assert server.client.get("/health").status_code == 200
    assert capfd.readouterr().err == ""


def test_a_body_that_breaks_off_after_its_answer(
    engine: FakeEngine, tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]
) -> None:
    head = (
        b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n \r\n"
    )
    with serving(engine, tokenizer) as server, connect(server, head) as client:
        assert status(client.recv(1 << 16)) == 404
        client.sendall(b"no chunk\r\n")
        assert b"HTTP/1.1 400 " in rest(client)
    assert capfd.readouterr().err == ""


@slow
def test_many_requests_in_one_go(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    with (
        serving(engine, tokenizer, patience=Patience(idle=0.3)) as server,
        connect(server, HEALTH * 500) as client,
    ):
        assert rest(client).count(b"HTTP/1.1 200 OK") == 500


@slow
def test_no_time_passes_while_the_process_stands_still(
    engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    """Stopped by Ctrl-Z, or a machine asleep: who waited has not been late."""
    with (
        serving(engine, tokenizer, patience=Patience(head=1.0)) as server,
        connect(server, HEALTH[:20]) as client,
    ):
        until(lambda: held(server) == 1)
        (held_one,) = server.server.server_state.connections
        held_one.loop.call_soon_threadsafe(time.sleep, 1.5)
        assert server.client.get("/health").status_code == 200  # it goes on
        time.sleep(0.25)  # and has looked
        client.sendall(HEALTH[20:])
        assert status(client.recv(1 << 16)) == 200


@slow
def test_no_file_is_left_for_a_connection(
    engine: FakeEngine, tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with serving(engine, tokenizer) as server, socket.socket() as client:
        assert server.client.get("/health").status_code == 200
        client.settimeout(WAIT)
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        try:
            client.connect(("127.0.0.1", server.port))
            started = time.process_time()
            time.sleep(0.5)
            assert time.process_time() - started < 0.4  # nothing spins
            assert server.client.get("/health").status_code == 200  # on its open connection
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        client.sendall(HEALTH)
        assert status(client.recv(1 << 16)) == 200
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert "Too many open files" in err


@slow
def test_the_end_waits_for_none_of_them(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(serving(engine, tokenizer))
        silent = stack.enter_context(connect(server))
        half = stack.enter_context(connect(server, HEALTH[:20]))
        body = stack.enter_context(ask(server, b"{", 1000))
        until(lambda: held(server) == 3)
        started = time.monotonic()
        server.stop()
        assert time.monotonic() - started < 5  # grace and more is 8
        assert rest(silent) == b""
        assert rest(half) == b""
        assert status(rest(body)) == 503


def test_no_timer_of_uvicorn_outlives_a_connection(
    engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    """It forgets to cancel its own where a client resets, and the connection is kept as long."""
    with serving(engine, tokenizer) as server, connect(server, HEALTH) as client:
        assert status(client.recv(1 << 16)) == 200
        (one,) = server.server.server_state.connections
        assert isinstance(one, Connection)
        until(lambda: one.phase is Phase.IDLE)
        assert one.timeout_keep_alive_task is None


def test_room_is_what_files_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "raise_limit", lambda wanted, *_: wanted)
    assert Room.within_limits() == Room(1000, 250)
    monkeypatch.setattr(connections, "raise_limit", lambda *_: 128)
    assert Room.within_limits() == Room(48, 12)
    assert (Room(48).address, Room(48).posts) == (36, 20)

    def refuse(*_: object) -> int:
        raise RequestError("too few")

    monkeypatch.setattr(connections, "raise_limit", refuse)
    with pytest.raises(RequestError):
        Room.within_limits()


def test_whom_a_connection_is_counted_under() -> None:
    household = connections._household
    assert household("10.0.0.1") == household("::ffff:10.0.0.1") == "10.0.0.1"
    assert household("10.0.0.1") != household("10.0.0.2")
    assert household("2001:db8:1:2::3") == household("2001:db8:1:2:ffff::")
    assert household("2001:db8:1:2::3") != household("2001:db8:1:3::3")
    assert household("fe80::1%eth0") == household("fe80::2%eth0")
