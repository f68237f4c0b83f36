"""Formulas in an answer, by the same cases on the terminal and on the page."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page_room import browser, stand_in, visit
from playwright.sync_api import Page
from terminal import Terminal
from test_answers import READ, every_piece_is_drawn, words
from test_chat_render import streamed

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
def test_on_the_page(page: Page, case: dict[str, Any]) -> None:
    text = case["text"]
    drawn = page.evaluate(DRAWN, {"text": text, "count": len(case["formulas"])})
    assert [source for source, _, _ in drawn] == case["formulas"]
    for _, signs, children in drawn:
        assert children == 1
        assert not set(signs) & set("\\&")
    expected = words(case.get("page", text))
    assert words(page.evaluate(READ, {"text": text, "size": len(text)})) == expected
