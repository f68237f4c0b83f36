"""The page's compare mode: one question, two columns, and where they first differ."""

import page_driver
import pytest
from page_driver import answers, ask, asked, idle, last, numbered, questions, reload
from page_room import Hold, Room, Script, some, visit, words
from playwright.sync_api import Browser, Page, expect

pytestmark = some
launched, served, room, page = (
    page_driver.launched,
    page_driver.served,
    page_driver.room,
    page_driver.page,
)


def two(room: Room, big: str, small: str) -> None:
    answers = {"cerebrum-12.25b": big, "cerebrum-7b": small}
    room.script = lambda body: Script(pieces=words(answers[body["model"]]))


def highlighted(page: Page) -> list[str]:
    found: list[str] = page.evaluate(
        "Array.from(CSS.highlights.get('differs'), (range) => range.toString())"
    )
    return found


def test_two_models_answer_at_once_and_the_difference_is_marked(page: Page, room: Room) -> None:
    started = {"cerebrum-12.25b": "It costs **five", "cerebrum-7b": "It costs **fifty"}
    room.script = lambda body: Script(pieces=[started[body["model"]], Hold(), " cents** then"])
    page.click("#compare")
    expect(page.locator("#model-1")).to_have_value("cerebrum-7b")
    ask(page, "Price?", wait=False)
    # Both are on the screen before either is over.
    expect(page.locator(".column .markdown")).to_have_text(list(started.values()))
    expect(page.locator(".caption")).to_have_text("The same for 2 words, then they differ.")
    room.hold.set()
    idle(page)
    assert highlighted(page) == ["five", "fifty"]
    expect(page.locator(".mark")).to_have_count(2)
    assert questions(page) == ["Price?"]
    seeds = {body["seed"] for body in room.asked}
    assert len(seeds) == 1
    assert {body["model"] for body in room.asked} == set(started)
    expect(page.locator(".column .stats").first).to_contain_text("2 tokens")


DIFFERENT: list[tuple[str, str, str, list[str]]] = [
    ("Just the same", "Just the same", "Identical answers.", []),
    ("*Just* the same", "Just the same", "The same words, laid out differently.", []),
    ("Yes", "No", "They differ from the first word.", ["Yes", "No"]),
    ("One two", "One", "The same for 1 word, then they differ.", ["two"]),
    ("One\n\n- two\n- three", "One\n\n- two\n- four", "The same for 2 words", ["three", "four"]),
    ("a `code` x", "a `code` y", "The same for 2 words, then", ["x", "y"]),
    ("a\n```py\nx\n```", "a\n```sh\nx\n```", "The same words, laid out", []),
]


def test_where_two_answers_differ(page: Page, room: Room) -> None:
    page.click("#compare")
    for big, small, caption, marked in DIFFERENT:
        page.click("#new")
        two(room, big, small)
        ask(page, "Q")
        expect(page.locator(".caption")).to_contain_text(caption)
        assert highlighted(page) == marked


def test_each_column_has_its_own_history(page: Page, room: Room) -> None:
    two(room, "Big", "Small")
    page.click("#compare")
    ask(page, "One")
    ask(page, "Two")
    histories = {body["model"]: body["messages"] for body in room.asked[-2:]}
    assert histories["cerebrum-12.25b"][1]["content"] == "Big"
    assert histories["cerebrum-7b"][1]["content"] == "Small"
    assert questions(page) == ["One", "Two"]
    reload(page)
    expect(page.locator(".row")).to_have_count(2)
    # The newer question is asked anew of both.
    page.press("#question", "ArrowUp")
    page.get_by_label("Edited question").fill("Zwei")
    page.get_by_label("Edited question").press("Enter")
    idle(page)
    assert questions(page) == ["One", "Zwei"]
    for body in room.asked[-2:]:
        assert [one["content"] for one in body["messages"]][2] == "Zwei"
    last(page, "Version before").click()
    assert questions(page) == ["One", "Two"]


def test_going_on_with_either_answer(page: Page, room: Room) -> None:
    two(room, "Big", "Small")
    page.click("#compare")
    ask(page, "One")
    page.get_by_role("button", name="Continue with this").nth(1).click()
    assert answers(page) == ["Small"]
    expect(page.locator("#model-0")).to_have_value("cerebrum-7b")
    expect(page.locator("#compare")).to_have_attribute("aria-pressed", "false")
    ask(page, "Two")
    assert room.asked[-1]["model"] == "cerebrum-7b"
    assert asked(room) == [("user", "One"), ("assistant", "Small"), ("user", "Two")]
    page.locator(".count").first.wait_for()  # the other one is still a version


def test_comparing_begins_in_the_middle_and_a_retry_is_one_columns(page: Page, room: Room) -> None:
    numbered(room)
    ask(page, "One")
    page.click("#compare")
    ask(page, "Two")
    assert questions(page) == ["One", "Two"]
    before = answers(page)
    assert before[0] == "Answer 1"
    last(page, "Another answer").click()
    idle(page)
    assert answers(page)[:2] == before[:2]
    assert answers(page)[2] == "Answer 4"
    expect(page.locator(".count")).to_have_text("2/2")


def test_stopping_stops_both_columns(page: Page, room: Room) -> None:
    room.script = lambda body: Script(pieces=["a", Hold()])
    page.click("#compare")
    ask(page, "Q", wait=False)
    expect(page.locator(".column .markdown")).to_have_text(["a", "a"])
    page.keyboard.press("Escape")
    idle(page)
    expect(page.locator(".column .ended")).to_contain_text(["Stopped.", "Stopped."])


