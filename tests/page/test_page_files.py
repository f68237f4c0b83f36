"""Conversations of the page as files, out and in; its settings; the context's gauge."""

from pathlib import Path
from typing import Any

import page_driver
import pytest
from page_driver import (
    answers,
    ask,
    asked,
    export,
    file,
    idle,
    last,
    numbered,
    reload,
    settings,
    take,
    titles,
)
from page_room import Room, Script, some, visit
from playwright.sync_api import Browser, Page, expect

from mlx_cerebrum.tokenizer.fitting import in_turns
from mlx_cerebrum.tokenizer.messages import check_messages

pytestmark = some
launched, served, room, page = (
    page_driver.launched,
    page_driver.served,
    page_driver.room,
    page_driver.page,
)


def test_an_exported_conversation_is_what_generate_reads(
    page: Page, room: Room, tmp_path: Path
) -> None:
    from mlx_cerebrum.tokenizer.conversation import read_messages

    settings(page, system="Be brief.")
    ask(page, "Größe?")
    saved = export(page, "Größe?")
    saved.save_as(tmp_path / "file.json")
    assert saved.suggested_filename == "groe.json"
    expected = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Größe?"},
        {"role": "assistant", "content": "Hello world."},
    ]
    assert read_messages(tmp_path / "file.json") == expected
    take(page, file("again.json", expected))
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
    take(page, file("all.json", text))
    expect(page.locator("#toast")).to_contain_text("Imported 2")
    assert sorted(titles(page)) == ["Other", "Q"]
    page.locator("#conversations .open", has_text="Other").click()
    expect(page.locator(".answer")).to_have_count(2)  # what is newer is not lost
    with visit(launched, room.url) as elsewhere:
        take(elsewhere, file("all.json", text))
        expect(elsewhere.locator("#conversations .open")).to_have_count(2)
        elsewhere.locator("#conversations .open", has_text="Q").click()
        expect(elsewhere.locator(".count")).to_have_text("2/2")


def test_other_programs_conversations(page: Page, room: Room) -> None:
    """They are shown as the terminal's chat reads them."""
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    talk: list[dict[str, Any]] = [
        {"role": "assistant", "content": "Hello!"},
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "A"}]},
        {"role": "user", "content": "B", "name": "Eve"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "two"},
        {"role": "developer", "content": "Be kind."},
    ]
    take(page, file("theirs.json", talk))
    expect(page.locator(".answer")).to_have_count(2)
    ask(page, "More")
    expect(page.locator(".answer")).to_have_count(3)
    *sent, last_one = [{"role": role, "content": text} for role, text in asked(room)]
    assert sent == in_turns(check_messages(talk))
    assert last_one["content"] == "More"


TOO_DEEP = "[" * 100_000
FORMAT = {"format": "mlx-cerebrum-conversations", "version": 1}
NODE = {"id": "a", "role": "user", "content": "x", "parent": None, "at": 0}


