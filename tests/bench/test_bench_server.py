"""The benches of the local server, on a stand-in that answers from a script, rightly or not."""

import asyncio
import hashlib
import json
import os
import random
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from conftest import MakeCheckpoint
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from bench import (
    server_findings,
    server_load,
    server_load_report,
    server_mix,
    server_peers,
    server_peers_report,
    server_process,
)
from bench.peers_report import OURS
from bench.server_answers import CHAT, COMPLETIONS, Question, hear
from bench.server_client import Address, Manner, Reply, ask, get
from bench.server_clients import Load, first_difference, refusal_fault
from bench.server_mix import KINDS, Mix, chat, fixed_set, nonsense, user
from mlx_cerebrum.errors import CerebrumError, RequestError

MODELS = ("small", "large")
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "its", "paw.")


class StandIn:
    """An OpenAI-compatible server whose answers follow from the question.

    `wrong` names what it does wrong: "no end", "tokens", "500", "leak" (a client that leaves
    keeps its place), "company" (another text while others are asking), "takes nonsense".
    """

    def __init__(self, *wrong: str) -> None:
        self.wrong = set(wrong)
        self.active = self.asked = 0
        app = Starlette(
            routes=[
                Route("/health", lambda _: PlainTextResponse("ok")),
                Route("/v1/models", self._models),
                Route("/metrics", self._metrics),
                Route(CHAT, self._answer, methods=["POST"]),
                Route(COMPLETIONS, self._answer, methods=["POST"]),
            ]
        )
        config = uvicorn.Config(app, port=0, log_level="error", ws="none", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)

    def __enter__(self) -> "StandIn":
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            self._thread.join(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    @property
    def address(self) -> Address:
        return Address("127.0.0.1", self._server.servers[0].sockets[0].getsockname()[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.address.port}"

    def _models(self, _: Request) -> Response:
        return JSONResponse({"data": [{"id": name} for name in MODELS]})

    def _metrics(self, _: Request) -> Response:
        lines = ["# TYPE cerebrum_queued gauge", "cerebrum_queued 0"]
        lines += [f"cerebrum_active {self.active}", "cerebrum_prefix_cache_bytes 5e+06"]
        lines += [
            "cerebrum_generated_tokens_total 50",
            "cerebrum_kv_bytes 0.0",
            'x_total{how="stop"} 3',
            'x_total{how="length"} 4',
        ]
        return PlainTextResponse("\n".join(lines))

    async def _answer(self, request: Request) -> Response:
        raw = await request.body()
        try:
            body = json.loads(raw)
            words = words_of(body, request.url.path)
        except (ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError):
            if "takes nonsense" in self.wrong:
                return JSONResponse({"choices": []})
            error = {"message": "that is no request", "type": "invalid_request_error"}
            return JSONResponse({"error": error}, 400)
        self.asked += 1
        if "500" in self.wrong and self.asked % 5 == 0:
            return PlainTextResponse("oh", 500)
        if "busy" in self.wrong and self.active and self.asked % 5 == 0:
            return JSONResponse({"error": {}}, 429, headers={"Retry-After": "0.1"})
        if "company" in self.wrong and self.active:
            words = [["quite", "other", "words"], words[1:]][self.asked % 2]
        about = {"id": f"{self.asked}", "model": body["model"]}
        chat = request.url.path == CHAT
        prompt = words_in(body)
        choices = [answer(words, body) for _ in range(body.get("n", 1))]
        said = sum(len(words) for words, _ in choices) + ("tokens" in self.wrong)
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": said,
            "total_tokens": prompt + said,
            "prompt_tokens_details": {"cached_tokens": prompt // 2},
        }
        if body.get("stream"):
            stream = self._stream(body, about, choices, usage, chat)
            return StreamingResponse(stream, media_type="text/event-stream")
        whole = [
            {"index": index, "finish_reason": finish}
            | ({"message": {"content": joined(words)}} if chat else {"text": joined(words)})
            for index, (words, finish) in enumerate(choices)
        ]
        return JSONResponse(about | {"choices": whole, "usage": usage})

    async def _stream(
        self,
        body: dict[str, Any],
        about: dict[str, Any],
        choices: list[tuple[list[str], str]],
        usage: dict[str, Any],
        chat: bool,
    ) -> AsyncIterator[str]:
        self.active += 1
        gone = True
        try:
            yield ": keep-alive\n\n"
            for index, (words, finish) in enumerate(choices):
                for place, word in enumerate(words):
                    piece = f"{word} "
                    text = {"delta": {"content": piece}} if chat else {"text": piece}
                    last = finish if place == len(words) - 1 else None
                    choice = {"index": index, "finish_reason": last} | text
                    yield f"data: {json.dumps(about | {'choices': [choice]})}\n\n"
                    await asyncio.sleep(0.001)
            if (body.get("stream_options") or {}).get("include_usage"):
                yield f"data: {json.dumps(about | {'choices': [], 'usage': usage})}\n\n"
            if "no end" not in self.wrong:
                yield "data: [DONE]\n\n"
            gone = False
        finally:
            if not (gone and "leak" in self.wrong):
                self.active -= 1


def words_of(body: dict[str, Any], path: str) -> list[str]:
    """Words that follow from the question and the model, and a check of what must be refused."""
    assert body["model"] in MODELS
    assert type(body["max_tokens"]) is int
    assert body["max_tokens"] > 0
    assert body.get("n", 1) > 0
    assert all(isinstance(stop, str) for stop in body.get("stop", []))
    assert 0 <= float(body.get("temperature", 0)) <= 2
    said = "\n".join(one["content"] for one in body["messages"]) if path == CHAT else body["prompt"]
    assert 0 < len(said) < 100_000
    if path == CHAT:
        assert all(one["role"] in ("system", "user", "assistant") for one in body["messages"])
    key = hashlib.sha256(f"{said}{body['model']}{body.get('seed')}".encode()).digest()
    return [WORDS[number % len(WORDS)] for number in key * 8]


def answer(words: list[str], body: dict[str, Any]) -> tuple[list[str], str]:
    found: list[str] = []
    for word in words[: body["max_tokens"]]:
        if any(stop in joined([*found, word]) for stop in body.get("stop", [])):
            return found or ["Yes"], "stop"
        found.append(word)
    return found, "length" if len(found) == body["max_tokens"] else "stop"


def joined(words: list[str]) -> str:
    return "".join(f"{word} " for word in words)


def words_in(body: dict[str, Any]) -> int:
    said = [one["content"] for one in body.get("messages", [])] or [body["prompt"]]
    return sum(len(text.split()) for text in said)


def count(asked: Question) -> int:
    return words_in(asked.body)


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn() as running:
        yield running


def question(**more: Any) -> Question:
    return chat("small", user("Tell me about cats"), 8, **more)


def heard(server: StandIn, asked: Question) -> list[str]:
    return hear(asked, ask(server.address, asked.path, asked.body), count).faults


# An answer and what is wrong with it


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"stream": True},
        {"n": 2},
        {"n": 2, "stream": True},
        {"stop": ["a"], "stream": True},
        {"stop": ["paw."]},
        {"stream": True, "stream_options": {"include_usage": False}},
    ],
)
def test_a_right_answer_has_no_fault(server: StandIn, more: dict[str, Any]) -> None:
    assert heard(server, question(**more)) == []
    body = question(**more).body
    body = body | {"prompt": body.pop("messages")[0]["content"]}
    assert heard(server, Question(body, COMPLETIONS)) == []


