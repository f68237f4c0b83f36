"""The chat page in a real browser, against a stand-in server with scripted answers."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from page_room import (
    Hold,
    Raw,
    Room,
    Script,
    browser,
    browser_path,
    real_server,
    stand_in,
    visit,
    words,
)
from playwright.sync_api import Browser, Page, expect

PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
Visit = Callable[..., AbstractContextManager[Page]]


@pytest.fixture(scope="module")
def launched() -> Iterator[Browser]:
    with browser() as one:
        yield one


@pytest.fixture
def room() -> Iterator[Room]:
    with stand_in() as one:
        yield one


@pytest.fixture
def page(launched: Browser, room: Room) -> Iterator[Page]:
    with visit(launched, room.url) as one:
        yield one


def ask(page: Page, text: str, wait: bool = True) -> None:
    page.fill("#question", text)
    page.press("#question", "Enter")
    if wait:
        idle(page)


def idle(page: Page) -> None:
    expect(page.locator("#stop")).to_be_hidden()


def answers(page: Page) -> list[str]:
    return page.locator(".answer .markdown").all_inner_texts()


def questions(page: Page) -> list[str]:
    return page.locator(".question .body").all_inner_texts()


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


# Sending, streaming, stopping


def test_a_question_is_answered_and_the_next_one_carries_both(page: Page, room: Room) -> None:
    numbered(room)
    ask(page, "First?")
    assert answers(page) == ["Answer 1"]
    assert page.input_value("#question") == ""
    ask(page, "Second?")
    assert asked(room) == [("user", "First?"), ("assistant", "Answer 1"), ("user", "Second?")]
    body = room.asked[-1]
    assert body["model"] == "cerebrum-12.25b"
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert titles(page) == ["First?"]
    expect(page.locator(".stats").last).to_contain_text("2 tokens")
    expect(page.locator(".stats").last).to_contain_text("first after")


def test_an_answer_is_on_the_screen_while_it_comes(page: Page, room: Room) -> None:
    room.script = lambda body: Script(pieces=["One **two", Hold(), "** three"])
    ask(page, "Go", wait=False)
    expect(page.locator(".answer .markdown")).to_have_text("One **two")
    expect(page.locator(".answer")).to_have_attribute("aria-busy", "true")
    room.hold.set()
    idle(page)
    expect(page.locator(".answer .markdown strong")).to_have_text("two")
    expect(page.locator(".answer")).to_have_attribute("aria-busy", "false")


def test_a_piece_cut_within_a_character_and_a_line_comes_whole(page: Page, room: Room) -> None:
    event = 'data: {"choices":[{"index":0,"delta":{"content":"süß 😀"}}]}\r\n\r\n'
    room.script = lambda body: Script(pieces=[Raw(event[:20]), Raw(event[20:47]), Raw(event[47:])])
    ask(page, "Go")
    assert answers(page) == ["süß 😀"]


@pytest.mark.parametrize("way", ["button", "key"])
def test_stopping_keeps_what_came_and_frees_the_server(page: Page, room: Room, way: str) -> None:
    room.script = lambda body: Script(pieces=["Kept", Hold(), " lost"])
    ask(page, "Go", wait=False)
    expect(page.locator(".answer .markdown")).to_have_text("Kept")
    if way == "button":
        page.click("#stop")
    else:
        page.keyboard.press("Escape")
    idle(page)
    assert room.left.wait(5)
    assert answers(page) == ["Kept"]
    expect(page.locator(".answer .state")).to_have_text("Stopped.")
    numbered(room)
    ask(page, "And now?")
    assert asked(room)[1] == ("assistant", "Kept")


def test_while_an_answer_comes_the_next_question_waits_in_its_field(page: Page, room: Room) -> None:
    room.script = lambda body: Script(pieces=["a", Hold(), "b"])
    ask(page, "Go", wait=False)
    expect(page.locator(".answer .markdown")).to_have_text("a")
    ask(page, "Next", wait=False)
    assert page.input_value("#question") == "Next"
    assert len(room.asked) == 1
    room.hold.set()
    idle(page)
    page.press("#question", "Enter")
    idle(page)
    assert len(room.asked) == 2


def test_the_reading_of_a_long_prompt_is_shown(page: Page, room: Room) -> None:
    room.script = lambda body: Script(pieces=[Raw(": reading 512/2048\n\n"), Hold(), "Done"])
    ask(page, "Go", wait=False)
    expect(page.locator(".waiting")).to_have_text("Reading the prompt 512/2048")
    assert page.locator("progress").get_attribute("value") == "512"
    room.hold.set()
    expect(page.locator(".answer .markdown")).to_have_text("Done")
    expect(page.locator(".waiting")).to_have_count(0)


def test_scrolling_follows_only_a_reader_at_the_end(page: Page, room: Room) -> None:
    text = [f"line {n}\n\n" for n in range(80)]
    room.script = lambda body: Script(pieces=[*text, Hold(), *text])
    ask(page, "Go", wait=False)
    page.wait_for_selector("text=line 79")
    gap = "scroller.scrollHeight - scroller.clientHeight - scroller.scrollTop"
    until(page, f"{gap} < 5")
    page.hover("#scroller")
    page.mouse.wheel(0, -600)
    until(page, f"{gap} > 400")
    before = page.evaluate("scroller.scrollTop")
    room.hold.set()
    idle(page)
    assert page.evaluate("scroller.scrollTop") == before
    page.click("#to-end")
    until(page, f"{gap} < 5")


def test_a_long_conversation_opens_at_its_end(page: Page) -> None:
    messages = [
        {"role": ("user", "assistant")[n % 2], "content": f"message {n} " + "word " * (n % 7 * 40)}
        for n in range(300)
    ]
    take(page, "long.json", messages)
    expect(page.locator(".answer")).to_have_count(150)
    expect(page.locator(".answer").last).to_be_in_viewport()
    page.reload()
    expect(page.locator(".answer").last).to_be_in_viewport()
    until(page, "scroller.scrollHeight - scroller.clientHeight - scroller.scrollTop < 5")
    page.hover("#scroller")
    page.mouse.wheel(0, -3000)
    expect(page.locator(".answer").last).not_to_be_in_viewport()


# Another answer, an edited question


def test_earlier_answers_can_be_gone_back_to(page: Page, room: Room) -> None:
    numbered(room)
    ask(page, "Q")
    last(page, "Another answer").click()
    idle(page)
    assert answers(page) == ["Answer 2"]
    assert asked(room) == [("user", "Q")]
    expect(page.locator(".count")).to_have_text("2/2")
    last(page, "Version before").click()
    assert answers(page) == ["Answer 1"]
    ask(page, "On")
    assert asked(room) == [("user", "Q"), ("assistant", "Answer 1"), ("user", "On")]
    page.reload()
    expect(page.locator(".count")).to_have_text("1/2")
    last(page, "Next version").click()
    expect(page.locator(".answer .markdown")).to_have_text("Answer 2")
    last(page, "Version before").click()
    assert answers(page) == ["Answer 1", "Answer 3"]


def test_an_edited_question_begins_a_branch(page: Page, room: Room) -> None:
    numbered(room)
    ask(page, "One")
    ask(page, "Two")
    page.get_by_role("button", name="Edit").first.click()
    box = page.get_by_label("Edited question")
    assert box.input_value() == "One"
    box.fill("Uno")
    box.press("Enter")
    idle(page)
    assert asked(room) == [("user", "Uno")]
    assert questions(page) == ["Uno"]
    last(page, "Version before").click()
    assert questions(page) == ["One", "Two"]
    assert answers(page) == ["Answer 1", "Answer 2"]


def test_the_up_key_edits_the_last_question_and_escape_leaves_it(page: Page, room: Room) -> None:
    ask(page, "One")
    ask(page, "Two")
    page.press("#question", "ArrowUp")
    box = page.get_by_label("Edited question")
    expect(box).to_be_focused()
    assert box.input_value() == "Two"
    box.fill("Two and a half")
    box.press("Escape")
    assert questions(page) == ["One", "Two"]
    assert len(room.asked) == 2
    page.fill("#question", "typed")
    page.press("#question", "ArrowUp")
    expect(box).to_have_count(0)


def test_answers_and_code_are_copied_as_they_were_written(launched: Browser, room: Room) -> None:
    answer = "Some **bold**\n\n```py\nx = 1\n```"
    room.script = lambda body: Script(pieces=[answer])
    with visit(launched, room.url, permissions=["clipboard-read", "clipboard-write"]) as page:
        ask(page, "Q")
        last(page, "Copy").click()
        expect(page.get_by_role("button", name="Copied")).to_have_count(1)
        assert page.evaluate("navigator.clipboard.readText()") == answer
        page.locator(".code-head button").click()
        expect(page.locator(".code-head button")).to_have_text("Copied")
        assert page.evaluate("navigator.clipboard.readText()") == "x = 1"


# What is kept


def test_a_conversation_survives_a_reload(page: Page, room: Room) -> None:
    numbered(room)
    ask(page, "Remember")
    page.reload()
    expect(page.locator(".answer .markdown")).to_have_text("Answer 1")
    ask(page, "More")
    assert asked(room)[0] == ("user", "Remember")
    assert titles(page) == ["Remember"]


def test_a_reload_in_the_middle_of_an_answer_keeps_what_had_come(page: Page, room: Room) -> None:
    text = words("so much had come before the page was loaded again")
    room.script = lambda body: Script(pieces=[*text, Hold()])
    ask(page, "Go", wait=False)
    expect(page.locator(".answer .markdown")).to_have_text("".join(text))
    page.reload()
    expect(page.locator(".answer .markdown")).to_have_text("".join(text))
    expect(page.locator(".answer .state")).to_contain_text("Interrupted")
    numbered(room)
    last(page, "Another answer").click()
    idle(page)
    assert answers(page) == ["Answer 2"]
    expect(page.locator(".count")).to_have_text("2/2")


def test_a_typed_question_and_the_place_survive_a_reload(page: Page, room: Room) -> None:
    ask(page, "One")
    page.click("#new")
    ask(page, "Two")
    page.fill("#question", "half a thou")
    page.reload()
    expect(page.locator("#question")).to_have_value("half a thou")
    assert questions(page) == ["Two"]
    page.locator("#conversations .open", has_text="One").click()
    expect(page.locator("#question")).to_have_value("")


def test_an_answer_goes_on_while_another_conversation_is_read(page: Page, room: Room) -> None:
    room.script = lambda body: Script(pieces=["a", Hold(), "b"])
    ask(page, "Slow", wait=False)
    expect(page.locator(".answer .markdown")).to_have_text("a")
    page.click("#new")
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator(".answer")).to_have_count(0)
    room.hold.set()
    page.locator("#conversations .open", has_text="Slow").click()
    expect(page.locator(".answer .markdown")).to_have_text("ab")


def test_two_tabs_in_one_conversation_keep_both_answers(page: Page, room: Room) -> None:
    numbered(room)
    ask(page, "Start")
    other = page.context.new_page()
    other.goto(page.url)
    expect(other.locator(".answer")).to_have_count(1)
    ask(page, "From the first tab")
    ask(other, "From the second tab")
    ask(page, "And on")
    page.reload()
    expect(page.locator(".answer").first).to_be_visible()
    kept = page.evaluate(
        """() => new Promise((resolve) => {
            indexedDB.open("cerebrum").onsuccess = ({ target }) => {
                const all = target.result.transaction("nodes").objectStore("nodes").getAll();
                all.onsuccess = () => resolve(all.result.map((node) => node.content));
            };
        })"""
    )
    assert {"From the first tab", "From the second tab", "And on"} <= set(kept)
    assert {f"Answer {n}" for n in range(1, 5)} <= set(kept)


def test_another_tabs_conversations_appear_and_go(page: Page, room: Room) -> None:
    other = page.context.new_page()
    other.goto(room.url)
    page.bring_to_front()
    ask(page, "Here")
    expect(other.locator("#conversations .open")).to_have_text(["Here"])
    other.bring_to_front()
    other.locator("#conversations .open").click()
    expect(other.locator(".answer")).to_have_count(1)
    page.bring_to_front()
    page.locator("#conversations li").hover()
    page.get_by_role("button", name="Delete Here").click()
    expect(other.locator("#conversations .open")).to_have_count(0)
    expect(other.locator(".answer")).to_have_count(0)


def test_renaming_and_deleting_with_a_way_back(page: Page, room: Room) -> None:
    ask(page, "One")
    page.locator("#conversations li").hover()
    page.get_by_role("button", name="Rename One").click()
    page.keyboard.type("My own name")
    page.keyboard.press("Enter")
    expect(page.locator("#title")).to_have_text("My own name")
    page.reload()
    expect(page.locator("#conversations .open")).to_have_text(["My own name"])
    page.locator("#conversations li").hover()
    page.get_by_role("button", name="Delete My own name").click()
    expect(page.locator("#conversations .open")).to_have_count(0)
    expect(page.locator(".answer")).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("#conversations .open")).to_have_text(["My own name"])
    expect(page.locator(".answer")).to_have_count(1)


# Files


def export(page: Page, name: str) -> Any:
    page.locator("#conversations li", has_text=name).hover()
    with page.expect_download() as download:
        page.get_by_role("button", name=f"Export {name}").click()
    return download.value


def take(page: Page, name: str, value: Any) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    file: Any = {"name": name, "mimeType": "application/json", "buffer": text.encode()}
    page.set_input_files("#file", file)


def test_an_exported_conversation_is_what_generate_reads(
    page: Page, room: Room, tmp_path: Path
) -> None:
    from mlx_cerebrum.conversation import read_messages

    page.click("#open-settings")
    page.fill("[name=system]", "Be brief.")
    page.click("#settings .main")
    ask(page, "Größe?")
    file = export(page, "Größe?")
    file.save_as(tmp_path / "file.json")
    assert file.suggested_filename == "groe.json"
    expected = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Größe?"},
        {"role": "assistant", "content": "Hello world."},
    ]
    assert read_messages(tmp_path / "file.json") == expected
    take(page, "again.json", expected)
    expect(page.locator("#conversations .open")).to_have_count(2)
    ask(page, "More")
    assert asked(room)[0] == ("system", "Be brief.")
    assert asked(room)[-1] == ("user", "More")


def test_a_backup_holds_every_version_and_merges(
    page: Page, launched: Browser, room: Room, tmp_path: Path
) -> None:
    numbered(room)
    ask(page, "Q")
    last(page, "Another answer").click()
    idle(page)
    page.click("#new")
    ask(page, "Other")
    with page.expect_download() as download:
        page.click("#backup")
    download.value.save_as(tmp_path / "all.json")
    text = (tmp_path / "all.json").read_text(encoding="utf-8")
    ask(page, "Said after the backup")
    take(page, "all.json", text)
    expect(page.locator("#toast")).to_contain_text("Imported 2")
    assert sorted(titles(page)) == ["Other", "Q"]
    page.locator("#conversations .open", has_text="Other").click()
    expect(page.locator(".answer")).to_have_count(2)  # what is newer is not lost
    with visit(launched, room.url) as elsewhere:
        take(elsewhere, "all.json", text)
        expect(elsewhere.locator("#conversations .open")).to_have_count(2)
        elsewhere.locator("#conversations .open", has_text="Q").click()
        expect(elsewhere.locator(".count")).to_have_text("2/2")


TOO_DEEP = "[" * 100_000
FORMAT = {"format": "mlx-cerebrum-conversations", "version": 1}
NODE = {"id": "a", "role": "user", "content": "x", "parent": None, "at": 0}


BAD_FILES: list[tuple[Any, str]] = [
    ("no json", "not valid JSON"),
    (TOO_DEEP, "bad"),
    ("[]", "no messages"),
    ("7", "neither a list of messages nor a backup"),
    ([{"role": "user"}], "messages[0] must have exactly role and content"),
    ([{"role": "tool", "content": ""}], "role must be one of"),
    ([{"role": "user", "content": 1}], "content must be a string"),
    (
        [{"role": "user", "content": "x"}, {"role": "system", "content": "x"}],
        "messages[1]: a system message can only come first",
    ),
    (FORMAT | {"version": 2}, "another version"),
    (FORMAT, "conversations must be a list"),
    (FORMAT | {"conversations": [7]}, "must have an id and nodes"),
    (FORMAT | {"conversations": [{"id": "c", "nodes": [NODE, NODE]}]}, "an id of its own"),
    (FORMAT | {"conversations": [{"id": "c", "nodes": [NODE | {"role": 1}]}]}, "a role"),
    (
        FORMAT | {"conversations": [{"id": "c", "nodes": [NODE | {"parent": "b"}]}]},
        "answers a message that is not there",
    ),
    (
        FORMAT | {"conversations": [{"id": "c", "nodes": [NODE | {"parent": "a"}]}]},
        "in a circle",
    ),
]


def test_a_bad_file_gets_one_line_and_changes_nothing(page: Page) -> None:
    ask(page, "Mine")
    page.fill("#question", "typed")
    for number, (file, words_of_it) in enumerate(BAD_FILES):
        take(page, f"bad{number}.json", file)
        expect(page.locator("#toast")).to_contain_text(f"bad{number}.json")
        expect(page.locator("#toast")).to_contain_text(words_of_it)
        assert titles(page) == ["Mine"]
    assert answers(page) == ["Hello world."]
    assert page.input_value("#question") == "typed"


# Settings


def test_settings_are_sent_and_kept(page: Page, room: Room) -> None:
    page.click("#open-settings")
    for name, value in {
        "temperature": "0.3",
        "top_p": "0.9",
        "min_p": "",
        "seed": "7",
        "max_tokens": "50",
    }.items():
        page.fill(f"[name={name}]", value)
    page.fill("[name=system]", "Talk like a pirate.")
    page.check("[name=everywhere]")
    page.click("#settings .main")
    expect(page.locator("#settings")).to_be_hidden()
    page.reload()
    ask(page, "Ahoy")
    body = room.asked[-1]
    sent = {
        name: body.get(name) for name in ("temperature", "top_p", "min_p", "seed", "max_tokens")
    }
    assert sent == {"temperature": 0.3, "top_p": 0.9, "min_p": None, "seed": 7, "max_tokens": 50}
    assert asked(room) == [("system", "Talk like a pirate."), ("user", "Ahoy")]
    assert "system" not in body


def test_the_system_texts_placeholder_is_the_templates_own(page: Page) -> None:
    from mlx_cerebrum.template import DEFAULT_SYSTEM

    page.click("#open-settings")
    assert page.locator("[name=system]").get_attribute("placeholder") == DEFAULT_SYSTEM


def test_an_empty_system_text_and_seed_leave_both_to_the_rest(page: Page, room: Room) -> None:
    ask(page, "Q")
    last(page, "Another answer").click()
    idle(page)
    assert asked(room) == [("user", "Q")]
    seeds = [body["seed"] for body in room.asked]
    assert seeds[0] != seeds[1]  # a retry draws anew
    assert "max_tokens" not in room.asked[0]


OUT_OF_RANGE = [
    ("temperature", "3", "from 0 to 2"),
    ("temperature", "0.0001", "at least 0.001"),
    ("top_p", "0", "Above 0, to 1"),
    ("min_p", "1", "below 1"),
    ("seed", "1.5", "whole number"),
    ("max_tokens", "0", "from 1 to 1,000,000"),
]


def test_a_setting_out_of_range_is_said_and_not_kept(page: Page, room: Room) -> None:
    for name, value, problem in OUT_OF_RANGE:
        page.click("#open-settings")
        page.fill(f"[name={name}]", value)
        expect(page.locator(f"#{name}-problem")).to_contain_text(problem)
        page.click("#settings .main")
        expect(page.locator(f"[name={name}]")).to_be_focused()
        page.keyboard.press("Escape")
        expect(page.locator("#settings")).to_be_hidden()
    ask(page, "Q")
    body = room.asked[-1]
    assert (body["temperature"], body["min_p"]) == (0.7, 0.05)
    assert "top_p" not in body
    assert "max_tokens" not in body


def test_the_chosen_model_is_asked_and_stays(page: Page, room: Room) -> None:
    page.select_option("#model-0", "cerebrum-7b")
    ask(page, "Q")
    assert room.asked[-1]["model"] == "cerebrum-7b"
    page.reload()
    expect(page.locator("#model-0")).to_have_value("cerebrum-7b")
    expect(page.locator(".who")).to_have_text("cerebrum-7b")


# The context


def test_the_gauge_and_the_word_about_the_window(page: Page, room: Room) -> None:
    room.script = lambda body: Script(prompt_tokens=len(room.asked) * 3000)
    ask(page, "One")
    expect(page.locator("#gauge-text")).to_have_text("3,003 of 32,768 tokens")
    expect(page.locator(".note")).to_be_hidden()
    ask(page, "Two")
    expect(page.locator("#gauge-text")).to_have_text("6,003 of 32,768 tokens")
    expect(page.locator(".note:visible")).to_contain_text("longer than the 4,096 tokens")
    ask(page, "Three")
    expect(page.locator(".note:visible")).to_have_count(1)
    assert page.locator("#gauge-bar").get_attribute("aria-valuenow") == "9003"


# Comparing


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
    assert highlighted(page) == ["five cents then", "fifty cents then"]
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
    ("One two", "One", "The same for 1 word, then they differ.", [" two"]),
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
    page.reload()
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
    expect(page.locator(".column .state")).to_have_text(["Stopped.", "Stopped."])


# Errors


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
    page.reload()
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
    page.reload()
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
    ask(page, "Q")
    assert page.input_value("#question") == "Q"
    expect(page.locator("#key")).to_be_visible()
    context.close()


# Odd surroundings


def test_a_browser_that_keeps_nothing_still_chats(launched: Browser, room: Room) -> None:
    context = launched.new_context()
    context.add_init_script("delete window.indexedDB; delete Window.prototype.indexedDB;")
    page = context.new_page()
    page.goto(room.url)
    expect(page.locator("#toast")).to_contain_text("does not keep conversations")
    numbered(room)
    ask(page, "One")
    page.click("#new")
    ask(page, "Two")
    page.locator("#conversations .open", has_text="One").click()
    assert answers(page) == ["Answer 1"]
    context.close()


def test_unreadable_leftovers_lose_nothing(page: Page, room: Room) -> None:
    numbered(room)
    ask(page, "Q")
    page.evaluate(
        """() => {
            localStorage.setItem("cerebrum.rescue.x", "{no json");
            localStorage.setItem("cerebrum.rescue.y", '{"conversation": "gone", "id": "y"}');
            localStorage.setItem("cerebrum.settings", '{"temperature": "hot", "seed": 4}');
            localStorage.setItem("cerebrum.theme", "purple");
        }"""
    )
    page.reload()
    expect(page.locator(".answer .markdown")).to_have_text("Answer 1")
    ask(page, "R")
    assert room.asked[-1]["seed"] == 4
    assert "temperature" not in room.asked[-1]


def test_an_old_leftover_does_not_undo_a_whole_answer(page: Page, room: Room) -> None:
    room.script = lambda body: Script(pieces=["Half", Hold(), " and half"])
    ask(page, "Q", wait=False)
    expect(page.locator(".answer .markdown")).to_have_text("Half")
    page.evaluate("dispatchEvent(new Event('pagehide'))")
    room.hold.set()
    idle(page)
    page.reload()
    expect(page.locator(".answer .markdown")).to_have_text("Half and half")
    expect(page.locator(".answer .state")).to_be_empty()


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


def test_another_tab_sees_an_answer_come(page: Page, room: Room) -> None:
    room.script = lambda body: Script(pieces=["One", Hold(), " two", Hold(), ""])
    ask(page, "Q", wait=False)
    other = page.context.new_page()
    other.goto(page.url)
    expect(other.locator(".answer .markdown")).to_have_text("One")
    room.hold.set()
    expect(other.locator(".answer .markdown")).to_have_text("One two")
    expect(other.locator(".answer .state")).to_be_empty()


# An answer full of traps


def test_an_answer_that_wants_to_run_is_only_text(page: Page, room: Room) -> None:
    from test_page_markdown import HOSTILE

    text = "\n\n".join(HOSTILE)
    room.script = lambda body: Script(pieces=[text[at : at + 7] for at in range(0, len(text), 7)])
    page.click("#compare")
    ask(page, "<img src=x onerror=window.ran=1>")
    page.reload()
    expect(page.locator(".answer")).to_have_count(2)
    expect(page.locator("#title")).to_have_text("<img src=x onerror=window.ran=1>")
    assert page.evaluate("window.ran") is None
    assert page.locator("#thread :is(script, img, iframe, style, meta, object)").count() == 0
    assert page.locator("#thread textarea").count() == 0


# Keys, screens, people


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
        page.reload()
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
    from page_room import FOLDER

    files = [file for file in FOLDER.iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 200_000
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text
        )
        assert not re.search(
            r"setHTML|createContextualFragment|DOMParser|srcdoc|new Function", text
        )
        assert not re.search(r"""(?:src|href|from|url\()\s*=?\s*["'(]https?:""", text)
        assert len(text.splitlines()) < 300
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|style=|\son\w+=|<script>", html)


# The real server


def test_the_real_server_and_a_real_model(launched: Browser) -> None:
    with real_server() as url, visit(launched, url) as page:
        page.click("#open-settings")
        page.fill("[name=temperature]", "0")
        page.fill("[name=max_tokens]", "12")
        page.click("#settings .main")
        page.click("#compare")
        expect(page.locator("#model-0")).to_have_value("demo")
        expect(page.locator("#model-1")).to_have_value("demo-interleaved")
        ask(page, "What is the capital of France?", wait=False)
        expect(page.locator("#stop")).to_be_visible()
        expect(page.locator("#stop")).to_be_hidden(timeout=60_000)
        both = answers(page)
        assert "Paris" in both[0]
        assert both[1]
        expect(page.locator(".caption")).not_to_be_empty()
        expect(page.locator(".stats").first).to_contain_text("tokens/s")
        expect(page.locator("#gauge-text")).to_contain_text("of 8,192 tokens")
        page.get_by_role("button", name="Continue with this").first.click()
        page.click("#open-settings")
        page.fill("[name=max_tokens]", "400")
        page.click("#settings .main")
        ask(page, "Tell me a long story.", wait=False)
        expect(page.locator(".answer .markdown").nth(1)).not_to_be_empty(timeout=60_000)
        page.keyboard.press("Escape")
        idle(page)
        expect(page.locator(".answer .state").last).to_have_text("Stopped.")


def test_without_a_browser_the_module_skips_but_fails_in_ci(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no Chromium"):
        browser_path()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no Chromium"):
        browser_path()
