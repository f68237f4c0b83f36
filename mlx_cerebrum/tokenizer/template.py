"""Conversations to prompts: a Jinja template's text and control tokens, told from a person's.

A template writes control tokens as text (`<s>`, `<|im_end|>`), and so can a user. While a
template runs, each character is known to be its own or somebody else's (see jinja/text.py), and
a control token is only what is spelled by the template's characters alone. Messages read as
they are in the template, so that it finds the `</think>` of an earlier answer.

The template comes from the checkpoint: it is walked, never run as Python, reaches no file, and
its steps, its text and its time are bounded whatever it says.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from jinja2 import nodes

from mlx_cerebrum.errors import RequestError, TokenizerError
from mlx_cerebrum.tokenizer.jinja.run import RefusalError, Run, parse, reason
from mlx_cerebrum.tokenizer.jinja.text import Budget, marks, own, part
from mlx_cerebrum.tokenizer.messages import characters, size_of
from mlx_cerebrum.tokenizer.vocabulary import AddedToken

# What a rendering may take (see Budget), and how much more for each message and its characters.
SECONDS = 5.0
STEPS, MESSAGE_STEPS = 1_000_000, 1_000
LETTERS, MESSAGE_LETTERS = 16_000_000, 32

Segment = str | AddedToken


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
    def _parsed(self) -> nodes.Template | Exception:
        try:
            return parse(self.source)
        except Exception as error:  # whatever Jinja's parser raises
            return error  # kept, since a long template takes long to be refused

    @property
    def _tree(self) -> nodes.Template:
        if isinstance(self._parsed, Exception):
            raise self._parsed.with_traceback(None)
        return self._parsed

    @cached_property
    def takes_tools(self) -> bool:
        """Whether it looks at the tools it is given; False where it is no template."""
        return not isinstance(self._parsed, Exception) and any(
            name.name == "tools" and name.ctx == "load"
            for name in self._parsed.find_all(nodes.Name)
        )

    def unused(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """A character that is neither in the template nor in the conversation."""
        used = {*self.source, *"".join(self._variables.values())}
        used.update(json.dumps(messages, ensure_ascii=False))
        found = next((chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used), None)
        if found is None:
            raise RequestError("the messages have too many private characters to be continued")
        return found

    def budget(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        share: int = 1,
    ) -> Budget:
        """What it may take to render these, or a `share`th of that."""
        calls = sum(len(message.get("tool_calls", ())) for message in messages)
        steps = STEPS + MESSAGE_STEPS * (len(messages) + calls + len(tools))
        letters = LETTERS + MESSAGE_LETTERS * (size_of(messages) + characters(tools))
        return Budget(steps // share, letters // share, SECONDS / share)

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[Segment]:
        """The prompt as text and control tokens in turn; raises as `text`."""
        return self.segments(self.text(messages, add_generation_prompt))

    def text(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        budget: Budget | None = None,
    ) -> str:
        """The prompt's text, which knows what of it is the template's.

        Raises RequestError where the template refuses the conversation, TokenizerError
        where the template itself fails.
        """
        variables = {
            # A role is one of four words, which some templates build a token's name with.
            "messages": [{**message, "role": own(message["role"])} for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": tools,
            "documents": None,
            **self._variables,
        }
        try:
            return Run(budget or self.budget(messages), variables).render(self._tree)
        except RefusalError as error:
            raise RequestError(
                f"the chat template refuses these messages: {reason(error)}"
            ) from None
        except Exception as error:  # a template can raise anything Python can
            raise TokenizerError(f"the chat template fails: {reason(error)}") from None

    def segments(self, text: str, until: str = "") -> list[Segment]:
        """A rendered text as text and control tokens in turn: what comes before the last `until`.

        Raises RequestError where that is not in it.
        """
        if until:
            end = text.rfind(until)
            if end < 0:
                raise RequestError("the chat template does not show an answer to be continued")
            text = part(Budget(len(text), len(text), SECONDS), text, slice(end))
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
