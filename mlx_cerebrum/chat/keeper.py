"""Keeps the conversation of a chat in its file, as it grows."""

import time
from collections.abc import Callable

from mlx_cerebrum import cli
from mlx_cerebrum.chat import kept
from mlx_cerebrum.chat.kept import Kept, Turn
from mlx_cerebrum.chat.session import Answer, Exchange, Session
from mlx_cerebrum.errors import CerebrumError

EVERY = 3.0  # seconds between two times that a growing answer is written


class Keeper:
    """Writes after each exchange, and an answer while it comes. Writing never raises.

    `tell` is told once of what can't be kept.
    """

    def __init__(self, session: Session, tell: Callable[[str], None]) -> None:
        self._session = session
        self._tell = tell
        self._written: tuple[str, str, list[Turn]] | None = None
        self._passing: str | None = None  # the id of an answer that is not whole
        self._left: set[str] = set()  # names of conversations that are kept no more
        self._told = False
        self._next = 0.0

    @property
    def up_to_date(self) -> bool:
        """Whether all there is of the conversation is in its file."""
        return self._written == self._now()

    def keep(self) -> None:
        """Write the conversation where it has changed."""
        name, system, turns = self._now()
        if turns and not self.up_to_date:
            self._write(name, system, turns)

    def begin(self, question: str, before: int) -> None:
        """A question has been asked after so many exchanges: it is kept whatever happens."""
        known = self._session.exchanges[before : before + 1]
        if known and known[0].question == question:
            return  # asked again: until there is another answer, the one there is stays
        self._write_passing(question, before, None)

    def grow(self, question: str, before: int, answer: Answer, at_once: bool = False) -> None:
        """Its answer goes on; written from time to time."""
        if answer.text and (at_once or time.monotonic() >= self._next):
            self._write_passing(question, before, answer)

    def leave(self) -> None:
        """Keep this conversation no more, and remove its file; raises as `kept.remove`."""
        name = self._session.name
        kept.remove(kept.path_of(name))
        self._left.add(name)
        self._written = None

    def _now(self) -> tuple[str, str, list[Turn]]:
        session = self._session
        return session.name, session.system or "", turns_of(session)

    def _write_passing(self, question: str, before: int, answer: Answer | None) -> None:
        session = self._session
        turns = [turn for one in session.exchanges[:before] for turn in _turns(one)]
        turns.append(Turn("user", question))
        if answer is not None:
            turns.append(Turn("assistant", answer.text, answer.model, "partial"))
        leaf = self._write(session.name, session.system or "", turns)
        self._passing = leaf if answer is not None else None

    def _write(self, name: str, system: str, turns: list[Turn]) -> str | None:
        self._next = time.monotonic() + EVERY
        if name in self._left:
            return None
        try:
            leaf = kept.keep(name, system, turns, self._passing)
        except (OSError, CerebrumError) as error:
            if not self._told:
                self._tell(
                    f"this conversation can't be kept: {cli.describe(error)}; /save FILE writes it"
                    " elsewhere"
                )
            self._told = True
            return None
        self._written, self._passing = (name, system, turns), None
        return leaf


def turns_of(session: Session) -> list[Turn]:
    """The conversation as a file has it."""
    found = [turn for one in session.exchanges for turn in _turns(one)]
    if session.unanswered is not None:
        found.append(Turn("user", session.unanswered))
    return found


def take(session: Session, found: Kept, own: bool) -> None:
    """Go on with a conversation of a file; `own`: it is kept in that one from here on.

    Raises RequestError where the template refuses it; then nothing is changed.
    """
    session.replace(found.messages)
    answers = [turn for turn in found.turns if turn.role == "assistant"]
    if len(answers) == len(session.exchanges):
        for exchange, turn in zip(session.exchanges, answers, strict=True):
            exchange.answer.model, exchange.answer.reason = turn.model, turn.reason
    if own:
        session.name = found.name
        last = next((turn.model for turn in reversed(answers)), "")
        if last in session.models:
            session.switch(last)


def _turns(exchange: Exchange) -> list[Turn]:
    answer, old = exchange.answer, exchange.replaced
    branches = []
    while old is not None:
        branches.append([Turn("user", old.question), _said(old.answer)])
        old = old.replaced
    return [Turn("user", exchange.question, others=branches), _said(answer)]


def _said(answer: Answer) -> Turn:
    return Turn("assistant", answer.text, answer.model, answer.reason)
