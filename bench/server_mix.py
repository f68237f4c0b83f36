"""What the clients of a load ask: a mix as a busy day brings it, drawn from a seed.

Prompts of a few tokens to some 1500, most of them short; short and longer answers; every model
that is served; sampling with and without a seed, two answers at once, stop strings,
conversations of several turns, the older completions; and what goes wrong on a network: clients
that are gone in the middle, that read slowly, that send nonsense.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bench.chat_prompts import GROUNDED, OPEN
from bench.engines import PROSE
from bench.server_client import COMPLETIONS, Question

# Words of a prompt, and how many of a hundred prompts; a word is some 1.3 tokens.
_LENGTHS = ((2, 12, 45), (20, 60, 30), (100, 250, 17), (300, 550, 6), (900, 1100, 2))
_ANSWERS = (4, 8, 16, 16, 32, 32, 48, 96)
_TURN = 24  # tokens of a fixed answer, or of one in a conversation
PATIENCE = (0.01, 8)  # seconds after which a client that leaves does so
PAUSES = (0.02, 0.15)  # seconds between two events that a slow reader takes

# How many of a hundred requests are of a kind.
KINDS = {
    "streaming": 40,
    "whole": 10,
    "conversation": 8,
    "completion": 6,
    "fixed": 16,
    "slow reader": 4,
    "leaving": 10,
    "malformed": 6,
}
POLITE = tuple(KINDS)[:6]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def chat(model: str, messages: list[dict[str, str]], max_tokens: int, **more: Any) -> Question:
    """A question; where its answer streams, with the usage at the end."""
    body: dict[str, Any] = {"model": model, "messages": messages, "max_tokens": max_tokens}
    if more.get("stream"):
        body["stream_options"] = {"include_usage": True}
    return Question(body | more)


def fixed_set(models: Sequence[str]) -> list[Question]:
    """Questions whose answer is always the same text: greedy ones and two seeded, of each model."""
    asked: list[tuple[str, str, dict[str, Any]]]
    asked = [(name, text, {"temperature": 0}) for name, text in OPEN.items()]
    asked += [(name, GROUNDED[name], {"temperature": 0}) for name in ("quote", "list")]
    asked += [
        (f"{name}, seed {seed}", OPEN[name], {"temperature": 0.8, "top_p": 0.95, "seed": seed})
        for name, seed in (("story", 7), ("trip", 11))
    ]
    return [
        replace(chat(model, user(text), _TURN, stream=True, **how), name=f"{name} ({model})")
        for model in models
        for name, text, how in asked
    ]


class Mix:
    """The requests of one client."""

    def __init__(self, models: Sequence[str], fixed: Sequence[Question], seed: int) -> None:
        self._models, self._fixed = models, fixed
        self._random = random.Random(seed)
        self._words = PROSE.read_text(encoding="utf-8").split()

    def draw(self) -> Question:
        kind = self._random.choices(list(KINDS), weights=list(KINDS.values()))[0]
        return replace(self._of(kind), kind=kind)

    def _of(self, kind: str) -> Question:
        draw = self._random
        match kind:
            case "whole":
                return self._chat(**self._sampling())
            case "conversation":
                more = ["Go on.", "Why?", "Say it shorter, please."]
                model = draw.choice(self._models)
                asked = chat(model, user(self._text()), _TURN, stream=True, temperature=0)
                return replace(asked, then=tuple(draw.choices(more, k=draw.randint(1, 3))))
            case "completion":  # of the older kind, without a chat template
                body = dict(self._streaming().body)
                text = body.pop("messages")[0]["content"]
                body.pop("top_logprobs", None)
                body.pop("logprobs", None)
                return Question(body | {"prompt": text}, COMPLETIONS)
            case "fixed":
                return draw.choice(self._fixed)
            case "slow reader":  # its server has to wait, or to keep what it has to say
                asked = self._chat(stream=True, n=2, logprobs=True, top_logprobs=5)
                return replace(asked, pause=draw.uniform(*PAUSES), buffer=4096)
            case "leaving":
                if draw.random() < 0.6:
                    return replace(self._streaming(), leave_after=draw.randint(1, 12))
                return replace(self._streaming(), leave_within=draw.uniform(*PATIENCE))
            case "malformed":
                return draw.choice(nonsense(draw.choice(self._models)))
            case _:
                return self._streaming()

    def _streaming(self) -> Question:
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
        return self._chat(stream=True, **more)

    def _chat(self, **more: Any) -> Question:
        model, most = self._random.choice(self._models), self._random.choice(_ANSWERS)
        return chat(model, user(self._text()), most, **more)

    def _text(self) -> str:
        """Prose of some length, from anywhere: few prompts begin alike."""
        draw = self._random
        low, high, _ = draw.choices(_LENGTHS, weights=[share for *_, share in _LENGTHS])[0]
        count = draw.randint(low, high)
        start = draw.randrange(len(self._words) - count)
        return " ".join(self._words[start : start + count])

    def _sampling(self) -> dict[str, Any]:
        ways: list[dict[str, Any]] = [
            {"temperature": 0},
            {"temperature": 0.7, "top_p": 0.9},
            {"temperature": 1.0, "min_p": 0.05, "seed": self._random.randrange(1000)},
        ]
        return self._random.choice(ways)


def nonsense(model: str) -> list[Question]:
    """Requests that must be refused."""
    good = {"model": model, "messages": user("Hello"), "max_tokens": 4}
    changes: list[dict[str, Any]] = [
        {"temperature": "hot"},
        {"temperature": float("nan")},
        {"temperature": -1},
        {"max_tokens": -2},
        {"max_tokens": "many"},
        {"n": 0},
        {"stop": [1, 2]},
        {"messages": []},
        {"messages": "Hello"},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "nobody", "content": "Hello"}]},
        {"model": "no-such-model"},
        {"model": 7},
        {"messages": user("far too long " * 20_000)},
    ]
    bodies = [b"", b"{", b"null", b"[]", b'"Hello"', b"\xff\xfe{}", json.dumps(good).encode()[:-9]]
    bodies += [b'{"model": ' + b"[" * 5000 + b"]" * 5000 + b"}"]
    bodies += [json.dumps(good | change).encode() for change in changes]
    found = [Question({}, malformed=body) for body in bodies]
    return [*found, Question({}, COMPLETIONS, malformed=json.dumps(good).encode())]
