"""Where questions come from: a line editor, a bare terminal, or a pipe."""

import os
import re
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition, emacs_mode
from prompt_toolkit.formatted_text import AnyFormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.layout.containers import Window
from prompt_toolkit.layout.dimension import Dimension
from prompt_toolkit.layout.menus import CompletionsMenu
from prompt_toolkit.styles import Style

from mlx_cerebrum.chat.quotes import QUOTES, is_open
from mlx_cerebrum.chat.signals import ends
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.text import clean, tell

HISTORY_BYTES = 1_000_000  # of the history file; the older half is dropped beyond


class Reader(Protocol):
    """Lines from the user. Both methods raise EOFError at the end, KeyboardInterrupt for Ctrl-C."""

    def read(self, prompt: str, default: str | None = None) -> str:
        """A message, possibly of several lines. `default` is there to be edited.

        Raises RequestError where nothing can be edited.
        """

    def ask(self, question: str) -> str:
        """The answer to a question of the program's own; empty where nobody is there to answer."""


class PlainReader:
    """Standard input as it is. A line that ends in a backslash goes on with the next one, and so
    does what triple quotes begin."""

    def __init__(self) -> None:
        self._person = sys.stdin.isatty()

    def read(self, prompt: str, default: str | None = None) -> str:
        if default is not None:
            raise RequestError("there is no line to edit here; use /edit followed by the new text")
        text = self._line(prompt)
        while (quoted := is_open(text)) or text.endswith("\\"):
            try:
                text = (text if quoted else text[:-1]) + "\n" + self._line("... ")
            except EOFError:
                return text + QUOTES if quoted else text
        return text

    def ask(self, question: str) -> str:
        return self._line(question) if self._person else ""

    def _line(self, prompt: str) -> str:
        if self._person:
            tell(prompt, end="")
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            tell()  # the terminal has shown ^C
            raise
        if not line:
            if self._person:
                tell()
            raise EOFError
        return line.rstrip("\r\n")


class CommandCompleter(Completer):
    """Commands after a slash, then what they take.

    commands, synonyms: what each does, and what else it is called.
    takes: by command, the words that may follow it, each with what it is.
    """

    def __init__(
        self,
        commands: Mapping[str, str],
        synonyms: Mapping[str, str],
        takes: Mapping[str, Callable[[], Mapping[str, str]]],
    ) -> None:
        self._commands = commands
        self._synonyms = {name: f"as /{meant}" for name, meant in synonyms.items()}
        self._takes = takes
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or text.startswith("//") or "\n" in text:
            return
        command, space, argument = text[1:].partition(" ")
        if not space:
            yield from self._words(self._commands, command, "/") or self._words(
                self._synonyms, command, "/"
            )
        elif command in self._takes and " " not in argument:
            yield from self._words(self._takes[command](), argument)
        elif command in ("save", "load", "export"):
            yield from self._paths.get_completions(Document(argument), event)

    @staticmethod
    def _words(words: Mapping[str, str], typed: str, before: str = "") -> list[Completion]:
        return [
            Completion(word, -len(typed), before + word, what)
            for word, what in words.items()
            if word.startswith(typed)
        ]


# Pairs that read on any background, and where there are no colours.
MENU = {
    "completion-menu.completion": "bg:#d0d0d0 #000000",
    "completion-menu.completion.current": "noreverse bold bg:#005f87 #ffffff",
    "completion-menu.meta.completion": "bg:#bcbcbc #000000",
    "completion-menu.meta.completion.current": "bg:#005f87 #ffffff",
    "scrollbar.background": "bg:#bcbcbc",
    "scrollbar.button": "bg:#606060",
}


_MENU_LINES = 20  # all commands


class _Editor(PromptSession[str]):
    """Lines below the text are free while there is a menu to show, and only then."""

    @property
    def reserve_space_for_menu(self) -> int:
        state = self.default_buffer.complete_state
        return min(_MENU_LINES, len(state.completions)) if state is not None else 0

    @reserve_space_for_menu.setter
    def reserve_space_for_menu(self, lines: int) -> None:
        pass


class EditingReader:
    """prompt_toolkit: history, editing over several lines, completion."""

    def __init__(self, history: History, completer: Completer) -> None:
        self._session = _Editor(
            history=history,
            completer=completer,
            key_bindings=_bindings(),
            multiline=True,
            enable_suspend=True,
            enable_open_in_editor=True,
            vi_mode=_has_vi_keys(),
            tempfile_suffix=".md",
            prompt_continuation=lambda width, line, wrapped: "" if wrapped else "... ",
            style=Style.from_dict(MENU),
        )
        for part in self._session.layout.walk():
            if isinstance(part, CompletionsMenu) and isinstance(part.content, Window):
                part.content.height = Dimension(min=1, max=_MENU_LINES)

    def read(self, prompt: str, default: str | None = None) -> str:
        return _prompt(self._session, [("", "\n"), ("bold", clean(prompt))], default or "")

    def ask(self, question: str) -> str:
        session: PromptSession[str] = PromptSession(history=InMemoryHistory(), enable_suspend=True)
        return _prompt(session, question)


def _has_vi_keys() -> bool:
    """Whether this user has set vi's keys for all programs that read lines, in ~/.inputrc."""
    try:
        path = Path(os.environ.get("INPUTRC") or Path.home() / ".inputrc")
        text = path.read_text(errors="replace")
    except (OSError, RuntimeError, ValueError):
        return False
    return re.search(r"(?m)^\s*set\s+editing-mode\s+vi\s*$", text) is not None


def _prompt(session: PromptSession[str], message: AnyFormattedText, default: str = "") -> str:
    app = session.app

    def leave() -> None:
        if app.future is not None and not app.future.done():
            app.exit(result="")

    def stop() -> None:
        if app.loop is not None:
            app.loop.call_soon_threadsafe(leave)

    with ends(stop) as ended:
        return session.prompt(
            message, default=default, pre_run=lambda: leave() if ended() else None
        )


def _bindings() -> KeyBindings:
    keys = KeyBindings()
    has_text = Condition(lambda: bool(get_app().current_buffer.text))

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        elif is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=emacs_mode)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c", filter=has_text)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.append_to_history()  # Up brings it back
        event.current_buffer.reset()

    return keys


class _FileHistory(FileHistory):
    def store_string(self, string: str) -> None:
        with suppress(
            OSError, UnicodeError
        ):  # a full disk must not keep a question from its answer
            super().store_string(string)


def history_path() -> Path:
    """Where questions are remembered: the user's state directory.

    Raises OSError for a user without a home, as in some containers.
    """
    try:
        home = Path.home()
    except RuntimeError as error:
        raise FileNotFoundError(str(error)) from None
    if sys.platform == "darwin":
        base = home / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_STATE_HOME") or home / ".local" / "state")
    return base / "mlx-cerebrum" / "chat-history"


def open_history(path: Path | None) -> History:
    """The history of a file that only its user can read, made where it is missing.

    Without a path, one that lasts as long as the chat. Raises OSError for a file that can't be.
    """
    if path is None:
        return InMemoryHistory()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if stat.S_ISREG(os.fstat(handle).st_mode):  # people link it to /dev/null
            os.fchmod(handle, 0o600)  # a file from elsewhere too
        size = os.fstat(handle).st_size
        if size > HISTORY_BYTES:
            os.lseek(handle, size - HISTORY_BYTES // 2, os.SEEK_SET)
            kept = os.read(handle, HISTORY_BYTES)
            os.ftruncate(handle, 0)
            os.pwrite(handle, kept[kept.find(b"\n# ") + 1 :], 0)
    finally:
        os.close(handle)
    return _FileHistory(path)
