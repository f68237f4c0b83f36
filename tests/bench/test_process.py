"""A process's time and memory, and why it failed."""

from pathlib import Path

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


def test_a_process_that_was_ended_says_by_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ends.py").write_text("import os\nos.write(2, b'10%')\nos.kill(os.getpid(), 9)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(CerebrumError, match=r"ends: ended by Killed.*10%"):
        process.cost(["ends"])
