"""Markdown and mathematics as models write them, for a terminal.

A product is no emphasis, and a formula is a line of text where that is clear, else as written.
Those rules are the page's too (`server/page/inline.js` and `blocks.js`); `tests/answers/` and
`tests/maths_cases.json` hold both to them.
"""

import re
from collections.abc import Mapping
from typing import ClassVar

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock, list_block
from markdown_it.rules_inline import StateInline, emphasis, escape
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import BlockQuote, CodeBlock, Heading, ListItem, Markdown, MarkdownElement
from rich.padding import Padding
from rich.style import Style
from rich.text import Text
from rich.theme import Theme

from mlx_cerebrum.chat.palette import PLAIN
from mlx_cerebrum.typeset import worker
from mlx_cerebrum.typeset.plain import plain

# Rich's own colours can't be read on every background.
_WITHOUT_COLOUR = {
    "markdown.code_block": "none",
    "markdown.block_quote": "italic",
    "markdown.list": "none",
    "markdown.item.number": "bold",
    "markdown.hr": "none",
    **{f"markdown.h{level}": "bold" for level in (2, 3)},
    **{f"markdown.h{level}": "bold italic" for level in (4, 5, 6)},
    "markdown.table.border": "none",
    "markdown.table.header": "bold",
}


def _theme(styles: Mapping[str, Style]) -> Theme:
    own = {"markdown.code": styles["code"], "markdown.link": styles["link"]}
    return Theme({**_WITHOUT_COLOUR, **own, "markdown.link_url": styles["link"]})


class _Parser(MarkdownIt):
    def validateLink(self, url: str) -> bool:  # noqa: N802, its name there
        """Only addresses: `[2](3)` is a product, as on the page."""
        return re.match(r"(?i)(?:https?|mailto):", url) is not None


def markdown_parser() -> MarkdownIt:
    """CommonMark with tables, and without what would hide text: HTML, pictures, references."""
    parser = _Parser().enable(["strikethrough", "table"]).use(mathematics)
    return parser.disable(["html_block", "html_inline", "image", "reference"])


def finished(text: str, parser: MarkdownIt) -> tuple[int, bool]:
    """How many characters of a growing Markdown text are blocks that can't change any more.

    All but the last block, or the last item of a list. Also whether the cut is between two items.
    """
    starts: dict[int, bool] = {}  # line -> an item's that is not its list's first
    for token in parser.parse(text):
        if token.map is None or token.nesting < 0:
            continue
        line = token.map[0]
        if token.level == 0:
            starts[line] = False
        elif token.level == 1 and token.type == "list_item_open":
            starts.setdefault(line, True)
    lines = text.split("\n")
    for line in sorted(starts, reverse=True):
        # A line still being written may yet turn out to go on with the block before it.
        complete = line < len(lines) - 1 or not lines[line - 1].strip()
        if line and complete:
            return sum(len(lines[i]) + 1 for i in range(line)), starts[line]
    return 0, False


_NARROW = 8  # cells: with less, marks beside a text leave it none


class _Heading(Heading):
    """A heading at the left, like the text around it."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.text


class _CodeBlock(CodeBlock):
    """Code in colours for dark or light, without empty lines around it."""

    styles: Mapping[str, Style]

    @classmethod
    def create(cls, markdown: Markdown, token: Token) -> "_CodeBlock":
        assert isinstance(markdown, AnswerMarkdown)
        made = cls((token.info or "").partition(" ")[0] or "text", "none")
        made.styles = markdown.styles
        return made

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).rstrip()
        parts = worker.highlighted(self.lexer_name, code) or [("", code)]
        text = Text.assemble(*((piece, self.styles.get(kind, "")) for kind, piece in parts))
        yield Padding(text, (0, 2)) if options.max_width >= _NARROW else text


class _Quote(BlockQuote):
    """A quote, without its mark where that would leave no room for the text."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.max_width < _NARROW:
            yield self.elements
        else:
            yield from super().__rich_console__(console, options)


