"""What a conversion takes of a disk: what it asks for, and what lies there at most."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from convert import destination
from mlx_cerebrum.files import durable


@dataclass
class Disk:
    """Bytes, of everything under one folder."""

    needed: int = 0
    held: int = 0


def watch_disk(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Disk:
    """Looks at the folder whenever a file is whole, or the scratch is removed."""
    found = Disk()
    sync, rmtree, require = durable.sync, shutil.rmtree, destination.require_space

    def look() -> None:
        held = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        found.held = max(found.held, held)

    def syncing(descriptor: int) -> None:
        look()
        sync(descriptor)

    def removing(*args: Any, **kwargs: Any) -> None:
        look()
        rmtree(*args, **kwargs)

    def requiring(path: Path, needed: int, smaller: str) -> None:
        found.needed = max(found.needed, needed - destination._SLACK)
        require(path, needed, smaller)

    monkeypatch.setattr(durable, "sync", syncing)
    monkeypatch.setattr(shutil, "rmtree", removing)
    monkeypatch.setattr(destination, "require_space", requiring)
    return found
