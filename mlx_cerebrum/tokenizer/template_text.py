"""Text of a template at work: which characters are the template's own, and what it may cost.

A chat template mixes its own words with those of people, and both can spell a control token;
only the template's may become one. So the text of its literals is `Text`, which knows of each
character whose it is. What people wrote is a plain str, and so is whatever an operation here
does not follow. Characters keep their marks wherever they are moved, and no operation makes a
mark, so nothing that a person wrote can gain one. Text is a str in all else: it is equal to,
found in and cut by any other.

Every operation pays for what it reads and writes before it does, from one `Budget`.
"""

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
        """Pay for looking at each character of `text`, `times` over."""
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


def _follow(text: str, source: str) -> str:
    """`text` with the marks of `source`, if it is that character by character."""
    if isinstance(source, Text) and len(text) == len(source):
        return Text(text, source.marks)
    return text


def part(budget: Budget, text: str, where: slice) -> str:
    """A slice of the text, any step."""
    piece = str.__getitem__(text, where)
    budget.letters(len(piece))
    return Text(piece, text.marks[where]) if isinstance(text, Text) else piece


def characters(budget: Budget, text: str) -> list[str]:
    budget.letters(OBJECT * len(text))
    if not isinstance(text, Text):
        return list(text)
    return [Text(char, text.marks[i : i + 1]) for i, char in enumerate(text)]


def join(budget: Budget, parts: Sequence[str], between: str = "") -> str:
    budget.letters(sum(map(len, parts)) + len(between) * max(0, len(parts) - 1))
    text = between.join(parts)
    if isinstance(between, Text) or any(isinstance(each, Text) for each in parts):
        return Text(text, marks(between).join(map(marks, parts)))
    return text


def repeat(budget: Budget, text: str, times: int) -> str:
    budget.letters(len(text) * max(0, times))
    return Text(str(text) * times, text.marks * times) if isinstance(text, Text) else text * times


def replace(budget: Budget, text: str, old: str, new: str, count: int = -1) -> str:
    if not old:  # between all characters: whose the result is, is not followed
        budget.letters((len(text) + 1) * (len(new) + 1))
        return str.replace(text, old, new, count)
    return join(budget, _split(budget, text, old, count), new)


