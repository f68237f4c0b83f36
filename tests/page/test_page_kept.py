"""What the page keeps in the browser: reloads, tabs, odd surroundings."""

import page_driver
import pytest
from page_driver import (
    answers,
    ask,
    asked,
    idle,
    kept_nodes,
    last,
    numbered,
    questions,
    reload,
    titles,
    until,
)
from page_room import Hold, Room, Script, words
from playwright.sync_api import Browser, Page, expect

pytestmark = pytest.mark.long
launched, served, room, page = (
    page_driver.launched,
    page_driver.served,
    page_driver.room,
    page_driver.page,
)


def test_a_conversation_survives_a_reload(page: Page, room: Room) -> None:
    numbered(room)
    ask(page, "Remember")
    reload(page)
    expect(page.locator(".answer .markdown")).to_have_text("Answer 1")
    ask(page, "More")
    assert asked(room)[0] == ("user", "Remember")
    assert titles(page) == ["Remember"]


def test_a_reload_in_the_middle_of_an_answer_keeps_what_had_come(page: Page, room: Room) -> None:
    text = words("so much had come before the page was loaded again")
    room.script = lambda body: Script(pieces=[*text, Hold()])
    ask(page, "Go", wait=False)
    expect(page.locator(".answer .markdown")).to_have_text("".join(text))
    reload(page)
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
    reload(page)
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
    reload(page)
    expect(page.locator(".answer").first).to_be_visible()
    kept = {node["content"] for node in kept_nodes(page)}
    assert {"From the first tab", "From the second tab", "And on"} <= kept
    assert {f"Answer {n}" for n in range(1, 5)} <= kept


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
    reload(page)
    expect(page.locator("#conversations .open")).to_have_text(["My own name"])
    page.locator("#conversations li").hover()
    page.get_by_role("button", name="Delete My own name").click()
    expect(page.locator("#conversations .open")).to_have_count(0)
    expect(page.locator(".answer")).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("#conversations .open")).to_have_text(["My own name"])
    expect(page.locator(".answer")).to_have_count(1)


def test_each_of_several_deletions_can_be_undone(page: Page, room: Room) -> None:
    names = ["One", "Two", "Three", "Four"]
    for name in names:
        page.click("#new")
        ask(page, name)
    listed, lines = page.locator("#conversations .open"), page.locator("#toast .line")
    for left, name in reversed(list(enumerate(names))):
        page.locator(f"[aria-label='Delete {name}']").dispatch_event("click")
        expect(listed).to_have_count(left)
        if name == "Two":  # about to undo the first, which a fourth line then must not end
            lines.filter(has_text="Four").get_by_role("button", name="Undo").focus()
    expect(lines).to_have_text([f"Deleted “{name}”.Undo" for name in ("One", "Two", "Four")])
    for name in ("Two", "Four", "One"):
        lines.filter(has_text=name).get_by_role("button", name="Undo").click()
    expect(listed).to_have_count(3)
    expect(page.locator("#toast")).to_be_empty()
    reload(page)
    expect(listed).to_have_count(3)
    assert sorted(titles(page)) == ["Four", "One", "Two"]


def test_another_tab_sees_an_answer_come(page: Page, room: Room) -> None:
    room.script = lambda body: Script(pieces=["One", Hold(), " two", Hold(), ""])
    ask(page, "Q", wait=False)
    other = page.context.new_page()
    other.goto(page.url)
    expect(other.locator(".answer .markdown")).to_have_text("One")
    room.hold.set()
    expect(other.locator(".answer .markdown")).to_have_text("One two")
    expect(other.locator(".answer .state")).to_be_empty()


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
    reload(page)
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
    reload(page)
    expect(page.locator(".answer .markdown")).to_have_text("Half and half")
    expect(page.locator(".answer .state")).to_be_empty()


def test_a_name_given_while_its_answer_comes_stays(page: Page, room: Room) -> None:
    room.script = lambda body: Script(pieces=["a", Hold(), "b"])
    ask(page, "Slow", wait=False)
    expect(page.locator(".answer .markdown")).to_have_text("a")
    page.click("#new")
    page.locator("#conversations li").hover()
    page.get_by_role("button", name="Rename Slow").click()
    page.keyboard.type("Mine")
    page.keyboard.press("Enter")
    expect(page.locator("#conversations .open")).to_have_text(["Mine"])
    page.locator("#conversations .open").click()
    expect(page.locator("#title")).to_have_text("Mine")
    room.hold.set()
    idle(page)
    ask(page, "More")
    reload(page)
    expect(page.locator("#conversations .open")).to_have_text(["Mine"])


def test_the_list_stays_the_same_where_nothing_of_it_changed(page: Page, room: Room) -> None:
    """A button that is replaced while it is pressed is never clicked."""
    ask(page, "Q")
    page.evaluate("window.before = document.querySelector('#conversations .open')")
    ask(page, "R")
    assert page.evaluate("window.before === document.querySelector('#conversations .open')")


