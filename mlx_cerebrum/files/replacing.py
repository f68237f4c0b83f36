"""A file is replaced by a whole one or not at all."""

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.files import durable


@contextmanager
def replacing(destination: Path, partial: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A file at `partial` to write to; when all went well, it takes `destination`'s name.

    Otherwise it is removed, and what was there stays. `partial` lies in the same directory. It is
    locked while it is written, and what a killed run left there is overwritten. `mode` is the new
    file's, less the umask. Raises CheckpointError where another run is writing it or somebody
    else made it, OSError where the disk fails.
    """
    with os.fdopen(_opened(partial, mode), "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file.fileno()), partial.stat()):
                raise BlockingIOError  # what was locked has been renamed meanwhile
        except (BlockingIOError, FileNotFoundError):
            raise CheckpointError(f"another run is writing {destination}; wait for it") from None
        try:
            file.truncate(0)
            yield file
            file.flush()
            durable.sync(file.fileno())
            partial.replace(destination)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    folder = os.open(destination.absolute().parent, os.O_RDONLY)
    try:
        durable.sync(folder)  # the new name, too, survives a power cut
    finally:
        os.close(folder)


def _opened(partial: Path, mode: int) -> int:
    """Open the file to write: a new one, or what an earlier run of this user left.

    In a directory that several users write to, somebody else could have put a link there to have
    another file overwritten, or a file of their own to read what is written.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(partial, flags | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        handle = os.open(partial, flags | os.O_CREAT | os.O_NONBLOCK, mode)
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink > 1:
        os.close(handle)
        raise CheckpointError(f"{partial} is in the way and not of this user's making; remove it")
    if not mode & 0o077:
        os.fchmod(handle, mode)
    return handle
