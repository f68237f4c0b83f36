"""What commands do with conversations and files."""

import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path

from mlx_cerebrum import cli
from mlx_cerebrum.chat import kept
from mlx_cerebrum.chat.chat import Chat
from mlx_cerebrum.chat.export import as_markdown
from mlx_cerebrum.chat.keeper import turns_of
from mlx_cerebrum.chat.kept import Kept
from mlx_cerebrum.chat.wording import counted
from mlx_cerebrum.errors import RequestError, shown
from mlx_cerebrum.text import one_line
from mlx_cerebrum.tokenizer.conversation import write_messages, write_text


def save(chat: Chat, argument: str) -> None:
    """Write the conversation as a list of messages."""
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


def load(chat: Chat, argument: str) -> None:
    """Go on with a conversation of a file."""
    path = _path(argument)
    found = [(path, one) for one in kept.conversations(path)]
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
    if len(found) >= kept.LISTED:
        chat.screen.notice("/resume WORDS finds older ones")
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


def resume(chat: Chat, argument: str) -> None:
    """Go on with a kept conversation: by its number, or one of those with these words."""
    numbered = argument.isdecimal()
    words = "" if numbered else argument
    if not (numbered and chat.listed):
        chat.listed = _others(chat, words)
    if not chat.listed:
        raise RequestError(f"no conversation{words and ' with these words'} is kept")
    at = _number(argument, len(chat.listed)) if numbered else _choose(chat, chat.listed)
    if at is None:
        chat.screen.notice("/resume NUMBER goes on with one, /delete NUMBER removes it")
    elif _left(chat):
        _go_on_with(chat, *chat.listed[at])


def resume_at_start(chat: Chat) -> None:
    """For --resume: the conversation somebody picks, the newest where nobody is there."""
    chat.listed = _others(chat, "")
    if not chat.listed:
        chat.screen.notice(f"no conversation is kept yet in {kept.folder()}; this is a new one")
        return
    if (at := _choose(chat, chat.listed, 0)) is None:
        chat.screen.notice("a new conversation")
    else:
        _go_on_with(chat, *chat.listed[at])


def _others(chat: Chat, words: str) -> list[tuple[Path, Kept]]:
    return [(path, one) for path, one in kept.newest(words) if one.name != chat.session.name]


def _go_on_with(chat: Chat, path: Path, found: Kept) -> None:
    (again,) = kept.read(path)[:1]  # another chat may have gone on with it
    chat.load(again, f'"{found.title}"', own=path == kept.path_of(again.name))
    chat.listed = []


def delete(chat: Chat, argument: str) -> None:
    """Remove the file of this conversation, or of one that `resume` has listed."""
    if not argument:
        if chat.keeper is None:
            raise RequestError("this conversation is kept nowhere")
        if chat.asks and not chat.confirm("Delete this conversation's file?"):
            return
        chat.keeper.leave()
        chat.saved = chat.session.messages()  # nobody is asked to save what they delete
        chat.screen.notice("deleted; this conversation is kept nowhere from here on")
        return
    if not chat.listed:
        raise RequestError("/resume lists them first")
    path, one = chat.listed[_number(argument, len(chat.listed))]
    if not chat.asks or chat.confirm(f'Delete "{one.title}"?'):
        kept.remove(path)
        chat.screen.notice(f'deleted "{one.title}"')


def export(chat: Chat, argument: str) -> None:
    """Write the conversation as Markdown."""
    turns = turns_of(chat.session)
    if not turns:
        raise RequestError("there is nothing to export yet")
    path, title = _path(argument), one_line(turns[0].text, kept.TITLE)
    text = as_markdown(title, chat.session.system or "", turns)
    _write(chat, path, partial(write_text, text=text))
    chat.screen.notice(f"exported {counted(len(turns), 'message')} to {path}, as Markdown")


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
