"""The chat on a real terminal: what a person sees, and what the keys do."""

import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import slow
from talker import LETTERS, talker
from terminal import Program

from mlx_cerebrum.chat.commands import COMMANDS
from mlx_cerebrum.chat.palette import styles

ROOT = Path(__file__).parents[2]


def start(
    folder: Path,
    *flags: str,
    says: str = LETTERS,
    term: str = "xterm-256color",
    colours: bool = True,
    under: Sequence[str] = (),
    **size: int,
) -> Program:
    checkpoint = folder / "talker"
    checkpoint = checkpoint if checkpoint.exists() else talker(folder, says)
    command = [sys.executable, "-m", "mlx_cerebrum.chat", "--model", str(checkpoint)]
    removed = {"NO_COLOR", "COLUMNS", "LINES", "XTERM_VERSION", "INPUTRC"}
    env = {name: value for name, value in os.environ.items() if name not in removed}
    env |= {"TERM": term, "HOME": str(folder), "XDG_STATE_HOME": str(folder / "state")}
    env |= {"PYTHONPATH": str(ROOT)} | ({} if colours else {"NO_COLOR": "1"})
    return Program([*under, *command, "--plan", str(folder / "twice.yml"), *flags], env, **size)


def at_prompt(program: Program) -> Program:
    """Keys sent between two prompts are not the line editor's yet."""
    program.until(lambda text: text.endswith(">"))
    return program


def answering(text: str) -> bool:
    return len(text.partition("> Talk!\n")[2]) > 100


@slow
def test_ask_switch_compare_and_quit(tmp_path: Path) -> None:
    with start(tmp_path, "--max-tokens", "60") as program:
        text = program.until("talker>")
        assert "talker (8 positions), talker@twice (12 positions) over 8 blocks" in text
        assert "/help" in text
        program.send("How are you?\r")
        program.until("stopped at 60 tokens; /continue goes on\n\ntalker>")
        at_prompt(program).send("/plan twice\r")
        program.until("twice>")
        at_prompt(program).send("/compare And you?\r")
        text = program.until("Keep 1 or 2? [2]")
        assert re.search(r"1 talker +\u2502 2 talker@twice", text)
        assert re.search(r"\w \u2260 \w", text)
        assert re.search(r"60 tokens, \d+\.\d/s +\u2502 60 tokens, \d+\.\d/s", text)
        program.send("1\r")
        program.until(lambda text: text.endswith("twice>"))
        at_prompt(program).send(f"/save {tmp_path}/talk.json\r")
        program.until("saved 4 messages")
        at_prompt(program).send("/quit\r")
        assert program.end() == 0
        assert program.terminal.unknown == []
        history = (tmp_path / "state" / "mlx-cerebrum" / "chat-history").read_text()
        assert "+/compare And you?" in history


