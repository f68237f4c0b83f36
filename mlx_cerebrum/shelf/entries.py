"""What is on the shelf, as its folders say: there is no list that could be wrong."""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_cerebrum.errors import CerebrumError, CheckpointError
from mlx_cerebrum.files import json_file
from mlx_cerebrum.shelf.places import SHORT, folder, name_of, short_name, split

_USED = ".used"  # an empty file whose time says when the model was last opened
PULLS = ".pulls"  # where models are put together, a folder each
STATE = "pull.json"


@dataclass(frozen=True)
class Entry:
    """A model on the shelf."""

    path: Path
    name: str
    bits: int  # a weight; 16: as stored; 0: a GGUF file's own

    @property
    def called(self) -> str:
        return f"{self.name}:{self.bits}bit" if self.bits else self.name

    @property
    def used(self) -> float:
        """When it was last opened, or made: seconds since 1970."""
        for file in (self.path / _USED, self.path / "config.json", self.path):
            with suppress(OSError):
                return file.stat().st_mtime
        return 0.0

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its config.json. Raises CheckpointError where that can't be read."""
        return json_file.read_object(self.path / "config.json", CheckpointError)

    @property
    def provenance(self) -> dict[str, Any]:
        """What its converter wrote of where it is from; empty for another tool's."""
        found = self.config.get("provenance")
        return found if isinstance(found, dict) else {}

    @property
    def nbytes(self) -> int:
        """Bytes of its files."""
        return sum(file.stat().st_size for file in self.path.iterdir() if file.is_file())

    @property
    def own_nbytes(self) -> int:
        """Bytes that removing it frees: of the files that no other model shares."""
        stats = [file.stat() for file in self.path.iterdir() if file.is_file()]
        return sum(stat.st_size for stat in stats if stat.st_nlink == 1)

    def mark_used(self) -> None:
        """Remember that it is opened now, where its folder may be written."""
        with suppress(OSError):
            (self.path / _USED).touch()
            os.utime(self.path / _USED)


@dataclass(frozen=True)
class Unfinished:
    """A model that is being made, or whose making was stopped."""

    path: Path
    state: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.state.get("name"))

    @property
    def bits(self) -> int:
        found = self.state.get("bits")
        return found if type(found) is int else 16


def entries() -> list[Entry]:
    """The models on the shelf, the last used first."""
    found = []
    for path in _folders(folder()):
        name, bits = name_of(path.name)
        if (path / "config.json").is_file():
            entry = Entry(path, name, bits or 16)
            found.append(entry if bits else Entry(path, name, _bits(entry)))
        elif any(path.glob("*.gguf")):
            found.append(Entry(path, path.name, 0))
    return sorted(found, key=lambda entry: (-entry.used, entry.called))


def unfinished() -> list[Unfinished]:
    """The models that are not whole yet."""
    found = []
    for path in _folders(folder() / PULLS):
        with suppress(CheckpointError):
            begun = Unfinished(path, json_file.read_object(path / STATE, CheckpointError))
            if find(f"{begun.name}:{begun.bits}bit") is None:  # else only tidying was stopped
                found.append(begun)
    return found


def find(name: str) -> Entry | None:
    """The model of this name; of several widths the last used one. None where it is not here.

    A name with a width, `NAME:8bit`, is that one only.
    """
    asked, bits = split(name)
    asked = short_name(asked) or asked
    for entry in entries():
        if bits in (None, entry.bits) and asked.lower() in (
            entry.name.lower(),
            entry.path.name.lower(),
        ):
            return entry
    return None


def require(name: str) -> Entry:
    """As `find`. Raises CheckpointError, with the names there are, where it is not here."""
    if (found := find(name)) is not None:
        return found
    names = ", ".join(entry.called for entry in entries()) or "nothing yet"
    hint = f"; get it with: mlx-cerebrum pull {name}" if split(name)[0] in SHORT else ""
    raise CheckpointError(f"{name} is not on the shelf, where there is {names}{hint}")


def _folders(where: Path) -> Iterator[Path]:
    with suppress(OSError):
        yield from (p for p in sorted(where.iterdir()) if p.name[0] != "." and p.is_dir())


def _bits(entry: Entry) -> int:
    with suppress(CerebrumError):
        quantization = entry.config.get("quantization")
        bits = quantization.get("bits") if isinstance(quantization, dict) else None
        return bits if type(bits) is int else 16
    return 16
