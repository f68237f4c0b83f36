"""A conversation as Markdown, out and in again; and on paper."""

import re
from pathlib import Path
from typing import Any

import page_driver
import pytest
from page_driver import (
    answers,
    ask,
    asked,
    export,
    file,
    kept_nodes,
    questions,
    settings,
    take,
)
from page_room import Room, Script, some, visit
from playwright.sync_api import Browser, Page, expect

from mlx_cerebrum.chat.export import as_markdown
from mlx_cerebrum.chat.kept import Turn

pytestmark = some
launched, served, room, page = (
    page_driver.launched,
    page_driver.served,
    page_driver.room,
    page_driver.page,
)


def saved(page: Page, name: str, folder: Path) -> str:
    download = export(page, name, "markdown")
    assert download.suggested_filename.endswith(".md")
    download.save_as(folder / "file.md")
    return (folder / "file.md").read_text(encoding="utf-8")


def read(text: str) -> Any:
    return {"name": "again.md", "mimeType": "text/markdown", "buffer": text.encode()}


def test_a_conversation_as_markdown(page: Page, room: Room, tmp_path: Path) -> None:
    settings(page, system="Be brief.")
    ask(page, "Größe?")
    assert saved(page, "Größe?", tmp_path) == (
        "<!-- cerebrum-conversation 1 -->\n# Größe?\n\n"
        "<!-- cerebrum system -->\n## System text\n\nBe brief.\n\n"
        "<!-- cerebrum question -->\n## Question\n\nGröße?\n\n"
        "<!-- cerebrum answer by cerebrum-12.25b -->\n## Answer by cerebrum-12.25b\n\n"
        "Hello world.\n"
    )


ODD = [
    "\n\n## Question\n\nwith a blank line before and after\n\n",
    "<!-- cerebrum answer -->\n## Answer\n\nno, a question",
    "",
    "```\nan open fence",
    "<!-- cerebrum2 question -->\n\n\n",
    "~~~~ text\n\n<!-- cerebrum question -->\nstill open",
    "# <script>window.ran=1</script>",
    "last\n",
]


def test_what_is_exported_is_read_again_as_it_was(page: Page, room: Room, tmp_path: Path) -> None:
    talk = [
        {"role": "system", "content": "Sys\n\ntem <!-- cerebrum -->"},
        *({"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(ODD)),
    ]
    take(page, file("odd.json", talk))
    expect(page.locator(".answer")).to_have_count(4)
    title = page.locator("#title").inner_text()
    text = saved(page, title, tmp_path)
    turns = [Turn(one["role"], one["content"]) for one in talk[1:]]
    assert text == as_markdown(title, talk[0]["content"], turns)  # the terminal's file
    # For people, what comes after an open fence is outside of it.
    assert "an open fence\n```\n\n<!--" in text
    before = [(n["role"], n["content"]) for n in sorted(kept_nodes(page), key=lambda n: n["at"])]
    page.locator("#conversations li").hover()
    page.get_by_role("button", name="Delete").click()
    expect(page.locator("#conversations .open")).to_have_count(0)
    take(page, read(text))
    expect(page.locator("#title")).to_have_text(title)
    expect(page.locator(".answer")).to_have_count(4)
    ask(page, "On")
    system, *sent = asked(room)
    assert system == ("system", talk[0]["content"])
    assert sent == [*before, ("user", "On")]
    assert page.evaluate("window.ran") is None


@pytest.mark.long
def test_both_columns_are_exported_and_read_again(page: Page, room: Room, tmp_path: Path) -> None:
    room.script = lambda body: Script(pieces=[f"{body['model']} {len(body['messages'])}"])
    ask(page, "Alone")
    page.click("#compare")
    ask(page, "One")
    ask(page, "Two")
    text = saved(page, "Alone", tmp_path)
    assert text.count("## Question") == 3
    assert text.count("## Answer by cerebrum-7b") == 2
    shown, said = answers(page), questions(page)
    page.click("#new")
    take(page, read(text.replace("\n", "\r\n")))
    expect(page.locator("#conversations .open")).to_have_count(2)
    expect(page.locator(".row")).to_have_count(2)
    assert (answers(page), questions(page)) == (shown, said)
    expect(page.locator("#model-1")).to_have_value("cerebrum-7b")
    ask(page, "Three")
    assert [one["content"] for one in room.asked[-1]["messages"]][-2] in answers(page)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("# Notes\n\ntext", "is no conversation that this page has exported"),
        ("<!-- cerebrum-conversation 1 -->\n# T\n", "holds no messages"),
        ("<!-- cerebrum-conversation 1 -->\n\n<!-- cerebrum other -->\nx", "comments were changed"),
        ("<!-- cerebrum-conversation 1 -->\n\n<!-- cerebrum answer -->\nx", "not in turn"),
        ("<!-- cerebrum-conversation 2 -->\n", "is no conversation"),
    ],
)
@pytest.mark.long
def test_another_markdown_file_gets_one_line(page: Page, text: str, line: str) -> None:
    take(page, read(text))
    expect(page.locator("#toast")).to_contain_text("again.md")
    expect(page.locator("#toast")).to_contain_text(line)
    expect(page.locator("#conversations .open")).to_have_count(0)


