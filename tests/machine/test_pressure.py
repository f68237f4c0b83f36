"""When memory counts as short, and that it does not flap."""

import sys
from pathlib import Path

import pytest

from mlx_cerebrum.machine import pressure
from mlx_cerebrum.machine.pressure import CALM, LOOK, Pressure, is_short


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
