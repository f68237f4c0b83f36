"""The chat itself: reads lines, asks the session, shows what comes."""

import re
import shlex
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import mlx.core as mx

from mlx_cerebrum import cli
from mlx_cerebrum.chat.prompt import Reader
from mlx_cerebrum.chat.screen import Screen, counted, figures, first_difference
from mlx_cerebrum.chat.session import Answer, Messages, Session
from mlx_cerebrum.chat.signals import interrupts
from mlx_cerebrum.errors import CerebrumError, RequestError
from mlx_cerebrum.model.memory import human
from mlx_cerebrum.text import one_line, tell_traceback
from mlx_cerebrum.tokenizer.chat_formats import DEFAULT_SYSTEM
from mlx_cerebrum.tokenizer.conversation import read_messages, write_messages
from mlx_cerebrum.weights import views

# Two slashes begin a message with one. Not where code is pasted: `// a comment`, `/// another`.
_SLASH = re.compile(r"//(?=[^/\s])")


class Chat:
    """One conversation at a terminal or on a pipe.

    `asks`: whether the program may ask questions of its own: somebody is there to answer them.
    """

    def __init__(self, session: Session, screen: Screen, reader: Reader, asks: bool) -> None:
        self.session = session
        self.screen = screen
        self.reader = reader
        self.asks = asks
        self.saved: Messages = []
        self.file: Path | None = None  # this chat wrote it, and overwrites it without asking
        self.failed = False

    @property
    def unsaved(self) -> bool:
        return self.session.question is not None and self.session.messages() != self.saved

    def run(self) -> int:
        """Talk until the end. The exit code: 2 where a line of a pipe was refused, else 0."""
        while True:
            try:
                self.handle(self.reader.read(f"{self._label()}> "))
            except EOFError:
                return cli.BAD_INPUT if self.failed and not self.asks else 0
            except KeyboardInterrupt:
                if not self.asks:
                    raise
                self.screen.notice("/quit or Ctrl-D leaves")

    def _label(self) -> str:
        """The shortest name of the current model."""
        names, current = self.session.models, self.session.current
        short = current.replace("@", "-").rpartition("-")[2]
        try:
            return short if len(names) > 1 and views.find(names, short) == current else current
        except CerebrumError:
            return current

    def handle(self, line: str) -> None:
        """Answer a message or run a command. An error costs this line, not the conversation."""
        text = line.strip()
        try:
            try:
                text.encode()
            except UnicodeEncodeError:
                raise RequestError("this line is not valid UTF-8 text; nothing was asked") from None
            if text.startswith("/") and not text.startswith("//"):
                _run_command(self, text)
            elif text:
                self.ask(text[1:] if _SLASH.match(text) else text)
        except CerebrumError as error:
            self.failed = True
            self.screen.error(cli.describe(error))
        except (EOFError, OSError):
            raise
        except Exception as error:  # a fault of the program's own
            if not self.asks:
                raise
            tell_traceback(error)
            self.session.forget_caches()  # it may have left them half written
            self.screen.error(
                "that is a fault of this program; the conversation is still here, /save FILE keeps"
                " it"
            )

    def load(self, messages: Messages, source: str) -> None:
        """Go on with a conversation from a file."""
        session = self.session
        session.replace(messages)
        self.saved = session.messages()
        last = session.question
        asked = "" if last is None else f"; the last question: {_shorten(last)}"
        waiting = " is not answered yet, /retry asks it" if session.unanswered is not None else ""
        self.screen.notice(f"{counted(len(messages), 'message')} from {source}{asked}{waiting}")

    def ask(self, question: str, before: int | None = None, temp: float | None = None) -> None:
        """Put a question after the first `before` exchanges (all of them by default)."""
        session = self.session
        before = len(session.exchanges) if before is None else before
        (stream,) = session.ask(question, before=before, temp=temp)
        answer = stream.answer
        with interrupts() as stream.stopped:  # until it is kept: Ctrl-C is pressed twice, too
            with closing(stream):
                self.screen.show(stream)
            if self.asks and answer.last is not None:
                first = f"first after {answer.last.time_to_first_token:.2f} s"
                self.screen.notice(f"{figures(answer)}, {first}")
            self._conclude(question, answer, before)

    def compare(self, question: str, before: int) -> None:
        """Put a question to two models, and keep one of the answers."""
        session = self.session
        if session.other is None:
            raise RequestError("there is only this model; --plan NAME adds another order of it")
        names = [name for name in session.models if name in (session.current, session.other)]
        first, second = session.ask(question, names, before)
        answers = (first.answer, second.answer)
        kept = names.index(session.current)
        with interrupts() as stopped:
            first.stopped = second.stopped = stopped
            with closing(first), closing(second):
                self.screen.compare((first, second))
            both = all(answer.text for answer in answers)
            if both:
                self.screen.notice(_difference(*answers))
            elif not answers[kept].text:
                kept = 1 - kept
        if both and self.asks:
            kept = self._choice(kept)
        with interrupts():
            self._conclude(question, answers[kept], before)

    def confirm(self, question: str) -> bool:
        """Whether somebody is there and says yes."""
        return self._typed(f"{question} [y/N] ").lower() in ("y", "yes")

    def _choice(self, default: int) -> int:
        question = f"Keep 1 or 2? [{default + 1}] "
        while (typed := self._typed(question)) not in ("", "1", "2"):
            pass  # the next question, say, typed ahead
        return int(typed) - 1 if typed else default

    def _typed(self, question: str) -> str:
        try:
            return self.reader.ask(question).strip()
        except (EOFError, KeyboardInterrupt):
            return ""

    def _conclude(self, question: str, answer: Answer, before: int) -> None:
        """Keep an answer, and say what there is to say about it."""
        session, say = self.session, self.screen.notice
        if answer.reason == "interrupted" and not answer.text:
            same = session.question == question
            left = "/retry asks again" if same else "the question is as it was"
            say(f"stopped before the answer began; {left}")
        else:
            session.keep(question, answer, before)
            if answer.reason == "interrupted":
                say("stopped; what came stays in the conversation")
            elif answer.reason == "length":
                most = session.options.max_tokens
                full = answer.tokens >= session.model.config.max_position_embeddings
                say("stopped at the model's last position" if full else f"stopped at {most} tokens")
            elif not answer.text:
                say("the model ended its answer at once; /retry 0.7 or /edit may help")
            if session.passes_window():
                window = session.model.config.sliding_window
                say(
                    f"The conversation is now longer than the model's window of {window} tokens:"
                    " what is further back reaches it only indirectly, and fades. Repeat what"
                    " matters; /save keeps all of it."
                )
        if answer.reason == "interrupted" and not self.asks:
            raise KeyboardInterrupt


