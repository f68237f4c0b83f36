"""A server of its own process: two clients, both models, an end in order."""

import http.client
import json
import re
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryFile
from typing import IO, Any

from mlx_cerebrum import device
from mlx_cerebrum.doctor import program
from mlx_cerebrum.doctor.check import Found, Settings
from mlx_cerebrum.errors import CerebrumError

REQUESTS, QUICK_REQUESTS = 200, 24
CLIENTS = 2
_TOKENS = 4  # of each answer
_GRACE = 30.0  # seconds that the server may take to end
_ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)")
_QUESTIONS = (
    "What is the capital of France?",
    "Name a colour.",
    "Count to five.",
    "Say hello in Spanish.",
    "What do bees make?",
)

Answers = dict[tuple[str, str], Counter[str]]  # by model and question: how often each was given


class Server:
    """A process that serves a model, once its first line has come."""

    def __init__(self, process: subprocess.Popen[str], errors: IO[bytes]) -> None:
        self.process, self._errors = process, errors
        line = process.stdout.readline() if process.stdout else ""
        found = _ADDRESS.search(line)
        if found is None:
            process.kill()
            raise CerebrumError(f"the server does not serve: {self.said() or 'it says nothing'}")
        self.port = int(found[1])

    def said(self) -> str:
        """The last line on its standard error."""
        self._errors.seek(0)
        return program.last_line(self._errors.read().decode(errors="replace"))

    def ask(self, method: str, path: str, body: Any = None) -> str:
        """Raises CerebrumError for an answer that is no success."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=program.PATIENCE)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            text = response.read().decode()
            if response.status != 200:
                raise CerebrumError(f"status {response.status}: {program.last_line(text)}")
            return text
        finally:
            connection.close()

    def end(self) -> int | None:
        """Its exit code after SIGTERM; None where it had to be killed."""
        self.process.terminate()
        try:
            return self.process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            return None


@contextmanager
def server(words: Sequence[str]) -> Iterator[Server]:
    with (
        TemporaryFile() as errors,
        subprocess.Popen(
            program.words(["serve", *words, "--port", "0", "--quiet"]),
            env=program.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        try:
            yield Server(process, errors)
        finally:
            process.kill()


def serving(settings: Settings) -> Found:
    """Two clients that ask at once, one of them for streams; then SIGTERM."""
    words = ["--model", settings.model]
    # Only in float32 is an answer the same in any company.
    exact = settings.model == "demo"
    words += ["--dtype", "float32"] if exact and device.on_gpu() else []  # a CPU's own choice
    count = QUICK_REQUESTS if settings.quick else REQUESTS
    with server(words) as there:
        models = [one["id"] for one in json.loads(there.ask("GET", "/v1/models"))["data"]]
        answers, failures = talk(there, models, count)
        code = there.end()
        said = there.said()
    given = sum(sum(each.values()) for each in answers.values())
    differing = sum(len(each) > 1 for each in answers.values())
    ended = "in order" if code == 0 else "KILLED" if code is None else f"with code {code}"
    found = f"{given} of {count} answered by {len(models)} models; it ended {ended}"
    if failures:
        found += f"; the first that failed: {failures[0]}"
    if differing:
        found += f"; {differing} of {len(answers)} questions had several answers"
    if code != 0 and said:
        found += f"; it said: {said}"
    passed = given == count and code == 0 and not (exact and differing)
    data = {"requests": count, "answered": given, "code": code, "differing": differing}
    return Found(passed, found, data=data | {"models": len(models)})


def talk(there: Server, models: Sequence[str], count: int) -> tuple[Answers, list[str]]:
    """What was answered, and what failed, in a line each."""
    answers: Answers = {}
    failures: list[str] = []
    lock = threading.Lock()

    def client(number: int) -> None:
        for turn in range(number, count, CLIENTS):
            asked = turn // CLIENTS
            model = models[(asked + number) % len(models)]
            question = _QUESTIONS[asked // len(models) % len(_QUESTIONS)]
            try:
                text = _answer(there, model, question, stream=number == 0)
            except (CerebrumError, OSError, http.client.HTTPException, ValueError) as error:
                with lock:
                    failures.append(str(error) or type(error).__name__)
                continue
            with lock:
                answers.setdefault((model, question), Counter())[text] += 1

    clients = [threading.Thread(target=client, args=(n,)) for n in range(CLIENTS)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    return answers, failures


def _answer(there: Server, model: str, question: str, stream: bool) -> str:
    """Raises CerebrumError for one without an end."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": _TOKENS,
        "temperature": 0,
        "stream": stream,
    }
    text = there.ask("POST", "/v1/chat/completions", body)
    if not stream:
        choice = json.loads(text)["choices"][0]
        if choice["finish_reason"] not in ("stop", "length"):
            raise CerebrumError("an answer without an end")
        return str(choice["message"]["content"])
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data:")]
    if lines[-1:] != ["[DONE]"]:
        raise CerebrumError("a stream without an end")
    pieces = [json.loads(line)["choices"] for line in lines[:-1]]
    return "".join(piece[0]["delta"].get("content") or "" for piece in pieces if piece)
