r"""A formula's own simple macros, put in where they are used: `\newcommand{\R}{\mathbb{R}} \R^2`.

Simple: a name, up to nine arguments without defaults, a text. What they make is bounded, however
they use each other; whatever else defines something stays, and is refused by who reads on.
"""

import re

MOST = 200  # uses, of all macros together

_NAME = r"\{?\s*(?P<name>\\[a-zA-Z]+)\s*\}?"
_COMMAND = re.compile(
    rf"\\(?:(?:re)?newcommand|providecommand)\*?\s*{_NAME}\s*(?:\[(?P<count>\d)\])?\s*(?=\{{)"
)
_OPERATOR = re.compile(rf"\\DeclareMathOperator(?P<star>\*?)\s*{_NAME}\s*(?=\{{)")
_DEF = re.compile(r"\\def\s*(?P<name>\\[a-zA-Z]+)(?P<marks>(?:#\d)*)\s*(?=\{)")
_WORD = re.compile(r"\\(?:[a-zA-Z]+|.)|[{}]", re.DOTALL)
_MARK = re.compile(r"#(\d)")
_DEFINES = re.compile(r"\\(?:newcommand|renewcommand|providecommand|def|DeclareMathOperator)\b")


def put_in(tex: str, longest: int) -> str | None:
    """The formula without its definitions; None where they make more than `longest` characters,
    or for ever more."""
    if not _DEFINES.search(tex):
        return tex
    macros: dict[str, tuple[int, str]] = {}  # by name: how many arguments, and the text
    made, rest, uses = "", tex, 0
    while found := _WORD.search(rest):
        word = found[0]
        if (known := _definition(rest, found.start())) is not None:
            name, macro, end = known
            macros[name] = macro
            made, rest = made + rest[: found.start()], rest[end:]
        elif word in macros:
            count, text = macros[word]
            arguments, end = _arguments(rest, found.end(), count)
            if len(arguments) < count:
                return None
            uses += 1
            put = _filled(text, arguments)
            # As TeX does, which reads on in what it has put in.
            made, rest = made + rest[: found.start()], put + _apart(put, rest[end:])
        else:
            made, rest = made + rest[: found.end()], rest[found.end() :]
        if uses > MOST or len(made) + len(rest) > longest:
            return None
    return made + rest


def _filled(text: str, arguments: list[str]) -> str:
    return _MARK.sub(lambda found: arguments[int(found[1]) - 1], text)


def _apart(put: str, rest: str) -> str:
    r"""`\R` and `x` are not `\Rx`."""
    joins = re.search(r"\\[a-zA-Z]+$", put) and re.match("[a-zA-Z]", rest)
    return f" {rest}" if joins else rest


def _definition(tex: str, start: int) -> tuple[str, tuple[int, str], int] | None:
    """The macro that is defined here, with its name, and where that ends."""
    for pattern in (_COMMAND, _OPERATOR, _DEF):
        found = pattern.match(tex, start)
        body = _group(tex, found.end()) if found else None
        if found is None or body is None:
            continue
        text, end = body
        given = found.groupdict()
        count = int(given.get("count") or len(given.get("marks") or "") // 2)
        if given.get("star") is not None:
            text = f"\\operatorname{given['star']}{{{text}}}"
        if any(not 1 <= int(mark) <= count for mark in _MARK.findall(text)):
            return None
        return found["name"], (count, text), end
    return None


def _arguments(tex: str, at: int, count: int) -> tuple[list[str], int]:
    """What follows a macro: groups in braces, or single signs."""
    found: list[str] = []
    while len(found) < count:
        at += len(tex[at:]) - len(tex[at:].lstrip())
        group = _group(tex, at)
        single = re.compile(r"\\(?:[a-zA-Z]+|.)|[^{}\\]", re.DOTALL).match(tex, at)
        if group is not None:
            found.append(group[0])
            at = group[1]
        elif single:
            found.append(single[0])
            at = single.end()
        else:
            break
    return found, at


def _group(tex: str, start: int) -> tuple[str, int] | None:
    """What stands between the braces that open here, and where they end."""
    if tex[start : start + 1] != "{":
        return None
    depth = 0
    for found in _WORD.finditer(tex, start):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if not depth:
            return tex[start + 1 : found.start()], found.end()
    return None
