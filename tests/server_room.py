"""What the server's tests share: an engine that says what it is told to, and a running server."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import byte_tokenizer

from mlx_cerebrum.decoding.logprobs import TokenLogprob
from mlx_cerebrum.server.app import Service, Settings
from mlx_cerebrum.server.jobs import NO_TOKEN, Engine, Event, Failed, Job, Piece, Stats
from mlx_cerebrum.server.listening import Server, bind, url
from mlx_cerebrum.tokenizer.chat_formats import BUILT_IN
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
WAIT = 30.0  # seconds; how long a test waits for what should happen at once
CONTEXT = 512
VOCABULARY = 259
_SIZES: Mapping[str, int] = {"context_length": CONTEXT, "vocabulary_size": VOCABULARY}
MODELS: Mapping[str, Mapping[str, int | None]] = {
    "small": {"positions": 8, "blocks": 8, "sliding_window": 12, **_SIZES},
    "small-deep": {"positions": 12, "blocks": 8, "sliding_window": None, **_SIZES},
}
ANSWER = "Hello there, all of you."


def tokenizer_in(directory: Path) -> Tokenizer:
    """256 bytes and three control tokens: token 3 + b is, for printable ASCII, a byte."""
    byte_tokenizer(directory)
    tokenizer = Tokenizer.from_directory(directory)
    tokenizer.use_format(BUILT_IN["cerebrum"])
    return tokenizer


@dataclass(eq=False)
class FakeTask:
    job: Job
    cancelled: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self.cancelled.set()


Script = Callable[[FakeTask], Iterable[Event]]


class FakeEngine:
    """Runs `script` for each job, on a thread of its own; raises `refuse` instead, if set."""

    script: Script
    refuse: Exception | None

    def __init__(self, tokenizer: Tokenizer, script: Script | None = None) -> None:
        self.tokenizer = tokenizer
        self.ended = threading.Event()
        self.reset()
        if script is not None:
            self.script = script

    def reset(self) -> None:
        self.script = self.say()
        self.refuse = None
        self.tasks: list[FakeTask] = []
        self.submitted = threading.Semaphore(0)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(MODELS)

    @property
    def closed(self) -> bool:
        return self.ended.is_set()

    @property
    def jobs(self) -> list[Job]:
        return [task.job for task in self.tasks]

    def say(self, text: str = ANSWER, gate: Callable[[FakeTask], bool] = lambda _: True) -> Script:
        """Every choice says `text`, a character a token; `gate` is asked before each of them."""

        def script(task: FakeTask) -> Iterator[Event]:
            job = task.job
            tokens = self.tokenizer.encode(text, add_bos=False)[: job.max_tokens]
            if not tokens:
                yield from (Piece(choice, NO_TOKEN, "", "length", 1) for choice in range(job.n))
            for number, token in enumerate(tokens):
                last = number == len(tokens) - 1
                reason = ("length" if len(tokens) == job.max_tokens else "stop") if last else None
                for choice in range(job.n):
                    if not gate(task):
                        return
                    yield piece(job, choice, token, text[number], reason)

        return script

    def submit(
        self, job: Job, deliver: Callable[[Event], None], *, follows: bool = False
    ) -> Callable[[], None]:
        if self.refuse is not None:
            raise self.refuse
        task = FakeTask(job)
        self.tasks.append(task)

        def run() -> None:
            for event in self.script(task):
                if task.cancelled.is_set():
                    break
                deliver(event)
            task.over.set()

        threading.Thread(target=run, daemon=True).start()
        self.submitted.release()
        return task.cancel

    def task(self) -> FakeTask:
        """The next one that is submitted."""
        assert self.submitted.acquire(timeout=WAIT)
        return self.tasks[-1]

    def stats(self) -> Stats:
        return Stats(1, 2, 30, 4, 50, {"stop": 6, "length": 0, "cancelled": 7, "failed": 0}, 8, 9)

    def close(self, grace: float) -> None:
        self.ended.set()
        for task in self.tasks:
            task.over.wait(grace)


def piece(job: Job, choice: int, token: int, text: str, reason: str | None = None) -> Piece:
    logprob = None
    if job.top_logprobs is not None:
        top = [(token, -0.5), (2, -1.5), (token ^ 1, float("-inf"))][: job.top_logprobs]
        logprob = TokenLogprob(token, -0.5, tuple(top))
    return Piece(choice, token, text, reason, cached_tokens=1, logprob=logprob)


def until_closed(engine: FakeEngine, message: str = "shutting down") -> Script:
    """One token, then nothing before the engine is closed; then the job fails."""

    def script(task: FakeTask) -> Iterator[Event]:
        yield piece(task.job, 0, 5, "H")
        while not task.cancelled.is_set():
            if engine.ended.wait(0.01):
                yield Failed(message)
                return

    return script


class Running:
    """A server on a port of its own; `client` speaks to it."""

    def __init__(self, service: Service, grace: float = 5.0, **client: Any) -> None:
        self.service = service
        self.socket = bind("127.0.0.1", 0, False)
        self.url = url(self.socket)
        self.port = int(self.socket.getsockname()[1])
        up = threading.Event()
        self.server = Server(service, grace, up.set)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)
        self.thread.start()
        assert up.wait(WAIT)
        self.client = httpx.Client(base_url=self.url, timeout=WAIT, **client)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(WAIT)
        assert not self.thread.is_alive()
        self.client.close()


@contextmanager
def serving(
    engine: Engine,
    tokenizer: Tokenizer,
    models: Mapping[str, Mapping[str, int | None]] = MODELS,
    **settings: Any,
) -> Iterator[Running]:
    running = Running(Service(engine, models, tokenizer, Settings(**settings)))
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_in(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def one_server(tokenizer: Tokenizer) -> Iterator[Running]:
    with serving(FakeEngine(tokenizer), tokenizer) as running:
        yield running


@pytest.fixture
def server(one_server: Running) -> Running:
    """The same for every test of a module: its engine forgets what the one before told it."""
    fake(one_server).reset()
    return one_server


def chat(text: str = "Hi", **more: Any) -> dict[str, Any]:
    """A request's body."""
    return {"model": "small", "messages": [{"role": "user", "content": text}], **more}


