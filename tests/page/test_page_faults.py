"""What can go wrong with the page: errors, keys, hostile answers, anything from outside."""

import re

import page_driver
import pytest
from page_driver import answers, ask, asked, idle, numbered, questions, reload
from page_room import FOLDER, Hold, Raw, Room, Script, visit
from playwright.sync_api import Browser, Page, expect

pytestmark = pytest.mark.long
launched, served, room, page = (
    page_driver.launched,
    page_driver.served,
    page_driver.room,
    page_driver.page,
)


def test_a_refused_request_shows_one_line_and_is_tried_again(page: Page, room: Room) -> None:
    room.script = lambda body: Script(status=400, error="the prompt is longer\nthan the context")
    ask(page, "Q")
    expect(page.locator("#gauge-text")).to_have_text("about 1 of 32,768 tokens")
    expect(page.locator(".error")).to_contain_text("the prompt is longer than the context")
    assert questions(page) == ["Q"]
    numbered(room)
    page.get_by_role("button", name="Try again").click()
    idle(page)
    assert answers(page) == ["Answer 2"]
    expect(page.locator(".error")).to_have_count(0)
    expect(page.locator(".count")).to_have_count(0)


@pytest.mark.parametrize(
    ("script", "line"),
    [
        (Script(pieces=["Some"], error="out of memory"), "out of memory"),
        (Script(pieces=["Some"], finish=None), "broke off"),
        (Script(pieces=["Some", Raw("data: {no json\n\n")]), "no JSON"),
        (Script(status=500, error=None), "status 500"),
    ],
)
def test_an_answer_that_fails_keeps_what_came(
    page: Page, room: Room, script: Script, line: str
) -> None:
    room.script = lambda body: script
    ask(page, "Q")
    expect(page.locator(".error")).to_contain_text(line)
    assert answers(page) == ["" if script.status == 500 else "Some"]
    reload(page)
    expect(page.locator(".error")).to_contain_text(line)


def test_a_full_queue_says_how_long_to_wait(page: Page, room: Room) -> None:
    room.script = lambda body: Script(
        status=429, error="the queue is full", headers={"Retry-After": "2"}
    )
    ask(page, "Q")
    expect(page.locator(".error")).to_contain_text(
        "the queue is full; the server asks to wait 2 seconds."
    )
    again = page.locator(".again")
    expect(again).to_be_disabled()
    numbered(room)
    expect(again).to_be_enabled()
    again.click()
    idle(page)
    assert answers(page) == ["Answer 2"]


def test_a_server_that_goes_is_said_and_found_again(page: Page, room: Room) -> None:
    room.script = lambda body: Script(pieces=["Half", Hold()])
    ask(page, "Q", wait=False)
    expect(page.locator(".answer .markdown")).to_have_text("Half")
    room.stop()
    expect(page.locator(".error")).to_contain_text("broke off")
    expect(page.locator("#banner")).to_contain_text("Looking for it")
    ask(page, "Typed meanwhile")
    expect(page.locator(".error").last).to_contain_text("does not answer")
    room.models = room.models[1:]  # and it comes back with another model
    room.start()
    expect(page.locator("#banner")).to_contain_text("back")
    numbered(room)
    page.get_by_role("button", name="Try again").last.click()
    idle(page)
    assert room.asked[-1]["model"] == "cerebrum-7b"
    assert asked(room)[-1] == ("user", "Typed meanwhile")


def test_the_key_is_asked_for_once_and_kept_for_the_tab(launched: Browser, room: Room) -> None:
    room.key = "sesame"
    context = launched.new_context()
    page = context.new_page()
    page.goto(room.url)
    page.locator("#key-value").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-note")).to_contain_text("refused")
    page.locator("#key-value").fill("sesame")
    page.keyboard.press("Enter")
    expect(page.locator("#key")).to_be_hidden()
    expect(page.locator("#model-0")).to_have_value("cerebrum-12.25b")
    ask(page, "Q")
    assert room.headers[-1]["authorization"] == "Bearer sesame"
    reload(page)
    ask(page, "R")
    expect(page.locator("#key")).to_be_hidden()
    assert "sesame" not in page.evaluate("JSON.stringify(localStorage)")
    context.close()