def test_an_answers_parts(server: StandIn) -> None:
    asked = question(stream=True)
    reply = ask(server.address, asked.path, asked.body)
    found = hear(asked, reply, count)
    words = words_of(asked.body, CHAT)[:8]
    assert found.choices[0].text == joined(words)
    assert found.choices[0].finish == "length"
    assert found.usage_of("completion_tokens") == 8
    assert found.cached == 2
    assert found.first is not None
    assert reply.asked < found.first < reply.finished
    assert len(found.gaps) == 7
    assert all(gap > 0 for gap in found.gaps)


def event(**more: Any) -> dict[str, Any]:
    return {"id": "1", "model": "small", "choices": []} | more


def piece(text: str, finish: str | None = None) -> dict[str, Any]:
    return event(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": finish}])


USAGE = event(usage={"prompt_tokens": 4, "completion_tokens": 8, "total_tokens": 12})
RIGHT = [piece("The"), piece(" cat", "length"), USAGE]


@pytest.mark.parametrize(
    ("events", "ended", "said"),
    [
        (RIGHT, False, "no [DONE]"),
        (RIGHT[:2], True, "no usage"),
        (RIGHT[:1] + RIGHT[2:], True, "finish reasons [None]"),
        ([piece("The", "stop"), *RIGHT[1:]], True, "more after a finish reason"),
        ([*RIGHT[:2], event(usage=USAGE["usage"] | {"prompt_tokens": 5})], True, "not 4"),
        ([*RIGHT[:2], event(usage=USAGE["usage"] | {"total_tokens": 11})], True, "are not 11"),
        (
            [
                *RIGHT[:2],
                event(usage=USAGE["usage"] | {"completion_tokens": 7, "total_tokens": 11}),
            ],
            True,
            "7 tokens for finish reasons ['length']",
        ),
        (
            [
                *RIGHT[:2],
                event(usage=USAGE["usage"] | {"completion_tokens": 9, "total_tokens": 13}),
            ],
            True,
            "9 tokens for finish reasons ['length']",
        ),
        ([piece("XYZ"), *RIGHT], True, "past a stop string"),
        ([*RIGHT, {"error": {"message": "no"}}], True, "error in the stream"),
        ([piece("The") | {"id": "2"}, *RIGHT], True, "several answers"),
        ([one | {"model": "large"} for one in RIGHT], True, "another model"),
        ([{"id": 1}], True, "misshapen: KeyError"),
        ([[]], True, "misshapen"),
        ([event(choices=[{"index": 1, "delta": {}}])], True, "misshapen: IndexError"),
    ],
)
def test_a_wrong_stream_is_seen(events: list[Any], ended: bool, said: str) -> None:
    asked = question(stream=True, stop=["XYZ"])
    reply = Reply(status=200, kind="text/event-stream", ended=ended)
    reply.events = [(float(when), one) for when, one in enumerate(events)]
    assert said in "; ".join(hear(asked, reply, count).faults)


def test_a_right_stream_is_let_through() -> None:
    reply = Reply(status=200, ended=True, events=[(0.0, one) for one in RIGHT])
    assert hear(question(stream=True), reply, count).faults == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"choices": []}, "0 choices for n=1"),
        ({"model": "large"}, "another model"),
        ({"usage": None}, "misshapen"),
    ],
)
def test_a_wrong_whole_answer_is_seen(change: dict[str, Any], said: str) -> None:
    choice = {"index": 0, "message": {"content": "The"}, "finish_reason": "length"}
    body = {"model": "small", "choices": [choice], "usage": USAGE["usage"]}
    assert hear(question(), Reply(status=200, body=body), count).faults == []
    assert said in "; ".join(hear(question(), Reply(status=200, body=body | change)).faults)


