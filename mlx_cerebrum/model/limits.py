"""What the system lets this process take, and MLX's own limits while it works.

On Linux the free memory is not the whole answer: a container, a service or a batch job is a
control group with a limit, within groups with limits of their own, and `ulimit` sets one for a
process. Passing any of them ends in a kill, not in an error message, so the least of them counts.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path, PurePosixPath

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_cerebrum import device
from mlx_cerebrum.errors import RequestError

PROC = Path("/proc")
# For each version of cgroups: files with a limit, the one with what is used, and which part of
# that, in memory.stat, are cached file pages, which the kernel gives up before it kills.
_CGROUP_FILES = (
    (("memory.max", "memory.high"), "memory.current", "inactive_file"),  # v2
    (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),  # v1
)
# `ulimit -v` and `ulimit -d`, as /proc/self/limits names them -> what counts towards them.
_RLIMITS = {"Max address space": "VmSize", "Max data size": "VmData"}
# Addresses, not memory, that the thread which MLX computes on takes for its stack and heap, to keep
# and for a moment; and for OpenBLAS's buffer, without which OpenBLAS waits for ever.
_KEPT, _MOMENT, _BLAS_BUFFER = 80_000_000, 150_000_000, 2**27

# Freed buffers worth keeping. A block of the 12.25B makes 93 MB in a prefill chunk of 512 tokens,
# 0.2 MB in a decode step, and the next block asks for the same sizes. What grows beyond that are
# the caches' outgrown buffers: nothing asks for their sizes again.
CACHE_LIMIT = 256 * 2**20

# Weights that take this share of Metal's working set are wired: macOS pages such ones out as soon
# as another program wants memory, and each token then waits for the disk.
_NEAR = 2 / 3
NO_WIRE = "MLX_CEREBRUM_NO_WIRE"  # environment variable: unless it is 0, nothing is wired

# As `limits` set it. MLX's own has a default (0.8 of the memory on the CPU) that nobody asked for.
_memory_limit: int | None = None
_may_wire: bool | None = None  # None: outside of `limits`


def host_bytes(proc: Path = PROC) -> int:
    """Bytes this process may still take on the host: free, and within every limit set on it."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = sizes(proc / "meminfo").get("MemAvailable", physical)
    within = [left for folder in cgroups(proc) for left in _cgroup_left(folder)]
    return max(0, min([free, *within, *_rlimits_left(proc)]))


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:  # not Linux, or not there in this version
        return []


def sizes(file: Path) -> dict[str, int]:
    """The `Name:  123 kB` lines of a file, in bytes."""
    split = [line.split() for line in _lines(file)]
    return {s[0].rstrip(":"): 1024 * int(s[1]) for s in split if len(s) == 3 and s[2] == "kB"}


def cgroups(proc: Path = PROC) -> Iterator[Path]:
    """Folders of the control groups whose limits count: this process's own, and those above it."""
    own: dict[str, PurePosixPath] = {}
    for line in _lines(proc / "self/cgroup"):
        _, controllers, group = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), PurePosixPath(group))  # v2 names none: ""
    for line in _lines(proc / "self/mountinfo"):
        where, _, what = line.partition(" - ")
        root, mount = where.split()[3:5]
        kind, _, options = what.split(" ", 2)
        controller = {"cgroup": "memory", "cgroup2": ""}.get(kind)
        if controller not in own or (controller and controller not in options.split(",")):
            continue
        # In a container the mount may begin at the container's group, not at the machine's.
        path = own[controller]
        inside = path.relative_to(root) if path.is_relative_to(root) else PurePosixPath()
        yield from (Path(mount) / folder for folder in (inside, *inside.parents))


def _cgroup_left(folder: Path) -> Iterator[int]:
    """What each limit of one group leaves; nothing where there is none."""
    for limits, used, cached in _CGROUP_FILES:
        try:
            taken = int((folder / used).read_text())
            stat = dict(line.split() for line in _lines(folder / "memory.stat"))
            taken -= int(stat.get(cached, 0))
        except (OSError, ValueError):
            continue
        for limit in limits:
            text = "".join(_lines(folder / limit))
            if text.isdigit():  # "max" is none
                yield int(text) - taken


