"""Names, folders, and the commands that show and remove what is there."""

import json
import os
import time
from pathlib import Path

import pytest
from conftest import MakeCheckpoint

from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.shelf import listing, removing, showing
from mlx_cerebrum.shelf.entries import PULLS, STATE, entries, find, require
from mlx_cerebrum.shelf.lock import alone
from mlx_cerebrum.shelf.places import folder, folder_name, name_of, short_name, split
from mlx_cerebrum.weights import hub


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLX_CEREBRUM_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


def put(shelf: Path, made: Path, name: str, used: float = 0.0) -> Path:
    made.rename(shelf / name)
    os.utime(shelf / name / "config.json", (used, used))
    return shelf / name


@pytest.mark.parametrize(
    ("environment", "platform", "where"),
    [
        ({"HOME": "/h"}, "linux", "/h/.local/share/mlx-cerebrum/models"),
        ({"HOME": "/h", "XDG_DATA_HOME": "/d"}, "linux", "/d/mlx-cerebrum/models"),
        ({"HOME": "/h"}, "darwin", "/h/Library/Application Support/mlx-cerebrum/models"),
        ({"HOME": "/h", "MLX_CEREBRUM_MODELS": "/m"}, "darwin", "/m"),
    ],
)
def test_where_models_are_kept(environment: dict[str, str], platform: str, where: str) -> None:
    assert folder(environment, platform) == Path(where)


def test_the_suite_has_no_shelf() -> None:
    """Whoever runs it may have `demo` on theirs, which is then what every test would open."""
    assert not folder().exists()
    assert entries() == []


def test_names_and_folders() -> None:
    assert split("cerebrum-7b:8bit") == split("cerebrum-7b:8") == ("cerebrum-7b", 8)
    assert split("cerebrum-7b") == ("cerebrum-7b", None)
    assert short_name("Cerebrum-12.25B") == "cerebrum-12.25b"
    assert short_name("Joseph717171/Cerebrum-1.0-12.25B") == "cerebrum-12.25b"
    assert short_name("AetherResearch/Cerebrum-1.0-7b") == "cerebrum-7b"
    assert short_name("cerebrum") is None
    for name in ("cerebrum-12.25b", "owner/some-name"):
        assert name_of(folder_name(name, 4)) == (name, 4)
    assert name_of("mine") == ("mine", None)


def test_the_last_used_of_several(shelf: Path, checkpoint: MakeCheckpoint) -> None:
    put(shelf, checkpoint("a"), "cerebrum-7b-4bit", 2e9)
    put(shelf, checkpoint("b"), "cerebrum-7b-8bit", 1e9)
    put(shelf, checkpoint("c"), "mine", 1.5e9)
    (shelf / "half").mkdir()
    assert [e.called for e in entries()] == ["cerebrum-7b:4bit", "mine:16bit", "cerebrum-7b:8bit"]
    assert require("cerebrum-7b").bits == 4
    assert require("CEREBRUM-7B:8").bits == 8
    assert require("cerebrum-7b-8bit").bits == 8
    assert find("cerebrum-7b:16bit") is None
    require("cerebrum-7b:8").mark_used()
    os.utime(shelf / "cerebrum-7b-8bit" / ".used", (3e9, 3e9))
    assert require("cerebrum-7b").bits == 8
    with pytest.raises(CheckpointError, match="not on the shelf, where there is cerebrum-7b:8bit"):
        require("nothing")


def test_every_command_takes_these_names(shelf: Path, checkpoint: MakeCheckpoint) -> None:
    seven = put(shelf, checkpoint("a"), "cerebrum-7b-4bit", 1e9)
    other = put(shelf, checkpoint("b"), "owner--name-4bit", 1e9)
    assert hub.resolve("cerebrum-7b") == seven
    assert hub.resolve("owner/name") == hub.resolve("owner/name:4bit") == other
    assert time.time() - require("cerebrum-7b").used < 60
    for name, says in (
        ("cerebrum-12.25b", "get it with: mlx-cerebrum pull cerebrum-12.25b"),
        ("cerebrum-7b:8bit", "where there is .*cerebrum-7b:4bit"),
        ("cerebrum", "neither on the shelf .* nor a hub id"),
    ):
        with pytest.raises(CheckpointError, match=says):
            hub.resolve(name)
    with pytest.raises(CheckpointError, match="--revision is for hub ids"):
        hub.resolve("cerebrum-7b", "main")


