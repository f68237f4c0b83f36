"""Search over the page's conversations: what it finds, and the way there and back."""

from typing import Any

import page_driver
import pytest
from page_driver import ask, file, idle, last, take, until
from page_room import Hold, Room, Script, some, visit
from playwright.sync_api import Browser, Page, expect

pytestmark = some
launched, served, room, page = (
    page_driver.launched,
    page_driver.served,
    page_driver.room,
    page_driver.page,
)
HITS = "#search-hits li"


def said(*texts: str) -> list[dict[str, str]]:
    """A conversation: questions and answers in turn."""
    return [{"role": ("user", "assistant")[n % 2], "content": t} for n, t in enumerate(texts)]


def search(page: Page, text: str) -> None:
    page.keyboard.press("Control+k")
    expect(page.locator("#search-box")).to_be_focused()
    page.keyboard.type(text)


def test_titles_and_messages_are_found_and_enter_shows_the_hit(page: Page) -> None:
    long = "\n\n".join(f"paragraph {n}" for n in range(200))
    take(page, file("a.json", said("Rainbows", f"{long}\n\nthe **Zebra** stripes\n\n{long}", "On")))
    take(page, file("b.json", said("A zebra crossing", "Stop there.")))
    expect(page.locator("#conversations .open")).to_have_count(2)
    search(page, "zebra")
    expect(page.locator(HITS)).to_have_count(3)
    expect(page.locator(f"{HITS} mark")).to_have_text(["zebra", "zebra", "Zebra"])
    expect(page.locator("#search-said")).to_have_text("3 hits")
    expect(page.locator(f'{HITS}[aria-selected="true"]')).to_contain_text("crossing")
    page.keyboard.press("ArrowUp")  # from the first to the last
    chosen = page.locator(f'{HITS}[aria-selected="true"]')
    expect(chosen).to_contain_text("Answer:")
    hit = chosen.get_attribute("id")
    assert page.locator("#search-box").get_attribute("aria-activedescendant") == hit
    page.keyboard.press("Enter")
    expect(page.locator("#search")).to_be_hidden()
    expect(page.locator("#title")).to_have_text("Rainbows")
    expect(page.locator(".answer strong")).to_be_in_viewport()
    assert page.evaluate("[...CSS.highlights.get('found')].map(String)") == ["Zebra"]
    expect(page.locator(".answer").first).to_be_focused()


def test_escape_gives_the_focus_back_and_changes_nothing(page: Page) -> None:
    ask(page, "One")
    page.fill("#question", "half a thou")
    address = page.url
    search(page, "one")
    expect(page.locator(HITS)).to_have_count(2)  # its title, and the question
    page.keyboard.press("Escape")
    expect(page.locator("#search")).to_be_hidden()
    expect(page.locator("#question")).to_be_focused()
    assert (page.url, page.input_value("#question")) == (address, "half a thou")


def test_words_are_found_without_their_accents_and_all_of_them_are_needed(page: Page) -> None:
    take(page, file("a.json", said("Über die Größe", "Der Bär maß 2 m; ﬁn.")))
    take(page, file("b.json", said("Die Größe allein", "x")))
    expect(page.locator("#conversations .open")).to_have_count(2)
    search(page, "UBER grosse")
    expect(page.locator(f"{HITS} mark")).to_have_text(["Über", "Größe", "Über", "Größe"])
    page.fill("#search-box", "bar MASS")
    expect(page.locator(f"{HITS} mark")).to_have_text(["Bär", "maß"])
    page.fill("#search-box", "no such thing")
    expect(page.locator("#search-said")).to_have_text("Nothing found.")
    page.keyboard.press("Enter")
    expect(page.locator("#search")).to_be_visible()
    page.fill("#search-box", "")
    expect(page.locator(HITS)).to_have_count(2)  # the conversations, the newest first


def test_a_hit_in_a_version_that_is_not_shown_is_shown(page: Page, room: Room) -> None:
    room.script = lambda body: Script(pieces=[f"It is {'red' if len(room.asked) == 1 else 'blue'}"])
    ask(page, "Colour?")
    last(page, "Another answer").click()
    idle(page)
    expect(page.locator(".answer .markdown")).to_have_text("It is blue")
    page.click("#open-search")
    page.fill("#search-box", "red")
    page.locator(HITS, has=page.locator("mark")).click()
    expect(page.locator(".answer .markdown")).to_have_text("It is red")
    expect(page.locator(".count")).to_have_text("1/2")


