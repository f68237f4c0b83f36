"""Folding what is merged already: identical layers once, near-identical ones never."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import (
    SMALL,
    MakeCheckpoint,
    config_of,
    plan_yaml,
    slow,
    tensors,
    write_checkpoint,
)
from tiny import Weights, tiny_config, tiny_weights

from convert import calibrated, fold, passages
from convert.__main__ import main
from convert.gguf_export import export
from mlx_cerebrum import load
from mlx_cerebrum.model.tensors import BLOCK
from mlx_cerebrum.plan.layer_plan import LayerPlan
from mlx_cerebrum.weights.opening import open_checkpoint

MAP = (0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7)


def merged(path: Path, layer_map: tuple[int, ...], change: Callable[[Weights], None]) -> Path:
    """A checkpoint with a physical layer per entry; `change` edits it before it is written."""
    base = tiny_weights(tiny_config(**SMALL), seed=3)
    weights = {n: v.copy() for n, v in base.items() if "layers." not in n}
    for position, block in enumerate(layer_map):
        for kind in BLOCK:
            name = f"model.layers.{position}.{kind}.weight"
            weights[name] = base[f"model.layers.{block}.{kind}.weight"].copy()
    change(weights)
    config = tiny_config(**(SMALL | {"num_hidden_layers": len(layer_map)}))
    return write_checkpoint(path, config, weights, shards=3)


def unchanged(_: Weights) -> None:
    pass


def test_a_merge_is_folded_back(
    checkpoint: MakeCheckpoint,
    plan_file: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, plan = checkpoint(shards=2), plan_file()
    common = ["--quiet", "--mlx-path"]
    unrolled, direct, again = (str(tmp_path / name) for name in ("u", "direct", "again"))
    argv = ["--hf-path", str(source), "--plan", str(plan), *common]
    assert main([*argv, unrolled, "--layout", "unrolled"]) == 0
    assert main([*argv, direct]) == 0
    assert main(["--hf-path", unrolled, "--mlx-path", again]) == 0
    assert "12 layers were 8 different blocks: plan 0-4, 2-6, 4-8" in capsys.readouterr().err
    ours, expected = config_of(tmp_path / "again"), config_of(tmp_path / "direct")
    assert ours["layer_map"] == list(MAP)
    recovered = LayerPlan.from_text(ours["provenance"]["plan"])
    assert recovered.layer_map(8) == MAP
    assert {k: v for k, v in ours.items() if k != "provenance"} == {
        k: v for k, v in expected.items() if k != "provenance"
    }
    stored, wanted = tensors(tmp_path / "again"), tensors(tmp_path / "direct")
    assert stored.keys() == wanted.keys()
    assert all(mx.array_equal(stored[name], wanted[name]) for name in wanted)
    # And unrolled once more, it is the merge it was.
    assert main(["--hf-path", again, *common, str(tmp_path / "u2"), "--layout", "unrolled"]) == 0
    first, second = tensors(tmp_path / "u"), tensors(tmp_path / "u2")
    assert first.keys() == second.keys()
    assert all(mx.array_equal(first[name], second[name]) for name in first)


def test_the_cards_plan_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = LayerPlan.named("cerebrum-12.25b")
    config = tiny_config(hidden_size=16, intermediate_size=32, head_dim=4, vocab_size=260)
    source = write_checkpoint(tmp_path / "7b", config, tiny_weights(config, seed=1), shards=3)
    common = ["--quiet", "--mlx-path"]
    argv = ["--hf-path", str(source), "--plan", "cerebrum-12.25b", "--dtype", "float32", *common]
    assert main([*argv, str(tmp_path / "u"), "--layout", "unrolled"]) == 0
    assert main(["--hf-path", str(tmp_path / "u"), "--mlx-path", str(tmp_path / "f")]) == 0
    err = capsys.readouterr().err
    assert "56 layers were 32 different blocks: plan cerebrum-12.25b" in err
    folded = config_of(tmp_path / "f")
    assert folded["layer_map"] == list(card.layer_map(32))
    assert folded["num_hidden_layers"] == 32
    assert folded["provenance"]["plan"] == card.text


@slow
def test_quantized_while_folding(tmp_path: Path) -> None:
    source = merged(tmp_path / "m", MAP, unchanged)
    flags = ["-q", "--q-bits", "4", "--q-group-size", "32", "--quiet"]
    assert main(["--hf-path", str(source), "--mlx-path", str(tmp_path / "f"), *flags]) == 0
    plain = merged(tmp_path / "p", tuple(range(8)), unchanged)
    assert main(["--hf-path", str(plain), "--mlx-path", str(tmp_path / "d"), *flags]) == 0
    ours, expected = tensors(tmp_path / "f"), tensors(tmp_path / "d")
    assert ours.keys() == expected.keys()
    assert all(mx.array_equal(ours[name], expected[name]) for name in ours)
    # A quantized merge folds too: its integers, scales and biases are compared.
    argv = ["--layout", "unrolled", "--quiet", "--mlx-path", str(tmp_path / "uq")]
    assert main(["--hf-path", str(tmp_path / "f"), *argv]) == 0
    argv = ["--hf-path", str(tmp_path / "uq"), "--mlx-path", str(tmp_path / "fq"), "--quiet"]
    assert main(argv) == 0
    assert config_of(tmp_path / "fq")["layer_map"] == list(MAP)
    assert all(mx.array_equal(tensors(tmp_path / "fq")[n], ours[n]) for n in ours)


@slow
def test_one_bit_keeps_layers_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever the bit is: where the samples look, or where only the whole hash sees it."""
    name = "model.layers.5.mlp.up_proj.weight"
    unseen = 0
    for index in (0, 3571, 8191):

        def flip(weights: Weights, index: int = index) -> None:
            weights[name].reshape(-1).view(np.uint32)[index] ^= 1

        source = merged(tmp_path / f"m{index}", MAP, flip)
        unseen += fold.predict(open_checkpoint(source)).block_of == MAP
        out = tmp_path / f"f{index}"
        assert main(["--hf-path", str(source), "--mlx-path", str(out)]) == 0
        err = capsys.readouterr().err
        assert "1 layer shares" in err
        assert "layer 5 is layer 3 but for mlp.up_proj" in err
        config = config_of(out)
        # Layer 5 is a block of its own, and the others still fold.
        assert config["num_hidden_layers"] == 9
        assert config["layer_map"] == [0, 1, 2, 3, 2, 4, 5, 6, 5, 6, 7, 8]
        ids = mx.array([[5, 80, 44, 120, 7]])
        assert mx.array_equal(load(out)[0](ids), load(source)[0](ids))
        assert not list(tmp_path.glob(".*"))
    assert 0 < unseen < 3


