"""How /v1/chat/completions and /v1/completions write answers down, whole or as a stream's events.

What is sent is made as plain dicts of the shapes that `answers` describes: the log-probabilities of
one answer can be a million of them.
"""

import json
import secrets
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from mlx_cerebrum.decoding.calls import CallText
from mlx_cerebrum.decoding.logprobs import TokenLogprob
from mlx_cerebrum.server.jobs import NO_TOKEN, Piece
from mlx_cerebrum.server.spelling import Spelling
from mlx_cerebrum.tokenizer.detokenizer import StreamingDetokenizer

Json = dict[str, Any]


class HeldLogprobs:
    """One choice's log-probabilities, held back until the text of their tokens is final.

    Those of a stop string never come out, as its text does not.
    """

    def __init__(self) -> None:
        self._held: list[TokenLogprob] = []  # of tokens whose text is not final

    def add(self, piece: Piece) -> list[TokenLogprob]:
        """The log-probabilities that can be sent now: the text of their tokens is final."""
        if piece.logprob is not None:
            self._held.append(piece.logprob)
        ended = piece.finish_reason is not None and piece.logprob is not None
        if not piece.text and not ended:
            return []
        settled, self._held = self._held, []
        return settled


@dataclass
class Choice:
    """A choice so far."""

    index: int
    text: str = ""
    finish_reason: str | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    scores: Sequence[TokenLogprob] = ()  # of the prompt
    _held: HeldLogprobs = field(default_factory=HeldLogprobs)

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.finish_reason = piece.finish_reason
        self.tokens += ids(piece)
        self.logprobs += self._held.add(piece)
        self.scores = self.scores or piece.scores


def ids(piece: Piece) -> list[int]:
    return [] if piece.token == NO_TOKEN else [piece.token]


class Shape(Protocol):
    """One endpoint's way to write answers down. A stream is server-sent events, each whole."""

    def whole(self, choices: Sequence[Choice], usage: Json) -> Json: ...

    def opening(self, choices: Iterable[int]) -> list[bytes]:
        """What a stream begins with."""

    def pieces(self, index: int, piece: Piece) -> list[bytes]:
        """What a piece adds to its choice's stream."""

    def ending(self, usage: Json) -> list[bytes]: ...

    def failing(self, error: Json) -> list[bytes]:
        """What a stream ends with, given an error's body, where it can't go on."""


