"""What a calibrated recipe reads: passages of a text, as the model is used to being given text.

A chat model meets prose inside a conversation, so each passage is made one: the user gives its
beginning and asks for more, and the rest is the answer, in the model's own template.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from importlib.resources import files

import mlx.core as mx

from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.tokenizer.jinja.run import dated
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer

METHODS = ("gptq", "dwq")  # recipes that read it: convert/calibrated.py, convert/distilled.py
LENGTH = 512  # tokens a passage
TOKENS = 32_768  # read by default
MOST = 65_536
_ASKED = 64  # tokens that the user gives of a passage
_REQUEST = "Continue this text:\n\n"
_DAY = datetime(2024, 7, 26)  # for templates that say what day it is


@dataclass(frozen=True)
class Calibration:
    """A recipe that looks at activations: its name, and at most `tokens` of `text` to read.

    Raises RequestError for a number that makes no sense.
    """

    method: str
    text: str = field(repr=False)
    tokens: int = TOKENS

    def __post_init__(self) -> None:
        if not LENGTH <= self.tokens <= MOST:
            raise RequestError(
                f"{self.tokens} tokens of calibration are not from {LENGTH} to {MOST}"
            )


def shipped() -> str:
    """The text that comes with the package; convert/data/README.md says where it is from."""
    return (files("convert") / "data" / "calibration.txt").read_text(encoding="utf-8")


def passages(tokenizer: Tokenizer, text: str, tokens: int) -> mx.array:
    """At most `tokens` ids of `text`, `[B, LENGTH]`: passages spread evenly over it.

    Raises RequestError for a text that is too short for one.
    """
    start = tokenizer.encode("")
    ids = tokenizer.encode(text)[len(start) :]
    needed = LENGTH + _ASKED
    if len(ids) < needed:
        raise RequestError(f"the calibration text has {len(ids)} tokens; give at least {needed}")
    count = max(1, min(tokens, len(ids)) // LENGTH)
    step = (len(ids) - needed) // max(1, count - 1)
    pieces = (ids[i * step : i * step + needed] for i in range(count))
    return mx.array([row[:LENGTH] for row in _written(tokenizer, start, pieces)], mx.int32)


def is_chat(tokenizer: Tokenizer) -> bool:
    """Whether a template, the checkpoint's own or one known for it, says how it is talked to, and
    leaves most of a passage to the text."""
    return tokenizer.format.assumed is None and len(_asked(tokenizer, "")) <= LENGTH // 2


def _asked(tokenizer: Tokenizer, beginning: str) -> list[int]:
    with dated(_DAY):
        return tokenizer.apply_chat_template([{"role": "user", "content": _REQUEST + beginning}])


def _written(
    tokenizer: Tokenizer, start: list[int], pieces: Iterator[list[int]]
) -> Iterator[list[int]]:
    talks = is_chat(tokenizer)
    for piece in pieces:
        if talks:
            yield _asked(tokenizer, tokenizer.decode(piece[:_ASKED])) + piece[_ASKED:]
        else:
            yield start + piece
