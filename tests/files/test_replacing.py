"""A file is replaced by a whole one or not at all."""

import os
from pathlib import Path

import pytest

from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.files.replacing import replacing


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "file").write_text("before")
    return tmp_path / "file", tmp_path / ".file.partial"


def test_the_new_file_is_there_when_it_is_whole(places: tuple[Path, Path]) -> None:
    destination, partial = places
    with replacing(destination, partial, 0o600) as file:
        file.write(b"after")
        file.flush()
        assert destination.read_text() == "before"
    assert destination.read_text() == "after"
    assert destination.stat().st_mode & 0o777 == 0o600
    assert not partial.exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_was_there_stays(places: tuple[Path, Path], error: BaseException) -> None:
    destination, partial = places

    def fail() -> None:
        with replacing(destination, partial) as file:
            file.write(b"half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert destination.read_text() == "before"
    assert not partial.exists()


def test_what_a_killed_run_left_is_written_over(places: tuple[Path, Path]) -> None:
    destination, partial = places
    partial.write_text("a long rest of another run")
    with replacing(destination, partial) as file:
        file.write(b"after")
    assert destination.read_text() == "after"


def test_two_at_once(places: tuple[Path, Path]) -> None:
    destination, partial = places
    with replacing(destination, partial) as first:
        first.write(b"first")
        second = replacing(destination, partial)
        with pytest.raises(CheckpointError, match="another run is writing"), second:
            pytest.fail("both write")
    assert destination.read_text() == "first"


def test_no_link_is_followed(places: tuple[Path, Path], tmp_path: Path) -> None:
    destination, partial = places
    (tmp_path / "theirs").write_text("theirs")
    partial.symlink_to(tmp_path / "theirs")
    with pytest.raises(OSError, match="symbolic link"), replacing(destination, partial):
        pytest.fail("it was opened")
    assert (tmp_path / "theirs").read_text() == "theirs"
    assert destination.read_text() == "before"


def test_what_is_kept_to_oneself_stays_so(places: tuple[Path, Path]) -> None:
    """Also over the open rest of a killed run."""
    destination, partial = places
    partial.touch()
    partial.chmod(0o666)
    with replacing(destination, partial, 0o600) as file:
        file.write(b"after")
    assert destination.stat().st_mode & 0o777 == 0o600


def test_a_second_name_of_another_file_is_not_written(
    places: tuple[Path, Path], tmp_path: Path
) -> None:
    destination, partial = places
    (tmp_path / "theirs").write_text("theirs")
    partial.hardlink_to(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="in the way"), replacing(destination, partial):
        pytest.fail("it was opened")
    assert (tmp_path / "theirs").read_text() == "theirs"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's file")
def test_another_users_file_is_not_written(places: tuple[Path, Path]) -> None:
    destination, partial = places
    partial.touch()
    os.chown(partial, 65534, -1)
    with pytest.raises(CheckpointError, match="in the way"), replacing(destination, partial):
        pytest.fail("it was opened")
    assert destination.read_text() == "before"
