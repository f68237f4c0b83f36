"""One run at a time makes, or removes, the same thing."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.shelf.entries import PULLS
from mlx_cerebrum.shelf.places import folder
from mlx_cerebrum.text import tell


@contextmanager
def alone(key: str, wait: str | None) -> Iterator[Path]:
    """The folder that `key` is put together in, for this run only.

    wait: what is said, once, while another run has it; None: that is refused. Raises
    CheckpointError where it is, and where nothing can be written.
    """
    where = folder() / PULLS
    try:
        where.mkdir(parents=True, exist_ok=True)
        # It stays: whoever waits for a file that is removed waits for nothing.
        descriptor = os.open(where / f".{key}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise CheckpointError(
            f"{where} can't be written ({error.strerror}); choose another folder:"
            " mlx-cerebrum --models DIR ..."
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if wait is None:
                busy = f"{key} is being made by another run; stop that first"
                raise CheckpointError(busy) from None
            tell(wait)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield where / key
    finally:
        os.close(descriptor)
