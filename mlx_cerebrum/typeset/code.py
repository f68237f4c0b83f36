"""Which part of a program is what, by Pygments, for the colours of terminal and page."""

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pygments.lexer import Lexer

LONGEST = 40_000  # characters
# What models write; all others are shown without colours.
_LANGUAGES = """applescript asm awk bash basic bibtex c c# c++ clojure cmake cpp csharp css cuda
dart diff docker dockerfile elixir elm erlang fortran fsharp gherkin glsl go golang graphql groovy
haskell hs html http ini java javascript js json jsx julia kotlin latex lean lisp lua make
makefile mathematica matlab mysql nginx nim numpy objc objective-c objectivec ocaml octave
pascal perl php postgresql powershell prolog protobuf py py3 pycon python python3 r racket rb rs
ruby rust sage scala scheme sh shell smalltalk solidity sql sqlite3 swift tcl tex toml ts tsx
typescript verilog vhdl vim xml yaml yml zig zsh"""
LANGUAGES = frozenset(_LANGUAGES.split())
# The parts that have a colour, by how Pygments' names for them begin; the first that fits.
_KINDS = {
    "Comment.Preproc": "name",
    "Comment": "comment",
    "Keyword.Constant": "number",
    "Keyword": "keyword",
    "Operator.Word": "keyword",
    "Literal.String": "string",
    "Literal.Number": "number",
    "Name.Builtin": "name",
    "Name.Class": "name",
    "Name.Decorator": "name",
    "Name.Function": "name",
    "Name.Tag": "keyword",
    "Name.Attribute": "name",
    "Generic.Deleted": "number",
    "Generic.Inserted": "string",
    "Generic.Heading": "keyword",
    "Generic.Prompt": "comment",
}
KINDS = frozenset(_KINDS.values())

Part = tuple[str, str]  # kind, "" for none, and text


def code(language: str, text: str) -> list[Part] | None:
    """The parts of a program, which together are its text; None: show it without colours.

    A lexer's expressions may take for ever: only `worker` calls this.
    """
    if language.lower() not in LANGUAGES or len(text) > LONGEST or "\r" in text:
        return None
    lexer = _lexer(language.lower())
    if lexer is None:
        return None
    parts: list[Part] = []
    for token, piece in lexer.get_tokens(text):
        name = ".".join(token)
        kind = next((kind for begin, kind in _KINDS.items() if name.startswith(begin)), "")
        if parts and parts[-1][0] == kind:
            parts[-1] = kind, parts[-1][1] + piece
        elif piece:
            parts.append((kind, piece))
    return parts if "".join(piece for _, piece in parts) == text else None


@cache
def _lexer(language: str) -> "Lexer | None":
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    try:
        return get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return None
