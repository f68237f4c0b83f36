"""The lines that begin with a slash: what they are called, take and do."""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_cerebrum import cli
from mlx_cerebrum.chat.reply import Answer
from mlx_cerebrum.conversation import read_messages, write_messages
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.memory import human
from mlx_cerebrum.template import DEFAULT_SYSTEM
from mlx_cerebrum.views import find

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
    name, _, argument = line[1:].partition(" ")
    argument = argument.strip()
    command = COMMANDS.get(name.lower())
    if command is None:
        raise RequestError(f"/{name} is not a command; {_suggestion(name.lower())}")
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
        own = DEFAULT_SYSTEM if session.tokenizer.chat_template is None else "none of yours"
        chat.screen.notice(
            f"the template's own: {own}" if session.system is None else session.system or "(empty)"
        )
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


@_command("undo", "", "drop the last question and its answer; bring back what /clear took")
def _undo(chat: "Chat", argument: str) -> None:
    session = chat.session
    restores = session.can_restore
    dropped = session.undo()
    count = len(session.exchanges)
    if restores:
        chat.screen.notice(f"the conversation is back: {_exchanges(count)}")
    elif dropped is None:
        raise RequestError("there is nothing to take back")
    else:
        chat.screen.notice(f"dropped: {shorten(dropped)} ({_exchanges(count)} left)")


@_command("save", "FILE", "write the conversation as JSON, for /load or generate --messages")
def _save(chat: "Chat", argument: str) -> None:
    path, messages = _path(argument), chat.session.messages()
    if chat.session.question is None:
        raise RequestError("there is nothing to save yet")
    try:
        if path.exists() and not chat.confirm(f"{path} exists. Overwrite it?"):
            raise RequestError(f"{path} exists and stays as it is; give another name")
        write_messages(path, messages)
    except OSError as error:
        raise RequestError(cli.describe(error)) from None
    chat.saved = messages
    chat.screen.notice(f"saved {len(messages)} messages to {path}")


@_command("load", "FILE", "go on with a saved conversation in place of this one")
def _load(chat: "Chat", argument: str) -> None:
    path, session = _path(argument), chat.session
    try:
        messages = read_messages(path)
    except OSError as error:
        raise RequestError(cli.describe(error)) from None
    if chat.unsaved:
        count = _exchanges(len(session.exchanges))
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
    rows += [("conversation", f"{_exchanges(len(session.exchanges))}, {context}")]
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


def _exchanges(count: int) -> str:
    return f"{count} exchange{'' if count == 1 else 's'}"


def shorten(text: str, length: int = 50) -> str:
    """One line of at most `length` characters."""
    line = cli.one_line(text)
    return line if len(line) <= length else line[: length - 3] + "..."


def _path(text: str) -> Path:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    try:
        return Path(text).expanduser()
    except RuntimeError:  # ~nosuchuser
        return Path(text)
