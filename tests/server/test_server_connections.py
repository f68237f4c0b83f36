"""Connections: bodies that are too large or late, clients that go or do not read, the end."""

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import slow
from server_room import (
    ANSWER,
    MODELS,
    WAIT,
    FakeEngine,
    FakeTask,
    Running,
    ask,
    chat,
    error,
    events,
    piece,
    post,
    serving,
    tokenizer_in,
    until_closed,
)

from mlx_cerebrum.server import log
from mlx_cerebrum.server.app import Service, Settings
from mlx_cerebrum.server.connections import Patience
from mlx_cerebrum.server.intake import SLICE
from mlx_cerebrum.server.jobs import BusyError, ClosedError, Event, Reading
from mlx_cerebrum.server.listening import Server
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_in(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def engine(tokenizer: Tokenizer) -> FakeEngine:
    return FakeEngine(tokenizer)


@pytest.fixture
def server(engine: FakeEngine, tokenizer: Tokenizer) -> Iterator[Running]:
    with serving(engine, tokenizer, keep_alive=0.05, max_body=20_000) as running:
        yield running


def test_bodies_too_large(server: Running) -> None:
    assert error(post(server, **chat("a" * 20_000)))[:2] == (413, "request_too_large")

    def endless() -> Iterator[bytes]:  # sent in chunks: no Content-Length
        for _ in range(10):
            yield b" " * 5000

    headers = {"Content-Type": "application/json"}
    answer = server.client.post("/v1/completions", content=endless(), headers=headers)
    assert error(answer)[:2] == (413, "request_too_large")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_no_text_is_tokenized_that_is_sure_to_be_too_long(
    engine: FakeEngine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """It would hold up every answer for as long."""
    lengths = []
    encode = Tokenizer.encode

    def watched(self: Tokenizer, text: str, add_bos: bool | None = None) -> list[int]:
        lengths.append(len(text))
        return encode(self, text, add_bos)

    monkeypatch.setattr(Tokenizer, "encode", watched)
    with serving(engine, tokenizer) as server:
        text = "word " * 100_000
        body = chat(text) if "chat" in path else {"prompt": text}
        answer = post(server, path, **body)
    assert error(answer)[:2] == (400, "context_length_exceeded")
    assert lengths == [SLICE]


def test_a_long_text_that_fits(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    models = {"small": {**MODELS["small"], "context_length": 50_000}}
    with serving(engine, tokenizer, models) as server:
        text = "word " * 9_000
        assert post(server, "/v1/completions", prompt=text, max_tokens=5).status_code == 200
        assert len(engine.jobs[0].prompt) == 45_001
        assert post(server, **chat(text)).status_code == 200
        answer = post(server, **chat("word " * 10_100))
        assert error(answer)[:2] == (400, "context_length_exceeded")


def test_a_client_that_goes_within_its_body(server: Running) -> None:
    ask(server, b"{", 100).close()
    wait_for(server, 'status="499"')


def test_a_body_that_does_not_come(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    with (
        serving(engine, tokenizer, patience=Patience(body=0.05)) as server,
        ask(server, b"", 9) as client,
    ):
        assert client.recv(100).startswith(b"HTTP/1.1 408 ")


def test_a_client_that_goes_as_it_is_refused(
    engine: FakeEngine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has seen enough: its system takes no more. That must not be the end of the server."""
    gone = threading.Event()

    def write_eof(transport: Any) -> None:
        gone.set()
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))

    kind = "asyncio.selector_events._SelectorSocketTransport"
    monkeypatch.setattr(f"{kind}.write_eof", write_eof)
    with (
        serving(engine, tokenizer, patience=Patience(body=0.05)) as server,
        ask(server, b"", 9),
    ):
        assert gone.wait(WAIT)
        assert server.client.get("/health").status_code == 200


def test_comments_while_a_prompt_is_read(server: Running, engine: FakeEngine) -> None:
    went_on = threading.Event()

    def script(task: FakeTask) -> Iterator[Event]:
        yield Reading(1, len(task.job.prompt))
        went_on.wait(WAIT)
        yield piece(task.job, 0, 5, "H", "stop")

    engine.script = script
    seen = []
    with server.client.stream("POST", "/v1/chat/completions", json=chat(stream=True)) as answer:
        for line in answer.iter_lines():
            seen.append(line)
            if line == ": keep-alive":
                went_on.set()
    assert f": reading 1/{len(engine.jobs[0].prompt)}" in seen
    assert ": keep-alive" in seen
    assert seen[-2] == "data: [DONE]"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_place(
    server: Running, engine: FakeEngine, stream: bool
) -> None:
    engine.script = until_closed(engine)
    with ask(server, chat(stream=stream)) as client:
        task = engine.task()
        if stream:
            assert client.recv(100).startswith(b"HTTP/1.1 200")
    assert task.cancelled.wait(WAIT)
    wait_for(server, 'status="499"')


def wait_for(server: Running, text: str) -> None:
    """Until /metrics has `text`; the count comes a moment after the event."""
    for _ in range(200):
        found = server.client.get("/metrics").text
        if text in found:
            return
    raise AssertionError(f"{text} is not in {found}")


@slow
def test_a_client_that_does_not_read(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    def script(task: FakeTask) -> Iterator[Event]:
        while True:
            yield piece(task.job, 0, 5, "H" * 1000)

    engine.script = script
    with (
        serving(engine, tokenizer, most_pending=100) as server,
        ask(server, chat(stream=True)) as client,
    ):
        task = engine.task()
        assert task.cancelled.wait(WAIT)
        engine.script = engine.say()
        assert post(server, **chat()).status_code == 200  # others are served
        got = b""
        while b"was not read" not in got:  # what is left, then why
            data = client.recv(1 << 20)
            assert data
            got = got[-2000:] + data


@pytest.mark.parametrize("stream", [True, False])
def test_an_engine_that_is_always_ahead(
    engine: FakeEngine, tokenizer: Tokenizer, stream: bool
) -> None:
    """A client that reads gets it all, and others are served meanwhile."""
    count, served = 3000, threading.Event()

    def script(task: FakeTask) -> Iterator[Event]:
        for number in range(count):
            if number == count - 1:
                assert served.wait(WAIT)
            yield piece(task.job, 0, 5, "H", "length" if number == count - 1 else None)

    engine.script = script
    with serving(engine, tokenizer, most_pending=10) as server:
        answers: list[httpx.Response] = []
        body = chat(stream=stream, logprobs=True, top_logprobs=2)
        asking = threading.Thread(target=lambda: answers.append(post(server, **body)))
        asking.start()
        engine.task()
        assert server.client.get("/health").status_code == 200
        served.set()
        asking.join(WAIT)
    if stream:
        found = events(answers[0])[:-1]
        text = "".join(one["choices"][0]["delta"].get("content", "") for one in found)
    else:
        text = answers[0].json()["choices"][0]["message"]["content"]
    assert text == "H" * count


@slow
def test_a_client_that_stalls(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    def script(task: FakeTask) -> Iterator[Event]:
        for _ in range(500):
            yield piece(task.job, 0, 5, "H" * 100_000)

    engine.script = script
    with (
        serving(engine, tokenizer, patience=Patience(unread=0.05)) as server,
        ask(server, chat(stream=True)),
    ):
        assert engine.task().cancelled.wait(WAIT)


def test_a_signal_that_is_ignored_stays_so(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    """As nohup and a shell's background jobs ask; the others are the server's."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    server = Server(Service(engine, MODELS, tokenizer, Settings()), 1.0)
    kept = [signal.signal(each, signal.SIG_DFL) for each in signals]
    try:
        for ignored in signals:
            signal.signal(ignored, signal.SIG_IGN)
            with server.capture_signals():
                for each in signals:
                    expected = signal.SIG_IGN if each == ignored else server.handle_exit
                    assert signal.getsignal(each) == expected
            assert signal.getsignal(ignored) is signal.SIG_IGN
            signal.signal(ignored, signal.SIG_DFL)
    finally:
        for each, handler in zip(signals, kept, strict=True):
            signal.signal(each, handler)


@pytest.mark.parametrize("stream", [True, False])
def test_shutdown_ends_answers(tokenizer: Tokenizer, stream: bool) -> None:
    engine = FakeEngine(tokenizer)
    engine.script = until_closed(engine)
    with serving(engine, tokenizer) as server:
        answers: list[httpx.Response] = []
        asking = threading.Thread(
            target=lambda: answers.append(post(server, **chat(stream=stream)))
        )
        asking.start()
        engine.task()
        server.server.should_exit = True
        asking.join(WAIT)
        assert engine.closed
        if stream:
            assert events(answers[0])[-1]["error"]["code"] == "shutting_down"
        else:
            assert error(answers[0])[:2] == (503, "shutting_down")
        server.thread.join(WAIT)
        assert not server.thread.is_alive()


def test_shutdown_lets_answers_end(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer)
    engine.script = engine.say(gate=lambda _: engine.ended.wait(WAIT))
    with serving(engine, tokenizer) as server:
        answers: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: answers.append(post(server, **chat())))
        asking.start()
        engine.task()
        server.server.should_exit = True
        asking.join(WAIT)
    assert answers[0].json()["choices"][0]["message"]["content"] == ANSWER


def test_nothing_new_while_shutting_down(server: Running, engine: FakeEngine) -> None:
    server.service.closing = True
    answer = post(server, **chat())
    assert error(answer)[:2] == (503, "shutting_down")
    assert "retry-after" in answer.headers
    server.service.closing = False
    engine.refuse = BusyError("3 requests are waiting already")
    assert post(server, **chat()).status_code == 429


def test_an_engine_that_has_stopped_is_not_a_busy_one(
    tokenizer: Tokenizer,
) -> None:
    engine = FakeEngine(tokenizer)
    with serving(engine, tokenizer) as server:
        assert server.client.get("/health").status_code == 200
        engine.refuse = ClosedError("the engine has stopped; start it again")
        engine.ended.set()
        answer = post(server, **chat())
        assert error(answer)[:2] == (503, "unavailable")
        assert "the engine has stopped" in answer.text
        assert server.client.get("/health").status_code == 503


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_log_that_is_full(
    engine: FakeEngine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Path("/dev/full").open("w") as full, serving(engine, tokenizer, log=True) as server:
        monkeypatch.setattr(sys, "stderr", full)
        for _ in range(3):
            assert post(server, **chat()).status_code == 200


def test_a_log_that_nobody_reads(
    engine: FakeEngine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped terminal, say: answers go on, and most lines of that time are lost."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    written = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            written += os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    monkeypatch.setattr(log, "MOST", 3)
    with (
        os.fdopen(reader, "rb", buffering=0) as pipe,
        os.fdopen(writer, "w") as stuck,
        serving(engine, tokenizer, log=True) as server,
    ):
        monkeypatch.setattr(sys, "stderr", stuck)
        for _ in range(10):
            assert post(server, **chat()).status_code == 200
        while written:
            written -= len(pipe.read(written) or b"")
        server.stop()
        monkeypatch.undo()
        assert pipe.read(10_000).count(b"POST") in range(3, 8)  # of 10


def test_a_line_for_each_request(
    engine: FakeEngine, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(engine, tokenizer, log=True) as server:
        post(server, **chat("a secret", max_tokens=3))
        server.client.get("/health")
        server.client.post("/typeset", json={"jobs": []})
        server.client.get("/a%0Ab")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("POST /v1/chat/completions 200, ")
    assert " + 3 tokens, " in lines[0]
    assert "secret" not in lines[0]
    assert lines[1].startswith("GET /a%0Ab 404, ")
