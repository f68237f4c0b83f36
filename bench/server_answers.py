"""What a well-behaved client expects of an OpenAI-compatible answer, checked."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bench.server_client import Reply

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# Asked of a question: how many tokens its prompt has; None where nobody can tell.
Count = Callable[["Question"], int | None]


@dataclass(frozen=True)
class Question:
    """A request's body, and what its answer must be like."""

    body: dict[str, Any]
    path: str = CHAT

    @property
    def n(self) -> int:
        return int(self.body.get("n", 1))

    @property
    def max_tokens(self) -> int:
        return int(self.body["max_tokens"])

    @property
    def stop(self) -> list[str]:
        stop = self.body.get("stop") or []
        return [stop] if isinstance(stop, str) else list(stop)

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))


@dataclass
class Choice:
    text: str = ""
    finish: str | None = None
    times: list[float] = field(default_factory=list)  # when pieces of its text came


@dataclass
class Heard:
    """An answer put together, and all that is wrong with it."""

    choices: list[Choice]
    usage: dict[str, Any] | None = None
    faults: list[str] = field(default_factory=list)

    def usage_of(self, key: str) -> int:
        return int((self.usage or {}).get(key) or 0)

    @property
    def cached(self) -> int:
        """Tokens of the prompt that the server had from earlier ones."""
        details = (self.usage or {}).get("prompt_tokens_details") or {}
        return int(details.get("cached_tokens") or 0)

    @property
    def first(self) -> float | None:
        """When the first piece of text came."""
        return min((choice.times[0] for choice in self.choices if choice.times), default=None)

    @property
    def gaps(self) -> list[float]:
        """Seconds between the pieces of one choice."""
        return [
            after - before
            for choice in self.choices
            for before, after in zip(choice.times, choice.times[1:], strict=False)
        ]


def hear(asked: Question, reply: Reply, count: Count | None = None) -> Heard:
    """Read a reply as the answer to `asked`. A reply of another shape is a fault, not an error."""
    heard = Heard([Choice() for _ in range(asked.n)])
    if reply.broken is not None:
        heard.faults.append(reply.broken)
    elif reply.status != 200:
        heard.faults.append(f"status {reply.status}: {str(reply.body)[:200]}")
    else:
        try:
            (_streamed if asked.streams else _whole)(asked, reply, heard)
            _check(asked, heard, count)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            heard.faults.append(f"misshapen: {type(error).__name__}: {str(error)[:100]}")
    return heard


def _whole(asked: Question, reply: Reply, heard: Heard) -> None:
    body = reply.body
    heard.usage = dict(body["usage"])
    if body["model"] != asked.body["model"]:
        heard.faults.append("it names another model")
    if sorted(choice["index"] for choice in body["choices"]) != list(range(asked.n)):
        heard.faults.append(f"{len(body['choices'])} choices for n={asked.n}")
        return
    for found in body["choices"]:
        choice = heard.choices[found["index"]]
        choice.text = found["message"]["content"] if asked.path == CHAT else found["text"]
        choice.finish = found["finish_reason"]


def _streamed(asked: Question, reply: Reply, heard: Heard) -> None:
    if not reply.ended:
        heard.faults.append("the stream has no [DONE]")
    ids = set()
    for when, event in reply.events:
        if "error" in event:
            heard.faults.append(f"error in the stream: {str(event['error'])[:100]}")
            return
        ids.add((event["id"], event["model"]))
        if not event["choices"]:
            heard.usage = event["usage"]
        for found in event["choices"]:
            choice = heard.choices[found["index"]]
            piece = (found["delta"].get("content") or "") if asked.path == CHAT else found["text"]
            if choice.finish is not None:
                heard.faults.append("more after a finish reason")
            if piece:
                choice.times.append(when)
            choice.text += piece
            choice.finish = found.get("finish_reason")
    if len(ids) != 1 or {model for _, model in ids} != {asked.body["model"]}:
        heard.faults.append("its events name several answers, or another model")
    wanted = bool((asked.body.get("stream_options") or {}).get("include_usage"))
    if wanted != (heard.usage is not None):
        heard.faults.append("no usage" if wanted else "a usage that nobody asked for")


def _check(asked: Question, heard: Heard, count: Count | None) -> None:
    finishes = [choice.finish for choice in heard.choices]
    if not set(finishes) <= {"stop", "length"}:
        heard.faults.append(f"finish reasons {finishes}")
    for choice in heard.choices:
        if any(stop in choice.text for stop in asked.stop):
            heard.faults.append("a text goes on past a stop string")
    if heard.usage is None:
        return
    prompt, said, total = (
        heard.usage[key] for key in ("prompt_tokens", "completion_tokens", "total_tokens")
    )
    known = None if count is None else count(asked)
    if known is not None and prompt != known:
        heard.faults.append(f"usage: {prompt} prompt tokens, not {known}")
    if total != prompt + said:
        heard.faults.append(f"usage: {prompt} and {said} are not {total}")
    most, least = asked.n * asked.max_tokens, finishes.count("length") * asked.max_tokens
    if not max(1, least) <= said <= most:
        heard.faults.append(f"usage: {said} tokens for finish reasons {finishes}")
    if not 0 <= heard.cached < max(1, prompt):
        heard.faults.append(f"usage: {heard.cached} cached of {prompt} prompt tokens")
