"""The chat page in a real browser: asking, streaming, stopping, asking again."""

import page_driver
import pytest
from page_driver import (
    answers,
    ask,
    asked,
    file,
    idle,
    last,
    numbered,
    questions,
    reload,
    settings,
    take,
    titles,
    until,
)
from page_room import Hold, Raw, Room, Script, browser_path, real_server, some, visit
from playwright.sync_api import Browser, Page, expect

pytestmark = some
launched, served, room, page = (
    page_driver.launched,
    page_driver.served,
    page_driver.room,
    page_driver.page,
)


def test_a_question_is_answered_and_the_next_one_carries_both(page: Page, room: Room) -> None:
    numbered(room)
    ask(page, "First?")
    assert answers(page) == ["Answer 1"]
    assert page.input_value("#question") == ""
    ask(page, "Second?")
    assert asked(room) == [("user", "First?"), ("assistant", "Answer 1"), ("user", "Second?")]
    body = room.asked[-1]
    assert body["model"] == "cerebrum-12.25b"
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert titles(page) == ["First?"]
    expect(page.locator(".stats").last).to_contain_text("2 tokens")
    expect(page.locator(".stats").last).to_contain_text("first after")


def test_an_answer_is_on_the_screen_while_it_comes(page: Page, room: Room) -> None:
    room.script = lambda body: Script(pieces=["One **two", Hold(), "** three"])
    ask(page, "Go", wait=False)
    expect(page.locator(".answer .markdown")).to_have_text("One **two")
    expect(page.locator(".answer")).to_have_attribute("aria-busy", "true")
    room.hold.set()
    idle(page)
    expect(page.locator(".answer .markdown strong")).to_have_text("two")
    expect(page.locator(".answer")).to_have_attribute("aria-busy", "false")


def test_a_piece_cut_within_a_character_and_a_line_comes_whole(page: Page, room: Room) -> None:
    event = 'data: {"choices":[{"index":0,"delta":{"content":"süß 😀"}}]}\r\n\r\n'
    room.script = lambda body: Script(pieces=[Raw(event[:20]), Raw(event[20:47]), Raw(event[47:])])
    ask(page, "Go")
    assert answers(page) == ["süß 😀"]


@pytest.mark.parametrize("way", ["button", "key"])
def test_stopping_keeps_what_came_and_frees_the_server(page: Page, room: Room, way: str) -> None:
    room.script = lambda body: Script(pieces=["Kept", Hold(), " lost"])
    ask(page, "Go", wait=False)
    expect(page.locator(".answer .markdown")).to_have_text("Kept")
    if way == "button":
        page.click("#stop")
    else:
        page.keyboard.press("Escape")
    idle(page)
    assert room.left.wait(5)
    assert answers(page) == ["Kept"]
    expect(page.locator(".answer .ended")).to_contain_text("Stopped.")
    numbered(room)
    ask(page, "And now?")
    assert asked(room)[1] == ("assistant", "Kept")


def test_while_an_answer_comes_the_next_question_waits_in_its_field(page: Page, room: Room) -> None:
    room.script = lambda body: Script(pieces=["a", Hold(), "b"])
    ask(page, "Go", wait=False)
    expect(page.locator(".answer .markdown")).to_have_text("a")
    ask(page, "Next", wait=False)
    assert page.input_value("#question") == "Next"
    assert len(room.asked) == 1
    room.hold.set()
    idle(page)
    page.press("#question", "Enter")
    idle(page)
    assert len(room.asked) == 2


def test_the_reading_of_a_long_prompt_is_shown(page: Page, room: Room) -> None:
    room.script = lambda body: Script(pieces=[Raw(": reading 512/2048\n\n"), Hold(), "Done"])
    ask(page, "Go", wait=False)
    expect(page.locator(".waiting")).to_have_text("Reading the prompt 512/2048")
    assert page.locator("progress").get_attribute("value") == "512"
    room.hold.set()
    expect(page.locator(".answer .markdown")).to_have_text("Done")
    expect(page.locator(".waiting")).to_have_count(0)


def test_scrolling_follows_only_a_reader_at_the_end(page: Page, room: Room) -> None:
    text = [f"line {n}\n\n" for n in range(80)]
    room.script = lambda body: Script(pieces=[*text, Hold(), *text])
    ask(page, "Go", wait=False)
    page.wait_for_selector("text=line 79")
    gap = "scroller.scrollHeight - scroller.clientHeight - scroller.scrollTop"
    until(page, f"{gap} < 5")
    page.hover("#scroller")
    page.mouse.wheel(0, -600)
    until(page, f"{gap} > 400")
    before = page.evaluate("scroller.scrollTop")
    room.hold.set()
    idle(page)
    assert page.evaluate("scroller.scrollTop") == before
    page.click("#to-end")
    until(page, f"{gap} < 5")


