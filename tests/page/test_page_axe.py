"""The page by the rules of axe-core, in each of its states, light and dark, wide and narrow."""

from typing import Any

import page_driver
import pytest
from axe_playwright_python.sync_playwright import Axe
from page_driver import PHONE, idle, last, ready
from page_room import Room, Script, some, visit
from playwright.sync_api import Browser, Page, expect
from test_page_shelf import shown

pytestmark = some
launched, served, room = page_driver.launched, page_driver.served, page_driver.room

ANSWER = """# A title

Some *text*, `code`, $x^2$, [a link](https://example.org/) and a note[^1].

### Deeper

- one
- [x] two

> quoted

| a | b |
|---|--:|
| 1 | 2 |

```python
def f(x):
    return 1  # so
```

\\[ \\frac{1}{2} \\]

    indented

Underlined
==========

[^1]: The note.
[one]: https://example.org/one
"""


def check(page: Page) -> None:
    """Fail with what axe-core finds, all its rules."""
    found = Axe().run(page, options={"resultTypes": ["violations"]})
    told = [
        (rule["id"], rule["help"], [node["html"] for node in rule["nodes"]])
        for rule in found.response["violations"]
    ]
    assert told == []


@pytest.mark.parametrize(
    ("scheme", "device"),
    [
        pytest.param("light", {}, id="light, wide"),
        pytest.param("dark", PHONE, id="dark, phone"),
        pytest.param("dark", {}, id="dark, wide", marks=pytest.mark.long),
        pytest.param("light", PHONE, id="light, phone", marks=pytest.mark.long),
    ],
)
def test_axe_finds_nothing(launched: Browser, room: Room, scheme: Any, device: Any) -> None:
    room.script = lambda body: Script(pieces=[ANSWER], prompt_tokens=5000, finish="length")
    with visit(launched, room.url, color_scheme=scheme, **device) as page:
        ready(page)
        check(page)
        page.set_input_files("#text-files", [file("notes.txt"), file("b.py")])
        check(page)
        page.fill("#question", "What is in these files?")
        page.click("#send")
        idle(page)
        expect(page.locator(".answer .set")).to_have_count(2)
        page.locator(".question summary").first.click()
        check(page)
        last(page, "Edit").click()
        check(page)
        page.keyboard.press("Escape")
        page.click("#compare")
        room.script = lambda body: (
            Script(pieces=["One and two"])
            if body["model"] == "cerebrum-7b"
            else Script(pieces=["One and three"])
        )
        page.fill("#question", "And?")
        page.click("#send")
        idle(page)
        page.get_by_role("button", name="cerebrum-7b is better").click()
        check(page)
        room.script = lambda body: Script(status=400, error="too long")
        page.fill("#question", "Wrong")
        page.click("#send")
        idle(page)
        check(page)
        for opener in ("open-settings", "open-card", "help"):
            page.click(f"#{opener}")
            check(page)
            page.keyboard.press("Escape")
        page.keyboard.press("Control+k")
        page.fill("#search-box", "files")
        expect(page.locator("#search-hits li").first).to_be_visible()
        check(page)
        page.keyboard.press("Escape")
        if device:
            page.click("#toggle-list")
            page.wait_for_timeout(300)
        check(page)
        page.locator("#conversations li").hover()
        page.get_by_role("button", name="Export").click()
        check(page)


@pytest.mark.long
def test_axe_finds_nothing_at_the_shelf(launched: Browser, room: Room) -> None:
    with visit(launched, room.url) as page:
        shelf = shown(page)
        page.click("#open-card")
        expect(page.locator("#card-others li")).to_have_count(2)
        check(page)
        shelf.rows[1] |= {"state": "loading", "loading": {"done": 1e9, "total": 4e9}}
        page.get_by_role("button", name="Load other").click()
        expect(page.locator("#card-others progress")).to_be_visible()
        check(page)


def file(name: str) -> Any:
    return {"name": name, "mimeType": "text/plain", "buffer": b"some text\n"}
