"""Conversions that others get in the way of: another converter, another user, a changing source."""

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from conftest import MakeCheckpoint, slow
from safetensors.numpy import load_file, save_file

from convert import copying, destination, pipeline, writer
from convert.__main__ import main
from convert.destination import JOURNAL
from convert.gguf_export import new_file
from convert.layout import Options
from convert.pipeline import convert
from convert.verify import verify
from mlx_cerebrum.errors import CerebrumError, CheckpointError
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights.opening import open_checkpoint

ROOT = Path(__file__).parent.parent
NOBODY = 65534


def there(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.glob("*.safetensors")}


# Two at once.


@pytest.mark.parametrize("dtypes", [("float16",) * 3, ("float16", "bfloat16", "float32")])
@slow
def test_several_converters_into_one_destination(
    checkpoint: MakeCheckpoint, tmp_path: Path, dtypes: tuple[str, ...]
) -> None:
    source, out = checkpoint(shards=2), tmp_path / "out"
    argv = [sys.executable, "-m", "convert", "--quiet"]
    argv += ["--hf-path", str(source), "--mlx-path", str(out), "--dtype"]
    runs = [
        subprocess.Popen([*argv, dtype], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for dtype in dtypes
    ]
    ends = [(run.communicate(timeout=120)[1], run.returncode) for run in runs]
    assert sorted(code for _, code in ends) == [0, 2, 2]
    for said, code in ends:
        if code:
            assert said.count("\n") == 1
            assert "another conversion" in said or "exists already" in said
    assert there(tmp_path) == ["out", "source"]
    assert verify(out)["sound"]
    assert not (out / JOURNAL).exists()


def together(count: int, body: Callable[[], object]) -> list[str]:
    """Run `body` in threads that start at one moment; what each raised, or nothing."""
    barrier, said = threading.Barrier(count), list[str]()

    def run() -> None:
        barrier.wait()
        try:
            body()
        except CheckpointError as error:
            said.append(str(error))
        else:
            said.append("")

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(said) == count  # nothing else was raised
    return said


def test_the_race_for_a_directory_has_one_winner(tmp_path: Path) -> None:
    for number in range(60):
        out = tmp_path / f"x{number}"

        def write(out: Path = out) -> None:
            with destination.new_directory(out, "same", 10) as partial:
                (partial.path / "model.safetensors").write_bytes(b"whole")

        said = together(3, write)
        assert said.count("") == 1
        assert there(tmp_path) == [out.name]
        assert there(out) == ["model.safetensors"]
        (out / "model.safetensors").unlink()
        out.rmdir()


def test_the_race_for_a_file_has_one_winner(tmp_path: Path) -> None:
    for number in range(60):
        out = tmp_path / f"x{number}.gguf"

        def write(out: Path = out) -> None:
            with new_file(out, 10) as partial:
                partial.write_bytes(b"whole")

        said = together(3, write)
        assert said.count("") == 1
        assert there(tmp_path) == [out.name]
        assert out.read_bytes() == b"whole"
        out.unlink()


def test_a_file_that_comes_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"

    def write() -> None:
        with new_file(out, 10) as partial:
            partial.write_bytes(b"ours")
            out.write_bytes(b"theirs")

    with pytest.raises(CheckpointError, match="exists already"):
        write()
    assert out.read_bytes() == b"theirs"
    assert there(tmp_path) == ["x.gguf"]


# Ctrl-Z.

STOPPED = """
import sys, time
from convert.__main__ import main
from convert.writer import Writer
put, calls = Writer.put, 0
def slow(self, data):
    global calls
    calls += 1
    if calls == 20:
        print("half way", flush=True)
        time.sleep(0.5)
    put(self, data)
Writer.put = slow
sys.exit(main(sys.argv[1:]))
"""


@slow
def test_ctrl_z_and_fg(
    checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--hf-path", str(checkpoint(shards=2)), "--dtype", "float16", "--quiet"]
    here = [*argv, "--mlx-path", str(tmp_path / "out")]
    child = subprocess.Popen(
        [sys.executable, "-c", STOPPED, *here],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        process_group=0,  # a job of its own, as a shell makes it
        restore_signals=True,
    )
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == b"half way\n"
        os.kill(child.pid, signal.SIGTSTP)
        _, status = os.waitpid(child.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        assert main(here) == 2  # it is not over
        assert "another conversion" in capsys.readouterr().err
        assert there(tmp_path) == [".out.partial", "source"]
        os.kill(child.pid, signal.SIGCONT)
        assert child.wait(60) == 0
    finally:
        if child.poll() is None:
            os.kill(child.pid, signal.SIGCONT)
            child.kill()
        child.stdout.close()
    assert main([*argv, "--mlx-path", str(tmp_path / "again")]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "again")
    assert verify(tmp_path / "out")["sound"]


# A source that changes.


def kept_time(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def both(file: Path) -> None:
        times = file.stat()
        change(file)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))

    return both


def one_bit(file: Path) -> None:
    with file.open("r+b") as f:
        f.seek(-4, os.SEEK_END)
        f.write(b"\x01")


def another(file: Path) -> None:
    new = file.with_suffix(".new")
    new.write_bytes(file.read_bytes())
    new.rename(file)


CHANGES: dict[str, Callable[[Path], object]] = {
    "a bit": one_bit,
    "a bit, its time set back": kept_time(one_bit),
    "its time": lambda file: os.utime(file, ns=(10**18, 10**18)),
    "longer": lambda file: os.truncate(file, file.stat().st_size + 8),
    "shorter": lambda file: os.truncate(file, file.stat().st_size - 8),
    "replaced": another,
    "gone": lambda file: file.unlink(),
}
WAYS: dict[str, Options | None] = {
    "copied": Options(),
    "copied, unverified": Options(verify=False),
    "cast": Options(dtype="float16"),
    "cast, unverified": Options(dtype="float16", verify=False),
    "GGUF": None,
}


def attempt(
    source: Path, out: Path, options: Options | None, change: Callable[[Path], object]
) -> str:
    """What a conversion ends in when the source's last file changes while it is read."""
    from convert.gguf_export import export

    file = source / "model-00002-of-00002.safetensors"
    opened, copy = open_checkpoint(source), copying.copy_file
    changed = threading.Lock()  # files are copied by several threads; the first one changes it

    def progress(*_: Any) -> None:
        if changed.acquire(blocking=False):
            change(file)

    def copied(*args: Any) -> None:
        copy(*args)
        progress()

    def run() -> None:
        if options is None:
            export(opened, out, kind="F16", progress=progress)
        else:
            convert(opened, out, options, progress=progress)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "copy_file", copied)
        with pytest.raises(CerebrumError) as caught:
            run()
    assert changed.locked()
    return str(caught.value)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
@pytest.mark.one_in(4)
def test_a_source_that_changes(
    checkpoint: MakeCheckpoint,
    tmp_path: Path,
    options: Options | None,
    change: Callable[[Path], object],
) -> None:
    source = checkpoint(shards=2)
    line = attempt(source, tmp_path / "out.gguf", options, change)
    assert "model-00002-of-00002.safetensors" in line
    assert len(line.splitlines()) == 1
    assert there(tmp_path) == ["source"]


@pytest.mark.parametrize("change", ["longer", "shorter", "gone", "laid out anew"])
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_a_source_that_changed_since_it_was_opened(
    checkpoint: MakeCheckpoint, tmp_path: Path, options: Options | None, change: str
) -> None:
    """While it was calibrated, say: the headers that are known are another file's."""
    from convert.gguf_export import export

    source = checkpoint(shards=2)
    opened = open_checkpoint(source)
    file = source / "model-00002-of-00002.safetensors"
    if change == "laid out anew":
        tensors = load_file(file)
        save_file({**tensors, "a": tensors["model.norm.weight"]}, file, {"format": "pt"})
    else:
        CHANGES[change](file)
    out = tmp_path / "out.gguf"

    def run() -> None:
        if options is None:
            export(opened, out)
        else:
            convert(opened, out, options)

    with pytest.raises(CerebrumError, match=file.name.replace(".", r"\.")):
        run()
    assert there(tmp_path) == ["source"]


def test_a_tokenizer_that_breaks_meanwhile(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint()
    opened = open_checkpoint(source)
    save = Tokenizer.save

    def breaking(self: Tokenizer, directory: Path) -> list[Path]:
        (source / "tokenizer.json").write_text("{}")
        return save(self, directory)

    monkeypatch.setattr(Tokenizer, "save", breaking)
    with pytest.raises(CerebrumError, match="tokenizer"):
        convert(opened, tmp_path / "out")
    assert there(tmp_path) == ["source"]


# Other people's files.


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's rights, where this is root. The environment may be root's alone to read."""
    if os.geteuid() != 0:
        yield
        return
    mlx = version("mlx")
    groups, group = os.getgroups(), os.getegid()
    try:
        os.setgroups([])
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
    except OSError:
        pytest.skip("root here can't become another user")
    try:
        with patch("convert.destination.version", {"mlx": mlx}.__getitem__):
            yield
    finally:
        os.seteuid(0)
        os.setegid(group)
        os.setgroups(groups)


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A directory that anybody may write to; pytest's own are their maker's only."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o777)
        yield path


@pytest.fixture
def shared(checkpoint: MakeCheckpoint, open_to_all: Path) -> Path:
    """A source that anybody may read, in a directory that anybody may write to."""
    source = checkpoint(shards=2)
    # What Python imports and looks up on the way may be readable for its owner only.
    assert main(["--hf-path", str(source), "--mlx-path", f"{source}-out", "--quiet"]) == 0
    assert main(["verify", f"{source}-out", "--quiet"]) == 0
    source = source.rename(open_to_all / "source")
    for file in source.iterdir():
        file.chmod(0o644)
    source.chmod(0o755)
    return source


def refused(capsys: pytest.CaptureFixture[str], source: Path, out: Path, *says: str) -> None:
    capsys.readouterr()
    with as_nobody():
        code = main(["--hf-path", str(source), "--mlx-path", str(out), "--quiet"])
    err = capsys.readouterr().err
    assert code == 2, err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for text in says:
        assert text in err


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model-00002-of-00002.safetensors", "."]
)
def test_a_source_that_is_not_ours_to_read(
    shared: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    mode = (shared / name).stat().st_mode
    (shared / name).chmod(0)
    refused(capsys, shared, shared.parent / "out", str(shared), "ermission denied")
    with as_nobody():  # and verifying says it in a line as well
        assert main(["verify", str(shared), "--quiet"]) in (1, 2)
    assert "ermission denied" in "".join(capsys.readouterr())
    (shared / name).chmod(mode)
    assert there(shared.parent) == ["source"]


def test_a_place_that_is_not_ours_to_write(
    shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = shared.parent / "place"
    place.mkdir()
    place.chmod(0o555)
    refused(capsys, shared, place / "out", str(place), "ermission denied", "another destination")
    assert there(place) == []


@pytest.mark.parametrize("mode", [0o755, 0o700])
def test_what_another_user_is_writing(
    shared: Path, capsys: pytest.CaptureFixture[str], mode: int
) -> None:
    partial = shared.parent / ".out.partial"
    partial.mkdir()
    (partial / JOURNAL).write_text('{"fingerprint": "theirs"}\n')
    (partial / "model-00001-of-00001.safetensors").write_bytes(b"theirs")
    for file in partial.iterdir():
        file.chmod(mode & 0o644)
    if os.geteuid() != 0:
        mode &= 0o555
    partial.chmod(mode if os.geteuid() == 0 else 0o500)
    if os.geteuid() != 0:
        (partial / JOURNAL).chmod(0o400)
    refused(capsys, shared, shared.parent / "out", str(partial), "another destination")
    partial.chmod(0o700)
    assert (partial / "model-00001-of-00001.safetensors").read_bytes() == b"theirs"


def test_what_is_ours_alone_is_written_readable(
    shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shared.parent / "out"
    with as_nobody():
        assert main(["--hf-path", str(shared), "--mlx-path", str(out), "--quiet"]) == 0
    assert verify(out)["sound"]
    assert capsys.readouterr().err == ""


# A disk that fills up at the last moments, when the weights are there.


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (destination.Journal, "add"),
        (pipeline, "write_json"),
        (pipeline, "card"),
        (Tokenizer, "save"),
        (destination, "_sync"),
    ],
)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.one_in(4)
def test_a_disk_that_fails_late(
    checkpoint: MakeCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    owner: Any,
    name: str,
    code: int,
) -> None:
    argv = ["--hf-path", str(checkpoint()), "--mlx-path", str(tmp_path / "out"), "--quiet"]
    argv += ["--dtype", "float16"]

    def failing(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert ("the disk is full" in err) == (code != errno.EIO)
    assert there(tmp_path) == [".out.partial", "source"]
    assert main(argv) == 0
    assert verify(tmp_path / "out")["sound"]
    assert there(tmp_path) == ["out", "source"]


def test_a_disk_that_is_really_full(
    checkpoint: MakeCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mounted, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount")
    argv = ["--hf-path", str(checkpoint()), "--mlx-path", str(disk / "out"), "--quiet"]
    argv += ["--dtype", "float16"]
    put, rest = writer.Writer.put, disk / "rest"

    def filling(self: writer.Writer, data: Any) -> None:
        if not rest.exists() and self.done > 20:  # somebody else takes what is left
            with pytest.raises(OSError, match="No space"):
                rest.write_bytes(bytes(9_000_000))
        put(self, data)

    monkeypatch.setattr(destination, "_SLACK", 0)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(writer.Writer, "put", filling)
            assert main(argv) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: the disk is full: ")
        assert err.count("\n") == 1
        rest.unlink()
        assert main([*argv[:-3], *argv[-2:], "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["resumed_modules"] >= 20
        assert verify(disk / "out")["sound"]
        assert there(disk) == ["out"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
