"""What the clients of a load ask: a mix as a busy day brings it, drawn from a seed.

Prompts of a few tokens to some 1500, most of them short; short and longer answers; every model
that is served; sampling with and without a seed, two answers at once, stop strings,
conversations of several turns, the older completions; and what goes wrong on a network: clients
that are gone in the middle, that read slowly, that send nonsense.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from json import dumps
from typing import Any

from bench.chat_prompts import GROUNDED, OPEN
from bench.engines import PROSE
from bench.server_answers import CHAT, COMPLETIONS, Question
from bench.server_client import Manner

# Words of a prompt, and how many of a hundred prompts; a word is some 1.3 tokens.
_LENGTHS = ((2, 12, 45), (20, 60, 30), (100, 250, 17), (300, 550, 6), (900, 1100, 2))
_ANSWERS = (4, 8, 16, 16, 32, 32, 48, 96)
FIXED_TOKENS = 24
PATIENCE = (0.01, 8)  # seconds after which a client that leaves does so
PAUSES = (0.02, 0.15)  # seconds between two events that a slow reader takes

# How many of a hundred requests are of a kind.
KINDS = {
    "streaming": 40,
    "whole": 10,
    "conversation": 8,
    "completion": 6,
    "fixed": 16,
    "leaving": 10,
    "slow reader": 4,
    "malformed": 6,
}
POLITE = ("streaming", "whole", "conversation", "completion", "fixed", "slow reader")


@dataclass(frozen=True)
class Fixed:
    """A question whose answer is always the same text."""

    name: str
    question: Question


def fixed_set(models: Sequence[str]) -> list[Fixed]:
    """Greedy questions and two seeded ones, for every model."""
    asked: list[tuple[str, str, dict[str, Any]]]
    asked = [(name, text, {"temperature": 0}) for name, text in OPEN.items()]
    asked += [(name, GROUNDED[name], {"temperature": 0}) for name in ("quote", "list")]
    asked += [
        (f"{name}, seed {seed}", OPEN[name], {"temperature": 0.8, "top_p": 0.95, "seed": seed})
        for name, seed in (("story", 7), ("trip", 11))
    ]
    return [
        Fixed(f"{name} ({model})", chat(model, user(text), FIXED_TOKENS, stream=True, **how))
        for model in models
        for name, text, how in asked
    ]


class Mix:
    """The requests of one client."""

    def __init__(self, models: Sequence[str], fixed: Sequence[Fixed], seed: int) -> None:
        self._models, self._fixed = models, fixed
        self._random = random.Random(seed)
        self._words = PROSE.read_text(encoding="utf-8").split()

    def kind(self) -> str:
        return self._random.choices(list(KINDS), weights=list(KINDS.values()))[0]

    def fixed(self) -> Fixed:
        return self._random.choice(self._fixed)

    def streaming(self) -> Question:
        """Also with two answers at once, stop strings, log-probabilities, sampling."""
        draw, more = self._random, self._sampling()
        if draw.random() < 0.12:
            more["n"] = 2
        if draw.random() < 0.2:
            more["stop"] = draw.choice([[" the"], ".", [", and", "\n\n"], ["XYZ"]])
        if draw.random() < 0.1:
            more |= {"logprobs": True, "top_logprobs": 3}
        if draw.random() < 0.1:
            more["stream_options"] = {"include_usage": False}
        return self._asked(self._text(), stream=True, **more)

    def whole(self) -> Question:
        return self._asked(self._text(), **self._sampling())

    def completion(self) -> Question:
        """Of the older kind, without a chat template."""
        body = self.streaming().body
        text = body.pop("messages")[0]["content"]
        body.pop("top_logprobs", None)
        body.pop("logprobs", None)
        return Question(body | {"prompt": text}, COMPLETIONS)

    def conversation(self) -> tuple[str, list[str]]:
        """A model, and what is said to it, turn by turn."""
        more = ["Go on.", "Why?", "Say it shorter, please."]
        said = [self._text(), *self._random.choices(more, k=self._random.randint(1, 3))]
        return self._random.choice(self._models), said

    def leaving(self) -> tuple[Question, Manner]:
        """Gone after some events; or within seconds, which may be before the first."""
        question = self.streaming()
        if self._random.random() < 0.6:
            return question, Manner(leave_after=self._random.randint(1, 12))
        return question, Manner(leave_within=self._random.uniform(*PATIENCE))

    def slow(self) -> tuple[Question, Manner]:
        """Much to send to one who reads little: its server has to wait or to keep it."""
        question = self._asked(self._text(), stream=True, n=2, logprobs=True, top_logprobs=5)
        pause = self._random.uniform(*PAUSES)
        return question, Manner(pause=pause, buffer=4096)

    def malformed(self) -> tuple[str, bytes]:
        """A path and a body that must be refused."""
        model = self._random.choice(self._models)
        good = {"model": model, "messages": user("Hello"), "max_tokens": 4}
        return self._random.choice(nonsense(good))

    def _asked(self, text: str, **more: Any) -> Question:
        model, most = self._random.choice(self._models), self._random.choice(_ANSWERS)
        return chat(model, user(text), most, **more)

    def _text(self) -> str:
        """Prose of some length, from anywhere: few prompts begin alike."""
        draw = self._random
        low, high, _ = draw.choices(_LENGTHS, weights=[share for *_, share in _LENGTHS])[0]
        count = draw.randint(low, high)
        start = draw.randrange(len(self._words) - count)
        return " ".join(self._words[start : start + count])

    def _sampling(self) -> dict[str, Any]:
        draw = self._random
        ways: list[dict[str, Any]] = [
            {"temperature": 0},
            {"temperature": 0.7, "top_p": 0.9},
            {"temperature": 1.0, "min_p": 0.05, "seed": draw.randrange(1000)},
        ]
        return draw.choice(ways)


def nonsense(good: dict[str, Any]) -> list[tuple[str, bytes]]:
    """Bodies to refuse, made from a good one."""
    bodies: list[bytes] = [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"Hello"',
        b"\xff\xfe{}",
        b'{"model": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        dumps(good).encode()[:-9],
        dumps(good | {"temperature": "hot"}).encode(),
        dumps(good | {"temperature": float("nan")}).encode(),
        dumps(good | {"temperature": -1}).encode(),
        dumps(good | {"max_tokens": -1}).encode(),
        dumps(good | {"max_tokens": "many"}).encode(),
        dumps(good | {"n": 0}).encode(),
        dumps(good | {"stop": [1, 2]}).encode(),
        dumps(good | {"messages": []}).encode(),
        dumps(good | {"messages": "Hello"}).encode(),
        dumps(good | {"messages": [{"role": "user"}]}).encode(),
        dumps(good | {"messages": [{"role": "nobody", "content": "Hello"}]}).encode(),
        dumps(good | {"model": "no-such-model"}).encode(),
        dumps(good | {"model": 7}).encode(),
        dumps(good | {"messages": user("far too long " * 20_000)}).encode(),
    ]
    return [(CHAT, body) for body in bodies] + [(COMPLETIONS, dumps(good).encode())]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def chat(model: str, messages: list[dict[str, str]], max_tokens: int, **more: Any) -> Question:
    """A question; where its answer streams, with the usage at the end."""
    body: dict[str, Any] = {"model": model, "messages": messages, "max_tokens": max_tokens}
    if more.get("stream"):
        body["stream_options"] = {"include_usage": True}
    return Question(body | more)