def _rlimits_left(proc: Path) -> Iterator[int]:
    used = sizes(proc / "self/status")
    coming = {} if mx.get_active_memory() else first_evaluation()
    for line in _lines(proc / "self/limits"):
        for name, counted in _RLIMITS.items():
            if line.startswith(name):
                soft = line.removeprefix(name).split()[0]
                if soft.isdigit():  # else "unlimited"
                    yield int(soft) - used.get(counted, 0) - coming.get(counted, 0)


def first_evaluation() -> dict[str, int]:
    """What MLX's first evaluation, and first product, will add to the sizes that limits count."""
    buffer = _BLAS_BUFFER if device.has_openblas() else 0
    return {"VmSize": max(_MOMENT, _KEPT + buffer), "VmData": buffer}


# glibc keeps freed memory of its own heap, under 32 MB a piece, unless it is asked for it; macOS's
# and musl's malloc have no such call.
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def release() -> None:
    """Give the system what is freed and only kept: MLX's buffers, and malloc's on Linux."""
    mx.clear_cache()
    if _trim is not None:
        _trim(0)


def cap(nbytes: int) -> None:
    """Inside `limits`, let what is predicted take no more than so many bytes from now on."""
    global _memory_limit
    most = mx.get_active_memory() + nbytes
    _memory_limit = most if _memory_limit is None else min(_memory_limit, most)


def memory_limit() -> int | None:
    """The bytes that `limits` has set as the most MLX should hold, if it has."""
    return _memory_limit


def wire(*models: nn.Module) -> None:
    """Keep the models' weights from being paged out between tokens: inside `limits`, on Metal,
    where they are most of what it recommends to hold. What was wired before is let go of.

    Nothing else is wired. Buffers that come and go while all are wired are reported to panic
    macOS 26 (ml-explore/mlx, issues 3186 and 3346). Before macOS 15, MLX wires nothing.
    """
    if not _may_wire:
        return
    most, page = working_set(), os.sysconf("SC_PAGE_SIZE")
    if _memory_limit is not None:
        most = min(most, _memory_limit)
    # As Metal holds them: room to spare would be taken by the next buffers that come.
    leaves = [tree_flatten(model.parameters()) for model in models]
    arrays = [array for _, array in chain.from_iterable(leaves) if isinstance(array, mx.array)]
    held = sum(-(-array.nbytes // page) * page for array in arrays)
    mx.set_wired_limit(min(held, most) if held > _NEAR * most else 0)


def working_set() -> int:
    """Bytes that Metal recommends to hold at most."""
    return int(device.gpu_info()["max_recommended_working_set_size"])


@contextmanager
def limits(
    memory: int | None = None, cache: int = CACHE_LIMIT, wiring: bool = True
) -> Iterator[None]:
    """MLX's limits while a model loads and generates; put back however that ends.

    `cache` bounds the bytes of freed buffers that MLX keeps for reuse. It never raises MLX's own
    bound (32 MiB on the CPU, all that fit on a GPU). `memory` is the most MLX should hold at all,
    in bytes. Inside, `memory.available_bytes` counts from it, so that what is predicted to need
    more is refused. Beyond it, MLX waits for what it has issued before it issues more. Without
    `wiring`, or where the environment has NO_WIRE, `wire` does nothing inside. Raises RequestError
    unless `memory` is above zero.
    """
    global _memory_limit, _may_wire
    if memory is not None and memory <= 0:
        raise RequestError(
            f"a memory limit of {memory} bytes leaves nothing: it must be above zero"
        )
    before = _memory_limit, _may_wire
    with ExitStack() as undo:
        if _may_wire is None and device.backend() == "metal":
            undo.callback(mx.set_wired_limit, mx.set_wired_limit(0))
            _may_wire = os.environ.get(NO_WIRE, "") in ("", "0")
        _may_wire = bool(_may_wire and wiring)
        kept = mx.set_cache_limit(cache)
        undo.callback(mx.set_cache_limit, kept)
        mx.set_cache_limit(min(kept, cache))
        if memory is not None:
            undo.callback(mx.set_memory_limit, mx.set_memory_limit(memory))
            _memory_limit = memory
        undo.callback(mx.synchronize)  # first of all: what was issued runs within the limits
        try:
            yield
        finally:
            _memory_limit, _may_wire = before
