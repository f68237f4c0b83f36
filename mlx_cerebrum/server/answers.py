"""What answers look like: OpenAI's objects, described and made, whole or a chunk at a time.

The classes describe them, for the OpenAPI document. What is sent is made as plain dicts of the same
shapes: the log-probabilities of one answer can be a million of them.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from mlx_cerebrum.decoding.logprobs import TokenLogprob
from mlx_cerebrum.server.jobs import Piece
from mlx_cerebrum.tokenizer.detokenizer import SPACE_MARK, StreamingDetokenizer
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer

Json = dict[str, Any]


class ApiObject(BaseModel):
    """An object of OpenAI's API, as it is described."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(ApiObject):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(ApiObject):
    error: ErrorDetail


class PromptDetails(ApiObject):
    cached_tokens: int


class Usage(ApiObject):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Alternative(ApiObject):
    """A token with its natural log-probability, before temperature and filters."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenToken(Alternative):
    top_logprobs: list[Alternative]


class ChatLogprobs(ApiObject):
    content: list[ChosenToken]
    refusal: None = None


class AssistantMessage(ApiObject):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(ApiObject):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class Headed(ApiObject):
    """What every answer says of itself, whole or streamed."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(Headed):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(ApiObject):
    tokens: list[str]
    token_logprobs: list[float | None]  # None for the first token of an echoed prompt
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(ApiObject):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class TextCompletion(Headed):
    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]
    usage: Usage


class Layout(ApiObject):
    """How a model is laid out over the stored weights."""

    positions: int
    blocks: int
    sliding_window: int | None
    context_length: int


class ModelCard(ApiObject):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "mlx-cerebrum"
    cerebrum: Layout


class ModelList(ApiObject):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(ApiObject):
    status: Literal["ok"] = "ok"


def streamed(kind: type[ApiObject]) -> dict[str, Any]:
    """The OpenAPI document's entry for an answer that may come in pieces instead."""
    stream: Json = {"text/event-stream": {}}  # a schema would be taken for that of each event
    return {"model": kind, "description": "The answer, or its pieces as events", "content": stream}


class Spelling:
    """What each token id of a tokenizer looks like on its own."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.detokenizer = tokenizer.detokenizer
        self._known: dict[int, tuple[str, bytes | None]] = {}

    def __call__(self, token: int) -> tuple[str, bytes | None]:
        """`(text, its UTF-8)`; a piece of a character as `\\xe2\\x80`, a control token's name
        without bytes, since it adds none to a text."""
        if token not in self._known:
            self._known[token] = self._spelled(token)
        return self._known[token]

    def _spelled(self, token: int) -> tuple[str, bytes | None]:
        piece = self._tokenizer.piece(token)
        if isinstance(piece, str):
            piece = piece.replace(SPACE_MARK, " ").encode()
        if not piece:
            return self._tokenizer.content(token) or "", None
        try:
            return piece.decode(), piece
        except UnicodeDecodeError:
            return "".join(f"\\x{byte:02x}" for byte in piece), piece


class _HeldLogprobs:
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
    logprobs: list[TokenLogprob] = field(default_factory=list)
    scores: Sequence[TokenLogprob] = ()  # of the prompt
    _held: _HeldLogprobs = field(default_factory=_HeldLogprobs)

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.finish_reason = piece.finish_reason
        self.logprobs += self._held.add(piece)
        self.scores = self.scores or piece.scores


class Shape(Protocol):
    """One endpoint's way to write answers down."""

    def whole(self, choices: Iterable[Choice], usage: Json) -> Json: ...

    def opening(self, index: int) -> Json | None:
        """What a choice's stream begins with, if anything."""

    def chunk(self, index: int, piece: Piece) -> Json | None:
        """What a piece adds to its choice's stream, if anything."""

    def closing(self, index: int, finish_reason: str) -> Json | None:
        """A chunk of its own for a choice's end, if it has one."""

    def frame(self, choices: list[Json], usage: Json | None) -> Json:
        """A stream's object around its choices."""


@dataclass(frozen=True)
class Head:
    """What every object of an answer repeats."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: bool = False  # whether a stream's objects have a `usage`

    @property
    def fields(self) -> Json:
        return {
            "id": self.id,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }

    def frame(self, kind: str, choices: list[Json], usage: Json | None) -> Json:
        found = {**self.fields, "object": kind, "choices": choices}
        if self.usage:
            found["usage"] = usage
        return found


def _finite(logprob: float) -> float:
    """JSON knows no infinity; OpenAI writes -9999 for what can't be."""
    return max(logprob, -9999.0) if logprob == logprob else -9999.0


