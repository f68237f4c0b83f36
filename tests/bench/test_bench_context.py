"""bench.context on tiny models: caches filled as a prompt fills them, and rows that can fail.

Needs matplotlib for the pictures.
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import MakeCheckpoint, slow
from tiny import tiny_config

from bench import context, plots
from bench.copies import Copies
from bench.pair import open_pair
from bench.random_model import RandomCheckpoint
from bench.suite import Effort, escaped
from mlx_cerebrum.decoding.decode import prefill, prefill_step
from mlx_cerebrum.errors import MemoryBudgetError, RequestError
from mlx_cerebrum.model.cache import WindowedKVCache
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.weights.opening import ModelSpec, Opened

Results = dict[str, Any]
GEOMETRY = tiny_config(torch_dtype="bfloat16", sliding_window=100, max_position_embeddings=2048)
CHUNK = prefill_step()


def effort(work: Path) -> Effort:
    return Effort(work=work, rounds=2, seconds=1, tokens=3, say=lambda line: None)


@pytest.mark.parametrize("window", [0, 100, 700])
@pytest.mark.parametrize("length", [1, CHUNK, 5 * CHUNK + 77])
def test_filled_as_a_prompt_fills_it(length: int, window: int) -> None:
    raw = GEOMETRY | {"num_hidden_layers": 2, "max_position_embeddings": 8192}
    checkpoint = RandomCheckpoint(Path("tiny"), raw)
    model = Opened.of(checkpoint, ModelSpec("tiny", window=window)).load()
    real, filled = model.make_cache(), model.make_cache()
    prefill(model, mx.array([1 + n % 200 for n in range(length)]), real)
    for cache in filled:
        context.fill(cache, length, CHUNK, model.config, model.dtype)
    for _ in range(2):
        assert [summary(cache) for cache in filled] == [summary(cache) for cache in real]
        model(mx.array([[5]]), filled)
        model(mx.array([[5]]), real)


def summary(cache: WindowedKVCache) -> tuple[Any, ...]:
    keys, values, *numbers = cache.state
    assert keys is not None
    assert values is not None
    return (cache.nbytes, cache.size(), cache.rewindable(), keys.shape, values.dtype, *numbers)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    from conftest import write_checkpoint
    from tiny import tiny_weights

    folder = tmp_path_factory.mktemp("context")
    config = tiny_config(num_hidden_layers=8, vocab_size=260)  # 512 positions, a window of 12
    path = write_checkpoint(folder / "source", config, tiny_weights(config, seed=3))
    found = context.measure(open_pair(str(path)), effort(folder), (256, 512, 1536, 4096), GEOMETRY)
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


@slow
def test_the_window_bounds_ours_and_not_mlx_lms(results: Results) -> None:
    random = results["random"]
    assert [row["length"] for row in random["lengths"]] == [256, 512, 1536]  # 2048 positions
    ours, base, peers = (
        [row["sides"][name]["kv"] for row in random["lengths"]]
        for name in (*context.PLANS, context.PEER)
    )
    assert max(ours) <= random["most_held"]
    item = 2 if random["dtype"] == "bfloat16" else 4
    # 56 positions, 2 heads of 16, keys and values; room in steps of 256.
    assert peers[-1] in [56 * 2 * 32 * item * entries for entries in (1536, 1792)]
    assert [a * 32 for a in ours] == [b * 56 for b in base]


@slow
def test_each_peer_stands_beside_its_side(results: Results) -> None:
    a, b = results["names"]
    model = results["model"]
    of = {name: peer["of"] for name, peer in model["peers"].items()}
    assert of == {f"mlx-lm, {a}": a, f"mlx-lm, {b}": b}
    assert [row["length"] for row in model["lengths"]] == [256, 512]
    for row in model["lengths"]:
        held = {name: side["kv"] for name, side in row["sides"].items()}
        # The formula makes 14 positions of 8 blocks; mlx-lm has a layer for each, and no window.
        assert held[f"mlx-lm, {a}"] * 14 == held[f"mlx-lm, {b}"] * 8
        assert held[f"mlx-lm, {a}"] >= held[a]
    for part in ("model", "random"):
        peers = results[part]["peers"]
        assert all(peer["logits_differ_by"] < 1e-3 for peer in peers.values())
        assert all(row["ratios"].keys() == peers.keys() for row in results[part]["lengths"])


@slow
def test_a_ratio_is_ours_over_the_peer_of_the_same_side(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours at a pace of twice its positions, mlx-lm at its layers: swapped it would be a half."""

    def prepare(runner: context.Runner, length: int, tokens: int) -> Any:
        ours = runner.chunk == CHUNK
        return (lambda: (1.0 + ours) * runner.config.num_positions), []

    monkeypatch.setattr(context.Runner, "prepare", prepare)
    pair = open_pair(str(checkpoint(num_hidden_layers=8)))
    found = context.measure(pair, effort(tmp_path), (256,), GEOMETRY)
    two = {"median": 2.0, "low": 2.0, "high": 2.0}
    assert [list(row["ratios"].values()) for row in found["model"]["lengths"]] == [[two, two]]
    assert [row["ratios"] for row in found["random"]["lengths"]] == [{context.PEER: two}]
    assert "\n".join(context.text(found)).count("2.00 (2.00-2.00)") == 3


