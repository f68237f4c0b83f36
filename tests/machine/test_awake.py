"""caffeinate is started while there is work, and ends with the process; a stand-in notes how."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import slow

from mlx_cerebrum.machine import awake as module
from mlx_cerebrum.machine.awake import Awake, awake

ROOT = Path(__file__).parents[2]
WAIT = 10.0  # seconds
# As caffeinate does: it notes what it was told, and waits for that process to end.
STAND_IN = """#!/bin/sh
echo "$$ $*" >> "{notes}"
while kill -0 "$3" 2>/dev/null; do sleep 0.05; done
"""


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program, notes = tmp_path / "bin" / "caffeinate", tmp_path / "notes"
    program.parent.mkdir()
    program.write_text(STAND_IN.format(notes=notes))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return notes


def lines(notes: Path, count: int) -> list[str]:
    ends = time.monotonic() + WAIT
    while not notes.exists() or len(found := notes.read_text().splitlines()) < count:
        assert time.monotonic() < ends
        time.sleep(0.01)
    return found


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def ends(pid: int) -> None:
    until = time.monotonic() + WAIT
    while is_there(pid):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_it_runs_while_there_is_work(notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with awake():
        (line,) = lines(notes, 1)
        pid, *words = line.split()
        assert words == ["-i", "-w", str(os.getpid())]
        assert is_there(int(pid))
    ends(int(pid))


def test_a_second_request_finds_it_there(notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    holder = Awake()
    holder.hold()
    (line,) = lines(notes, 1)
    holder.hold()
    holder.settle()
    assert holder.held
    monkeypatch.setattr(module, "LINGER", 0.0)
    holder.settle()
    assert not holder.held
    ends(int(line.split()[0]))
    holder.hold()
    assert len(lines(notes, 2)) == 2
    holder.release()


@slow
def test_it_ends_with_a_process_that_is_killed(notes: Path) -> None:
    code = (
        "import sys, time; sys.platform = 'darwin'\n"
        "from mlx_cerebrum.machine.awake import Awake\n"
        "Awake().hold(); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        (line,) = lines(notes, 1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    ends(int(line.split()[0]))


def test_it_never_fails_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("PATH", str(tmp_path))
    with awake():
        pass
    broken = tmp_path / "caffeinate"
    broken.write_text("#!/no/such/shell\n")
    broken.chmod(0o755)
    with awake():
        pass


@pytest.mark.skipif(sys.platform == "darwin", reason="there it is")
def test_elsewhere_nothing_is_started(notes: Path) -> None:
    with awake():
        time.sleep(0.1)
    assert not notes.exists()
