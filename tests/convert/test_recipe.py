"""Recipes: mlx-lm's mixtures exactly, budgets kept, more bits where they are worth more."""

import itertools
import json
from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import slow
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.convert import QUANT_RECIPES, mixed_quant_predicate_builder
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.utils import compute_bits_per_weight
from tiny import tiny_config

from convert.recipe import MIXED, RECIPES, Sensitivity, choose
from mlx_cerebrum.errors import ConfigError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.tensors import (
    EMBEDDING,
    HEAD,
    MATRICES,
    matrix_shapes,
    module_path,
    module_shapes,
    place,
)
from mlx_cerebrum.plan.layer_plan import resolve
from mlx_cerebrum.weights.quantize import Packing, matrix_bytes

BASE = Packing(4, 64)


def config(blocks: int = 8, layer_map: tuple[int, ...] = (), tied: bool = False) -> ModelConfig:
    wide = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "vocab_size": 320}
    raw = tiny_config(num_hidden_layers=blocks, tie_word_embeddings=tied, **wide)
    return replace(ModelConfig.from_dict(raw), layer_map=layer_map or tuple(range(blocks)))


def flat(blocks: int = 8, value: float = 0.01) -> Sensitivity:
    """A table in which all matrices matter alike."""
    measured = {module_path(i, kind): value for i in range(blocks) for kind in MATRICES}
    return Sensitivity.of(measured | {EMBEDDING: value, HEAD: value}, config(blocks), BASE)


def bits_per_weight(of: ModelConfig, packings: dict[str, Packing], unrolled: bool = False) -> float:
    """All bytes stored with 16-bit scales, norms too, times 8 over all parameters."""
    total = 0
    for module, shape in module_shapes(of).items():
        inside = place(module)
        copies = of.layer_map.count(inside[0]) if unrolled and inside else 1
        if len(shape) == 1:
            total += copies * 2 * shape[0]
        else:
            total += copies * matrix_bytes((shape[0], shape[1]), packings.get(module), 2)
    return 8 * total / (of.executed_parameters if unrolled else of.stored_parameters)


def raised(table: Sensitivity, block: int, kind: str, factor: float) -> Sensitivity:
    row = list(table.blocks[kind])
    row[block] *= factor
    return replace(table, blocks={**table.blocks, kind: tuple(row)})


