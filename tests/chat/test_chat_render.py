"""What a person sees of an answer: nothing lost, nothing obeyed, whatever the size."""

import io
import time
import unicodedata

import pytest
from conftest import slow
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console, ConsoleDimensions
from terminal import Terminal

from mlx_cerebrum.chat import drawing
from mlx_cerebrum.chat.columns import Columns
from mlx_cerebrum.chat.drawing import MarkdownStream, Region
from mlx_cerebrum.chat.render import AnswerMarkdown, finished, markdown_parser
from mlx_cerebrum.chat.session import Answer
from mlx_cerebrum.chat.wording import first_difference
from mlx_cerebrum.text import clean

LONG = """# A title

A paragraph that goes on and on until it wraps at the end of the line, and then some.
Its second line.

- item one
- item two, which is long enough to wrap on a small terminal like this one here
  - nested
- a [link](http://example.org/path)

1. one
2. two

```python
def f(x):
    return x + 1
{code}
```

| a | b |
|---|---|
| 1 | 2 |

[1]: http://example.org/reference

<script>alert(1)</script> & the end 漢字漢字漢字漢字漢字漢字漢字漢字漢字漢字漢字漢字 👍🏽👍🏽
""".replace("{code}", "\n".join(f"line_{i} = {i}" for i in range(30)))


@pytest.fixture(autouse=True)
def every_piece_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "REDRAW_SECONDS", 0.0)
    monkeypatch.setattr(drawing, "REDRAW_SHARE", 1e9)
    monkeypatch.delenv("XTERM_VERSION", raising=False)


def console_on(terminal: Terminal) -> Console:
    class Wire(io.StringIO):
        def write(self, data: str) -> int:
            terminal.feed(data)
            return len(data)

    return Console(
        file=Wire(),
        force_terminal=True,
        color_system="standard",
        highlight=False,
        width=terminal.columns,
        height=terminal.rows,
    )


def resize(terminal: Terminal, console: Console, columns: int, rows: int) -> None:
    terminal.resize(columns, rows)
    console.size = ConsoleDimensions(columns, rows)


def streamed(text: str, terminal: Terminal, size: int = 3) -> str:
    stream = MarkdownStream(Region(console_on(terminal)))
    for at in range(0, len(text), size):
        stream.add(text[at : at + size])
    stream.finish()
    assert terminal.unknown == []
    return terminal.text


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (40, 15), (20, 5)])
@slow
def test_streamed_in_pieces_is_what_is_shown_at_once(columns: int, rows: int) -> None:
    """Finished blocks are printed once, the open one is redrawn; nothing is lost or doubled."""
    text = streamed(LONG, Terminal(columns, rows))
    whole = streamed(LONG, Terminal(columns, 1000), len(LONG))

    def without_empty_lines(text: str) -> list[str]:  # between blocks there may be one more
        return [line for line in text.split("\n") if line.strip()]

    assert without_empty_lines(text) == without_empty_lines(whole)
    assert "\n\n\n" not in text
    for i in range(30):
        assert text.count(f"line_{i} = {i}\n") == 1


def test_nothing_of_the_text_is_hidden() -> None:
    text = streamed(LONG, Terminal(100, 50))
    for shown in ("<script>alert(1)</script>", "http://example.org/path", "example.org/reference"):
        assert shown in text
    lines = text.split("\n")
    assert lines[lines.index("Its second line.") - 1].startswith("A paragraph")  # a break is one


def test_a_block_taller_than_the_screen_shows_its_end_then_all() -> None:
    terminal = Terminal(40, 10)
    stream = MarkdownStream(Region(console_on(terminal)))
    stream.add("```\n")
    for i in range(50):
        stream.add(f"row {i}\n")
    assert "row 49" in terminal.screen
    assert terminal.text.count("row 49") == 1
    stream.add("```\n\nAfter.")
    stream.finish()
    shown = [line.strip() for line in terminal.text.split("\n")]
    assert [line for line in shown if line] == [*(f"row {i}" for i in range(50)), "After."]


