"""The benches of the local server, on a stand-in that answers from a script, rightly or not."""

import json
import random
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import MakeCheckpoint, slow

from bench import server_client, server_findings, server_load, server_peers
from bench.peers import OURS
from bench.server_client import Choice, Count, Heard, Question, ask, get
from bench.server_mix import KINDS, Mix, chat, fixed_set, user
from bench.server_process import serving
from mlx_cerebrum.errors import CerebrumError

MODELS = ("small", "large")


class StandIn:
    """A server, and what asking it gives: a text that follows from the question.

    `wrong` names what it does wrong: "alone", "500", "busy", "leak" (a client that leaves keeps its
    place), "company" (another text after the questions alone), "takes nonsense".
    """

    address = "here"

    def __init__(self, *wrong: str) -> None:
        self.wrong, self.asked, self.active = wrong, 0, 0

    @property
    def process(self) -> psutil.Process:
        return psutil.Process()

    def rss(self) -> int:
        return 10**9

    def check(self) -> None:
        """Raises CerebrumError where it is gone."""

    def stop(self) -> int:
        return 0

    def get(self, address: str, path: str) -> str:
        return json.dumps({"data": [{"id": name} for name in MODELS]})

    def metrics(self, address: str) -> dict[str, float]:
        idle = {"queued": 0.0, "prefix_cache_bytes": 5e6, "generated_tokens_total": 50.0}
        return idle | {"active": float(self.active)}

    def ask(self, address: str, asked: Question, count: Count | None = None) -> Heard:
        self.asked += 1
        late = self.asked > len(fixed_set(MODELS))  # not one of those alone
        now = time.perf_counter()
        heard = Heard(now, [Choice() for _ in range(asked.n)], status=200, retry_after=0.01)
        time.sleep(0.001)
        if asked.malformed is not None:
            heard.status = 200 if "takes nonsense" in self.wrong else 400
            heard.faults = [f"status 200 for {asked.data[:9]!r}"] * (heard.status == 200)
        elif "500" in self.wrong and late and self.asked % 5 == 0:
            heard.status, heard.faults = 500, ["status 500"]
        elif "busy" in self.wrong and late and self.asked % 5 == 0:
            heard.status = 429
        else:
            heard.left = asked.leave_after is not None or asked.leave_within is not None
            self.active += heard.left and "leak" in self.wrong
            heard.faults = ["no [DONE]"] * ("alone" in self.wrong)
            said = "other" if "company" in self.wrong and late else repr(asked.body)
            counts = {"prompt_tokens": 4, "completion_tokens": 2 * asked.n}
            heard.usage = counts | {"prompt_tokens_details": {"cached_tokens": 1}}
            for choice in heard.choices:
                choice.text, choice.times = said, [now + 0.1, now + 0.3]
        return heard


def count(asked: Question) -> int:
    return 4


def question(**more: Any) -> Question:
    return chat("small", user("Tell me about cats"), 8, **more)


# A request and what is wrong with its answer


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
STREAM = question(stream=True, stop=["XYZ"])
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
    heard = answered(data, STREAM)
    assert bool(heard.faults) == bool(said), heard.faults
    assert said in "; ".join(heard.faults)


def test_an_answers_parts() -> None:
    heard = answered(stream(*RIGHT), STREAM)
    choice = heard.choices[0]
    assert (choice.text, choice.finish) == ("The cat", "length")
    assert heard.tokens == {"prompt": 4, "completion": 8, "cached": 0}
    assert heard.first == choice.times[0]
    assert heard.sent < choice.times[0] < choice.times[1] < time.perf_counter()


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


def test_leaving() -> None:
    heard = answered(HEAD + chunk(events([piece("The")] * 5)), replace(STREAM, leave_after=3))
    assert heard.left
    assert heard.faults == []
    assert heard.choices[0].text == "The" * 3
    address, thread = raw_server(HEAD + chunk(events(TEXT)), then=0.3)
    heard = ask(address, replace(STREAM, leave_within=0.05))
    thread.join()
    assert heard.left
    assert heard.faults == []


def test_a_refusal_says_why() -> None:
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


