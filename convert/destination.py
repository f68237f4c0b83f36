"""The directory a conversion fills: a hidden one beside the destination, renamed when whole.

A journal in it says whose it is and how far it is filled, for a later run to go on from.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from convert.integrity import ReadError
from convert.layout import Output
from convert.source import Source
from mlx_cerebrum import __version__, device
from mlx_cerebrum.errors import CerebrumError, CheckpointError
from mlx_cerebrum.files import durable, json_file
from mlx_cerebrum.model.memory import human

JOURNAL = ".conversion"
SCRATCH = "calibration"  # a folder in it, which never becomes part of the destination
_SLACK = 16_000_000  # config, tokenizer and headers


class Journal:
    """Lines of `{"key": ..., "sha256": ...}` under one with the conversion's fingerprint.

    `entries` are those of this fingerprint, `resumes` whether it was there before. The file is
    locked while it is open; raises CheckpointError where another process has it.

    create: make the file where there is none.
    """

    def __init__(self, directory: Path, fingerprint: str, create: bool = True) -> None:
        busy = f"{directory} is being written by another conversion; wait for it or stop it"
        try:
            flags = os.O_RDWR | os.O_APPEND | (os.O_CREAT if create else 0)
            self._file = os.fdopen(os.open(directory / JOURNAL, flags, 0o666), "a+b")
        except FileNotFoundError:  # renamed by the one that was there first
            raise CheckpointError(busy) from None
        except OSError as error:
            raise CheckpointError(
                f"{directory} can't be written: {error.strerror}; name another destination"
            ) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held, named = os.fstat(self._file.fileno()), (directory / JOURNAL).stat()
            if (held.st_dev, held.st_ino) != (named.st_dev, named.st_ino):
                raise BlockingIOError  # what was locked has been removed or renamed meanwhile
        except (BlockingIOError, FileNotFoundError):
            self._file.close()
            raise CheckpointError(busy) from None
        if self._file.tell() and not self._ends_whole():
            self._write(b"\n")  # a line cut short must not swallow the next
        entries = self.read(directory)
        self.resumes = bool(entries) and entries[0] == {"fingerprint": fingerprint}
        if not self.resumes:
            # Appended, not written over: at any moment the file says whose directory this is.
            self._append({"fingerprint": fingerprint})
            entries = []
        self.entries = {entry["key"]: entry["sha256"] for entry in entries[1:]}

    @staticmethod
    def read(directory: Path) -> list[dict[str, str]]:
        """The last fingerprint of a directory's journal and what follows it, whole lines only;
        empty where there is no journal."""
        try:
            lines = (directory / JOURNAL).read_bytes().split(b"\n")
        except OSError:
            return []
        entries: list[dict[str, str]] = []
        for line in lines:
            try:
                entry = json_file.parse(line, JOURNAL, CheckpointError)
            except CheckpointError:
                continue
            if not isinstance(entry, dict) or not all(isinstance(v, str) for v in entry.values()):
                continue
            if entry.keys() == {"fingerprint"}:
                entries = [entry]
            elif entry.keys() == {"key", "sha256"} and entries:
                entries.append(entry)
        return entries

    def add(self, key: str, sha256: str) -> None:
        self._append({"key": key, "sha256": sha256})

    def sync(self) -> None:
        durable.sync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _append(self, entry: dict[str, str]) -> None:
        self._write(json.dumps(entry).encode() + b"\n")

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()

    def _ends_whole(self) -> bool:
        self._file.seek(-1, os.SEEK_END)
        return self._file.read(1) == b"\n"


@dataclass(frozen=True)
class Partial:
    """A directory being filled."""

    path: Path
    journal: Journal
    replaced: int  # bytes that a stopped conversion of something else had left there


def fingerprint(source: Source, outputs: Sequence[Output], *more: object) -> str:
    """What must be the same for a stopped conversion to go on: the source's files, everything
    that is done to every tensor, what computes it, and `more`."""
    said = [__version__, version("mlx"), device.backend(), *more]
    said += [*(stamp.lasting for stamp in source.stats.values()), *outputs]
    return hashlib.sha256("\n".join(map(repr, said)).encode()).hexdigest()


def check_free(destination: Path, what: str = "directory") -> None:
    """Raise CheckpointError unless `destination` can be made where it is wanted."""
    if destination.exists() or destination.is_symlink():
        raise CheckpointError(f"{destination} exists already; name a new {what}, or remove it")
    if not destination.absolute().parent.is_dir():
        raise CheckpointError(f"{destination.absolute().parent} does not exist; make it first")
    try:
        os.fsencode(destination.name).decode()
    except UnicodeDecodeError:
        raise CheckpointError(f"{destination.name!r} is not a UTF-8 name; choose another") from None


def require_space(destination: Path, needed: int, smaller: str) -> None:
    """Raise CheckpointError where fewer bytes are free; `smaller` says how to need fewer."""
    free = shutil.disk_usage(destination.absolute().parent).free
    if needed > free:
        raise CheckpointError(
            f"{destination} needs {human(needed)} of disk and {human(free)} are free;"
            f" free some space, name another disk, or {smaller}"
        )


def partial_of(destination: Path) -> Path:
    """Where `destination` is put together."""
    return destination.absolute().parent / f".{destination.name}.partial"


@contextmanager
def new_directory(destination: Path, identity: str, needed: int) -> Iterator[Partial]:
    """A directory to fill that becomes `destination` when all went well.

    When the process is stopped, the disk is full or a file can't be read it stays, to be resumed
    by a run with the same fingerprint `identity`; a CerebrumError of another kind removes it.
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
        _clear(partial, shards=not journal.entries, scratch=not journal.resumes)
        require_space(
            destination, needed - _size(partial) + _SLACK, "take fewer bits (-q --q-bits N)"
        )
        yield Partial(partial, journal, replaced)
        check_free(destination)
        shutil.rmtree(partial / SCRATCH, ignore_errors=True)
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
    except CerebrumError:  # whatever else happened, a GPU out of memory: as if it had been killed
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


def _clear(directory: Path, shards: bool = True, scratch: bool = True) -> None:
    """Remove everything but the journal, whose lock is held, and but the shards and the scratch
    folder if need be."""
    for file in directory.iterdir():
        if file.is_dir() and not file.is_symlink():
            if scratch or file.name != SCRATCH:
                shutil.rmtree(file)
        elif file.name != JOURNAL and (shards or file.suffix != ".safetensors"):
            file.unlink()


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*.safetensors"))


def _sync(path: Path) -> None:
    """Make a file, or the names in a directory, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems can't
            durable.sync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