# On paper

LONG = "\n\n".join(f"Paragraph {n}: " + "word " * 60 for n in range(60))
WIDE = "So\n\n```python\n" + "x = 1  # " + "wide " * 60 + "the end\n```\n\n$$\n\\frac{1}{2}\n$$\n"
WIDE += "\nSo[^1].\n\n[^1]: A note\n"


def test_all_of_a_conversation_is_printed_and_nothing_to_press(
    launched: Browser, room: Room
) -> None:
    room.script = lambda body: Script(pieces=[LONG if len(room.asked) == 1 else WIDE])
    with visit(launched, room.url, color_scheme="dark") as page:
        held: Any = {"name": "a.txt", "mimeType": "", "buffer": b"in the file"}
        page.set_input_files("#text-files", held)
        ask(page, "Long?")
        ask(page, "Wide?")
        expect(page.locator(".answer .set")).to_have_count(1)
        pdf = page.pdf(format="A4")
        assert len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 4
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        page.emulate_media(media="print")
        seen = page.evaluate(
            """() => {
                const shown = (selector) => [...document.querySelectorAll(selector)]
                    .filter((one) => one.checkVisibility()).map((one) => one.outerHTML);
                const code = document.querySelector(".code pre");
                return {
                    pressed: shown("button:not(.ref, .ref-back), textarea, select, input")
                        .concat(shown("aside, dialog, #below")),
                    wide: code.scrollWidth - code.clientWidth,
                    back: getComputedStyle(document.body).backgroundColor,
                    text: getComputedStyle(document.querySelector(".answer p")).color,
                    cut: [...document.querySelectorAll("body, main, #scroller")]
                        .filter((one) => getComputedStyle(one).overflowY !== "visible").length,
                    file: document.querySelector(".question pre").textContent,
                    titles: [...document.querySelectorAll("article h2")]
                        .filter((one) => one.offsetHeight > 5).length,
                };
            }"""
        )
        assert seen["pressed"] == []
        assert seen["wide"] <= 0
        assert (seen["back"], seen["cut"]) == ("rgb(255, 255, 255)", 0)
        assert seen["text"] == "rgb(28, 28, 34)"
        assert seen["file"] == "in the file\n"
        assert seen["titles"] == 4
        page.emulate_media(media="screen")
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        expect(page.locator(".question pre")).to_be_hidden()


@pytest.mark.long
def test_print_is_offered_where_one_exports(page: Page) -> None:
    ask(page, "One")
    page.click("#new")
    ask(page, "Two")
    page.evaluate("void (window.print = () => (window.printed = document.title))")
    page.locator("#conversations li", has_text="One").hover()
    page.get_by_role("button", name="Export One").click()
    page.click("#export-print")
    page_driver.until(page, "window.printed")
    assert page.evaluate("window.printed") == "One \u2013 Cerebrum"
