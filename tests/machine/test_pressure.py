"""When memory counts as short, and that it does not flap."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeCheckpoint

from mlx_cerebrum import device, load
from mlx_cerebrum.machine import pressure
from mlx_cerebrum.machine.facts import memory_bytes, sysctl_number
from mlx_cerebrum.machine.pressure import (
    CALM,
    LOOK,
    Pressure,
    is_short,
    unused_bytes,
    would_swap,
)
from mlx_cerebrum.model import memory

VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               10000.
Pages active:                            150000.
Pages inactive:                          140000.
Pages speculative:                         3000.
Pages throttled:                              0.
Pages wired down:                        100000.
Pages purgeable:                           2000.
"Translation faults":                  98765432.
File-backed pages:                       100000.
Anonymous pages:                         193000.
Pages stored in compressor:              123456.
Pages occupied by compressor:             45678.
"""
UNUSED = (10_000 + 2_000 + 100_000) * 16_384


def proc(folder: Path, waited: float | None = 0.0, free: float = 0.5) -> Path:
    """A stand-in for /proc: the share of time waited for memory, and of memory that is free."""
    (folder / "meminfo").write_text(
        f"MemTotal: 16000000 kB\nMemAvailable: {int(free * 16_000_000)} kB\n"
    )
    if waited is not None:
        (folder / "pressure").mkdir()
        (folder / "pressure" / "memory").write_text(stalled(waited))
    return folder


def stalled(waited: float) -> str:
    some = f"some avg10={waited:.2f} avg60=0.00 avg300=0.00 total=1\n"
    return some + "full avg10=99.00 avg60=0.00 avg300=0.00 total=1\n"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("waited", "free", "short"),
    [
        (0.0, 0.5, False),
        (9.9, 0.5, False),
        (10.0, 0.5, True),
        (0.0, 0.03, True),
        (None, 0.5, False),
        (None, 0.03, True),
    ],
)
def test_linux(tmp_path: Path, waited: float | None, free: float, short: bool) -> None:
    assert is_short(proc(tmp_path, waited, free)) is short


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_group_with_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pressure counts too; that it is small beside the machine does not."""
    monkeypatch.setattr(pressure, "cgroups", lambda proc: iter([tmp_path / "none", tmp_path]))
    assert not is_short(proc(tmp_path))
    (tmp_path / "memory.pressure").write_text(stalled(9.0))
    assert not is_short(tmp_path)
    (tmp_path / "memory.pressure").write_text(stalled(11.0))
    assert is_short(tmp_path)


@pytest.mark.parametrize(("level", "short"), [(1, False), (2, True), (4, True)])
def test_macos(monkeypatch: pytest.MonkeyPatch, level: int, short: bool) -> None:
    monkeypatch.setattr(pressure, "sysctl_number", lambda name: level)
    assert is_short() is short


def test_it_is_over_once_it_was_calm_for_a_while() -> None:
    now, short, looks = 0.0, False, 0

    def looked() -> bool:
        nonlocal looks
        looks += 1
        return short

    watch = Pressure(looked, lambda: now)
    assert not watch.look()
    short = True
    assert not watch.look()  # no second look at once
    assert looks == 1
    now += LOOK
    assert watch.look()
    short = False
    for _ in range(int(CALM) - 1):
        now += LOOK
        assert watch.look()
    short = True
    now += LOOK
    assert watch.look()
    short = False
    now += CALM - LOOK
    assert watch.look()
    now += LOOK
    assert not watch.look()


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A Mac of 8 GB as far as `pressure` asks; what vm_stat prints can be changed."""
    printed = [VM_STAT]

    def run(words: list[str], **_: Any) -> Any:
        assert words == ["/usr/bin/vm_stat"]
        if not printed:
            raise FileNotFoundError
        return subprocess.CompletedProcess(words, 0, printed[-1], "")

    numbers = {"kern.memorystatus_level": 40, "kern.memorystatus_vm_pressure_level": 1}
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(device, "backend", lambda: "metal")
    monkeypatch.setattr(pressure, "sysctl_number", numbers.get)
    monkeypatch.setattr(pressure, "memory_bytes", lambda: 8 * 2**30)
    monkeypatch.setattr(subprocess, "run", run)
    return printed


def test_what_other_programs_leave(mac: list[str]) -> None:
    assert unused_bytes() == UNUSED
    for other in ("", VM_STAT.replace("16384 bytes", "?"), VM_STAT.replace("File-", "Files ")):
        mac[:] = [other]
        assert unused_bytes() == 40 * 8 * 2**30 // 100
    mac.clear()
    assert unused_bytes() == 40 * 8 * 2**30 // 100


@pytest.mark.skipif(sys.platform != "darwin", reason="asks macOS itself")
def test_what_other_programs_leave_on_this_mac() -> None:
    total = memory_bytes()
    assert 0 < (unused_bytes() or 0) < total
    said = subprocess.run(["/usr/bin/vm_stat"], capture_output=True, text=True).stdout
    assert len(pressure._UNUSED.findall(said)) == 3
    assert 0 < (sysctl_number("kern.memorystatus_level") or 0) <= 100


def test_elsewhere_no_swap_is_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    assert unused_bytes() is None
    monkeypatch.setattr(device, "backend", lambda: "metal")
    assert would_swap(10**15, "it") is None


def test_swapping_is_foreseen(mac: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert would_swap(UNUSED, "it") is None
    assert would_swap(4_070_000_000, "it") == (
        "it takes 4.07 GB, and other programs leave 1.84 GB: macOS will compress and swap, which is"
        " slow; close some of them, or take fewer bits"
    )
    monkeypatch.setattr(pressure, "is_short", lambda: True)
    assert "short of memory already" in str(would_swap(4_070_000_000, "it"))
    monkeypatch.setattr(device, "backend", lambda: "cpu")  # there it is refused
    assert would_swap(4_070_000_000, "it") is None


def test_loading_warns_of_it(
    checkpoint: MakeCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = checkpoint()
    monkeypatch.setattr(memory, "available_bytes", lambda: 10**12)
    monkeypatch.setattr(pressure, "unused_bytes", lambda: 1000)
    load(path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(device, "backend", lambda: "metal")
    load(path)
    assert capsys.readouterr().err.startswith(f"warning: {path.name} takes ")
