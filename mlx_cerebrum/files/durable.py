"""What was written is on the disk, not in a cache that a power cut empties."""

import fcntl
import os

# macOS only. Its fsync(2) says: the drive's own cache may still hold the data, in any order.
_FULL: int | None = getattr(fcntl, "F_FULLFSYNC", None)


def sync(descriptor: int) -> None:
    """Wait until a file's bytes, or a directory's names, survive a power cut.

    Raises OSError where the disk fails, or can't do it at all.
    """
    if _FULL is not None:
        try:
            fcntl.fcntl(descriptor, _FULL)
            return
        except OSError:
            pass  # network shares and foreign file systems can't; a failing disk fails again below
    os.fsync(descriptor)