def test_a_long_conversation_opens_at_its_end(page: Page) -> None:
    messages = [
        {"role": ("user", "assistant")[n % 2], "content": f"message {n} " + "word " * (n % 7 * 40)}
        for n in range(300)
    ]
    take(page, file("long.json", messages))
    expect(page.locator(".answer")).to_have_count(150)
    expect(page.locator(".answer").last).to_be_in_viewport()
    reload(page)
    expect(page.locator(".answer").last).to_be_in_viewport()
    until(page, "scroller.scrollHeight - scroller.clientHeight - scroller.scrollTop < 5")
    page.hover("#scroller")
    page.mouse.wheel(0, -3000)
    expect(page.locator(".answer").last).not_to_be_in_viewport()


# Another answer, an edited question


def test_earlier_answers_can_be_gone_back_to(page: Page, room: Room) -> None:
    numbered(room)
    ask(page, "Q")
    last(page, "Another answer").click()
    idle(page)
    assert answers(page) == ["Answer 2"]
    assert asked(room) == [("user", "Q")]
    expect(page.locator(".count")).to_have_text("2/2")
    last(page, "Version before").click()
    assert answers(page) == ["Answer 1"]
    ask(page, "On")
    assert asked(room) == [("user", "Q"), ("assistant", "Answer 1"), ("user", "On")]
    reload(page)
    expect(page.locator(".count")).to_have_text("1/2")
    last(page, "Next version").click()
    expect(page.locator(".answer .markdown")).to_have_text("Answer 2")
    last(page, "Version before").click()
    assert answers(page) == ["Answer 1", "Answer 3"]


def test_an_edited_question_begins_a_branch(page: Page, room: Room) -> None:
    numbered(room)
    ask(page, "One")
    ask(page, "Two")
    page.get_by_role("button", name="Edit").first.click()
    box = page.get_by_label("Edited question")
    assert box.input_value() == "One"
    box.fill("Uno")
    box.press("Enter")
    idle(page)
    assert asked(room) == [("user", "Uno")]
    assert questions(page) == ["Uno"]
    last(page, "Version before").click()
    assert questions(page) == ["One", "Two"]
    assert answers(page) == ["Answer 1", "Answer 2"]


def test_the_up_key_edits_the_last_question_and_escape_leaves_it(page: Page, room: Room) -> None:
    ask(page, "One")
    ask(page, "Two")
    page.press("#question", "ArrowUp")
    box = page.get_by_label("Edited question")
    expect(box).to_be_focused()
    assert box.input_value() == "Two"
    box.fill("Two and a half")
    box.press("Escape")
    assert questions(page) == ["One", "Two"]
    assert len(room.asked) == 2
    page.fill("#question", "typed")
    page.press("#question", "ArrowUp")
    expect(box).to_have_count(0)


def test_answers_and_code_are_copied_as_they_were_written(launched: Browser, room: Room) -> None:
    answer = "Some **bold**\n\n```py\nx = 1\n```"
    room.script = lambda body: Script(pieces=[answer])
    with visit(launched, room.url, permissions=["clipboard-read", "clipboard-write"]) as page:
        ask(page, "Q")
        last(page, "Copy").click()
        expect(page.get_by_role("button", name="Copied")).to_have_count(1)
        assert page.evaluate("navigator.clipboard.readText()") == answer
        page.locator(".code-head button").click()
        expect(page.locator(".code-head button")).to_have_text("Copied")
        assert page.evaluate("navigator.clipboard.readText()") == "x = 1"


# The real server


def test_the_real_server_and_a_real_model(launched: Browser) -> None:
    with real_server() as url, visit(launched, url) as page:
        settings(page, temperature="0", max_tokens="8")
        page.click("#compare")
        expect(page.locator("#model-0")).to_have_value("demo")
        expect(page.locator("#model-1")).to_have_value("demo-interleaved")
        ask(page, "What is the capital of France?", wait=False)
        expect(page.locator("#stop")).to_be_visible()
        expect(page.locator("#stop")).to_be_hidden(timeout=200_000)
        both = answers(page)
        assert "Paris" in both[0]
        assert both[1]
        expect(page.locator(".caption")).not_to_be_empty()
        expect(page.locator(".stats").first).to_contain_text("tokens/s")
        expect(page.locator("#gauge-text")).to_contain_text("of 8,192 tokens")
        page.get_by_role("button", name="Continue with this").first.click()
        settings(page, max_tokens="400")
        ask(page, "Tell me a long story.", wait=False)
        expect(page.locator(".answer .markdown").nth(1)).not_to_be_empty(timeout=200_000)
        page.keyboard.press("Escape")
        idle(page)
        expect(page.locator(".answer .ended").last).to_contain_text("Stopped.")


def test_without_a_browser_the_module_skips_but_fails_in_ci(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no Chromium"):
        browser_path()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no Chromium"):
        browser_path()