@slow
def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(tmp_path: Path) -> None:
    with start(tmp_path, "--max-tokens", "4000", "--no-history") as program:
        program.until("talker>")
        program.send("\x03")
        program.until("/quit or Ctrl-D leaves\n\ntalker>")
        program.send("Talk!\r")
        program.until(answering)
        program.send("typed")  # keys are not shown among the answer's lines
        program.send("\x03")
        text = program.until("what came stays in the conversation")
        answer = text.split("Talk!\n")[1].split("\n")[0]
        assert "typed" not in text.split("stopped;")[0]
        program.until(lambda text: text.endswith("talker>"))
        program.send("thrown away")
        program.until("> thrown away")
        program.send("\x03")  # clears the line
        program.until(lambda text: text.endswith("talker>"))
        at_prompt(program).send(f"/save {tmp_path}/talk.json\r")
        program.until("saved 2 messages")
        assert answer[:50] in (tmp_path / "talk.json").read_text()
        at_prompt(program).send("\x04")
        assert program.end() == 0
        assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("signum", "when"),
    [
        (signal.SIGTERM, "at the prompt"),
        (signal.SIGTERM, "answering"),
        (signal.SIGHUP, "comparing"),
        (signal.SIGHUP, "asked"),
    ],
)
@pytest.mark.one_in(8)
def test_the_terminal_is_put_back_whatever_ends_the_chat(
    tmp_path: Path, signum: signal.Signals, when: str
) -> None:
    tokens = "8" if when == "asked" else "4000"
    with start(tmp_path, "--max-tokens", tokens) as program:
        program.until("talker>")
        if when != "at the prompt":
            at_prompt(program).send("Talk!\r" if when == "answering" else "/compare Talk!\r")
            program.until("Keep 1 or 2?" if when == "asked" else "Talk!\n")
        if when in ("answering", "comparing"):
            program.until(lambda text: len(text.partition("Talk!\n")[2]) > 100)
        assert not program.as_found
        program.process.send_signal(signum)
        assert program.end() == 128 + signum
        assert program.as_found
        assert "Traceback" not in program.terminal.text
        assert program.raw.rfind("\x1b[?7h") >= program.raw.rfind("\x1b[?7l")


# A signal at the worst moment of a prompt: in the middle of what its event loop is doing.
STRUCK = """
import signal
from prompt_toolkit.completion import DummyCompleter
from prompt_toolkit.history import InMemoryHistory
from mlx_cerebrum.chat.prompt import EditingReader
from mlx_cerebrum.chat.signals import orderly_end

class Struck(InMemoryHistory):
    def load_history_strings(self):
        signal.raise_signal(signal.SIGTERM)
        return super().load_history_strings()

with orderly_end():
    EditingReader(Struck(), DummyCompleter()).read("> ")
"""


