"""What the machine is; macOS is asked through a sysctlbyname of the test's own elsewhere."""

import ctypes
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_cerebrum import device
from mlx_cerebrum.machine import facts

VALUES = {
    b"machdep.cpu.brand_string": b"Apple M2 Pro\0",
    b"kern.memorystatus_vm_pressure_level": (4).to_bytes(4, sys.byteorder),
    b"hw.memsize": (16 * 2**30).to_bytes(8, sys.byteorder),
}
SIGNATURE = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_size_t),
    ctypes.c_void_p,
    ctypes.c_size_t,
)


def _sysctlbyname(name: bytes, at: Any, size: Any, new: Any, new_size: int) -> int:
    """As sysctlbyname(3): the size alone where there is no place for the value."""
    value = VALUES.get(name)
    if value is None:
        return -1
    if at is not None:
        if size[0] < len(value):
            return -1
        ctypes.memmove(at, value, len(value))
    size[0] = len(value)
    return 0


class Library:
    sysctlbyname = SIGNATURE(_sysctlbyname)


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Library())


def test_what_macos_keeps(mac: None) -> None:
    assert facts.sysctl("machdep.cpu.brand_string") == b"Apple M2 Pro\0"
    assert facts.processor() == "Apple M2 Pro"
    assert facts.sysctl_number("kern.memorystatus_vm_pressure_level") == 4
    assert facts.sysctl_number("hw.memsize") == 16 * 2**30
    assert facts.sysctl("no.such.name") is None
    assert facts.sysctl_number("no.such.name") is None


@pytest.mark.skipif(sys.platform != "darwin", reason="asks macOS itself")
def test_this_mac() -> None:
    assert facts.sysctl_number("hw.memsize") == facts.memory_bytes()
    assert facts.sysctl_number("kern.memorystatus_vm_pressure_level") in (1, 2, 4)
    assert facts.processor().startswith("Apple")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert facts.sysctl("hw.memsize") is None
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nmodel name\t: A Chip @ 2 GHz\n")
    monkeypatch.setattr(facts, "_CPUINFO", cpuinfo)
    assert facts.processor() == "A Chip @ 2 GHz"
    cpuinfo.unlink()
    assert facts.processor()


def test_in_one_line() -> None:
    said = facts.summary()
    assert "GB of memory" in said
    assert said.endswith(f"computing on {device.backend()}")
