"""The bench of formulas beside answers measures what it says."""

import pytest

from bench import typeset_pace
from mlx_cerebrum.typeset import tex, worker


def test_each_formula_is_another_and_is_set() -> None:
    sources = [typeset_pace._job(number)[1] for number in range(3)]
    assert len(set(sources)) == 3
    assert all(isinstance(worker.formula(source), tex.Element) for source in sources)
    worker.close()


@pytest.mark.long
def test_it_runs(demo: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert typeset_pace.main(["--seconds", "2", "--rounds", "1"]) == 0
    assert "| with / without" in capsys.readouterr().out