def test_a_file_in_a_question_is_unfolded_where_it_has_the_hit(page: Page, room: Room) -> None:
    text = b"line\n" * 8000 + b"the aardvark\n" + b"line\n" * 800
    held: Any = {"name": "a.txt", "mimeType": "", "buffer": text}
    other: Any = {"name": "b.txt", "mimeType": "", "buffer": b"nothing"}
    page.set_input_files("#text-files", [held, other])
    ask(page, "What is it?")
    page.click("#new")
    search(page, "aardvark")
    expect(page.locator(f"{HITS} mark")).to_have_text("aardvark")
    page.keyboard.press("Enter")
    expect(page.locator(".question pre")).to_have_count(1)
    until(page, "[...CSS.highlights.get('found')].map(String).join() === 'aardvark'")
    expect(page.locator(".question .file").first).to_contain_text("… and")
    seen = """() => {
        const [range] = CSS.highlights.get("found");
        const [a, b] = [range, scroller].map((one) => one.getBoundingClientRect());
        return a.top > b.top && a.bottom < b.bottom;
    }"""
    until(page, f"({seen})()")


@pytest.mark.long
def test_a_search_is_text_and_nothing_more(page: Page) -> None:
    text = "<img src=x onerror=window.ran=1> .* \\ ( [a"
    take(page, file("a.json", said(text, "y")))
    expect(page.locator("#conversations .open")).to_have_count(1)
    search(page, "<img .* \\ ( [a")
    expect(page.locator(HITS)).to_have_count(2)
    assert page.locator("#search-hits :is(img, a)").count() == 0
    assert page.evaluate("window.ran") is None


def test_all_places_of_a_word_in_a_long_text_are_found_in_one_pass(page: Page) -> None:
    found = page.evaluate(
        """async () => {
            const { placesOf } = await import("/search.js");
            const text = "Größe, große, GROSSE, ﬁn; ";
            const began = performance.now();
            const many = placesOf("grosse", text.repeat(20_000), 500);
            const seconds = (performance.now() - began) / 1000;
            return [placesOf("grosse", text, 9), placesOf("fin", text, 9), many.length,
                    many.at(-1), seconds];
        }"""
    )
    short, joined, count, last, seconds = found
    assert short == [[0, 5], [7, 12], [14, 20]]
    assert joined == [[22, 24]]
    assert (count, last) == (500, [166 * 26 + 7, 166 * 26 + 12])
    assert seconds < 5  # looked for anew from each place, it would be some twenty seconds


def test_more_hits_than_are_shown_are_told(page: Page) -> None:
    take(page, file("a.json", said("One", *["needle"] * 5)))
    take(page, file("b.json", said("Two", *["needle and thread"] * 6)))
    expect(page.locator("#conversations .open")).to_have_count(2)
    search(page, "needle")
    expect(page.locator("#search-said")).to_have_text("10 hits, and there are more.")
    page.fill("#search-box", "needle thread")
    expect(page.locator("#search-said")).to_have_text("5 hits, and there are more.")
    page.fill("#search-box", "one")
    expect(page.locator("#search-said")).to_have_text("2 hits")


def test_the_page_goes_on_while_it_searches(page: Page) -> None:
    """By a clock on which each message takes long."""
    messages = said("The needle", *["hay"] * 199)
    take(page, file("a.json", messages))
    expect(page.locator("#conversations .open")).to_have_count(1)
    search(page, "")
    expect(page.locator(HITS)).to_have_count(1)
    meanwhile = page.evaluate(
        """async () => {
            const now = performance.now.bind(performance);
            let [looks, ticks, first] = [0, 0, null];
            performance.now = () => {
                first ??= ticks;
                return now() + 100 * (looks += 1);
            };
            const timer = setInterval(() => (ticks += 1), 1);
            const box = document.getElementById("search-box");
            box.value = "needle";
            box.dispatchEvent(new Event("input"));
            while (!document.querySelector("#search-hits mark")) {
                await new Promise((done) => setTimeout(done, 1));
            }
            clearInterval(timer);
            performance.now = now;
            return ticks - first;
        }"""
    )
    assert meanwhile > 60  # and none where all of it is one task


@pytest.mark.long
def test_on_a_mac_the_key_is_command(launched: Browser, room: Room) -> None:
    with visit(launched, room.url) as page:
        mac = "Object.defineProperty(navigator, 'platform', { get: () => 'MacIntel' })"
        page.context.add_init_script(mac)
        page_driver.reload(page)
        page.keyboard.press("Control+k")  # there it cuts the rest of a line
        expect(page.locator("#search")).to_be_hidden()
        page.keyboard.press("Meta+k")
        expect(page.locator("#search")).to_be_visible()
        assert page.locator("#open-search").get_attribute("title") == "Search (⌘K)"


@pytest.mark.long
def test_while_an_answer_comes_it_can_be_found(page: Page, room: Room) -> None:
    room.script = lambda body: Script(pieces=["walrus", Hold(), " and carpenter"])
    ask(page, "Go", wait=False)
    until(page, "document.querySelector('.answer')?.textContent.includes('walrus')")
    page.wait_for_timeout(500)  # it is kept as it grows
    search(page, "walrus")
    expect(page.locator(HITS)).to_have_count(1)
    page.keyboard.press("Enter")
    room.hold.set()
    expect(page.locator(".answer .markdown")).to_have_text("walrus and carpenter")
