"""What a reasoning model writes reaches its reader whole, on the terminal and on the page."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from page_room import browser, stand_in, visit
from playwright.sync_api import Page
from terminal import Terminal
from test_chat_render import streamed

from mlx_cerebrum.chat import drawing

FOLDER = Path(__file__).parents[1] / "answers"
NAMES = sorted(path.stem for path in FOLDER.glob("*.md") if path.stem != "README")
DECORATION = re.compile("[\u2022\u2500-\u257f\u258c\u2014]")  # bullets, rules, a quote's bar
# The text as it is read: a line for each block and break, a number before a numbered item.
READ = """async ({ text, size }) => {
    const { Rendering } = await import("/markdown.js");
    const into = document.createElement("div");
    const rendering = new Rendering(into);
    for (let cut = size; cut < text.length; cut += size) rendering.update(text.slice(0, cut));
    rendering.update(text);
    const read = (node) => {
        if (node.nodeType === Node.TEXT_NODE) return node.data;
        const tex = node.dataset.tex;
        if (tex !== undefined) return node.localName === "p" ? `\\n${tex}\\n` : tex;
        if (node.className === "code-head") return "";
        const inner = [...node.childNodes].map(read).join("");
        const list = node.localName === "li" && node.parentElement?.localName === "ol";
        const items = [...(node.parentElement?.children ?? [])];
        const number = list ? node.parentElement.start + items.indexOf(node) : "";
        const inline = ["a", "button", "code", "del", "em", "span", "strong",
            "sup"].includes(node.localName);
        return inline ? inner : `\\n${number} ${inner}\\n`;
    };
    return read(into);
}"""


def words(text: str) -> list[str]:
    """What there is to read; an item's number without its dot, which not all show."""
    return re.sub(r"(?m)^(\s*\d+)[.)](?=\s)", r"\1", DECORATION.sub(" ", text)).split()


def answer(name: str, terminal: bool = False) -> tuple[str, list[str]]:
    expected = FOLDER / f"{name}.txt"
    own = FOLDER / f"{name}.terminal.txt"
    expected = own if terminal and own.exists() else expected
    return (FOLDER / f"{name}.md").read_text(), words(expected.read_text())


@pytest.fixture
def every_piece_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "REDRAW_SECONDS", 0.0)
    monkeypatch.setattr(drawing, "REDRAW_SHARE", 1e9)
    monkeypatch.delenv("XTERM_VERSION", raising=False)


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with stand_in() as room, browser() as launched, visit(launched, room.url) as page:
        yield page


def test_there_are_enough_of_them() -> None:
    assert len(NAMES) >= 40
    texts = {path.name.removesuffix(".txt") for path in FOLDER.glob("*.txt")}
    assert {name.removesuffix(".terminal") for name in texts} == set(NAMES) <= texts


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("every_piece_is_drawn")
@pytest.mark.one_in(3)
def test_on_the_terminal(name: str) -> None:
    text, expected = answer(name, terminal=True)
    assert words(streamed(text, Terminal(200, 100), len(text))) == expected
    assert words(streamed(text, Terminal(200, 100), 7)) == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.one_in(4)
def test_on_the_page(page: Page, name: str) -> None:
    text, expected = answer(name)
    assert words(page.evaluate(READ, {"text": text, "size": len(text)})) == expected
    assert words(page.evaluate(READ, {"text": text, "size": 3})) == expected