@pytest.mark.parametrize("size", [(30, 12), (100, 40), (25, 5)])
@slow
def test_resized_while_it_streams(size: tuple[int, int]) -> None:
    terminal = Terminal(60, 20)
    console = console_on(terminal)
    stream = MarkdownStream(Region(console))
    words = [f"word{i}" for i in range(200)]
    stream.add("First block.\n\n")
    for index, word in enumerate(words):
        stream.add(word + " ")
        if index == 20:  # a few lines are on the screen
            resize(terminal, console, *size)
    stream.finish()
    shown = terminal.text.split()
    assert shown[:2] == ["First", "block."]
    assert shown[-len(words) :] == words
    if terminal.rows > 5:  # what has scrolled away by then can't be drawn over
        assert len(shown) == 2 + len(words)


def test_without_wrapping_anew_nothing_above_is_erased(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real xterm leaves its lines alone: going up too far would erase what is finished."""
    monkeypatch.setenv("XTERM_VERSION", "XTerm(390)")
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = Terminal(60, 20)
    console = console_on(terminal)
    stream = MarkdownStream(Region(console))
    stream.add("Finished.\n\n" + "word " * 40)
    terminal.columns = 30  # what is shown stays as it is
    console.size = ConsoleDimensions(30, 20)
    stream.add("more")
    assert terminal.text.startswith("Finished.\n")


def test_what_others_wrote_below_stays() -> None:
    """After Ctrl-Z and `fg`: what the shell wrote is not drawn over, and the answer goes on."""
    terminal = Terminal(60, 20)
    region = Region(console_on(terminal))
    stream = MarkdownStream(region)
    stream.add("word " * 30)
    terminal.feed("$ fg\n")
    region.leave()
    stream.add("end")
    stream.finish()
    before, shell, after = terminal.text.partition("$ fg\n")
    assert before.split() == ["word"] * 30
    assert after.split() == ["word"] * 30 + ["end"]
    assert shell


HOSTILE = "\x1b[2J\x1b]0;title\x07\x9b31m\x00\x08\x7f\u202eabc\u2066 &#x202e;def \rback"


def test_what_a_terminal_would_obey_never_reaches_it() -> None:
    terminal = Terminal(80, 24)
    text = streamed(
        f"safe {HOSTILE} `{HOSTILE}` *{HOSTILE}* [{HOSTILE}](http://a.b/{HOSTILE})", terminal
    )
    assert text.startswith("safe \u241b[2J\u241b]0;title\u2407")
    assert not any(unicodedata.category(c) in ("Cc", "Cf") for c in text.replace("\n", ""))


@given(st.text())
@settings(deadline=None)
def test_clean_text_has_no_controls(text: str) -> None:
    shown = clean(text)
    assert not any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" for c in shown)
    assert clean(shown) == shown


@given(st.text(st.sampled_from("ab\n -*>`#|1.\t<[]()&;\\_~=+!:\u6f22"), max_size=80))
@settings(deadline=None, max_examples=150)
@slow
def test_any_markdown_can_be_shown(text: str) -> None:
    """Whatever it is: no exception, and all words are there in the end."""
    shown = streamed(text, Terminal(12, 6))
    for word in ("a", "b", "\u6f22"):
        assert shown.count(word) >= min(1, text.count(word))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("2*(3+4)*5 and (a+b)*c*(d+e)", "2*(3+4)*5 and (a+b)*c*(d+e)"),
        ("**x**n + y**n = z**n** a*b *c*", "x**n + y**n = z**n a*b c"),
        ("count(*) sum(*) *f(x)* **g**(y)", "count(*) sum(*) f(x) g(y)"),
        ("**C**PU *word*s \u4e2d**\u52a0**\u4e2d", "CPU words \u4e2d\u52a0\u4e2d"),
        (
            r"\(\a_1 * b*c\) \\ \{1\,2\} \*no\* $5 *or* $6",
            r"\(\a_1 * b*c\) \\ \{1\,2\} *no* $5 or $6",
        ),
        ("\U0001d465*\U0001d466*\U0001d467 2 *x* 3 (a) *2* 5", None),
        ("{a}_{n} + {b}_{n} [x]_0 + [y]_1 _so_", "{a}_{n} + {b}_{n} [x]_0 + [y]_1 so"),
        ("*so* \\[\n  a*b\n- 2", "so \\[\n  a*b\n- 2"),
        ("12\n+ 7\n+ 30", "12\n+ 7\n+ 30"),
    ],
)
def test_products_and_tex_are_not_markdowns(text: str, shown: str | None) -> None:
    for size in (len(text), 3):
        assert streamed(text, Terminal(80, 24), size) == (shown or text)


def test_a_formula_of_several_lines_stands_alone_where_it_fits() -> None:
    text = r"So $\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}$, and on."
    assert streamed(text, Terminal(80, 24)) == "So\n⎛ 1  2 ⎞\n⎝ 3  4 ⎠,\nand on."
    assert "\\begin{pmatrix}" in streamed(text, Terminal(16, 24)).replace("\n", "")


def test_an_answer_that_goes_on_begins_with_its_last_block() -> None:
    terminal = Terminal(60, 20)
    stream = MarkdownStream(Region(console_on(terminal)), "Done.\n\n```python\nx = 1\ny")
    stream.add(" = 2\n```\n\nThen *so*.")
    stream.finish()
    assert terminal.text == "  x = 1\n  y = 2\n\nThen so."


def test_without_unicode_formulas_are_as_written() -> None:
    text = r"So $\sqrt{2}$."
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), width=80)
    with console.capture() as shown:
        console.print(AnswerMarkdown(text))
    assert shown.get().strip() == text


@slow
def test_many_marks_take_linear_time() -> None:
    """Bounds that only a square would pass."""
    for mark in (
        "2*",
        "*a",
        "**a**b",
        "(*",
        r"\[",
        r"\begin{a}",
        "$x",
        "a_{",
        r"\(",
        "`$$ ",
        "$x{",
        r"\boxed{",
    ):
        started = time.monotonic()
        markdown_parser().parse(mark * 5000)
        assert time.monotonic() - started < 10, mark


def contents(text: str) -> list[str]:
    return [token.content for token in markdown_parser().parse(text) if token.content]


PIECES = [*"ab\n -*>`#|1.", r"\[", r"\]", "$$", "+ 1", r"\begin{a}", r"\end{a}"]


@given(st.lists(st.sampled_from(PIECES), max_size=60).map("".join), st.integers(0, 60))
@settings(deadline=None, max_examples=300)
@slow
def test_finished_blocks_stay_as_they_are(text: str, shown: int) -> None:
    """What is printed for good early reads as it does in the whole text."""
    cut, _ = finished(text[:shown], markdown_parser())
    assert contents(text[:cut]) + contents(text[cut:]) == contents(text)


def test_first_difference() -> None:
    assert first_difference(("abc", "abd"), (False, False)) == 2
    assert first_difference(("abc", "ab"), (False, False)) is None  # may still be the same
    assert first_difference(("abc", "ab"), (False, True)) == 2
    assert first_difference(("abc", "abc"), (True, True)) is None
    assert first_difference(("", ""), (True, True)) is None


def sides(terminal: Terminal, width: int) -> tuple[str, str]:
    """What stands in the two columns, a blank between lines."""
    lines = terminal.text.split("\n")
    left = " ".join(line[:width].strip() for line in lines)
    return left, " ".join(line[width + 3 :].strip() for line in lines)


@pytest.mark.parametrize("rows", [24, 8])
@slow
def test_columns_lose_nothing_and_mark_the_first_difference(rows: int) -> None:
    terminal = Terminal(80, rows)
    same = "Both say **this** much: " + " ".join(f"w{i}" for i in range(40)) + " and "
    texts = (
        same + " ".join(f"left{i}" for i in range(120)),
        same + " ".join(f"right{i}" for i in range(60)) + "\n\n- end\x1b[2J",
    )
    answers = (Answer("one"), Answer("two"))
    columns = Columns(Region(console_on(terminal)), answers)
    for at in range(0, max(map(len, texts)), 9):
        for answer, text in zip(answers, texts, strict=True):
            answer.text = text[: at + 9]
            answer.reason = "stop" if at + 9 >= len(text) else ""
        columns.draw()
        assert len(terminal.lines) - terminal.top <= rows
    columns.draw(final=True)
    left, right = sides(terminal, 38)
    expected = texts[0].replace("**", "").split()
    assert left.split()[: len(expected) + 2] == ["1", "one", *expected]
    assert [w for w in right.split() if w.startswith("right")] == [f"right{i}" for i in range(60)]
    assert "\u2022 end\u241b[2J" in right
    marked = [line for line in terminal.text.split("\n") if "\u2260" in line]
    assert len(marked) == 1
    assert "left0" in marked[0][:38]
    assert "right0" in marked[0][38:]
    assert terminal.unknown == []


@pytest.mark.parametrize("rows", [40, 12])
def test_columns_are_wrapped_anew_when_the_window_changes(rows: int) -> None:
    terminal = Terminal(100, rows)
    answers = (Answer("one"), Answer("two"))
    console = console_on(terminal)
    columns = Columns(Region(console), answers)
    for i in range(100):
        answers[0].text += f"l{i} "
        answers[1].text += f"*r{i}* "
        if i % 3 == 0:
            columns.draw()
        if i == 60:
            resize(terminal, console, 70, rows)
    columns.draw(final=True)
    left, right = sides(terminal, 33)
    if rows == 40:  # nothing had scrolled away: all of it is as if it had been so from the start
        assert left.split()[2:-3] == [f"l{i}" for i in range(100)]
        assert right.split()[2:-3] == [f"r{i}" for i in range(100)]
    words = set(terminal.text.split())
    assert words >= {f"{side}{i}" for side in "lr" for i in range(100)}


MARKS = "\n -*>`#|1.\t<[]()&;\\_~=+!:\u6f22"


@example(("", ">z"), 1, [(8, 12)])
@example(("", ">" * 9 + "zz"), 99, [])
@given(
    st.tuples(*(st.text(st.sampled_from(own + MARKS), max_size=60) for own in ("jjj", "zzz"))),
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(8, 40), st.integers(3, 12)), max_size=3),
)
@settings(deadline=None, max_examples=100)
@slow
def test_any_two_texts_can_be_shown_side_by_side(
    texts: tuple[str, str], size: int, sizes: list[tuple[int, int]]
) -> None:
    """Whatever they are, and however often the window changes: all of both is there in the end."""
    terminal = Terminal(30, 8)
    console = console_on(terminal)
    answers = (Answer("one"), Answer("two"))
    columns = Columns(Region(console), answers)
    for at in range(0, max(map(len, texts)) + 1, size):
        for answer, text in zip(answers, texts, strict=True):
            answer.text = text[: at + size]
            answer.reason = "stop" if at + size >= len(text) else ""
        columns.draw()
        if sizes:
            resize(terminal, console, *sizes.pop())
    columns.draw(final=True)
    for text, letter in zip(texts, "jz", strict=True):
        assert terminal.text.count(letter) >= min(1, text.count(letter))


def test_columns_of_a_tiny_window() -> None:
    terminal = Terminal(20, 6)
    answers = (Answer("one", "\u6f22\u5b57" * 9, "stop"), Answer("two", "```\ncode\n```", "stop"))
    Columns(Region(console_on(terminal)), answers).draw(final=True)
    assert terminal.text.count("\u6f22") == 9
    assert "code" in terminal.text
