"""The directory a conversion fills: a hidden one beside the destination, renamed when whole."""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from convert.outputs import Output
from convert.source import Source
from convert.writer import JOURNAL, Journal
from mlx_cerebrum import __version__
from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.memory import human

_SLACK = 16_000_000  # config, tokenizer and headers
_COPY = 64_000_000  # bytes the kernel is asked to copy at a time


@dataclass(frozen=True)
class Partial:
    """A directory being filled; `resumed` where an earlier run had begun it."""

    path: Path
    journal: Journal
    resumed: bool


def fingerprint(source: Source, outputs: Sequence[Output]) -> str:
    """What must be the same for a stopped conversion to go on: the source's files, everything
    that is done to every tensor, and what computes it."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in source.paths]
    said = [__version__, version("mlx"), str(mx.default_device()), *map(repr, stats)]
    return hashlib.sha256("\n".join([*said, *map(repr, outputs)]).encode()).hexdigest()


def check_free(destination: Path) -> None:
    """Raise CheckpointError unless `destination` can be made where it is wanted."""
    if destination.exists() or destination.is_symlink():
        raise CheckpointError(f"{destination} exists already; name a new directory, or remove it")
    if not destination.absolute().parent.is_dir():
        raise CheckpointError(f"{destination.absolute().parent} does not exist; make it first")


def partial_of(destination: Path) -> Path:
    """Where `destination` is put together."""
    return destination.absolute().parent / f".{destination.name}.partial"


@contextmanager
def new_directory(destination: Path, identity: str, needed: int) -> Iterator[Partial]:
    """A directory to fill that becomes `destination` when all went well.

    When the process is stopped or the disk is full it stays, to be resumed by a run with the
    same fingerprint `identity`; after any other error it is removed. Raises CheckpointError when
    `destination` exists, or `needed` bytes, less what is there, are not free.
    """
    partial = partial_of(destination)
    if not partial.exists() and _is_finished(destination, identity):
        destination.rename(partial)  # killed between the last two steps: check it again
    check_free(destination)
    there = [entry["fingerprint"] for entry in Journal.read(partial)[:1]]
    if partial.exists() and there != [identity]:
        _unlock_and_remove(partial)
    _require_space(destination, partial, needed)
    resumed = partial.exists()
    partial.mkdir(exist_ok=True)
    journal = Journal(partial, identity)
    try:
        yield Partial(partial, journal, resumed)
        _sync(partial)
        partial.rename(destination)
        (destination / JOURNAL).unlink()
        _sync(destination.absolute().parent)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        free, missing = shutil.disk_usage(partial).free, max(0, needed - _size(partial))
        raise CheckpointError(
            f"the disk is full: {human(missing)} more are needed and {human(free)} are free; make"
            f" room and run the same command again to go on, or remove {partial}"
        ) from None
    except KeyboardInterrupt:
        if not _size(partial):
            shutil.rmtree(partial, ignore_errors=True)
        raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        journal.close()


def _is_finished(destination: Path, identity: str) -> bool:
    return Journal.read(destination)[:1] == [{"fingerprint": identity}]


def _unlock_and_remove(partial: Path) -> None:
    """Remove what another conversion left, unless that is still running."""
    Journal(partial, "").close()  # raises where it is locked
    shutil.rmtree(partial)


def _require_space(destination: Path, partial: Path, needed: int) -> None:
    free = shutil.disk_usage(destination.absolute().parent).free
    missing = needed - _size(partial) + _SLACK
    if missing > free:
        raise CheckpointError(
            f"{destination} needs {human(missing)} of disk and {human(free)} are free;"
            " free some space, name another disk, or quantize (-q)"
        )


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def _sync(directory: Path) -> None:
    """Make the names in a directory survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems can't
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_file(source: Path, target: Path, progress: Callable[[int], None] | None = None) -> None:
    """Copy a file the cheapest way there is: a clone that shares its blocks (APFS, and on Linux
    btrfs and XFS through copy_file_range), else inside the kernel, else through a buffer.

    progress: called with the bytes copied since the last call.
    """
    target.unlink(missing_ok=True)
    size = source.stat().st_size
    if sys.platform == "darwin" and _clone(source, target):
        if progress is not None:
            progress(size)
        return
    with source.open("rb", buffering=0) as read, target.open("wb", buffering=0) as write:
        kernel = hasattr(os, "copy_file_range")
        while True:
            try:
                if kernel:
                    count = os.copy_file_range(read.fileno(), write.fileno(), _COPY)
                else:
                    count = write.write(read.read(_COPY // 8)) or 0
            except OSError as error:
                if not kernel or error.errno == errno.ENOSPC:
                    raise
                kernel = False  # across file systems, or one that can't
                continue
            if not count:
                break
            if progress is not None:
                progress(count)
        os.fsync(write.fileno())
    if target.stat().st_size != size:
        raise CheckpointError(f"{source} changed while it was copied; start again")


def _clone(source: Path, target: Path) -> bool:
    """macOS: `clonefile(2)`, which copies nothing until one of the two is changed."""
    clonefile = ctypes.CDLL(None, use_errno=True).clonefile
    return int(clonefile(os.fsencode(source), os.fsencode(target), 0)) == 0
