"""The shelf in the page's menu and card: what could be loaded, and loading it."""

from typing import Any

import page_driver
import pytest
from page_driver import ask
from page_room import Hold, Raw, Room, Script, some, visit
from playwright.sync_api import Browser, Page, expect

pytestmark = some
launched, served, room = page_driver.launched, page_driver.served, page_driver.room


def row(name: str, state: str, **more: Any) -> dict[str, Any]:
    known = {"bytes": 4_100_000_000, "bits": 4, "blocks": 32, "positions": 32, "plan": None}
    rest = {"window": 4096, "model": None, "why_not": None, "loading": None}
    return {"id": name, "state": state, **known, **rest, **more}


class Shelf:
    """The page's requests for the shelf, answered here."""

    def __init__(self, page: Page) -> None:
        why = "big needs 24.00 GB, and 9.00 GB are free; other would fit"
        self.rows = [
            row("cerebrum-7b-4bit", "loaded", model="cerebrum-7b"),
            row("other", "on the shelf"),
            row("big", "on the shelf", why_not=why),
        ]
        self.asked: list[Any] = []
        self.refusal: str | None = None
        page.route("**/shelf", lambda route: route.fulfill(json=self.list()))
        page.route("**/shelf/load", self._load)

    def list(self) -> dict[str, Any]:
        return {"models": self.rows, "machine": "A toaster, 16 GB of memory"}

    def _load(self, route: Any) -> None:
        self.asked.append(route.request.post_data_json)
        if self.refusal is not None:
            route.fulfill(status=409, json={"error": {"message": self.refusal}})
            return
        self.rows[1] |= {"state": "loading", "loading": {"done": 1.2e9, "total": 4.1e9}}
        route.fulfill(json=self.rows[1])

    def arrive(self, room: Room) -> None:
        room.models = [*room.models, room.models[0] | {"id": "other"}]
        self.rows[1] |= {"state": "loaded", "model": "other", "loading": None}


def shown(page: Page) -> Shelf:
    """The page, opened anew before a server with a shelf."""
    shelf = Shelf(page)
    page_driver.reload(page)
    expect(page.locator("#model-0 optgroup")).to_have_count(1)
    return shelf


def test_a_model_is_loaded_from_the_menu(launched: Browser, room: Room) -> None:
    with visit(launched, room.url) as page:
        shelf = shown(page)
        options = page.locator("#model-0 optgroup option")
        expect(options).to_have_text(["other (4.10 GB)", "big (4.10 GB), not now"])
        expect(options.last).to_be_disabled()
        page.select_option("#model-0", "shelf:other")
        expect(page.locator("#banner")).to_have_text("Loading other: 1.20 GB of 4.10 GB")
        expect(page.locator("#model-0")).to_have_value("cerebrum-12.25b")
        ask(page, "Meanwhile")  # what was there before still answers
        assert room.asked[-1]["model"] == "cerebrum-12.25b"
        shelf.arrive(room)
        expect(page.locator("#model-0")).to_have_value("other")
        expect(page.locator("#banner")).to_have_text("other is loaded.")
        ask(page, "Now")
        assert room.asked[-1]["model"] == "other"
        assert shelf.asked == [{"id": "other"}]


def test_the_card_lists_the_shelf_and_why_one_can_not_be_loaded(
    launched: Browser, room: Room
) -> None:
    with visit(launched, room.url) as page:
        shelf = shown(page)
        page.select_option("#model-0", "cerebrum-7b")
        page.click("#open-card")
        card = page.locator("#card")
        expect(card).to_contain_text("A toaster, 16 GB of memory")
        expect(card).to_contain_text("stored in 4 bits each, 4.10 GB")
        items = page.locator("#card-others li")
        expect(items).to_have_count(2)
        expect(items.last).to_contain_text("big needs 24.00 GB")
        expect(items.last.get_by_role("button")).to_have_count(0)
        page.get_by_role("button", name="Load other").click()
        expect(items.first.locator("progress")).to_have_attribute("value", "1200000000")
        shelf.arrive(room)
        expect(items).to_have_count(1)
        page.keyboard.press("Escape")
        expect(page.locator("#model-0 option[value=other]")).to_have_count(1)
        expect(page.locator("#model-0")).to_have_value("cerebrum-7b")  # nobody chose the other


@pytest.mark.long
def test_a_model_that_can_not_be_loaded_is_told_in_one_line(launched: Browser, room: Room) -> None:
    with visit(launched, room.url) as page:
        shelf = shown(page)
        shelf.refusal = "other does not fit"
        page.select_option("#model-0", "shelf:other")
        expect(page.locator("#toast")).to_contain_text("other does not fit")
        expect(page.locator("#model-0")).to_have_value("cerebrum-12.25b")
        shelf.refusal = None
        page.select_option("#model-0", "shelf:other")
        expect(page.locator("#banner")).to_contain_text("Loading other")
        shelf.rows[1] |= {"state": "on the shelf", "loading": None, "why_not": "it is damaged"}
        expect(page.locator("#toast")).to_contain_text("it is damaged")
        expect(page.locator("#banner")).to_be_hidden()


@pytest.mark.long
def test_one_that_was_loading_when_the_page_came_is_offered_when_it_is_there(
    launched: Browser, room: Room
) -> None:
    with visit(launched, room.url) as page:
        shelf = Shelf(page)
        shelf.rows[1] |= {"state": "loading", "loading": {"done": 1.2e9, "total": 4.1e9}}
        page_driver.reload(page)
        expect(page.locator("#model-0 optgroup option").first).to_have_text(
            "other (4.10 GB), loading"
        )
        expect(page.locator("#banner")).to_contain_text("Loading other: 1.20 GB")
        shelf.arrive(room)
        expect(page.locator("#model-0 > option[value=other]")).to_have_count(1)
        expect(page.locator("#model-0")).to_have_value("cerebrum-12.25b")


@pytest.mark.long
def test_a_model_that_was_at_rest_shows_that_it_loads(launched: Browser, room: Room) -> None:
    room.script = lambda body: Script(
        pieces=[Raw(": loading 1000000000/4000000000\n\n"), Hold(), "Hi"]
    )
    with visit(launched, room.url) as page:
        ask(page, "Q", wait=False)
        expect(page.locator(".waiting")).to_have_text("Loading the model, 1.00 GB of 4.00 GB")
        assert page.locator("progress").get_attribute("value") == "1000000000"
        room.hold.set()
        expect(page.locator(".answer .markdown")).to_have_text("Hi")


@pytest.mark.long
def test_without_a_shelf_there_is_none(launched: Browser, room: Room) -> None:
    with visit(launched, room.url) as page:
        with page.expect_response("**/shelf") as answered:
            page_driver.reload(page)
        assert answered.value.status == 404
        page.wait_for_timeout(50)
        expect(page.locator("#model-0 optgroup")).to_have_count(0)
        page.click("#open-card")
        expect(page.locator("#card-shelf")).to_be_hidden()
