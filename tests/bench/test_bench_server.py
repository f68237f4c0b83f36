"""The benches of the local server, on a stand-in that answers from a script, rightly or not."""

import asyncio
import hashlib
import json
import random
import re
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import psutil
import pytest
import uvicorn
from conftest import MakeCheckpoint
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from bench import server_client, server_findings, server_load, server_mix, server_peers
from bench.peers import OURS
from bench.server_client import CHAT, Heard, Question, ask, get
from bench.server_mix import KINDS, Mix, chat, fixed_set, nonsense, user
from bench.server_process import serving
from mlx_cerebrum.errors import CerebrumError

MODELS = ("small", "large")
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "its", "paw.")


class StandIn:
    """An OpenAI-compatible server whose answers follow from the question; in this process, with
    the face of a `Served`.

    `wrong` names what it does wrong: "no end", "tokens", "500", "busy", "leak" (a client that
    leaves keeps its place), "company" (another text while others are asking), "takes nonsense".
    """

    def __init__(self, *wrong: str) -> None:
        self.wrong = set(wrong)
        self.active = self.asked = 0
        self.process = psutil.Process()
        app = Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/metrics", self._metrics),
                Route("/{path:path}", self._answer, methods=["POST"]),
            ]
        )
        config = uvicorn.Config(app, port=0, log_level="error", ws="none", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)

    def __enter__(self) -> Self:
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            self._thread.join(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def rss(self) -> int:
        return self.process.memory_info().rss

    def check(self) -> None:
        pass

    def stop(self) -> int:
        return 0

    def _models(self, _: Request) -> Response:
        return JSONResponse({"data": [{"id": name} for name in MODELS]})

    def _metrics(self, _: Request) -> Response:
        values = {"queued": 0, "active": self.active, "prefix_cache_bytes": 5e6}
        lines = [f"cerebrum_{name} {value}\n" for name, value in values.items()]
        return PlainTextResponse("".join([*lines, "cerebrum_generated_tokens_total 50\n"]))

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
        if "500" in self.wrong and self.asked % 5 == 0 and self.asked > len(fixed_set(MODELS)):
            return PlainTextResponse("oh", 500)
        if "busy" in self.wrong and self.active and self.asked % 5 == 0:
            return JSONResponse({"error": {}}, 429, headers={"Retry-After": "0.1"})
        if "company" in self.wrong and self.active:
            words = [["quite", "other", "words"], words[1:]][self.asked % 2]
        said, finish = answer(words, body)
        prompt, spoken = words_in(body), len(said) * body.get("n", 1) + ("tokens" in self.wrong)
        about = {"id": f"{self.asked}", "model": body["model"]}
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": spoken,
            "total_tokens": prompt + spoken,
            "prompt_tokens_details": {"cached_tokens": prompt // 2},
        }
        part = "delta" if body.get("stream") else "message"

        def choice(index: int, text: str, finish: str | None) -> dict[str, Any]:
            key = {part: {"content": text}} if request.url.path == CHAT else {"text": text}
            return {"index": index, "finish_reason": finish} | key

        if not body.get("stream"):
            choices = [choice(index, joined(said), finish) for index in range(body.get("n", 1))]
            return JSONResponse(about | {"choices": choices, "usage": usage})
        ends = [None] * (len(said) - 1) + [finish]
        events = [
            about | {"choices": [choice(index, f"{word} ", end)]}
            for index in range(body.get("n", 1))
            for word, end in zip(said, ends, strict=True)
        ]
        if (body.get("stream_options") or {}).get("include_usage"):
            events.append(about | {"choices": [], "usage": usage})
        return StreamingResponse(self._stream(events), media_type="text/event-stream")

    async def _stream(self, events: list[dict[str, Any]]) -> AsyncIterator[str]:
        self.active += 1
        gone = True
        try:
            yield ": keep-alive\n\n"
            for event in events:
                yield f"data: {json.dumps(event)}\n\n"
                await asyncio.sleep(0.001)
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


# A request and what is wrong with its answer


def test_an_answers_parts(server: StandIn) -> None:
    asked = question(stream=True)
    heard = ask(server.address, asked, count)
    choice = heard.choices[0]
    assert choice.text == joined(words_of(asked.body, CHAT)[:8])
    assert choice.finish == "length"
    assert heard.tokens == {"prompt": 4, "completion": 8, "cached": 2}
    assert heard.first == choice.times[0]
    assert choice.times == sorted({heard.sent, *choice.times})[1:]
    assert len(choice.times) == 8


def raw_server(data: bytes, *, then: float = 0.0) -> tuple[str, threading.Thread]:
    """Sends these bytes to the first client, whatever it asks, and closes."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listening, listening.accept()[0] as client:
            asked = client.recv(65536)
            while not asked.endswith(b"}"):  # else closing would say that it was not read
                asked += client.recv(65536)
            client.sendall(data)
            threading.Event().wait(then)

    thread = threading.Thread(target=serve)
    thread.start()
    return f"127.0.0.1:{listening.getsockname()[1]}", thread


def answered(data: bytes, asked: Question) -> Heard:
    address, thread = raw_server(data)
    heard = ask(address, asked, count)
    thread.join()
    return heard


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
DONE, LAST = "data: [DONE]\n\n", b"0\r\n\r\n"


def chunk(text: str) -> bytes:
    return f"{len(text):x}\r\n{text}\r\n".encode()


def whole(body: Any, status: int = 200) -> bytes:
    text = json.dumps(body)
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode()


def event(**more: Any) -> dict[str, Any]:
    return {"id": "1", "model": "small", "choices": []} | more


def piece(text: str, finish: str | None = None) -> dict[str, Any]:
    return event(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": finish}])


def usage(prompt: int, said: int, total: int) -> dict[str, Any]:
    counts = {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": total}
    return event(usage=counts)


TEXT = [piece("The"), piece(" cat", "length")]
RIGHT = [*TEXT, usage(4, 8, 12)]


def events(found: list[Any]) -> str:
    return "".join(f"data: {json.dumps(one)}\n\n" for one in found)


def stream(*found: Any) -> bytes:
    return HEAD + chunk(events(list(found)) + DONE) + LAST


SAID = events(RIGHT)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (stream(*RIGHT), ""),
        (HEAD + chunk(f": x\n\n{SAID[:9]}") + chunk(SAID[9:] + DONE) + LAST, ""),
        (stream(*TEXT), "no usage"),
        (stream(RIGHT[0], RIGHT[2]), "finish reasons [None]"),
        (stream(piece("The", "stop"), *RIGHT[1:]), "more after a finish reason"),
        (stream(*TEXT, usage(5, 8, 13)), "5 prompt tokens, not 4"),
        (stream(*TEXT, usage(4, 8, 11)), "are not 11"),
        (stream(*TEXT, usage(4, 7, 11)), "7 tokens for finish reasons ['length']"),
        (stream(*TEXT, usage(4, 9, 13)), "9 tokens for finish reasons ['length']"),
        (stream(piece("XYZ"), *RIGHT), "past a stop string"),
        (stream(*RIGHT, {"error": {"message": "no"}}), "error in the stream"),
        (stream(piece("The") | {"id": "2"}, *RIGHT), "several answers"),
        (stream(*(one | {"model": "large"} for one in RIGHT)), "another model"),
        (stream({"id": 1}), "misshapen: KeyError"),
        (stream([]), "misshapen"),
        (stream(event(choices=[{"index": 1, "delta": {}}])), "misshapen: IndexError"),
        (HEAD + chunk(SAID) + LAST, "no [DONE]"),
        (HEAD + chunk(SAID + DONE), "IncompleteRead"),  # no last chunk
        (HEAD + chunk(SAID) + b"40\r\ndata: [D", "IncompleteRead"),
        (HEAD + chunk(SAID + DONE[:-1]) + LAST, "no [DONE]"),
        (HEAD + chunk(f"{SAID}Hello\n\n{DONE}") + LAST, "is no event"),
        (HEAD + chunk(f"{SAID}{DONE}data: 1\n\n") + LAST, "after the last"),
        (b"", "RemoteDisconnected"),
        (b"nonsense\r\n\r\n", "BadStatusLine"),
        (whole("oh", 500), 'status 500 for b\'{"model": "small"'),
        (whole({}), "a stream of type text/plain"),
    ],
)
def test_a_wrong_stream_is_seen(data: bytes, said: str) -> None:
    heard = answered(data, question(stream=True, stop=["XYZ"]))
    assert bool(heard.faults) == bool(said), heard.faults
    assert said in "; ".join(heard.faults)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"choices": []}, "[None]"),
        ({"model": "large"}, "another model"),
        ({"usage": None}, "no usage"),
    ],
)
def test_a_wrong_whole_answer_is_seen(change: dict[str, Any], said: str) -> None:
    choice = {"index": 0, "message": {"content": "The"}, "finish_reason": "length"}
    heard = answered(whole(RIGHT[2] | {"choices": [choice]} | change), question())
    assert bool(heard.faults) == bool(said)
    assert said in "; ".join(heard.faults)


def test_silence_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_client, "_SILENCE", 0.05)
    address, thread = raw_server(HEAD, then=0.3)
    assert ask(address, question()).faults == ["silent for 0 s"]
    thread.join()


def test_nobody_there_is_a_fault() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    assert "ConnectionRefusedError" in ask(address, question()).faults[0]
    with pytest.raises(CerebrumError, match="GET /: ConnectionRefusedError"):
        get(address, "/")


def test_leaving(server: StandIn) -> None:
    asked = chat("small", user("Hello"), 200, stream=True)
    heard = ask(server.address, replace(asked, leave_after=3))
    assert heard.left
    assert heard.faults == []
    assert len(heard.choices[0].times) == 3
    heard = ask(server.address, replace(asked, leave_within=0.05))
    assert heard.left
    assert heard.choices[0].finish is None


def test_a_refusal_says_why(server: StandIn) -> None:
    for asked in nonsense("small"):
        assert ask(server.address, asked).faults == [], asked.data[:80]
    asked = Question({}, malformed=b"{}")
    right = {"error": {"message": "no", "type": "invalid_request_error"}}
    assert answered(whole(right, 400), asked).faults == []
    for wrong in ({"error": {"message": 1, "type": "a"}}, {"error": "no"}, {}, None):
        assert answered(whole(wrong, 400), asked).faults
    for status in (200, 500):
        assert f"status {status} for b'{{}}'" in answered(whole(right, status), asked).faults[0]


# The mix


def test_the_mix_is_drawn_from_its_seed_and_has_of_everything() -> None:
    def drawn(seed: int) -> list[Question]:
        mix = Mix(MODELS, fixed_set(MODELS), seed)
        return [mix.draw() for _ in range(1000)]

    asked = drawn(1)
    assert asked == drawn(1)
    assert asked != drawn(2)
    assert {one.kind for one in asked} == set(KINDS)
    streams = [one for one in asked if one.kind == "streaming"]
    assert {one.body["model"] for one in streams} == set(MODELS)
    assert {one.n for one in streams} == {1, 2}
    for key in ("stop", "seed", "logprobs"):
        assert any(key in one.body for one in streams)
    prompts = [one.body["messages"][0]["content"] for one in streams]
    lengths = [len(prompt.split()) for prompt in prompts]
    assert min(lengths) < 10
    assert max(lengths) > 900
    assert len(set(prompts)) > 0.95 * len(prompts)


# The load

COUNTER = server_load.counter


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model to count tokens by, and no long waits."""
    monkeypatch.setattr(server_mix, "PATIENCE", (0.001, 0.5))
    monkeypatch.setattr(server_mix, "PAUSES", (0.001, 0.005))
    monkeypatch.setattr(server_findings, "SETTLE", 60.0)
    monkeypatch.setattr(server_load, "counter", lambda model: count)


@pytest.fixture
def load(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, Any]]:
    def run(*wrong: str) -> tuple[int, Any]:
        with StandIn(*wrong) as server:
            monkeypatch.setattr(server_load, "serving", lambda words: nullcontext(server))
            code = server_load.main(["--clients", "6", "--minutes", "0.02", "--json"])
        out = capsys.readouterr()
        return code, json.loads(out.out)["results"] if code < 2 else out.err

    return run