def peer(of: ModelConfig) -> Model:
    """mlx-lm's own model of the same shape; nothing of it is evaluated."""
    names = (
        *("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "rms_norm_eps", "vocab_size", "rope_theta"),
        "tie_word_embeddings",
    )
    fields = {name: getattr(of, name) for name in names}
    return Model(ModelArgs(model_type="llama", **fields))


@pytest.mark.parametrize("recipe", QUANT_RECIPES)
@pytest.mark.parametrize(("blocks", "tied"), [(1, False), (7, True), (30, True), (32, False)])
def test_mixtures_choose_what_mlx_lm_chooses(recipe: str, blocks: int, tied: bool) -> None:
    of = config(blocks, tied=tied)
    model = peer(of)
    predicate = mixed_quant_predicate_builder(recipe, model, 64)
    expected = {
        path: predicate(path, module)
        for path, module in model.named_modules()
        if hasattr(module, "to_quantized")
    }
    chosen = choose(recipe, of, BASE)
    assert {name: packing.as_config() for name, packing in chosen.items()} == expected


def test_mixtures_are_all_of_mlx_lms() -> None:
    assert list(MIXED) == QUANT_RECIPES


def test_a_mixture_goes_by_stored_block_whatever_the_plan() -> None:
    plan = resolve("cerebrum-12.25b").layer_map(32)
    assert choose("mixed_4_6", config(32, plan), BASE) == choose("mixed_4_6", config(32), BASE)


def test_bits_per_weight_are_mlx_lms() -> None:
    of = config(8)
    for recipe in ("uniform", "mixed_3_6", "plan"):
        chosen = choose(recipe, of, BASE, table=flat() if recipe == "plan" else None)
        model = peer(of)
        model.set_dtype(mx.bfloat16)

        packed: dict[str, Any] = {name: packing.as_config() for name, packing in chosen.items()}
        nn.quantize(model, class_predicate=partial(_packed, packed))
        expected = compute_bits_per_weight(model)
        assert bits_per_weight(of, chosen) == pytest.approx(expected, abs=1e-9)


def _packed(packed: dict[str, Any], path: str, _: nn.Module) -> Any:
    return packed.get(path, False)


def test_uniform_leaves_out_what_does_not_divide() -> None:
    of = replace(config(), intermediate_size=96)  # down_proj's rows
    chosen = choose("uniform", of, BASE)
    left_out = set(matrix_shapes(of)) - set(chosen)
    assert left_out == {module_path(i, "mlp.down_proj") for i in range(8)}
    assert set(chosen.values()) == {BASE}
    assert set(choose("plan", of, BASE, table=flat())) == set(chosen)
    assert choose("plan", replace(of, hidden_size=96, head_dim=24), Packing(4, 128)) == {}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_budget_is_kept_and_used(data: st.DataObject) -> None:
    blocks = data.draw(st.integers(1, 4))
    layer_map = data.draw(st.lists(st.integers(0, blocks - 1), min_size=1, max_size=9))
    of = config(blocks, tuple(layer_map), data.draw(st.booleans()))
    figures = data.draw(st.lists(st.floats(0, 10), min_size=11, max_size=11))
    names = (*matrix_shapes(of), HEAD)
    measured = dict(zip(names, itertools.cycle(figures), strict=False))
    table = Sensitivity.of(measured, of, Packing(3, 64))
    group = data.draw(st.sampled_from([32, 64]))
    unrolled = data.draw(st.booleans())
    base = Packing(4, group)
    least = bits_per_weight(of, choose("uniform", of, Packing(2, group)), unrolled=unrolled)
    budget = data.draw(st.floats(least + 1e-6, 9.5))
    chosen = choose("plan", of, base, budget, table, unrolled=unrolled)
    assert set(chosen) == set(matrix_shapes(of))
    taken = bits_per_weight(of, chosen, unrolled=unrolled)
    assert taken <= budget
    largest = max(
        bits_per_weight(of, {**chosen, n: Packing(8, group)}, unrolled=unrolled) - taken
        for n in chosen
    )
    everything = all(packing.bits == 8 for packing in chosen.values())
    assert (
        everything or budget - taken <= 2 * largest
    )  # no step that fits is left (gate and up: two)


def test_by_default_the_budget_is_what_uniform_takes() -> None:
    of = config(8, (0, 1, 2, 3, 2, 3, 4, 5, 6, 7))
    uniform, chosen = choose("uniform", of, BASE), choose("plan", of, BASE)
    assert bits_per_weight(of, chosen) <= bits_per_weight(of, uniform)
    assert bits_per_weight(of, chosen) > bits_per_weight(of, uniform) - 0.05


@settings(max_examples=40, deadline=None)
@given(
    block=st.integers(0, 5),
    kind=st.sampled_from(MATRICES),
    factor=st.floats(1, 1000),
    budget=st.floats(2.8, 8),
    seed=st.lists(st.floats(0.1, 10), min_size=6, max_size=6),
)
@slow
def test_more_sensitive_never_means_fewer_bits(
    block: int, kind: str, factor: float, budget: float, seed: list[float]
) -> None:
    table = flat(6)
    for i, share in enumerate(seed):
        for each in MATRICES:
            table = raised(table, i, each, share)
    module = module_path(block, kind)
    before = choose("plan", config(6), BASE, budget, table)
    after = choose("plan", config(6), BASE, budget, raised(table, block, kind, factor))
    assert after[module].bits >= before[module].bits


def test_a_block_that_runs_more_gets_more_bits() -> None:
    once = choose("plan", config(8), BASE, table=flat())
    often = choose("plan", config(8, (0, 1, 2, 3, 3, 3, 3, 4, 5, 6, 7)), BASE, table=flat())
    for kind in MATRICES:
        assert often[module_path(3, kind)].bits >= once[module_path(3, kind)].bits
        assert often[module_path(3, kind)].bits >= often[module_path(5, kind)].bits

    def bits(chosen: dict[str, Packing], block: int) -> int:
        return sum(chosen[module_path(block, kind)].bits for kind in MATRICES)

    assert bits(often, 3) > bits(once, 3)
    assert bits(often, 3) >= bits(often, 5) + 4


def test_gate_and_up_get_the_same_bits() -> None:
    of = config(8, (0, 1, 2, 3, 2, 3, 4, 5, 6, 7))
    table = raised(raised(flat(), 2, "mlp.up_proj", 50), 5, "mlp.gate_proj", 1 / 50)
    chosen = choose("plan", of, BASE, 4.7, table)
    for i in range(8):
        assert chosen[module_path(i, "mlp.gate_proj")] == chosen[module_path(i, "mlp.up_proj")]


def test_unrolled_the_budget_counts_copies() -> None:
    of = config(4, (0, 1, 2, 1, 2, 1, 2, 3))
    chosen = choose("plan", of, BASE, 4.6, flat(4), unrolled=True)
    assert bits_per_weight(of, chosen, unrolled=True) <= 4.6 < 4.7
    assert bits_per_weight(of, chosen, unrolled=True) > 4.5


def test_without_a_budget_both_layouts_are_packed_alike() -> None:
    of = config(8, (0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7))
    table = raised(flat(), 2, "mlp.up_proj", 50)
    chosen = choose("plan", of, BASE, table=table)
    assert chosen == choose("plan", of, BASE, table=table, unrolled=True)
    assert chosen != choose("plan", of, BASE, 4.5, table, unrolled=True)


def test_a_mixture_block_by_block() -> None:
    chosen = choose("mixed_4_6", config(8), BASE)

    def row(kind: str) -> str:
        return "".join(str(chosen[f"model.layers.{i}.{kind}"].bits) for i in range(8))

    assert chosen["lm_head"].bits == 6
    assert row("self_attn.q_proj") == "44444444"
    assert row("mlp.down_proj") == "64464466"  # [0], then every third from 3 on, then [7]


@pytest.mark.parametrize(
    ("recipe", "base", "budget", "says"),
    [
        ("mixed", BASE, None, "not one of uniform, mixed_2_6"),
        ("mixed_4_6", BASE, 5.0, "for the recipe plan, not mixed_4_6"),
        ("plan", Packing(4, 32, "mxfp4"), None, "mxfp4 has only one"),
        ("plan", BASE, 2.0, "can't be kept: with 2-bit groups of 64 everywhere this model takes"),
        ("plan", BASE, float("nan"), "makes no sense"),
        ("plan", BASE, -1.0, "makes no sense"),
    ],
)
def test_refused_in_one_line(recipe: str, base: Packing, budget: float | None, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose(recipe, config(), base, budget)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_float_formats_have_uniform_only() -> None:
    base = Packing(4, 32, "mxfp4")
    assert set(choose("uniform", config(), base).values()) == {base}
    assert RECIPES[0] == "uniform"


# The table


def test_the_shipped_table_is_small_and_says_where_it_is_from() -> None:
    raw = (files("convert") / "data" / "sensitivity.json").read_text(encoding="utf-8")
    assert len(raw) < 50_000
    provenance = json.loads(raw)["provenance"]
    for key in ("model", "text_sha256", "tokens", "mlx", "mlx_cerebrum", "date"):
        assert provenance[key], key
    table = Sensitivity.shipped()
    assert table.num_blocks == 30
    assert all(x > 0 for row in table.blocks.values() for x in row)


def test_a_table_survives_saving(tmp_path: Path) -> None:
    Sensitivity.shipped().save(tmp_path / "t.json")
    assert Sensitivity.load(tmp_path / "t.json") == Sensitivity.shipped()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bits": 7}, "7 bits a weight"),
        ({"blocks": {}}, "not a sensitivity table: no 'self_attn.q_proj'"),
        ({"layer_map": [float("inf")]}, "not a sensitivity table"),
        ({"blocks": {kind: [1.0, -1.0] for kind in MATRICES}}, "not negative"),
        ({"blocks": {kind: [1.0] * (i + 1) for i, kind in enumerate(MATRICES)}}, "one figure"),
        ({"outer": {EMBEDDING: 1.0, HEAD: float("nan")}}, "finite"),
        ({"layer_map": [99]}, "layer_map names no block, or one that has no figures"),
        ({"layer_map": []}, "layer_map names no block"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path: Path, change: dict[str, object], says: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps(Sensitivity.shipped().as_dict() | change))
    with pytest.raises(ConfigError, match=says):
        Sensitivity.load(path)


def test_a_block_that_did_not_run_is_taken_for_its_neighbours() -> None:
    """It has no figure: none is not nothing."""
    measured = {module_path(i, kind): 0.01 * (i + 1) for i in (1, 3) for kind in MATRICES}
    table = Sensitivity.of(measured | {EMBEDDING: 1.0, HEAD: 1.0}, config(6, (1, 3)), BASE)
    ours = [table.at(module_path(i, MATRICES[0]), config(6)) for i in range(6)]
    assert ours == pytest.approx([0.02, 0.02, (0.02 * 0.04) ** 0.5, 0.04, 0.04, 0.04])


def test_a_table_gives_back_what_was_measured() -> None:
    of = config(3, (0, 1, 1, 1, 2))
    measured = {name: 0.001 * (i + 1) for i, name in enumerate(matrix_shapes(of))}
    table = Sensitivity.of(measured, of, BASE)
    for name, value in measured.items():
        assert table.at(name, of) == pytest.approx(value)


def test_a_table_carries_over_by_depth_and_runs() -> None:
    kind = "mlp.up_proj"
    measured = {module_path(i, k): 10.0 ** (i - 4) for i in range(4) for k in MATRICES}
    table = Sensitivity.of(measured | {EMBEDDING: 1.0, HEAD: 2.0}, config(4), BASE)
    assert table.at(module_path(0, kind), config(8)) == pytest.approx(
        1e-4
    )  # before the first middle
    assert table.at(module_path(1, kind), config(8)) == pytest.approx(10**-3.75)
    assert table.at(module_path(7, kind), config(8)) == pytest.approx(0.1)
    twice = config(4, (0, 1, 2, 1, 2, 3))
    factor = 2.0**table.run_exponent
    assert table.at(module_path(1, kind), twice) == pytest.approx(1e-3 * factor)
    assert table.at(module_path(3, kind), twice) == pytest.approx(0.1)
    assert table.at(module_path(3, kind), config(4, (0, 1, 2))) == 0.0  # never runs
    assert table.at(EMBEDDING, config(4)) == 1.0
    assert table.at(EMBEDDING, config(4, tied=True)) == 3.0  # lookup and head
