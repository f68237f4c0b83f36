"""Formulas in an answer, by the same cases on the terminal and on the page."""

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from conftest import slow
from page_room import browser, stand_in, visit
from playwright.sync_api import Page
from terminal import Terminal
from test_answers import READ, every_piece_is_drawn, words
from test_chat_render import streamed

from mlx_cerebrum.chat.render import markdown_parser
from mlx_cerebrum.typeset.tex import split

__all__ = ["every_piece_is_drawn"]
# The formulas that are drawn, once there are as many as expected, or no more come.
DRAWN = """async ({ text, count }) => {
    const { Rendering } = await import("/markdown.js");
    const into = document.createElement("div");
    const rendering = new Rendering(into);
    for (let cut = 1; cut < text.length; cut += 3) rendering.update(text.slice(0, cut));
    rendering.update(text);
    const set = () => [...into.querySelectorAll(".set")];
    for (let tries = 0; tries < 400 && set().length < count; tries += 1) {
        await new Promise((resolve) => setTimeout(resolve, 25));
    }
    return set().map((one) => [one.dataset.tex, one.textContent, one.children.length]);
}"""
CASES = json.loads((Path(__file__).parents[1] / "maths_cases.json").read_text("utf-8"))


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 60
    assert len({case["name"] for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["name"]))
@pytest.mark.usefixtures("every_piece_is_drawn")
def test_on_the_terminal(case: dict[str, Any]) -> None:
    text, expected = case["text"], words(case["terminal"])
    assert words(streamed(text, Terminal(200, 100), len(text))) == expected
    assert words(streamed(text, Terminal(200, 100), 3)) == expected


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with stand_in() as room, browser() as launched, visit(launched, room.url) as page:
        yield page


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["name"]))
@pytest.mark.one_in(4)
def test_on_the_page(page: Page, case: dict[str, Any]) -> None:
    text = case["text"]
    drawn = page.evaluate(DRAWN, {"text": text, "count": len(case["formulas"])})
    assert [source for source, _, _ in drawn] == case["formulas"]
    for _, signs, children in drawn:
        assert children == 1
        assert not set(signs) & set("\\&")
    expected = words(case.get("page", text))
    assert words(page.evaluate(READ, {"text": text, "size": len(text)})) == expected


# The rules are written twice, in Python and in the page's JavaScript: on any text they must agree.

PIECES = [
    *["$"] * 6,
    *["$$", "\\(", "\\)", "\\[", "\\]", "{", "}", "\\{", "\\}", "\\$", "\\\\", "\\"],
    *["\\begin{align}", "\\end{align}", "\\boxed{", "\\frac{1}{2}", "\\text{", "^2", "_1", "="],
    *["x", "n", "5", "7.50", "th", "s", "word", "two words", "a, then", "\u00e9", "\u03b1"],
    *["\u4e2d", "\u00b2", " ", " ", " ", "\n", "\n\n", "\u00a0", ",", ".", "*", "**", "_", "`"],
    *["``", "+ 3", "[a]", "(", ")", "https://x.y/", "&amp;", "<br>", "&", "-", "|", "!", "~~"],
    *["# ", "# "],
]
FOUND = """async (texts) => {
    const { blocks } = await import("/blocks.js");
    const { scan } = await import("/inline.js");
    const none = () => ({ links: new Map(), notes: new Map(), asked: new Set() });
    const inline = (text) => scan(text, none()).flatMap((piece) => piece.formula ?? []);
    const within = (block) => {
        if (block.blocks) return block.blocks.flatMap(within);
        if (block.items) return block.items.flat().flatMap(within);
        if (block.rows) return [block.head, ...block.rows].flat().flatMap(inline);
        if (block.type === "formula") return block.closed ? [block.text] : [];
        return ["fence", "definition"].includes(block.type) ? [] : inline(block.text ?? "");
    };
    return texts.map((text) => blocks(text.split("\\n"), 0).flatMap(within));
}"""


def random_texts(count: int, seed: int) -> list[str]:
    random = Random(seed)
    return ["".join(random.choices(PIECES, k=random.randint(1, 16))) for _ in range(count)]


def on_the_terminal(text: str) -> list[str]:
    """The formulas in a text."""
    inline = [token for token in markdown_parser().parse(text) if token.type == "inline"]
    children = (child for token in inline for child in token.children or ())
    return whole([child.content for child in children if child.type == "formula"])


def whole(formulas: list[str]) -> list[str]:
    """Without those that are empty or left open, which both show as text; spaces as one."""
    return [" ".join(one.split()) for one in formulas if split(one)]


def differences(page: Page, texts: list[str]) -> list[tuple[str, list[str], list[str]]]:
    found = page.evaluate(FOUND, texts)
    pairs = zip(texts, map(on_the_terminal, texts), map(whole, found), strict=True)
    return [(text, ours, theirs) for text, ours, theirs in pairs if ours != theirs]


@slow
def test_both_find_the_same_formulas(page: Page) -> None:
    assert differences(page, random_texts(4000, seed=1)) == []


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 12))
def test_both_find_the_same_formulas_at_length(page: Page, seed: int) -> None:
    assert differences(page, random_texts(20_000, seed)) == []
