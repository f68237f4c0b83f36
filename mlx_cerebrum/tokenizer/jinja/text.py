"""Text of a template at work: which characters are the template's own, and what it may cost.

A chat template mixes its own words with those of people, and both can spell a control token;
only the template's may become one. So its literals are `Text`, which knows of each character
whether the template wrote it. What people wrote is a plain str, and so is the result of an
operation that loses track. Characters keep their marks wherever they are moved, and no operation
makes a mark, so nothing a person wrote can gain one. In all else `Text` is a str like any other.

Every operation pays, from one `Budget`, for what it reads and writes before it does.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, count
from typing import Any

SCAN = 1024  # characters looked at for one step
OBJECT = 64  # letters that an object costs, besides what it holds
WIDEST = 1000  # characters that a number may be formatted to


class LimitError(Exception):
    """The template asks for more than a rendering may take."""


class Budget:
    """What is left of a rendering's steps (some microseconds each), letters (characters held, at
    most 5 bytes each) and seconds of this thread's CPU."""

    def __init__(self, steps: int, letters: int, seconds: float) -> None:
        self._steps, self._letters, self._seconds = steps, letters, seconds
        self._end = time.thread_time() + seconds
        self._unchecked = 0

    def step(self, count: int = 1) -> None:
        self._steps -= count
        if self._steps < 0:
            raise LimitError("it takes too many steps")
        self._unchecked += 1
        if self._unchecked >= 256:
            self._unchecked = 0
            if time.thread_time() > self._end:
                raise LimitError(f"it ran for more than {self._seconds:g} seconds")

    def letters(self, count: int) -> None:
        self._letters -= count
        if self._letters < 0:
            raise LimitError("it builds too much text")
        self.step(1 + count // SCAN)

    def scan(self, text: str, times: int = 1) -> None:
        """Pay for looking at each character of `text`, `times` over: Python searches backwards in
        quadratic time, so that costs as many times as what is sought has characters."""
        self.step(1 + len(text) * times // SCAN)


class Text(str):
    """Text with one byte of `marks` a character: 1 is the template's, 0 somebody else's."""

    __slots__ = ("marks",)
    marks: bytes

    def __new__(cls, text: str, marks: bytes) -> "Text":
        self = super().__new__(cls, text)
        self.marks = marks
        return self


def own(text: str) -> Text:
    """Text that the template wrote."""
    return Text(text, b"\1" * len(text))


def marks(text: str) -> bytes:
    return text.marks if isinstance(text, Text) else bytes(len(text))


# ---- taking apart and putting together


def _piece(text: str, where: slice) -> str:
    return Text(text[where], text.marks[where]) if isinstance(text, Text) else text[where]


def _along(text: str, pieces: Sequence[str]) -> list[str]:
    """The pieces that `text` is made of, one behind the other, with their marks."""
    ends = zip(pieces, accumulate(map(len, pieces)), strict=True)
    return [_piece(text, slice(end - len(piece), end)) for piece, end in ends]


def part(budget: Budget, text: str, where: slice) -> str:
    """A slice of the text, any step."""
    piece = _piece(text, where)
    budget.letters(len(piece))
    return piece


def characters(budget: Budget, text: str) -> list[str]:
    budget.letters(OBJECT * len(text))
    return _along(text, list(text)) if isinstance(text, Text) else list(text)


def join(budget: Budget, parts: Sequence[str], between: str = "") -> str:
    budget.letters(sum(map(len, parts)) + len(between) * max(0, len(parts) - 1))
    text = between.join(parts)
    if isinstance(between, Text) or any(isinstance(each, Text) for each in parts):
        return Text(text, marks(between).join(map(marks, parts)))
    return text


def repeat(budget: Budget, text: str, times: int) -> str:
    budget.letters(len(text) * max(0, times))
    return Text(text * times, text.marks * times) if isinstance(text, Text) else text * times


def replace(budget: Budget, text: str, old: str, new: str, count: int = -1) -> str:
    if not old:  # between all characters: whose the result is, is not followed
        budget.letters((len(text) + 1) * (len(new) + 1))
        return str.replace(text, old, new, count)
    return join(budget, _split(budget, text, old, count), new)


def _splitting(split: Callable[..., list[str]], backwards: bool = False) -> Callable[..., Any]:
    def splits(budget: Budget, text: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
        budget.scan(text, len(sep) if backwards and sep is not None else 1)
        most = len(text) // 2 + 1 if sep is None else text.count(sep) + 1 if sep else 1
        budget.letters(len(text) + OBJECT * (most if maxsplit < 0 else min(most, maxsplit + 1)))
        pieces = split(text, sep, maxsplit)
        if not isinstance(text, Text):
            return pieces
        found, at = list[str](), 0
        for piece in pieces:
            at = text.index(piece, at) if sep is None else at
            found.append(_piece(text, slice(at, at + len(piece))))
            at += len(piece) + len(sep or "")
        return found

    return splits


_split = _splitting(str.split)


def _partitioning(split: Callable[..., Any], backwards: bool = False) -> Callable[..., Any]:
    def partition(budget: Budget, text: str, sep: str) -> tuple[str, ...]:
        budget.scan(text, len(sep) if backwards else 1)
        budget.letters(len(text))
        return tuple(_along(text, split(text, sep)))

    return partition


def splitlines(budget: Budget, text: str, keepends: bool = False) -> list[str]:
    budget.letters(len(text))
    lines = text.splitlines(True)
    budget.letters(OBJECT * len(lines))
    shown = zip(_along(text, lines), text.splitlines(keepends), strict=True)
    return [_piece(line, slice(len(bare))) for line, bare in shown]


def _stripping(left: bool, right: bool) -> Callable[..., str]:
    def strip(budget: Budget, text: str, chars: str | None = None) -> str:
        budget.scan(text, len(chars or "x"))
        start = len(text) - len(text.lstrip(chars)) if left else 0
        stop = max(start, len(text.rstrip(chars))) if right else len(text)
        return part(budget, text, slice(start, stop))

    return strip


def _padding(share: Callable[[int, int], int]) -> Callable[..., str]:
    """`share` of (characters to fill, width) go to the left."""

    def pad(budget: Budget, text: str, width: int, fill: str = " ") -> str:
        if len(fill) != 1:
            raise TypeError("the fill character must be exactly one character long")
        missing = max(0, width - len(text))
        left = share(missing, width)
        sides = (repeat(budget, fill, left), text, repeat(budget, fill, missing - left))
        return join(budget, sides)

    return pad


center = _padding(lambda missing, width: missing // 2 + (missing & width & 1))
_ljust = _padding(lambda missing, width: 0)
_rjust = _padding(lambda missing, width: missing)
strip = _stripping(True, True)


def _zfill(budget: Budget, text: str, width: int) -> str:
    budget.letters(max(len(text), width))
    return text.zfill(width)


def changed(budget: Budget, text: str, change: Callable[[str], str]) -> str:
    """Other letters for the same text, such as capitals: none of them fewer than one."""
    budget.letters(3 * len(text))
    new = change(text)
    return Text(new, text.marks) if isinstance(text, Text) and len(new) == len(text) else new


def _changing(change: Callable[[str], str]) -> Callable[..., str]:
    return lambda budget, text: changed(budget, text, change)


def _looking(look: Callable[..., Any], backwards: bool = False) -> Callable[..., Any]:
    def looks(budget: Budget, text: str, *args: Any) -> Any:
        budget.scan(text, len(args[0]) if backwards and args else 1)
        for each in args[0] if args and isinstance(args[0], tuple) else ():
            if isinstance(each, str):  # startswith(("a", "b"))
                budget.scan(each)
        return look(text, *args)

    return looks


def escaped(budget: Budget, text: str) -> str:
    """HTML's special characters spelled out, as Jinja does."""
    for old, new in zip("&><'\"", ("&amp;", "&gt;", "&lt;", "&#39;", "&#34;"), strict=True):
        text = replace(budget, text, old, new)
    return text


# ---- formatting

_PERCENT = re.compile(
    r"%(?:\((?P<key>[^()]*)\))?(?P<flags>[#0\- +]*)(?P<width>\d*)(?:\.(?P<precision>\d*))?"
    r"(?P<kind>[a-zA-Z%])"
)
_BRACES = re.compile(
    r"\{\{|\}\}|\{(?P<name>\w*)(?:!(?P<conversion>[rsa]))?(?::(?P<spec>[^{}]*))?\}|[{}]"
)
_SPEC = re.compile(r"(?:(?P<fill>.)?(?P<align>[<>^]))?(?P<width>\d*)(?:\.(?P<precision>\d+))?s?")

ToText = Callable[[Any], str]


def _filled(
    budget: Budget, text: str, places: re.Pattern[str], fill: Callable[[re.Match[str]], str]
) -> str:
    """The text with its places filled; %%, {{ and }} stand for the last of their characters."""
    budget.scan(text)
    parts, at = list[str](), 0
    for place in places.finditer(text):
        parts.append(part(budget, text, slice(at, place.start())))
        at, shown = place.end(), place[0]
        doubled = shown[-1] == "%" or shown in ("{{", "}}")
        parts.append(part(budget, text, slice(at - 1, at)) if doubled else fill(place))
    parts.append(part(budget, text, slice(at, None)))
    return join(budget, parts)


def percent(budget: Budget, text: str, values: Any, to_text: ToText) -> str:
    """`text % values`, text kept with its marks."""
    named = isinstance(values, Mapping) and "%(" in text
    rest = iter(values if isinstance(values, tuple) else () if named else (values,))

    def fill(place: re.Match[str]) -> str:
        value = next(rest, rest) if place["key"] is None else values[place["key"]]
        if value is rest:
            raise TypeError("not enough arguments for format string")
        kind, flags = place["kind"], place["flags"]
        if kind == "s":
            return _padded(budget, to_text(value), place, "<" if "-" in flags else ">")
        width, precision = _number(place["width"]), _number(place["precision"])
        if kind in "diouxXeEfFgGc" and isinstance(value, int | float | str):
            digits = "" if precision is None else f".{precision}"
            return str(f"%{flags}{width or ''}{digits}{kind}" % value)
        if kind in "ra":
            return to_text([value])[1:-1]
        raise ValueError(f"the format {place[0]!r} is not supported")

    filled = _filled(budget, text, _PERCENT, fill)
    if next(rest, rest) is not rest and not isinstance(values, list | Mapping | range):
        raise TypeError("not all arguments converted during string formatting")
    return filled


def braces(
    budget: Budget, text: str, args: Sequence[Any], named: Mapping[str, Any], to_text: ToText
) -> str:
    """`text.format(*args, **named)`, without attributes, items and nested widths."""
    following = count()

    def fill(place: re.Match[str]) -> str:
        if place["name"] is None:
            raise ValueError("a brace in a format string that is not supported")
        name = place["name"] or str(next(following))
        numbered = name.isdecimal() and len(name) < 6
        if numbered and int(name) >= len(args):
            raise IndexError("too few arguments for a format string")
        value = args[int(name)] if numbered else named[name]
        if place["conversion"] in ("r", "a"):
            value = to_text([value])[1:-1]
        return _shaped(budget, value, place["spec"] or "", to_text)

    return _filled(budget, text, _BRACES, fill)


def _shaped(budget: Budget, value: Any, spec: str, to_text: ToText) -> str:
    for digits in re.findall(r"\d+", spec):
        _number(digits)
    if isinstance(value, int | float) and spec:
        return format(value, spec)
    shape = _SPEC.fullmatch(spec)
    if shape is None:
        raise ValueError(f"the format {spec!r:.40} is not supported for text")
    return _padded(budget, to_text(value), shape, shape["align"] or "<", shape["fill"] or " ")


def _padded(budget: Budget, text: str, shape: re.Match[str], align: str, fill: str = " ") -> str:
    pad = {"<": _ljust, ">": _rjust, "^": center}[align]
    shown = part(budget, text, slice(_number(shape["precision"])))
    return pad(budget, shown, _number(shape["width"]) or 0, fill)


def _number(digits: str | None) -> int | None:
    if not digits:
        return None
    if len(digits) > 4 or int(digits) > WIDEST:
        raise LimitError(f"a width of more than {WIDEST} characters")
    return int(digits)


_CHANGES = "capitalize casefold lower swapcase title upper"
_LOOKS = (
    "count endswith find index isalnum isalpha isascii isdecimal isdigit isidentifier islower "
    "isnumeric isprintable isspace istitle isupper startswith"
)

# What a template may call on text; `format` and `join`, which take other values, are in values.py.
METHODS: dict[str, Callable[..., Any]] = {
    "center": center,
    "ljust": _ljust,
    "lstrip": _stripping(True, False),
    "partition": _partitioning(str.partition),
    "removeprefix": lambda budget, text, prefix: part(
        budget, text, slice(len(text) - len(text.removeprefix(prefix)), None)
    ),
    "removesuffix": lambda budget, text, suffix: part(
        budget, text, slice(len(text.removesuffix(suffix)))
    ),
    "replace": replace,
    "rfind": _looking(str.rfind, backwards=True),
    "rindex": _looking(str.rindex, backwards=True),
    "rjust": _rjust,
    "rpartition": _partitioning(str.rpartition, backwards=True),
    "rsplit": _splitting(str.rsplit, backwards=True),
    "rstrip": _stripping(False, True),
    "split": _split,
    "splitlines": splitlines,
    "strip": strip,
    "zfill": _zfill,
    **{name: _changing(getattr(str, name)) for name in _CHANGES.split()},
    **{name: _looking(getattr(str, name)) for name in _LOOKS.split()},
}
