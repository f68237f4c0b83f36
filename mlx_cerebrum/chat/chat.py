"""The chat itself: reads lines, asks the session, shows what comes."""

from mlx_cerebrum import cli
from mlx_cerebrum.chat.columns import figures
from mlx_cerebrum.chat.commands import run_command, shorten
from mlx_cerebrum.chat.prompt import Reader
from mlx_cerebrum.chat.reply import Answer
from mlx_cerebrum.chat.screen import Screen
from mlx_cerebrum.chat.session import Messages, Session
from mlx_cerebrum.chat.text import first_difference
from mlx_cerebrum.errors import CerebrumError, RequestError
from mlx_cerebrum.views import find


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
                self.ask(text[1:] if text.startswith("//") else text)
        except CerebrumError as error:
            self.failed = True
            self.screen.error(cli.describe(error))

    def load(self, messages: Messages, source: str) -> None:
        """Go on with a conversation from a file."""
        session = self.session
        session.replace(messages)
        self.saved = session.messages()
        last = (
            "" if session.question is None else f"; the last question: {shorten(session.question)}"
        )
        waiting = " is not answered yet, /retry asks it" if session.unanswered is not None else ""
        self.screen.notice(f"{len(messages)} messages from {source}{last}{waiting}")

    def ask(self, question: str, before: int | None = None, temp: float | None = None) -> None:
        """Put a question after the first `before` exchanges (all of them by default)."""
        session = self.session
        before = len(session.exchanges) if before is None else before
        (reply,) = session.ask(question, before=before, temp=temp)
        try:
            self.screen.show(reply)
        finally:
            reply.close()
        answer = reply.answer
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
        try:
            self.screen.compare((first, second))
        finally:
            first.close()
            second.close()
        answers = (first.answer, second.answer)
        kept = names.index(session.current)
        if all(answer.text for answer in answers):
            self.screen.notice(_difference(*answers))
            if self.asks:
                kept = self._choice(kept)
        elif not answers[kept].text:
            kept = 1 - kept
        self._conclude(question, answers[kept], before)

    def confirm(self, question: str) -> bool:
        """Whether somebody is there and says yes."""
        return self._typed(f"{question} [y/N] ").lower() in ("y", "yes")

    def _choice(self, default: int) -> int:
        typed = self._typed(f"Keep 1 or 2? [{default + 1}] ")
        return int(typed) - 1 if typed in ("1", "2") else default

    def _typed(self, question: str) -> str:
        try:
            return self.reader.ask(question).strip()
        except (EOFError, KeyboardInterrupt):
            return ""

    def _conclude(self, question: str, answer: Answer, before: int) -> None:
        """Keep an answer, and say what there is to say about it."""
        session, say = self.session, self.screen.notice
        if answer.reason == "interrupted" and not answer.text:
            say("stopped before the answer began; /retry asks again")
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
                    f" it looks back {window} tokens and no further, so it may lose track of what"
                    " came before. Repeat what matters; /save keeps all of it."
                )
        if answer.reason == "interrupted" and not self.asks:
            raise KeyboardInterrupt


def _difference(first: Answer, second: Answer) -> str:
    at = first_difference((first.text, second.text), (True, True))
    if at is None:
        return "both say the same"
    same = cli.one_line(first.text[:at])
    return f"they first differ after: {same[-40:]}" if same else "they differ from the start"