def test_a_hub_id_as_stored_is_the_hubs(
    shelf: Path, checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(shelf, checkpoint("a"), "owner--name-4bit", 1e9)
    monkeypatch.setattr(hub, "download", lambda *given: Path("from the hub"))
    assert hub.resolve("owner/name", as_stored=True) == Path("from the hub")
    assert hub.resolve("owner/name", "main") == Path("from the hub")


def test_list_and_show(
    shelf: Path, checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    assert listing.main([]) == 0
    assert "no models yet; the first: mlx-cerebrum pull" in capsys.readouterr().out
    made = put(shelf, checkpoint("a", sliding_window=None), "cerebrum-7b-16bit", time.time() - 7300)
    damaged = put(shelf, checkpoint("b"), "broken", 1e9)
    (damaged / "config.json").write_text("{")
    begun = shelf / PULLS / "x"
    begun.mkdir(parents=True)
    (begun / STATE).write_text(json.dumps({"name": "x/y", "bits": 8, "bytes": 5, "repo": "x/y"}))
    assert listing.main([]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "name size bits window made of last used"
    assert "cerebrum-7b:16bit 1.3 MB 16 none - 2 h ago" in lines
    assert any(line.startswith("broken") and "can't be read" in line for line in lines)
    assert lines[-1].startswith("x/y:8bit is unfinished; to go on: mlx-cerebrum pull x/y")
    assert listing.main(["--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {model["name"] for model in said["models"]} == {"cerebrum-7b:16bit", "broken:16bit"}
    assert said["unfinished"] == [{"name": "x/y", "bits": 8, "path": str(begun)}]
    assert showing.main(["cerebrum-7b"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"folder {made}" in out
    assert "8 blocks in 8 positions window none; conversations up to 512 tokens" in out
    assert showing.main(["nothing"]) == 2


def test_the_hubs_cache_is_listed(
    shelf: Path, checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot = tmp_path / "cache/models--owner--name/snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    checkpoint("a").rename(snapshot)
    assert listing.main([]) == 0
    out = capsys.readouterr().out
    assert "in the hub's cache" in out
    assert "owner/name" in out
    assert removing.main(["owner/name"]) == 2
    assert "hf cache rm" in capsys.readouterr().err


def test_rm(shelf: Path, checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]) -> None:
    four = put(shelf, checkpoint("a"), "cerebrum-7b-4bit")
    eight = put(shelf, checkpoint("b"), "cerebrum-7b-8bit")
    assert removing.main(["cerebrum-7b"]) == 2
    assert "say which: cerebrum-7b:" in capsys.readouterr().err
    shared = shelf / "cerebrum-12.25b-8bit"
    shared.mkdir()
    (shared / "config.json").write_text("{}")
    os.link(eight / "model.safetensors", shared / "model.safetensors")
    assert removing.main(["cerebrum-7b:8bit"]) == 0
    assert "its weights stay, another model has them" in capsys.readouterr().out
    assert not eight.exists()
    assert (shared / "model.safetensors").exists()
    assert removing.main(["cerebrum-7b", "cerebrum-12.25b"]) == 0
    assert not four.exists()
    assert list(shelf.iterdir()) == []
    assert removing.main(["cerebrum-7b"]) == 2
    assert "not on the shelf, where there is nothing yet" in capsys.readouterr().err


def test_rm_of_what_is_being_made(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = shelf / PULLS / "owner--x"
    begun.mkdir(parents=True)
    (begun / STATE).write_text(json.dumps({"name": "owner/x", "bits": 4}))
    half = shelf / ".owner--x-4bit.partial"
    half.mkdir()
    with alone("owner--x", None):
        assert removing.main(["owner/x"]) == 2
    assert "is being made by another run" in capsys.readouterr().err
    assert removing.main(["owner/x"]) == 0
    assert not begun.exists()
    assert not half.exists()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-5, "now"), (30, "30 s ago"), (7200, "2 h ago"), (86400 * 400, "1 years ago")],
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert listing.ago(time.time() - seconds) == words


def test_a_shelf_that_can_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_CEREBRUM_MODELS", str(tmp_path / "file" / "models"))
    with pytest.raises(CheckpointError, match="choose another folder"), alone("x", None):
        pass