def test_without_the_key_the_question_stays(launched: Browser, room: Room) -> None:
    room.key = "sesame"
    context = launched.new_context()
    page = context.new_page()
    page.goto(room.url)
    page.locator("#key .close").click()
    expect(page.locator("#banner")).to_contain_text("needs its API key")
    page.fill("#question", "Q")
    page.press("#question", "Enter")
    assert page.input_value("#question") == "Q"
    expect(page.locator("#key")).to_be_visible()
    context.close()


# An answer full of traps


def test_an_answer_that_wants_to_run_is_only_text(page: Page, room: Room) -> None:
    from test_page_markdown import HOSTILE

    text = "\n\n".join(HOSTILE)
    room.script = lambda body: Script(pieces=[text[at : at + 7] for at in range(0, len(text), 7)])
    page.click("#compare")
    ask(page, "<img src=x onerror=window.ran=1>")
    reload(page)
    expect(page.locator(".answer")).to_have_count(2)
    expect(page.locator("#title")).to_have_text("<img src=x onerror=window.ran=1>")
    assert page.evaluate("window.ran") is None
    assert page.locator("#thread :is(script, img, iframe, style, meta, object)").count() == 0
    assert page.locator("#thread textarea").count() == 0


def test_nothing_is_asked_of_anyone_else(launched: Browser, room: Room) -> None:
    """`visit` fails for any such request; here the page also loads with the network cut off."""
    room.script = lambda body: Script(
        pieces=["![x](https://example.org/x.png) https://example.org"]
    )
    with visit(launched, room.url) as page:
        ask(page, "Q")
        page.context.set_offline(True)
        ask(page, "Offline")
        expect(page.locator(".error")).to_contain_text("does not answer")
        page.context.set_offline(False)
        expect(page.locator("#banner")).to_contain_text("back")


def test_the_page_is_small_and_self_contained() -> None:
    files = [file for file in FOLDER.iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 280_000
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text
        )
        assert not re.search(
            r"setHTML|createContextualFragment|DOMParser|srcdoc|new Function", text
        )
        assert not re.search(r"""(?:src|href|from|url\()\s*=?\s*["'(]https?:""", text)
        assert len(text.splitlines()) < 500
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|style=|\son\w+=|<script>", html)


def test_a_key_holds_where_the_browser_stores_nothing(launched: Browser, room: Room) -> None:
    room.key = "sesame"
    context = launched.new_context()
    context.add_init_script("Storage.prototype.setItem = () => { throw new Error('no'); };")
    page = context.new_page()
    page.goto(room.url)
    page.locator("#key-value").fill("sesame")
    page.keyboard.press("Enter")
    expect(page.locator("#model-0")).to_have_value("cerebrum-12.25b")
    ask(page, "Q")
    assert answers(page) == ["Hello world."]
    expect(page.locator("#key")).to_be_hidden()
    context.close()


def test_a_wait_goes_on_while_something_else_is_read(page: Page, room: Room) -> None:
    room.script = lambda body: Script(status=429, error="full", headers={"Retry-After": "9000"})
    ask(page, "Q")
    expect(page.locator(".again")).to_contain_text("Try again in 9000 s")
    page.evaluate(
        """() => {
            const now = performance.now.bind(performance);
            performance.now = () => now() + 5_000_000;
        }"""
    )
    page.click("#new")
    page.locator("#conversations .open").click()
    expect(page.locator(".again")).to_contain_text(re.compile(r"in [34]\d{3} s"))


def test_every_module_is_asked_for_with_the_page() -> None:
    """Not one after the other, as each is found in another."""
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    asked = set(re.findall(r'(?:href|src)="(\w+\.js)"', html))
    assert asked == {file.name for file in FOLDER.glob("*.js")}


def test_no_address_of_an_answer_is_looked_up() -> None:
    """Browsers ask for the names of a page's links before anyone follows them."""
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert '<meta http-equiv="x-dns-prefetch-control" content="off">' in html
    assert html.index("x-dns-prefetch-control") < html.index("<script")


def test_older_browsers_know_every_colour() -> None:
    """light-dark() came to Safari with 17.5 only."""
    assert "light-dark" not in re.sub(
        r"/\*.*?\*/", "", (FOLDER / "style.css").read_text(), flags=re.S
    )
