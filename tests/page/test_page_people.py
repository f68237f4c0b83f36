"""The page for people: keys, screens of every size, colours, screen readers."""

from typing import Any

import page_driver
import pytest
from page_driver import PHONE, ask, asked, idle, last, numbered, reload, until
from page_room import Hold, Room, Script, visit, words
from playwright.sync_api import Browser, Page, expect

pytestmark = pytest.mark.long
launched, served, room, page = (
    page_driver.launched,
    page_driver.served,
    page_driver.room,
    page_driver.page,
)


def test_everything_works_from_the_keyboard(page: Page, room: Room) -> None:
    numbered(room)
    keys = page.keyboard
    expect(page.locator("#question")).to_be_focused()
    keys.type("One")
    keys.press("Shift+Enter")
    keys.type("more")
    keys.press("Enter")
    idle(page)
    assert asked(room) == [("user", "One\nmore")]
    expect(page.locator("#question")).to_be_focused()
    keys.press("Control+/")
    expect(page.locator("#shortcuts")).to_be_visible()
    keys.press("Escape")
    expect(page.locator("#shortcuts")).to_be_hidden()
    keys.press("Alt+c")
    expect(page.locator("#compare")).to_have_attribute("aria-pressed", "true")
    keys.press("Alt+c")
    keys.press("Alt+s")
    expect(page.locator("#settings")).to_be_visible()
    keys.press("Escape")
    keys.press("Alt+l")
    expect(page.locator("#toggle-list")).to_have_attribute("aria-expanded", "false")
    keys.press("Alt+l")
    page.focus("#scroller")
    keys.press("?")
    expect(page.locator("#shortcuts")).to_be_visible()
    keys.press("Escape")
    page.focus("#scroller")
    keys.press("/")
    expect(page.locator("#question")).to_be_focused()
    keys.press("Alt+n")
    expect(page.locator(".answer")).to_have_count(0)
    keys.type("Two?")
    keys.press("Enter")
    idle(page)
    # The buttons under an answer are reached with Tab, and keep the focus.
    last(page, "Another answer").focus()
    keys.press("Enter")
    idle(page)
    expect(page.locator(".count")).to_have_text("2/2")
    expect(page.locator("#question")).to_be_focused()
    last(page, "Version before").focus()
    keys.press("Enter")
    expect(last(page, "Next version")).to_be_focused()


def test_enter_that_ends_a_composed_character_does_not_send(page: Page, room: Room) -> None:
    page.fill("#question", "にほん")
    page.evaluate(
        """document.getElementById("question").dispatchEvent(new KeyboardEvent(
            "keydown", { key: "Enter", isComposing: true, bubbles: true, cancelable: true }))"""
    )
    assert page.input_value("#question") == "にほん"
    assert room.asked == []


@pytest.mark.parametrize("comparing", [False, True])
def test_a_phone_shows_all_without_scrolling_sideways(
    launched: Browser, room: Room, comparing: bool
) -> None:
    long = (
        "w" * 300 + " | x\n\n```\n" + "c" * 300 + "\n```\n\n" + "|a" * 30 + "|\n" + "|-" * 30 + "|"
    )
    room.script = lambda body: Script(pieces=[long])
    room.models = [one | {"id": one["id"] + "-with-a-long-name" * 3} for one in room.models]
    with visit(launched, room.url, **PHONE) as page:
        if comparing:
            page.tap("#compare")
        page.fill("#question", "q" * 200)
        page.tap("#send")
        idle(page)
        for width in (360, 390, 700):
            page.set_viewport_size({"width": width, "height": 740})
            assert page.evaluate("document.scrollingElement.scrollWidth") <= width
            assert page.evaluate("scroller.scrollWidth <= scroller.clientWidth")
            outside = page.evaluate(
                """() => Array.from(document.querySelectorAll("main :is(button, select, textarea)"))
                    .filter((one) => one.getClientRects().length && !one.closest(".code, .table"))
                    .filter((one) => one.getBoundingClientRect().right > innerWidth)
                    .map((one) => one.outerHTML)"""
            )
            assert outside == []
        page.set_viewport_size({"width": 360, "height": 740})
        page.tap("#toggle-list")
        expect(page.locator("#conversations .open")).to_be_in_viewport()
        page.tap("#new")
        expect(page.locator("#conversations .open")).not_to_be_in_viewport()