def test_one_model_can_be_compared_with_itself(launched: Browser, room: Room) -> None:
    room.models = room.models[:1]
    numbered(room)
    with visit(launched, room.url) as page:
        page.click("#compare")
        ask(page, "Q")
        expect(page.locator(".caption")).to_contain_text("The same for 1 word")


def test_a_column_that_fails_is_no_difference(page: Page, room: Room) -> None:
    room.script = lambda body: (
        Script(pieces=["One two"])
        if body["model"] == "cerebrum-7b"
        else Script(pieces=["One"], error="out of memory")
    )
    page.click("#compare")
    ask(page, "Q")
    expect(page.locator(".caption")).to_have_text("The same so far.")
    room.script = lambda body: Script(pieces=["One two"])
    page.get_by_role("button", name="Try again").click()
    idle(page)
    expect(page.locator(".caption")).to_have_text("Identical answers.")


def test_both_columns_are_drawn_alike_and_a_retry_says_it_was_not(page: Page, room: Room) -> None:
    two(room, "One two", "One three")
    page.click("#compare")
    ask(page, "Q")
    first, second = ({**body, "model": ""} for body in room.asked)
    assert first == second  # their settings and their seed
    expect(page.locator(".caption")).to_have_text("The same for 1 word, then they differ.")
    last(page, "Another answer").click()
    idle(page)
    assert room.asked[-1]["temperature"] == 0.7
    expect(page.locator(".caption")).to_contain_text("other settings or another seed")


def test_a_column_that_failed_is_asked_again_as_it_was(page: Page, room: Room) -> None:
    room.script = lambda body: Script(pieces=["One"], error="out of memory")
    page.click("#compare")
    ask(page, "Q")
    two(room, "One", "One")
    page.get_by_role("button", name="Try again").first.click()
    idle(page)
    assert room.asked[-1] == room.asked[0]


def test_where_words_have_no_spaces_between_them(page: Page, room: Room) -> None:
    two(room, "一台です。", "一本です。")
    page.click("#compare")
    ask(page, "Q")
    assert highlighted(page) == ["台", "本"]


def test_a_word_that_is_partly_bold_is_marked_whole(page: Page, room: Room) -> None:
    two(room, "a fi**ve** c", "a six c")
    page.click("#compare")
    ask(page, "Q")
    assert highlighted(page) == ["five", "six"]


def test_votes_are_told_per_model_and_stay(page: Page, room: Room) -> None:
    two(room, "One two", "One three")
    page.click("#compare")
    ask(page, "Q")
    left = page.get_by_role("button", name="cerebrum-12.25b is better")
    right = page.get_by_role("button", name="cerebrum-7b is better")
    left.click()
    expect(left).to_have_attribute("aria-pressed", "true")
    expect(page.locator(".votes .muted")).to_have_text(
        "Of 1 vote: cerebrum-12.25b 1, cerebrum-7b 0, as good 0."
    )
    right.click()  # on second thoughts
    expect(left).to_have_attribute("aria-pressed", "false")
    ask(page, "R")
    page.get_by_role("button", name="As good").last.click()
    tally = "Of 2 votes: cerebrum-12.25b 0, cerebrum-7b 1, as good 1."
    expect(page.locator(".votes .muted").last).to_have_text(tally)
    reload(page)
    expect(right.first).to_have_attribute("aria-pressed", "true")
    page.click("#open-card")
    expect(page.locator("#card")).to_contain_text(tally)
    page.click("#card-forget")
    expect(page.locator("#card")).not_to_contain_text("Of 2 votes")
    page.click("#card .close.main")
    expect(right.first).to_have_attribute("aria-pressed", "false")
    page.get_by_role("button", name="Undo").click()
    expect(right.first).to_have_attribute("aria-pressed", "true")
    right.first.click()  # taken back
    expect(page.locator(".votes .muted").last).to_have_text(
        "Of 1 vote: cerebrum-12.25b 0, cerebrum-7b 0, as good 1."
    )


@pytest.mark.long
def test_there_is_no_vote_where_there_is_nothing_to_choose(page: Page, room: Room) -> None:
    page.click("#compare")
    votes = page.locator(".votes:visible")
    two(room, "Just the same", "Just the same")
    ask(page, "Q")
    expect(page.locator(".caption")).to_have_text("Identical answers.")
    expect(votes).to_have_count(0)
    page.click("#new")
    room.script = lambda body: Script(pieces=[body["model"], Hold(), "!"])
    ask(page, "Q", wait=False)
    expect(page.locator(".caption")).to_contain_text("They differ")
    expect(votes).to_have_count(0)  # not before both are over
    room.hold.set()
    idle(page)
    expect(votes).to_have_count(1)


def test_the_place_where_they_differ_is_a_click_away(page: Page, room: Room) -> None:
    same = "\n\n".join(f"paragraph {n}" for n in range(100))
    two(room, f"{same} then", f"{same} but")
    page.click("#compare")
    ask(page, "Q")
    page.evaluate("scroller.scrollTop = 0")
    expect(page.locator(".mark").first).not_to_be_in_viewport()
    page.get_by_role("button", name="Go there").click()
    expect(page.locator(".mark").first).to_be_in_viewport()
    expect(page.locator(".caption")).to_have_text("The same for 200 words, then they differ.")
