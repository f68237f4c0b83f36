"""bench.context on tiny models: caches filled as a prompt fills them, and rows that can fail.

Needs mlx-lm, and matplotlib for the pictures.
"""

import copy
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import MakeCheckpoint
from tiny import tiny_config

from bench import context, machine, plots
from bench.pair import open_pair
from bench.random_model import RandomCheckpoint
from bench.suite import Settings
from mlx_cerebrum.cache import WindowedKVCache
from mlx_cerebrum.config import ModelConfig
from mlx_cerebrum.decode import PREFILL_STEP, prefill
from mlx_cerebrum.load import choose_storage, load_model, planned_config
from mlx_cerebrum.model import Model

Results = dict[str, Any]
GEOMETRY = tiny_config(torch_dtype="bfloat16", sliding_window=100, max_position_embeddings=2048)


@pytest.fixture(scope="module")
def model() -> Model:
    raw = GEOMETRY | {"num_hidden_layers": 2, "max_position_embeddings": 8192}
    checkpoint = RandomCheckpoint(Path("tiny"), raw)
    return load_model(checkpoint, checkpoint.config, choose_storage(checkpoint, None, "auto"))


@pytest.mark.parametrize("window", [None, 100, 700])
@pytest.mark.parametrize("length", [1, 200, PREFILL_STEP, 2 * PREFILL_STEP, 5 * PREFILL_STEP + 77])
def test_filled_as_a_prompt_fills_it(model: Model, length: int, window: int | None) -> None:
    config = planned_config(model.config, None, window or 0)
    model = model.view(config.layer_map)
    model.config = config
    real = model.make_cache()
    prefill(model, mx.array([1 + n % 200 for n in range(length)]), real)
    filled = model.make_cache()
    for cache in filled:
        context.fill_ours(cache, length, config, model.model.norm.weight.dtype)
    assert [summary(cache) for cache in filled] == [summary(cache) for cache in real]
    model(mx.array([[5]]), filled)
    model(mx.array([[5]]), real)
    assert [summary(cache) for cache in filled] == [summary(cache) for cache in real]


def summary(cache: WindowedKVCache) -> tuple[Any, ...]:
    keys, values, *numbers = cache.state
    assert keys is not None
    assert values is not None
    return (cache.nbytes, cache.size(), cache.rewindable(), keys.shape, values.dtype, *numbers)


@pytest.mark.parametrize("length", [1, 300, 2048, 4096, 7000])
def test_mlx_lms_cache_is_filled_as_a_prompt_fills_it(model: Model, length: int) -> None:
    from mlx_lm.models.cache import KVCache

    config, dtype = model.config, model.model.norm.weight.dtype
    real, filled = KVCache(), KVCache()
    for start in range(0, length, 2048):
        rows = min(2048, length - start)
        shape = (1, config.num_key_value_heads, rows, config.head_dim)
        real.update_and_fetch(mx.zeros(shape, dtype), mx.zeros(shape, dtype))
    context.fill(filled, length, 2048, config, dtype)
    for cache in (real, filled):
        row = mx.zeros((1, config.num_key_value_heads, 1, config.head_dim), dtype)
        cache.update_and_fetch(row, row)
    assert filled.offset == real.offset
    assert filled.nbytes == real.nbytes
    assert filled.keys.dtype == real.keys.dtype


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    from conftest import write_checkpoint
    from tiny import tiny_weights

    folder = tmp_path_factory.mktemp("context")
    config = tiny_config(num_hidden_layers=8, vocab_size=260)  # 512 positions, a window of 12
    path = write_checkpoint(folder / "source", config, tiny_weights(config, seed=3))
    settings = Settings(work=folder, rounds=2, seconds=1, tokens=3, say=lambda line: None)
    found = context.measure(open_pair(str(path)), settings, (256, 512, 1536, 4096), GEOMETRY)
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def test_lengths_end_with_the_models_positions(results: Results) -> None:
    assert [row["length"] for row in results["model"]] == [256, 512]
    assert [row["length"] for row in results["random"]["lengths"]] == [256, 512, 1536]