@pytest.mark.long
def test_a_side_that_mlx_lm_can_not_run_says_why(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Copies.directory

    def directory(self: Copies) -> Path:
        if self.side.plan is None:
            return whole(self)
        raise RequestError("the disk is full")

    monkeypatch.setattr(Copies, "directory", directory)
    pair = open_pair(str(checkpoint(num_hidden_layers=8)))
    found = context.measure(pair, effort(tmp_path), (256,), GEOMETRY)
    a, b = pair.names
    assert set(found["model"]["lengths"][0]["sides"]) == {a, b, f"mlx-lm, {a}"}
    assert f"mlx-lm, {b}: not measured: the disk is full" in context.text(found)


def test_a_copy_that_would_not_fit_is_not_even_written(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = open_pair(str(checkpoint(num_hidden_layers=8)))
    pair.models()
    b, stored = pair.b.config, pair.storage().nbytes
    unrolled = stored * b.executed_parameters // b.stored_parameters
    written = []
    monkeypatch.setattr(Copies, "directory", lambda self: written.append(self.side.name))
    monkeypatch.setattr(context, "load_peer", lambda directory, dtype: None)
    monkeypatch.setattr(
        "mlx_cerebrum.model.memory.available_bytes", lambda: (stored + unrolled) // 2
    )
    with pytest.raises(MemoryBudgetError, match="are free"):
        context._copy(pair, pair.b, effort(tmp_path))
    context._copy(pair, pair.a, effort(tmp_path))
    assert written == [pair.a.name]
    assert list(tmp_path.iterdir()) == [pair.path]


@pytest.mark.long
def test_what_does_not_fit_is_a_row_that_says_so(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = open_pair(str(checkpoint(num_hidden_layers=8)))
    pair.models()
    config = ModelConfig.from_dict(GEOMETRY)
    # Room for a window of ours at any length, and for mlx-lm's caches at the shorter one only.
    room = 3 * 56 * config.kv_values_per_token() // 32 * 4 * 700
    monkeypatch.setattr("mlx_cerebrum.model.memory.available_bytes", lambda: room)
    wide = GEOMETRY | {"max_position_embeddings": 8192}
    found = context.measure(pair, effort(tmp_path), (512, 8192), wide)
    short, long = found["random"]["lengths"]
    assert context.PEER in short["sides"]
    assert context.PEER not in long["sides"]
    assert long["ratios"] == {}
    said = "\n".join(context.text(found))
    assert f"8192 tokens, {context.PEER}: not measured: a context of 8192 tokens needs" in said


@pytest.mark.parametrize("length", [4096, 32768])
def test_what_bytes_alone_allow_is_arithmetic(length: int) -> None:
    """By hand: the 7B has 218,112,000 parameters a block, 131,076,096 beside the embedding."""
    found = context.bytes_alone(ModelConfig.from_dict(GEOMETRY), length)
    weights = 56 * 218_112_000 + 32000 * 4096 + 4096
    token = 56 * 2 * 8 * 128 * 2  # bytes of keys and values
    for kind, bits in (("bf16", 16), ("4-bit", 4.5)):
        full, seen = (weights * bits / 8 + n * token for n in (length, 4096))
        assert found[f"cerebrum-12.25b, {kind}"] == pytest.approx(full / seen, abs=1e-4)


@pytest.mark.long
def test_text_and_plots_come_from_the_results_alone(results: Results, tmp_path: Path) -> None:
    before = json.dumps(results)
    said = "\n".join(context.text(results))
    assert "This model's window: 12" in said
    assert "do not compute the same function" in said
    assert "never exceeded" in said
    for name, picture in context.plots(results, {}).items():
        assert plots.save(picture, tmp_path, name).stat().st_size
    assert json.dumps(results) == before
    doctored = json.loads(before)
    doctored["random"]["lengths"][0]["sides"][context.PLANS[0]]["kv"] = 10**12
    assert "EXCEEDED" in "\n".join(context.text(doctored))


@slow
def test_names_of_others_stay_text(results: Results) -> None:
    """Names are keys here: escaped, they must still find what they name."""
    a, hostile = results["names"][0], "``` <b> | [x](http://y)"
    renamed = json.loads(json.dumps(results).replace(a, hostile))
    said = "\n".join(context.text(escaped(renamed)))
    assert f"ours / mlx-lm, {escaped(hostile)}" in said
    assert hostile not in said
    assert not {"<", "`", "["} & set(said)
