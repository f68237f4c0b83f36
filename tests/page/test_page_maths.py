"""Formulas and code on the page: set by the server, and what becomes of them."""

import json

import page_driver
import pytest
from page_driver import answers, ask, until
from page_room import Hold, Room, Script, some
from playwright.sync_api import Page, Route, expect

pytestmark = some
launched, served = page_driver.launched, page_driver.served
room, page = page_driver.room, page_driver.page

SET = ".answer .set"
COPIED = """() => {
    const event = new ClipboardEvent("copy", { clipboardData: new DataTransfer(), bubbles: true });
    document.querySelector(".answer").dispatchEvent(event);
    return event.clipboardData.getData("text/plain");
}"""


def says(room: Room, *pieces: str | Hold) -> None:
    room.script = lambda body: Script(pieces=pieces)


def typesets(page: Page, answer: object, status: int = 200) -> None:
    """Have every request for formulas answered so."""

    def fulfil(route: Route) -> None:
        jobs = json.loads(route.request.post_data or "{}")["jobs"]
        route.fulfill(json={"answers": [answer] * len(jobs)}, status=status)

    page.route("**/typeset", fulfil)


def test_a_formula_that_grows_stays_drawn(page: Page, room: Room) -> None:
    says(room, "So $x^2$ and ", Hold(), "$y^", "2$ and", " so on.")
    ask(page, "Hi", wait=False)
    expect(page.locator(SET)).to_have_count(1)
    page.evaluate(
        """() => {
            window.counts = [];
            const count = () => counts.push(document.querySelectorAll(".answer .set").length);
            const watched = document.querySelector(".answer .markdown");
            new MutationObserver(count).observe(watched, { childList: true, subtree: true });
        }"""
    )
    room.hold.set()
    expect(page.locator(SET)).to_have_count(2)
    page_driver.idle(page)
    counts = page.evaluate("counts")
    assert counts == sorted(counts)
    assert counts[0] == 1  # what was drawn is drawn again at once, not after another request


def test_copied_text_has_the_source(page: Page, room: Room) -> None:
    says(room, "So $x^2$ is\n\n\\[\n\\frac{1}{2}\n\\]\n\nand **more**.")
    ask(page, "Hi")
    expect(page.locator(SET)).to_have_count(2)
    page.evaluate("getSelection().selectAllChildren(document.querySelector('.answer .markdown'))")
    assert page.evaluate(COPIED) == "So $x^2$ is\n\n\\[\n\\frac{1}{2}\n\\]\n\nand more."
    # A selection that begins within a formula has all of it, and the page is as it was.
    page.evaluate(
        """() => {
            const [inner] = document.querySelectorAll(".answer math mn");
            const end = document.querySelector(".answer strong");
            getSelection().setBaseAndExtent(inner.firstChild, 0, end, 1);
        }"""
    )
    assert page.evaluate(COPIED) == "$x^2$ is\n\n\\[\n\\frac{1}{2}\n\\]\n\nand more"
    assert page.locator(".answer math").count() == 2
    page.evaluate("getSelection().selectAllChildren(document.querySelector('.answer strong'))")
    assert page.evaluate(COPIED) == ""  # no formula in it: the browser's own copy


def test_without_the_server_formulas_are_as_written(page: Page, room: Room) -> None:
    typesets(page, None, status=500)
    says(room, "So $x^2$.")
    with page.expect_response("**/typeset"):
        ask(page, "Hi")
    page.wait_for_timeout(50)
    assert answers(page) == ["So $x^2$."]


@pytest.mark.parametrize(
    "answer",
    [
        ["script", {}, ["window.ran = 1"]],
        ["math", {}, [["img", {"src": "x", "onerror": "window.ran = 1"}, []]]],
        ["math", {}, [["a", {"href": "javascript:1"}, ["x"]]]],
        ["math", {}, [["annotation-xml", {"encoding": "text/html"}, []]]],
        "text",
        7,
        {},
        [],
    ],
)
@pytest.mark.one_in(10)
def test_no_other_element_is_drawn(page: Page, room: Room, answer: object) -> None:
    typesets(page, answer)
    says(room, "So $x^2$.")
    with page.expect_response("**/typeset"):
        ask(page, "Hi")
    page.wait_for_timeout(50)
    assert answers(page) == ["So $x^2$."]
    assert page.evaluate("window.ran") is None