def test_the_window_bounds_ours_and_not_mlx_lms(results: Results) -> None:
    random = results["random"]
    ours = [row["sides"][context.PLANS[0]]["kv"] for row in random["lengths"]]
    peers = [row["sides"][context.PEER]["kv"] for row in random["lengths"]]
    assert max(ours) <= random["most_held"]
    assert peers == sorted(peers)
    item = 2 if random["dtype"] == "bfloat16" else 4
    # 56 positions, 2 heads of 16, keys and values; room in steps of 256.
    assert peers[-1] in [56 * 2 * 32 * item * entries for entries in (1536, 1792)]
    base = [row["sides"][context.PLANS[1]]["kv"] for row in random["lengths"]]
    assert [a * 32 for a in ours] == [b * 56 for b in base]


def test_inside_the_window_both_compute_the_same(results: Results) -> None:
    assert results["random"]["logits_differ_by"] < 1e-3


def test_paces_and_ratios_are_there(results: Results) -> None:
    for row in results["random"]["lengths"]:
        assert row["rounds"] >= 1
        assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
        assert all(side["decode"]["median"] > 0 for side in row["sides"].values())
    assert results["model"][0]["ratio"] is None


def test_text_says_what_a_reader_must_know(results: Results) -> None:
    said = "\n".join(context.text(results))
    assert "window of 12 tokens" in said
    assert "do not compute the same function" in said
    assert f"mlx-lm {machine.version('mlx-lm')}" in said
    assert "never exceeded" in said
    doctored = copy.deepcopy(results)
    doctored["random"]["lengths"][0]["sides"][context.PLANS[0]]["kv"] = 10**12
    doctored["window"] = None
    said = "\n".join(context.text(doctored))
    assert "EXCEEDED" in said
    assert "has no window" in said


def test_text_and_plots_come_from_the_results_alone(results: Results, tmp_path: Path) -> None:
    before = json.dumps(results)
    assert context.text(results) == context.text(json.loads(before))
    pictures = context.plots(results, {})
    assert set(pictures) == {"context", "context-kv", "context-model"}
    for name, picture in pictures.items():
        assert all(path.stat().st_size for path in plots.save(picture, tmp_path, name))
    assert json.dumps(results) == before


def test_what_does_not_fit_is_a_row_that_says_so(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = open_pair(str(checkpoint(num_hidden_layers=8)))
    pair.models()
    config = ModelConfig.from_dict(GEOMETRY)
    # Room for a window of ours at any length, and for mlx-lm's caches at the shorter one only.
    room = 3 * 56 * config.kv_values_per_token() // 32 * 4 * 700
    monkeypatch.setattr("mlx_cerebrum.memory.available_bytes", lambda: room)
    settings = Settings(work=tmp_path, rounds=1, seconds=1, tokens=3, say=lambda line: None)
    wide = GEOMETRY | {"max_position_embeddings": 8192}
    found = context.measure(pair, settings, (512, 8192), wide)
    short, long = found["random"]["lengths"]
    assert context.PEER in short["sides"]
    assert context.PEER not in long["sides"]
    assert "are free" in long["missing"][context.PEER]
    assert long["ratio"] is None
    said = "\n".join(context.text(found))
    assert f"8192 tokens, {context.PEER}: not measured: a context of 8192 tokens needs" in said


def test_without_mlx_lm_ours_is_measured(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.machine.version", lambda package: None)
    settings = Settings(work=tmp_path, rounds=1, seconds=1, tokens=2, say=lambda line: None)
    found = context.measure(open_pair(str(checkpoint())), settings, (256,), GEOMETRY)
    assert found["random"]["names"] == list(context.PLANS)
    assert "mlx-lm is not installed" in "\n".join(context.text(found))
    context.plots(found, {})
