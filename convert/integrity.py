"""What every pass over weight files checks on the way: SHA-256, and that values are finite.

Bytes are read once. The same buffer is hashed (on another thread, if wanted), looked through
for NaN and Inf, and handed to whoever needs the values.
"""

import contextlib
import hashlib
import os
import re
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.files.foreign import not_a_file

Bytes = npt.NDArray[np.uint8]

PIECE = 4_000_000  # bytes read, hashed and looked at in one go; a multiple of every item size
_QUEUED = 4  # pieces that may wait to be hashed

# As an unsigned integer, a float without its sign is finite below this: its exponent's bits.
_LIMITS: dict[str, tuple[type[np.unsignedinteger[Any]], type[np.signedinteger[Any]], int]] = {
    "F32": (np.uint32, np.int32, 0x7F80_0000),
    "F16": (np.uint16, np.int16, 0x7C00),
    "BF16": (np.uint16, np.int16, 0x7F80),
}
_SMALL = 100_000_000  # bytes of what is no weight file, and still read for its hash
_GIT_HASH = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def nonfinite(data: Bytes, dtype: str) -> int:
    """How many of the values in `data` (bytes, 1-D, contiguous) are NaN or infinite.

    `dtype` is safetensors' name; integers and 8-bit floats count as finite. Two maxima find
    whether there are any, without a copy: read as signed integers the largest positive value
    comes out on top, read as unsigned ones the largest negative.
    """
    if dtype not in _LIMITS or data.size == 0:
        return 0
    unsigned, signed, limit = _LIMITS[dtype]
    values = data.view(unsigned)
    sign = int(np.iinfo(unsigned).max // 2 + 1)
    if int(data.view(signed).max()) < limit and int(values.max()) < sign + limit:
        return 0
    return int(np.count_nonzero((values & unsigned(sign - 1)) >= limit))


def expected_sha256(file: Path) -> str | None:
    """The hash that the Hugging Face hub gave for a file it downloaded, where it left one.

    The hub's cache names the blob a link points to by its hash; `hf download --local-dir`
    notes it beside the files. Only large (LFS) files have a SHA-256; others a 40-digit git hash.
    """
    target = Path(os.path.realpath(file))
    if target.parent.name == "blobs":
        return target.name if _SHA256.fullmatch(target.name) else None
    note = file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
    try:
        _commit, etag, saved = note.read_text(encoding="utf-8").split()
        # A file edited since (a damaged one keeps its time) is no longer the hub's.
        unedited = file.stat().st_mtime <= float(saved) + 1
    except (OSError, ValueError):
        return None
    return etag if unedited and _SHA256.fullmatch(etag) else None


def recorded_sha256(config: Mapping[str, Any]) -> dict[str, str]:
    """What our converter wrote of the weight files into a config.json's provenance."""
    provenance = config.get("provenance")
    recorded = provenance.get("sha256") if isinstance(provenance, dict) else None
    found = recorded.items() if isinstance(recorded, dict) else ()
    return {file: sha256 for file, sha256 in found if isinstance(sha256, str)}


def known_sha256(file: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The hashes that are known of a weight file, by who gave them: `provenance`, `hub`."""
    known = {"provenance": recorded_sha256(config).get(file.name), "hub": expected_sha256(file)}
    return {source: sha256 for source, sha256 in known.items() if sha256}


def small_files(directory: Path) -> tuple[list[str], list[tuple[str, str, str]]]:
    """Config and tokenizer files against the hub's cache, which names a blob by its hash: SHA-256
    for large files, git's own (SHA-1) for the others.

    Returns the files that have one, and those that differ: (name, hash, the hub's).
    """
    compared: list[str] = []
    wrong: list[tuple[str, str, str]] = []
    for path in sorted(directory.iterdir()):
        if path.suffix == ".safetensors" or not path.is_file() or path.stat().st_size > _SMALL:
            continue
        blob = Path(os.path.realpath(path))
        wanted = expected_sha256(path)
        if wanted is not None:
            actual = hashlib.sha256(path.read_bytes()).hexdigest()
        elif blob.parent.name == "blobs" and _GIT_HASH.fullmatch(blob.name):
            wanted, data = blob.name, path.read_bytes()
            actual = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        else:
            continue
        compared.append(path.name)
        if actual != wanted:
            wrong.append((path.name, actual, wanted))
    return compared, wrong


class ReadError(CheckpointError):
    """A file could not be read just now; what was made of it so far is still good."""


class HashedFile:
    """A file read in mostly ascending order, each byte hashed once, as it is first read.

    `executor` (of one worker, so that updates stay in order; it may serve several files) takes
    the hashing off this thread. Arrays that `read` returns are read-only, because the hash
    may not have seen them yet. Not for use from several threads at once.
    """

    def __init__(
        self, path: Path, verify: bool = True, executor: ThreadPoolExecutor | None = None
    ) -> None:
        self.path = path
        if problem := not_a_file(path):  # a pipe would never end
            raise CheckpointError(problem)
        try:
            self._file = path.open("rb", buffering=0)  # the interpreter sets O_CLOEXEC
        except OSError as error:
            raise CheckpointError(f"{path} can't be read: {error.strerror}") from None
        stat = os.fstat(self._file.fileno())
        self.size, self._modified = stat.st_size, stat.st_mtime_ns
        if hasattr(os, "posix_fadvise"):  # not on macOS, which reads ahead anyway
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        self._digest = hashlib.sha256() if verify else None
        self._hashed = 0  # every byte before this one has been given to the digest
        self._executor = executor
        self._waiting: deque[Future[None]] = deque()

    def read(self, offset: int, nbytes: int) -> Bytes:
        """The `nbytes` bytes at `offset`; what lies before and was never read is hashed too.

        Raises CheckpointError when the file ends before they do, or can't be read.
        """
        self._skip_to(offset)
        data = self._load(offset, nbytes)
        self._hash(data[max(self._hashed - offset, 0) :])
        return data

    def finish(self) -> str | None:
        """Hash what is left, close, and return the file's SHA-256 (None without `verify`).

        Raises CheckpointError when the file changed since it was opened.
        """
        try:
            self._skip_to(self.size)
            while self._waiting:
                self._waiting.popleft().result()
            stat = os.fstat(self._file.fileno())
            if (stat.st_size, stat.st_mtime_ns) != (self.size, self._modified):
                raise CheckpointError(f"{self.path} changed while it was read; start again")
        finally:
            self.close()
        return None if self._digest is None else self._digest.hexdigest()

    def close(self) -> None:
        while self._waiting:  # what is still being hashed is not wanted any more
            self._waiting.popleft().cancel()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _skip_to(self, offset: int) -> None:
        if self._digest is not None:
            while self._hashed < offset:
                self._hash(self._load(self._hashed, min(PIECE, offset - self._hashed)))

    def _load(self, offset: int, nbytes: int) -> Bytes:
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:  # before memory is taken
            raise self._truncated(offset + nbytes)
        data = np.empty(nbytes, np.uint8)
        view, done = data.data, 0
        try:
            self._file.seek(offset)
            while done < nbytes:
                got = self._file.readinto(view[done:])
                if not got:
                    raise self._truncated(offset + nbytes)
                done += got
        except OSError as error:
            raise ReadError(f"{self.path} can't be read: {error.strerror}") from None
        data.flags.writeable = False
        return data

    def _truncated(self, end: int) -> CheckpointError:
        size = os.fstat(self._file.fileno()).st_size
        return CheckpointError(
            f"{self.path} is truncated, or changed while it was read: {size} bytes, not {end};"
            " download or copy it again"
        )

    def _hash(self, data: Bytes) -> None:
        """Give the bytes that follow the last hashed one to the digest."""
        if self._digest is None:
            return
        self._hashed += data.size
        if self._executor is None:
            self._digest.update(data.data)
            return
        for start in range(0, data.size, PIECE):
            while len(self._waiting) >= _QUEUED:
                self._waiting.popleft().result()
            piece = data.data[start : start + PIECE]
            self._waiting.append(self._executor.submit(self._digest.update, piece))