def test_a_failed_request_is_a_fault() -> None:
    assert hear(question(), Reply(status=500, body="oh")).faults == ["status 500: oh"]
    assert hear(question(), Reply(status=200, broken="silent")).faults == ["silent"]


# The client


def raw_server(data: bytes, *, then: float = 0.0) -> tuple[Address, threading.Thread]:
    """Sends these bytes to the first client, whatever it asks, and closes."""
    import socket

    listening = socket.create_server(("127.0.0.1", 0))
    closing = threading.Event()

    def serve() -> None:
        with listening, listening.accept()[0] as client:
            asked = client.recv(65536)
            while not asked.endswith(b"{}"):  # else closing would say that it was not read
                asked += client.recv(65536)
            client.sendall(data)
            closing.wait(then)

    thread = threading.Thread(target=serve)
    thread.start()
    return Address("127.0.0.1", listening.getsockname()[1]), thread


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(text: str) -> bytes:
    return f"{len(text):x}\r\n{text}\r\n".encode()


@pytest.mark.parametrize(
    ("data", "broken", "ended"),
    [
        (HEAD + chunk('data: {"a": 1}\n\n') + chunk("data: [DONE]\n\n") + b"0\r\n\r\n", None, True),
        (
            HEAD + chunk(": x\n\nda") + chunk('ta:{"a":\ndata: 1}\r\n\r\n') + b"0\r\n\r\n",
            None,
            False,
        ),
        (HEAD + chunk('data: {"a": 1}\n\n'), "IncompleteRead", False),  # no last chunk
        (HEAD + chunk('data: {"a": 1}\n\n') + b"40\r\ndata: [D", "IncompleteRead", False),
        (HEAD + chunk('data: {"a": 1}\n\ndata: [DONE]\n') + b"0\r\n\r\n", "within an event", False),
        (HEAD + chunk('data: {"a": 1}\n\nHello\n\n') + b"0\r\n\r\n", "is no line", False),
        (
            HEAD + chunk('data: {"a": 1}\n\ndata: [DONE]\n\ndata: 1\n\n') + b"0\r\n\r\n",
            "after [DONE]",
            True,
        ),
        (b"", "RemoteDisconnected", False),
        (b"nonsense\r\n\r\n", "BadStatusLine", False),
    ],
)
def test_what_a_stream_lacks_is_seen(data: bytes, broken: str | None, ended: bool) -> None:
    address, thread = raw_server(data)
    reply = ask(address, CHAT, {})
    thread.join()
    assert (reply.broken is None) == (broken is None), reply.broken
    assert (broken or "") in (reply.broken or "")
    assert reply.ended == ended
    if data.startswith(HEAD):
        assert [one for _, one in reply.events] == [{"a": 1}]


