"""What a model writes, on its way to a terminal: lines, and blocks of Markdown."""

import re
from collections.abc import Iterator

from markdown_it import MarkdownIt
from rich.cells import cell_len

from mlx_cerebrum.chat.maths import mathematics


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


def wrap(text: str, width: int) -> Iterator[tuple[int, int]]:
    """`(start, end)` of each line of `text` in `width` cells; a line's break is not in it.

    Only the last line can change when text is added.
    """
    at = 0
    for line in text.split("\n"):
        yield from ((at + start, at + end) for start, end in _wrap_line(line, width))
        at += len(line) + 1


def _wrap_line(line: str, width: int) -> Iterator[tuple[int, int]]:
    start, used = 0, 0
    for word in re.finditer(r"\s*\S+", line):
        length = cell_len(word[0])
        if used + length <= width:
            used += length
            continue
        begin = word.start()
        if used:  # what separates two words stays at the end of the line
            begin = word.end() - len(word[0].lstrip())
            yield start, begin
            start, used = begin, 0
        for index in range(begin, word.end()):
            cells = cell_len(line[index])
            if used + cells > width and used:
                yield start, index
                start, used = index, 0
            used += cells
    yield start, len(line)


def first_difference(texts: tuple[str, str], done: tuple[bool, bool]) -> int | None:
    """Where two growing texts first differ; None while that is not known."""
    shortest = min(map(len, texts))
    for index in range(shortest):
        if texts[0][index] != texts[1][index]:
            return index
    ended = any(len(text) == shortest and over for text, over in zip(texts, done, strict=True))
    return shortest if ended and len(texts[0]) != len(texts[1]) else None
