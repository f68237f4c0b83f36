"""What lines that begin with a slash do."""

import re

import mlx.core as mx

from mlx_cerebrum.chat import filing
from mlx_cerebrum.chat.chat import Chat, Command
from mlx_cerebrum.chat.quotes import QUOTES
from mlx_cerebrum.chat.session import Answer
from mlx_cerebrum.chat.wording import counted, shorten
from mlx_cerebrum.errors import RequestError, shown
from mlx_cerebrum.model.memory import human
from mlx_cerebrum.text import one_line
from mlx_cerebrum.tokenizer.chat_formats import DEFAULT_SYSTEM
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
        if value or not found[2].strip():
            _system(chat, value)
        else:  # ""
            chat.session.set_system("")
            chat.screen.notice("system text set to nothing")
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
        "FILE", filing.save, "write the conversation as JSON, for /load or generate --messages"
    ),
    "load": Command("FILE", filing.load, "go on with a saved conversation in place of this one"),
    "export": Command("FILE", filing.export, "write the conversation as Markdown, to be read"),
    "resume": Command("[NUMBER|WORDS]", filing.resume, "go on with a kept conversation"),
    "delete": Command(
        "[NUMBER]", filing.delete, "delete this conversation's file, or a listed one"
    ),
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