def test_silence_ends_the_wait() -> None:
    address, thread = raw_server(HEAD, then=0.3)
    assert "silent for 0 s" in (ask(address, CHAT, {}, Manner(timeout=0.05)).broken or "")
    thread.join()


def test_nobody_there_is_a_broken_reply() -> None:
    reply = ask(Address("127.0.0.1", server_process.free_port()), CHAT, {})
    assert "ConnectionRefusedError" in (reply.broken or "")


def test_leaving_after_some_events(server: StandIn) -> None:
    asked = question(stream=True).body | {"max_tokens": 200}
    reply = ask(server.address, CHAT, asked, Manner(leave_after=3))
    assert reply.left
    assert reply.broken is None
    assert len(reply.events) == 3
    reply = ask(server.address, CHAT, asked, Manner(leave_within=0.05))
    assert reply.left
    assert not reply.ended


@pytest.mark.parametrize("url", ["localhost:80", "https://localhost", "http://", "http://a:99999"])
def test_an_address_is_http(url: str) -> None:
    with pytest.raises(RequestError, match="give http://HOST:PORT"):
        Address.of(url)
    assert Address.of("http://127.0.0.1:8080/") == Address("127.0.0.1", 8080)


def test_a_get_that_fails_says_so(server: StandIn) -> None:
    with pytest.raises(CerebrumError, match="GET /no: status 404"):
        get(server.address, "/no")


# The mix


