"""Conversations in files: nothing lost, nobody else's to read, and the page's too."""

import json
import signal
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import slow
from page_room import browser, stand_in, visit
from playwright.sync_api import Page
from test_chat import Views, talk
from test_chat import views as views
from test_chat_terminal import at_prompt, start

from mlx_cerebrum.chat import kept
from mlx_cerebrum.chat.chat import Chat
from mlx_cerebrum.chat.export import as_markdown
from mlx_cerebrum.chat.kept import Turn
from mlx_cerebrum.errors import RequestError

# What the page makes of a file, and the file it makes of that.
THROUGH_THE_PAGE = """async (text) => {
    const { readFile, backupFile, messagesFile } = await import("/files.js");
    const { Conversation } = await import("/conversation.js");
    const found = await readFile(new File([text], "kept.json"));
    const [{ meta, nodes }] = found;
    const shown = messagesFile(new Conversation(meta, nodes)).text;
    return { shown: JSON.parse(shown), backup: backupFile(found).text, title: meta.title };
}"""


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with stand_in() as room, browser() as launched, visit(launched, room.url) as page:
        yield page


def said(*texts: str, model: str = "m", reason: str = "stop") -> list[Turn]:
    roles = ("user", "assistant")
    return [
        Turn(roles[n % 2], text, model * (n % 2), reason * (n % 2)) for n, text in enumerate(texts)
    ]


def texts(path: Path) -> list[str]:
    (one,) = kept.read(path)
    return [turn.text for turn in one.turns]


def kept_talk(
    views: Views, lines: list[str], answers: list[str] | None = None
) -> tuple[Chat, list[Path]]:
    chat, _ = talk(views, lines, answers or [], keeps=True)
    return chat, sorted(kept.folder().glob("*.json")) if kept.folder().exists() else []


def test_a_file_is_its_users_and_holds_the_branches() -> None:
    kept.keep("a", "Be brief.", said("Q?", "one"))
    kept.keep("a", "Be brief.", said("Q?", "two", "Then?"))
    path = kept.path_of("a")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(path.parent.iterdir()) == [path]
    (one,) = kept.read(path)
    assert [(t.role, t.text, t.model, t.reason) for t in one.turns] == [
        ("user", "Q?", "", ""),
        ("assistant", "two", "m", "stop"),
        ("user", "Then?", "", ""),
    ]
    assert (one.title, one.system) == ("Q?", "Be brief.")
    (whole,) = json.loads(path.read_text())["conversations"]
    assert [node["content"] for node in whole["nodes"]] == ["Q?", "one", "two", "Then?"]
    before = whole["nodes"]
    kept.keep("a", "Be brief.", said("Q?", "two", "Then?"))
    assert json.loads(path.read_text())["conversations"][0]["nodes"] == before


def test_two_chats_in_one_conversation_lose_nothing() -> None:
    kept.keep("a", "", said("Q?", "A."))

    def more(name: str) -> None:
        turns = said("Q?", "A.")
        for n in range(15):
            turns += said(f"{name}{n}?", f"{name}{n}.")
            kept.keep("a", "", turns)

    threads = [threading.Thread(target=more, args=(name,)) for name in "xy"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = json.loads(kept.path_of("a").read_text())["conversations"][0]["nodes"]
    assert len(found) == 2 + 2 * 30
    assert len(texts(kept.path_of("a"))) == 32


def test_what_passes_is_left_out_when_the_whole_is_there() -> None:
    leaf = kept.keep("a", "", said("Q?", "An ans", reason="partial"))
    assert kept.read(kept.path_of("a"))[0].turns[-1].reason == "interrupted"
    kept.keep("a", "", said("Q?", "An answer"), passing=leaf)
    nodes = json.loads(kept.path_of("a").read_text())["conversations"][0]["nodes"]
    assert [node["content"] for node in nodes] == ["Q?", "An answer"]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"format": "mlx-cerebrum-conversations", "version": 2, "conversations": []}',
        '{"format": "mlx-cerebrum-conversations", "version": 1, "conversations": []}',
        '{"format": "mlx-cerebrum-conversations", "version": 1, "conversations": [{"id": "b"}]}',
        '{"format": "mlx-cerebrum-conversations", "version": 1, "conversations":'
        ' [{"id": "b", "nodes": []}]}',
    ],
)
def test_a_file_that_is_something_else_stays_as_it_is(text: str) -> None:
    path = kept.path_of("a")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(RequestError):
        kept.keep("a", "", said("Q?", "A."))
    assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]
    assert [one.name for _, one in kept.newest()] in ([], ["b"])