CONTRASTS = """() => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const rgba = (color) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = color;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const light = (color) => {
        const [r, g, b] = color.map((c) => c / 255)
            .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = (one) => {
        for (; one; one = one.parentElement) {
            const color = rgba(getComputedStyle(one).backgroundColor);
            if (color[3] === 255) return color;
        }
        return [255, 255, 255, 255];
    };
    const low = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const one = walker.currentNode.parentElement;
        const shown = one.checkVisibility({ visibilityProperty: true });
        if (!walker.currentNode.data.trim() || !shown) continue;
        if (one.closest(":disabled")) continue;
        const [a, b] = [light(rgba(getComputedStyle(one).color)), light(behind(one))];
        const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (contrast < 4.5) low.push([walker.currentNode.data.trim(), contrast]);
    }
    return low;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_enough(launched: Browser, room: Room, scheme: Any) -> None:
    answer = (
        "# T\n\ntext `code` [l](https://example.org) \n\n> quote\n\n```py\nx\n```\n\n|a|b|\n|-|-|\n"
    )
    room.script = lambda body: Script(pieces=[answer], prompt_tokens=5000, finish="length")
    with visit(launched, room.url, color_scheme=scheme) as page:
        assert page.evaluate(CONTRASTS) == []
        ask(page, "Q")
        page.click("#compare")
        room.script = lambda body: Script(status=400, error="wrong")
        ask(page, "R")
        assert page.evaluate(CONTRASTS) == []
        page.click("#help")
        assert page.evaluate(CONTRASTS) == []
        page.keyboard.press("Escape")
        page.click("#open-settings")
        page.fill("[name=top_p]", "5")
        assert page.evaluate(CONTRASTS) == []


def test_the_theme_can_be_switched_and_stays(launched: Browser, room: Room) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    with visit(launched, room.url, color_scheme="dark") as page:
        dark = page.evaluate(background)
        page.get_by_role("button", name="Light colours").click()
        light = page.evaluate(background)
        assert light != dark
        reload(page)
        assert page.evaluate(background) == light
        page.get_by_role("button", name="Dark colours").click()
        assert page.evaluate(background) == dark
        page.emulate_media(color_scheme="light")  # the system's is followed again
        assert page.evaluate(background) == light


def test_motion_is_left_out_where_it_is_not_wanted(launched: Browser, room: Room) -> None:
    room.script = lambda body: Script(pieces=[Hold()])
    for motion, moving in (("no-preference", True), ("reduce", False)):
        with visit(launched, room.url, reduced_motion=motion) as page:
            ask(page, "Q", wait=False)
            page.wait_for_selector(".waiting")
            assert page.evaluate("document.getAnimations().length > 0") is moving


def test_every_control_has_a_name_and_every_label_a_field(page: Page, room: Room) -> None:
    ask(page, "Q")
    page.click("#compare")
    nameless = page.evaluate(
        """() => Array.from(document.querySelectorAll("button, input, select, textarea, [role]"))
            .filter((one) => !one.matches("[aria-label], [aria-labelledby], [role=status]"))
            .filter((one) => !one.textContent.trim() && !one.labels?.length)
            .map((one) => one.outerHTML)"""
    )
    assert nameless == []
    ids = page.evaluate("Array.from(document.querySelectorAll('[id]'), (one) => one.id)")
    assert len(ids) == len(set(ids))
    pointed = page.evaluate(
        """() => ["aria-describedby", "aria-controls", "aria-labelledby", "for"].flatMap((name) =>
            Array.from(document.querySelectorAll(`[${name}]`), (one) => one.getAttribute(name)))"""
    )
    pointed = " ".join(pointed).split()
    assert set(pointed) <= set(ids)
    assert page.locator("main").count() == page.locator("h1").count() == 1
    assert page.locator("html").get_attribute("lang") == "en"


def test_a_screen_reader_hears_the_answer_once_it_is_whole(page: Page, room: Room) -> None:
    page.evaluate(
        """() => {
            window.heard = [];
            const region = document.getElementById("announcer");
            new MutationObserver(() => region.textContent && window.heard.push(region.textContent))
                .observe(region, { childList: true });
        }"""
    )
    room.script = lambda body: Script(pieces=[*words("one two"), Hold(), *words(" three four")])
    ask(page, "Q", wait=False)
    expect(page.locator(".answer .markdown")).to_have_text("one two")
    until(page, "window.heard.length === 1")
    room.hold.set()
    until(page, "window.heard.length === 2")
    assert page.evaluate("window.heard") == ["Answering.", "Answer: one two three four"]
    assert page.locator("#announcer").get_attribute("role") == "status"


def test_skipping_to_the_question_stays_in_the_conversation(page: Page, room: Room) -> None:
    ask(page, "Q")
    before = page.url
    page.locator("#skip").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#question")).to_be_focused()
    assert page.url == before
    expect(page.locator(".answer")).to_have_count(1)


def test_on_a_mac_option_writes_signs_and_control_shift_acts(launched: Browser, room: Room) -> None:
    """Option+L is the @ of a German keyboard, Option+N its tilde."""
    press = """(keys) => document.getElementById("question").dispatchEvent(
        new KeyboardEvent("keydown", { bubbles: true, cancelable: true, ...keys }))"""
    with visit(launched, room.url) as page:
        mac = "Object.defineProperty(navigator, 'platform', { get: () => 'MacIntel' })"
        page.context.add_init_script(mac)
        reload(page)
        opened = page.locator("#toggle-list")
        expect(opened).to_have_attribute("aria-expanded", "true")
        for key, code in (("@", "KeyL"), ("~", "KeyN"), ("Dead", "KeyN"), ("ç", "KeyC")):
            assert page.evaluate(press, {"key": key, "code": code, "altKey": True})
        expect(opened).to_have_attribute("aria-expanded", "true")
        page.keyboard.press("Control+Shift+L")
        expect(opened).to_have_attribute("aria-expanded", "false")
        assert opened.get_attribute("title") == "Conversations (Control+Shift+L)"
        page.click("#help")
        expect(page.locator("#shortcuts")).to_contain_text("Control+Shift N")


def test_safaris_enter_after_a_composed_word_sends_nothing(page: Page, room: Room) -> None:
    """It comes after the composition's end, told apart by its code alone."""
    enter = """(one) => one.dispatchEvent(new KeyboardEvent("keydown", {
        key: "Enter", keyCode: 229, bubbles: true, cancelable: true }))"""
    ask(page, "にほん")
    page.press("#question", "ArrowUp")
    page.get_by_label("Edited question").evaluate(enter)
    expect(page.get_by_label("Edited question")).to_be_visible()
    assert len(room.asked) == 1
    page.locator("#conversations li").hover()
    page.get_by_role("button", name="Rename").click()
    page.get_by_label("Name").evaluate(enter)
    expect(page.get_by_label("Name")).to_be_focused()


