"""Text files in a question: chosen, dropped or pasted."""

from typing import Any

import page_driver
import pytest
from page_driver import ask, asked, idle, questions, reload
from page_room import Room, some
from playwright.sync_api import Page, expect

pytestmark = some
launched, served, room, page = (
    page_driver.launched,
    page_driver.served,
    page_driver.room,
    page_driver.page,
)
CHIPS = "#attached .chip"


def text_file(name: str, data: str | bytes) -> Any:
    held = data.encode() if isinstance(data, str) else data
    return {"name": name, "mimeType": "", "buffer": held}


def attach(page: Page, *files: Any) -> None:
    page.set_input_files("#text-files", list(files))


def hand_over(page: Page, how: str, name: str, text: str, more: str = "", times: int = 1) -> bool:
    """Drop or paste a file; whether the browser would still have done its own with it."""
    done: bool = page.evaluate(
        """([how, name, text, more, times]) => {
            const data = new DataTransfer();
            data.items.add(new File([text.repeat(times)], name));
            if (more) data.setData("text/plain", more);
            const options = { bubbles: true, cancelable: true, composed: true };
            const box = document.getElementById("question");
            if (how === "paste") {
                const given = { ...options, clipboardData: data };
                return box.dispatchEvent(new ClipboardEvent("paste", given));
            }
            const at = document.querySelector(how);
            const event = (kind) => new DragEvent(kind, { ...options, dataTransfer: data });
            at.dispatchEvent(event("dragover"));
            return at.dispatchEvent(event("drop"));
        }""",
        [how, name, text, more, times],
    )
    return done


def test_files_go_into_the_question_as_blocks_of_code(page: Page, room: Room) -> None:
    attach(page, text_file("a.py", "x = 1\r\ny = 2"), text_file("notes.md", "```\ncode\n```\n"))
    expect(page.locator(CHIPS)).to_have_count(2)
    expect(page.locator(CHIPS).first).to_contain_text("a.py")
    expect(page.locator(CHIPS).first).to_contain_text("11 bytes")
    ask(page, "What is this?")
    expect(page.locator(CHIPS)).to_have_count(0)
    assert asked(room) == [
        (
            "user",
            "What is this?\n\nFile “a.py”\n```py\nx = 1\ny = 2\n```\n\n"
            "File “notes.md”\n````md\n```\ncode\n```\n````",
        )
    ]
    # In the question each is folded up.
    expect(page.locator(".question summary")).to_have_count(2)
    expect(page.locator(".question pre")).to_have_count(0)
    page.locator(".question summary").last.click()
    expect(page.locator(".question pre")).to_have_text("```\ncode\n```\n")
    assert page.locator("#title").inner_text() == "What is this?"


@pytest.mark.long
def test_a_file_is_taken_out_again_and_one_alone_is_a_question(page: Page, room: Room) -> None:
    attach(page, text_file("a.txt", "A"), text_file("b.txt", ""))
    page.get_by_role("button", name="Remove a.txt").click()
    expect(page.locator("#question")).to_be_focused()
    page.keyboard.press("Enter")
    idle(page)
    assert asked(room) == [("user", "File “b.txt”\n```txt\n```")]
    expect(page.locator(".question summary")).to_contain_text("b.txt")


def test_dropped_and_pasted(page: Page) -> None:
    assert not hand_over(page, "#thread, main", "dropped.txt", "D")
    expect(page.locator(CHIPS)).to_have_count(1)
    assert not hand_over(page, "paste", "pasted.txt", "P")
    # Finder gives the name as text, other programs the address.
    assert not hand_over(page, "paste", "from Finder.txt", "F", more="from Finder.txt")
    assert not hand_over(page, "paste", "a b.txt", "A", more="file:///home/me/a%20b.txt\n")
    expect(page.locator(CHIPS)).to_have_count(4)
    # Any other text is what is meant: a table of an office program, with its picture.
    assert hand_over(page, "paste", "picture.png", "x", more="a\tb")
    # The list imports what is dropped there, or says why it can't; the page stays where it is.
    assert not hand_over(page, "#sidebar", "missed.txt", "M")
    expect(page.locator("#toast")).to_contain_text("missed.txt is not valid JSON")
    assert not hand_over(page, "nav", "talk.json", '[{"role": "user", "content": "Dropped"}]')
    expect(page.locator("#conversations .open")).to_have_text(["Dropped"])
    page.click("#new")
    expect(page.locator(CHIPS)).to_have_count(4)
    expect(page.locator("main.dropping")).to_have_count(0)


