"""The chat itself: reads lines, asks the session, shows what comes."""

import re
from pathlib import Path

from mlx_cerebrum import cli
from mlx_cerebrum.chat.columns import figures
from mlx_cerebrum.chat.commands import counted, run_command, shorten
from mlx_cerebrum.chat.prompt import Reader
from mlx_cerebrum.chat.reply import Answer
from mlx_cerebrum.chat.screen import Screen
from mlx_cerebrum.chat.session import Messages, Session
from mlx_cerebrum.chat.signals import interrupts
from mlx_cerebrum.chat.text import first_difference
from mlx_cerebrum.errors import CerebrumError, RequestError
from mlx_cerebrum.text import one_line, tell_traceback
from mlx_cerebrum.weights.views import find

# Two slashes begin a message with one. Not where code is pasted: `// a comment`, `/// another`.
_SLASH = re.compile(r"//(?=[^/\s])")


class Chat:
    """One conversation at a terminal or on a pipe.

    `asks`: somebody is there to answer questions of the program's own.
    """

    def __init__(self, session: Session, screen: Screen, reader: Reader, asks: bool) -> None:
        self.session = session
        self.screen = screen
        self.reader = reader
        self.asks = asks
        self.saved: Messages = []
        self.file: Path | None = None  # written by this chat, and so overwritten unasked
        self.failed = False

    @property
    def unsaved(self) -> bool:
        return self.session.question is not None and self.session.messages() != self.saved

    def run(self) -> int:
        """Talk until the end. 2 where a line of a pipe could not be honoured, else 0."""
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
            return short if len(names) > 1 and find(names, short) == current else current
        except CerebrumError:
            return current

    def handle(self, line: str) -> None:
        """Answer a message or run a command. What can't be honoured costs a line, no more."""
        text = line.strip()
        try:
            try:
                text.encode()
            except UnicodeEncodeError:
                raise RequestError("this line is not valid UTF-8 text; nothing was asked") from None
            if text.startswith("/") and not text.startswith("//"):
                run_command(self, text)
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
        asked = "" if last is None else f"; the last question: {shorten(last)}"
        waiting = " is not answered yet, /retry asks it" if session.unanswered is not None else ""
        self.screen.notice(f"{counted(len(messages), 'message')} from {source}{asked}{waiting}")

    def ask(self, question: str, before: int | None = None, temp: float | None = None) -> None:
        """Put a question after the first `before` exchanges (all of them by default)."""
        session = self.session
        before = len(session.exchanges) if before is None else before
        (reply,) = session.ask(question, before=before, temp=temp)
        answer = reply.answer
        with interrupts() as reply.stopped:  # until it is kept: Ctrl-C is pressed twice, too
            try:
                self.screen.show(reply)
            finally:
                reply.close()
            if self.asks and answer.last is not None:
                first = f"first after {answer.last.time_to_first_token:.2f} s"
                self.screen.notice(f"{figures(answer)}, {first}")
            self._conclude(question, answer, before)

    def compare(self, question: str, before: int) -> None:
        """Two models' answers, one of which is kept."""
        session = self.session
        if session.other is None:
            raise RequestError("there is only this model; --plan NAME adds another order of it")
        names = [name for name in session.models if name in (session.current, session.other)]
        first, second = session.ask(question, names, before)
        answers = (first.answer, second.answer)
        kept = names.index(session.current)
        with interrupts() as stopped:
            first.stopped = second.stopped = stopped
            try:
                self.screen.compare((first, second))
            finally:
                first.close()
                second.close()
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
                most = session.settings.max_tokens
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


def _difference(first: Answer, second: Answer) -> str:
    at = first_difference((first.text, second.text), (True, True))
    if at is None:
        return "both say the same"
    same = one_line(first.text[:at])
    return f"they first differ after: {same[-40:]}" if same else "they differ from the start"
