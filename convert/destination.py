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

from convert.integrity import ReadError
from convert.outputs import Output
from convert.source import Source
from convert.writer import JOURNAL, Journal
from mlx_cerebrum import __version__, device
from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.model.memory import human

_SLACK = 16_000_000  # config, tokenizer and headers
_COPY = 64_000_000  # bytes the kernel is asked to copy at a time


@dataclass(frozen=True)
class Partial:
    """A directory being filled, the journal of what is in it, and how many bytes of another
    conversion it took the place of."""

    path: Path
    journal: Journal
    replaced: int


def fingerprint(source: Source, outputs: Sequence[Output], *more: object) -> str:
    """What must be the same for a stopped conversion to go on: the source's files, everything
    that is done to every tensor, what computes it, and `more`."""
    said = [__version__, version("mlx"), device.backend(), *more]
    said += [*source.stats.values(), *outputs]
    return hashlib.sha256("\n".join(map(repr, said)).encode()).hexdigest()


def check_free(destination: Path) -> None:
    """Raise CheckpointError unless `destination` can be made where it is wanted."""
    if destination.exists() or destination.is_symlink():
        raise CheckpointError(f"{destination} exists already; name a new directory, or remove it")
    if not destination.absolute().parent.is_dir():
        raise CheckpointError(f"{destination.absolute().parent} does not exist; make it first")
    try:
        os.fsencode(destination.name).decode()
    except UnicodeDecodeError:
        raise CheckpointError(f"{destination.name!r} is not a UTF-8 name; choose another") from None


def partial_of(destination: Path) -> Path:
    """Where `destination` is put together."""
    return destination.absolute().parent / f".{destination.name}.partial"


@contextmanager
def new_directory(destination: Path, identity: str, needed: int) -> Iterator[Partial]:
    """A directory to fill that becomes `destination` when all went well.

    When the process is stopped, the disk is full or a file can't be read it stays, to be resumed
    by a run with the same fingerprint `identity`; an error that makes it worthless removes it.
    Raises CheckpointError when `destination` exists, something else has the name it is put
    together under, or `needed` bytes, less what is there, are not free.
    """
    partial = partial_of(destination)
    if not partial.exists() and _begun(destination) == identity:
        # Raises where that run is not over yet.
        Journal(destination, identity, create=False).close()
        destination.rename(partial)  # killed between the last two steps: check it again
    check_free(destination)
    try:
        if partial.is_symlink() or (
            partial.exists() and _begun(partial) is None and _holds(partial)
        ):
            raise CheckpointError(f"{partial} is in the way and no conversion's; move it elsewhere")
        partial.mkdir(exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{partial} can't be made: {error.strerror}; name another destination"
        ) from None
    journal = Journal(partial, identity)
    try:
        check_free(destination)  # the one that had the lock may have finished
        replaced = 0 if journal.resumes else _size(partial)
        _clear(partial, shards=not journal.entries)
        _require_space(destination, partial, needed)
        yield Partial(partial, journal, replaced)
        check_free(destination)
        for file in partial.iterdir():
            _sync(file)
        _sync(partial)
        partial.rename(destination)
        (destination / JOURNAL).unlink()
        _sync(destination.absolute().parent)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free, missing = shutil.disk_usage(partial).free, max(0, needed - _size(partial))
        raise CheckpointError(
            f"the disk is full: {human(missing)} more are needed and {human(free)} are free; make"
            f" room and run the same command again to go on, or remove {partial}"
        ) from None
    except ReadError:
        raise
    except Exception:
        _clear(partial)
        raise
    finally:
        if partial.exists() and not _size(partial):  # nothing to go on from
            shutil.rmtree(partial, ignore_errors=True)
        journal.close()


def _begun(directory: Path) -> str | None:
    """The fingerprint of the conversion that `directory` is, or was, being written by."""
    lines = Journal.read(directory)
    return lines[0].get("fingerprint") if lines else None


def _holds(directory: Path) -> bool:
    if not directory.is_dir():
        return directory.exists()
    return any(file.name != JOURNAL for file in directory.iterdir())


def _clear(directory: Path, shards: bool = True) -> None:
    """Remove everything but the journal, whose lock is held, and but the shards if need be."""
    for file in directory.iterdir():
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        elif file.name != JOURNAL and (shards or file.suffix != ".safetensors"):
            file.unlink()


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


def _sync(path: Path) -> None:
    """Make a file, or the names in a directory, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
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