def test_what_is_removed_is_gone() -> None:
    """With what a chat that was killed while it wrote has left."""
    kept.keep("a", "", said("Q?", "A."))
    path = kept.path_of("a")
    path.with_name(".a.partial").write_text("half")
    kept.remove(path)
    assert list(path.parent.iterdir()) == []
    kept.remove(path)


def test_a_models_name_that_is_no_text() -> None:
    turns = said("Q?", "A.", model="a\udcff")
    kept.keep("a", "", turns)
    assert texts(kept.path_of("a")) == ["Q?", "A."]
    assert "## Answer by a?" in as_markdown("", "", turns).encode().decode()


def test_a_circle_ends() -> None:
    kept.keep("a", "", said("Q?", "A."))
    path = kept.path_of("a")
    value = json.loads(path.read_text())
    nodes = value["conversations"][0]["nodes"]
    nodes[0]["parent"] = nodes[1]["id"]
    path.write_text(json.dumps(value))
    assert texts(path) == ["Q?", "A."]


@slow
def test_the_page_reads_them_and_its_own_are_read_here(page: Page, tmp_path: Path) -> None:
    turns = said("Hello?", "Hi\n\n```\nx", "And?", "Cut", reason="length")
    turns[0].others = [said("Hallo?", "Hallo!", reason="interrupted")]
    kept.keep("20260101_000000_abc", "Be brief.", turns)
    path = kept.path_of("20260101_000000_abc")
    found: dict[str, Any] = page.evaluate(THROUGH_THE_PAGE, path.read_text())
    assert found["title"] == "Hello?"
    assert [m["content"] for m in found["shown"]] == ["Be brief.", *(t.text for t in turns)]
    back = tmp_path / "back.json"
    back.write_text(found["backup"])
    assert kept.read(back)[0] == kept.read(path)[0]
    (one,) = kept.conversations(back)
    assert one.messages == found["shown"]
    back.write_text(json.dumps(found["shown"]))
    (one,) = kept.conversations(back)
    assert one.messages == found["shown"]


@slow
def test_the_page_reads_what_is_exported(page: Page) -> None:
    turns = said("Q?\n\nMore", "A.\n\n```py\nx = 1", "<!-- cerebrum answer -->", "- B\n  ~~~\nc")
    text = as_markdown("Title", "Be brief.", turns)
    found = page.evaluate(THROUGH_THE_PAGE.replace("kept.json", "kept.md"), text)
    assert found["title"] == "Title"
    assert [m["content"] for m in found["shown"]] == ["Be brief.", *(t.text for t in turns)]


def test_markdown_is_the_pages() -> None:
    text = as_markdown("Q?", "Be brief.", said("Q?\n\nMore", "A.\n\n```py\nx = 1", model="m--x"))
    assert text == (
        "<!-- cerebrum-conversation 1 -->\n# Q?\n\n"
        "<!-- cerebrum system -->\n## System text\n\nBe brief.\n\n"
        "<!-- cerebrum question -->\n## Question\n\nQ?\n\nMore\n\n"
        "<!-- cerebrum answer by m- -x closed ``` -->\n## Answer by m- -x\n\n"
        "A.\n\n```py\nx = 1\n```\n"
    )
    tricky = as_markdown("", "", said("<!-- cerebrum question -->", "```\na\n```"))
    assert tricky.startswith("<!-- cerebrum2-conversation 1 -->\n# Conversation\n")
    assert "closed" not in tricky


# In a chat.


def test_each_exchange_is_kept(views: Views) -> None:
    chat, files = kept_talk(views, ["/system Be brief.", "One?", "/retry 0.9", "Two?", "/undo"])
    (path,) = files
    (one,) = kept.read(path)
    assert one.messages == chat.session.messages()
    assert one.turns[-1].reason == chat.session.exchanges[-1].answer.reason in ("length", "stop")
    nodes = json.loads(path.read_text())["conversations"][0]["nodes"]
    assert [n["role"] for n in nodes] == ["user", "assistant", "assistant", "user", "assistant"]
    _, files = kept_talk(views, ["One?", "/clear", "Two?", "/clear", "/undo", "Three?"])
    assert sorted(texts(path)[::2] for path in files) == [["One?"], ["One?"], ["Two?", "Three?"]]


