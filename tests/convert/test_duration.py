"""How long a calibrated recipe will take is measured, and said once nothing is refused any more."""

from pathlib import Path

import mlx.core as mx
import pytest
from conftest import MakeCheckpoint
from tiny import tiny_config

from convert import duration
from convert.__main__ import main
from convert.distilled import EPOCHS
from mlx_cerebrum.model.config import ModelConfig


def seconds(method: str, config: ModelConfig, tokens: int, blocks: int = 2) -> float:
    return duration.predicted_seconds(method, config, tokens, blocks, mx.float32)


def test_more_tokens_and_more_work_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duration, "_timed", lambda work: (work(), 1.0))  # whatever it is
    config = ModelConfig.from_dict(tiny_config(num_hidden_layers=2))
    once, twice = (seconds("gptq", config, n) for n in (512, 1024))
    assert twice - once == 2 * 2  # a pass and its sums, at each of two positions
    assert seconds("dwq", config, 512) > once + 4 * 2 * EPOCHS
    copies = seconds("gptq", config, 512, blocks=1)
    assert copies - 2 * 2 == (once - 2 * 2) / 2  # a block that is there twice is packed once


@pytest.mark.parametrize("hidden", [64, 72])  # 72 are no groups, and only some matrices packed
def test_it_is_measured(hidden: int) -> None:
    config = ModelConfig.from_dict(tiny_config(num_hidden_layers=2, hidden_size=hidden))
    assert 0 < seconds("dwq", config, 1024) < 600


@pytest.mark.parametrize("recipe", ["gptq", "dwq"])
def test_what_is_refused_is_not_timed_first(
    checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str
) -> None:
    words = ["--hf-path", str(checkpoint()), "--mlx-path", str(tmp_path / "x"), "-q"]
    words += ["--q-group-size", "32", "--q-recipe", recipe, "--calibrate-tokens", "5"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said == "error: 5 tokens of calibration are not from 512 to 65536\n"
