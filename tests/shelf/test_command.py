"""`mlx-cerebrum`: names that are fetched when they are needed, and what people type by mistake."""

import importlib
import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import shelf_room
from conftest import MakeCheckpoint, slow
from hub_stand_in import Hub
from terminal import Program

from convert import pull
from mlx_cerebrum import cli
from mlx_cerebrum.__main__ import COMMANDS, main
from mlx_cerebrum.shelf.entries import find

ROOT = Path(__file__).parents[2]
repository, hub = shelf_room.repository, shelf_room.hub  # fixtures


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, list[str]]:
    """What `pull` and `generate` are started with, instead of running."""
    seen: dict[str, list[str]] = {}

    def note(name: str) -> Any:
        def started(argv: list[str]) -> int:
            seen[name] = argv
            return 0

        return started

    monkeypatch.setenv("MLX_CEREBRUM_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pull, "main", note("pull"))
    monkeypatch.setattr(importlib.import_module("mlx_cerebrum.generate"), "main", note("generate"))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    return seen


def at_terminal(monkeypatch: pytest.MonkeyPatch, typed: str = "") -> None:
    monkeypatch.setattr(cli, "ask", lambda question: typed)
    monkeypatch.setattr("mlx_cerebrum.__main__._at_terminal", lambda: True)


@slow
def test_one_line_from_nothing_to_an_answer(
    hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    argv = ["generate", "cerebrum-12.25b", "--bits", "4", "--yes", "--prompt", "Hi", "--raw"]
    assert main([*argv, "--max-tokens", "2"]) == 0
    out, err = capsys.readouterr()
    assert "cerebrum" not in out  # it is the answer's alone
    assert "; 56 positions, window 12, " in err.replace("float32", "")
    assert find("cerebrum-12.25b:4bit") is not None
    assert main(["verify", "cerebrum-12.25b", "--quiet"]) == 0
    hub.faults.portal = True  # what is here needs no hub
    assert main([*argv[:2], *argv[5:], "--max-tokens", "2", "--quiet"]) == 0
    assert main(["generate", *argv[5:], "--max-tokens", "2", "--quiet"]) == 0
    assert capsys.readouterr().err.startswith("cerebrum-12.25b:4bit, the last one used")


@slow
def test_from_nothing_to_a_conversation_at_a_terminal(hub: Hub, tmp_path: Path) -> None:
    hub.faults.pace = 2_000_000
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env = clean | {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "TERM": "xterm"}
    env |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mlx_cerebrum", "chat", "--no-history", "--max-tokens", "2"]
    with Program(command, env, columns=110) as program:
        program.until("owner/name [1]:")
        program.send("\r")
        text = program.until("Go on? [Y/n]")
        assert "cerebrum-12.25b: 8 bits a weight (as good as 16 bits" in text
        program.send("\r")
        program.until(lambda text: "fetching" in text and "MB/s" in text)
        text = program.until("/help lists the commands")
        assert "cerebrum-12.25b:8bit is on the shelf: 1.4 MB, every byte verified" in text
        program.until("\n12.25b>")
        program.send("/quit\r")
        assert program.end() == 0


def test_what_is_not_here_is_fetched_after_a_question(
    demo: Path,
    asked: dict[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["generate", "cerebrum-7b:8bit", "--prompt", "x"]) == 2
    said = "cerebrum-7b:8bit is not here yet; fetch it first: mlx-cerebrum pull cerebrum-7b:8bit"
    assert said in capsys.readouterr().err
    assert asked == {}
    argv = ["--model", "cerebrum-7b", "--bits", "8", "--yes", "--quiet"]
    assert main(["generate", *argv]) == 0
    assert asked == {"pull": ["cerebrum-7b:8bit", "--yes", "--quiet"], "generate": argv}
    at_terminal(monkeypatch)
    assert main(["generate", "owner/name"]) == 0  # it asks by itself
    assert asked["pull"] == ["owner/name"]
    asked.clear()
    for plain in (["demo"], ["--model", "demo"], ["owner/name", "--revision", "x"]):
        assert main(["generate", *plain]) == 0
    assert "pull" not in asked
    with monkeypatch.context() as patch:
        patch.setattr("mlx_cerebrum.weights.hub.has_demo", lambda: False)
        assert main(["generate", "demo"]) == 0
    assert asked["pull"] == ["demo"]
    monkeypatch.setattr(pull, "main", lambda argv: 130)
    assert main(["generate", "cerebrum-7b"]) == 130


def test_without_a_name_it_asks_once(
    demo: Path,
    asked: dict[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["generate", "--prompt", "x"]) == 2
    said = "which model? mlx-cerebrum generate NAME: cerebrum-12.25b, cerebrum-7b, demo"
    assert said in capsys.readouterr().err
    at_terminal(monkeypatch, "3")
    assert main(["generate", "--prompt", "x"]) == 0
    assert asked == {"generate": ["--prompt", "x", "--model", "demo"]}
    at_terminal(monkeypatch)
    assert main(["generate"]) == 0
    assert asked["pull"] == ["cerebrum-12.25b"]


def test_another_folder(
    asked: dict[str, list[str]], tmp_path: Path, checkpoint: MakeCheckpoint, capsys: Any
) -> None:
    (tmp_path / "other").mkdir()
    checkpoint("other/mine")
    for argv in (["--models", str(tmp_path / "other")], [f"--models={tmp_path / 'other'}"]):
        assert main([*argv, "list"]) == 0
        assert "mine:16bit" in capsys.readouterr().out
    assert main(["generate"]) == 0
    assert asked["generate"] == ["--model", "mine:16bit"]


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("run demo", "'run' is not a command; did you mean `mlx-cerebrum chat`?"),
        ("ls", "did you mean `mlx-cerebrum list`?"),
        ("download x", "did you mean `mlx-cerebrum pull`?"),
        ("genrate", "did you mean `mlx-cerebrum generate`?"),
        ("xyzzy", "'xyzzy' is not a command; there are chat, "),
        ("--models", "--models wants a folder"),
        ("chat demo --temperature 0.7", "unrecognized arguments: --temperature; did you mean --te"),
        ("chat demo --temperature=0.7", "did you mean --temp=0.7? (see mlx-cerebrum chat --help)"),
        ("chat demo -q 4", "did you mean --q-bits 4? (see mlx-cerebrum chat --help)"),
        ("chat demo --temp 5", "temp must be from 0 to 2, not 5"),
        (
            "chat demo --bits 4",
            "--bits is for names on the shelf; the demo is packed already: drop it",
        ),
        ("chat demo --model x", "demo and --model x: name one model"),
        ("convert --model x", "did you mean --hf-path x? (see mlx-cerebrum convert --help)"),
        ("convert -q 4 --mlx-path x", "-q takes no number; did you mean -q --q-bits 4?"),
        ("pull cerebrum-7b --q-bits 4", "did you mean --bits 4? (see mlx-cerebrum pull --help)"),
        ("verify --jsn x", "did you mean --json? (see mlx-cerebrum verify --help)"),
        ("generate cerebrum-7b:8bit --bits 4 --yes", "say different things; drop one"),
    ],
)
def test_what_people_type_by_mistake(
    typed: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    try:
        code = main(typed.split())
    except SystemExit as ended:
        code = int(ended.code or 0)
    err = capsys.readouterr().err
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err


def test_help_names_what_is_typed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in COMMANDS)
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        out = capsys.readouterr().out
        assert out.startswith(f"usage: mlx-cerebrum {command} ")
        assert "python -m" not in out