@pytest.mark.parametrize("line", ["/retry 0.9", "/compare", "/continue", "/edit Two?"])
def test_what_is_there_stays_until_more_comes(
    views: Views, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    """A chat that is killed while the last question is asked again."""
    chat, files = kept_talk(views, ["One?"])
    (before,) = kept.read(files[0])

    def killed(*_: Any) -> None:
        raise SystemExit(143)

    for name in ("show", "compare"):
        monkeypatch.setattr(chat.screen, name, killed)
    with pytest.raises(SystemExit):
        chat.handle(line)
    (after,) = kept.read(files[0])
    expected = [Turn("user", "Two?")] if line.startswith("/edit") else before.turns
    if line == "/continue":  # as far as it had come
        assert [turn.text for turn in after.turns] == [turn.text for turn in before.turns]
    else:
        assert after.turns == expected


def test_resume(views: Views, capsys: pytest.CaptureFixture[str]) -> None:
    kept_talk(views, ["/resume 1"])
    assert "no conversation is kept" in capsys.readouterr().err
    kept_talk(views, ["The first one?"])
    first, _ = kept_talk(views, ["/plan twice", "The second?", "And more?"])
    capsys.readouterr()
    chat, files = kept_talk(views, ["/resume", "Then?"], ["1"])
    err = capsys.readouterr().err
    assert "1  " in err
    assert "The second?  (4 messages)" in err
    assert err.index("The second?") < err.index("The first one?")
    assert 'from "The second?"; the last question: And more?' in err
    assert chat.session.current == "talker@twice"  # which answered there
    assert chat.session.messages()[:4] == first.session.messages()
    assert len(files) == 2  # it is kept where it was
    assert [texts(path)[::2] for path in files][1] == ["The second?", "And more?", "Then?"]
    chat, _ = kept_talk(views, ["/resume FIRST one", "/resume 1", "/continue"])
    assert chat.session.question == "The first one?"
    assert len(chat.session.exchanges[0].answer.text) == 24
    chat, _ = kept_talk(views, ["/resume 9", "/resume nothing such"])
    err = capsys.readouterr().err
    assert "'9' is none of the numbers 1 to 2" in err
    assert "no conversation with these words is kept" in err


def test_delete(views: Views, capsys: pytest.CaptureFixture[str]) -> None:
    kept_talk(views, ["One?"])
    lines = ["/delete", "/resume", "/delete 1", "Two?", "/delete"]
    _, files = kept_talk(views, lines, ["7", "", "n"])
    assert [texts(path)[0] for path in files] == ["One?", "Two?"]
    lines = ["/resume", "/delete 2", "Three?", "/delete", "More?"]
    chat, files = kept_talk(views, lines, ["", "y", "y"])
    assert [texts(path)[0] for path in files] == ["Two?"]
    assert 'deleted "One?"' in capsys.readouterr().err
    assert chat.session.question == "More?"


def test_nobody_is_asked_to_save_what_they_delete(
    views: Views, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kept_talk(views, ["One?", "/delete"], ["y", "asked.json"])
    assert not (tmp_path / "asked.json").exists()


def test_a_long_list_says_how_older_ones_are_found(
    views: Views, capsys: pytest.CaptureFixture[str]
) -> None:
    for n in range(kept.LISTED + 3):
        kept.keep(f"talk{n}", "", said(f"Question {n}?", "A."))
    kept_talk(views, ["/resume", "/resume question 0?"])
    err = capsys.readouterr().err
    assert "/resume WORDS finds older ones" in err
    assert "Question 0?" not in err.partition("Which")[0].partition("older ones")[0]
    assert "Question 0?  (2 messages)" in err


def test_a_disk_that_fails_costs_a_line(
    views: Views, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "data").write_text("in the way")
    chat, files = kept_talk(views, ["One?", "Two?"], [f"{tmp_path}/saved.json"])
    err = capsys.readouterr().err
    assert files == []
    assert err.count("this conversation can't be kept: ") == 1
    assert len(chat.session.exchanges) == 2
    assert (tmp_path / "saved.json").exists()  # then leaving it is asked about


def test_a_user_without_a_home(
    views: Views, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    monkeypatch.delenv("HOME")
    talk(views, ["One?", "/resume", "Two?"], keeps=True, offers=False)
    assert capsys.readouterr().err.count("can be kept: Could not determine home") == 2


@pytest.mark.parametrize(
    ("lines", "answers", "left"),
    [
        (["One?", "/quit"], ["talk.json"], ["talk.json"]),
        (["One?", "/quit"], [""], []),
        (["One?", "/quit"], ["n"], []),
        (["One?", "/quit"], ["y", "talk.json"], ["talk.json"]),
        (["One?", "/quit"], ["yes", ""], []),
        (["One?", "/quit", "More?"], ["nowhere/talk.json"], []),  # it says so, and stays once
        (["One?"], ["talk.json"], ["talk.json"]),  # Ctrl-D
        (["One?", "/save talk.json", "/quit"], ["never asked"], ["talk.json"]),
        (["/quit"], ["never asked"], []),
    ],
)
@pytest.mark.one_in(8)
def test_leaving_offers_to_save_once(
    views: Views,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lines: list[str],
    answers: list[str],
    left: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    talk(views, lines, answers)
    assert [path.name for path in tmp_path.glob("*.json")] == left
    (tmp_path / "talk.json").unlink(missing_ok=True)
    talk(views, [*lines[:1], "/quit"], ["talk.json"], offers=False)
    talk(views, [*lines[:1], "/quit"], ["talk.json"], asks=False)
    talk(views, [*lines[:1], "/quit"], ["talk.json"], keeps=True)
    assert list(tmp_path.glob("*.json")) == []


def test_export_and_load(views: Views, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "talk.md"
    chat, files = kept_talk(views, ["/export x.md", "One?", f"/export {file}", "/export /dev/null"])
    err = capsys.readouterr().err
    assert "there is nothing to export yet" in err
    assert "/dev/null is no file" in err
    assert "## Question\n\nOne?\n\n<!-- cerebrum answer by talker -->\n" in file.read_text()
    loaded, _ = talk(views, [f"/load {files[0]}"])
    assert loaded.session.messages() == chat.session.messages()
    several = json.loads(files[0].read_text())
    several["conversations"] *= 2
    (tmp_path / "several.json").write_text(json.dumps(several))
    loaded, _ = talk(views, [f"/load {tmp_path}/several.json"], ["2"])
    assert loaded.session.messages() == chat.session.messages()


# On a terminal.


def kept_files(home: Path) -> list[Path]:
    return sorted((home / ".local/share/mlx-cerebrum/conversations").glob("*.json"))


def answer_kept(home: Path) -> str:
    """The first answer in the only file, as far as it is there."""
    for path in kept_files(home):
        return "".join(texts(path)[1:2])
    return ""


@pytest.mark.parametrize(
    "signum", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.long)]
)
@slow
def test_a_chat_that_dies_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
) -> None:
    monkeypatch.delenv("XDG_DATA_HOME")
    with start(tmp_path, "--max-tokens", "4000", "--no-history") as program:
        program.until("talker>")
        at_prompt(program).send("Talk!\r")
        program.until(lambda text: len(text.partition("> Talk!\n")[2]) > 200)
        if signum == signal.SIGKILL:
            program.until(lambda _: answer_kept(tmp_path) != "")
        program.process.send_signal(signum)
        program.end()
    text = answer_kept(tmp_path)
    assert len(text) > 100
    with start(tmp_path, "--max-tokens", "20", "--no-history", "--resume") as program:
        program.until("Which one? [1]")
        assert "Talk!  (2 messages)" in program.terminal.text
        program.send("\r")
        program.until("2 messages from")
        at_prompt(program).send("/continue\r")
        program.until("stopped at 20 tokens")
        at_prompt(program).send("\x04")
        assert program.end() == 0
    (path,) = kept_files(tmp_path)
    assert texts(path)[1][:-20] == text


def test_a_message_that_names_none_before_it_is_the_first(tmp_path: Path) -> None:
    node = {"id": "a", "role": "user", "content": "Q?", "at": 5}
    one = {"id": "x", "leaf": "a", "nodes": [node]}
    whole = {"format": kept.FORMAT, "version": kept.VERSION, "conversations": [one]}
    (tmp_path / "x.json").write_text(json.dumps(whole))
    (found,) = kept.read(tmp_path / "x.json")
    assert [turn.text for turn in found.turns] == ["Q?"]
