"""Formulas and code as they are set: what is drawn, what stays as written, and the bounds."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import slow

from mlx_cerebrum.typeset import code, macros, tex, worker
from mlx_cerebrum.typeset.plain import plain
from mlx_cerebrum.typeset.tex import Element

CASES = json.loads((Path(__file__).parents[1] / "maths_cases.json").read_text("utf-8"))
FORMULAS = [formula for case in CASES for formula in case["formulas"]]


@pytest.fixture(scope="module", autouse=True)
def ended() -> Iterator[None]:
    yield
    worker.close()


def every(element: Element) -> Iterator[Element]:
    yield element
    for child in element.children:
        if isinstance(child, Element):
            yield from every(child)


def read(element: Element) -> str:
    return "".join(c if isinstance(c, str) else read(c) for c in element.children)


def made(source: str) -> Element:
    found = worker.formula(source)
    assert found is not None, source
    return found


@pytest.mark.parametrize("source", FORMULAS)
def test_all_of_a_formula_is_allowed_and_none_of_its_tex_is_left(source: str) -> None:
    formula = made(source)
    for element in every(formula):
        assert element.name in tex.ELEMENTS
        assert element.attributes.keys() <= tex.ATTRIBUTES | {"style"}
        for style in filter(None, element.attributes.get("style", "").split(";")):
            assert style.partition(":")[0] in tex.STYLES
    assert not set(read(formula)) & set("&\\")
    assert "_" not in read(formula).replace("\u23df", "")


# What else the converter knows: each must be allowed, or the list lacks something.
MORE = r"""
\cfrac{1}{1+x} | \genfrac(){0pt}{0}{1}{2} | \xleftarrow[a]{b} | \xrightarrow{f} |
\raisebox{1pt}{x} |
\mathrel{R} | \operatorname*{argmax}_x | \mathring{A} | \vphantom{x}\hphantom{x} | \phantom{x} |
\kern1pt x | \hspace{1cm} x | \begin{array}{cc}\hline a&b\\ \hline\end{array} |
\begin{Vmatrix}a\end{Vmatrix} | \begin{Bmatrix}b\end{Bmatrix} | \begin{gathered}a\\b\end{gathered} |
\begin{dcases}a\\b\end{dcases} | \begin{rcases}a\\b\end{rcases} | \scriptstyle x |
\overbrace{a}^{b} |
\textbf{a} \textit{b} \emph{c} \textrm{d} | \color{red} x | \textcolor{blue}{x} | \not= x |
\bigl( \Big[ \bigg\{ \bigr] | \widehat{AB} \widetilde{AB} \overrightarrow{AB} |
\underline{x} | \stackrel{!}{=} | \overset{?}{=} | \underset{x}{\min} | n \choose k | a \over b |
\mathbb{R} \mathcal{L} \mathfrak{g} \mathscr{F} \mathsf{x} \mathtt{x} \boldsymbol{\alpha} |
\iint \oint \bigcup \coprod | \sum\limits_{i=1}^n | \substack{i<n \\ j<m} | \mbox{ hello }
"""


@pytest.mark.parametrize("source", MORE.split("|"))
def test_what_the_converter_knows_is_allowed(source: str) -> None:
    made(f"\\[{source}\\]")


def test_align_has_columns_and_a_box_is_one() -> None:
    table = next(
        e for e in every(made("\\begin{align*}a&=b\\\\c&=d\\end{align*}")) if e.name == "mtable"
    )
    assert len(table.children) == 2
    assert [e.name for e in every(made(r"$\boxed{5}$"))] == ["math", "menclose", "mn"]
    assert made(r"\[x\]").attributes["display"] == "block"
    assert "display" not in made(r"\(x\)").attributes


@pytest.mark.parametrize(
    "source",
    [
        r"$\href{javascript:alert(1)}{x}$",
        r"$\url{x}$",
        r"$\eqref{a}$",
        r"\begin{align}x\label{a}\end{align}\ref{a}",
        r"$\class{a}{x}$",
        r"$\style{position:fixed}{x}$",
        r"$\newcommand{\x}{\x\x}\x$",
        r"$\let\x\frac$",
        r"$\includegraphics{x}$",
        r"$\unknown$",
        r"$a & b$",
        r"$\frac{1}$",
        "$$ $$",
        "no formula",
        "\\begin{align}x\\end{align*}",
        f"${'x' * tex.LONGEST}$",
    ],
)
def test_what_is_not_set_stays_as_written(source: str) -> None:
    assert worker.formula(source) is None


def test_space_between_rows_is_no_text() -> None:
    rows = r"\begin{bmatrix} a \\[4pt] b \\ [-.5em] c \\*[1ex] d \\ [e] \end{bmatrix}"
    assert plain(made(f"${rows}$")) == ["⎡  a  ⎤", "⎢  b  ⎥", "⎢  c  ⎥", "⎢  d  ⎥", "⎣ [e] ⎦"]


def test_text_is_text() -> None:
    assert "<b>" in read(made(r"$\text{<b>} < x$"))


HOSTILE = [
    "(" * 60,
    "[" * 60,
    r"\sin(" * 40,
    "{" * 1900 + "x" + "}" * 1900,
    r"\frac1" * 600 + "2",
    r"\frac{1}{" * 350 + "1" + "}" * 350,
    r"\boxed{" * 400 + "1" + "}" * 400,
    r"\begin{matrix}" * 140 + "1" + r"\end{matrix}" * 140,
    r"\sqrt " * 600 + "x",
    r"\left(" * 300 + "x" + r"\right)" * 300,
    r"\mathbf " * 400 + "x",
    "x'" + "'" * 3000,
    "&" * 3000,
]


@pytest.mark.parametrize("source", HOSTILE)
@pytest.mark.one_in(4)
def test_hostile_formulas_end_soon_and_the_next_is_set(source: str) -> None:
    started = time.process_time()
    found = worker.formula(f"${source}$")
    assert found is None or len(list(every(found))) <= tex.MOST
    assert worker.formula(f"${source}$") == found  # remembered, not tried again
    assert time.process_time() - started < 2  # of this process: the work is the other's
    made("$x^2$")


def test_a_worker_that_was_killed_is_started_again() -> None:
    own = worker.Worker()
    assert own.ask(("tex", "$x$")) != b"null"
    assert own._child is not None
    os.kill(own._child.pid, 9)
    own._child.wait()
    own.ask(("tex", "$y$"))
    assert own.ask(("tex", "$z$")) != b"null"
    own.close()


def test_those_who_wait_for_words_come_first() -> None:
    own = worker.Worker()
    own.ask(("tex", "$x$"))
    assert own._child is not None
    assert os.getpriority(os.PRIO_PROCESS, own._child.pid) == min(19, os.nice(0) + 10)
    own.close()


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "KEPT", 3)
    own = worker.Worker()
    for number in range(10):
        own.ask(("tex", f"${number}$"))
    assert len(own._kept) == 3
    own.close()


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        (r"\frac{x^2}{y_1}", "x²/y₁"),
        (r"\frac{1}{2x}", "1/(2x)"),
        (r"\sin\frac{x}{2}", "sin (x/2)"),
        (r"\frac{d^2y}{dx^2}", "d²y/dx²"),
        (r"\frac{a/b}{c}", "(a/b)/c"),
        (r"\frac{1}{2}\cdot 3", "1/2 · 3"),
        (r"\frac{3}{4}\text{ cup}", "3/4 cup"),
        (r"\frac{5!}{2!\,3!}", "5!/(2! 3!)"),
        (r"n!/(k!(n-k)!)", "n!/(k!(n - k)!)"),
        (r"-5 + (-3)", "-5 + (-3)"),
        (r"(\pm 1, -2)", "(±1, -2)"),
        (r"\sin(2x)\cos x", "sin(2x) cos x"),
        (r"\frac{\sum_i x_i}{n}", "(∑ᵢ xᵢ)/n"),
        (r"[0,1)", "[0, 1)"),
        (r"\frac{\text{rise}}{\text{run}}", "rise/run"),
        (r"\text{total_cost} = 5 \text{ A & B}", "total_cost = 5 A & B"),
        (r"\begin{eqnarray}a&=&b\\&\le&d\end{eqnarray}", "a = b\n  ≤ d"),
        (r"a \parallel b, \|v\|", "a ∥ b, ‖v‖"),
        (r"50% \text{ and 5\% of \$ 4}", "50% and 5% of $ 4"),
        (r"\boxed{\begin{aligned}x&=1\\y&=2\end{aligned}}", "x = 1\ny = 2"),
        (r"\xcancel{x}", None),
        (r"\lfloor x \rfloor", "⌊x⌋"),
        (r"\left.\frac{x^2}{2}\right|_0^1", "(x²/2)|₀¹"),
        (r"\mathbf{A}^{-1}", "A⁻¹"),
        (r"x = 1 \\ y &= 2", "x = 1\n    y = 2"),
        (r"\overset{?}{=}", None),
        (r"\cancel{x}", None),
        (r"\binom{5}{2} = 10", "(5 choose 2) = 10"),
        (r"\binom{n+1}{2k}^2x", "((n + 1) choose 2k)²x"),
        (r"{n \choose k} \ge \dbinom nk", "(n choose k) ≥ (n choose k)"),
        (r"{n \atop k}", None),
        (r"\underbrace{a+b+c}_{n} = s", "a + b + c = s\n└───┬───┘\n    n"),
        (r"1 + \underbrace{x}_{\text{small}}", "1 +   x\n     └┬┘\n    small"),
        (r"\overbrace{aaaa}^{4} b", "  4\n┌─┴─┐\n aaaa b"),
        (r"\underbrace{x}", None),
        (r"\frac{\underbrace{x}_2}{2}", None),
        (r"\newcommand{\R}{\mathbf{A}}x \in \R", "x ∈ A"),
        (r"\begin{matrix}1&2\\3&4\end{matrix}", None),
        (r"\overrightarrow{AB}", None),
        (r"{}^nC_r", None),
        (r"\phantom{x}", None),
    ],
)
def test_a_line_reads_in_one_way_only(source: str, shown: str | None) -> None:
    lines = plain(made(f"\\[{source}\\]"))
    assert lines == (None if shown is None else shown.split("\n"))


def test_tables_stand_between_tall_brackets() -> None:
    assert plain(made(r"$A = \begin{pmatrix} 1 & 12 \\ 3 & 4 \end{pmatrix} - 5$")) == [
        "A = ⎛ 1  12 ⎞ - 5",
        "    ⎝ 3  4  ⎠",
    ]
    assert plain(made(r"$\begin{bmatrix} 1 \\ 2 \\ 3 \\ 4 \end{bmatrix}x$")) == [
        "⎡ 1 ⎤",
        "⎢ 2 ⎥ x",
        "⎢ 3 ⎥",
        "⎣ 4 ⎦",
    ]
    assert plain(made(r"$f = \begin{cases} 1 & x > 0 \\ 0 & x = 0 \\ -1 & x < 0 \end{cases}$")) == [
        "    ⎧ 1   x > 0",
        "f = ⎨ 0   x = 0",
        "    ⎩ -1  x < 0",
    ]
    system = r"\left\{\begin{aligned} 2x + y &= 1 \\ y &= 2\end{aligned}\right."
    assert plain(made(f"${system}$")) == ["⎧ 2x + y = 1", "⎩      y = 2"]
    array = r"\left[\begin{array}{c|c} 1 & 2 \\ 3 & 4 \end{array}\right]"
    assert plain(made(f"${array}$")) == ["⎡ 1 │ 2 ⎤", "⎣ 3 │ 4 ⎦"]


PROGRAM = 'def f(x):\n    """Say."""\n    return 2**x  # no $x$\n'


def test_parts_of_a_program_are_its_text() -> None:
    parts = worker.highlighted("python", PROGRAM)
    assert parts is not None
    assert "".join(piece for _, piece in parts) == PROGRAM
    kinds = {piece: kind for kind, piece in parts}
    assert kinds["def"] == "keyword"
    assert kinds["f"] == "name"
    assert kinds["2"] == "number"
    assert kinds["# no $x$"] == "comment"
    assert {kind for kind, _ in parts} <= code.KINDS | {""}


@pytest.mark.parametrize("language", ["", "nothing", "../x", "text"])
def test_other_languages_have_no_colours(language: str) -> None:
    assert worker.highlighted(language, PROGRAM) is None


def test_code_is_bounded_and_keeps_its_ends() -> None:
    assert worker.highlighted("python", "x" * (code.LONGEST + 1)) is None
    parts = worker.highlighted("python", "\n\n  x = 1\n\n")
    assert parts is not None
    assert "".join(piece for _, piece in parts) == "\n\n  x = 1\n\n"


@slow
def test_every_language_is_known() -> None:
    unknown = [language for language in code.LANGUAGES if code._lexer(language) is None]
    assert unknown == []


@pytest.mark.parametrize(
    ("source", "put"),
    [
        (r"\newcommand{\R}{\mathbb{R}} x \in \R", r" x \in \mathbb{R}"),
        (r"\newcommand\half[1]{\frac{#1}{2}}\half{x} + \half y", r"\frac{x}{2} + \frac{y}{2}"),
        (r"\def\a{x}\def\b#1#2{#2\a#1}\b{1}{2}", "2x1"),
        (r"\renewcommand{\vec}[1]{\mathbf{#1}}\vec\alpha", r"\mathbf{\alpha}"),
        (r"\DeclareMathOperator*{\argmax}{arg\,max}\argmax_x", r"\operatorname*{arg\,max}_x"),
        (r"\newcommand{\e}{\varepsilon}\e x", r"\varepsilon x"),
        (r"\newcommand{\e}{\varepsilon}\e{}x", r"\varepsilon{}x"),
        (r"\newcommand{\e}{\mathrm{e}}\ex", r"\ex"),
        (r"\e\newcommand{\e}{1}\e", r"\e1"),
        (r"\newcommand{\x}{\x\x}\x", None),
        (r"\newcommand{\a}{\b}\newcommand{\b}{\a}\a", None),
        (r"\newcommand{\a}[1]{#1#1#1#1}" + r"\a{" * 9 + "x" + "}" * 9, None),
        (r"\newcommand{\a}[2]{#1#2}\a{1}", None),
        # Not simple: they stay, and are refused.
        (r"\newcommand{\a}[1]{#2}\a x", r"\newcommand{\a}[1]{#2}\a x"),
        (r"\newcommand{\a}[1][2]{#1}\a", r"\newcommand{\a}[1][2]{#1}\a"),
        (r"\newcommand{\a}{x", r"\newcommand{\a}{x"),
        (r"\let\a\b", r"\let\a\b"),
    ],
)
def test_macros_of_a_formula_are_put_in(source: str, put: str | None) -> None:
    found = macros.put_in(source, tex.LONGEST)
    assert (found and found.strip()) == (put and put.strip())


def test_macros_end_soon() -> None:
    started = time.process_time()
    for text in (
        r"\newcommand{\a}" * 250,
        r"\def\a{" * 500,
        r"\def\a#1{#1}" + r"\a" * 1900,
        r"\def\a{x}" + r"\a" * 199 + "{" * 3000,
    ):
        macros.put_in(text, tex.LONGEST)
    assert time.process_time() - started < 1


def test_a_formula_of_definitions_alone_stays_as_written() -> None:
    assert worker.formula(r"$\newcommand{\R}{\mathbb{R}}$") is None