def test_the_same_bytes_of_another_dtype_are_another_layer(tmp_path: Path) -> None:
    config = tiny_config(**(SMALL | {"num_hidden_layers": 2}))
    weights = tiny_weights(config, seed=3)
    arrays = {name: mx.array(value).astype(mx.float16) for name, value in weights.items()}
    for kind in BLOCK:
        first = arrays[f"model.layers.0.{kind}.weight"]
        arrays[f"model.layers.1.{kind}.weight"] = first.view(mx.bfloat16)
    source = write_checkpoint(tmp_path / "s", config, weights)
    mx.save_safetensors(str(source / "model.safetensors"), arrays, {"format": "pt"})
    assert not fold.predict(open_checkpoint(source)).repeats


def test_every_difference_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also those that no sample shows."""
    kinds = ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

    def flip(weights: Weights) -> None:
        weights["model.layers.5.input_layernorm.weight"][0] += 1
        for kind in kinds:
            weights[f"model.layers.5.{kind}.weight"].reshape(-1).view(np.uint32)[3571] ^= 1

    source = merged(tmp_path / "m", MAP, flip)
    assert main(["--hf-path", str(source), "--mlx-path", str(tmp_path / "f")]) == 0
    differing = ", ".join(("input_layernorm", *kinds))
    assert f"layer 5 is layer 3 but for {differing}\n" in capsys.readouterr().err


def test_a_scaled_merge_is_not_folded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def scale(weights: Weights) -> None:
        for layer in (4, 5, 8, 9):
            for kind in ("self_attn.o_proj", "mlp.down_proj"):
                weights[f"model.layers.{layer}.{kind}.weight"] *= np.float32(0.7071)

    source = merged(tmp_path / "m", MAP, scale)
    assert main(["--hf-path", str(source), "--mlx-path", str(tmp_path / "f")]) == 0
    err = capsys.readouterr().err
    assert "4 layers share some matrices with an earlier one, not all" in err
    assert "layer 4 is layer 2 but for self_attn.o_proj, mlp.down_proj" in err
    assert config_of(tmp_path / "f")["model_type"] == "mistral"
    assert config_of(tmp_path / "f")["num_hidden_layers"] == 12


def test_a_plan_over_a_merge(tmp_path: Path, plan_file: Callable[..., Path]) -> None:
    """A plan names the source's layers, whichever block each turns out to be."""
    source = merged(tmp_path / "m", MAP, unchanged)
    plan = plan_file("0-6,3-12")
    argv = ["--hf-path", str(source), "--plan", str(plan), "--quiet", "--mlx-path"]
    assert main([*argv, str(tmp_path / "f")]) == 0
    layers = [*range(6), *range(3, 12)]
    assert config_of(tmp_path / "f")["layer_map"] == [MAP[layer] for layer in layers]
    ids = mx.array([[5, 80, 44, 120, 7]])
    folded, _ = load(tmp_path / "f")
    planned, _ = load(source, plan=str(plan))
    assert mx.array_equal(folded(ids), planned(ids))


