"""What lines that begin with a slash do."""

import re
import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path

import mlx.core as mx

from mlx_cerebrum import cli
from mlx_cerebrum.chat.chat import Chat, Command
from mlx_cerebrum.chat.export import as_markdown
from mlx_cerebrum.chat.keeper import turns_of
from mlx_cerebrum.chat.kept import TITLE, Kept, conversations, folder, newest, path_of, read, remove
from mlx_cerebrum.chat.quotes import QUOTES
from mlx_cerebrum.chat.session import Answer
from mlx_cerebrum.chat.wording import counted, shorten
from mlx_cerebrum.errors import RequestError, shown
from mlx_cerebrum.model.memory import human
from mlx_cerebrum.text import one_line
from mlx_cerebrum.tokenizer.chat_formats import DEFAULT_SYSTEM
from mlx_cerebrum.tokenizer.conversation import write_messages, write_text
from mlx_cerebrum.weights import views


def _help(chat: Chat, argument: str) -> None:
    rows = [(f"/{name} {c.argument}".strip(), c.help) for name, c in COMMANDS.items()]
    if not argument:
        chat.screen.table([*rows, *KEYS])
        return
    word = argument.split()[0].lstrip("/").lower()
    found = [row for row in rows if row[0].split()[0] == f"/{word}"]
    if word == "set":
        found += _settings(chat)
    if not found and word != "shortcuts":  # Ollama's word for the keys
        raise RequestError(f"there is no /{shorten(word)}; /help lists the commands")
    chat.screen.table(found or KEYS)


def _system(chat: Chat, argument: str) -> None:
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


def _set(chat: Chat, argument: str) -> None:
    words = argument.split(None, 1)
    if len(words) > 1 and words[0].lower() in ("parameter", "parameters", "param"):
        argument = words[1]
    found = re.match(r"([\w-]+)(?:\s*=\s*|\s+|$)(.*)", argument, re.DOTALL)
    if found is None or words[0].lower() == "parameter" == argument.lower():
        chat.screen.table(_settings(chat))
        return
    typed, value = found[1], _unquoted(found[2])
    if typed.lower() == "system":
        _system(chat, value)
        return
    name = chat.settings.find(typed)
    if not value:
        chat.screen.table([(f"{name} {chat.settings.value(name)}", chat.settings.about(name))])
        return
    options = chat.settings.set(name, value, chat.session.model.config.vocab_size)
    chat.session.options = options
    note = ""
    try:
        options.sampling.check_used()
    except RequestError as error:
        note = f"; as it is now, {error}".replace("--", "/set ")
    chat.screen.notice(f"{name} {chat.settings.value(name)}, from the next answer on{note}")


def _settings(chat: Chat) -> list[tuple[str, str]]:
    """What `/set` changes, as it is now."""
    system = chat.session.system
    told = "the template's own" if system is None else one_line(system, 60) or "(empty)"
    rows = [("system", f"the system text: {told}")]
    return rows + [(f"{n} {chat.settings.value(n)}", chat.settings.brief(n)) for n in chat.settings]


def _unquoted(text: str) -> str:
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def _show(chat: Chat, argument: str) -> None:
    what = argument.lower() or "info"
    if what in ("info", "model"):
        chat.screen.table([*chat.about, *_memory(chat)])
    elif what in ("parameters", "parameter", "settings"):
        chat.screen.table(_settings(chat))
    elif what == "system":
        _system(chat, "")
    else:
        raise RequestError(f"/show info, parameters or system, not {shown(argument)}")


def _plan(chat: Chat, argument: str) -> None:
    session = chat.session
    if argument:
        session.switch(views.find(session.models, argument))
        chat.screen.notice(f"{session.current} answers from here on")
        return
    rows = []
    for name, model in session.models.items():
        tokens, _ = session.cached(name)
        mark = "*" if name == session.current else " "
        blocks = f"{model.config.num_positions} positions over {model.config.num_hidden_layers}"
        rows.append((f"{mark} {name}", f"{blocks} blocks, {tokens} tokens cached"))
    chat.screen.table(rows)


def _compare(chat: Chat, argument: str) -> None:
    session = chat.session
    if argument:
        chat.compare(argument, len(session.exchanges))
    elif session.question is not None:
        chat.compare(session.question, session.before)
    else:
        raise RequestError("there is no question yet; /compare TEXT asks one")