def _split(budget: Budget, text: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
    return _pieces(budget, text, sep, maxsplit, str.split)


def _rsplit(budget: Budget, text: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
    if sep is not None:
        budget.scan(text, len(sep))  # Python searches backwards in quadratic time
    return _pieces(budget, text, sep, maxsplit, str.rsplit)


def _pieces(
    budget: Budget, text: str, sep: str | None, maxsplit: int, split: Callable[..., list[str]]
) -> list[str]:
    budget.scan(text)
    most = len(text) // 2 + 1 if sep is None else text.count(sep) + 1 if sep else 1
    budget.letters(len(text) + OBJECT * (most if maxsplit < 0 else min(most, maxsplit + 1)))
    pieces = split(text, sep, maxsplit)
    if not isinstance(text, Text):
        return pieces
    found, at = list[str](), 0
    for piece in pieces:
        at = text.index(piece, at) if sep is None else at
        found.append(Text(piece, text.marks[at : at + len(piece)]))
        at += len(piece) + len(sep or "")
    return found


def _splitlines(budget: Budget, text: str, keepends: bool = False) -> list[str]:
    budget.letters(len(text))
    whole = str.splitlines(text, True)
    budget.letters(OBJECT * len(whole))
    found, at = list[str](), 0
    for piece, line in zip(whole, str.splitlines(text, keepends), strict=True):
        found.append(_piece(text, at, len(line)))
        at += len(piece)
    return found


def _piece(text: str, start: int, length: int) -> str:
    piece = str.__getitem__(text, slice(start, start + length))
    return Text(piece, text.marks[start : start + length]) if isinstance(text, Text) else piece


def _stripped(left: bool, right: bool) -> Callable[..., str]:
    def strip(budget: Budget, text: str, chars: str | None = None) -> str:
        budget.scan(text, len(chars or "x"))
        start = len(text) - len(text.lstrip(chars)) if left else 0
        stop = max(start, len(text.rstrip(chars))) if right else len(text)
        return part(budget, text, slice(start, stop))

    return strip


def _partition(budget: Budget, text: str, sep: str) -> tuple[str, str, str]:
    budget.scan(text)
    return _parted(budget, text, sep, text.find(sep), (text, "", ""))


def _rpartition(budget: Budget, text: str, sep: str) -> tuple[str, str, str]:
    budget.scan(text, len(sep))
    return _parted(budget, text, sep, text.rfind(sep), ("", "", text))


def _parted(
    budget: Budget, text: str, sep: str, at: int, without: tuple[str, str, str]
) -> tuple[str, str, str]:
    if not sep:
        raise ValueError("empty separator")
    if at < 0:
        return without
    after = at + len(sep)
    cuts = (slice(at), slice(at, after), slice(after, None))
    before, found, rest = (part(budget, text, cut) for cut in cuts)
    return before, found, rest


def _removeprefix(budget: Budget, text: str, prefix: str) -> str:
    cut = len(prefix) if text.startswith(prefix) else 0
    return part(budget, text, slice(cut, None))


def _removesuffix(budget: Budget, text: str, suffix: str) -> str:
    cut = len(suffix) if text.endswith(suffix) else 0
    return part(budget, text, slice(len(text) - cut))


def _padded(share: Callable[[int, int], int]) -> Callable[..., str]:
    """`share` of (characters to fill, width) go to the left."""

    def pad(budget: Budget, text: str, width: int, fill: str = " ") -> str:
        if len(fill) != 1:
            raise TypeError("the fill character must be exactly one character long")
        missing = max(0, width - len(text))
        left = share(missing, width)
        sides = (repeat(budget, fill, left), text, repeat(budget, fill, missing - left))
        return join(budget, sides)

    return pad


center = _padded(lambda missing, width: missing // 2 + (missing & width & 1))
_ljust = _padded(lambda missing, width: 0)
_rjust = _padded(lambda missing, width: missing)
strip = _stripped(True, True)


def _zfill(budget: Budget, text: str, width: int) -> str:
    budget.letters(max(len(text), width))
    return str.zfill(text, width)


def changed(budget: Budget, text: str, change: Callable[[str], str]) -> str:
    """Other letters for the same text, such as capitals: none of them fewer than one."""
    budget.letters(3 * len(text))
    return _follow(change(text), text)


def _changed(change: Callable[[str], str]) -> Callable[..., str]:
    return lambda budget, text: changed(budget, text, change)


def _scanned(look: Callable[..., Any]) -> Callable[..., Any]:
    def scan(budget: Budget, text: str, *args: Any) -> Any:
        budget.scan(text)
        if args and isinstance(args[0], tuple):  # startswith(("a", "b"))
            budget.step(len(args[0]))
            for each in args[0]:
                budget.scan(text if not isinstance(each, str) else each)
        return look(text, *args)

    return scan


def _backwards(look: Callable[..., int]) -> Callable[..., int]:
    def scan(budget: Budget, text: str, sub: str, *args: int) -> int:
        budget.scan(text, len(sub))
        return look(text, sub, *args)

    return scan


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


def percent(budget: Budget, text: str, values: Any, to_text: ToText) -> str:
    """`text % values`, text kept with its marks."""
    if isinstance(values, tuple):
        rest = iter(values)
    else:
        rest = iter(() if isinstance(values, Mapping) and "%(" in text else (values,))
    parts, at = list[str](), 0
    budget.scan(text)
    for match in _PERCENT.finditer(text):
        parts.append(part(budget, text, slice(at, match.start())))
        at = match.end()
        kind = match["kind"]
        if kind == "%":
            parts.append(part(budget, text, slice(at - 1, at)))
            continue
        value = values[match["key"]] if match["key"] is not None else next(rest, rest)
        if value is rest:
            raise TypeError("not enough arguments for format string")
        width, precision = _number(match["width"]), _number(match["precision"])
        if kind == "s":
            shown = _cut(budget, to_text(value), precision)
            pad = _ljust if "-" in match["flags"] else _rjust
            parts.append(pad(budget, shown, width or 0))
        elif kind in "diouxXeEfFgGc" and isinstance(value, int | float | str):
            form = f"%{match['flags']}{match['width']}"
            form += f"{'' if precision is None else f'.{precision}'}{kind}"
            parts.append(form % value)
        elif kind in "ra":
            parts.append(to_text([value])[1:-1])
        else:
            raise ValueError(f"the format {match[0]!r} is not supported")
    if next(rest, rest) is not rest and not isinstance(values, list | Mapping | range):
        raise TypeError("not all arguments converted during string formatting")
    parts.append(part(budget, text, slice(at, None)))
    return join(budget, parts)


def braces(
    budget: Budget, text: str, args: Sequence[Any], named: Mapping[str, Any], to_text: ToText
) -> str:
    """`text.format(*args, **named)`, without attributes, items and nested widths."""
    parts, at, following = list[str](), 0, 0
    budget.scan(text)
    for match in _BRACES.finditer(text):
        parts.append(part(budget, text, slice(at, match.start())))
        at = match.end()
        if match[0] in ("{{", "}}"):
            parts.append(part(budget, text, slice(at - 1, at)))
            continue
        if match["name"] is None:
            raise ValueError("a brace in a format string that is not supported")
        name = match["name"] or str(following)
        following += not match["name"]
        if name.isdecimal() and len(name) < 6:
            if int(name) >= len(args):
                raise IndexError("too few arguments for a format string")
            value = args[int(name)]
        else:
            value = named[name]
        if match["conversion"] in ("r", "a"):
            value = to_text([value])[1:-1]
        parts.append(_shaped(budget, value, match["spec"] or "", to_text))
    parts.append(part(budget, text, slice(at, None)))
    return join(budget, parts)


def _shaped(budget: Budget, value: Any, spec: str, to_text: ToText) -> str:
    for digits in re.findall(r"\d+", spec):
        _number(digits)
    if isinstance(value, int | float) and spec:
        return format(value, spec)
    shape = _SPEC.fullmatch(spec)
    if shape is None:
        raise ValueError(f"the format {spec!r:.40} is not supported for text")
    shown = _cut(budget, to_text(value), _number(shape["precision"]))
    pad = {"<": _ljust, ">": _rjust, "^": center}[shape["align"] or "<"]
    return pad(budget, shown, _number(shape["width"]) or 0, shape["fill"] or " ")


def _cut(budget: Budget, text: str, length: int | None) -> str:
    return text if length is None else part(budget, text, slice(length))


def _number(digits: str | None) -> int | None:
    if not digits:
        return None
    if len(digits) > 4 or int(digits) > WIDEST:
        raise LimitError(f"a width of more than {WIDEST} characters")
    return int(digits)


_Method = Callable[..., Any]

# What a template may call on text. `format` and `join` need to know other values: see
# template_values.
METHODS: dict[str, _Method] = {
    "center": center,
    "ljust": _ljust,
    "partition": _partition,
    "removeprefix": _removeprefix,
    "removesuffix": _removesuffix,
    "replace": replace,
    "rjust": _rjust,
    "rpartition": _rpartition,
    "rsplit": _rsplit,
    "split": _split,
    "splitlines": _splitlines,
    "strip": strip,
    "lstrip": _stripped(True, False),
    "rstrip": _stripped(False, True),
    "zfill": _zfill,
    **{
        change.__name__: _changed(change)
        for change in (
            str.capitalize,
            str.casefold,
            str.lower,
            str.swapcase,
            str.title,
            str.upper,
        )
    },
    **{
        look.__name__: _scanned(look)
        for look in (
            str.count,
            str.endswith,
            str.find,
            str.index,
            str.isalnum,
            str.isalpha,
            str.isascii,
            str.isdecimal,
            str.isdigit,
            str.isidentifier,
            str.islower,
            str.isnumeric,
            str.isprintable,
            str.isspace,
            str.istitle,
            str.isupper,
            str.startswith,
        )
    },
    "rfind": _backwards(str.rfind),
    "rindex": _backwards(str.rindex),
}


def escaped(budget: Budget, text: str) -> str:
    """HTML's special characters spelled out, as Jinja does."""
    pairs: Iterable[tuple[str, str]] = (
        ("&", "&amp;"),
        (">", "&gt;"),
        ("<", "&lt;"),
        ("'", "&#39;"),
        ('"', "&#34;"),
    )
    for old, new in pairs:
        text = replace(budget, text, old, new)
    return text