def test_no_other_attribute_is_drawn(page: Page, room: Room) -> None:
    style = "color:red;position:fixed;background:url(https://example.org/x)"
    given = {"onclick": "window.ran = 1", "href": "#x", "class": "x", "id": "x", "style": style}
    tree: list[object] = ["math", {"display": "block", **given}, [["mi", given, ["x"]]]]
    typesets(page, tree)
    says(room, "So $x^2$.")
    ask(page, "Hi")
    expect(page.locator(SET)).to_have_count(1)
    found = page.evaluate(
        """[...document.querySelectorAll(".answer math, .answer math *")].map((one) =>
            [one.getAttributeNames(), one.getAttribute("style")])"""
    )
    assert found == [[["display", "style"], "color: red;"], [["style"], "color: red;"]]


def test_code_is_coloured_when_it_is_whole(page: Page, room: Room) -> None:
    program = "def f(x):\n    return 2**x  # no $x$"
    says(room, f"```python\n{program}\n", Hold(), "```\n")
    ask(page, "Hi", wait=False)
    until(page, "document.querySelector('.answer code')?.textContent.includes('return')")
    assert page.locator(".answer code span").count() == 0
    room.hold.set()
    expect(page.locator(".answer code .comment")).to_have_text("# no $x$")
    assert page.locator(".answer code").text_content() == program
    kinds = page.locator(".answer code span").evaluate_all("all => all.map((one) => one.className)")
    assert set(kinds) == {"keyword", "name", "number", "comment"}


def test_a_long_program_has_colours_while_it_grows_and_is_seldom_sent(
    page: Page, room: Room
) -> None:
    lines = [f"value_{n} = {n}  # the number {n}\n" for n in range(300)]
    sent: list[str] = []

    def record(route: Route) -> None:
        jobs = json.loads(route.request.post_data or "{}")["jobs"]
        sent.extend(job[2] for job in jobs if job[0] == "code")
        route.continue_()

    page.route("**/typeset", record)
    says(room, "```python\n", *lines[:200], Hold(), *lines[200:], "```\n")
    ask(page, "Hi", wait=False)
    until(page, "document.querySelectorAll('.answer code .comment').length > 60")
    room.hold.set()
    page_driver.idle(page)
    expect(page.locator(".answer code .comment")).to_have_count(300)
    assert page.locator(".answer code").text_content() == "".join(lines).rstrip("\n")
    assert sum(map(len, sent)) < 4.5 * len("".join(lines))
    assert all("".join(lines).startswith(f"{text}\n") for text in sent)  # no half line


def test_colours_stay_while_a_program_ends(page: Page, room: Room) -> None:
    lines = [f"value_{n} = {n}  # the number {n}\n" for n in range(40)]
    says(room, "```python\n", *lines, Hold(), "`", "``\n", "\nAnd so on.")
    ask(page, "Hi", wait=False)
    until(page, "document.querySelectorAll('.answer code .comment').length > 10")
    page.evaluate(
        """() => {
            window.counts = [];
            const count = () => counts.push(document.querySelectorAll(".answer .comment").length);
            const watched = document.querySelector(".answer .markdown");
            new MutationObserver(count).observe(watched, { childList: true, subtree: true });
        }"""
    )
    room.hold.set()
    page_driver.idle(page)
    expect(page.locator(".answer code .comment")).to_have_count(40)
    assert min(page.evaluate("counts")) > 10


def test_answers_that_differ_in_a_formula_alone_differ(page: Page, room: Room) -> None:
    room.script = lambda body: Script(
        pieces=["It is $\\frac12$ so."] if "12.25" in body["model"] else ["It is $12$ so."]
    )
    page.click("#compare")
    ask(page, "Hi")
    expect(page.locator(SET)).to_have_count(2)
    expect(page.locator(".caption")).to_have_text("The same for 2 words, then they differ.")