def test_a_signal_inside_the_line_editors_loop() -> None:
    env = dict(os.environ) | {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
    with Program([sys.executable, "-c", STRUCK], env) as program:
        assert program.end() == 128 + signal.SIGTERM
        assert program.as_found
        assert program.terminal.text.strip() == ">"


@slow
def test_a_terminal_that_goes_away_ends_the_chat(tmp_path: Path) -> None:
    with start(tmp_path) as program:
        program.until("talker>")
        at_prompt(program).hang_up()
        assert program.process.wait(25) in (0, 128 + signal.SIGHUP)


# A shell that goes on when its job is stopped, says how it finds the terminal, and waits.
SHELL = ("sh", "-c", 'set -m; "$@"; stty -a; echo "is stopped"; read line; fg; exit $?', "sh")


@pytest.mark.parametrize("when", ["at the prompt", "answering"])
@slow
def test_ctrl_z_and_fg(tmp_path: Path, when: str) -> None:
    with start(tmp_path, "--max-tokens", "3000", "--no-history", under=SHELL) as program:
        program.until("talker>")
        if when == "answering":
            at_prompt(program).send("Talk!\r")
            program.until(answering)
        else:
            at_prompt(program).send("Typed")
            program.until("> Typed")
        program.send("\x1a")
        found = program.until("is stopped").split()
        assert {"echo", "icanon"} <= set(found)
        program.send("\n")
        if when == "answering":
            program.until("is stopped\n\n")
            program.until(lambda text: len(text.partition("is stopped")[2]) > 100)
            assert not program.as_found
            program.send("\x03")
            program.until("what came stays in the conversation")
        else:
            program.until(lambda text: text.endswith("> Typed"))
            program.send("\x03")
            program.until(lambda text: text.endswith("talker>"))
        at_prompt(program).send("/quit\r")
        assert program.end() == 0
        assert program.as_found


@slow
def test_several_lines_and_completion(tmp_path: Path) -> None:
    with start(tmp_path, "--max-tokens", "5") as program:
        program.until("talker>")
        program.send("one\x1b\rtwo\\\rthree")
        program.until("... three")
        program.send("\r")
        program.until("stopped at 5 tokens")
        at_prompt(program).send("\x1b[200~four\nfive\x1b[201~")
        program.until("... five")
        program.send("\r")
        program.until(lambda text: text.count("stopped at 5 tokens") == 2)
        program.until(lambda text: text.endswith("talker>"))
        at_prompt(program).send("/edit\r")
        program.until("edit> four\n... five")
        program.send(" or six\r")
        program.until(lambda text: text.count("stopped at 5 tokens") == 3)
        program.send("/sav")
        program.until("/save  write the conversation")
        program.send("\t")
        program.until("talker> /save")
        program.send(f" {tmp_path}/talk.json\r")
        program.until("saved 4 messages")
        at_prompt(program).send("\x04")
        assert program.end() == 0
    saved = (tmp_path / "talk.json").read_text()
    assert "one\\ntwo\\nthree" in saved
    assert "four\\nfive or six" in saved


@pytest.mark.parametrize(
    ("columns", "rows"),
    [
        (40, 15),
        pytest.param(60, 10, marks=pytest.mark.long),
        pytest.param(24, 8, marks=pytest.mark.long),
    ],
)
@slow
def test_small_terminals_and_resizing(tmp_path: Path, columns: int, rows: int) -> None:
    with start(tmp_path, "--max-tokens", "300", columns=columns, rows=rows) as program:
        program.until("talker>")
        program.send("/compare Talk!\r")
        program.until(lambda text: len(text.partition("/compare Talk!\n")[2]) > 200)
        program.resize(columns + 20, rows + 3)
        text = program.until("Keep 1 or 2? [1]")
        program.send("\r")
        program.until("stopped at 300 tokens")
        at_prompt(program).send(f"/save {tmp_path}/talk.json\r")
        program.until("saved 2 messages")
        at_prompt(program).send("\x04")
        assert program.end() == 0
        assert program.terminal.unknown == []
    assert ("\u2502" in text) == (columns >= 60)


HOSTILE = "\x1b[2J]0;\x07\x9b3m"


@slow
def test_a_hostile_answer_stays_text(tmp_path: Path) -> None:
    """What would clear the screen, set the title or ring is shown instead."""
    says = "\x1b[2J]\x07\x08"
    with start(tmp_path, "--max-tokens", "300", says=says) as program:
        program.until("talker>")
        before = program.raw
        program.send("Talk!\r")
        text = program.until("stopped at 300 tokens")
        written = program.raw[len(before) :]
        assert "\u241b" in text or "\u2407" in text or "\u2408" in text
        assert "\x07" not in written
        assert "\x1b[2J" not in written
        at_prompt(program).send("\x04")
        assert program.end() == 0


@pytest.mark.parametrize("flags", [(), ("--plain",)])
@slow
def test_a_dumb_terminal(tmp_path: Path, flags: tuple[str, ...]) -> None:
    term = "xterm" if flags else "dumb"
    with start(tmp_path, "--max-tokens", "4000", *flags, term=term) as program:
        program.until("talker>")
        program.send("Talk!\n")
        program.until(answering)
        program.send("\x03")
        program.until("what came stays in the conversation, /continue goes on\ntalker>")
        at_prompt(program).send("/edit\n")
        program.until("/edit followed by the new text\ntalker>")
        program.send("\x03")
        program.until("/quit or Ctrl-D leaves")
        at_prompt(program).send("\x04")
        assert program.end() == 0
        assert "\x1b" not in program.raw


@pytest.mark.parametrize("colours", [True, False])
@slow
def test_colours_and_none(tmp_path: Path, colours: bool) -> None:
    """Those of a terminal that says it is white; NO_COLOR has none."""
    with start(tmp_path, "--max-tokens", "5", colours=colours) as program:
        program.terminal.background = "ffff/ffff/ffff"
        program.until("talker>")
        program.send("/nope\r")
        program.until("is not a command")
        used = set(re.findall(r"\x1b\[(?:\d+;)*38;5;(\d+)m", program.raw))
        colors = [styles((255, 255, 255))[name].color for name in ("notice", "error")]
        wanted = {str(color.number) for color in colors if color}
        assert used >= wanted if colours else not used


@slow
def test_the_menu_has_every_command_and_takes_no_room_later(tmp_path: Path) -> None:
    with start(tmp_path, rows=30) as program:
        program.until("talker>")
        at_prompt(program).send("/")
        for name, command in COMMANDS.items():
            program.until(f"/{name:<10}{command.help[:40]}")
        program.send("set \x7f\x7f\x7f\x7f\x7f")
        program.until(lambda text: text.endswith("talker>"))


@slow
def test_a_line_at_a_time_between_triple_quotes(tmp_path: Path) -> None:
    """Also in a window of 20 columns, with wide characters."""
    with start(tmp_path, "--max-tokens", "5", columns=20) as program:
        program.until("talker>")
        at_prompt(program).send('"""\r')
        program.until('"""\n...')
        program.send("\u6f22\u5b57 one\r/help\r")
        program.send('"""\r')
        program.until("stopped at 5 tokens")
        at_prompt(program).send("/set\r")
        text = program.until("guess several")
        assert "\u2026" not in text
        at_prompt(program).send("\x04")
        assert program.end() == 0
    (file,) = (tmp_path / ".local/share/mlx-cerebrum/conversations").glob("*.json")
    assert "\u6f22\u5b57 one\\n/help" in file.read_text("utf-8")


@slow
def test_a_message_is_written_in_an_editor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nls -l "$1" > "$0.saw"; echo "and more" >> "$1"\n')
    editor.chmod(0o755)
    monkeypatch.setenv("EDITOR", str(editor))
    monkeypatch.delenv("VISUAL", raising=False)
    with start(tmp_path, "--max-tokens", "5") as program:
        program.until("talker>")
        at_prompt(program).send("One \x18\x05")
        program.until("> One and more\n")  # sent, as a shell does
        program.until("stopped at 5 tokens")
        at_prompt(program).send("\x04")
        assert program.end() == 0
    saw = (tmp_path / "editor.saw").read_text()
    assert saw.startswith("-rw-------")
    assert saw.rstrip().endswith(".md")


@slow
def test_vis_keys_for_those_who_have_set_them(tmp_path: Path) -> None:
    (tmp_path / ".inputrc").write_text("$include /etc/inputrc\nset editing-mode vi\n")
    with start(tmp_path, "--max-tokens", "5", "--no-history") as program:
        program.until("talker>")
        at_prompt(program).send("Thisx\x1b")
        program.until("Thisx")
        program.send("xA one\r")
        program.until("> This one\n")
        program.until("stopped at 5 tokens")
        at_prompt(program).send("\x04")
        assert program.end() == 0


@slow
def test_leaving_what_is_not_kept(tmp_path: Path) -> None:
    """Ctrl-C stays, Ctrl-D leaves. With --no-save nobody is asked."""
    with start(tmp_path, "--max-tokens", "5", "--no-keep") as program:
        program.until("talker>")
        program.send("One?\r")
        program.until("stopped at 5 tokens")
        at_prompt(program).send("/quit\r")
        program.until("Save this conversation?")
        program.send("\x03")
        program.until(lambda text: text.endswith("talker>"))
        at_prompt(program).send("\x04")
        program.until(lambda text: text.count("Save this conversation?") == 2)
        program.send("\x04")
        assert program.end() == 0
    with start(tmp_path, "--max-tokens", "5", "--no-keep", "--no-save", "--plain") as program:
        program.until("talker>")
        program.send("One?\n")
        program.until("stopped at 5 tokens")
        at_prompt(program).send("\x04")
        assert program.end() == 0
        assert "Save" not in program.terminal.text
    assert not (tmp_path / ".local").exists()
