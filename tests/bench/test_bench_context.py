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

from bench import context, context_sides, machine, plots
from bench.copies import Copies
from bench.memory import NARROW
from bench.pair import open_pair
from bench.random_model import RandomCheckpoint
from bench.suite import Effort, escaped
from mlx_cerebrum.decoding.decode import prefill, prefill_step
from mlx_cerebrum.errors import MemoryBudgetError, RequestError
from mlx_cerebrum.model.cache import WindowedKVCache
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.weights.loading import load_model
from mlx_cerebrum.weights.opening import planned_config
from mlx_cerebrum.weights.storage import choose_storage

Results = dict[str, Any]
GEOMETRY = tiny_config(torch_dtype="bfloat16", sliding_window=100, max_position_embeddings=2048)
CHUNK = prefill_step()


@pytest.fixture(scope="module")
def model() -> Model:
    raw = GEOMETRY | {"num_hidden_layers": 2, "max_position_embeddings": 8192}
    checkpoint = RandomCheckpoint(Path("tiny"), raw)
    return load_model(checkpoint, checkpoint.config, choose_storage(checkpoint, None, "auto"))


@pytest.mark.parametrize("window", [None, 100, 700])
@pytest.mark.parametrize(
    "length", [1, 200, prefill_step(), 2 * prefill_step(), 5 * prefill_step() + 77]
)
def test_filled_as_a_prompt_fills_it(model: Model, length: int, window: int | None) -> None:
    config = planned_config(model.config, None, window or 0)
    model = model.view(config.layer_map)
    model.config = config
    real = model.make_cache()
    prefill(model, mx.array([1 + n % 200 for n in range(length)]), real)
    filled = model.make_cache()
    for cache in filled:
        context_sides.fill_ours(cache, length, config, model.dtype)
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

    config, dtype = model.config, model.dtype
    real, filled = KVCache(), KVCache()
    for start in range(0, length, 2048):
        rows = min(2048, length - start)
        shape = (1, config.num_key_value_heads, rows, config.head_dim)
        real.update_and_fetch(mx.zeros(shape, dtype), mx.zeros(shape, dtype))
    context_sides.fill(filled, length, 2048, config, dtype)
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
    settings = Effort(work=folder, rounds=2, seconds=1, tokens=3, say=lambda line: None)
    found = context.measure(open_pair(str(path)), settings, (256, 512, 1536, 4096), GEOMETRY)
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def test_lengths_end_with_the_models_positions(results: Results) -> None:
    assert [row["length"] for row in results["model"]["lengths"]] == [256, 512]
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
    for part in ("model", "random"):
        peers = results[part]["peers"]
        assert peers
        assert all(peer["logits_differ_by"] < 1e-3 for peer in peers.values())


def test_paces_and_ratios_are_there(results: Results) -> None:
    for part in ("model", "random"):
        for row in results[part]["lengths"]:
            assert row["rounds"] >= 1
            assert set(row["ratios"]) == set(results[part]["peers"])
            for ratio in row["ratios"].values():
                assert ratio["low"] <= ratio["median"] <= ratio["high"]
            assert all(side["decode"]["median"] > 0 for side in row["sides"].values())


def test_mlx_lm_runs_each_side_of_the_model_itself(results: Results) -> None:
    a, b = results["names"]
    model = results["model"]
    peers = {f"mlx-lm, {a}": a, f"mlx-lm, {b}": b}
    assert {name: peer["of"] for name, peer in model["peers"].items()} == peers
    assert model["peers_missing"] == {}
    for row in model["lengths"]:
        held = {name: side["kv"] for name, side in row["sides"].items()}
        # The formula makes 14 positions of 8 blocks; mlx-lm has a layer for each, and no window.
        assert held[f"mlx-lm, {a}"] * 14 == held[f"mlx-lm, {b}"] * 8
        assert held[f"mlx-lm, {a}"] >= held[a]
    said = "\n".join(context.text(results))
    assert f"ours / mlx-lm, {a}" in said
    assert f"ours / mlx-lm, {b}" in said
    assert "Past 12 tokens it attends to all" in said


