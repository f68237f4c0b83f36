"""Going on with an answer that was cut off."""

import page_driver
import pytest
from page_driver import answers, ask, asked, idle, kept_nodes, reload, settings
from page_room import Hold, Room, Script, real_server, some, visit
from playwright.sync_api import Browser, Page, expect

pytestmark = some
launched, served, room, page = (
    page_driver.launched,
    page_driver.served,
    page_driver.room,
    page_driver.page,
)


def go_on(page: Page) -> None:
    page.get_by_role("button", name="Continue the answer").click()


def test_one_that_was_too_long_goes_on_where_it_ended(page: Page, room: Room) -> None:
    room.script = lambda body: Script(pieces=["One", " two"], finish="length", prompt_tokens=12)
    settings(page, temperature="0.5", seed="7")
    ask(page, "Count.")
    room.script = lambda body: Script(pieces=[" three", " four", "."], prompt_tokens=14)
    settings(page, temperature="1.5", seed="")
    go_on(page)
    idle(page)
    assert answers(page) == ["One two three four."]
    body = room.asked[-1]
    assert asked(room) == [("user", "Count."), ("assistant", "One two")]
    assert body["continue_final_message"] is True
    assert (body["temperature"], body["seed"]) == (0.5, 7)  # drawn as it was
    expect(page.locator(".answer .ended")).to_have_count(0)
    expect(page.locator(".stats")).to_contain_text("5 tokens")
    expect(page.locator("#gauge-text")).to_have_text("17 of 32,768 tokens")
    expect(page.locator("#question")).to_be_focused()
    reload(page)
    expect(page.locator(".answer .markdown")).to_have_text("One two three four.")
    assert len(kept_nodes(page)) == 2  # the same message, no other version


@pytest.mark.long
@pytest.mark.parametrize("way", ["stopped", "lost", "reloaded"])
def test_one_that_was_cut_off_goes_on(page: Page, room: Room, way: str) -> None:
    room.script = lambda body: Script(
        pieces=["Half"] if way == "lost" else ["Half", Hold()], finish=None
    )
    ask(page, "Q", wait=False)
    expect(page.locator(".answer .markdown")).to_have_text("Half")
    if way == "stopped":
        page.keyboard.press("Escape")
    elif way == "reloaded":
        reload(page)
    room.script = lambda body: Script(pieces=[" and", Hold(), " half"])
    room.hold.clear()
    go_on(page)
    expect(page.locator(".answer .markdown")).to_have_text("Half and")
    room.hold.set()
    idle(page)
    assert answers(page) == ["Half and half"]
    assert room.asked[-1]["messages"][-1] == {"role": "assistant", "content": "Half"}
    expect(page.get_by_role("button", name="Continue the answer")).to_have_count(0)


@pytest.mark.long
def test_what_is_read_before_it_goes_on_is_shown_below_it(page: Page, room: Room) -> None:
    room.script = lambda body: Script(pieces=["Half"], finish="length")
    ask(page, "Q")
    room.script = lambda body: Script(pieces=[Hold(), " more"], error="out of memory")
    go_on(page)
    expect(page.locator(".answer .waiting")).to_have_text("Going on")
    expect(page.locator(".answer .markdown")).to_have_text("Half")
    room.hold.set()
    expect(page.locator(".answer .error")).to_contain_text("out of memory")
    assert answers(page) == ["Half more"]
    expect(page.get_by_role("button", name="Continue the answer")).to_be_visible()


@pytest.mark.long
def test_only_the_last_answer_is_gone_on_with(page: Page, room: Room) -> None:
    room.script = lambda body: Script(pieces=["Half"], finish="length")
    ask(page, "One")
    ask(page, "Two")
    expect(page.locator(".answer .ended")).to_have_count(2)
    expect(page.get_by_role("button", name="Continue the answer")).to_have_count(1)


@pytest.mark.long
def test_a_column_goes_on_by_its_own_model(page: Page, room: Room) -> None:
    page.click("#compare")
    room.script = lambda body: Script(pieces=["Half"], finish="length")
    ask(page, "Q")
    room.script = lambda body: Script(pieces=[" more"])
    page.get_by_role("button", name="Continue the answer").last.click()
    idle(page)
    assert answers(page) == ["Half", "Half more"]
    assert room.asked[-1]["model"] == "cerebrum-7b"


@pytest.mark.long
def test_the_real_server_goes_on(launched: Browser) -> None:
    """In pieces it is the answer that it is in one."""
    with real_server() as url, visit(launched, url) as page:
        settings(page, max_tokens="16")
        ask(page, "Name three colours.", wait=False)
        expect(page.locator("#stop")).to_be_visible()
        expect(page.locator("#stop")).to_be_hidden(timeout=100_000)
        whole = page.evaluate("document.querySelector('.answer .markdown').textContent")
        settings(page, max_tokens="8")
        page.click("#new")
        ask(page, "Name three colours.", wait=False)
        expect(page.locator(".answer .ended")).to_be_visible(timeout=100_000)
        go_on(page)
        expect(page.locator("#stop")).to_be_hidden(timeout=100_000)
        assert page.evaluate("document.querySelector('.answer .markdown').textContent") == whole