def passed(found: dict[str, Any]) -> dict[str, bool | None]:
    return {one["name"]: one["passed"] for one in found["criteria"]}


def test_a_right_server_passes(load: Callable[..., tuple[int, Any]]) -> None:
    code, found = load("busy")
    assert code == 0
    assert found["errors"] == {}
    assert set(passed(found).values()) == {True, None}  # too short for a slope
    assert found["busy"] > 0
    assert sum(found["requests"].values()) > 30
    assert found["fixed"]["same"] > 0
    assert found["fixed"]["differing"] == {}
    assert found["tokens"]["cached"] > 0
    assert found["first"]["all"]["max"] >= found["first"]["all"]["median"] > 0
    assert found["memory"]["slope"] is None
    assert "NO" not in "\n".join(server_findings.text(found))


def test_a_wrong_server_fails(
    monkeypatch: pytest.MonkeyPatch, load: Callable[..., tuple[int, Any]]
) -> None:
    monkeypatch.setattr(server_load, "_PATIENCE", 0.3)
    code, found = load("leak", "company", "takes nonsense", "500")
    assert code == 1
    assert passed(found)["nothing queued or decoded a second after all had left"] is False
    assert passed(found)["malformed bodies were refused, each with its error"] is False
    assert passed(found)["polite clients saw no error"] is False
    assert any(fault.startswith("status 500 for") for fault in found["errors"]["streaming"])
    assert found["fixed"]["differing"]
    text = "\n".join(server_findings.text(found))
    assert re.search(r"- malformed, \d+ x: status 200 for", text)
    assert re.search(r"to another text +\| \d+ x \w+.*, from character 0 on", text)


