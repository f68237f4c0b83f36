"""`python -m mlx_cerebrum.server`: refused in one line, or up, and down again in good order."""

import json
import re
import signal
import sys
import threading
import time
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from conftest import MakeCheckpoint, slow
from server_room import WAIT, started

from mlx_cerebrum.__main__ import main as command
from mlx_cerebrum.server import __main__ as server
from mlx_cerebrum.server.listening import bind


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The one line that says why, from a command that loads nothing."""
    try:
        code = server.main(list(flags))
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--host", "0.0.0.0"), "API key"),
        (("--host", "no.such.name.invalid"), "no.such.name.invalid"),
        (("--port", "99999"), "65535"),
        (("--port", "x"), "port"),
        (("--api-key", ""), "API key"),
        (("--memory-limit", "0"), "memory-limit"),
        (("--q-group-size", "32"), "--q-bits"),
        (("--batch", "0"), "batch"),
        (("--mod", "demo"), "--mod"),
    ],
)
def test_refused_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    message: str,
) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("it was loaded")

    monkeypatch.setattr(server, "open_model", loaded)
    monkeypatch.delenv("MLX_CEREBRUM_API_KEY", raising=False)
    assert message in refused(capsys, *flags)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("15m", 900), ("2h", 7200), ("1.5h", 5400), ("0", None), ("never", None)],
)
def test_a_time_until_weights_rest(text: str, seconds: float | None) -> None:
    assert server.parser().parse_args(["--unload-after", text]).unload_after == seconds
    assert server.parser().parse_args([]).unload_after is None


@pytest.mark.parametrize("text", ["15", "0s", "9999h", "nan", "1e3s", "", "15 m", "m"])
def test_a_time_that_is_none(capsys: pytest.CaptureFixture[str], text: str) -> None:
    assert "no time such as 90s, 15m or 2h" in refused(capsys, "--unload-after", text)


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with bind("127.0.0.1", 0, False) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port}" in refused(capsys, "--port", port, "--model", "demo")


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist" in refused(capsys, "--port", "0", "--model", "./nothing-here")


def test_help_says_units_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command(["serve", "--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "default: 8080" in text
    assert "other users of the machine can see it" in text


@pytest.mark.parametrize(
    "signum",
    [
        signal.SIGTERM,
        *(pytest.param(s, marks=pytest.mark.long) for s in (signal.SIGINT, signal.SIGHUP)),
    ],
)
@slow
def test_up_and_down(checkpoint: MakeCheckpoint, signum: signal.Signals) -> None:
    model = checkpoint(max_position_embeddings=100_000)
    kept = {"MLX_CEREBRUM_API_KEY": "the-key"}
    with started(model, "--grace", "0.2", **kept) as (url, process):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        headers = {"Authorization": "Bearer the-key"}
        body = {"prompt": "Hi", "max_tokens": 90_000, "stream": True}
        path = f"{url}/v1/completions"
        with httpx.stream("POST", path, json=body, headers=headers, timeout=WAIT) as answer:
            lines = (line for line in answer.iter_lines() if line.startswith("data: "))
            next(lines)
            process.send_signal(signum)
            last = json.loads(list(lines)[-1].removeprefix("data: "))
        assert last["error"]["code"] == "shutting_down"
        assert process.wait(WAIT) == 0
        log = process.stderr.read()
    assert re.search(r"^POST /v1/completions 200, 3 \+ \d+ tokens, ", log, re.MULTILINE)
    assert "the-key" not in log
    assert "Traceback" not in log


@slow
def test_a_second_signal_ends_at_once(checkpoint: MakeCheckpoint) -> None:
    model = checkpoint(max_position_embeddings=100_000)
    with started(model, "--grace", "1000", "--quiet") as (url, process):
        body = {"prompt": "Hi", "max_tokens": 90_000, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=WAIT) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            while True:  # until it takes nobody any more
                try:
                    httpx.get(f"{url}/health", timeout=WAIT).raise_for_status()
                except httpx.HTTPError:
                    break
            next(lines)  # and still answers
            process.send_signal(signal.SIGTERM)
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
        assert process.wait(WAIT) == 128 + signal.SIGTERM
        assert process.stderr.read() == "interrupted\n"


@slow
def test_the_end_while_much_is_going_on(checkpoint: MakeCheckpoint) -> None:
    """Stopped and continued, then ended: an answer, a prompt being read, and two that wait."""
    model = checkpoint(max_position_embeddings=100_000)
    flags = ("--batch", "2", "--grace", "0.2", "--prefill-step-size", "8", "--quiet")
    with started(model, *flags, HOME="/dev/null", TMPDIR="/dev/null") as (url, process):
        ended: list[str] = []

        def ask(**body: Any) -> None:
            body = {"max_tokens": 30_000, **body}
            ended.append(httpx.post(f"{url}/v1/completions", json=body, timeout=WAIT).text)

        asking = [
            threading.Thread(target=ask, kwargs={"prompt": "Hi", "stream": stream})
            for stream in (True, False)
        ]
        with ExitStack() as stack:
            streams = []
            for prompt in ("Hi", "a" * 60_000):
                body = {"prompt": prompt, "max_tokens": 30_000, "stream": True}
                answer = httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=WAIT)
                streams.append(stack.enter_context(answer).iter_lines())
                next(streams[-1])
            for thread in asking:
                thread.start()
            while "cerebrum_queued 2.0" not in httpx.get(f"{url}/metrics").text:
                pass
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.2)
            process.send_signal(signal.SIGCONT)
            for _ in range(10):
                next(streams[0])
            process.send_signal(signal.SIGTERM)
            ended += ["\n".join(lines) for lines in streams]
        for thread in asking:
            thread.join(WAIT)
        assert process.wait(WAIT) == 0
        assert "Traceback" not in process.stderr.read()
    assert len(ended) == 4
    assert all('"code":"shutting_down"' in text[-200:] for text in ended)


@pytest.mark.parametrize(
    ("platform", "screen", "opens"),
    [("darwin", {}, True), ("linux", {"DISPLAY": ":0"}, True), ("linux", {}, False)],
)
def test_a_browser_is_opened_where_there_are_windows(
    monkeypatch: pytest.MonkeyPatch, platform: str, screen: dict[str, str], opens: bool
) -> None:
    opened, done = [], threading.Event()

    def browse(address: str) -> None:
        opened.append(address)
        done.set()

    monkeypatch.setattr("webbrowser.open", browse)
    monkeypatch.setattr(sys, "platform", platform)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in screen.items():
        monkeypatch.setenv(name, value)
    server.open_page("http://127.0.0.1:8080")
    assert done.wait(WAIT) if opens else not opened
