"""A process's time and memory, and why it failed."""

import pytest

from bench import process
from mlx_cerebrum.errors import CerebrumError


def test_time_and_memory() -> None:
    large = "held = b'x' * 700_000_000"
    found = process.cost(["timeit", "-n1", "-r1", large])
    assert 0 < found.seconds < 60
    assert 700_000_000 < found.peak_memory < 3_000_000_000


def test_what_went_wrong_is_said() -> None:
    with pytest.raises(CerebrumError, match=r"^python -m json\.tool: .*No such file"):
        process.cost(["json.tool", "/nowhere"])
