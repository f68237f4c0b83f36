"""What there is to know of this machine, and what its user could change. No names of people."""

import os
import platform
import shutil
import sys
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import mlx.core as mx

from mlx_cerebrum import __version__, device, installed
from mlx_cerebrum.doctor.pace import Pace
from mlx_cerebrum.errors import CerebrumError
from mlx_cerebrum.machine.facts import chip, memory_bytes, sysctl_number
from mlx_cerebrum.machine.pressure import is_short, unused_bytes
from mlx_cerebrum.model.memory import GB, HEADROOM, available_bytes, human, left
from mlx_cerebrum.shelf.entries import Entry, entries
from mlx_cerebrum.shelf.places import folder
from mlx_cerebrum.text import tilde
from mlx_cerebrum.weights.opening import ModelSpec, open_model

_CONVERSATION = 0.5 * GB  # that a model should leave for caches
_LEAST_DISK = 13 * GB  # what the 12.25B in 8 bits takes, and a file of its source
_PACKAGE = "Debian and Ubuntu: libopenblas0-pthread"
_MOST_WIRED = 0.85  # that it may take without the system suffering


@dataclass
class Report:
    """facts: labels and values, in words, in the order they are shown. data: the same for programs.

    stops: why nothing can run here; advice: what could be better.
    """

    facts: list[tuple[str, str]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    stops: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    def add(self, label: str, words: str, **data: Any) -> None:
        self.facts.append((label, words))
        self.data |= data


def report(pace: Pace | None) -> Report:
    """All of it; `pace` as it was measured, if it was."""
    found = Report()
    _software(found)
    _machine(found)
    _memory(found)
    _disk(found)
    _shelf(found)
    if pace is not None:
        _pace(found, pace)
    return found


def machine() -> Report:
    """Of it only what a figure measured here depends on."""
    found = Report()
    _software(found)
    _machine(found)
    _memory(found)
    return found


def _software(found: Report) -> None:
    translated = sysctl_number("sysctl.proc_translated") == 1
    machine = platform.machine()
    found.add("mlx-cerebrum", __version__, version=__version__)
    versions = {name: _version(name) for name in ("mlx", "mlx-lm")}
    words = ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())
    found.add("packages", words, packages=versions)
    how = f"{machine}, translated by Rosetta" if translated else machine
    found.add(
        "Python",
        f"{platform.python_version()} ({how})",
        python=platform.python_version(),
        architecture=machine,
        rosetta=translated,
    )
    system = f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else _linux()
    found.add("system", system, system=system)
    if (line := installed.unfit()) is not None:
        found.stops.append(line)


def _machine(found: Report) -> None:
    backend = device.backend()
    cores, gpu = os.cpu_count(), None
    if device.on_gpu():
        gpu = device.gpu_info().get("architecture")
    more = f", {gpu}" if gpu else ""
    found.add("chip", f"{chip()}, {cores} cores{more}", chip=chip(), cores=cores, gpu=gpu)
    words: str = backend
    if sys.platform == "linux" and backend == "cpu":
        blas = "the reference BLAS"
        if device.has_openblas():
            blas = f"OpenBLAS ({device.openblas_kernels()})"
        words += f", with {blas}"
        found.data["blas"] = blas
        if not device.has_openblas():
            blas_at = device.installed_openblas()
            found.advice.append(
                "prompts are read ten times as fast with OpenBLAS: "
                + (f"set LD_PRELOAD={blas_at}" if blas_at else f"install it ({_PACKAGE})")
            )
        elif kernels := device.better_kernels():
            found.advice.append(
                "OpenBLAS is older than this processor, and takes it for one of 2004: set"
                f" OPENBLAS_CORETYPE={kernels} (prompts may be read four times as fast)"
            )
    found.add("backend", words, backend=backend)
    if sys.platform == "darwin" and backend != "metal":
        found.stops.append("MLX does not find Metal: install mlx anew")
    try:
        works = bool((mx.ones((8, 8)) @ mx.ones((8, 8))).sum().item() == 512)
    except RuntimeError:
        works = False
    if not works:
        found.stops.append(f"MLX can't compute on {backend}: install mlx anew")


