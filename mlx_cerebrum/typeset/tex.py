"""A formula's TeX as MathML, or nothing where it must be shown as it was written.

math-core converts: tables with `&`, nothing but MathML Core.
It has no bound of its own: `((((...` takes it twice as long for each bracket, and 1,000 braces
are more than its stack. So this runs in the process of `worker`.
"""

import re
from collections.abc import Callable
from typing import NamedTuple
from xml.etree import ElementTree

from mlx_cerebrum.typeset.macros import put_in

LONGEST = 4000  # characters
DEEPEST = 60  # elements within each other
MOST = 4000  # elements

# What may reach a reader. Nothing here loads, links or runs; `maths.js` has the same lists.
_ELEMENTS = """math menclose mfrac mi mn mo mover mpadded mphantom mroot mrow mspace msqrt msub
msubsup msup mtable mtd mtext mtr munder munderover"""
_ATTRIBUTES = """accent accentunder display displaystyle form height linethickness lspace
mathvariant maxsize minsize movablelimits notation rspace scriptlevel stretchy voffset width"""
_STYLES = """border-bottom border-left border-right border-top color font-style font-weight
justify-items margin-left padding-bottom padding-left padding-right padding-top text-align width"""
ELEMENTS = frozenset(_ELEMENTS.split())
ATTRIBUTES = frozenset(_ATTRIBUTES.split())
STYLES = frozenset(_STYLES.split())
_VALUE = re.compile(r"[-\w.#% ]{1,60}", re.ASCII)
_NOTATIONS = {"box", "updiagonalstrike", "downdiagonalstrike"}  # what the page's style draws
_LETTERS = {  # HTML's elements within a text, and what they change
    "b": ("font-weight", "bold"),
    "i": ("font-style", "italic"),
    "em": ("font-style", "italic"),
    "code": ("", ""),
    "span": ("", ""),
}

_OPENINGS = (("\\[", "\\]", True), ("\\(", "\\)", False), ("$$", "$$", True), ("$", "$", False))
_BEGIN = re.compile(r"\\begin\{([a-zA-Z]{1,20}\*?)\}")
_LINES = {"align", "alignat", "eqnarray", "equation", "gather", "multline", "flalign"}
_DEFINES = re.compile(
    r"\\(?:(?:re)?newcommand|providecommand|[gex]?def|let|(?:re)?newenvironment|global|csname"
    r"|DeclareMathOperator|(?:eq)?ref|href|url|includegraphics|input|catcode)\b"
)
# What models write and the converter does not know, or takes for something else.
_REWRITTEN: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"(?<!\\)((?:\\\\)*)%"), r"\1\\%"),  # no comment: 50% of x
    (re.compile(r"\\\\\*?\s*\[\s*-?[\d.]+\s*(?:pt|em|ex|cm|mm|in|px)\s*\]"), r"\\\\"),
    (re.compile(r"\\(?:notag|nonumber)\b|\\(?:label|require)\{[^{}]*\}"), ""),
    (re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])"), lambda m: m[0].replace(",", "{,}")),
    (re.compile(r"\\(begin|end)\{(align|gather|multline|equation)\}"), r"\\\1{\2*}"),
    (re.compile(r"\\(begin|end)\{split\}"), r"\\\1{aligned}"),
    (re.compile(r"\\begin\{(?:fl)?alignat\*?\}\{\d\}"), r"\\begin{align*}"),
    (re.compile(r"\\end\{(?:fl)?alignat\*?\}"), r"\\end{align*}"),
    (re.compile(r"\\begin\{alignedat\}\{\d\}"), r"\\begin{aligned}"),
    (re.compile(r"\\end\{alignedat\}"), r"\\end{aligned}"),
    (re.compile(r"\\(begin|end)\{smallmatrix\}"), r"\\\1{matrix}"),
    (re.compile(r"\\(begin|end)\{tabular\}"), r"\\\1{array}"),
    (re.compile(r"\\[hm]box\b"), r"\\text"),
    (re.compile(r"\\tag\*?\{([^{}$\\]*)\}"), r"\\qquad\\text{(\1)}\\quad "),
    (re.compile(r"\\substack\{([^{}]*)\}"), r"{\\begin{matrix}\1\\end{matrix}}"),
]
_ROWS = re.compile(r"\\\\|\\cr\b")
# Two words beside each other: no formula; TeX would take the space between them away.
_COMMAND = re.compile(
    r"\\[a-zA-Z]*(?:text|mbox|fbox|math|operator)[a-zA-Z]*\*?\{[^{}]*\}|\\[a-zA-Z]+"
)
_PROSE = re.compile(r"[a-zA-Z]{3,} +[a-zA-Z]{2,}|[a-zA-Z]{2,} +[a-zA-Z]{3,}| (?:of|or|is|if|per) ")
_BARE = re.compile(r"(?<!\\)[_&#]")
_SPACED = re.compile(r"(\\[_&#%$]) ")  # the converter would take the space for the command's
_TEXT = re.compile(r"\\text(?:rm|bf|it)?\{([^{}]*)\}")