def _retry(chat: Chat, argument: str) -> None:
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


def _continue(chat: Chat, argument: str) -> None:
    chat.go_on()


def _edit(chat: Chat, argument: str) -> None:
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


def _undo(chat: Chat, argument: str) -> None:
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


def _save(chat: Chat, argument: str) -> None:
    path, messages = _path(argument), chat.session.messages()
    if chat.session.question is None:
        raise RequestError("there is nothing to save yet")
    _write(chat, path, partial(write_messages, messages=messages))
    chat.saved, chat.file = messages, path.absolute()
    chat.screen.notice(f"saved {counted(len(messages), 'message')} to {path}")


def _write(chat: Chat, path: Path, write: Callable[[Path], None]) -> None:
    """Write a file, one that is there only where somebody says so."""
    try:
        asked = path.is_file() and path.absolute() != chat.file
        if asked and not chat.confirm(f"{path} exists. Overwrite it?"):
            raise RequestError(f"{path} exists and stays as it is; give another name")
        write(path)
    except OSError as error:
        raise RequestError(cli.describe(error)) from None


def _load(chat: Chat, argument: str) -> None:
    path = _path(argument)
    found = [(path, one) for one in conversations(path)]
    at = 0 if len(found) == 1 else _choose(chat, found)
    if at is None:
        raise RequestError(f"{path} holds {len(found)} conversations; say which, at a terminal")
    if _left(chat):
        chat.load(found[at][1], str(path))


def _left(chat: Chat) -> bool:
    """Whether the conversation may be left; says so where it may not."""
    if not (chat.unsaved and chat.asks):
        return True
    count = counted(len(chat.session.exchanges), "exchange")
    if chat.confirm(f"This conversation ({count}) is not saved. Leave it?"):
        return True
    chat.screen.notice("nothing changed; /save FILE keeps it")
    return False


def _choose(chat: Chat, found: Sequence[tuple[Path, Kept]], enter: int | None = None) -> int | None:
    """Show conversations by number, and which somebody wants; Enter is the one at `enter`."""
    rows = [
        (str(n), f"{_date(one.updated)}  {one.title}  ({counted(len(one.turns), 'message')})")
        for n, (_, one) in enumerate(found, 1)
    ]
    chat.screen.table(rows)
    if not chat.asks:
        return enter
    default = "" if enter is None else f" [{enter + 1}]"
    while True:
        try:
            typed = chat.reader.ask(f"Which one?{default} ").strip()
            return _number(typed, len(found)) if typed else enter
        except RequestError as error:
            chat.screen.error(cli.describe(error))
        except (EOFError, KeyboardInterrupt):
            return None


def _number(typed: str, most: int) -> int:
    """A place in a list, from 0. Raises RequestError for what is none of its numbers."""
    if not (typed.isdecimal() and len(typed) < 9 and 1 <= int(typed) <= most):
        raise RequestError(f"{shown(typed)} is none of the numbers 1 to {most}")
    return int(typed) - 1


def _date(seconds: float) -> str:
    if not seconds:
        return ""
    when = datetime.fromtimestamp(seconds)
    return f"{when:%H:%M}, today" if when.date() == datetime.now().date() else f"{when:%Y-%m-%d}"


def _resume(chat: Chat, argument: str) -> None:
    if chat.listed and argument.isdecimal():
        at: int | None = _number(argument, len(chat.listed))
    else:
        chat.listed = _others(chat, "" if argument.isdecimal() else argument)
        if not chat.listed:
            raise RequestError(f"no conversation{argument and ' with these words'} is kept")
        if argument.isdecimal():
            at = _number(argument, len(chat.listed))
        else:
            at = _choose(chat, chat.listed)
    if at is None:
        chat.screen.notice("/resume NUMBER goes on with one, /delete NUMBER removes it")
    elif _left(chat):
        _go_on_with(chat, *chat.listed[at])


def resume_at_start(chat: Chat) -> None:
    """For --resume: the conversation somebody picks, the newest where nobody is there."""
    chat.listed = _others(chat, "")
    if not chat.listed:
        chat.screen.notice(f"no conversation is kept yet in {folder()}; this is a new one")
        return
    if (at := _choose(chat, chat.listed, 0)) is None:
        chat.screen.notice("a new conversation")
    else:
        _go_on_with(chat, *chat.listed[at])


