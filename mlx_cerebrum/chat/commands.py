"""The lines that begin with a slash: what they are called, take and do."""

import re
import shlex
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_cerebrum import cli
from mlx_cerebrum.chat.reply import Answer
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.memory import human
from mlx_cerebrum.text import one_line
from mlx_cerebrum.tokenizer.chat_formats import DEFAULT_SYSTEM
from mlx_cerebrum.tokenizer.conversation import read_messages, write_messages
from mlx_cerebrum.weights.views import find

if TYPE_CHECKING:
    from mlx_cerebrum.chat.chat import Chat

KEYS = (
    ("Enter", "send; pasted text keeps its lines"),
    ("Alt+Enter", "a new line, as does a \\ at the end of one"),
    ("Ctrl-C", "stop the answer and keep what came"),
    ("Ctrl-D", "leave"),
    ("//", "begins a message with a slash"),
)
# What people type for a command that is called otherwise here.
MEANT = {"exit": "quit", "q": "quit", "bye": "quit", "?": "help", "h": "help"}
MEANT |= {"reset": "clear", "new": "clear", "model": "plan", "redo": "retry", "regenerate": "retry"}


@dataclass(frozen=True)
class Command:
    argument: str  # as /help shows it: "" none, in brackets where it can be left out
    what: str
    run: Callable[["Chat", str], None]


COMMANDS: dict[str, Command] = {}
_Body = Callable[["Chat", str], None]


def _command(name: str, argument: str, what: str) -> Callable[[_Body], _Body]:
    def add(body: _Body) -> _Body:
        COMMANDS[name] = Command(argument, what, body)
        return body

    return add


def run_command(chat: "Chat", line: str) -> None:
    """Run `/name argument`. Raises RequestError for a command there is not, or a wrong argument."""
    name, argument = re.split(r"\s+|$", line[1:].rstrip(), maxsplit=1)
    command = COMMANDS.get(name.lower())
    if command is None:
        raise RequestError(f"/{shorten(name)} is not a command; {_suggestion(name.lower())}")
    if argument and not command.argument:
        raise RequestError(f"/{name} takes nothing after it")
    if not argument and command.argument and not command.argument.startswith("["):
        raise RequestError(f"/{name} needs {command.argument}")
    command.run(chat, argument)


def _suggestion(name: str) -> str:
    if not name or not name[:1].isascii():
        return "/help lists them"
    near = MEANT.get(name) or next((c for c in COMMANDS if c.startswith(name)), None)
    near = near or next(iter(get_close_matches(name, COMMANDS, n=1)), None)
    return (
        f"did you mean /{near}?" if near else "/help lists them, // begins a message with a slash"
    )


@_command("help", "", "this list")
def _help(chat: "Chat", argument: str) -> None:
    rows = [(f"/{name} {c.argument}".strip(), c.what) for name, c in COMMANDS.items()]
    chat.screen.table([*rows, *KEYS])


@_command("system", "[TEXT]", "show or set the system text; - for the template's own")
def _system(chat: "Chat", argument: str) -> None:
    session = chat.session
    if not argument:
        built_in = session.tokenizer.format.built_in == "cerebrum"
        own = f"the template's own{f': {DEFAULT_SYSTEM}' if built_in else ', if it has one'}"
        chat.screen.notice(own if session.system is None else session.system or "(empty)")
        return
    text = None if argument == "-" else argument
    if text == session.system:
        chat.screen.notice("that is the system text already")
        return
    session.set_system(text)
    again = "; the conversation is read anew with the next question" if session.exchanges else ""
    set_to = "set" if text else "as the template has it"
    chat.screen.notice(f"system text {set_to}{again}")


@_command("plan", "[NAME]", "list the models, or go on with another: no load time")
def _plan(chat: "Chat", argument: str) -> None:
    session = chat.session
    if argument:
        session.switch(find(session.models, argument))
        chat.screen.notice(f"{session.current} answers from here on")
        return
    rows = []
    for name, model in session.models.items():
        tokens, _ = session.cached(name)
        mark = "*" if name == session.current else " "
        blocks = f"{model.config.num_positions} positions over {model.config.num_hidden_layers}"
        rows.append((f"{mark} {name}", f"{blocks} blocks, {tokens} tokens cached"))
    chat.screen.table(rows)


@_command("compare", "[TEXT]", "two models' answers side by side, to this or the last question")
def _compare(chat: "Chat", argument: str) -> None:
    session = chat.session
    if argument:
        chat.compare(argument, len(session.exchanges))
    elif session.question is not None:
        chat.compare(session.question, session.before)
    else:
        raise RequestError("there is no question yet; /compare TEXT asks one")


@_command("retry", "[TEMP]", "ask the last question again, at this temperature")
def _retry(chat: "Chat", argument: str) -> None:
    session = chat.session
    if session.question is None:
        raise RequestError("there is no question yet")
    try:
        temp = float(argument) if argument else None
    except ValueError:
        raise RequestError(f"/retry takes a temperature like 0.7, not {argument!r}") from None
    if not temp and session.repeats(session.question, session.before):
        others = ", or /plan for another model" if session.other else ""
        raise RequestError(
            f"at temperature 0 the answer would be the same; try /retry 0.7, /edit{others}"
        )
    chat.ask(session.question, session.before, temp)


