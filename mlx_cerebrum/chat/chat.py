"""The chat itself: reads lines, asks the session, shows what comes."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from mlx_cerebrum import cli
from mlx_cerebrum.chat.keeper import Keeper, take
from mlx_cerebrum.chat.kept import Kept
from mlx_cerebrum.chat.prompt import Reader
from mlx_cerebrum.chat.quotes import unquoted
from mlx_cerebrum.chat.screen import Rows, Screen
from mlx_cerebrum.chat.session import Answer, AnswerStream, Messages, Session
from mlx_cerebrum.chat.settings import Settings
from mlx_cerebrum.chat.signals import interrupts
from mlx_cerebrum.chat.wording import counted, difference, figures, shorten
from mlx_cerebrum.errors import CerebrumError, MachineError, RequestError
from mlx_cerebrum.machine.awake import awake
from mlx_cerebrum.text import tell_traceback
from mlx_cerebrum.weights import views

# Two slashes begin a message with one. Not where code is pasted: `// a comment`, `/// another`.
_SLASH = re.compile(r"//(?=[^/\s])")

# What people type to leave elsewhere, and nobody asks a model.
_LEAVING = {"exit", "quit", "exit()", "quit()", ":q", ":q!", ":wq", ":x"}


@dataclass(frozen=True)
class Command:
    """A line that begins with a slash."""

    argument: str  # as /help shows it: "" none, in brackets where it can be left out
    run: "Callable[[Chat, str], None]"  # with the argument as typed
    help: str


class Chat:
    """One conversation at a terminal or on a pipe.

    commands: what lines that begin with a slash do, by the word after it.
    asks: whether the program may ask questions of its own: somebody is there to answer them.
    about: what the model is, for `/show`.
    keeper: writes the conversation as it grows; None: it is kept nowhere.
    offers: whether leaving what is kept nowhere is asked about.
    """

    def __init__(
        self,
        session: Session,
        screen: Screen,
        reader: Reader,
        commands: Mapping[str, Command],
        settings: Settings,
        asks: bool,
        about: Rows = (),
        keeper: Keeper | None = None,
        offers: bool = True,
    ) -> None:
        self.session = session
        self.screen = screen
        self.reader = reader
        self.commands = commands
        self.settings = settings
        self.asks = asks
        self.about = about
        self.keeper = keeper
        self.offers = offers
        self.listed: list[tuple[Path, Kept]] = []  # by /resume, as its numbers count
        self.saved: Messages = []
        self.file: Path | None = None  # this chat wrote it, and overwrites it without asking
        self.failed = False

    @property
    def unsaved(self) -> bool:
        """Whether leaving would lose something."""
        if self.session.question is None or self.session.messages() == self.saved:
            return False
        return self.keeper is None or not self.keeper.up_to_date

    def run(self) -> int:
        """Talk until the end. The exit code: 2 where a line of a pipe was refused, else 0."""
        while True:
            try:
                self.handle(self.reader.read(f"{self._label()}> "))
            except EOFError:
                if self._may_leave():
                    self._say_kept()
                    return cli.BAD_INPUT if self.failed and not self.asks else 0
            except KeyboardInterrupt:
                if not self.asks:
                    raise
                self.screen.notice("/quit or Ctrl-D leaves")

    def _say_kept(self) -> None:
        keeper = self.keeper
        if keeper is not None and self.session.question is not None and keeper.up_to_date:
            self.screen.notice("the conversation is kept: --resume goes on with it")

    def _may_leave(self) -> bool:
        """Offer once to save what is kept nowhere; False where somebody would rather stay."""
        if not (self.asks and self.offers and self.unsaved):
            return True
        try:
            name = self.reader.ask("Save this conversation? A file's name, or Enter for no: ")
            if name.strip().lower() in ("y", "yes"):
                name = self.reader.ask("The file's name: ")
        except EOFError:
            return True
        except KeyboardInterrupt:
            return False
        name = name.strip()
        if not name or name.lower() in ("n", "no"):
            return True
        self.handle(f"/save {name}")
        return not self.unsaved

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
        try:
            try:
                line.encode()
            except UnicodeEncodeError:
                raise RequestError("this line is not valid UTF-8 text; nothing was asked") from None
            self._do(line.strip())
            self.keep()
        except MachineError:  # there is no model any more
            self.keep()
            raise
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

    def _do(self, text: str) -> None:
        command, quoted = unquoted(text) or ("", None)
        if command:
            text = f"{command}{quoted}"
        elif quoted is not None:
            if quoted.strip():
                self.ask(quoted)
            return
        if self.asks and text.lower() in _LEAVING:
            raise RequestError(f'/quit leaves; """{text}""" says that to the model')
        if text.startswith("/") and not text.startswith("//"):
            run_command(self, text)
        elif text:
            self.ask(text[1:] if _SLASH.match(text) else text)

    def keep(self) -> None:
        """Write what has changed of the conversation, where it is kept."""
        if self.keeper is not None:
            self.keeper.keep()

    def load(self, found: Kept, source: str, own: bool = False) -> None:
        """Go on with a conversation of a file, and say where it stands.

        own: it is kept in that one from here on.
        """
        session = self.session
        take(session, found, own)
        self.saved = session.messages()
        if session.exchanges:
            self.screen.recall(session.exchanges[-1].question, session.exchanges[-1].answer.text)
        last = session.question
        asked = "" if last is None else f"; the last question: {shorten(last)}"
        waiting = " is not answered yet, /retry asks it" if session.unanswered is not None else ""
        count = counted(len(session.messages()), "message")
        self.screen.notice(f"{count} from {source}{asked}{waiting}")

    def ask(self, question: str, before: int | None = None, temp: float | None = None) -> None:
        """Put a question after the first `before` exchanges (all of them by default)."""
        session = self.session
        before = len(session.exchanges) if before is None else before
        (stream,) = session.ask(question, before=before, temp=temp)
        with interrupts() as stream.stopped:  # until it is kept: Ctrl-C is pressed twice, too
            self._show(stream, question, before)
            self._conclude(question, stream.answer, before)

    def go_on(self) -> None:
        """Let the last answer go on where it was cut."""
        session, stream = self.session, self.session.go_on()
        last, begun = session.exchanges[-1], len(stream.answer.said)
        before = len(session.exchanges) - 1
        with interrupts() as stream.stopped:
            self._show(stream, last.question, before, last.answer.text)
            if len(stream.answer.said) > begun:
                self._conclude(last.question, stream.answer, before)
                return
            self.screen.notice("stopped before it went on; the answer is as it was")
        if not self.asks:
            raise KeyboardInterrupt

    @awake()
    def _show(
        self, stream: AnswerStream, question: str, before: int, shown: str | None = None
    ) -> None:
        answer = stream.answer
        with self._keeping(stream, question, before), closing(stream):
            self.screen.show(stream, shown)
        if self.asks and answer.last is not None:
            first = f"first after {answer.last.time_to_first_token:.2f} s"
            self.screen.notice(f"{figures(answer)}, {first}")

    @contextmanager
    def _keeping(self, stream: AnswerStream, question: str, before: int) -> Iterator[None]:
        """Inside, the question and what comes of its answer are kept, whatever happens."""
        if self.keeper is None:
            yield
            return
        self.keeper.begin(question, before)
        stream.came = partial(self.keeper.grow, question, before, stream.answer)
        try:
            yield
        except BaseException:
            self.keeper.grow(question, before, stream.answer, at_once=True)
            raise

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
            keeping = self._keeping((first, second)[kept], question, before)
            with awake(), keeping, closing(first), closing(second):
                self.screen.compare((first, second))
            both = all(answer.text for answer in answers)
            if both:
                self.screen.notice(difference(*answers))
            elif not answers[kept].text:
                kept = 1 - kept
        if both and self.asks:
            kept = self._choice(kept)
        with interrupts():
            self._conclude(question, answers[kept], before)

    def confirm(self, question: str) -> bool:
        """Whether somebody is there and says yes."""
        return self.typed(f"{question} [y/N] ").lower() in ("y", "yes")

    def _choice(self, default: int) -> int:
        question = f"Keep 1 or 2? [{default + 1}] "
        while (typed := self.typed(question)) not in ("", "1", "2"):
            pass  # the next question, say, typed ahead
        return int(typed) - 1 if typed else default

    def typed(self, question: str) -> str:
        """What somebody answers; nothing where nobody does."""
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
                say("stopped; what came stays in the conversation, /continue goes on")
            elif answer.reason == "length":
                most = session.options.max_tokens
                full = answer.tokens >= session.model.config.max_position_embeddings
                more = f"stopped at {most} tokens; /continue goes on"
                say("stopped at the model's last position" if full else more)
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


# What people type for a command that is called otherwise here.
SYNONYMS = {"exit": "quit", "q": "quit", "bye": "quit", "?": "help", "h": "help"}
SYNONYMS |= {"reset": "clear", "new": "clear", "model": "plan", "redo": "retry"}
SYNONYMS |= {"regenerate": "retry", "cont": "continue", "temp": "set temp", "settings": "set"}
SYNONYMS |= {"info": "show", "history": "resume", "forget": "delete"}


def run_command(chat: Chat, line: str) -> None:
    """Run `/name argument`. Raises RequestError for a command there is not, or a wrong argument."""
    name, argument = re.split(r"\s+|$", line[1:].rstrip(), maxsplit=1)
    meant, _, more = SYNONYMS.get(name.lower(), name.lower()).partition(" ")
    command = chat.commands.get(meant)
    if command is None:
        raise RequestError(f"/{shorten(name)} is not a command; {_suggestion(chat, meant)}")
    argument = f"{more} {argument}".strip()
    if argument and not command.argument:
        raise RequestError(f"/{name} takes nothing after it")
    if not argument and command.argument and not command.argument.startswith("["):
        raise RequestError(f"/{name} needs {command.argument}")
    command.run(chat, argument)


def _suggestion(chat: Chat, name: str) -> str:
    if not name or not name[:1].isascii():
        return "/help lists them"
    near = next((c for c in chat.commands if c.startswith(name)), None)
    near = near or next(iter(get_close_matches(name, [*chat.commands, *SYNONYMS], n=1)), None)
    return (
        f"did you mean /{near}?" if near else "/help lists them, // begins a message with a slash"
    )
