"""Calibration: the divergence is the right number, and what matters ranks above what does not."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import SMALL, MakeCheckpoint, resting, slow, write_checkpoint
from tiny import tiny_config, tiny_weights

from convert.calibrate import LENGTH, Probe, calibrate, calibration_bytes, main, sample
from convert.recipe import Sensitivity
from mlx_cerebrum.errors import ConfigError, MemoryBudgetError, RequestError
from mlx_cerebrum.model import memory
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.tensors import EMBEDDING, HEAD, MATRICES, module_path
from mlx_cerebrum.weights.loading import load_model
from mlx_cerebrum.weights.opening import open_checkpoint
from mlx_cerebrum.weights.quantize import Packing
from mlx_cerebrum.weights.storage import choose_storage

TEXT = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(2 * LENGTH))
TWICE = (0, 1, 2, 3, 2, 3, 4, 5, 6, 7)
PACKING = Packing(3, 64)


def loaded(path: Path, layer_map: tuple[int, ...] | None = None) -> Model:
    source = open_checkpoint(path)
    config = source.config if layer_map is None else source.config.with_map(layer_map)
    return load_model(source, config, choose_storage(source, None, "float32"))


def divergence(path: Path, layer_map: tuple[int, ...], block: int, ids: mx.array) -> float:
    """By plain means: KL(dense || down_proj of one block rounded), two whole models."""
    dense, changed = loaded(path, layer_map), loaded(path, layer_map)
    linear = changed.model.layers[block].mlp.down_proj
    linear.weight = PACKING.dequantize(PACKING.quantize(linear.weight), mx.float32)
    p, q = (np.array(m(ids), dtype=np.float64) for m in (dense, changed))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layer_map", [tuple(range(8)), TWICE])
@pytest.mark.one_in(8)
def test_the_divergence_is_that_of_the_whole_model(
    checkpoint: MakeCheckpoint, layer_map: tuple[int, ...], tied: bool
) -> None:
    path = checkpoint(tie_word_embeddings=tied)
    ids = mx.array([[1, *range(5, 5 + 39)], [1, *range(90, 90 + 39)]], dtype=mx.int32)
    found = dict(Probe(loaded(path, layer_map), ids).measure(PACKING))
    assert len(found) == 2 + 8 * len(MATRICES)
    for block in (0, 3, 7):
        expected = divergence(path, layer_map, block, ids)
        assert expected > 1e-6
        measured = found[module_path(block, "mlp.down_proj")]
        assert measured == pytest.approx(expected, rel=0.05, abs=2e-6)
    assert found[EMBEDDING] > 0
    assert found[HEAD] > 0


def test_measuring_leaves_the_weights_as_they_were(checkpoint: MakeCheckpoint) -> None:
    ids = mx.array([list(range(5, 25))], dtype=mx.int32)
    model = loaded(checkpoint())
    before = np.array(model(ids))
    list(Probe(model, ids).measure(PACKING))
    assert np.abs(np.array(model(ids)) - before).max() < 1e-5  # unfused: other matmul shapes


@slow
def test_a_block_that_matters_ranks_above_one_that_does_not(tmp_path: Path) -> None:
    config = tiny_config(**SMALL | {"num_hidden_layers": 4})
    weights = tiny_weights(config, seed=3)
    for block, factor in ((1, 20.0), (2, 0.0)):
        for write in ("self_attn.o_proj", "mlp.down_proj"):
            weights[f"model.layers.{block}.{write}.weight"] *= np.float32(factor)
    source = open_checkpoint(write_checkpoint(tmp_path / "source", config, weights))
    steps: list[tuple[int, int]] = []
    table = calibrate(
        source, source.config, TEXT, tokens=LENGTH, progress=lambda *step: steps.append(step)
    )
    total = [sum(table.blocks[kind][block] for kind in MATRICES) for block in range(4)]
    assert total.index(max(total)) == 1
    assert total[2] < 1e-5 < min(total[0], total[1], total[3])
    assert steps == [(n, 30) for n in range(1, 31)]
    assert table.packing == Packing(4, 64)


@pytest.mark.long
def test_a_block_is_measured_as_often_as_the_plan_runs_it(checkpoint: MakeCheckpoint) -> None:
    source = open_checkpoint(checkpoint(num_hidden_layers=4))
    config = source.config.with_map((0, 1, 1, 1, 1, 3))
    once = calibrate(source, source.config, TEXT, tokens=LENGTH)
    often = calibrate(source, config, TEXT, tokens=LENGTH)
    kind = "mlp.down_proj"
    assert often.layer_map == config.layer_map
    assert often.blocks[kind][1] > 1.5 * once.blocks[kind][1]
    assert often.blocks[kind][2] == 0.0  # never runs
    assert often.at(module_path(1, kind), config) == pytest.approx(often.blocks[kind][1])


def test_the_sample_is_spread_over_the_text(checkpoint: MakeCheckpoint) -> None:
    tokenizer = open_checkpoint(checkpoint()).tokenizer()
    ids = tokenizer.encode(TEXT)
    found = sample(tokenizer, TEXT, 2 * LENGTH)
    assert found.tolist() == [ids[:LENGTH], [ids[0], *ids[1 - LENGTH :]]]  # each behind a BOS
    assert sample(tokenizer, TEXT, 1).shape == (1, LENGTH)


def test_memory_is_asked_for_first(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(checkpoint())
    needed = calibration_bytes(source.config, LENGTH, 4)
    monkeypatch.setattr(memory, "available_bytes", lambda: needed // 2)
    with pytest.raises(MemoryBudgetError) as caught:
        calibrate(source, source.config, TEXT, tokens=LENGTH)
    message = str(caught.value)
    assert memory.human(needed) in message
    assert memory.human(needed // 2) in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "packing", "error", "says"),
    [
        ("short", None, RequestError, "has 5 tokens; give at least 255"),
        (TEXT, Packing(4, 128), ConfigError, "does not divide into 4-bit groups of 128"),
    ],
)
def test_refused_in_one_line(
    checkpoint: MakeCheckpoint, text: str, packing: Any, error: type[Exception], says: str
) -> None:
    source = open_checkpoint(checkpoint())
    with pytest.raises(error, match=says):
        calibrate(source, source.config, text, packing=packing)


def test_prediction_covers_what_is_used(checkpoint: MakeCheckpoint) -> None:
    source = open_checkpoint(checkpoint(num_hidden_layers=2))
    before = resting()
    calibrate(source, source.config, TEXT, tokens=LENGTH)
    used = mx.get_peak_memory() - before
    predicted = calibration_bytes(source.config, LENGTH, 4)
    assert 0.5 * predicted < used <= predicted


def test_the_command_keeps_a_table(
    checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, text, out = checkpoint(num_hidden_layers=2), tmp_path / "text", tmp_path / "t.json"
    command = ["--hf-path", str(source), "--text", str(text), "--tokens", "1", "--out", str(out)]
    assert main(command) == 2
    assert "can't be read as UTF-8 text" in capsys.readouterr().err
    text.write_text(TEXT)
    assert main(command) == 0
    table = Sensitivity.load(out)
    assert table.num_blocks == 2
    assert table.provenance["tokens"] == LENGTH