@pytest.mark.parametrize(("wrong", "said"), [("no end", "no [DONE]"), ("tokens", "usage: ")])
def test_a_question_alone_must_be_right(
    wrong: str, said: str, load: Callable[..., tuple[int, Any]]
) -> None:
    code, error = load(wrong)
    assert code == 2
    assert "asked alone" in error
    assert said in error


def test_a_server_that_dies_ends_the_load(
    monkeypatch: pytest.MonkeyPatch, load: Callable[..., tuple[int, Any]]
) -> None:
    def check(self: StandIn) -> None:
        if self.asked > len(fixed_set(MODELS)) + 10:
            raise CerebrumError("it ended with code 1")

    monkeypatch.setattr(StandIn, "check", check)
    code, error = load()
    assert code == 2
    assert error.endswith("error: it ended with code 1\n")


@pytest.mark.long
def test_the_real_server_under_load(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it, in a process of its own, on a tiny model of random weights."""
    monkeypatch.setattr(server_load, "counter", COUNTER)
    path = checkpoint(sliding_window=64, max_position_embeddings=16384)
    words = ["--model", str(path), "--clients", "4", "--minutes", "0.05", "--json"]
    code = server_load.main(words)
    document = json.loads(capsys.readouterr().out)
    found = document["results"]
    assert found["errors"] == {}
    assert code == 0, found["criteria"]
    assert document["settings"]["model"] == "source"
    assert found["models"] == ["source"]
    assert found["stopped"]["exit_code"] == 0
    assert sum(found["requests"].values()) >= 4


@pytest.mark.parametrize("leak", [0.0, 40.0])
def test_a_slope_is_known_as_well_as_its_load_swings(leak: float) -> None:
    """Of swings as answers make them, 20 s long; the range has the leak in it."""
    chance = random.Random(3)
    height = [chance.uniform(-150e6, 150e6) for _ in range(31)]
    samples = [(float(s), int(2e9 + height[s // 20] + leak * 1e6 * s / 60)) for s in range(600)]
    found = server_findings.memory([*samples, (601.0, 0)], 600)  # after the load: no part of it
    low, high = found["slope_range"]
    assert low < leak < high
    assert low < found["slope"] < high
    assert 2 < high - low < 40
    assert (low > 1) == bool(leak)
    assert found["end"] == 0
    assert server_findings.memory(samples, 150)["slope"] is None


RESTED = {"before": 900_000_000, "after": 909_000_000}
STEADY = {"slope": 0.0, "slope_range": [-0.9, 0.9], "at_rest": RESTED}
FINE: dict[str, Any] = {
    "errors": {},
    "requests": {"streaming": 9},
    "settled": {"seconds": 0.1, "queued": 0.0, "active": 0.0},
    "handles": {"before": {"open_files": 7}, "after": {"open_files": 8}},
    "seconds": 600.0,
    "memory": STEADY,
    "stopped": {"exit_code": 0},
}


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({}, ""),
        ({"memory": STEADY | {"slope_range": [-5, 7]}}, ""),  # too rough to say
        ({"memory": STEADY | {"slope_range": [1, 2]}}, "memory grew"),
        ({"memory": STEADY | {"at_rest": {"before": 0, "after": 10_000_000}}}, "at rest"),
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
    wrong = [
        one["name"] for one in server_findings.criteria(FINE | change) if one["passed"] is False
    ]
    assert len(wrong) == bool(failed)
    assert "".join(wrong).startswith(failed)


SERVES = """
import http.server, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

http.server.HTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
"""


def test_a_server_is_started_and_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "serves.py").write_text(SERVES)
    (tmp_path / "fails.py").write_text("print('loading'); raise SystemExit('error: no such model')")
    monkeypatch.chdir(tmp_path)
    with serving(["serves"]) as server:
        assert get(server.address, "/health") == ""
        assert 1e6 < server.rss() < 1e9
        server.check()
        assert server.stop() == -15  # of this server, which does not handle the signal
        with pytest.raises(CerebrumError, match="python -m serves ended with code -15: "):
            server.check()
    with (
        pytest.raises(CerebrumError, match="python -m fails ended with code 1: no such model"),
        serving(["fails"]),
    ):
        pass


# Beside its peers


def contender(server: Any, version: str = "1.0") -> server_peers.Contender:
    return server_peers.Contender(server, "small", version, "its defaults")


def test_peers_are_asked_the_same(server: StandIn) -> None:
    with StandIn("company") as other:
        up: dict[str, server_peers.Contender | str] = {
            OURS: contender(server),
            "same": contender(server, "2.0"),
            "other": contender(other),
            "absent": "not installed",
        }
        found = server_peers.compare(up, 4, 2, 8)
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
    text = "\n".join(server_peers.text(found))
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


@pytest.mark.parametrize(
    "words",
    [
        ["server_load", "--clients", "0"],
        ["server_load", "--minutes", "0"],
        ["server_peers", "--rounds", "0"],
        ["server_peers", "--max-tokens", "1"],
    ],
)
def test_wrong_flags_are_a_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    bench = {"server_load": server_load, "server_peers": server_peers}[words[0]]
    assert bench.main(words[1:]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
