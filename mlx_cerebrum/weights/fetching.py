"""One large file from the hub to disk: continued where it stopped, and believed by its hash only.

Until it is whole it lies at `NAME.part`. So little is held back that a kill loses a piece.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from threading import Event

from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.text import tell
from mlx_cerebrum.weights.network import UnreachableError, pause
from mlx_cerebrum.weights.remote import Remote, RemoteFile

_WAITS = (1, 2, 4, 8, 15, 30, 30)  # seconds before each new try that brings nothing
_PIECE = 4_000_000  # bytes hashed at a time
_FLUSH = 100_000_000  # bytes after which the disk is set to work


class StoppedError(Exception):
    """Somebody set `stop`."""


def part_of(target: Path) -> Path:
    """Where a file lies until it is whole."""
    return target.with_name(f"{target.name}.part")


def there(target: Path) -> int:
    """Bytes of a file that have come."""
    return next((p.stat().st_size for p in (target, part_of(target)) if p.exists()), 0)


def fetch(
    remote: Remote, name: str, target: Path, came: Callable[[int], None], stop: Event
) -> None:
    """Bring a file to `target`, whole and with the hub's hash.

    came: called with how many bytes are there, as they come.
    Raises CheckpointError where it can't be had, or comes damaged twice; StoppedError.
    """
    file = remote.files[name]
    for second in (False, True):
        if not target.exists():
            digest = _hashed(part_of(target), file, stop)
            _rest(remote, file, target, digest, came, stop)
        else:
            digest = _hashed(target, file, stop)
        if file.hash in (None, digest.hexdigest()):
            came(file.nbytes)
            if not target.exists():
                part_of(target).replace(target)
            return
        wrong = f"its hash is {digest.hexdigest()[:12]}..., the hub's {file.hash[:12]}..."
        (target if target.exists() else part_of(target)).unlink()
        if second:
            raise CheckpointError(f"{remote.repo}/{name} came damaged twice: {wrong}")
        tell(f"{name} came damaged: {wrong}; it is fetched again")


def _hashed(path: Path, file: RemoteFile, stop: Event) -> "hashlib._Hash":
    """The hash of what is there, to go on with; a file that is too long is given up."""
    digest = file.digest()
    if not path.exists():
        return digest
    if path.stat().st_size > file.nbytes:
        path.unlink()
        return digest
    with path.open("rb", buffering=0) as read:
        while piece := read.read(_PIECE):
            if stop.is_set():
                raise StoppedError
            digest.update(piece)
    return digest


def _rest(
    remote: Remote,
    file: RemoteFile,
    target: Path,
    digest: "hashlib._Hash",
    came: Callable[[int], None],
    stop: Event,
) -> None:
    """Append what is missing, trying again for a while where the connection breaks off."""
    tries = 0
    with part_of(target).open("ab", buffering=0) as out:
        at = flushed = out.tell()
        came(at)
        while at < file.nbytes:
            before = at
            try:
                for piece in remote.stream(file.name, at):
                    _write(out.fileno(), piece)
                    digest.update(piece)
                    at += len(piece)
                    came(at)
                    if at - flushed > _FLUSH:
                        os.fsync(out.fileno())
                        flushed = at
                    if stop.is_set():
                        raise StoppedError
            except UnreachableError as error:
                tries = 0 if at > before else tries + 1
                if tries >= len(_WAITS):
                    raise CheckpointError(
                        f"{error}; what has come is kept: run the same command again to go on"
                    ) from error
                if stop.wait(pause(error, _WAITS[tries])):
                    raise StoppedError from None


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:  # a raw write may take less than it was given
        view = view[os.write(descriptor, view) :]