def test_a_leftover_of_an_answer_does_not_undo_its_end(page: Page, room: Room) -> None:
    ask(page, "Q")
    answer = next(node for node in kept_nodes(page) if node["role"] == "assistant")
    page.evaluate(
        "(node) => localStorage.setItem('cerebrum.rescue.' + node.id, JSON.stringify(node))",
        answer | {"state": "partial"},
    )
    reload(page)
    expect(page.locator(".answer .markdown")).to_have_text("Hello world.")
    expect(page.locator(".answer .state")).to_be_empty()


def test_a_database_that_goes_away_is_opened_again(page: Page, room: Room) -> None:
    """As where the site's data are cleared, or a phone takes the connection from the page."""
    numbered(room)
    ask(page, "One")
    page.evaluate(
        """() => new Promise((resolve) => {
            indexedDB.deleteDatabase("cerebrum").onsuccess = resolve;
        })"""
    )
    ask(page, "Two")
    reload(page)
    expect(page.locator(".answer .markdown")).to_have_text(["Answer 1", "Answer 2"])
    expect(page.locator("#toast")).to_be_empty()


def test_a_full_storage_is_said_once_and_the_chat_goes_on(page: Page, room: Room) -> None:
    ask(page, "One")
    page.evaluate(
        """() => {
            IDBObjectStore.prototype.put = () => {
                throw new DOMException("full", "QuotaExceededError");
            };
        }"""
    )
    numbered(room)
    ask(page, "Two")
    expect(page.locator("#toast")).to_contain_text("storage is full")
    page.evaluate("document.getElementById('toast').replaceChildren()")
    ask(page, "Three")
    assert answers(page)[1:] == ["Answer 2", "Answer 3"]
    expect(page.locator("#toast")).to_be_empty()


def test_deleted_in_another_tab_in_the_middle_it_is_kept_where_one_goes_on(
    page: Page, room: Room
) -> None:
    room.script = lambda body: Script(pieces=["a", Hold(), "b"])
    ask(page, "One", wait=False)
    expect(page.locator(".answer .markdown")).to_have_text("a")
    other = page.context.new_page()
    other.goto(room.url)
    other.locator("#conversations li").hover()
    other.get_by_role("button", name="Delete One").click()
    expect(page.locator("#conversations .open")).to_have_count(0)
    other.evaluate("document.getElementById('toast').replaceChildren()")
    page.evaluate(
        """() => new Promise((resolve) => {
            indexedDB.open("cerebrum").onsuccess = ({ target }) => {
                const names = ["conversations", "nodes"];
                const transaction = target.result.transaction(names, "readwrite");
                for (const name of names) transaction.objectStore(name).clear();
                transaction.oncomplete = () => {
                    target.result.close();
                    resolve();
                };
            };
        })"""
    )
    room.hold.set()
    idle(page)
    ask(page, "Two")
    reload(page)
    expect(page.locator(".answer .markdown")).to_have_text(["ab", "ab"])


def test_a_hidden_tab_looks_when_it_is_shown(page: Page, room: Room) -> None:
    ask(page, "One")
    other = page.context.new_page()
    other.goto(page.url)
    expect(other.locator(".answer")).to_have_count(1)
    hidden = "Object.defineProperty(document, 'hidden', { configurable: true, value: %s })"
    other.evaluate(hidden % "true")
    other.evaluate("new BroadcastChannel('cerebrum').onmessage = () => (window.heard = true)")
    last(page, "Another answer").click()
    idle(page)
    until(other, "window.heard")
    expect(other.locator(".count")).to_have_count(0)
    other.evaluate(hidden % "false")
    other.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect(other.locator(".count")).to_have_text("1/2")


def test_what_another_tab_tells_while_the_page_opens_is_heard(page: Page, room: Room) -> None:
    """`visit` fails for an error of the page."""
    ask(page, "One")
    page.context.add_init_script(
        """{
            const of = Object.getOwnPropertyDescriptor(BroadcastChannel.prototype, "onmessage");
            const set = function (heard) {
                of.set.call(this, heard);
                heard({ data: { id: "x", listed: true } }); // as soon as it can
            };
            Object.defineProperty(BroadcastChannel.prototype, "onmessage", { ...of, set });
        }"""
    )
    reload(page)
    expect(page.locator("#conversations .open")).to_have_count(1)


def test_a_question_sent_while_its_conversation_opens_again_is_seen(page: Page, room: Room) -> None:
    numbered(room)
    ask(page, "One")
    page.evaluate(
        """() => {
            document.querySelector("#conversations .open").click();
            document.getElementById("question").value = "Two";
            document.getElementById("composer").requestSubmit();
        }"""
    )
    expect(page.locator(".answer .markdown")).to_have_text(["Answer 1", "Answer 2"])
    idle(page)


def test_what_is_shown_stays_where_the_database_fails(page: Page, room: Room) -> None:
    ask(page, "One")
    other = page.context.new_page()
    other.goto(page.url)
    expect(other.locator(".answer")).to_have_count(1)
    other.evaluate(
        """() => {
            IDBDatabase.prototype.transaction = () => {
                window.failed = true;
                throw new DOMException("lost", "UnknownError");
            };
        }"""
    )
    ask(page, "Two")
    until(other, "window.failed")
    expect(other.locator("#toast")).to_contain_text("does not keep conversations now")
    expect(other.locator(".answer")).to_have_count(1)
