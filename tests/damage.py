"""Files as bad luck, and the hub's cache, leave them."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def flip(file: Path, at: int) -> None:
    """One bit, the file's time kept: as a disk does it."""
    times = file.stat()
    with file.open("r+b") as f:
        f.seek(at)
        byte = f.read(1)[0]
        f.seek(at)
        f.write(bytes([byte ^ 1]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def hub_copy(source: Path, root: Path) -> Path:
    """The source as the hub's cache holds it: links to blobs named by their hash."""
    snapshot, blobs = root / "repo" / "snapshots" / "c0ffee", root / "repo" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in source.iterdir():
        data = file.read_bytes()
        large = file.suffix == ".safetensors"
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        name = hashlib.sha256(data).hexdigest() if large else git
        (blobs / name).write_bytes(data)
        (snapshot / file.name).symlink_to(Path("../../blobs") / name)
    return snapshot


def stopping_at(number: int, save: Callable[..., None]) -> Callable[..., None]:
    """`save`, but instead of its call of this `number`, counted from 1, Ctrl-C comes."""
    calls = 0

    def saving(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            raise KeyboardInterrupt
        save(*args)

    return saving
