"""What is made to last; macOS's way through an fcntl of the test's own."""

import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from convert.destination import Journal
from mlx_cerebrum.files import durable
from mlx_cerebrum.files.replacing import replacing

FULL = 51  # F_FULLFSYNC in macOS's fcntl.h


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is flushed to the medium, as on macOS: a file's bytes then, or "folder"."""
    flushed: list[str] = []
    real = fcntl.fcntl

    def call(descriptor: int, command: int, *more: Any) -> Any:
        if command != FULL:
            return real(descriptor, command, *more)
        found = os.fstat(descriptor)
        whole = stat.S_ISDIR(found.st_mode)
        flushed.append("folder" if whole else os.pread(descriptor, found.st_size, 0).decode())
        return 0

    monkeypatch.setattr(durable, "_FULL", FULL)
    monkeypatch.setattr(fcntl, "fcntl", call)
    return flushed


def test_a_replaced_file_is_on_the_medium_before_it_has_the_name(
    mac: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.replace

    def renamed(self: Path, target: Path) -> Path:
        mac.append("renamed")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", renamed)
    with replacing(tmp_path / "file", tmp_path / ".file") as file:
        file.write(b"after")
    assert mac == ["after", "renamed", "folder"]


def test_so_is_a_conversions_journal(mac: list[str], tmp_path: Path) -> None:
    journal = Journal(tmp_path, "id")
    journal.add("module", "hash")
    journal.sync()
    journal.close()
    assert [line.count("\n") for line in mac] == [2]


def test_where_a_file_system_can_not_fsync_has_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unable(*_: Any) -> int:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    done: list[int] = []
    monkeypatch.setattr(durable, "_FULL", FULL)
    monkeypatch.setattr(fcntl, "fcntl", unable)
    monkeypatch.setattr(os, "fsync", done.append)
    durable.sync(7)
    assert done == [7]