def test_unlike_layers_are_left_alone(checkpoint: MakeCheckpoint) -> None:
    found = fold.predict(open_checkpoint(checkpoint()))
    assert found == fold.none(open_checkpoint(checkpoint("again")).config)
    assert not found.suspects()
    assert fold.notes(found) == []


def test_a_gguf_merge_folds(tmp_path: Path) -> None:
    source = merged(tmp_path / "p", tuple(range(8)), unchanged)
    plan = LayerPlan.from_text(fold.describe(MAP, 8)[1])
    export(open_checkpoint(source), tmp_path / "m.gguf", plan, kind="F32")
    argv = ["--hf-path", str(tmp_path / "m.gguf"), "--mlx-path", str(tmp_path / "f"), "--quiet"]
    assert main(argv) == 0
    assert config_of(tmp_path / "f")["layer_map"] == list(MAP)
    ours, expected = tensors(tmp_path / "f"), tensors(source)
    assert ours.keys() == expected.keys()
    assert all(mx.array_equal(ours[name], expected[name]) for name in ours)


@pytest.mark.parametrize("recipe", ["plan", "mixed_3_6", "gptq"])
@slow
def test_copies_are_packed_alike_in_either_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    """What a merge says does not depend on how it is stored: its layers' bits and scales don't."""
    monkeypatch.setattr(passages, "LENGTH", 128)
    monkeypatch.setattr(calibrated, "LENGTH", 128)
    source = merged(tmp_path / "m", MAP, unchanged)
    (tmp_path / "text").write_text("".join(chr(97 + i * i % 26) for i in range(300)))
    flags = ["-q", "--q-recipe", recipe, "--q-group-size", "32", "--quiet"]
    if recipe == "gptq":
        flags += ["--calibrate", str(tmp_path / "text"), "--calibrate-tokens", "256"]
    for layout in ("folded", "unrolled"):
        argv = ["--hf-path", str(source), "--mlx-path", str(tmp_path / layout), *flags]
        assert main([*argv, "--layout", layout]) == 0
    assert config_of(tmp_path / "folded")["layer_map"] == list(MAP)
    config = config_of(tmp_path / "unrolled")
    assert config["num_hidden_layers"] == len(MAP)
    assert not config["provenance"]["plan_recovered"]
    folded, unrolled = tensors(tmp_path / "folded"), tensors(tmp_path / "unrolled")
    wanted = {name: array for name, array in folded.items() if "layers." not in name}
    for position, block in enumerate(MAP):
        for name, array in folded.items():
            if name.startswith(f"model.layers.{block}."):
                wanted[name.replace(f".{block}.", f".{position}.", 1)] = array
    assert unrolled.keys() == wanted.keys()
    assert all(mx.array_equal(unrolled[name], array) for name, array in wanted.items())


def test_a_copy_is_scaled_by_its_own_name(tmp_path: Path) -> None:
    """The plan scales layer 4, which is the merge's copy of layer 2."""
    source = merged(tmp_path / "m", MAP, unchanged)
    scale = "{scale: [{filter: layers.4.self_attn.o_proj, value: 0.5}, {value: 1.0}]}"
    (tmp_path / "plan.yml").write_text(plan_yaml("0-12", scale))
    argv = ["--hf-path", str(source), "--plan", str(tmp_path / "plan.yml"), "--layout", "unrolled"]
    assert main([*argv, "--mlx-path", str(tmp_path / "u"), "-q", "--q-group-size", "32"]) == 0
    found = tensors(tmp_path / "u")
    scales = {n: found[f"model.layers.{n}.self_attn.o_proj.scales"] for n in (2, 4)}
    assert mx.array_equal(scales[4], 0.5 * scales[2])