def post(server: Running, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
    return server.client.post(path, json=body)


def events(answer: httpx.Response) -> list[Any]:
    """The objects of a stream; the last is "[DONE]" where it ended well."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    data = [line[6:] for line in answer.text.split("\n") if line.startswith("data: ")]
    return [one if one == "[DONE]" else json.loads(one) for one in data]


def ask(server: Running, body: Any, length: int | None = None) -> socket.socket:
    """A connection on which a question was asked, by hand: nothing of the answer is read."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    client = socket.create_connection(("127.0.0.1", server.port), WAIT)
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Length: {length or len(data)}\r\nContent-Type: application/json\r\n\r\n"
    )
    client.sendall(head.encode() + data)
    return client


def error(answer: httpx.Response) -> tuple[int, str, str | None]:
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in body["error"]["message"]
    return answer.status_code, body["error"]["code"], body["error"]["param"]


def fake(server: Running) -> FakeEngine:
    engine = server.service.engine
    assert isinstance(engine, FakeEngine)
    return engine


@contextmanager
def started(model: Path, *flags: str, **environment: str) -> Iterator[tuple[str, Any]]:
    """`(url, process)` of a server that is up."""
    arguments = [sys.executable, "-m", "mlx_cerebrum.server", "--model", str(model), "--port", "0"]
    arguments += ["--template", "cerebrum"]  # of a model without one, a line says what is assumed
    process = subprocess.Popen(
        [*arguments, *flags],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        ready = re.fullmatch(r"(http://127\.0\.0\.1:\d+)  source  \(.+B held, float32\)\n", line)
        if ready is None:
            process.kill()  # it may be up, but say so in other words
        assert ready, (line, process.communicate())
        yield ready[1], process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