def test_the_focus_goes_on_where_its_button_is_gone(page: Page, room: Room) -> None:
    page.click("#compare")
    ask(page, "Q")
    page.get_by_role("button", name="Continue with this").first.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#question")).to_be_focused()
    page.locator("#conversations .open").focus()
    page.get_by_role("button", name="Rename Q").focus()
    page.keyboard.press("Enter")
    page.keyboard.type("R")
    page.keyboard.press("Enter")
    expect(page.locator("#conversations .open")).to_have_text("R")
    expect(page.locator("#conversations .open")).to_be_focused()


def test_a_phones_keyboard_writes_lines_and_stays_away(launched: Browser, room: Room) -> None:
    room.script = lambda body: Script(pieces=["a", Hold()])
    with visit(launched, room.url, **PHONE) as page:
        page.tap("#question")
        page.keyboard.type("One")
        page.keyboard.press("Enter")
        page.keyboard.type("Two")
        assert page.input_value("#question") == "One\nTwo"
        page.tap("#send")
        expect(page.locator(".answer .markdown")).to_have_text("a")
        expect(page.locator("#question")).not_to_be_focused()
        # What is open in front is left first, the answer stopped after it.
        page.tap("#toggle-list")
        page.keyboard.press("Escape")
        expect(page.locator("#toggle-list")).to_have_attribute("aria-expanded", "false")
        expect(page.locator("#stop")).to_be_visible()
        page.keyboard.press("Escape")
        idle(page)
        attached: Any = {"name": "a.txt", "mimeType": "", "buffer": b"text"}
        page.set_input_files("#text-files", attached)
        expect(page.locator(".chip")).to_be_visible()
        page.tap("#toggle-list")
        small = page.evaluate(
            """() => Array.from(document.querySelectorAll("button, select, textarea"))
                .filter((one) => one.checkVisibility({ visibilityProperty: true }))
                .filter((one) => one.id !== "skip" && one.getBoundingClientRect().height < 40)
                .map((one) => one.outerHTML)"""
        )
        assert small == []