@_command("edit", "[TEXT]", "change the last question and ask it anew")
def _edit(chat: "Chat", argument: str) -> None:
    session = chat.session
    if session.question is None:
        raise RequestError("there is no question yet")
    try:
        text = argument or chat.reader.read("edit> ", session.question).strip()
    except (EOFError, KeyboardInterrupt):
        text = ""
    if text:
        chat.ask(text, session.before)
    else:
        chat.screen.notice("nothing changed")


@_command("undo", "", "take back the last question, /retry, /edit, /compare or /clear")
def _undo(chat: "Chat", argument: str) -> None:
    session = chat.session
    restores, answered = session.can_restore, session.unanswered is None
    before, dropped = len(session.exchanges), session.undo()
    count = len(session.exchanges)
    if restores:
        chat.screen.notice(f"the conversation is back: {counted(count, 'exchange')}")
    elif dropped is None:
        raise RequestError("there is nothing to take back")
    elif answered and count == before:
        chat.screen.notice(f"the answer before is back, to: {shorten(session.question or '')}")
    else:
        chat.screen.notice(f"dropped: {shorten(dropped)} ({counted(count, 'exchange')} left)")


@_command("save", "FILE", "write the conversation as JSON, for /load or generate --messages")
def _save(chat: "Chat", argument: str) -> None:
    path, messages = _path(argument), chat.session.messages()
    if chat.session.question is None:
        raise RequestError("there is nothing to save yet")
    try:
        asked = path.is_file() and path.absolute() != chat.file
        if asked and not chat.confirm(f"{path} exists. Overwrite it?"):
            raise RequestError(f"{path} exists and stays as it is; give another name")
        write_messages(path, messages)
    except OSError as error:
        raise RequestError(cli.describe(error)) from None
    chat.saved, chat.file = messages, path.absolute()
    chat.screen.notice(f"saved {counted(len(messages), 'message')} to {path}")


@_command("load", "FILE", "go on with a saved conversation in place of this one")
def _load(chat: "Chat", argument: str) -> None:
    path, session = _path(argument), chat.session
    messages = read_messages(path)
    if chat.unsaved:
        count = counted(len(session.exchanges), "exchange")
        question = f"This conversation ({count}) is not saved. Leave it?"
        if chat.asks and not chat.confirm(question):
            chat.screen.notice("nothing changed; /save FILE keeps it")
            return
    chat.load(messages, str(path))


@_command("stats", "", "tokens, pace, caches, memory")
def _stats(chat: "Chat", argument: str) -> None:
    session = chat.session
    config, last = session.model.config, session.last
    rows = [("model", session.current)]
    if last is not None and last.last is not None:
        rows += [("last answer", _figures(last))]
    context = f"{session.tokens} of {config.max_position_embeddings} positions"
    rows += [("conversation", f"{counted(len(session.exchanges), 'exchange')}, {context}")]
    rows += [("window", f"{config.sliding_window} tokens" if config.sliding_window else "none")]
    for name in session.models:
        tokens, nbytes = session.cached(name)
        rows.append((f"cache {name}", f"{tokens} tokens, {human(nbytes)}"))
    held = f"{human(mx.get_active_memory())} held, {human(mx.get_peak_memory())} at most so far"
    chat.screen.table([*rows, ("memory", held)])


@_command("clear", "", "begin a new conversation under the same system text")
def _clear(chat: "Chat", argument: str) -> None:
    empty = chat.session.question is None
    chat.session.clear()
    chat.screen.notice("nothing to clear" if empty else "a new conversation; /undo goes back")


@_command("quit", "", "leave")
def _quit(chat: "Chat", argument: str) -> None:
    raise EOFError


def _figures(answer: Answer) -> str:
    r = answer.last
    if r is None:
        return ""
    return (
        f"{answer.model}: {r.prompt_tokens} prompt tokens ({r.cached_tokens} cached), first token"
        f" after {r.time_to_first_token:.2f} s, {r.generation_tokens} generated at"
        f" {answer.pace:.1f}/s [{answer.reason}]"
    )


def counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def shorten(text: str, length: int = 50) -> str:
    """One line of at most `length` characters."""
    line = one_line(text)
    return line if len(line) <= length else line[: length - 3] + "..."


def _path(text: str) -> Path:
    """A file as it is typed, or as a shell would quote it: what dragging one here types."""
    with suppress(ValueError):  # a single quote
        words = shlex.split(text)
        text = words[0] if len(words) == 1 else text
    if not text or "\0" in text:
        raise RequestError(f"{text!r} can't be a file's name")
    try:
        return Path(text).expanduser()
    except RuntimeError:  # ~nosuchuser
        return Path(text)
