"""Stopping a conversion: killed, interrupted or out of disk, it goes on where it was."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeCheckpoint
from safetensors.numpy import load_file, save_file

from convert import copying, writer
from convert.__main__ import main
from convert.destination import JOURNAL
from convert.integrity import Bytes, ReadError
from convert.verify import verify
from convert.writer import Writer

ROOT = Path(__file__).parents[2]

# Runs the conversion in argv[3:] and kills it, for good, at the argv[2]-th call of argv[1].
KILLED = """
import importlib, os, signal, sys
where, count, argv = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
from convert.__main__ import main
from convert import writer
writer.MAX_SHARD_BYTES = 120_000
room, _, name = where.rpartition(".")
try:
    owner = importlib.import_module(room)
except ModuleNotFoundError:
    module, _, kind = room.rpartition(".")
    owner = getattr(importlib.import_module(module), kind)
original = getattr(owner, name)
calls = 0
def killing(*args, **kwargs):
    global calls
    calls += 1
    if calls == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
setattr(owner, name, killing)
sys.exit(main(argv))
"""


@pytest.fixture(autouse=True)
def several_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "MAX_SHARD_BYTES", 120_000)


@pytest.fixture
def puts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of every piece that is written from here on."""
    sizes: list[int] = []
    put = Writer.put

    def counting(self: Writer, data: Bytes) -> None:
        sizes.append(data.nbytes)
        put(self, data)

    monkeypatch.setattr(Writer, "put", counting)
    return sizes


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def there(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


PHASES = [
    ("convert.writer.Writer._start", 1),  # before the first shard
    ("convert.writer.Writer.put", 2),
    ("convert.writer.Writer.put", 40),
    ("convert.destination.Journal.add", 7),  # its bytes are there, the journal does not say so
    ("convert.writer.Writer._finish_shard", 2),  # whole, not yet synced
    ("convert.writer.Writer._start", 3),  # between two shards
    ("convert.pipeline.write_json", 1),  # all weights, no index
    ("convert.pipeline.card", 1),  # index, no config
    ("convert.destination._sync", 1),  # all of it, not renamed
    ("pathlib.Path.unlink", 1),  # renamed, the journal still in it
]


@pytest.mark.parametrize(("where", "count"), PHASES, ids=[f"{w[8:]}-{c}" for w, c in PHASES])
@pytest.mark.one_in(8)
def test_killed_at_any_moment_it_resumes(
    checkpoint: MakeCheckpoint, tmp_path: Path, where: str, count: int, puts: list[int]
) -> None:
    source = checkpoint(shards=2)
    flags = ["--hf-path", str(source), "-q", "--q-group-size", "32", "--q-bits", "8", "--quiet"]
    argv = [*flags, "--mlx-path", str(tmp_path / "x")]
    killed = subprocess.run([sys.executable, "-c", KILLED, where, str(count), *argv], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    left = there(tmp_path)
    assert left in (["source"], [".x.partial", "source"], ["source", "x"])
    if "x" in left:  # whole: nothing but the journal's removal was missing
        assert verify(tmp_path / "x")["problems"] == []
    assert main(argv) == 0
    resumed = sum(puts)
    assert there(tmp_path) == ["source", "x"]
    puts.clear()
    (tmp_path / "again").mkdir()
    assert main([*flags, "--mlx-path", str(tmp_path / "again" / "x")]) == 0
    if where.startswith(("convert.pipeline", "convert.destination._sync", "pathlib")):
        assert resumed == 0  # all of it had been journalled
    elif count > 2:
        assert 0 < resumed < sum(puts)
    assert contents(tmp_path / "x") == contents(tmp_path / "again" / "x")


def stop_after(monkeypatch: pytest.MonkeyPatch, pieces: int, error: BaseException) -> None:
    put = Writer.put
    calls = 0

    def failing(self: Writer, data: Bytes) -> None:
        nonlocal calls
        calls += 1
        if calls > pieces:
            raise error
        put(self, data)

    monkeypatch.setattr(Writer, "put", failing)


def test_interrupted_it_keeps_what_it_has_and_says_so(
    checkpoint: MakeCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["--hf-path", str(checkpoint()), "--mlx-path", str(tmp_path / "x"), "--dtype", "float16"]
    with monkeypatch.context() as patch:
        stop_after(patch, 50, KeyboardInterrupt())
        assert main(argv) == 130
    assert "same command again" in capsys.readouterr().err
    assert there(tmp_path) == [".x.partial", "source"]
    assert main([*argv, "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert 40 <= written["resumed_modules"] <= 50
    assert verify(tmp_path / "x")["problems"] == []


def test_damage_to_a_partial_is_noticed_and_mended(
    checkpoint: MakeCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["--hf-path", str(checkpoint()), "--mlx-path", str(tmp_path / "x"), "--dtype", "float16"]
    with monkeypatch.context() as patch:
        stop_after(patch, 70, KeyboardInterrupt())
        main(argv)
    partial = tmp_path / ".x.partial"
    second = sorted(partial.glob("*.safetensors"))[1]
    data = bytearray(second.read_bytes())
    data[-1000] ^= 1
    second.write_bytes(data)
    with (partial / JOURNAL).open("ab") as journal:
        journal.write(b'{"key": "model.norm", "sha')  # a line cut short
    capsys.readouterr()
    assert main([*argv, "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert 20 < written["resumed_modules"] < 65  # the first shard, and not all of the second
    assert main([*argv[:3], str(tmp_path / "y"), *argv[4:], "--quiet"]) == 0
    for file in (tmp_path / "y").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "x" / file.name).read_bytes()


def test_another_conversion_does_not_resume(
    checkpoint: MakeCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = checkpoint()
    argv = ["--hf-path", str(source), "--mlx-path", str(tmp_path / "x"), "--json"]
    with monkeypatch.context() as patch:
        stop_after(patch, 50, KeyboardInterrupt())
        main([*argv, "--dtype", "float16"])
    capsys.readouterr()
    assert main([*argv, "--dtype", "bfloat16"]) == 0
    assert json.loads(capsys.readouterr().out)["resumed_modules"] == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 50, KeyboardInterrupt())
        main([*argv[:3], str(tmp_path / "z"), "--json", "--dtype", "float16"])
    os.utime(next(source.glob("*.safetensors")))  # another source, as far as one can know
    capsys.readouterr()
    assert main([*argv[:3], str(tmp_path / "z"), "--json", "--dtype", "float16"]) == 0
    assert json.loads(capsys.readouterr().out)["resumed_modules"] == 0


def test_two_at_once_are_refused(
    checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    partial = tmp_path / ".x.partial"
    partial.mkdir()
    (partial / "mine").write_text("keep")
    (partial / JOURNAL).write_text('{"fingerprint": "other"}\n')
    with (partial / JOURNAL).open("ab") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        code = main(["--hf-path", str(checkpoint()), "--mlx-path", str(tmp_path / "x")])
    assert code == 2
    assert "another conversion" in capsys.readouterr().err
    assert (partial / "mine").read_text() == "keep"


def test_leftovers_of_another_conversion_are_replaced(
    checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    partial = tmp_path / ".x.partial"
    partial.mkdir()
    (partial / "model-00009-of-00009.safetensors").write_text("stale")
    (partial / JOURNAL).write_text('{"fingerprint": "other"}\n{"key": "lm_head", "sha256": "0"}\n')
    argv = ["--hf-path", str(checkpoint()), "--mlx-path", str(tmp_path / "x")]
    assert main(argv) == 0
    assert "of a stopped conversion, of something else, were given up" in capsys.readouterr().err
    assert not list((tmp_path / "x").glob("*00009*"))


def test_what_is_not_ours_is_left_alone(
    checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(checkpoint())
    thesis = tmp_path / ".x.partial" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / ".y.partial").symlink_to(tmp_path / "folder")
    shutil.copytree(source, tmp_path / ".z.partial")
    for name, flags in (("x", []), ("y", []), ("z", ["--hf-path", str(tmp_path / ".z.partial")])):
        argv = ["--hf-path", source, "--mlx-path", str(tmp_path / name), *flags]
        assert main(argv) == 2
        assert "in the way" in capsys.readouterr().err
    assert thesis.read_text() == "precious"
    assert there(tmp_path / "folder") == []
    assert there(tmp_path / ".z.partial") == there(Path(source))


def test_a_source_of_the_same_size_and_time_is_another(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = checkpoint("one"), checkpoint("other", rms_norm_eps=1e-6)
    (other / "model.safetensors").write_bytes(
        (one / "model.safetensors").read_bytes()[:-64] + bytes(64)
    )
    for path in (one, other):
        os.utime(path / "model.safetensors", ns=(10**18, 10**18))
    target = ["--mlx-path", str(tmp_path / "x"), "--dtype", "float16", "--quiet"]
    with monkeypatch.context() as patch:
        stop_after(patch, 50, KeyboardInterrupt())
        assert main(["--hf-path", str(one), *target]) == 130
    assert main(["--hf-path", str(other), *target]) == 0
    target[1] = str(tmp_path / "y")
    assert main(["--hf-path", str(other), *target]) == 0
    for file in (tmp_path / "y").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "x" / file.name).read_bytes()


def test_a_source_that_changes_meanwhile_is_refused(
    checkpoint: MakeCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = checkpoint(shards=3)
    last = sorted(source.glob("*.safetensors"))[-1]
    start = Writer._start

    def overwriting(self: Writer) -> None:
        data = last.read_bytes()
        last.write_bytes(data[:-4] + bytes(4))
        start(self)

    monkeypatch.setattr(Writer, "_start", overwriting)
    argv = ["--hf-path", str(source), "--mlx-path", str(tmp_path / "x"), "--dtype", "float16"]
    assert main(argv) == 2
    assert "changed while it was read" in capsys.readouterr().err
    assert there(tmp_path) == ["source"]


def test_a_read_error_keeps_what_there_is(
    checkpoint: MakeCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["--hf-path", str(checkpoint()), "--mlx-path", str(tmp_path / "x"), "--dtype", "float16"]
    with monkeypatch.context() as patch:
        stop_after(patch, 50, ReadError("disk: Input/output error"))
        assert main(argv) == 2
    assert there(tmp_path) == [".x.partial", "source"]
    capsys.readouterr()
    assert main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["resumed_modules"] > 40


def test_allowing_nonfinite_is_not_forgotten_by_a_resume(
    checkpoint: MakeCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = checkpoint()
    weights = load_file(source / "model.safetensors")
    name = "lm_head.weight"  # the first that is written
    weights[name][0, 0] = 1e30
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    argv = ["--hf-path", str(source), "--mlx-path", str(tmp_path / "x"), "--dtype", "float16"]
    with monkeypatch.context() as patch:
        stop_after(patch, 50, KeyboardInterrupt())
        assert main([*argv, "--allow-nonfinite"]) == 130
    capsys.readouterr()
    assert main(argv) == 2
    assert f"{name} has values too large for float16" in capsys.readouterr().err
    assert main([*argv, "--allow-nonfinite", "--json"]) == 0
    assert f"{name} has 1 values that are NaN" in json.loads(capsys.readouterr().out)["notes"][0]


@pytest.mark.parametrize("dtype", [[], ["--dtype", "float16"]], ids=["copied", "cast"])
def test_a_disk_that_fills_up(
    checkpoint: MakeCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    dtype: list[str],
) -> None:
    source = checkpoint(shards=3)
    argv = ["--hf-path", str(source), "--mlx-path", str(tmp_path / "x"), *dtype]
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        stop_after(patch, 50, full)
        copies = 0
        copy = copying.copy_file

        def failing(*args: Any) -> None:
            nonlocal copies
            copies += 1
            if copies == 3:
                raise full
            copy(*args)

        patch.setattr(copying, "copy_file", failing)
        assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: the disk is full: ")
    assert err.count("\n") == 1
    assert there(tmp_path) == [".x.partial", "source"]
    assert main([*argv, "--quiet"]) == 0
    assert verify(tmp_path / "x")["problems"] == []


def test_copies_of_an_earlier_run_are_checked(
    checkpoint: MakeCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = checkpoint(shards=3)
    argv = ["--hf-path", str(source), "--mlx-path", str(tmp_path / "x"), "--quiet"]
    copied: list[str] = []
    copy = copying.copy_file

    def stopping(path: Path, target: Path, *rest: Any) -> None:
        if len(copied) == 2:
            raise KeyboardInterrupt
        copied.append(path.name)
        copy(path, target, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(copying, "copy_file", stopping)
        assert main(argv) == 130
    first = tmp_path / ".x.partial" / "model-00001-of-00003.safetensors"
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    copied.clear()

    def counting(path: Path, target: Path, *rest: Any) -> None:
        copied.append(path.name)
        copy(path, target, *rest)

    monkeypatch.setattr(copying, "copy_file", counting)
    assert main(argv) == 0
    assert sorted(copied) == [f"model-0000{n}-of-00003.safetensors" for n in (1, 3)]
    assert verify(tmp_path / "x")["problems"] == []
    for file in source.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "x" / file.name).read_bytes()


@pytest.mark.parametrize("fails", ["EXDEV", "ENOSYS", None])
def test_copying_by_every_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str | None
) -> None:
    (tmp_path / "a").write_bytes(os.urandom(100_000))
    if fails is None:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    else:

        def refuse(*_: Any) -> int:
            raise OSError(getattr(errno, fails), "no")

        monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    monkeypatch.setattr(copying, "_clone", lambda *_: False)
    seen: list[int] = []
    copying.copy_file(tmp_path / "a", tmp_path / "b", seen.append)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
    assert sum(seen) == 100_000


@pytest.mark.long
def test_pieces_do_not_change_the_bytes(
    checkpoint: MakeCheckpoint,
    plan_file: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from convert import source as source_module

    source, plan = checkpoint(), plan_file(scale="{scale: 0.5}")
    for name, options in (("q", ["-q", "--q-group-size", "32"]), ("d", ["--dtype", "float16"])):
        for piece in (4_000_000, 1000, 1):
            monkeypatch.setattr(source_module, "PIECE", piece)
            out = tmp_path / f"{name}{piece}"
            argv = ["--hf-path", source, "--plan", plan, "--layout", "unrolled", *options]
            assert main([*map(str, argv), "--mlx-path", str(out), "--quiet"]) == 0
        whole = contents(tmp_path / f"{name}4000000")
        for piece in (1000, 1):
            again = contents(tmp_path / f"{name}{piece}")
            assert {n: b for n, b in again.items() if n.endswith("safetensors")} == {
                n: b for n, b in whole.items() if n.endswith("safetensors")
            }
