"""Text fit for a terminal: what a file, a model or a client wrote is shown, never obeyed.

Whatever is printed goes through `say` or `tell`, or is made of `clean` text.
"""

import sys
import traceback
import unicodedata
from pathlib import Path

_KEPT = "\n\t"
# Characters that turn the direction of what follows, or of themselves: they can make a line read
# as another one. Of the other characters without a width (joiners, a flag's tags) languages and
# emoji need some, and all they do is to be invisible: they stay.
_DIRECTIONS = {0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x2070)}
_NO_TEXT = {0xFEFF, *range(0xFFF9, 0xFFFC)}  # a byte order mark, marks of annotations


def clean(text: str) -> str:
    """`text` with nothing in it that a terminal would obey: ESC becomes its picture, U+241B.

    Character by character, so that a sequence which comes in pieces is made harmless too. Line
    feeds and tabs stay; carriage returns go; a line or paragraph separator is a line feed.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_shown, text))


def _shown(char: str) -> str:
    if char in _KEPT:
        return char
    code = ord(char)
    if code < 0x20:
        return "" if char == "\r" else chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if char in "\u2028\u2029":
        return "\n"
    if code in _DIRECTIONS or code in _NO_TEXT or unicodedata.category(char) in ("Cc", "Cs"):
        return "\ufffd"
    return char


def one_line(text: str, most: int | None = None) -> str:
    """Clean text with its line breaks (every kind str.splitlines knows) and tabs made spaces.

    most: characters to keep; what is longer ends in three dots.
    """
    whole = " ".join(line.strip() for line in text.splitlines()).strip()
    line = clean(whole).replace("\t", " ")
    return line if most is None or len(line) <= most else f"{line[: most - 3]}..."


def tilde(path: Path) -> str:
    """A path as people write it, without the name of who owns it."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def say(text: str = "", end: str = "\n") -> None:
    """Print to standard output: clean on a terminal, as it is on a pipe or to a file."""
    print(clean(text) if sys.stdout.isatty() else text, end=end, flush=True)


def tell(text: str = "", end: str = "\n") -> None:
    """Print to standard error, clean wherever that goes: people read it."""
    print(clean(text), end=end, file=sys.stderr, flush=True)


def tell_traceback(error: BaseException) -> None:
    """What Python prints of an exception; its message may quote a file."""
    tell("".join(traceback.format_exception(error)), end="")