def _others(chat: Chat, words: str) -> list[tuple[Path, Kept]]:
    return [(path, one) for path, one in newest(words) if one.name != chat.session.name]


def _go_on_with(chat: Chat, path: Path, found: Kept) -> None:
    (again,) = read(path)[:1]  # another chat may have gone on with it
    chat.load(again, f'"{found.title}"', own=path == path_of(again.name))
    chat.listed = []


def _delete(chat: Chat, argument: str) -> None:
    if not argument:
        if chat.keeper is None:
            raise RequestError("this conversation is kept nowhere")
        if chat.asks and not chat.confirm("Delete this conversation's file?"):
            return
        chat.keeper.leave()
        chat.screen.notice(
            "deleted; what you see is kept nowhere from here on, but /save writes it"
        )
        return
    if not chat.listed:
        raise RequestError("/resume lists them first")
    path, one = chat.listed[_number(argument, len(chat.listed))]
    if not chat.asks or chat.confirm(f'Delete "{one.title}"?'):
        remove(path)
        chat.screen.notice(f'deleted "{one.title}"')


def _export(chat: Chat, argument: str) -> None:
    turns = turns_of(chat.session)
    if not turns:
        raise RequestError("there is nothing to export yet")
    path, title = _path(argument), one_line(turns[0].text, TITLE)
    text = as_markdown(title, chat.session.system or "", turns)
    _write(chat, path, partial(write_text, text=text))
    chat.screen.notice(f"exported {counted(len(turns), 'message')} to {path}, as Markdown")


def _stats(chat: Chat, argument: str) -> None:
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
    chat.screen.table([*rows, *_memory(chat)])


def _memory(chat: Chat) -> list[tuple[str, str]]:
    held = f"{human(mx.get_active_memory())} held, {human(mx.get_peak_memory())} at most so far"
    return [("memory", held)]


def _clear(chat: Chat, argument: str) -> None:
    empty = chat.session.question is None
    chat.session.clear()
    chat.screen.notice("nothing to clear" if empty else "a new conversation; /undo goes back")


def _quit(chat: Chat, argument: str) -> None:
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


COMMANDS = {
    "help": Command("[COMMAND]", _help, "this list"),
    "set": Command("[NAME VALUE]", _set, "temperature and the like; alone, lists all"),
    "show": Command("[WHAT]", _show, "what the model is; parameters, system: what is set"),
    "system": Command("[TEXT]", _system, "show or set the system text; - for the template's own"),
    "plan": Command("[NAME]", _plan, "list the models, or go on with another: no load time"),
    "compare": Command(
        "[TEXT]", _compare, "two models' answers side by side, to this or the last question"
    ),
    "continue": Command("", _continue, "go on with an answer that was cut off or stopped"),
    "retry": Command("[TEMP]", _retry, "ask the last question again, at this temperature"),
    "edit": Command("[TEXT]", _edit, "change the last question and ask it anew"),
    "undo": Command("", _undo, "take back the last question, /retry, /edit, /compare or /clear"),
    "save": Command(
        "FILE", _save, "write the conversation as JSON, for /load or generate --messages"
    ),
    "load": Command("FILE", _load, "go on with a saved conversation in place of this one"),
    "export": Command("FILE", _export, "write the conversation as Markdown, to be read"),
    "resume": Command("[NUMBER]", _resume, "list the conversations kept, or go on with one"),
    "delete": Command("[NUMBER]", _delete, "delete this conversation's file, or one of /resume's"),
    "stats": Command("", _stats, "tokens, pace, caches, memory"),
    "clear": Command("", _clear, "begin a new conversation under the same system text"),
    "quit": Command("", _quit, "leave"),
}
KEYS = (
    ("Enter", "send; pasted text keeps its lines"),
    (QUOTES, "begins and ends a message of several lines, typed line by line"),
    ("Alt+Enter", "a new line, as does a \\ at the end of one"),
    ("Ctrl-X Ctrl-E", "write the message in $EDITOR; leaving that sends it"),
    ("Ctrl-R", "search what was asked before"),
    ("Ctrl-C", "stop the answer and keep what came"),
    ("Ctrl-D", "leave"),
    ("//", "begins a message with a slash"),
)