def test_a_ratio_is_ours_over_the_peer_of_the_same_side(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours at a pace of twice its positions, mlx-lm at its layers: swapped it would be a half."""

    def ours(model: Model, length: int, tokens: int) -> Any:
        return (lambda: 2.0 * model.config.num_positions), []

    def peer(model: Any, config: ModelConfig, length: int, tokens: int) -> Any:
        return (lambda: 1.0 * len(model.layers)), []

    monkeypatch.setattr(context, "ours", ours)
    monkeypatch.setattr(context, "peer", peer)
    settings = Effort(work=tmp_path, rounds=2, seconds=1, tokens=3, say=lambda line: None)
    path = checkpoint(num_hidden_layers=8)
    found = context.measure(open_pair(str(path)), settings, (256,), GEOMETRY)
    two = {"median": 2.0, "low": 2.0, "high": 2.0}
    assert [list(row["ratios"].values()) for row in found["model"]["lengths"]] == [[two, two]]
    assert [row["ratios"] for row in found["random"]["lengths"]] == [{context.PEER: two}]
    assert "\n".join(context.text(found)).count("2.00 (2.00-2.00)") == 3


def test_a_side_that_mlx_lm_can_not_run_says_why(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Copies.directory

    def directory(self: Copies) -> Path:
        if self.side.plan is None:
            return whole(self)
        raise RequestError("the disk is full")

    monkeypatch.setattr(Copies, "directory", directory)
    settings = Effort(work=tmp_path, rounds=1, seconds=1, tokens=3, say=lambda line: None)
    path = checkpoint(num_hidden_layers=8)
    pair = open_pair(str(path))
    found = context.measure(pair, settings, (256,), GEOMETRY)
    a, b = pair.names
    assert found["model"]["peers_missing"] == {f"mlx-lm, {b}": "the disk is full"}
    assert set(found["model"]["lengths"][0]["sides"]) == {a, b, f"mlx-lm, {a}"}
    said = "\n".join(context.text(found))
    assert f"mlx-lm, {b}: not measured: the disk is full" in said
    assert f"ours / mlx-lm, {b}" not in said


def test_a_copy_that_would_not_fit_is_not_even_written(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = open_pair(str(checkpoint(num_hidden_layers=8)))
    pair.models()
    a, b = (model.config for model in pair.models())
    stored = pair.storage().nbytes
    unrolled = stored * b.executed_parameters // b.stored_parameters
    assert stored < unrolled
    written = []
    monkeypatch.setattr(Copies, "directory", lambda self: written.append(self.side.name))
    monkeypatch.setattr(
        "mlx_cerebrum.model.memory.available_bytes", lambda: (stored + unrolled) // 2
    )
    settings = Effort(work=tmp_path, say=lambda line: None)
    with pytest.raises(MemoryBudgetError, match="are free"):
        context._copy(pair, pair.b, b, settings)
    assert written == []
    monkeypatch.setattr(context, "load_peer", lambda directory, dtype: None)
    context._copy(pair, pair.a, a, settings)
    assert written == [pair.a.name]
    assert list(tmp_path.iterdir()) == [pair.path]


def test_what_bytes_alone_allow_is_arithmetic(results: Results) -> None:
    """By hand: the 7B has 218,112,000 parameters a block, 131,076,096 beside the embedding."""
    rows = {row["length"]: row["ratios"] for row in results["random"]["bytes_alone"]}
    assert list(rows) == [4096, 16384, 32768]
    weights = 56 * 218_112_000 + 32000 * 4096 + 4096
    token = 56 * 2 * 8 * 128 * 2  # bytes of keys and values
    for kind, bits in (("bf16", 16), ("4-bit", 4.5)):
        name = f"cerebrum-12.25b, {kind}"
        for length in rows:
            full, seen = (weights * bits / 8 + n * token for n in (length, 4096))
            assert rows[length][name] == pytest.approx(full / seen, abs=1e-4)
    said = "\n".join(context.text(results))
    assert "| context, from bytes alone |" in said
    assert rows[32768]["cerebrum-12.25b, bf16"] < rows[32768]["cerebrum-12.25b, 4-bit"]


def test_the_narrow_geometry_says_more_of_the_window_than_full_size_would() -> None:
    config = planned_config(ModelConfig.from_dict(NARROW), context.PLANS[0], None)
    (near, *_, far) = context._bytes_alone(config)
    assert set(near["ratios"].values()) == {1.0}
    assert far["ratios"]["narrow"] > far["ratios"]["cerebrum-12.25b, 4-bit"] > 1.5


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
        assert plots.save(picture, tmp_path, name).stat().st_size
    assert json.dumps(results) == before


def test_names_of_others_stay_text(results: Results) -> None:
    """Names are keys here: escaped, they must still find what they name."""
    a, hostile = results["names"][0], "``` <b> | [x](http://y)"
    renamed = json.loads(json.dumps(results).replace(a, hostile))
    said = "\n".join(context.text(escaped(renamed)))
    assert f"ours / mlx-lm, {escaped(hostile)}" in said
    assert hostile not in said
    assert not {"<", "`", "["} & set(said)


def test_what_does_not_fit_is_a_row_that_says_so(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = open_pair(str(checkpoint(num_hidden_layers=8)))
    pair.models()
    config = ModelConfig.from_dict(GEOMETRY)
    # Room for a window of ours at any length, and for mlx-lm's caches at the shorter one only.
    room = 3 * 56 * config.kv_values_per_token() // 32 * 4 * 700
    monkeypatch.setattr("mlx_cerebrum.model.memory.available_bytes", lambda: room)
    settings = Effort(work=tmp_path, rounds=1, seconds=1, tokens=3, say=lambda line: None)
    wide = GEOMETRY | {"max_position_embeddings": 8192}
    found = context.measure(pair, settings, (512, 8192), wide)
    short, long = found["random"]["lengths"]
    assert context.PEER in short["sides"]
    assert context.PEER not in long["sides"]
    assert "are free" in long["missing"][context.PEER]
    assert long["ratios"] == {}
    said = "\n".join(context.text(found))
    assert f"8192 tokens, {context.PEER}: not measured: a context of 8192 tokens needs" in said


def test_without_mlx_lm_ours_is_measured(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.machine.version", lambda package: None)
    settings = Effort(work=tmp_path, rounds=1, seconds=1, tokens=2, say=lambda line: None)
    found = context.measure(open_pair(str(checkpoint())), settings, (256,), GEOMETRY)
    assert found["random"]["names"] == list(context.PLANS)
    assert found["model"]["peers"] == found["model"]["peers_missing"] == {}
    assert "mlx-lm is not installed" in "\n".join(context.text(found))
    context.plots(found, {})
