"""Conversations to prompts: the checkpoint's Jinja template, or the built-in Cerebrum one.

A template writes control tokens as text (`<s>`, `<|im_end|>`), and so can a user. The two
are told apart by spelling: before rendering, wherever a message spells a control token its
first character is swapped for a private one that nothing else uses; after rendering, the
control tokens still spelled out are the template's own, and the characters are swapped
back in the text between them.

The template comes from the checkpoint, so it runs in Jinja's sandbox: no files, no
attributes with underscores, a bound on time (checked in each loop and macro), on output and
on repetition. Not bounded: the memory of what `~`, `+` and filters build within one step.
"""

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlx_cerebrum.errors import RequestError, TokenizerError
from mlx_cerebrum.vocabulary import AddedToken

# The model card's text.
DEFAULT_SYSTEM = (
    "A chat between a user and a thinking artificial intelligence assistant. The assistant "
    "describes its thought process and gives helpful and detailed answers to the user's questions."
)

# The card's format; earlier answers as the models' public users write them, without an EOS.
CEREBRUM_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}"
    f"{{% set system = {DEFAULT_SYSTEM!r} %}}{{% set turns = messages %}}"
    "{% endif %}"
    "{{ bos_token + system.strip() + '\\n' }}"
    "{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user, assistant, user, ...') }}"
    "{% endif %}"
    "{{ ('User: ' if message['role'] == 'user' else 'AI: ') + message['content'].strip() + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'AI:' }}{% endif %}"
)

# A model that runs on past its answer writes the user's next turn.
CEREBRUM_STOP = "\nUser:"

ROLES = ("system", "user", "assistant")
RENDER_SECONDS = 10.0
RENDER_CHARS = 1_000_000  # plus four times what the messages hold

Segment = str | AddedToken


def check_messages(messages: Any) -> list[dict[str, str]]:
    """A conversation as a list of {role, content}; RequestError says which message is wrong."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise RequestError("messages must be a list of at least one {role, content} object")
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
    return checked


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
        self._variables = dict(variables)
        # Longest first, so that no token hides behind a shorter one.
        names = sorted(filter(None, controls), key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._split = re.compile(
            "|".join(
                r"\s*" * controls[name].lstrip + re.escape(name) + r"\s*" * controls[name].rstrip
                for name in names
            )
            or r"(?!)"
        )
        self._parts = {(name[:cut], name[cut:]) for name in names for cut in range(1, len(name))}

    def render(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> list[Segment]:
        """The prompt as text and control tokens in turn.

        Raises RequestError where the template refuses the conversation, TokenizerError
        where the template itself fails.
        """
        contents = [message["content"] for message in messages]
        stand_in = self._stand_ins(contents)
        shielded = [
            {**message, "content": self._shield(message["content"], stand_in)}
            for message in messages
        ]
        text = _render(
            self.source,
            {
                "messages": shielded,
                "add_generation_prompt": add_generation_prompt,
                "tools": None,
                "documents": None,
                **self._variables,
            },
            RENDER_CHARS + 4 * sum(map(len, contents)),
        )
        restore = str.maketrans({new: old for old, new in stand_in.items()})
        segments: list[Segment] = []
        at = 0
        for match in self._split.finditer(text):
            segments.append(text[at : match.start()].translate(restore))
            name = match[0] if match[0] in self._controls else match[0].strip()
            segments.append(self._controls[name])
            at = match.end()
        segments.append(text[at:].translate(restore))
        return [segment for segment in segments if segment != ""]

    def _stand_ins(self, contents: Sequence[str]) -> dict[str, str]:
        """A private-use character, in no message nor template, for each character to swap."""
        used = set(self.source).union(*contents)
        free = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in used)
        swapped = {char for name in self._controls for char in name}
        return dict(zip(sorted(swapped), free, strict=False))

    def _shield(self, content: str, stand_in: Mapping[str, str]) -> str:
        """Break every control token spelled in `content`, and any it could be a part of."""
        chars = list(content)
        starts = [match.start() for match in self._names.finditer(content)]
        body = content.strip()
        first = len(content) - len(content.lstrip())
        for head, tail in self._parts:
            if body.endswith(head):
                starts.append(first + len(body) - len(head))
            if body.startswith(tail):
                starts.append(first)
        if body and any(body in name for name in self._controls):
            starts.append(first)
        for start in starts:
            chars[start] = stand_in[content[start]]
        return "".join(chars)


class _RefusalError(Exception):
    """The template called raise_exception."""


class _Generation(Extension):
    """`{% generation %}` marks answers for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """One rendering's environment: transformers' settings, plus a deadline."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, limit: int) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self._limit = limit
        self._deadline = time.monotonic() + RENDER_SECONDS
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)

    def tick(self) -> None:
        if time.monotonic() > self._deadline:
            raise SecurityError(f"it ran for more than {RENDER_SECONDS:.0f} seconds")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        numbers = (int, float)
        if operator == "**" and not (abs(left) <= 2**32 and abs(right) <= 64):
            raise SecurityError("a power out of bounds")
        for factor, other in ((left, right), (right, left)):
            repeats = operator == "*" and not isinstance(factor, numbers)
            if repeats and isinstance(other, int) and len(factor) * other > self._limit:
                raise SecurityError("a repetition out of bounds")
        return super().call_binop(context, operator, left, right)

    def stream(self, source: str, variables: Mapping[str, Any]) -> Iterable[str]:
        tree = self.parse(source)
        for node in tree.find_all((nodes.For, nodes.Macro)):
            assert isinstance(node, nodes.For | nodes.Macro)
            tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
            node.body.insert(0, nodes.ExprStmt(tick).set_lineno(node.lineno))
        tree.set_environment(self)
        template = jinja2.Template.from_code(self, self.compile(tree), dict(self.globals))
        return template.generate(variables)


def _refuse(message: str) -> NoReturn:
    raise _RefusalError(message)


def _tojson(value: Any, **options: Any) -> str:
    # Jinja's own escapes <, > and &, which a prompt must not.
    return json.dumps(value, ensure_ascii=False, **options)


def _render(source: str, variables: Mapping[str, Any], limit: int) -> str:
    parts: list[str] = []
    size = 0
    try:
        for part in _Sandbox(limit).stream(source, variables):
            parts.append(part)
            size += len(part)
            if size > limit:
                raise SecurityError(f"its prompt is longer than {limit:,} characters")
    except _RefusalError as error:
        raise RequestError(f"the chat template refuses these messages: {_line(error)}") from None
    except Exception as error:  # a template can raise anything Python can
        raise TokenizerError(f"the chat template fails: {_line(error)}") from None
    return "".join(parts)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