def test_a_keyboard_that_covers_the_page_shortens_it(launched: Browser, room: Room) -> None:
    """Safari tells of it only through the visual viewport."""
    with visit(launched, room.url, **PHONE) as page:
        page.context.add_init_script(
            """{
                const view = Object.assign(new EventTarget(), { scale: 1, height: 740 });
                Object.defineProperty(window, "visualViewport", { value: view });
            }"""
        )
        reload(page)
        resize = """(height) => {
            visualViewport.height = height;
            visualViewport.dispatchEvent(new Event("resize"));
            return document.getElementById("composer").getBoundingClientRect().bottom;
        }"""
        assert page.evaluate(resize, 400) <= 400
        assert page.evaluate(resize, 740) > 600


def test_each_thing_is_said_once_to_those_who_listen(page: Page, room: Room) -> None:
    page.evaluate(
        """() => {
            window.heard = [];
            const region = document.getElementById("announcer");
            new MutationObserver(() => region.textContent && window.heard.push(region.textContent))
                .observe(region, { childList: true });
        }"""
    )
    room.script = lambda body: Script(pieces=["**One**\\n\\n- two"])
    page.click("#compare")
    ask(page, "Q")
    until(page, "window.heard.length === 2")
    text = page.evaluate("window.heard[1]")
    assert text.startswith("Answer by cerebrum-12.25b: One")
    assert "Answer by cerebrum-7b: One" in text
    assert "*" not in text
    room.script = lambda body: Script(status=400, error="too long")
    ask(page, "R")
    until(page, "window.heard.at(-1).includes('too long')")
    assert page.locator("#thread [role=alert], #thread [aria-live]").count() == 0


def test_the_smallest_screen_begins_at_the_beginning(launched: Browser, room: Room) -> None:
    small = PHONE | {"viewport": {"width": 360, "height": 520}}
    with visit(launched, room.url, **small) as page:
        assert page.evaluate("scroller.scrollHeight > scroller.clientHeight")
        expect(page.locator("#welcome h2")).to_be_in_viewport(ratio=1)
        # And a dialog does not bring up the keyboard.
        page.tap("#open-settings")
        expect(page.locator("#settings-title")).to_be_focused()