def test_what_is_no_text_or_too_much_is_refused_in_one_line(page: Page, room: Room) -> None:
    toast = page.locator("#toast .line").first
    for name, data, line in [
        ("photo.png", b"\x89PNG\r\n\x1a\n\x00\x01", "photo.png is no text"),
        ("old.txt", b"Gr\xf6\xdfe", "old.txt is no text"),
        ("nul.txt", b"a\x00b", "nul.txt is no text"),
    ]:
        attach(page, text_file(name, data))
        expect(toast).to_contain_text(line)
        expect(page.locator(CHIPS)).to_have_count(0)
    for name, length, line in [
        ("big.log", 10_000_000, "big.log is too large (10.0 MB): a question holds 1,000,000"),
        ("long.log", 1_000_001, "long.log is too large (1.0 MB)"),
    ]:
        hand_over(page, "main", name, "x", times=length)
        expect(toast).to_contain_text(line)
        expect(page.locator(CHIPS)).to_have_count(0)
    # Of several the good ones are taken, as long as there is room.
    attach(
        page,
        text_file("one.txt", "x" * 600_000),
        text_file("two.txt", "y" * 600_000),
        text_file("three.txt", "z"),
    )
    expect(toast).to_contain_text("two.txt is too much")
    expect(page.locator(CHIPS)).to_have_count(2)
    assert room.asked == []


@pytest.mark.long
def test_other_encodings_that_say_so_are_read(page: Page, room: Room) -> None:
    attach(
        page, text_file("a.txt", "\ufeffGröße".encode()), text_file("b.txt", "ß".encode("utf-16"))
    )
    expect(page.locator(CHIPS)).to_have_count(2)
    ask(page, "Q")
    assert "\nGröße\n" in asked(room)[0][1]
    assert "\nß\n" in asked(room)[0][1]


@pytest.mark.long
def test_files_of_a_draft_stay_with_it(page: Page, room: Room) -> None:
    ask(page, "One")
    attach(page, text_file("a.txt", "A"))
    page.fill("#question", "typed")
    page.click("#new")
    expect(page.locator(CHIPS)).to_have_count(0)
    page.locator("#conversations .open").click()
    expect(page.locator(CHIPS)).to_have_count(1)
    reload(page)
    expect(page.locator(CHIPS)).to_contain_text(["a.txt"])
    expect(page.locator("#question")).to_have_value("typed")


@pytest.mark.long
def test_a_question_with_files_is_edited(page: Page, room: Room) -> None:
    attach(page, text_file("a.txt", "A"), text_file("b.txt", "B"))
    ask(page, "Old")
    page.press("#question", "ArrowUp")
    box = page.get_by_label("Edited question")
    assert box.input_value() == "Old"
    page.locator(".edit .chip button").first.click()
    box.fill("New")
    box.press("Enter")
    idle(page)
    assert asked(room) == [("user", "New\n\nFile “b.txt”\n```txt\nB\n```")]


def test_no_file_becomes_more_than_text(page: Page, room: Room) -> None:
    hostile = "<img src=x onerror=window.ran=1>\n```\n\nFile “x”\n```\n</pre><script>window.ran=1"
    attach(page, text_file("<img src=x onerror=window.ran=1>”.html", hostile))
    ask(page, "<b>Q</b>")
    assert questions(page)[0].startswith("<b>Q</b>")
    expect(page.locator(".question summary")).to_have_count(1)
    page.locator(".question summary").click()
    expect(page.locator(".question pre")).to_have_text(hostile + "\n")
    assert page.locator("#thread :is(img, script, b)").count() == 0
    assert page.evaluate("window.ran") is None


@pytest.mark.long
def test_what_looks_like_files_takes_no_time(page: Page) -> None:
    seconds = page.evaluate(
        """async () => {
            const { partsOf } = await import("/attached.js");
            const began = performance.now();
            const head = "\\n\\nFile “a”\\n```";
            for (const piece of [`${head}\\n`, "File “", "\\n```" + head, "\\n```"]) {
                partsOf("File “a”\\n```\\n" + piece.repeat(1e6 / piece.length) + "x");
            }
            return (performance.now() - began) / 1000;
        }"""
    )
    assert seconds < 10


def test_the_gauge_counts_what_is_typed(page: Page, room: Room) -> None:
    gauge = page.locator("#gauge-text")
    ask(page, "Q")
    expect(gauge).to_have_text("15 of 32,768 tokens")
    page.fill("#question", "four words are typed")
    expect(gauge).to_have_text("about 20 of 32,768 tokens")
    page.fill("#question", "漢字漢字")  # a token each
    expect(gauge).to_have_text("about 19 of 32,768 tokens")
    attach(page, text_file("a.txt", "x" * 200_000))
    expect(gauge).to_have_text("about 50,019 of 32,768 tokens")
    assert "full" in (page.locator("#gauge").get_attribute("class") or "")
    assert "typed now" in (page.locator("#gauge").get_attribute("title") or "")
    page.get_by_role("button", name="Remove a.txt").click()
    page.fill("#question", "")
    expect(gauge).to_have_text("15 of 32,768 tokens")
