"""Conversations to prompts: a Jinja template's text and control tokens, told from a person's.

A template writes control tokens as text (`<s>`, `<|im_end|>`), and so can a user. While a
template runs, each character is known to be its own or somebody else's (see jinja/text.py), and
a control token is only what is spelled by the template's characters alone. Messages read as
they are in the template, so that it finds the `</think>` of an earlier answer.

The template comes from the checkpoint: it is walked, never run as Python, reaches no file, and
its steps, its text and its time are bounded whatever it says.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from jinja2 import nodes

from mlx_cerebrum.errors import RequestError, TokenizerError
from mlx_cerebrum.tokenizer.jinja.run import RefusalError, Run, parse, reason
from mlx_cerebrum.tokenizer.jinja.text import Budget, marks, own
from mlx_cerebrum.tokenizer.vocabulary import AddedToken

ROLES = ("system", "user", "assistant")
# Of a conversation, more than any context holds: tokenizing takes up to 350 bytes a character.
MAX_TEXT, MAX_MESSAGES = 2_000_000, 20_000
# What a rendering may take (see Budget), and how much more for each message and its characters.
SECONDS = 5.0
STEPS, MESSAGE_STEPS = 1_000_000, 1_000
LETTERS, MESSAGE_LETTERS = 16_000_000, 32

Segment = str | AddedToken


def check_messages(messages: Any) -> list[dict[str, str]]:
    """A conversation as a list of {role, content}; RequestError says which message is wrong."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise RequestError("messages must be a list of at least one {role, content} object")
    if len(messages) > MAX_MESSAGES:
        raise RequestError(f"{len(messages):,} messages are more than {MAX_MESSAGES:,}: drop some")
    checked = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise RequestError(f"{where} must be an object with exactly role and content")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise RequestError(f"{where}: role must be one of {', '.join(ROLES)}, not {role!r}")
        if role == "system" and index:
            raise RequestError(f"{where}: a system message can only come first")
        if not isinstance(content, str):
            kind = type(content).__name__
            raise RequestError(f"{where}: content must be a string, not {kind}")
        checked.append({"role": role, "content": content})
    check_length(sum(len(message["content"]) for message in checked))
    return checked


def check_length(characters: int) -> None:
    """Raise RequestError for a text that no context holds, before memory is taken for its ids."""
    if characters > MAX_TEXT:
        raise RequestError(
            f"{characters:,} characters are more than any context holds ({MAX_TEXT:,} are read):"
            " shorten the text"
        )


def strip_eos(text: str, eos_texts: Iterable[str]) -> str:
    """A stored answer without the end-of-sequence text it may have been saved with."""
    endings = tuple(filter(None, eos_texts))
    while endings and text.rstrip().endswith(endings):
        text = text.rstrip()
        text = text[: -max(len(end) for end in endings if text.endswith(end))]
    return text


class ChatTemplate:
    """A Jinja template over the control tokens of one vocabulary.

    controls: the tokens a template may write, by text.
    variables: what the template sees besides the messages (`bos_token`, `eos_token`, ...).
    """

    def __init__(
        self, source: str, controls: Mapping[str, AddedToken], variables: Mapping[str, str]
    ) -> None:
        self.source = source
        self._controls = controls
        self._variables = {name: own(text) for name, text in variables.items()}
        # Longest first, so that no token hides behind a shorter one.
        names = sorted(filter(None, controls), key=len, reverse=True)
        begins = "".join(sorted({re.escape(name[0]) for name in names}))
        self._split = re.compile(
            rf"(?=[{begins}\s])(?:"  # most places are no token: seen at once
            + "|".join(
                r"\s*" * controls[name].lstrip + re.escape(name) + r"\s*" * controls[name].rstrip
                for name in names
            )
            + ")"
            if names
            else r"(?!)"
        )
        # Stands where somebody else's characters are: it is in no control token's name.
        spelled = set("".join(names))
        self._hidden = next(char for char in map(chr, range(0xE000, 0xF8FF)) if char not in spelled)

    @cached_property
    def _tree(self) -> nodes.Template:
        return parse(self.source)

    def render(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> list[Segment]:
        """The prompt as text and control tokens in turn.

        Raises RequestError where the template refuses the conversation, TokenizerError
        where the template itself fails.
        """
        held = sum(len(message["content"]) for message in messages)
        budget = Budget(
            STEPS + MESSAGE_STEPS * len(messages), LETTERS + MESSAGE_LETTERS * held, SECONDS
        )
        variables = {
            # A role is one of three words, which some templates build a token's name with.
            "messages": [
                {"role": own(message["role"]), "content": message["content"]}
                for message in messages
            ],
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
            **self._variables,
        }
        try:
            text = Run(budget, variables).render(self._tree)
        except RefusalError as error:
            raise RequestError(
                f"the chat template refuses these messages: {reason(error)}"
            ) from None
        except Exception as error:  # a template can raise anything Python can
            raise TokenizerError(f"the chat template fails: {reason(error)}") from None
        return self._segments(text)

    def _segments(self, text: str) -> list[Segment]:
        segments: list[Segment] = []
        at, whose = 0, marks(text)
        for match in self._split.finditer(self._visible(text, whose)):
            name = match[0] if match[0] in self._controls else match[0].strip()
            start = text.index(name, match.start())
            if 0 in whose[start : start + len(name)]:
                continue  # a space in the name, which is somebody else's
            segments += (text[at : match.start()], self._controls[name])
            at = match.end()
        segments.append(text[at:])
        return [segment for segment in segments if segment != ""]

    def _visible(self, text: str, whose: bytes) -> str:
        """`text` with what is not the template's hidden, but for white space at its edges: that
        may belong to a token beside it."""
        shown, at = list[str](), 0
        for match in re.finditer(rb"\0+", whose):
            start, stop = match.span()
            piece = text[start:stop]
            body = piece.strip()
            left = len(piece) - len(piece.lstrip()) if body else len(piece)
            hidden = self._hidden * len(body)
            shown += (text[at:start], piece[:left], hidden, piece[left + len(body) :])
            at = stop
        shown.append(text[at:])
        return "".join(shown)