@dataclass(frozen=True)
class Command:
    """A line that begins with a slash."""

    argument: str  # as /help shows it: "" none, in brackets where it can be left out
    run: Callable[[Chat, str], None]  # with the argument as typed
    help: str


def _help(chat: Chat, argument: str) -> None:
    rows = [(f"/{name} {c.argument}".strip(), c.help) for name, c in COMMANDS.items()]
    chat.screen.table([*rows, *KEYS])


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
        chat.screen.notice(f"the answer before is back, to: {_shorten(session.question or '')}")
    else:
        chat.screen.notice(f"dropped: {_shorten(dropped)} ({counted(count, 'exchange')} left)")


def _save(chat: Chat, argument: str) -> None:
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


def _load(chat: Chat, argument: str) -> None:
    path, session = _path(argument), chat.session
    messages = read_messages(path)
    if chat.unsaved:
        count = counted(len(session.exchanges), "exchange")
        question = f"This conversation ({count}) is not saved. Leave it?"
        if chat.asks and not chat.confirm(question):
            chat.screen.notice("nothing changed; /save FILE keeps it")
            return
    chat.load(messages, str(path))


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
    held = f"{human(mx.get_active_memory())} held, {human(mx.get_peak_memory())} at most so far"
    chat.screen.table([*rows, ("memory", held)])


def _clear(chat: Chat, argument: str) -> None:
    empty = chat.session.question is None
    chat.session.clear()
    chat.screen.notice("nothing to clear" if empty else "a new conversation; /undo goes back")


def _quit(chat: Chat, argument: str) -> None:
    raise EOFError


COMMANDS = {
    "help": Command("", _help, "this list"),
    "system": Command("[TEXT]", _system, "show or set the system text; - for the template's own"),
    "plan": Command("[NAME]", _plan, "list the models, or go on with another: no load time"),
    "compare": Command(
        "[TEXT]", _compare, "two models' answers side by side, to this or the last question"
    ),
    "retry": Command("[TEMP]", _retry, "ask the last question again, at this temperature"),
    "edit": Command("[TEXT]", _edit, "change the last question and ask it anew"),
    "undo": Command("", _undo, "take back the last question, /retry, /edit, /compare or /clear"),
    "save": Command(
        "FILE", _save, "write the conversation as JSON, for /load or generate --messages"
    ),
    "load": Command("FILE", _load, "go on with a saved conversation in place of this one"),
    "stats": Command("", _stats, "tokens, pace, caches, memory"),
    "clear": Command("", _clear, "begin a new conversation under the same system text"),
    "quit": Command("", _quit, "leave"),
}
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


def _run_command(chat: Chat, line: str) -> None:
    """Run `/name argument`. Raises RequestError for a command there is not, or a wrong argument."""
    name, argument = re.split(r"\s+|$", line[1:].rstrip(), maxsplit=1)
    command = COMMANDS.get(name.lower())
    if command is None:
        raise RequestError(f"/{_shorten(name)} is not a command; {_suggestion(name.lower())}")
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


def _figures(answer: Answer) -> str:
    r = answer.last
    if r is None:
        return ""
    return (
        f"{answer.model}: {r.prompt_tokens} prompt tokens ({r.cached_tokens} cached), first token"
        f" after {r.time_to_first_token:.2f} s, {r.generation_tokens} generated at"
        f" {answer.pace:.1f}/s [{answer.reason}]"
    )


def _shorten(text: str, length: int = 50) -> str:
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


def _difference(first: Answer, second: Answer) -> str:
    at = first_difference((first.text, second.text), (True, True))
    if at is None:
        return "both say the same"
    same = one_line(first.text[:at])
    return f"they first differ after: {same[-40:]}" if same else "they differ from the start"
