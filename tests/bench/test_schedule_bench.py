"""python -m bench.schedule: every part of it on a tiny model, tokens and primitives compared."""

import json
from typing import Any

import pytest
from conftest import MakeCheckpoint

from bench import schedule
from mlx_cerebrum import device


def measured(
    checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str], *flags: str, **config: Any
) -> dict[str, Any]:
    path = str(checkpoint("tiny", **config))
    quick = ["--rows", "2", "5", "--tokens", "3", "--rounds", "2"]
    assert schedule.main(["--model", path, *quick, *flags]) == 0
    said, _, line = capsys.readouterr().out.strip().rpartition("\n")
    results: dict[str, Any] = json.loads(line)["results"]
    for paragraph in schedule.text(results):
        assert paragraph in said
    found: dict[str, Any] = results["tiny"]
    return found


def holds(found: dict[str, Any]) -> None:
    for compared in (found["orders"], *found["rows"].values(), found["halves"]):
        assert compared["equal"] == compared["compared"] > 0
    assert found["draws"]["float32"]["changed"] == 0
    assert found["draws"]["bfloat16"]["draws"] > 0
    for companies in found["graph"].values():
        for sides in companies.values():
            assert sides["ours"]["kernels"] <= sides["mlx-lm"]["kernels"]


@pytest.mark.parametrize("window", [24, pytest.param(None, marks=pytest.mark.long)])
@pytest.mark.long
def test_all_parts(
    checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str], window: int | None
) -> None:
    """The window is shorter than the prompts."""
    found = measured(checkpoint, capsys, sliding_window=window)
    holds(found)
    assert (found["positions"], found["schedule"]) == ([8, 14], 14)
    assert set(found["rows"]) == {"2", "5"}
    assert found["read"]["at once"] < found["read"]["one after the other"]


def test_a_part_alone_and_packed_weights(
    checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    found = measured(
        checkpoint, capsys, "--only", "orders", "--q-bits", "4", hidden_size=64, head_dim=32
    )
    assert found["bits"] == 4
    assert {"orders", "read"} <= set(found)
    assert not {"rows", "halves", "draws", "graph"} & set(found)


@pytest.mark.metal
@pytest.mark.skipif(device.backend() != "metal", reason="needs Metal (macOS arm64)")
def test_all_parts_on_metal(checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]) -> None:
    """Answers alone and in company are the same there too, in float32."""
    holds(measured(checkpoint, capsys, head_dim=64, torch_dtype="float32"))
