"""Three pictures of the page, taken by hand: python tests/page_screenshots.py URL FOLDER.

URL is a running server's, such as `python -m mlx_cerebrum.server --model demo` prints it.
"""

import sys
from pathlib import Path
from typing import Any

from page_room import browser
from playwright.sync_api import Browser, Page

ANSWER = 400_000  # milliseconds one may take
FIRST = "What is the capital of France?"
QUESTION = "Give me five tips for a good night's sleep."
COMPARED = "What is a rainbow? Answer in two sentences."  # both models end by themselves


def main(url: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with browser() as chromium:
        desk = {"width": 1200, "height": 800}
        page = start(chromium, url, viewport=desk, color_scheme="light")
        ask(page, FIRST)
        page.click("#new")
        ask(page, QUESTION)
        take(page, folder / "page-chat.png")
        desk = {"width": 1120, "height": 480}
        page = start(chromium, url, viewport=desk, color_scheme="dark")
        page.click("#compare")
        page.click("#toggle-list")
        ask(page, COMPARED)
        take(page, folder / "page-compare.png")
        phone = {"width": 390, "height": 780}
        page = start(chromium, url, viewport=phone, color_scheme="light", has_touch=True)
        ask(page, QUESTION)
        take(page, folder / "page-phone.png")


def start(chromium: Browser, url: str, **options: Any) -> Page:
    page = chromium.new_context(reduced_motion="reduce", **options).new_page()
    page.goto(url)
    page.wait_for_selector("#model-0 option", state="attached")
    return page


def ask(page: Page, question: str) -> None:
    page.fill("#question", question)
    page.click("#send")
    page.wait_for_selector("#stop")
    page.wait_for_selector("#stop", state="hidden", timeout=ANSWER)


def take(page: Page, path: Path) -> None:
    page.mouse.move(600, 400)
    page.evaluate("document.getElementById('scroller').scrollTop = 0")
    page.wait_for_timeout(300)
    page.screenshot(path=path)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
