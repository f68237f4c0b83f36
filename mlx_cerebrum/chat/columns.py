"""Two answers side by side, as they come."""

from collections.abc import Sequence
from itertools import zip_longest
from time import perf_counter

from rich.style import Style
from rich.text import Text

from mlx_cerebrum.chat.drawing import Line, Pacer, Region
from mlx_cerebrum.chat.render import AnswerMarkdown, finished, markdown_parser
from mlx_cerebrum.chat.session import Answer
from mlx_cerebrum.chat.wording import figures, first_difference
from mlx_cerebrum.text import clean

_MARKED = Style(bold=True, reverse=True)


class Columns:
    """Draws both answers anew as they grow and when the window changes its size.

    Rows are printed for good when they scroll away. Where the answers first differ a sign stands
    between them, and the words are marked.
    """

    def __init__(self, region: Region, answers: Sequence[Answer]) -> None:
        self._region = region
        self._answers = answers
        self._columns = [_Column(region, answer) for answer in answers]
        self._pacer = Pacer()
        plain = not region.console.encoding.lower().startswith("utf")
        self._rule, self._unlike = ("|", "#") if plain else ("\u2502", "\u2260")
        self._titles = 1  # rows of them that are still to be printed for good
        self._marked = False  # for good

    def draw(self, final: bool = False) -> None:
        """Show what has come since. `final`: all of it, for good."""
        if not (final or self._pacer.due()):
            return
        started = perf_counter()
        width = max(1, (self._region.console.width - 3) // 2)
        lines, settled = zip(*(column.lines(width, final) for column in self._columns), strict=True)
        pairs = list(zip_longest(*lines, fillvalue=[]))
        count = len(pairs)
        if not final:
            over = [bool(answer.reason) for answer in self._answers]
            stays = min(count if o else n for n, o in zip(settled, over, strict=True))
            # The titles and the figures are rows too, and the cursor stands below them.
            scrolled = count + self._titles + 2 - self._region.console.height
            count = max(0, min(stays, scrolled - self._titles))
        at = None if self._marked else self._difference(pairs)
        names = (f"{number} {answer.model}" for number, answer in enumerate(self._answers, 1))
        rows = [self._row([Text(clean(n), "bold") for n in names], width)] * self._titles
        rows += [self._pair(pair, width, at == number) for number, pair in enumerate(pairs)]
        kept = count + self._titles if count else 0
        if count:
            self._titles, self._marked = 0, self._marked or (at is not None and at < count)
        for column in self._columns:
            column.printed(count)
        notice = self._region.styles["notice"]
        paces = self._row([Text(figures(answer), notice) for answer in self._answers], width)
        if final:
            self._region.draw([], [*rows, paces])
        else:
            self._region.draw([*rows[kept:], paces], rows[:kept])
        self._pacer.drawn(started)

    def _difference(self, pairs: Sequence[tuple[Line, Line]]) -> int | None:
        """The row where the answers first differ; None while that is not known."""
        one, other = self._answers
        if first_difference((one.text, other.text), (bool(one.reason), bool(other.reason))) is None:
            return None
        unlike = (at for at, (left, right) in enumerate(pairs) if _text(left) != _text(right))
        return next(unlike, None)

    def _pair(self, pair: tuple[Line, Line], width: int, marked: bool) -> Line:
        texts = [Text.assemble(*((s.text, s.style or "") for s in line)) for line in pair]
        if marked:
            at = first_difference((texts[0].plain, texts[1].plain), (True, True)) or 0
            begin = texts[0].plain[:at].rfind(" ") + 1
            for text in texts:
                end = text.plain.find(" ", at)
                text.stylize(_MARKED, begin, len(text) if end < 0 else end)
        return self._row(texts, width, self._unlike if marked else self._rule)

    def _row(self, texts: Sequence[Text], width: int, rule: str = "") -> Line:
        left, right = texts
        left.truncate(width, pad=True)
        right.truncate(width)
        row = Text.assemble(left, f" {rule or self._rule} ", right, no_wrap=True)
        return self._region.lines(row)[0]


class _Column:
    """An answer as lines of Markdown; what has been printed for good is left out."""

    def __init__(self, region: Region, answer: Answer) -> None:
        self._region = region
        self._answer = answer
        self._parser = markdown_parser()
        self._taken = 0  # characters of the answer
        self._blocks: list[tuple[str, bool]] = []  # finished: text, whether it goes on with a list
        self._pending, self._in_list = "", False
        self._width = 0
        self._drawn: dict[int, list[Line]] = {}  # blocks of that width
        self._first = 0  # block that is not all printed
        self._skip = 0  # lines of it that are

    def lines(self, width: int, final: bool) -> tuple[list[Line], int]:
        """What is to be shown, and how many lines of it can't change any more."""
        if width != self._width:  # a block that is printed in part is shown again, whole
            self._width, self._drawn, self._skip = width, {}, 0
        self._take()
        shown = [line for at in range(self._first, len(self._blocks)) for line in self._block(at)]
        settled = len(shown) - self._skip
        shown += self._markdown(self._pending, bool(self._blocks) and not self._in_list)
        return shown[self._skip :], settled

    def printed(self, count: int) -> None:
        """So many of these lines have been printed for good."""
        self._skip += count
        while self._first < len(self._blocks) and self._skip >= len(self._block(self._first)):
            self._skip -= len(self._block(self._first))
            self._drawn.pop(self._first, None)
            self._first += 1

    def _take(self) -> None:
        self._pending += clean(self._answer.text[self._taken :])
        self._taken = len(self._answer.text)
        cut, in_list = finished(self._pending, self._parser)
        if cut:
            self._blocks.append((self._pending[:cut], self._in_list))
            self._pending, self._in_list = self._pending[cut:], in_list

    def _block(self, at: int) -> list[Line]:
        if at not in self._drawn:
            text, in_list = self._blocks[at]
            self._drawn[at] = self._markdown(text, at > 0 and not in_list)
        return self._drawn[at]

    def _markdown(self, text: str, apart: bool) -> list[Line]:
        if not text.strip():
            return []
        lines = self._region.lines(AnswerMarkdown(text, self._region.styles), self._width)
        return [[], *lines] if apart and lines else lines


def _text(line: Line) -> str:
    return "".join(segment.text for segment in line)