def test_the_mix_is_drawn_from_its_seed() -> None:
    def drawn(seed: int) -> list[Any]:
        mix = Mix(MODELS, fixed_set(MODELS), seed)
        draws: list[Callable[[], Any]]
        draws = [mix.kind, mix.streaming, mix.whole, mix.completion, mix.conversation]
        draws += [mix.leaving, mix.slow, mix.malformed, mix.fixed]
        return [draw() for draw in draws for _ in range(20)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_the_mix_has_of_everything() -> None:
    mix = Mix(MODELS, fixed_set(MODELS), 0)
    asked = [mix.streaming() for _ in range(300)]
    assert {mix.kind() for _ in range(500)} == set(KINDS)
    assert {one.body["model"] for one in asked} == set(MODELS)
    assert {one.n for one in asked} == {1, 2}
    assert any(one.stop for one in asked)
    assert any("seed" in one.body for one in asked)
    lengths = [len(one.body["messages"][0]["content"].split()) for one in asked]
    assert min(lengths) < 10
    assert max(lengths) > 900
    assert len({one.body["messages"][0]["content"] for one in asked}) > 290


def test_every_nonsense_is_refused(server: StandIn) -> None:
    good = question().body
    assert heard(server, question()) == []
    for path, body in nonsense(good):
        assert refusal_fault(ask(server.address, path, body)) is None, body[:80]


def test_a_refusal_says_why() -> None:
    body = {"error": {"message": "no", "type": "invalid_request_error"}}
    assert refusal_fault(Reply(status=400, body=body)) is None
    for wrong in (None, "no", {}, {"error": "no"}, {"error": {"message": 1, "type": "a"}}):
        assert "without" in (refusal_fault(Reply(status=400, body=wrong)) or "")
    assert refusal_fault(Reply(status=500, body=body)) == "status 500"
    assert refusal_fault(Reply(status=200, body=body)) == "status 200"
    assert refusal_fault(Reply(broken="closed")) == "closed"


def test_where_texts_differ() -> None:
    assert first_difference(["abc"], ["abd"]) == 2
    assert first_difference(["abc"], ["ab"]) == 2
    assert first_difference(["abc", "x"], ["abc", "y"]) == 0


# The load


def load(server: StandIn, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, Any]:
    words = ["--url", server.url, "--pid", str(os.getpid()), "--clients", "6", "--json"]
    code = server_load.main([*words, "--minutes", "0.02", "--no-openblas", *more])
    return code, json.loads(capsys.readouterr().out)


COUNTER = server_load.counter


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model to count tokens by, and no long waits."""
    monkeypatch.setattr(server_mix, "PATIENCE", (0.001, 0.5))
    monkeypatch.setattr(server_mix, "PAUSES", (0.001, 0.005))
    monkeypatch.setattr(server_findings, "SETTLE", 60.0)
    monkeypatch.setattr(server_load, "counter", lambda model: count)


def passed(found: dict[str, Any]) -> dict[str, bool | None]:
    return {one["name"]: one["passed"] for one in found["criteria"]}


def test_a_right_server_passes(capsys: pytest.CaptureFixture[str]) -> None:
    with StandIn("busy") as server:
        code, document = load(server, capsys)
    found = document["results"]
    assert code == 0
    assert document["bench"] == "server_load"
    assert found["errors"] == {}
    assert set(passed(found).values()) == {True, None}  # too short for a slope; not ours to stop
    assert found["busy"] > 0
    assert sum(found["requests"].values()) > 30
    assert found["fixed"]["same"] > 0
    assert found["fixed"]["differing"] == {}
    assert found["tokens"]["cached"] > 0
    assert found["first"]["all"]["max"] >= found["first"]["all"]["median"] > 0
    assert found["memory"]["slope"] is None
    assert found["metrics"]["cerebrum_active"] == 0
    assert found["metrics"]["x_total"] == 7
    assert found["memory"]["said"][0]["prefix_cache_bytes"] == 5e6
    assert "NO" not in "\n".join(server_load_report.text(found))


def test_a_wrong_server_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settle = server_load.settle
    monkeypatch.setattr(server_load, "settle", lambda at, pid, had: settle(at, pid, had, 0.3))
    with StandIn("leak", "company", "takes nonsense") as server:
        code, document = load(server, capsys)
    found, checks = document["results"], passed(document["results"])
    assert code == 1
    assert checks["nothing queued or decoded a second after all had left"] is False
    assert checks["malformed bodies were refused, each with its error"] is False
    assert checks["polite clients saw no error"] is True
    assert found["fixed"]["differing"]
    text = "\n".join(server_load_report.text(found))
    assert "malformed" in text
    assert "still queued" in text
    assert "came out as another text (" in text


@pytest.mark.parametrize(("wrong", "said"), [("no end", "no [DONE]"), ("tokens", "usage: ")])
def test_a_question_alone_must_be_right(
    wrong: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with StandIn(wrong) as server:
        args = ["--url", server.url, "--no-openblas", "--minutes", "0.02"]
        assert server_load.main(args) == 2
    error = capsys.readouterr().err
    assert "asked alone" in error
    assert said in error


def test_an_error_under_load_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    with StandIn() as server, pytest.MonkeyPatch.context() as patch:
        run = Load.run

        def broken(self: Load, clients: int) -> None:
            server.wrong.add("500")
            run(self, clients)
            server.wrong.clear()

        patch.setattr(Load, "run", broken)
        code, document = load(server, capsys)
    assert code == 1
    assert passed(document["results"])["polite clients saw no error"] is False
    assert "status 500: None" in str(document["results"]["errors"])


def test_a_server_that_dies_ends_the_load(server: StandIn) -> None:
    nobody = Address("127.0.0.1", server_process.free_port())
    found = Load(nobody, MODELS, fixed_set(MODELS), {}, None, time.monotonic() + 60)
    found.run(3)
    assert 0 < found.tally.requests.total() < 20
    assert "ConnectionRefused" in str(found.tally.faults)


@pytest.mark.long
def test_the_real_server_under_load(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it, in a process of its own, on a tiny model of random weights."""
    monkeypatch.setattr(server_load, "counter", COUNTER)
    path = checkpoint(sliding_window=64, max_position_embeddings=16384)
    words = ["--model", str(path), "--clients", "4", "--minutes", "0.05", "--no-openblas", "--json"]
    code = server_load.main(words)
    document = json.loads(capsys.readouterr().out)
    found = document["results"]
    assert found["errors"] == {}
    assert code == 0, found["criteria"]
    assert document["settings"]["model"] == "source"
    assert found["models"] == ["source"]
    assert found["stopped"]["exit_code"] == 0
    assert sum(found["requests"].values()) >= 4
    assert found["memory"]["said"]


@pytest.mark.parametrize(
    "words",
    [["--clients", "0"], ["--minutes", "0"], ["--pid", "7"], ["--url", "here"]],
)
def test_wrong_flags_are_a_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert server_load.main([*words, "--no-openblas"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_slope_of_memory() -> None:
    grows = [(float(second), 1_000_000_000 + 50_000 * second) for second in range(300)]
    assert server_process.slope(grows) == pytest.approx(3.0)
    assert server_process.slope(grows[:50]) is None
    assert server_process.slope([]) is None
    # Answers take memory and give it back; below them it grows.
    swings = [(s, size + 90_000_000 * (s % 40 > 20)) for s, size in grows]
    assert server_process.slope(server_process.floors(swings)) == pytest.approx(3.0, abs=0.01)


@pytest.mark.parametrize("leak", [0.0, 40.0])
def test_a_slope_is_known_as_well_as_its_load_swings(leak: float) -> None:
    """Of swings as answers make them, 20 s long; the range has the leak in it."""
    chance = random.Random(3)
    height = [chance.uniform(-150e6, 150e6) for _ in range(31)]
    samples = [(float(s), int(2e9 + height[s // 20] + leak * 1e6 * s / 60)) for s in range(600)]
    lies = server_process.slope_range(samples)
    assert lies is not None
    low, high = lies
    assert low < leak < high
    assert 2 < high - low < 40
    assert (low > 1) == bool(leak)
    assert server_process.slope_range(samples[:150]) is None


def test_a_slope_that_is_too_rough_says_nothing() -> None:
    rough = FINE | {"memory": FINE_MEMORY | {"slope": 1.0, "slope_range": [-5, 7]}}
    said = {one["name"]: one["passed"] for one in server_findings.criteria(rough)}
    assert said["memory grew by less than 1 MB a minute"] is None
    assert said["at rest it held less than 1 MB more for a minute of load"] is True


FINE_MEMORY = {"slope": 0.9, "at_rest": {"before": 900_000_000, "after": 909_000_000}}
FINE: dict[str, Any] = {
    "errors": {},
    "requests": {"streaming": 9},
    "settled": {"seconds": 0.1, "queued": 0.0, "active": 0.0},
    "handles": {"before": {"open_files": 7}, "after": {"open_files": 8}},
    "seconds": 600.0,
    "memory": FINE_MEMORY,
    "stopped": {"exit_code": 0},
}


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({}, ""),
        ({"memory": {"slope": None}}, ""),
        ({"memory": {"slope": 1.0, "slope_range": [-5, 7]}}, "memory grew"),  # rest was not seen
        ({"memory": FINE_MEMORY | {"slope": 1.0, "slope_range": [-5, 7]}}, ""),
        ({"memory": FINE_MEMORY | {"slope": 1.5, "slope_range": [1, 2]}}, "memory grew"),
        ({"memory": {"slope": 1.0}}, "memory grew"),
        ({"memory": {"slope": 0.9, "at_rest": {"before": None, "after": None}}}, ""),
        ({"memory": {"slope": 0.9, "at_rest": {"before": 0, "after": 10_000_000}}}, "at rest"),
        ({"errors": {"streaming": {"silent": 1}}}, "polite clients"),
        ({"errors": {"slow reader": {"silent": 1}}}, "polite clients"),
        ({"requests": {"malformed": 9}}, "polite clients"),
        ({"errors": {"leaving": {"status 500": 1}}}, "clients that left"),
        ({"errors": {"malformed": {"status 500": 1}}}, "malformed bodies"),
        ({"settled": {"seconds": 0.5, "queued": 0.0, "active": 1.0}}, "nothing queued"),
        ({"settled": {"seconds": 1.5, "queued": 0.0, "active": 0.0}}, "nothing queued"),
        ({"handles": {"before": {"open_files": 7}, "after": {"open_files": 70}}}, "no connection"),
        ({"stopped": {"exit_code": 1}}, "it stopped"),
        ({"stopped": {"exit_code": None}}, "it stopped"),
    ],
)
def test_what_must_hold(
    change: dict[str, Any], failed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_findings, "SETTLE", 1.0)
    checks = server_findings.criteria(FINE | change)
    wrong = [one["name"] for one in checks if one["passed"] is False]
    assert len(wrong) == bool(failed)
    assert "".join(wrong).startswith(failed)


def test_a_servers_own_count_of_tokens() -> None:
    said = [(10.0 * n, {"cerebrum_generated_tokens_total": 30.0 * n}) for n in range(4)]
    assert server_findings.generated(said, 30) == 3
    assert server_findings.generated([*said[:3], (30.0, said[0][1])], 25) == 3
    assert server_findings.generated(said, 5) is None


def test_a_server_that_says_no_figures_is_told(server: StandIn) -> None:
    with pytest.raises(CerebrumError, match="no cerebrum_speed"):
        server_findings.gauge(server_process.metrics(server.address), "speed")


def test_slopes_are_of_the_load_from_minute_2(server: StandIn) -> None:
    watch = server_process.Watch(os.getpid(), server.address)
    watch.samples = [(float(s), 10**9 if 120 <= s <= 300 else 0) for s in range(400)]
    found = server_findings.memory(watch, 300)
    assert found["slope"] == found["floor_slope"] == pytest.approx(0)
    assert found["peak"] == 10**9
    assert server_findings.memory(watch, 400)["slope"] < -100


def test_a_leak_shows_beside_keys_and_values_that_come_and_go(server: StandIn) -> None:
    watch = server_process.Watch(os.getpid(), server.address)
    held = {s: (s * 7919 % 300) * 10**6 for s in range(0, 600, 10)}
    none = dict.fromkeys(("cerebrum_queued", "cerebrum_active"), 0.0)
    watch.said = [
        (float(s), none | {"cerebrum_kv_bytes": kv, "cerebrum_prefix_cache_bytes": 5e6})
        for s, kv in held.items()
    ]
    leak = 2 * 10**6 / 60  # bytes a second
    watch.samples = [(s + 0.2, 10**9 + int(held[s - s % 10] + leak * s)) for s in range(0, 600, 1)]
    assert server_findings.memory(watch, 600)["rest_slope"] == pytest.approx(2, abs=0.1)


def test_what_a_process_has() -> None:
    size = server_process.resident(os.getpid())
    assert size is not None
    assert 10_000_000 < size < 100_000_000_000
    by_ps = server_process._resident_by_ps(os.getpid())
    assert by_ps is not None
    assert size / 2 < by_ps < size * 2
    assert server_process._resident_by_ps(2**22 + 1) is None
    if Path("/proc/self").exists():
        with Path(os.devnull).open() as _:
            more = server_process.handles(os.getpid())["open_files"]
        fewer = server_process.handles(os.getpid())["open_files"]
        assert more is not None
        assert fewer == more - 1


SERVES = """
import http.server, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print("loading", file=sys.stderr)
print(f"it listens at http://127.0.0.1:{server.server_port} (Ctrl-C ends it)")
server.serve_forever()
"""


def test_a_server_is_started_and_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "serves.py").write_text(SERVES)
    (tmp_path / "fails.py").write_text("raise SystemExit('error: no such model')")
    monkeypatch.chdir(tmp_path)
    with server_process.Process(["serves"]) as server:
        assert get(server.address, "/health") == ""
        assert server_process.resident(server.pid)
        assert server.stop() == -15  # of this server, which does not handle the signal
    with pytest.raises(CerebrumError, match="python -m fails does not serve: no such model"):
        server_process.Process(["fails"])
    assert server_process.resident(server.pid) is None
    with pytest.raises(CerebrumError, match="serves ended with code -15: "):
        server.check()


# Beside its peers


def engine(server: StandIn, settings: str = "its defaults") -> server_peers.Engine:
    return server_peers.Engine(server.address, "small", "1.0", settings, os.getpid())


def test_peers_are_asked_the_same(server: StandIn) -> None:
    with StandIn("company") as other:
        engines: dict[str, server_peers.Engine | str] = {
            OURS: engine(server),
            "same": replace(engine(server), version="2.0"),
            "other": engine(other),
            "absent": "not installed",
        }
        found = server_peers.measure(engines, 4, 2, 8)
    assert json.loads(json.dumps(found)) == found
    rows = found["engines"]
    assert rows["absent"] == {"failure": "not installed"}
    assert rows["same"]["together"]["same"] == rows["same"]["together"]["compared"] == 8
    assert rows["same"]["alone"]["same"] == rows["other"]["alone"]["same"] == 2
    assert rows["other"]["together"]["same"] < 8
    ours = rows[OURS]["together"]
    assert ours["completion_tokens"] == 2 * 4 * 8
    assert ours["pace"]["median"] > 0
    assert ours["first"]["median"] <= ours["last"]["median"]
    assert ours["going"]["low"] > 0
    assert rows["same"]["together"]["ratio"]["low"] > 0
    text = "\n".join(server_peers_report.text(found))
    assert "| 4 at once" in text
    assert "- absent: not installed" in text
    assert re.search(r"- same: 2.0; its defaults; \d+ MB resident at the end", text)


def test_every_round_has_its_own_questions() -> None:
    asked = [server_peers.questions("small", number, 8, 16) for number in range(3)]
    texts = [one.body["messages"][-1]["content"] for round_ in asked for one in round_]
    assert len({text[:20] for text in texts}) == 24
    assert asked[0] == server_peers.questions("small", 0, 8, 16)


def test_an_answer_that_is_none_ends_the_bench() -> None:
    asked = [Question({"model": "none", "stream": True, "max_tokens": 3}, CHAT)]
    with StandIn("takes nonsense") as server, pytest.raises(CerebrumError, match="no answer"):
        server_peers.at_once(server.address, asked)