class Element(NamedTuple):
    """An element of MathML; of its children the texts are what is read."""

    name: str
    attributes: dict[str, str]
    children: "list[Element | str]"


Node = Element | str


def split(source: str) -> tuple[str, bool] | None:
    """The TeX between a formula's marks, and whether it stands alone; None where it has none."""
    for opening, closing, alone in _OPENINGS:
        if source.startswith(opening):
            whole = source.endswith(closing) and len(source) > len(opening) + len(closing)
            return (source[len(opening) : -len(closing)], alone) if whole else None
    if source.startswith("\\boxed{") and source.endswith("}"):
        return source, False
    found = _BEGIN.match(source)
    if found and source.endswith(f"\\end{{{found[1]}}}"):
        return source, found[1].rstrip("*") in _LINES
    return None


def formula(source: str) -> Element | None:
    """A formula with its marks, `$x^2$`, as MathML; None: show it as it is.

    May take for ever or end the process: only `worker` calls this.
    """
    if len(source) > LONGEST or (found := split(source)) is None:
        return None
    alone, tex = found[1], put_in(found[0], LONGEST)
    if tex is None or not tex.strip() or _DEFINES.search(tex):
        return None
    if _PROSE.search(_COMMAND.sub("\\\\", tex)):
        return None
    if _ROWS.search(tex) and "\\begin" not in tex:  # rows without the words around them
        rows = "align*" if "&" in tex else "gather*"
        tex = f"\\begin{{{rows}}}{tex}\\end{{{rows}}}"
    from math_core import LatexError, LatexToMathML

    convert = LatexToMathML(fancy_error=False, allow_unreliable_rendering=True)
    try:
        written = convert.convert_with_local_state(_rewritten(tex), displaystyle=alone)
    except LatexError:
        return None
    return _allowed(written.replace("&ApplyFunction;", "\u2061"))


def _rewritten(tex: str) -> str:
    if "{eqnarray" in tex:  # its columns are three: a &=& b
        tex = re.sub(r"&(\s*(?:[^\w\s&\\]{1,2}|\\[a-z]+)\s*)&", r"&\1 ", tex)
        tex = re.sub(r"\\(begin|end)\{eqnarray\*?\}", r"\\\1{align*}", tex)
    for pattern, replacement in _REWRITTEN:
        tex = pattern.sub(replacement, tex)
    return _TEXT.sub(_formulas_in_text, tex)


def _formulas_in_text(found: re.Match[str]) -> str:
    """`\\text{if $x > 0$}` as text and formula in turn; in the texts signs are themselves."""
    parts = re.split(r"(?<!\\)\$", found[1])
    if len(parts) % 2 == 0:
        return found[0]
    parts[::2] = [_SPACED.sub(r"\1~", _BARE.sub(r"\\\g<0>", part)) for part in parts[::2]]
    command = found[0][: found[0].index("{")]
    return "".join(
        (f"{{{part}}}" if index % 2 else f"{command}{{{part}}}") if part else ""
        for index, part in enumerate(parts)
    )


def _allowed(written: str) -> Element | None:
    """The converter's XML as a tree of what is allowed; None where anything else is in it."""
    try:
        root = ElementTree.fromstring(written)
        return _element(root) if sum(1 for _ in root.iter()) <= MOST else None
    except (ElementTree.ParseError, NotAllowedError):
        return None


class NotAllowedError(Exception):
    """Something that no reader's page is to have."""


def _element(of: ElementTree.Element, depth: int = 1) -> Element:
    given = dict(of.attrib)
    given.pop("class", None)
    written = [one.partition(":") for one in given.pop("style", "").split(";") if one.strip()]
    style = {key.strip(): value.strip() for key, _, value in written}
    children: list[Node] = []
    if of.tag == "mtext":  # HTML within it does no more than choose letters
        inner = {one.tag for one in of.iter()} - {"mtext"}
        if inner - _LETTERS.keys():
            raise NotAllowedError
        style |= dict(_LETTERS[tag] for tag in inner if _LETTERS[tag][0])
        children = ["".join(of.itertext())]
    else:
        children = [of.text] if of.text else []
        for child in of:
            children.append(_element(child, depth + 1))
            children += [child.tail] if child.tail else []
    if of.tag == "menclose" and not set(given.get("notation", "").split()) <= _NOTATIONS:
        raise NotAllowedError
    known = of.tag in ELEMENTS and given.keys() <= ATTRIBUTES and style.keys() <= STYLES
    if not known or depth > DEEPEST:
        raise NotAllowedError
    if not all(map(_VALUE.fullmatch, [*given.values(), *style.values()])):
        raise NotAllowedError
    if style:
        given["style"] = ";".join(f"{key}:{value}" for key, value in style.items())
    if of.tag == "mover" and children[-1:] == [Element("mo", {"stretchy": "true"}, ["\u0332"])]:
        children[-1] = Element("mo", {"stretchy": "true"}, ["\u203e"])  # above, not below
    return Element(of.tag, given, children)