BAD_FILES: list[tuple[Any, str]] = [
    ("no json", "not valid JSON"),
    (TOO_DEEP, "bad"),
    ("[]", "no messages"),
    ("7", "neither a list of messages nor a backup"),
    ([7], "messages[0] must be an object"),
    ([{"role": "user"}], "messages[0]: content must be text"),
    ([{"role": "other", "content": ""}], "role must be one of"),
    ([{"role": "user", "content": 1}], "content must be text"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "content must be text"),
    ([{"role": "assistant", "tool_calls": [{}]}], "must name their functions"),
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
    for number, (held, words_of_it) in enumerate(BAD_FILES):
        take(page, file(f"bad{number}.json", held))
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
    reload(page)
    ask(page, "Ahoy")
    body = room.asked[-1]
    sent = {
        name: body.get(name) for name in ("temperature", "top_p", "min_p", "seed", "max_tokens")
    }
    assert sent == {"temperature": 0.3, "top_p": 0.9, "min_p": None, "seed": 7, "max_tokens": 50}
    assert asked(room) == [("system", "Talk like a pirate."), ("user", "Ahoy")]
    assert "system" not in body


def test_the_system_texts_placeholder_is_the_templates_own(page: Page) -> None:
    from mlx_cerebrum.tokenizer.chat_formats import DEFAULT_SYSTEM

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


def test_settings_show_what_holds_and_name_the_default(page: Page, room: Room) -> None:
    page.click("#open-settings")
    slider, number = page.locator("#temperature-slider"), page.locator("#temperature")
    expect(page.locator("#temperature-default")).to_have_text("Default: 0.")
    expect(page.locator("#max_tokens-default")).to_have_text("Default: 1,024 tokens.")
    expect(page.locator("#seed-default")).to_have_text("Default: another one each time.")
    assert (slider.input_value(), number.get_attribute("placeholder")) == ("0", "0")
    assert page.locator("#max_tokens-slider").get_attribute("max") == "32768"
    expect(slider).to_have_attribute("aria-valuetext", "Default: 0.")
    slider.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    expect(number).to_have_value("0.15")
    number.fill("0.8")
    assert slider.input_value() == "0.8"
    expect(slider).to_have_attribute("aria-valuetext", "0.8")
    page.click("#settings .main")
    ask(page, "Q")
    assert room.asked[-1]["temperature"] == 0.8
    page.click("#open-settings")
    assert (slider.input_value(), number.input_value()) == ("0.8", "0.8")
    page.click("#settings-reset")
    assert (slider.input_value(), number.input_value()) == ("0", "")


def test_the_card_says_what_runs(page: Page, room: Room) -> None:
    room.script = lambda body: Script(prompt_tokens=5000)
    ask(page, "Q")
    page.click("#open-card")
    card = page.locator("#card")
    expect(page.locator("#card-models h3")).to_have_text("cerebrum-12.25b")
    for said in (
        "32 stored, run in 56 positions",
        "0\u20137, 4\u201311, 8\u201315, 12\u201319, 16\u201323, 20\u201327, 24\u201331",
        "4 bits",
        "4,096 tokens, about 3,100 words, are looked at directly. This conversation is longer",
        "32,768 tokens",
    ):
        expect(card).to_contain_text(said)
    # The drawing: a square for each position, at the height of its block.
    squares = card.locator("path").get_attribute("d") or ""
    assert squares.count("M") == 56
    assert squares.startswith("M0 31h1v1h-1zM1 30h1")
    expect(card.locator("svg")).to_have_attribute(
        "aria-label", "Which of 32 blocks runs at each of 56 positions"
    )
    page.keyboard.press("Escape")
    expect(page.locator("#open-card")).to_be_focused()
    page.click("#compare")
    page.click("#open-card")
    expect(page.locator("#card-models h3")).to_have_text(["cerebrum-12.25b", "cerebrum-7b"])


@pytest.mark.long
def test_a_server_that_says_less_of_its_models_has_a_shorter_card(
    launched: Browser, room: Room
) -> None:
    room.models = [{"id": "other", "object": "model", "cerebrum": {"positions": 2, "blocks": 2}}]
    with visit(launched, room.url) as page:
        page.click("#open-card")
        expect(page.locator("#card")).to_contain_text("2 stored, run each once")
        expect(page.locator("#card svg")).to_have_count(0)


def test_a_pace_is_told_in_words(page: Page) -> None:
    told = page.evaluate(
        """async () => {
            const { paceText } = await import("/card.js");
            return [2, 5.5, 40].map(paceText);
        }"""
    )
    assert told == [
        "about 1.5 words a second, slower than people read",
        "about 4.1 words a second, about as fast as people read",
        "about 30 words a second, faster than people read",
    ]


OUT_OF_RANGE = [
    ("temperature", "3", "from 0 to 2"),
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
    assert not {"temperature", "top_p", "min_p", "max_tokens"} & set(body)


def test_the_chosen_model_is_asked_and_stays(page: Page, room: Room) -> None:
    page.select_option("#model-0", "cerebrum-7b")
    ask(page, "Q")
    assert room.asked[-1]["model"] == "cerebrum-7b"
    reload(page)
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


def test_what_a_file_may_hold_at_most(page: Page) -> None:
    many = [{"role": ("user", "assistant")[n % 2], "content": ""} for n in range(10_001)]
    take(page, file("many.json", many))
    expect(page.locator("#toast")).to_contain_text("many.json holds more than 10,000 messages")
    take(page, file("long.json", [{"role": "user", "content": "x" * 1_000_001}]))
    expect(page.locator("#toast")).to_contain_text("longer than 1,000,000 characters")
    expect(page.locator("#conversations .open")).to_have_count(0)


def test_of_several_files_the_sound_ones_are_taken(page: Page) -> None:
    sound = [{"role": "user", "content": "Sound"}]
    take(page, file("bad.json", "no json"), file("sound.json", sound))
    expect(page.locator("#toast")).to_have_text(
        "Imported 1 conversation. bad.json is not valid JSON."
    )
    assert titles(page) == ["Sound"]


def test_a_backup_tells_how_answers_ended(page: Page, room: Room, tmp_path: Path) -> None:
    room.script = lambda body: Script(finish="length")
    ask(page, "Q")
    with page.expect_download() as download:
        page.click("#backup")
    download.value.save_as(tmp_path / "all.json")
    page.locator("#conversations li").hover()
    page.get_by_role("button", name="Delete Q").click()
    expect(page.locator("#conversations .open")).to_have_count(0)
    page.set_input_files("#file", tmp_path / "all.json")
    expect(page.locator(".answer .state")).to_contain_text("longest answer")


def test_figures_of_a_file_that_can_not_be_are_left_out(page: Page) -> None:
    answer = NODE | {"id": "b", "parent": "a", "role": "assistant", "at": 1e300}
    stats = {"prompt": 1e300, "tokens": -4, "speed": 1e308, "seed": 3}
    one = {"id": "c", "nodes": [NODE, answer | {"stats": stats}], "updated": 1e300}
    take(page, file("odd.json", FORMAT | {"conversations": [one]}))
    expect(page.locator(".answer")).to_have_count(1)
    expect(page.locator(".stats")).to_be_empty()
    assert page.locator(".stats").get_attribute("title") == "seed 3"


def test_a_question_is_answered_by_the_likeliest_words_another_answer_is_drawn(
    page: Page, room: Room
) -> None:
    numbered(room)
    ask(page, "Q")
    last(page, "Another answer").click()
    idle(page)
    first, second = room.asked
    assert "temperature" not in first  # the server's own
    assert (second["temperature"], second["min_p"]) == (0.7, 0.05)
    settings(page, temperature="1.5", min_p="0.2")
    last(page, "Another answer").click()
    idle(page)
    assert (room.asked[-1]["temperature"], room.asked[-1]["min_p"]) == (1.5, 0.2)
    page.select_option("#model-0", "cerebrum-7b")
    settings(page, temperature="0", min_p="")
    last(page, "Another answer").click()  # another model's likeliest is another answer
    idle(page)
    assert room.asked[-1]["temperature"] == 0
    page.click("#open-settings")
    expect(page.locator("#temperature-note")).to_contain_text("drawn at 0.7")