def _memory(found: Report) -> None:
    total, free = memory_bytes(), available_bytes()
    words = f"{human(total)}; {left(free)} for models now"
    found.add("memory", words, memory_bytes=total, available_bytes=free)
    if (unused := unused_bytes()) is not None:
        words = f"leave {human(unused)} before macOS swaps"
        found.add("other programs", words, unused_bytes=unused)
    if is_short():
        found.add("pressure", "the system is short of memory now", short_of_memory=True)
        found.advice.append("close other programs: the system is short of memory")
    if device.backend() != "metal":
        return
    info = device.gpu_info()
    most = int(info.get("max_recommended_working_set_size", 0))
    buffer = int(info.get("max_buffer_length", 0))
    found.add(
        "Metal",
        f"{human(most)} to work with, {human(buffer)} in one buffer",
        metal_working_set_bytes=most,
        metal_buffer_bytes=buffer,
    )
    limit = sysctl_number("iogpu.wired_limit_mb")
    words = "the system's own" if not limit else f"{limit} MB (iogpu.wired_limit_mb)"
    found.add("wired limit", words, wired_limit_mb=limit)


def _disk(found: Report) -> None:
    where = folder()
    there = next(path for path in (where, *where.parents) if path.exists())
    free = shutil.disk_usage(there).free
    found.add("disk", f"{human(free)} free for models in {tilde(where)}", disk_free_bytes=free)
    if free < _LEAST_DISK:
        found.advice.append(
            f"a model of 12.25B in 8 bits wants {human(int(_LEAST_DISK))} of disk while it is made"
        )


def _shelf(found: Report) -> None:
    rows = []
    for entry in entries():
        row, words = _entry(entry)
        rows.append(row)
        found.add("model", words)
    found.data["models"] = rows
    if not rows:
        found.add("models", "none yet")
        found.advice.append("fetch a model: mlx-cerebrum pull cerebrum-12.25b")
    unfit = [row for row in rows if row.get("fits") is False]
    if unfit and device.backend() == "metal":
        _advise_wired(found, min(int(row["needs_bytes"]) for row in unfit))


def _advise_wired(found: Report, needed: int) -> None:
    """Where a model would fit if Metal took more of the memory than it does by itself."""
    total = memory_bytes()
    wanted = min(_MOST_WIRED * total, (needed + _CONVERSATION) * 1.05)
    has = int(device.gpu_info().get("max_recommended_working_set_size", 0))
    if needed + _CONVERSATION <= _MOST_WIRED * total and wanted > has:
        megabytes = int(wanted / 2**20)
        found.advice.append(
            f"to fit a model that does not: sudo sysctl iogpu.wired_limit_mb={megabytes}"
            " (until the next start)"
        )


def _entry(entry: Entry) -> tuple[dict[str, Any], str]:
    name = entry.called
    try:
        opened = open_model(ModelSpec(entry.path))
    except CerebrumError:
        return {"name": name, "damaged": True}, f"{name}: damaged; try mlx-cerebrum verify {name}"
    needed = opened.storage.nbytes + opened.storage.transient
    fits = needed + _CONVERSATION <= available_bytes() * HEADROOM
    row = {"name": name, "needs_bytes": needed, "fits": fits}
    return row, f"{name}: needs {human(needed)}, {'fits' if fits else 'does not fit now'}"


def _pace(found: Report, pace: Pace) -> None:
    if not pace.is_demo:
        found.advice.append("to time a trained model too: mlx-cerebrum pull demo")
    found.add(
        "pace",
        f"{pace.decoded:.1f} tokens/s written, {pace.read:.0f} tokens/s read: {pace.model}",
        pace={
            "model": pace.model,
            "written_per_second": round(pace.decoded, 2),
            "read_per_second": round(pace.read, 1),
            "weights_bytes": pace.nbytes,
        },
    )
    found.add(
        "bandwidth",
        f"about {pace.bandwidth / GB:.0f} GB/s of weights are read",
        bandwidth_bytes_per_second=round(pace.bandwidth),
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _linux() -> str:
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    return f"{release.get('PRETTY_NAME', sys.platform)}, kernel {platform.release()}"
