"""Pulls as processes: stopped at any moment, two at once, and on a disk that is really full."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import shelf_room
from conftest import slow
from hub_stand_in import SHARDS, Hub
from test_pull import ROOT, environment, run, size

from convert.verify import verify
from convert.writer import Writer
from mlx_cerebrum.shelf.entries import find, unfinished

repository, hub = shelf_room.repository, shelf_room.hub  # fixtures
NAME = "cerebrum-12.25b"
COMMAND = [sys.executable, "-m", "mlx_cerebrum", "pull", NAME, "--bits", "4"]


def started(hub: Hub, tmp_path: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        COMMAND, cwd=ROOT, env=environment(hub, tmp_path), stderr=subprocess.PIPE, text=True
    )


@pytest.mark.long
def test_ctrl_c_at_any_moment_is_one_word_and_it_goes_on(hub: Hub, tmp_path: Path) -> None:
    """While it looks, fetches, converts, verifies; a hub that is slow to send makes that 4 s."""
    hub.faults.pace = 2_000_000
    for _ in range(2):  # the first time it is compiled
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", "import mlx_cerebrum.cli"], cwd=ROOT, check=True)
        first = 1.5 * (time.monotonic() - began)  # until that is there, Python has the signal
    stopped = done = 0
    for number in range(40):
        with started(hub, tmp_path) as pulling:
            time.sleep(first + 0.11 * number)
            pulling.send_signal(signal.SIGINT)
            err = pulling.communicate(timeout=30)[1]
        assert "Traceback" not in err, err
        if pulling.returncode == 0:
            done += 1
            break
        # While modules are imported, the signal itself ends it: to a shell that is 130 too.
        assert pulling.returncode in (130, -signal.SIGINT)
        assert err.endswith("interrupted\n"), err
        stopped += 1
    assert stopped > 5
    assert run(NAME, "--quiet") == 0
    made = find(NAME)
    assert made is not None
    assert verify(made.path)["sound"]
    assert unfinished() == []
    for name in SHARDS:  # each stop loses what was on its way, and asks for the headers again
        assert hub.sent[name] <= size(hub, name) + (stopped + 2) * 4 * (1 << 16)


@pytest.mark.long
def test_two_at_once_fetch_it_once(hub: Hub, tmp_path: Path) -> None:
    hub.faults.pace = 2_000_000
    with started(hub, tmp_path) as first, started(hub, tmp_path) as second:
        said = [one.communicate(timeout=120)[1] for one in (first, second)]
    assert first.returncode == second.returncode == 0
    assert sum("is being fetched by another run; waiting for it" in err for err in said) == 1
    assert sum("is here already" in err for err in said) == 1
    for name in SHARDS:
        assert hub.sent[name] <= size(hub, name) + 3 * (1 << 16)


@slow
def test_a_disk_that_others_really_fill(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "models"
    disk.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mounted, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount")
    put, rest = Writer.put, disk / "rest"

    def filling(self: Writer, data: Any) -> None:
        if not rest.exists() and self.done > 20:  # somebody else takes what is left
            with pytest.raises(OSError, match="No space"), rest.open("wb") as file:
                file.write(bytes(9_000_000))
        put(self, data)

    monkeypatch.setattr("convert.pull._SLACK", 0)
    monkeypatch.setattr("convert.destination._SLACK", 0)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Writer, "put", filling)
            assert run(NAME, "--quiet") == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert "run the same command again to go on" in err
        rest.unlink()
        assert run(NAME, "--quiet") == 0
        made = find(NAME)
        assert made is not None
        assert verify(made.path)["sound"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
