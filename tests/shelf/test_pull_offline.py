"""A pull where the hub can't be asked: from its cache on this machine, if that has all of it."""

import shutil
from pathlib import Path

import pytest
import shelf_room
from conftest import config_of, slow
from hub_stand_in import REPO, SHARDS, Hub
from test_pull import run

from convert.verify import verify
from mlx_cerebrum.shelf.entries import find

repository, hub = shelf_room.repository, shelf_room.hub  # fixtures
NAME = "cerebrum-12.25b"


@pytest.fixture
def snapshot(hub: Hub, tmp_path: Path) -> Path:
    """The repository in the hub's cache, as its own client would have put it there."""
    folder = tmp_path / "cache" / f"models--{REPO.replace('/', '--')}"
    return shelf_room.into_cache(hub, folder)


@pytest.fixture(params=["HF_HUB_OFFLINE", "no network"])
def cut_off(
    request: pytest.FixtureRequest, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> bool:
    """Whether the user wants it so."""
    if request.param == "HF_HUB_OFFLINE":
        monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True)
        return True
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    return False


@slow
def test_what_the_cache_has_whole_is_made_without_the_hub(
    hub: Hub, snapshot: Path, cut_off: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(NAME) == 0
    err = capsys.readouterr().err
    assert f"  fetch   nothing: {REPO} ({hub.commit[:7]}) lies here" in err
    assert ("is taken as the hub's cache has it" in err) != cut_off
    assert hub.sent.total() == 0
    made = find(NAME)
    assert made is not None
    assert made.provenance["revision"] == hub.commit
    assert verify(made.path)["sound"]
    assert len(config_of(made.path)["layer_map"]) == 56
    assert all((snapshot / name).exists() for name in SHARDS)  # the cache's own


@pytest.mark.parametrize("revision", ["main", "commit"])
@slow
def test_a_revision_of_the_cache(hub: Hub, snapshot: Path, cut_off: bool, revision: str) -> None:
    asked = hub.commit if revision == "commit" else revision
    assert run(NAME, "--quiet", "--revision", asked) == 0


@pytest.mark.parametrize(
    ("gone", "says"),
    [
        (SHARDS[1], f"its {SHARDS[1]} is not in the hub's cache"),
        ("config.json", "its config.json is not in"),
        ("tokenizer", "its tokenizer is not in"),
        ("all", "it is not in the hub's cache"),
        ("revision", "it is not in the hub's cache at 'v2'"),
    ],
)
def test_what_lacks_is_named(
    snapshot: Path, cut_off: bool, capsys: pytest.CaptureFixture[str], gone: str, says: str
) -> None:
    if gone == "all":
        shutil.rmtree(snapshot)
    elif gone != "revision":
        for file in snapshot.glob(gone if "." in gone else f"{gone}*"):
            file.unlink()
    more = ["--revision", "v2"] if gone == "revision" else []
    assert run(NAME, "--quiet", *more) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    if cut_off:
        assert f"{REPO}: {says}" in err
        assert "HF_HUB_OFFLINE is set; unset it" in err
    else:
        assert "the hub can't be reached" in err


@pytest.mark.parametrize("name", [SHARDS[1], "config.json"])
def test_what_is_damaged_is_not_believed(
    snapshot: Path, cut_off: bool, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    blob = (snapshot / name).resolve()
    data = bytearray(blob.read_bytes())
    data[-2] ^= 1
    blob.write_bytes(data)
    assert run(NAME, "--quiet") == 2
    *_, err = capsys.readouterr().err.splitlines()
    assert err.startswith(f"error: {snapshot / name} is damaged: its hash is not the hub's")
    assert blob.exists()


def test_a_cache_without_links_has_no_hashes(snapshot: Path, cut_off: bool) -> None:
    """As on a disk that knows none: sizes and headers are all there is to check."""
    for file in list(snapshot.iterdir()):
        file.resolve().replace(snapshot / "copy")
        (snapshot / "copy").replace(file)
    assert run(NAME, "--quiet") == 0
