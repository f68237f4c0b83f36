"""python -m bench.ranks: each part on a tiny model, whose machines say the same."""

import json
from typing import Any

import pytest
from conftest import MakeCheckpoint

from bench import ranks
from mlx_cerebrum.errors import CerebrumError

QUICK = ["--prompt", "40", "--beside", "20", "--rows", "2", "--tokens", "3", "--rounds", "1"]


@pytest.mark.long
def test_all_parts(checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(checkpoint("tiny", torch_dtype="float32"))
    assert ranks.main(["--model", path, *QUICK]) == 0
    said, _, line = capsys.readouterr().out.strip().rpartition("\n")
    results: dict[str, Any] = json.loads(line)["results"]
    for paragraph in ranks.text(results):
        assert paragraph in said
    assert set(results["answers"]) == {"1", "2"}
    for found in (
        *(results[part] for part in ("prompt", "apart", "beside")),
        *results["answers"].values(),
    ):
        assert found["same"]
        assert all(len(each["pace"]) == 1 for each in found["sides"].values())
    assert set(results["apart"]["sides"]) == {ranks.ONE, ranks.APART}


def test_what_went_wrong_is_said() -> None:
    with pytest.raises(CerebrumError, match=r"bench\.ranks_work: .*nowhere"):
        ranks.processes(["prompt", "--model", "nowhere/at-all"])


def test_figures_as_text() -> None:
    pace = {"pace": [10.0, 12.0]}
    both = {ranks.ONE: pace, ranks.TWO: {"pace": [15.0, 15.0]}}
    beside = {side: {**each, "first": [2.0], "gap": [0.25]} for side, each in both.items()}
    found = {"prompt_tokens": 64, "beside_tokens": 8, "rows": 4}
    said = ranks.text(
        found
        | {"prompt": {"same": True, "sides": both}}
        | {"answers": {"1": {"same": True, "sides": both}, "4": {"same": False, "sides": both}}}
        | {"beside": {"same": True, "sides": beside}}
    )
    assert "1.38 (1.25-1.50)" in said[1]
    assert said[2] == "All said the same. NOT all said the same."
    assert "0.25 (0.25-0.25)" in said[-1]
