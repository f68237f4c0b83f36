"""What the page's tests have in common: a browser, a stand-in server, and hands and eyes.

Test modules take the fixtures over by name: `page = page_driver.page`.
"""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from page_room import Room, Script, browser, stand_in, visit
from playwright.sync_api import Browser, Page, expect

PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}


@pytest.fixture(scope="module")
def launched() -> Iterator[Browser]:
    with browser() as one:
        yield one


@pytest.fixture(scope="module")
def served() -> Iterator[Room]:
    with stand_in() as one:
        yield one


@pytest.fixture
def room(served: Room) -> Iterator[Room]:
    served.forget()
    yield served
    served.hold.set()


@pytest.fixture
def page(launched: Browser, room: Room) -> Iterator[Page]:
    with visit(launched, room.url) as one:
        yield one


def ready(page: Page) -> None:
    """Wait until the page knows the models: before, nothing is asked."""
    page.wait_for_selector("#model-0 option", state="attached")


def reload(page: Page) -> None:
    page.reload()
    ready(page)


def ask(page: Page, text: str, wait: bool = True) -> None:
    ready(page)
    page.fill("#question", text)
    page.press("#question", "Enter")
    if wait:
        idle(page)


def idle(page: Page) -> None:
    expect(page.locator("#stop")).to_be_hidden()


def answers(page: Page) -> list[str]:
    return _texts(page, ".answer .markdown")


def questions(page: Page) -> list[str]:
    return _texts(page, ".question .body")


def _texts(page: Page, selector: str) -> list[str]:
    """Texts as they are shown. A message that no frame has drawn yet has none (CSS's
    content-visibility), so all are made to have been drawn while they are read.
    """
    found: list[str] = page.evaluate(
        """(selector) => {
            const articles = [...document.querySelectorAll("#thread > article")];
            for (const one of articles) one.style.contentVisibility = "visible";
            const texts = [...document.querySelectorAll(selector)].map((one) => one.innerText);
            for (const one of articles) one.style.contentVisibility = "";
            return texts;
        }""",
        selector,
    )
    return found


def until(page: Page, condition: str) -> None:
    """Playwright's own wait_for_function is refused by the page's policy."""
    for _ in range(800):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(10)
    raise AssertionError(f"never came true: {condition}")


def titles(page: Page) -> list[str]:
    return page.locator("#conversations .open").all_inner_texts()


def last(page: Page, name: str) -> Any:
    """The button of that name under the last message that has one."""
    return page.locator("article").get_by_role("button", name=name, exact=True).last


def asked(room: Room, index: int = -1) -> list[tuple[str, str]]:
    return [(one["role"], one["content"]) for one in room.asked[index]["messages"]]


def numbered(room: Room) -> None:
    """Have the stand-in number its answers."""
    room.script = lambda body: Script(pieces=["Answer", f" {len(room.asked)}"])


def export(page: Page, name: str, kind: str = "json") -> Any:
    page.locator("#conversations li", has_text=name).hover()
    page.get_by_role("button", name=f"Export {name}").click()
    with page.expect_download() as download:
        page.click(f"#export-{kind}")
    return download.value


def file(name: str, value: Any) -> Any:
    text = value if isinstance(value, str) else json.dumps(value)
    return {"name": name, "mimeType": "application/json", "buffer": text.encode()}


def take(page: Page, *files: Any) -> None:
    """Import files, such as `file` makes."""
    page.set_input_files("#file", list(files))


def settings(page: Page, **values: str) -> None:
    page.click("#open-settings")
    for name, value in values.items():
        page.fill(f"[name={name}]", value)
    page.click("#settings .main")


def kept_nodes(page: Page) -> list[dict[str, Any]]:
    """Every message in the browser's database."""
    found: list[dict[str, Any]] = page.evaluate(
        """() => new Promise((resolve) => {
            indexedDB.open("cerebrum").onsuccess = ({ target }) => {
                const all = target.result.transaction("nodes").objectStore("nodes").getAll();
                all.onsuccess = () => {
                    target.result.close();
                    resolve(all.result);
                };
            };
        })"""
    )
    return found
