"""Where a step's time goes and how many primitives it has: arithmetic, and nothing missed."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from conftest import MakeCheckpoint, resting
from tiny import tiny_config

from bench import bandwidth, primitives, step_profile
from bench.random_model import GEOMETRIES
from bench.step_profile import MOVING, WHOLE, Arrays, Kind, Pass, Timing, filled, forget
from mlx_cerebrum import device, load
from mlx_cerebrum.doctor import graph
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model

WINDOW = 24
TINY = ModelConfig.from_dict(tiny_config(num_hidden_layers=3, sliding_window=WINDOW))


@pytest.fixture
def model(checkpoint: MakeCheckpoint) -> Model:
    path = checkpoint(num_hidden_layers=3, sliding_window=WINDOW)
    return load(path, window=WINDOW)[0]


def computing(counts: Counter[str]) -> Counter[str]:
    return Counter({name: n for name, n in counts.items() if name not in graph.VIEWS})


def compared(found: Pass) -> tuple[Counter[str], Counter[str]]:
    """Primitives that compute: of the whole, and of all its kinds together."""

    def counted(build: Callable[[], Arrays]) -> Counter[str]:
        forget()
        arrays = build()
        counts = graph.count(arrays)
        mx.eval(*arrays)  # else the next graph on these caches has this one in it
        return computing(counts)

    kinds = [counted(kind.graph) for kind in found.kinds.values()]
    return counted(found.graph), sum(kinds, Counter[str]())


@pytest.mark.parametrize("context", [5, WINDOW, 100])
def test_the_kinds_of_a_decode_step_are_the_step(model: Model, context: int) -> None:
    """None of its primitives is left out, or counted twice."""
    whole, kinds = compared(Pass(model, context))
    assert kinds == whole


@pytest.mark.parametrize("context", [0, 5, WINDOW, 100])
def test_the_kinds_of_a_chunk_are_the_chunk(model: Model, context: int) -> None:
    whole, kinds = compared(Pass(model, context, 8))
    # The window's mask is made once for all positions; its time is part of the rest.
    past = context + 8 > WINDOW
    mask = {"Arange": 2, "LessEqual": 1, "Greater": 1, "Subtract": 1, "BitwiseAnd": 1}
    assert whole - kinds == (mask if past else {})
    assert kinds - whole == {}


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"torch_dtype": "bfloat16"}])
def test_other_models_are_told_apart_too(checkpoint: MakeCheckpoint, changes: Any) -> None:
    model, _ = load(checkpoint(**changes), q_bits=4, dtype="float32")
    whole, kinds = compared(Pass(model, 9))
    assert kinds == whole


def test_work_is_counted(model: Model) -> None:
    config, context = model.config, 100
    kinds = Pass(model, context).kinds
    modules = ("norms", "qkv", "o", "gate_up", "down", "head")
    entries = [array for _, inputs in kinds["attention"].calls for array in inputs[1:]]
    # A token reads the window's keys and values, its own among them.
    read = sum(kinds[name].held for name in modules) + sum(array.nbytes for array in entries)
    assert read == bandwidth.token_bytes(model, context)
    matrices = ("qkv", "o", "gate_up", "down")
    per_position = config.block_parameters - 2 * config.hidden_size  # without its norms
    assert sum(kinds[n].flops for n in matrices) == 2 * per_position * config.num_positions
    heads = config.num_attention_heads * config.head_dim
    assert kinds["attention"].flops == 4 * heads * WINDOW * config.num_positions
    chunk = Pass(model, context, 8).kinds
    assert chunk["attention"].flops * 3 == 8 * kinds["attention"].flops * 2  # not for the last
    assert chunk["qkv"].flops == 8 * kinds["qkv"].flops
    assert chunk["o"].flops * 3 == 8 * kinds["o"].flops * 2
    assert "head" not in chunk
    values = config.kv_values_per_token() * 4
    assert chunk["cache"].held == values * (WINDOW - 1 + 64)  # what is kept moves to a new buffer
    assert kinds["cache"].nbytes == values


def test_passes_leave_the_caches_as_they_were(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = filled(model, 100)
    monkeypatch.setattr(step_profile, "filled", lambda *_: caches)
    token = mx.array([[7]])
    before = model(token, caches)
    mx.eval(before)
    for layer in caches:
        layer.trim(1)
    for found in (Pass(model, 100), Pass(model, 100, 8)):
        times = found.times(2)
        assert {len(times[name]) for name in (WHOLE, *found.kinds)} == {2}
        assert {layer.offset for layer in caches} == {100}
        assert {layer.size() for layer in caches} == {WINDOW - 1}
        after = model(token, caches)
        assert mx.array_equal(before, after).item()
        for layer in caches:
            layer.trim(1)


@pytest.mark.parametrize(("kind", "rest"), [(0.002, 0.005), (0.005, -0.001)])
def test_the_rest_is_what_is_left(
    kind: float, rest: float, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Pass(model, 1)
    found.kinds = {name: Kind(held=10**6, flops=2 * 10**6) for name in ("one", "two")}
    times = {WHOLE: [Timing(0.001, 0.009)] * 3, MOVING: [Timing(0.0, 0.5)] * 3}
    times |= {name: [Timing(9.0, kind)] * 3 for name in found.kinds}
    monkeypatch.setattr(found, "times", lambda *_: times)
    results = found.measured(3)
    assert results["rest"] == pytest.approx(rest)
    table = step_profile._table("a step", results)
    rows = {row.split("|")[1].strip(): row.split("|")[2:-1] for row in table.splitlines()}
    cells = {name: [cell.strip() for cell in row] for name, row in rows.items()}
    assert cells["the rest"][:2] == [f"{rest * 1e3:.2f}", f"{rest * 1e4:.1f}%"]
    assert cells["building the graph"][0] == "1.00"
    per_second = f"{0.001 / kind:.2f}", f"{0.002 / kind:.2f}"
    assert cells["one"] == [f"{kind * 1e3:.2f}", f"{kind * 1e4:.1f}%", "1.00", "2.00", *per_second]
    assert cells["all of it"] == ["10.00", "100.0%", "2.00", "4.00", "0.20", "0.40"]
    parts = [cells[name][0] for name in ("one", "two", "building the graph", "the rest")]
    assert sum(map(float, parts)) == pytest.approx(10.0)


def test_the_command(checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", str(checkpoint()), "--context", "20", "--chunk", "8", "--rounds", "1"]
    assert step_profile.main([*words, "--window", str(WINDOW)]) == 0
    printed = capsys.readouterr().out
    for name in ("embedding", "gate_up", "argmax", "building the graph", "the rest"):
        assert f"| {name} " in printed
    results = json.loads(printed.splitlines()[-1])["results"]
    assert (results["positions"], results["window"]) == (8, WINDOW)
    for name in ("decode", "prefill"):
        found = results[name]
        parts = sum(kind["seconds"]["median"] for kind in found["kinds"].values())
        whole = parts + found["build"]["median"] + found["rest"]
        assert whole == pytest.approx(found["whole"]["median"], rel=1e-3)
    assert step_profile.main(["--context", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err


# --- primitives


def test_primitives_are_counted_once() -> None:
    x = mx.ones((2, 2))
    mx.eval(x)
    y = mx.exp(x)
    assert graph.count([y, {"z": (y @ y, 3)}]) == {"Exp": 1, "Matmul": 1}
    assert graph.kernels({"Exp": 2, "Transpose": 5, "Matmul": 1}) == 3


def test_any_number_of_positions_follows_from_two_and_three() -> None:
    config = replace(TINY, num_hidden_layers=7, layer_map=tuple(range(7)))
    results = primitives.measure(config, [7], 8)
    assert set(results["backends"]) == {device.backend(), "metal"}
    for backend, passes in results["backends"].items():
        for name, sides in passes.items():
            assert set(sides) == set(primitives.SIDES)
            for side, found in sides.items():
                length = 8 if name == "prefill" else 1
                counted = primitives.counted(side, config, length, backend)
                assert counted.total() == found["primitives"]["7"], (backend, name, side)
                assert graph.kernels(counted) == found["kernels"]["7"]
    text = "\n".join(primitives.text({"model": "tiny"} | results))
    assert "7 positions" in text


def test_on_metal_a_long_chunk_is_one_kernel_of_attention() -> None:
    """The CPU's slices are none of Metal's."""
    config = replace(TINY, head_dim=64, hidden_size=256, intermediate_size=256)
    sides = primitives.measure(config, [3], 256)["backends"]["metal"]["prefill"]
    assert sides["ours"]["per_position"]["ScaledDotProductAttention"] == 1
    assert sides["ours"]["per_position"]["Matmul"] == 4


@pytest.mark.parametrize("bits", [None, 4])
def test_on_metal_a_position_is_thirteen_kernels(bits: int | None) -> None:
    functions = mx.fast.rms_norm, mx.fast.rope, mx.fast.scaled_dot_product_attention, mx.dequantize
    config = replace(TINY, head_dim=64, hidden_size=256, intermediate_size=256)
    sides = primitives.measure(config, [3], 8, bits)["backends"]["metal"]["decode"]
    product = "Matmul" if bits is None else "QuantizedMatmul"
    kernels = {"RMSNorm": 2, product: 4, "RoPE": 1, "ScaledDotProductAttention": 1}
    kernels |= {"SliceUpdate": 2, "Add": 2, "Compiled": 1}
    for side in ("ours", "ours, compiled"):  # nothing is left to fuse
        assert computing(Counter(sides[side]["per_position"])) == kernels
    apart = Counter(sides["ours, not fused"]["per_position"])
    assert computing(apart) == kernels | {product: 7, "RoPE": 2}
    assert graph.kernels(sides["mlx-lm"]["per_position"]) == graph.kernels(apart)
    assert all("Depends" not in found["per_position"] for found in sides.values())
    besides = computing(Counter(sides["ours"]["besides"]))
    gathers = 1 if bits is None else 3
    assert (besides["Gather"], besides["RMSNorm"], besides["ArgReduce"]) == (gathers, 1, 1)
    assert functions == (
        mx.fast.rms_norm,
        mx.fast.rope,
        mx.fast.scaled_dot_product_attention,
        mx.dequantize,
    )


def test_hollow_models_take_no_memory() -> None:
    config = ModelConfig.from_dict(GEOMETRIES["cerebrum-7b"])
    before = resting()
    model = primitives.hollow(primitives.ours(config))
    assert mx.get_active_memory() - before < 1e6
    assert model.lm_head.weight.shape == (config.vocab_size, config.hidden_size)


def test_the_primitives_command(
    checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    assert primitives.main(["--model", str(checkpoint()), "--chunk", "4", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert results["positions"] == [8, 14, 32, 56]
    assert primitives.main(["--chunk", "1"]) == 2
    assert "decode step" in capsys.readouterr().err