class _Item(ListItem):
    """A list's item, without its mark where that would leave no room for the text."""

    def render_bullet(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.max_width < _NARROW:
            yield self.elements
        else:
            yield from super().render_bullet(console, options)

    def render_number(
        self, console: Console, options: ConsoleOptions, number: int, last_number: int
    ) -> RenderResult:
        if options.max_width < _NARROW + len(str(last_number)):
            yield self.elements
        else:
            yield from super().render_number(console, options, number, last_number)


class AnswerMarkdown(Markdown):
    """Markdown as models write it: a line break is one, and nothing of the text is hidden."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements,
        "heading_open": _Heading,
        "fence": _CodeBlock,
        "code_block": _CodeBlock,
        "blockquote_open": _Quote,
        "list_item_open": _Item,
    }

    def __init__(self, text: str, styles: Mapping[str, Style] = PLAIN) -> None:
        # Addresses are written out: a link must not look like another one.
        super().__init__("", hyperlinks=False)
        self.markup, self.styles = text, styles
        self.parsed = markdown_parser().parse(text)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for token in self.parsed:
            if token.children:
                # What is beside lists and quotes takes some of the width.
                width = options.max_width - 10 if console.encoding.startswith("utf") else 0
                token.children = _inline(token.children, width)
        with console.use_theme(_theme(self.styles)):
            yield from super().__rich_console__(console, options)


def _inline(tokens: list[Token], width: int) -> list[Token]:
    """A line break is one, and formulas are texts.

    width: of the lines that may not be broken, in characters; 0: nothing but ASCII can be shown.
    """
    made: list[Token] = []
    begun = False  # something stands on the line
    whole = False  # what stands there are the lines of a formula
    for token in tokens:
        breaks = token.type in ("softbreak", "hardbreak")
        lines = lines_of(token.content) if width and token.type == "formula" else None
        if lines is not None and len(lines) > 1 and max(map(len, lines)) > width:
            lines = None
        tall = lines is not None and len(lines) > 1
        if whole and token.type == "text" and (mark := _MARK.match(token.content)):
            made[-1].content += mark[0].rstrip()
            token.content = token.content[mark.end() :]
            if not token.content:
                continue
        if (tall and begun) or (whole and not breaks):
            made.append(Token("hardbreak", "br", 0))
        if token.type == "formula":
            for number, line in enumerate(lines or token.content.split("\n")):
                made += [Token("hardbreak", "br", 0)] if number else []
                made.append(Token("text", "", 0, content=line))
        else:
            made.append(Token("hardbreak", "br", 0) if breaks else token)
        begun, whole = not breaks, tall
    return made


_MARK = re.compile(r"[.,;:!?)]* *")  # what follows a formula closely


def lines_of(source: str) -> list[str] | None:
    """What a formula is shown as; None: as it was written, for nothing else is clear."""
    formula = worker.formula(source)
    return None if formula is None else plain(formula)


# Mathematics: its signs are not taken for Markdown's.

# Letters and digits of scripts that put spaces between words, mathematical letters too.
_WORD = r"(?:(?![\W_])[\0-\u0dff\u1e00-\u2e7f\U0001d400-\U0001d7ff])"
_LETTER = rf"(?!\d){_WORD}"
_ENDS = re.compile(rf"{_WORD}|[)\]}}|!%'\u2032\u2033\u00b0$\u221e\u0300-\u036f]")  # a factor
_BEGINS = re.compile(
    rf"{_WORD}|[(\[{{\\|$\u221a\u221e\u2211\u222b\u20ac\u00a3]|[-+.]\d"
)  # the next
_NUMBER = re.compile(rf"[(\[{{]*(?:\d|{_LETTER}(?!{_WORD}))")  # 3, (3, x, (x but not (word
_DIGIT = re.compile(r"[(\[{]*\d")
_DOTS = re.compile(r"\.\.|[\u2026\u22ef]")
_TEX = "\\()[]{},;:"  # what a backslash before it does not escape: \( \\ \{ \, are TeX's
_OPENS = re.compile(r"\\[(\[]|\$\$?|\\begin\{[^{}\n]*\}|\\boxed\{")
# A formula without a sign of TeX's, $x$ or $3n + 1$, has no words, and none joins on to it.
_WORDS = re.compile(r"[^\W\d_]{4}|[^\W\d_]{2,}\s+[^\W\d_]{2,}|[,;]\s+[^\W\d_]{2,}")
_ALNUM = re.compile(r"[^\W\d_]")  # letters, and signs such as \u00b2, which is none
_AFTER = re.compile(r"(?:th|st|nd|rd|s)?(?![a-zA-Z0-9_])")
_SIGN = re.compile(r"[\\^_={}]")
_TEX_SIGN = re.compile(r"[\\^{}]")
_COMMAND = re.compile(r"\\[a-zA-Z]+(?:\{[^{}]*\})?")
_BRACES = re.compile(r"\\.|[{}\n]", re.DOTALL)
_CLOSES = {"\\(": "\\)", "\\[": "\\]", "$$": "$$", "$": "$"}
_DIGITS = tuple("0123456789")
_DOLLARS = 20  # within a formula
_SCHEME = re.compile(r"(?<![a-zA-Z0-9_])https?\Z")
_ADDRESS = re.compile(r"://[^\s<>\"`[\]|*]{1,2041}")
_LONGEST_BOX = 1000  # characters within \boxed{}
_LONGEST = 4000  # characters of a formula within a line
_DISPLAY = re.compile(r"(`+)[^`]*\1|\\(?:begin|end)\{[^{}]*\}|\\.|\$\$")


def mathematics(parser: MarkdownIt) -> None:
    """A plugin for CommonMark's parser."""
    parser.inline.ruler.before("escape", "address", _address)
    parser.inline.ruler.before("escape", "formula", _formula)
    parser.inline.ruler.at("escape", _escape)
    parser.inline.ruler.at("emphasis", _emphasis)
    within = ["paragraph", "reference", "blockquote"]  # what the block may interrupt
    parser.block.ruler.before("paragraph", "display", _display, {"alt": [*within, "list"]})
    parser.block.ruler.at("list", _list, {"alt": within})
    parser.disable("lheading")  # a line under a sum is no heading's


def _emphasis(state: StateInline, silent: bool) -> bool:
    start = state.pos
    if not emphasis.tokenize(state, silent):
        return False
    opens, closes = _may(state.src, start, state.pos)
    for delimiter in state.delimiters[start - state.pos :]:
        delimiter.open = delimiter.open and opens
        delimiter.close = delimiter.close and closes
    return True


def _may(source: str, start: int, end: int) -> tuple[bool, bool]:
    """Whether the run of `*` or `_` may begin emphasis, and whether it may end it."""
    run, before = source[start:end], source[max(0, start - 1) : start]
    after = source[end : end + 1]
    if before in tuple("([{") and after in tuple(")]}"):  # count(*)
        return False, False
    if before + after == "><":  # <1,2>*<3,4>
        return False, False
    if not (_ENDS.match(before) and _BEGINS.match(source, end)):
        earlier = source[max(0, start - 40) : start]
        ahead = re.search(r"\d +$|(?:\.\.|[\u2026\u22ef])$", earlier)  # 2 *x, ...*n
        number = ahead and _NUMBER.match(source, end)
        bracket = re.search(r"[)\]}] +$", earlier) and _DIGIT.match(source, end)  # (a) *(2
        dots = _ENDS.match(before) and _DOTS.match(source, end)  # (n - 1)*...
        pattern = run == "*" and "." in (before, after)  # [a-z].* or *.py
        return not (number or bracket or dots or pattern), True
    if run[0] == "_":  # a_{n}
        return False, False
    left, right = re.match(_LETTER, before), re.compile(_LETTER).match(source, end)
    # **C**entral, *word*s: what was begun with this word may end in it; but **x**n is a power.
    word = source[max(0, start - 44) : start]
    mark = re.escape(run)
    power = re.search(rf"\*{_WORD}$", word) and re.compile(rf"{_WORD}(?!{_WORD})").match(
        source, end
    )
    begun = None if power else re.search(rf"(?:^|[^*]){mark}[^\s*]{{1,40}}$", word)
    if begun and _ENDS.match(begun[0]):
        begun = re.search(rf"[^*]{mark}(?:{_LETTER}){{2,40}}$", word) if len(run) > 1 else None
    if len(run) == 1:
        return False, bool(left and right and begun)
    if not re.match(_WORD, before):  # (a + b)**n, but (as said)**Answer:**
        return not _NUMBER.match(source, end), bool(begun)
    inside = re.compile(rf"(?:{_LETTER}){{2,40}}{mark}").match(source, end)
    return bool(left and right and inside), bool(begun)


def _escape(state: StateInline, silent: bool) -> bool:
    if state.src[state.pos] != "\\" or state.src[state.pos + 1 : state.pos + 2] not in tuple(_TEX):
        return escape(state, silent)
    if not silent:
        state.pending += state.src[state.pos : state.pos + 2]
    state.pos += 2
    return True


def _address(state: StateInline, silent: bool) -> bool:
    """What stands behind `https`: none of its signs is Markdown's or TeX's."""
    if not _SCHEME.search(state.src[max(0, state.pos - 6) : state.pos]):
        return False
    found = _ADDRESS.match(state.src, state.pos)
    if found is None:
        return False
    text = found[0]
    closing = text.count(")") - text.count("(")
    while text:  # punctuation at the end is the sentence's, a bracket too if nothing opened it
        if text[-1] == ")" and closing > 0:
            closing -= 1
        elif text[-1] not in ".,;:!?'_~":
            break
        text = text[:-1]
    if not silent:
        state.pending += text
    state.pos += len(text)
    return bool(text)


def _formula(state: StateInline, silent: bool) -> bool:
    end = _formula_end(state.src, state.pos)
    if not end:
        return False
    if not silent:
        state.push("formula", "", 0).content = state.src[state.pos : end]
    state.pos = end
    return True


def _formula_end(source: str, start: int) -> int:
    """Where a formula that begins at `start` ends; 0: none does."""
    found = _OPENS.match(source, start)
    if found is None:
        return 0
    opening, begin = found[0], found.end()
    if opening == "\\boxed{":
        return _braces_end(source, begin)
    close = _CLOSES.get(opening, opening.replace("\\begin", "\\end"))
    end = source.find(close, begin, begin + _LONGEST)
    if opening == "$":
        end = _dollar(source, begin, end)
    if end < 0:  # of several lines it runs to their end, as `_display` has it
        runs = opening not in ("$", "\\(") and (
            not source[:start].strip() or "\n" in source[begin:]
        )
        return len(source) if runs else 0
    if opening == "$" and not _is_formula(source, start, end):
        return 0
    return end + len(close)


def _is_formula(source: str, start: int, end: int) -> bool:
    """Is what stands between two dollars a formula? Else they are amounts of money, or names."""
    inner = source[start + 1 : end]
    apart = re.match(r"[a-zA-Z0-9_$]", source[max(0, start - 1) : start])
    if apart or not inner.strip() or "\n" in inner or source[end + 1 : end + 2] in _DIGITS:
        return False
    if inner.strip() != inner:  # $ x = 5 $, but not $5 and $7
        bare = _COMMAND.sub("", inner)
        padded = inner[0] == inner[-1] == " " and not _has_words(bare)
        return padded and _SIGN.search(inner) is not None
    if not _AFTER.match(source, end + 1):  # $2^n$fold, but not $HOME=$PATH
        return _TEX_SIGN.search(inner) is not None
    return _SIGN.search(inner) is not None or not _has_words(inner)


def _has_words(text: str) -> bool:
    letters = _ALNUM.sub(lambda one: one[0] if one[0].isalpha() else "0", text)
    return _WORDS.search(letters) is not None


def _dollar(source: str, begin: int, end: int) -> int:
    """The dollar that ends a formula: not an amount's, nor one of a text within braces."""
    deep, seen = 0, begin
    for _ in range(_DOLLARS):
        if end < 0:
            break
        if source[end - 1] != "\\":
            deep += source.count("{", seen, end) - source.count("}", seen, end)
            deep -= source.count("\\{", seen, end) - source.count("\\}", seen, end)
            if deep <= 0:
                return end
            seen = end
        end = source.find("$", end + 1, begin + _LONGEST)
    return -1


def _braces_end(source: str, begin: int) -> int:
    """Where the braces end that are open at `begin`, on the same line; 0: nowhere."""
    depth = 1
    for found in _BRACES.finditer(source, begin, begin + _LONGEST_BOX):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if found[0] == "\n" or not depth:
            return 0 if depth else found.end()
    return 0


def _display(state: StateBlock, start: int, end_line: int, silent: bool) -> bool:
    """Lines from one that leaves a formula open to its end or a blank line: no lists, no rules."""
    if state.is_code_block(start):
        return False
    close = _left_open(state.src[state.bMarks[start] + state.tShift[start] : state.eMarks[start]])
    if close is None:
        return False
    if silent:
        return True
    line = start + 1
    while line < end_line and not state.isEmpty(line) and state.sCount[line] >= state.blkIndent:
        line += 1
        if close in state.src[state.bMarks[line - 1] : state.eMarks[line - 1]]:
            break
    token = state.push("paragraph_open", "p", 1)
    token.map = [start, line]
    token = state.push("inline", "", 0)
    token.content = state.getLines(start, line, state.blkIndent, False).rstrip()
    token.map, token.children = [start, line], []
    state.push("paragraph_close", "p", -1)
    state.line = line
    return True


def _left_open(line: str) -> str | None:
    """What ends the formula that a line begins and does not end."""
    close: str | None = None
    line = line.strip()
    for found in _DISPLAY.finditer(line):
        if close is not None:
            close = None if found[0] == close else close
        elif found[0] == "\\[":
            close = "\\]"
        elif found[0] == "$$" and (found.start() == 0 or found.end() == len(line)):
            close = "$$"
        elif found[0].startswith("\\begin"):
            close = found[0].replace("\\begin", "\\end")
    return close


def _list(state: StateBlock, start: int, end_line: int, silent: bool) -> bool:
    text = state.src[state.bMarks[start] + state.tShift[start] : state.eMarks[start]]
    if re.match(r"\+ *\d", text):  # a sum that goes on
        return False
    return list_block(state, start, end_line, silent)
