"""The limit of open files is the user's."""

import resource
from pathlib import Path

import pytest

from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.files.open_files import raise_limit

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("limits", "wanted", "found", "left"),
    [
        ((100, 1000), 500, 500, (500, 1000)),
        ((100, 300), 500, 300, (300, 300)),
        ((800, 1000), 500, 500, (800, 1000)),
        ((100, resource.RLIM_INFINITY), 500, 500, (500, resource.RLIM_INFINITY)),
        ((resource.RLIM_INFINITY,) * 2, 500, 500, (resource.RLIM_INFINITY,) * 2),
    ],
)
def test_as_many_files_as_can_be(
    monkeypatch: pytest.MonkeyPatch,
    limits: tuple[int, int],
    wanted: int,
    found: int,
    left: tuple[int, int],
) -> None:
    now = [limits]
    monkeypatch.setattr(resource, "getrlimit", lambda _: now[0])
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: now.__setitem__(0, new))
    assert raise_limit(wanted, 100, "a test") == found
    assert now == [left]
    with pytest.raises(
        RequestError, match=r"may be open and a test needs 501; raise it: ulimit -n 501"
    ):
        raise_limit(wanted, 501, "a test")


def test_a_limit_that_the_system_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert raise_limit(20_000, 100, "a test") == 256