@dataclass(frozen=True)
class Head:
    """What every object of an answer repeats.

    usage: whether a stream's objects have a `usage`. prompts: of every choice, as token ids, where
    they are to come back.
    """

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: bool = False
    prompts: Sequence[Sequence[int]] | None = None

    @property
    def fields(self) -> Json:
        return {
            "id": self.id,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


def event(value: Json, name: str = "") -> bytes:
    named = b"event: " + name.encode() + b"\n" if name else b""
    return named + b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def finite(logprob: float) -> float:
    """JSON knows no infinity; OpenAI writes -9999 for what can't be."""
    return max(logprob, -9999.0) if logprob == logprob else -9999.0


def token_logprob(spelling: Spelling, token: int, logprob: float) -> Json:
    text, data = spelling(token)
    return {
        "token": text,
        "logprob": finite(logprob),
        "bytes": None if data is None else list(data),
    }


def chat_logprobs(spelling: Spelling, found: Iterable[TokenLogprob]) -> list[Json]:
    return [
        token_logprob(spelling, of.token, of.logprob)
        | {"top_logprobs": [token_logprob(spelling, *other) for other in of.top]}
        for of in found
    ]


class _Chunks(ABC):
    """A stream of chunks: each repeats the head, and has what is new of one choice."""

    kind: str

    def __init__(self, head: Head, spelling: Spelling, logprobs: bool) -> None:
        self._head, self._spelling, self._logprobs = head, spelling, logprobs
        self._held: defaultdict[int, HeldLogprobs] = defaultdict(HeldLogprobs)  # by choice
        self._begun: set[int] = set()  # choices whose prompt has come back

    @abstractmethod
    def chunks(self, index: int, piece: Piece) -> Iterable[Json]:
        """What a piece adds, as choices."""

    def opening(self, choices: Iterable[int]) -> list[bytes]:
        return []

    def pieces(self, index: int, piece: Piece) -> list[bytes]:
        return [self._event([choice]) for choice in self.chunks(index, piece)]

    def ending(self, usage: Json) -> list[bytes]:
        last = [self._event([], usage)] if self._head.usage else []
        return [*last, b"data: [DONE]\n\n"]

    def failing(self, error: Json) -> list[bytes]:
        return [event(error)]

    def _event(self, choices: list[Json], usage: Json | None = None) -> bytes:
        found = {**self._head.fields, "object": self.kind, "choices": choices}
        if self._head.usage:
            found["usage"] = usage
        return event(found)

    def _ids(self, index: int, tokens: Sequence[int]) -> Json:
        """A choice's token ids, and its prompt's where they have not come yet."""
        prompts = self._head.prompts
        if prompts is None:
            return {}
        found: Json = {"token_ids": list(tokens)}
        if index not in self._begun:
            self._begun.add(index)
            found["prompt_token_ids"] = list(prompts[index])
        return found


class ChatShape(_Chunks):
    """/v1/chat/completions.

    calls: the finish reason of an answer that calls a function; None where answers are text.
    """

    kind = "chat.completion.chunk"

    def __init__(
        self,
        head: Head,
        spelling: Spelling,
        logprobs: bool = False,
        calls: Literal["stop", "tool_calls"] | None = None,
    ) -> None:
        super().__init__(head, spelling, logprobs)
        self._calls = calls
        self._texts: defaultdict[int, CallText] = defaultdict(CallText)  # by choice

    def whole(self, choices: Sequence[Choice], usage: Json) -> Json:
        found = [
            {
                "index": choice.index,
                "message": self._message(choice),
                "logprobs": self._content(choice.logprobs),
                "finish_reason": self._reason(choice.index, choice.finish_reason),
                **self._ids(choice.index, choice.tokens),
            }
            for choice in choices
        ]
        return {**self._head.fields, "object": "chat.completion", "choices": found, "usage": usage}

    def opening(self, choices: Iterable[int]) -> list[bytes]:
        empty: Json = {"role": "assistant", "content": None if self._calls else "", "refusal": None}
        return [self._event([self._choice(index, empty)]) for index in choices]

    def chunks(self, index: int, piece: Piece) -> Iterable[Json]:
        settled = self._held[index].add(piece)
        logprobs = self._content(settled) if settled else None
        more = self._ids(index, ids(piece))
        deltas = self._called(index, piece.text) if self._calls else []
        if not self._calls and piece.text:
            deltas = [{"content": piece.text}]
        if not deltas and (logprobs or more):
            deltas = [{}] if self._calls else [{"content": ""}]
        more = {"logprobs": logprobs, **more}
        for delta in deltas:
            yield self._choice(index, delta) | more
            more = {}
        if piece.finish_reason is not None:
            yield self._choice(index, {}) | {
                "finish_reason": self._reason(index, piece.finish_reason)
            }

    def _choice(self, index: int, delta: Json) -> Json:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _reason(self, index: int, reason: str | None) -> str | None:
        """A call that a stop string cut is none."""
        return self._calls if self._texts[index].over and reason == "stop" else reason

    def _message(self, choice: Choice) -> Json:
        message: Json = {"role": "assistant", "content": choice.text, "refusal": None}
        if self._calls:
            text = self._texts[choice.index]
            arguments = text.add(choice.text)
            function = {"name": text.name, "arguments": arguments}
            call = {"id": call_id(), "type": "function", "function": function}
            message["content"] = None
            if text.name is not None:  # else it was cut before that was known
                message["tool_calls"] = [call]
        return message

    def _called(self, index: int, new: str) -> list[Json]:
        """What text adds to a call, as deltas: first its name, then its arguments."""
        text, deltas = self._texts[index], list[Json]()
        known = text.name
        arguments = text.add(new)
        if known is None and text.name is not None:
            function = {"name": text.name, "arguments": ""}
            call = {"index": 0, "id": call_id(), "type": "function", "function": function}
            deltas.append({"tool_calls": [call]})
        if arguments:
            deltas.append({"tool_calls": [{"index": 0, "function": {"arguments": arguments}}]})
        return deltas

    def _content(self, logprobs: Iterable[TokenLogprob]) -> Json | None:
        if not self._logprobs:
            return None
        return {"content": chat_logprobs(self._spelling, logprobs), "refusal": None}


def call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


class TextShape(_Chunks):
    """/v1/completions.

    echo: each choice's prompt, where the answer begins with it.
    """

    kind = "text_completion"

    def __init__(
        self,
        head: Head,
        spelling: Spelling,
        logprobs: bool,
        echo: Iterable[Sequence[int]] = (),
    ) -> None:
        super().__init__(head, spelling, logprobs)
        self._echo = dict(enumerate(echo))  # of choices that have not begun
        self._texts: dict[int, StreamingDetokenizer] = {}
        self._offsets: dict[int, int] = {}  # characters of its text before the next token

    def whole(self, choices: Sequence[Choice], usage: Json) -> Json:
        found = []
        for choice in choices:
            echo = self._echo.pop(choice.index, ())
            logprobs = self._listed(choice.index, choice.logprobs, echo, choice.scores)
            text = self._text(echo) + choice.text
            written = self._choice(choice.index, text, logprobs, choice.finish_reason)
            found.append(written | self._ids(choice.index, choice.tokens))
        return {**self._head.fields, "object": "text_completion", "choices": found, "usage": usage}

    def chunks(self, index: int, piece: Piece) -> Iterable[Json]:
        echo = self._echo.pop(index, ())
        settled = self._held[index].add(piece)
        listed = settled or echo
        logprobs = self._listed(index, settled, echo, piece.scores) if listed else None
        text = self._text(echo) + piece.text
        more = self._ids(index, ids(piece))
        if text or logprobs is not None or more or piece.finish_reason is not None:
            yield self._choice(index, text, logprobs, piece.finish_reason) | more

    def _choice(self, index: int, text: str, logprobs: Json | None, reason: str | None) -> Json:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _text(self, tokens: Iterable[int]) -> str:
        """Of an echoed prompt; what comes after it ends a character that it may have begun."""
        return "".join(map(self._spelling.detokenizer().add, tokens))

    def _listed(
        self,
        index: int,
        found: Iterable[TokenLogprob],
        echo: Sequence[int],
        scores: Iterable[TokenLogprob],
    ) -> Json | None:
        if not self._logprobs:
            return None
        tokens, logprobs, top, offsets = [], [], [], []
        detokenizer = self._texts.setdefault(index, self._spelling.detokenizer())
        first = [(token, None) for token in echo[:1]]  # nothing before it made it likely
        for token, of in (*first, *((of.token, of) for of in (*scores, *found))):
            tokens.append(self._token(token))
            logprobs.append(None if of is None else finite(of.logprob))
            top.append(None if of is None else self._top(of))
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(detokenizer.add(token))
        return {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": top,
            "text_offset": offsets,
        }

    def _top(self, of: TokenLogprob) -> Mapping[str, float]:
        """The likeliest tokens, and the one that was drawn: so there can be one more than asked
        for (https://platform.openai.com/docs/api-reference/completions)."""
        top = {self._token(of.token): finite(of.logprob)}
        for token, logprob in of.top:  # of those that look alike, the drawn one, or the likelier
            top.setdefault(self._token(token), finite(logprob))
        return dict(sorted(top.items(), key=lambda pair: -pair[1]))

    def _token(self, token: int) -> str:
        text, data = self._spelling(token)
        partial = data is not None and text.encode() != data
        return f"bytes:{text}" if partial else text