class ChatShape:
    """/v1/chat/completions."""

    def __init__(self, head: Head, spelling: Spelling, logprobs: bool) -> None:
        self._head, self._spelling, self._logprobs = head, spelling, logprobs
        self._held: defaultdict[int, _HeldLogprobs] = defaultdict(_HeldLogprobs)  # by choice

    def whole(self, choices: Iterable[Choice], usage: Json) -> Json:
        found = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self._content(choice.logprobs),
                "finish_reason": choice.finish_reason,
            }
            for choice in choices
        ]
        return {**self._head.fields, "object": "chat.completion", "choices": found, "usage": usage}

    def opening(self, index: int) -> Json:
        return self._choice(index, {"role": "assistant", "content": "", "refusal": None})

    def chunk(self, index: int, piece: Piece) -> Json | None:
        settled = self._held[index].add(piece)
        logprobs = self._content(settled) if settled else None
        if not piece.text and logprobs is None:
            return None
        return self._choice(index, {"content": piece.text}, logprobs)

    def closing(self, index: int, finish_reason: str) -> Json:
        return self._choice(index, {}) | {"finish_reason": finish_reason}

    def frame(self, choices: list[Json], usage: Json | None = None) -> Json:
        return self._head.frame("chat.completion.chunk", choices, usage)

    def _choice(self, index: int, delta: Json, logprobs: Json | None = None) -> Json:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _content(self, logprobs: Iterable[TokenLogprob]) -> Json | None:
        if not self._logprobs:
            return None
        content = [
            self._token(of.token, of.logprob)
            | {"top_logprobs": [self._token(*other) for other in of.top]}
            for of in logprobs
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> Json:
        text, data = self._spelling(token)
        spelled = None if data is None else list(data)
        return {"token": text, "logprob": _finite(logprob), "bytes": spelled}


class TextShape:
    """/v1/completions.

    echo: each choice's prompt, where the answer begins with it.
    """

    def __init__(
        self,
        head: Head,
        spelling: Spelling,
        logprobs: bool,
        echo: Iterable[Sequence[int]] = (),
    ) -> None:
        self._head, self._spelling, self._logprobs = head, spelling, logprobs
        self._echo = dict(enumerate(echo))  # of choices that have not begun
        self._held: defaultdict[int, _HeldLogprobs] = defaultdict(_HeldLogprobs)  # by choice
        self._texts: dict[int, StreamingDetokenizer] = {}
        self._offsets: dict[int, int] = {}  # characters of its text before the next token

    def whole(self, choices: Iterable[Choice], usage: Json) -> Json:
        found = []
        for choice in choices:
            echo = self._echo.pop(choice.index, ())
            logprobs = self._listed(choice.index, choice.logprobs, echo, choice.scores)
            text = self._text(echo) + choice.text
            found.append(self._choice(choice.index, text, logprobs, choice.finish_reason))
        return {**self._head.fields, "object": "text_completion", "choices": found, "usage": usage}

    def opening(self, index: int) -> None:
        return None

    def chunk(self, index: int, piece: Piece) -> Json | None:
        echo = self._echo.pop(index, ())
        settled = self._held[index].add(piece)
        listed = settled or echo
        logprobs = self._listed(index, settled, echo, piece.scores) if listed else None
        text = self._text(echo) + piece.text
        if not text and logprobs is None and piece.finish_reason is None:
            return None
        return self._choice(index, text, logprobs, piece.finish_reason)

    def closing(self, index: int, finish_reason: str) -> None:
        return None

    def frame(self, choices: list[Json], usage: Json | None = None) -> Json:
        return self._head.frame("text_completion", choices, usage)

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
            logprobs.append(None if of is None else _finite(of.logprob))
            top.append(None if of is None else self._top(of))
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(detokenizer.add(token))
        return {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": top,
            "text_offset": offsets,
        }

    def _top(self, of: TokenLogprob) -> dict[str, float]:
        """The likeliest tokens, and the one that was drawn: so there can be one more than asked
        for (https://platform.openai.com/docs/api-reference/completions)."""
        top = {self._token(of.token): _finite(of.logprob)}
        for token, logprob in of.top:  # of those that look alike, the drawn one, or the likelier
            top.setdefault(self._token(token), _finite(logprob))
        return dict(sorted(top.items(), key=lambda pair: -pair[1]))

    def _token(self, token: int) -> str:
        text, data = self._spelling(token)
        partial = data is not None and text.encode() != data
        return f"bytes:{text}" if partial else text
