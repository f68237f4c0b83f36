"""From the engine's pieces to OpenAI's objects, whole or a chunk at a time.

Plain dicts, of the shapes that replies.py describes: log-probabilities make a million of them.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mlx_cerebrum.server.jobs import Piece, TokenLogprob
from mlx_cerebrum.server.spelling import Spelling
from mlx_cerebrum.tokenizer.detokenizer import StreamingDetokenizer

Json = dict[str, Any]


class Spoken:
    """One choice's log-probabilities as its text comes: those of a stop string stay out too."""

    def __init__(self) -> None:
        self._held: list[TokenLogprob] = []  # of tokens whose text is not final

    def add(self, piece: Piece) -> list[TokenLogprob]:
        """Those of the tokens that are settled with this one."""
        if piece.logprob is not None:
            self._held.append(piece.logprob)
        if not piece.text and piece.finish_reason != "length":
            return []
        settled, self._held = self._held, []
        return settled


@dataclass
class Choice:
    """One answer so far."""

    index: int
    text: str = ""
    finish_reason: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    _spoken: Spoken = field(default_factory=Spoken)

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.finish_reason = piece.finish_reason
        self.logprobs += self._spoken.add(piece)


@dataclass
class Tally:
    """A request's tokens: each prompt counts once, whatever `n`."""

    prompts: Sequence[int]  # tokens of each
    generated: int = 0
    cached: dict[int, int] = field(default_factory=dict)  # prompt's number -> of its tokens

    def add(self, prompt: int, piece: Piece) -> None:
        self.generated += 1
        # The first choice's: the others can find what it has just computed.
        self.cached.setdefault(prompt, piece.cached_tokens)

    @property
    def usage(self) -> Json:
        prompt = sum(self.prompts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.generated,
            "total_tokens": prompt + self.generated,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached.values())},
        }


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
        self._spoken: defaultdict[int, Spoken] = defaultdict(Spoken)  # of each choice

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
        settled = self._spoken[index].add(piece)
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
    """/v1/completions."""

    def __init__(self, head: Head, spelling: Spelling, logprobs: bool) -> None:
        self._head, self._spelling, self._logprobs = head, spelling, logprobs
        self._spoken: defaultdict[int, Spoken] = defaultdict(Spoken)  # of each choice
        self._texts: dict[int, StreamingDetokenizer] = {}
        self._offsets: dict[int, int] = {}  # characters of its text before the next token

    def whole(self, choices: Iterable[Choice], usage: Json) -> Json:
        found = [
            {
                "index": choice.index,
                "text": choice.text,
                "logprobs": self._listed(choice.index, choice.logprobs),
                "finish_reason": choice.finish_reason,
            }
            for choice in choices
        ]
        return {**self._head.fields, "object": "text_completion", "choices": found, "usage": usage}

    def opening(self, index: int) -> None:
        return None

    def chunk(self, index: int, piece: Piece) -> Json | None:
        settled = self._spoken[index].add(piece)
        logprobs = self._listed(index, settled) if settled else None
        if not piece.text and logprobs is None and piece.finish_reason is None:
            return None
        return {
            "index": index,
            "text": piece.text,
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
        }

    def closing(self, index: int, finish_reason: str) -> None:
        return None

    def frame(self, choices: list[Json], usage: Json | None = None) -> Json:
        return self._head.frame("text_completion", choices, usage)

    def _listed(self, index: int, found: Iterable[TokenLogprob]) -> Json | None:
        if not self._logprobs:
            return None
        tokens, logprobs, top, offsets = [], [], [], []
        for of in found:
            tokens.append(self._token(of.token))
            logprobs.append(_finite(of.logprob))
            top.append(self._top(of))
            offsets.append(self._offsets.get(index, 0))
            text = self._texts.setdefault(index, self._spelling.detokenizer())
            self._offsets[index] = offsets[-1] + len(text.add(of.token))
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
