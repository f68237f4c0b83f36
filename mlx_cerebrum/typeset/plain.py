"""A formula as lines of text, where that reads in one way only."""
# ruff: noqa: RUF001, signs that look alike are what this is about

import re
import unicodedata
from itertools import zip_longest
from typing import NamedTuple

from mlx_cerebrum.typeset.tex import Element, Node

# Signs with a space on either side where they stand between two things.
_BETWEEN = frozenset("=≠<>≤≥≪≫≈≡≢∼≃≅∝≔→←↔↦⇒⇐⇔⟹⟸⟺⟶⟵⟷⊢⊨∈∉∋⊂⊃⊆⊇⊄⊈∪∩∖⊕⊗+±∓×÷·*-∧∨∣∤∥⊥∘⋆⋮⊔⊓≺≻≲≳∴∵≜≐")
_OPEN, _CLOSE, _EITHER = frozenset("([{⟨⌊⌈"), frozenset(")]}⟩⌋⌉"), frozenset("|‖")
_LARGE = frozenset("∑∏∐∫∬∭∮⋃⋂⋁⋀⨁⨂")
_SIGNS: dict[int, str | None] = {
    ord("−"): "-",
    ord("∗"): "*",
    ord("⋅"): "·",
    ord("⋯"): "…",
    0xA0: " ",
    # Signs without a picture, and which of two a letter has.
    **dict.fromkeys([*range(0x2061, 0x2065), 0xFE00, 0xFE01]),
}
_APPLIES = "\u2061"
_UP = dict(zip("0123456789+-=()nia", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱᵃ", strict=True))
_UP |= dict(zip("bcdefghjklmoprstuvwxyzT", "ᵇᶜᵈᵉᶠᵍʰʲᵏˡᵐᵒᵖʳˢᵗᵘᵛʷˣʸᶻᵀ", strict=True))
_DOWN = dict(zip("0123456789+-=()aeh", "₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₐₑₕ", strict=True))
_DOWN |= dict(zip("ijklmnoprstuvx", "ᵢⱼₖₗₘₙₒₚᵣₛₜᵤᵥₓ", strict=True))
_ACCENTS = {"ˆ": "\u0302", "^": "\u0302", "¯": "\u0304", "⃗": "\u20d7", "→": "\u20d7"}
_ACCENTS |= {"˙": "\u0307", "¨": "\u0308", "˜": "\u0303", "~": "\u0303"}
_LINES = {"\u203e": "\u0305"}
_ROOTS = {"3": "∛", "4": "∜"}

_TOUCHES = frozenset(("one", "root", "open", "name", "either", "after"))  # kinds of parts

_TOUCHED = frozenset(("one", "root", "close", "name", "after"))
_STAND = frozenset(("one", "root", "name"))

# How firmly a text holds together.
_LINE, _SUM, _FRACTION, _PRODUCT, _ONE = range(5)


class _UnclearError(Exception):
    """No line of text says this in one way only."""


class _Part(NamedTuple):
    text: str
    kind: str  # one root name after text between mark tight open close either space applies
    holds: int = _ONE


def plain(formula: Element) -> list[str] | None:
    """The lines of a formula: several of aligned equations, of cases and of matrices.

    None: show it as it was written.
    """
    try:
        return _flat(formula)
    except _UnclearError:
        pass
    try:
        return _beside_each_other(_boxes(formula.children))
    except _UnclearError:
        return None


_AROUND = ("math", "mrow", "mtable", "mtr", "mtd")


def _flat(formula: Element) -> list[str] | None:
    """A formula without a matrix in it."""
    inner = formula
    while True:
        filled = _filled(inner)
        if inner.name == "mtable" and len([cell for row in filled for cell in _filled(row)]) > 1:
            if inner.attributes.get("displaystyle") != "true":
                raise _UnclearError
            return _lines(inner)
        boxed = inner.attributes.get("notation") == "box"
        if len(filled) != 1 or not (boxed or inner.name in _AROUND):
            break
        inner = filled[0]
    text = _text(formula if inner.name != "mtd" else inner)[0].strip()
    return [text] if text else None


class _Box(NamedTuple):
    """Lines that stand beside those of other boxes, each box's `middle` one in the same row."""

    lines: list[str]
    middle: int


_TALL = {"(": "⎛⎜⎜⎜⎝", ")": "⎞⎟⎟⎟⎠", "[": "⎡⎢⎢⎢⎣", "]": "⎤⎥⎥⎥⎦", "{": "⎧⎪⎨⎪⎩", "}": "⎫⎪⎬⎪⎭"}
_TALL |= {"|": "│││││", "‖": "‖‖‖‖‖", "": "     "}  # first, above the middle, middle, below, last


def _boxes(nodes: list[Node]) -> list[_Box]:
    """Texts and tables in turn."""
    boxes: list[_Box] = []
    run: list[Node] = []

    def end_run() -> None:
        if run:
            # What stands there is to the left of a sign that comes first.
            before = [_Part("", "one")] if boxes else []
            boxes.append(_Box([_joined([*before, *_row(run)])[0].strip()], 0))
        run.clear()

    for node in nodes:
        table = node if isinstance(node, Element) else None
        signs = ["", ""]
        if table is not None and table.name == "mrow":
            inner = _elements(table)
            if [one.name for one in inner] == ["mo", "mtable", "mo"]:
                signs = [_characters(inner[0]), _characters(inner[2])]
                table = inner[1]
        if table is not None and (braced := _braced(table)) is not None:
            end_run()
            boxes.append(braced)
            continue
        if table is None or table.name != "mtable":
            run.append(node)
            continue
        end_run()
        if signs == ["", ""] or not set(signs) <= _TALL.keys():
            raise _UnclearError
        boxes.append(_matrix(table, *signs))
    end_run()
    return boxes


def _matrix(table: Element, opening: str, closing: str) -> _Box:
    """A table between its brackets."""
    cells = [_elements(row) for row in _elements(table)]
    if any("border-top" in _style(cell) for row in cells for cell in row):
        raise _UnclearError
    rows = [[_text(cell)[0].strip() for cell in row] for row in cells]
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    ruled = {at for row in cells for at, cell in enumerate(row) if "border-right" in _style(cell)}
    lines = []
    for number, row in enumerate(rows):
        line = _side(opening, number, len(rows))
        for at, text in enumerate(row):
            style = _style(cells[number][at])
            close = at == 0 or at - 1 in ruled or re.search("padding-left:0(;|$)", style)
            line += " " if close else "  "
            if "text-align" not in style:
                line += text.center(widths[at])
            else:
                right = "text-align:right" in style
                line += text.rjust(widths[at]) if right else text.ljust(widths[at])
            line += " │" if at in ruled else ""
        lines.append(f"{line} {_side(closing, number, len(rows))}")
    return _Box([line.rstrip() if not closing else line for line in lines], (len(lines) - 1) // 2)


def _braced(of: Element) -> _Box | None:
    """Something with a brace below or above it, and what that says."""
    below = of.name == "munder"
    if not below and of.name != "mover":
        return None
    base, label = _elements(of)
    inner = _elements(base)
    if base.name != of.name or len(inner) != 2 or inner[1].children != ["⏟" if below else "⏞"]:
        return None
    text, said = (_text(one)[0].strip() for one in (inner[0], label))
    half = max(len(text) // 2, 1)
    left, right = ("└", "┘") if below else ("┌", "┐")
    brace = f"{left}{'─' * (half - 1)}{'┬' if below else '┴'}{'─' * (half - 1)}{right}"
    width = max(len(text), len(brace), len(said))
    lines = [text.center(width), brace.center(width), said.center(width)]
    return _Box(lines, 0) if below else _Box(lines[::-1], 2)


def _style(cell: Element) -> str:
    return cell.attributes.get("style", "")


def _side(sign: str, row: int, rows: int) -> str:
    """What stands of a tall bracket in a row."""
    if rows == 1:
        return sign
    first, above, middle, below, last = tuple(_TALL[sign])
    if row in (0, rows - 1):
        return last if row else first
    if row == (rows - 1) // 2 and rows > 2:
        return middle
    return above if row < (rows - 1) // 2 else below


def _beside_each_other(boxes: list[_Box]) -> list[str] | None:
    above = max((box.middle for box in boxes), default=0)
    below = max((len(box.lines) - 1 - box.middle for box in boxes), default=0)
    lines = [""] * (above + 1 + below)
    for place, box in enumerate(boxes):
        width = max(map(len, box.lines))
        first = above - box.middle
        for at in range(len(lines)):
            inside = box.lines[at - first] if 0 <= at - first < len(box.lines) else ""
            lines[at] += " " * (place > 0) + inside.ljust(width)
    return [line.rstrip() for line in lines] if any(map(str.strip, lines)) else None


def _lines(table: Element) -> list[str]:
    """Rows whose columns belong together in pairs: `a &= b` is aligned where the pair meets."""
    rows = [[_text(cell)[0].strip() for cell in _elements(row)] for row in _elements(table)]
    columns = [list(column) for column in zip_longest(*rows, fillvalue="") if any(column)]
    shown = [""] * len(rows)
    for place, column in enumerate(columns):
        width = max(map(len, column))
        for at, text in enumerate(column):
            if place % 2:
                shown[at] += f" {text}".ljust(width + 1)
            else:
                shown[at] += " " * 4 * (place > 0) + text.rjust(width)
    lines = [line.rstrip() for line in shown if line.strip()]
    least = min((len(line) - len(line.lstrip()) for line in lines), default=0)
    return [line[least:] for line in lines]


def _elements(of: Element) -> list[Element]:
    return [child for child in of.children if isinstance(child, Element)]


def _filled(of: Element) -> list[Element]:
    return [child for child in _elements(of) if child.children]


def _text(of: Element) -> tuple[str, int]:
    return _joined(_row([of]))


def _row(nodes: list[Node]) -> list[_Part]:
    parts: list[_Part] = []
    for node in nodes:
        if isinstance(node, str):
            if node.strip():
                raise _UnclearError
            continue
        parts += _parts(node)
    return parts


def _parts(of: Element) -> list[_Part]:
    match of.name:
        case "mrow" | "math" | "mtd":
            return _binomial(of) or _row(of.children)
        case "mi" | "mn":
            return [_word(_characters(of))]
        case "mtext":
            text = _characters(of)
            return [_Part(text, "one" if text and not re.search(r"\s", text) else "text")]
        case "mo":
            return _sign(of)
        case "mspace":
            return _space(of)
        case "mfrac":
            return [_fraction(of)]
        case "msqrt":
            text, holds = _joined(_row(of.children))
            return [_Part("√" + (text if _short(text, holds) else f"({text})"), "root")]
        case "mroot":
            (text, holds), (degree, _) = (_text(child) for child in _elements(of))
            if degree not in _ROOTS:
                raise _UnclearError
            inner = text if _short(text, holds) else f"({text})"
            return [_Part(_ROOTS[degree] + inner, "root")]
        case "msup" | "msub" | "msubsup":
            return _scripts(of, of.name != "msup", of.name != "msub")
        case "munder" | "mover" | "munderover":
            if of.attributes.get("accent") == "true":
                return [_accent(of)]
            if "accentunder" in of.attributes:
                raise _UnclearError
            return _scripts(of, of.name != "mover", of.name != "munder", limits=True)
        case "menclose" if of.attributes.get("notation") == "box":
            return _row(of.children)
        case _:
            raise _UnclearError


def _characters(of: Element) -> str:
    """The characters of an element; of a letter's many mathematical forms the plain one."""
    if not all(isinstance(child, str) for child in of.children):
        raise _UnclearError
    text = "".join(map(str, of.children))
    shown = [
        unicodedata.normalize("NFKC", char) if "\U0001d400" <= char <= "\U0001d7ff" else char
        for char in text
    ]
    return "".join(shown).translate(_SIGNS)


def _word(text: str) -> _Part:
    name = len(text) > 1 and text.isalpha()  # sin, lim
    return _Part(text, "name" if name else "one")


def _sign(of: Element) -> list[_Part]:
    if of.children == [_APPLIES]:
        return [_Part("", "applies")]
    text = _characters(of)
    if not text:
        return []
    if text in _OPEN:
        return [_Part(text, "open")]
    if text in _CLOSE:
        return [_Part(text, "close")]
    if text in _EITHER:
        return [_Part(text, "either")]
    if text in "," or text == ";":
        return [_Part(text, "tight" if of.attributes.get("rspace") == "0" else "mark")]
    if text in _BETWEEN or text == ":":
        return [_Part("|" if text == "∣" else text, "between")]
    if text in _LARGE:
        return [_Part(text, "name")]
    return [_Part(text, "after" if text in "!′″‴%/" else "one")]


def _space(of: Element) -> list[_Part]:
    found = re.match(r"(-?[\d.]+)em", of.attributes.get("width", ""))
    width = float(found[1]) if found else 0.0
    if of.attributes.get("style") or (of.attributes.get("width") and not found):
        return []
    return [_Part("  " if width >= 1 else " ", "space")] if width > 0 else []


def _binomial(of: Element) -> list[_Part]:
    """n over k in brackets; empty for anything else."""
    inner = _elements(of)
    if [one.name for one in inner] != ["mo", "mfrac", "mo"]:
        return []
    signs = [_characters(inner[0]), _characters(inner[2])]
    if signs != ["(", ")"] or inner[1].attributes.get("linethickness") != "0":
        return []
    above, below = (
        text if text and holds >= _FRACTION else f"({text})"
        for text, holds in map(_text, _elements(inner[1]))
    )
    return [_Part(f"({above} choose {below})", "one")]


def _fraction(of: Element) -> _Part:
    if of.attributes.get("linethickness") == "0":
        raise _UnclearError
    (above, holds), (below, holds_below) = (_text(child) for child in _elements(of))
    if not above or not below:
        raise _UnclearError
    above = above if holds >= _PRODUCT else f"({above})"
    clear = holds_below == _ONE or re.fullmatch(r"[d\u2202][a-z][²³ⁿ]?", below)  # dy/dx
    below = below if clear else f"({below})"
    return _Part(f"{above}/{below}", "one", _FRACTION)


def _scripts(of: Element, has_below: bool, has_above: bool, limits: bool = False) -> list[_Part]:
    base, *scripts = _elements(of)
    parts = _row([base])
    below = scripts.pop(0) if has_below else None
    above = scripts.pop(0) if has_above else None
    text, holds = _joined(parts)
    kind = parts[-1].kind if parts else "one"
    before = text[: len(text) - len(text.lstrip())]
    if kind == "text" and len(text.split()) == 1:  # cm^2
        text, holds = text.strip(), _ONE
    if limits and kind != "name":
        raise _UnclearError  # something set above a sign
    if not text:
        raise _UnclearError  # {}^n C_r
    if holds < _ONE and kind not in ("close", "either"):
        text = f"({text})"
    if below is not None:
        text += _lowered(*_text(below))
    if above is not None:
        raised, held = _text(above)
        if raised.strip() in ("∘", "°"):
            text += "°"
        else:
            text += raised if set(raised) <= set("′″‴") else _raised(raised, held)
    lead = [_Part(before, "text")] if before else []
    return [*lead, _Part(text, "name" if kind == "name" else "one")]


def _raised(text: str, holds: int) -> str:
    tight = text.replace(" ", "")
    if all(char in _UP for char in tight):
        return "".join(_UP[char] for char in tight)
    return f"^{text}" if _short(text, holds) else f"^({text})"


def _lowered(text: str, holds: int) -> str:
    tight = text.replace(" ", "")
    if all(char in _DOWN for char in tight):
        return "".join(_DOWN[char] for char in tight)
    return f"_{text}" if _short(text, holds) else f"_({text})"


def _short(text: str, holds: int) -> bool:
    """Is it clear where a text ends that follows a mark?"""
    return holds == _ONE and re.fullmatch(r".|[\d.]+|\([^()]*\)", text) is not None


def _accent(of: Element) -> _Part:
    base, mark = _elements(of)
    text, sign = _text(base)[0], _characters(mark)
    if sign in _LINES and text.isalnum() and len(text) <= 8:  # AB, the digits that repeat
        return _Part("".join(char + _LINES[sign] for char in text), "one")
    if len(text) != 1 or sign not in _ACCENTS:
        raise _UnclearError
    return _Part(text + _ACCENTS[sign], "one")


def _joined(parts: list[_Part]) -> tuple[str, int]:
    """The parts as a text, and how firmly it holds together."""
    text, before = "", ""  # before: the kind of what stands there
    depth, holds, count = 0, _ONE, 0
    for at, part in enumerate(parts):
        after = parts[at + 1] if at + 1 < len(parts) else None
        kind, shown = part.kind, part.text
        begins = before in ("", "open", "between", "mark")  # nothing to the left of a sign
        if kind == "either":  # |x|
            kind = "open" if begins else "close"
        if not depth:
            holds = min(holds, _loosened(kind, shown, after))
        if kind == "space":
            text += "" if text.endswith(" ") else shown
            continue
        if kind == "applies":
            text += " " if after and after.kind != "open" else ""
            continue
        if kind == "between" and not begins:
            text = f"{text.rstrip()} {shown} "
        elif kind == "between":
            text += shown if shown in "+-±∓" else f"{shown} "
        elif kind == "mark":
            text = f"{text.rstrip()}{shown} "
        else:
            named = kind == "name" and before in _TOUCHED
            if (named or before == "name") and kind in _STAND and text[-1:].strip():
                text += " "
            if part.holds == _FRACTION:
                nearest = [one for one in parts[:at] if one.kind != "applies"][-1:]
                shown = _beside(part, nearest[0] if nearest else None, after)
            elif kind == "root" and _goes_on(after) and shown[1] != "(":
                shown = f"{shown[0]}({shown[1:]})"
            if not depth and kind in {*_STAND, "open"}:
                count += 1
                holds = min(holds, part.holds if shown == part.text else _ONE)
                if shown.startswith(" "):  # 2 1/2
                    holds = min(holds, _SUM)
            depth += (kind == "open") - (kind == "close")
            text += shown
        before = kind
    if depth:  # [0, 1)
        holds = min(holds, _SUM)
    if count > 1 and not re.fullmatch(r"[^\W\d]\([^()]*\)", text):  # f(x)
        holds = min(holds, _PRODUCT)
    return text, holds


def _loosened(kind: str, shown: str, after: _Part | None) -> int:
    """How firmly a text can hold together with this in it."""
    if kind == "mark":
        return _LINE
    if kind == "between" or (kind == "text" and shown.strip()):
        return _SUM
    if kind == "name" and after and after.kind not in ("between", "mark", "open"):
        return _SUM  # sin x, a sum of something
    return _FRACTION if shown == "/" else _ONE


def _beside(part: _Part, before: _Part | None, after: _Part | None) -> str:
    """A fraction between what stands next to it."""
    mixed = before is not None and re.fullmatch(r"\d+", before.text)
    if mixed and re.fullmatch(r"\d+/\d+", part.text):
        return f" {part.text}"  # 2 1/2
    touches = before is not None and before.kind in _TOUCHED
    return f"({part.text})" if touches or _goes_on(after) else part.text


def _goes_on(after: _Part | None) -> bool:
    """Does what follows stand close to what is before it?"""
    return after is not None and after.kind in _TOUCHES and after.text != "/"