@pytest.fixture
def load(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, Any]]:
    def run(*wrong: str) -> tuple[int, Any]:
        server = StandIn(*wrong)
        for name in ("ask", "get", "metrics"):
            monkeypatch.setattr(server_load, name, getattr(server, name))
        monkeypatch.setattr(server_load, "serving", lambda words: nullcontext(server))
        monkeypatch.setattr(server_load, "counter", lambda model: count)
        code = server_load.main(["--clients", "6", "--minutes", "0.02", "--json"])
        out = capsys.readouterr()
        return code, json.loads(out.out)["results"] if code < 2 else out.err

    return run


def passed(found: dict[str, Any]) -> dict[str, bool | None]:
    return {one["name"]: one["passed"] for one in found["criteria"]}


@slow
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


@pytest.mark.long
def test_a_wrong_server_fails(
    monkeypatch: pytest.MonkeyPatch, load: Callable[..., tuple[int, Any]]
) -> None:
    monkeypatch.setattr(server_load, "_PATIENCE", 0.3)
    code, found = load("leak", "company", "takes nonsense", "500")
    assert code == 1
    assert passed(found)["nothing queued or decoded a second after all had left"] is False
    assert passed(found)["malformed bodies were refused, each with its error"] is False
    assert passed(found)["polite clients saw no error"] is False
    assert "status 500" in found["errors"]["streaming"]
    assert found["fixed"]["differing"]
    text = "\n".join(server_findings.text(found))
    assert re.search(r"- malformed, \d+ x: status 200 for", text)
    assert re.search(r"to another text +\| \d+ x \w+.*, from character 0 on", text)


def test_a_question_alone_must_be_right(load: Callable[..., tuple[int, Any]]) -> None:
    code, error = load("alone")
    assert code == 2
    assert error.endswith("asked alone: no [DONE]\n")


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
    checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it, in a process of its own, on a tiny model of random weights."""
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
def test_what_must_hold(change: dict[str, Any], failed: str) -> None:
    checks = server_findings.criteria(FINE | change)
    wrong = [one["name"] for one in checks if one["passed"] is False]
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


def test_peers_are_asked_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    right, other = StandIn(), StandIn("company")
    other.address, other.asked = "there", 100

    def answer(address: str, asked: Question) -> Heard:
        return (right if address == "here" else other).ask(address, asked)

    monkeypatch.setattr(server_peers, "ask", answer)
    up: dict[str, server_peers.Contender | str] = {
        OURS: contender(right),
        "same": contender(right, "2.0"),
        "other": contender(other),
        "absent": "not installed",
    }
    found = server_peers.compare(up, 4, 2, 8)
    assert json.loads(json.dumps(found)) == found
    rows = found["engines"]
    assert rows["absent"] == {"failure": "not installed"}
    assert rows["same"]["together"]["same"] == rows["same"]["together"]["compared"] == 8
    assert rows["other"]["together"]["same"] == 0
    ours = rows[OURS]["together"]
    assert ours["completion_tokens"] == 2 * 4 * 2
    assert ours["pace"]["median"] == pytest.approx(8 / 0.3, rel=0.2)
    assert ours["first"]["median"] == pytest.approx(0.1)
    assert ours["going"]["median"] == pytest.approx(4 / 0.2, rel=0.2)
    assert rows["same"]["together"]["ratio"]["median"] == pytest.approx(1, rel=0.2)
    text = "\n".join(server_peers.text(found))
    assert "| 4 at once" in text
    assert "- absent: not installed" in text
    assert re.search(r"- same: 2.0; its defaults; \d+ MB resident at the end", text)


def test_every_round_has_its_own_questions() -> None:
    asked = [server_peers.questions("small", number, 8, 16) for number in range(3)]
    texts = [one.body["messages"][-1]["content"] for round_ in asked for one in round_]
    assert len({text[:20] for text in texts}) == 24
    assert asked[0] == server_peers.questions("small", 0, 8, 16)


def test_an_answer_that_is_none_ends_the_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_peers, "ask", lambda *_: Heard(0.0, [], faults=["status 500"]))
    with pytest.raises(CerebrumError, match="no answer to measure: status 500"):
        server_peers.at_once("here", [question(stream=True)])


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
