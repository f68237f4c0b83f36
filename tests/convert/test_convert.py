"""Converting: folded and unrolled are the same model, stock tools read what they should."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import MakeCheckpoint, config_of, parameters, slow, tensors
from safetensors.numpy import load_file, save_file

from convert import writer
from convert.__main__ import main
from convert.layout import Options
from convert.pipeline import convert
from convert.recipe import Sensitivity
from convert.verify import verify
from mlx_cerebrum import load
from mlx_cerebrum.decoding.decoder import generate_step
from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.plan.layer_plan import LayerPlan
from mlx_cerebrum.weights.opening import open_checkpoint

MAP = (0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7)
PROMPT = [5, 80, 44, 120, 7, 99, 201, 5, 17, 42, 9, 30, 77, 150, 3, 6]
SCALE = "{scale: [{filter: o_proj, value: 0.5}, {filter: down_proj, value: 0.7071}, {value: 1.0}]}"


def run(*args: Any) -> int:
    return main([str(a) for a in args] + ["--quiet"])


def tokens(path: Path, count: int = 40, **options: Any) -> list[int]:
    model, _ = load(path, **options)
    return list(generate_step(PROMPT, model, max_tokens=count))


@pytest.mark.parametrize("quantize", [[], ["-q", "--q-bits", "4", "--q-group-size", "32"]])
@pytest.mark.parametrize("dtype", [[], ["--dtype", "bfloat16"]])
@pytest.mark.one_in(8)
def test_folded_and_unrolled_give_the_same_tokens(
    checkpoint: MakeCheckpoint,
    plan_file: Callable[..., Path],
    tmp_path: Path,
    quantize: list[str],
    dtype: list[str],
) -> None:
    source, plan = checkpoint(shards=2), plan_file()
    common = ["--hf-path", source, "--plan", plan, *quantize, *dtype]
    assert run("--mlx-path", tmp_path / "f", *common) == 0
    assert run("--mlx-path", tmp_path / "u", "--layout", "unrolled", *common) == 0
    folded, unrolled = (load(tmp_path / name)[0] for name in "fu")
    assert folded.config.layer_map == MAP
    assert unrolled.config.layer_map == tuple(range(12))
    ids = mx.array([PROMPT])
    assert mx.array_equal(folded(ids), unrolled(ids))
    assert tokens(tmp_path / "f") == tokens(tmp_path / "u")
    if not quantize and not dtype:  # nothing was changed: the same as planning at load
        assert tokens(tmp_path / "f") == tokens(source, plan=str(plan))


def test_folded_directory(
    checkpoint: MakeCheckpoint, plan_file: Callable[..., Path], tmp_path: Path
) -> None:
    source, plan = checkpoint(), plan_file()
    assert run("--hf-path", source, "--mlx-path", tmp_path / "f", "--plan", plan) == 0
    config = config_of(tmp_path / "f")
    assert config["model_type"] == "cerebrum"
    assert config["num_hidden_layers"] == 8
    assert config["layer_map"] == list(MAP)
    assert config["format_version"] == 1
    assert config["provenance"]["plan"] == plan.read_text()
    assert config["provenance"]["source"] == "source"
    assert str(tmp_path) not in json.dumps(config)
    assert not any(p.name.startswith(".") for p in tmp_path.iterdir())
    ours, theirs = tensors(tmp_path / "f"), tensors(source)
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)


def test_identity_is_a_plain_mistral_directory(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    assert run("--hf-path", checkpoint(), "--mlx-path", tmp_path / "p") == 0
    config = config_of(tmp_path / "p")
    assert config["model_type"] == "mistral"
    assert "layer_map" not in config


@pytest.mark.parametrize("packed", [False, True])
@slow
def test_a_tied_model_keeps_a_head_of_its_own(
    checkpoint: MakeCheckpoint, plan_file: Callable[..., Path], tmp_path: Path, packed: bool
) -> None:
    """As transformers runs it. Stock tools drop a head that the config calls tied: it must not."""
    source = checkpoint(tie_word_embeddings=True)
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"][::-1].copy()
    save_file(weights, source / "model.safetensors")
    assert any("is stored and differs" in note for note in verify(source)["notes"])
    if packed:
        flags = ["--mlx-path", tmp_path / "q", "-q", "--q-group-size", "32"]
        assert run("--hf-path", source, *flags) == 0
        source = tmp_path / "q"
        raw = config_of(source) | {"tie_word_embeddings": True}
        (source / "config.json").write_text(json.dumps(raw))
        assert verify(source)["sound"]
    expected = load(source, plan=str(plan_file()))[0](mx.array([PROMPT]))
    for layout in ("folded", "unrolled"):
        out = tmp_path / layout
        plan = ["--plan", plan_file(), "--layout", layout]
        assert run("--hf-path", source, "--mlx-path", out, *plan) == 0
        assert config_of(out)["tie_word_embeddings"] is False
        assert "lm_head.weight" in tensors(out)
        assert mx.array_equal(load(out)[0](mx.array([PROMPT])), expected)


def test_unrolled_is_what_mergekit_writes(
    checkpoint: MakeCheckpoint, plan_file: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoint(dtype=np.float16)
    plan = plan_file(dtype="bfloat16")
    out = tmp_path / "u"
    assert run("--hf-path", source, "--mlx-path", out, "--plan", plan, "--layout", "unrolled") == 0
    config = config_of(out)
    assert config["model_type"] == "mistral"
    assert config["num_hidden_layers"] == 12
    assert config["torch_dtype"] == "bfloat16"
    assert config["sliding_window"] == 12
    ours, theirs = tensors(out), tensors(source)
    assert len(ours) == 12 * 9 + 3
    for name, value in ours.items():
        original = name
        if "layers." in name:
            position = int(name.split(".")[2])
            original = name.replace(f"layers.{position}.", f"layers.{MAP[position]}.")
        assert value.dtype == mx.bfloat16
        assert mx.array_equal(value, theirs[original].astype(mx.bfloat16)), name


def test_packed_by_plan_folded_and_unrolled(
    checkpoint: MakeCheckpoint, plan_file: Callable[..., Path], tmp_path: Path
) -> None:
    common = ["--hf-path", checkpoint(), "--plan", plan_file(), "-q", "--q-group-size", "32"]
    assert run("--mlx-path", tmp_path / "f", *common) == 0
    assert run("--mlx-path", tmp_path / "u", "--layout", "unrolled", *common) == 0
    assert len({p["bits"] for p in packings(tmp_path / "f").values()}) > 1
    folded, unrolled = (load(tmp_path / name)[0] for name in "fu")
    assert mx.array_equal(folded(mx.array([PROMPT])), unrolled(mx.array([PROMPT])))


def packings(path: Path) -> dict[str, dict[str, Any]]:
    said = config_of(path)["quantization"]
    return {module: own for module, own in said.items() if isinstance(own, dict)}


def test_scaled_plan_folded_and_unrolled(
    checkpoint: MakeCheckpoint, plan_file: Callable[..., Path], tmp_path: Path
) -> None:
    source, plan = checkpoint(), plan_file(scale=SCALE)
    common = ["--hf-path", source, "--plan", plan]
    assert run("--mlx-path", tmp_path / "f", *common) == 0
    assert run("--mlx-path", tmp_path / "u", "--layout", "unrolled", *common) == 0
    assert config_of(tmp_path / "f")["residual_scales"] == [[0.5, 0.7071]] * 12
    folded, unrolled = (load(tmp_path / name)[0] for name in "fu")
    ids = mx.array([PROMPT])
    # The stated bound: scaling a float32 matrix rounds once more than scaling its output.
    assert mx.abs(folded(ids) - unrolled(ids)).max() < 1e-4
    source_weights, ours = tensors(source), tensors(tmp_path / "u")
    name = "self_attn.o_proj.weight"
    scaled = source_weights[f"model.layers.2.{name}"] * mx.array(0.5, mx.float32)
    assert mx.array_equal(ours[f"model.layers.4.{name}"], scaled)
    # Unrolling a folded directory keeps its scales.
    assert (
        run("--hf-path", tmp_path / "f", "--mlx-path", tmp_path / "u2", "--layout", "unrolled") == 0
    )
    again = tensors(tmp_path / "u2")
    assert all(mx.array_equal(again[n], ours[n]) for n in ours)


def test_a_scale_that_only_unrolling_can_express(
    checkpoint: MakeCheckpoint,
    plan_file: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, plan = checkpoint(), plan_file(scale="{scale: 0.5}")
    common = ["--hf-path", source, "--plan", plan]
    assert run("--mlx-path", tmp_path / "f", *common) == 2
    assert "--layout unrolled" in capsys.readouterr().err
    assert not (tmp_path / "f").exists()
    assert run("--mlx-path", tmp_path / "u", "--layout", "unrolled", *common) == 0
    ours, theirs = tensors(tmp_path / "u"), tensors(source)
    for name in ("model.layers.0.input_layernorm", "model.embed_tokens", "lm_head", "model.norm"):
        assert mx.array_equal(ours[f"{name}.weight"], theirs[f"{name}.weight"] * 0.5)


def test_casts_and_scales_round_in_mergekits_order(
    checkpoint: MakeCheckpoint, plan_file: Callable[..., Path], tmp_path: Path
) -> None:
    """To dtype, times the scale in float32, rounded to dtype, then to out_dtype."""
    source, plan = checkpoint(), plan_file(scale="{scale: 0.3}", dtype="bfloat16")
    plan.write_text("out_dtype: float16\n" + plan.read_text())
    out = tmp_path / "u"
    common = ["--hf-path", source, "--plan", plan, "--layout", "unrolled"]
    assert run(*common, "--mlx-path", out) == 0
    name = "model.layers.1.mlp.up_proj.weight"
    stored, ours = tensors(source)[name], tensors(out)[name]
    cast = stored.astype(mx.bfloat16).astype(mx.float32)
    rounded = (cast * mx.array(0.3, mx.float32)).astype(mx.bfloat16)
    assert ours.dtype == mx.float16
    assert mx.array_equal(ours, rounded.astype(mx.float16))
    assert config_of(out)["torch_dtype"] == "float16"
    # A dtype on the command line replaces both.
    assert run(*common, "--mlx-path", tmp_path / "v", "--dtype", "float32") == 0
    assert mx.array_equal(tensors(tmp_path / "v")[name], stored * mx.array(0.3, mx.float32))


def test_folded_keeps_the_sources_dtype_and_says_so(
    checkpoint: MakeCheckpoint,
    plan_file: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = ["--hf-path", str(checkpoint(dtype=np.float16))]
    common += ["--plan", str(plan_file(dtype="bfloat16"))]
    assert main([*common, "--mlx-path", str(tmp_path / "f")]) == 0
    assert "the plan says bfloat16" in capsys.readouterr().err
    assert {v.dtype for v in tensors(tmp_path / "f").values()} == {mx.float16}
    assert "bfloat16" in config_of(tmp_path / "f")["provenance"]["notes"][0]


def test_quantized_sources_can_be_made_dense(
    checkpoint: MakeCheckpoint, plan_file: Callable[..., Path], tmp_path: Path
) -> None:
    packed, dense = tmp_path / "q", tmp_path / "d"
    half = checkpoint(dtype=np.float16)  # so that a dtype left in the config would be wrong
    assert run("--hf-path", half, "--mlx-path", packed, "-q", "--q-group-size", 32) == 0
    common = ["--hf-path", packed, "--dequantize", "--plan", plan_file(scale=SCALE)]
    assert run(*common, "--mlx-path", dense, "--layout", "unrolled") == 0
    assert "quantization" not in config_of(dense)
    assert config_of(dense)["torch_dtype"] == "float32"
    assert {v.dtype for v in tensors(dense).values()} == {mx.float32}
    folded, _ = load(packed, plan=str(plan_file(scale=SCALE)))
    ids = mx.array([PROMPT])
    assert mx.abs(load(dense)[0](ids) - folded(ids)).max() < 1e-4
    assert run("--hf-path", packed, "--mlx-path", tmp_path / "x", "--dtype", "float16") == 2
    assert run("--hf-path", dense, "--mlx-path", tmp_path / "x", "--dequantize") == 2


def test_outputs_name_no_code_and_both_spellings(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = checkpoint()
    raw = config_of(source) | {"model_file": "evil.py", "auto_map": {"AutoModel": "evil.M"}}
    raw |= {"dtype": "float32", "rope_parameters": {"rope_type": "default", "rope_theta": 5e3}}
    del raw["rope_theta"], raw["tie_word_embeddings"]
    (source / "config.json").write_text(json.dumps(raw))
    assert run("--hf-path", source, "--mlx-path", tmp_path / "o", "--dtype", "float16") == 0
    config = config_of(tmp_path / "o")
    assert "model_file" not in config
    assert "auto_map" not in config
    assert config["dtype"] == "float16"
    assert "torch_dtype" not in config
    assert config["rope_theta"] == 5000.0
    assert config["tie_word_embeddings"] is False
    # Data starts on an 8-byte boundary, and the header is what the format's own reader takes.
    file = next((tmp_path / "o").glob("*.safetensors"))
    assert (8 + int.from_bytes(file.read_bytes()[:8], "little")) % 8 == 0


def test_defaults_of_the_sources_model_type_are_written_out(
    checkpoint: MakeCheckpoint, plan_file: Callable[..., Path], tmp_path: Path
) -> None:
    """mistral means 8 key-value heads where its config is silent, cerebrum does not."""
    source = checkpoint(num_attention_heads=16, num_key_value_heads=8, head_dim=4)
    raw = config_of(source)
    del raw["num_key_value_heads"], raw["rms_norm_eps"]
    (source / "config.json").write_text(json.dumps(raw))
    out = tmp_path / "f"
    assert run("--hf-path", source, "--mlx-path", out, "--plan", plan_file()) == 0
    ids = mx.array([PROMPT])
    assert mx.array_equal(load(out)[0](ids), load(source, plan=str(tmp_path / "plan.yml"))[0](ids))


def test_a_table_measured_before_is_taken(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    Sensitivity.shipped().save(tmp_path / "table.json")
    common = ["--hf-path", checkpoint(), "-q", "--q-group-size", 32, "--q-recipe", "plan"]
    assert run(*common, "--mlx-path", tmp_path / "a") == 0
    table = ["--calibrate", tmp_path / "table.json"]
    assert run(*common, "--mlx-path", tmp_path / "b", *table) == 0
    ours, expected = config_of(tmp_path / "b"), config_of(tmp_path / "a")
    assert ours["quantization"] == expected["quantization"]
    assert len({q["bits"] for q in ours["quantization"].values() if isinstance(q, dict)}) > 1
    assert run(*common, "--mlx-path", tmp_path / "c", "--calibrate", tmp_path / "no.json") == 2


def test_not_into_the_source(checkpoint: MakeCheckpoint) -> None:
    source = checkpoint()
    assert run("--hf-path", source, "--mlx-path", source / "inner") == 2
    assert not (source / "inner").exists()


def test_mlx_lm_loads_the_unrolled_directory(
    checkpoint: MakeCheckpoint, plan_file: Callable[..., Path], tmp_path: Path
) -> None:
    from mlx_lm.utils import load_model as mlx_lm_load

    source, plan = checkpoint(sliding_window=None), plan_file()
    for name, quantize in (("dense", []), ("packed", ["-q", "--q-group-size", "32"])):
        out = tmp_path / name
        common = ["--hf-path", source, "--mlx-path", out, "--plan", plan, "--layout", "unrolled"]
        assert run(*common, *quantize) == 0
        theirs, _ = mlx_lm_load(out)
        ours, _ = load(out, dtype="float32")
        ids = mx.array([PROMPT])
        assert mx.abs(theirs(ids) - ours(ids)).max() < 1e-4


def test_quantized_is_what_mlx_lm_convert_writes(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    from mlx_lm.convert import convert as mlx_lm_convert

    source = checkpoint(dtype=np.float16)
    mlx_lm_convert(str(source), str(tmp_path / "t"), quantize=True, q_group_size=32, q_bits=4)
    flags = ["-q", "--q-bits", 4, "--q-group-size", 32]
    assert run("--hf-path", source, "--mlx-path", tmp_path / "o", *flags) == 0
    ours, theirs = tensors(tmp_path / "o"), tensors(tmp_path / "t")
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert mx.array_equal(ours[name], theirs[name]), name
    assert config_of(tmp_path / "o")["quantization"] == config_of(tmp_path / "t")["quantization"]


def test_stock_mlx_lm_refuses_a_folded_directory(
    checkpoint: MakeCheckpoint, plan_file: Callable[..., Path], tmp_path: Path
) -> None:
    from mlx_lm.utils import load_model as mlx_lm_load

    assert run("--hf-path", checkpoint(), "--mlx-path", tmp_path / "f", "--plan", plan_file()) == 0
    with pytest.raises(ValueError, match="cerebrum"):
        mlx_lm_load(tmp_path / "f")


@pytest.mark.parametrize("layout", ["folded", pytest.param("unrolled", marks=pytest.mark.long)])
@slow
def test_gguf_source_keeps_its_packed_weights(demo: Path, tmp_path: Path, layout: str) -> None:
    plan = LayerPlan.named("demo-interleaved")
    convert(open_checkpoint(demo), tmp_path / layout, Options(plan=plan, layout=layout))
    model, tokenizer = load(demo, plan=plan, dtype="float32")
    direct = parameters(model)
    ids = tokenizer.encode("The capital of France is")
    expected = list(generate_step(ids, model, max_tokens=3))
    again, tokenizer = load(tmp_path / layout, dtype="float32")
    assert tokenizer.encode("The capital of France is") == ids
    assert list(generate_step(ids, again, max_tokens=3)) == expected
    if layout == "folded":
        loaded = parameters(again)
        assert all(mx.array_equal(loaded[name], direct[name]) for name in direct)


def test_window_override_is_recorded(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = checkpoint()
    assert run("--hf-path", source, "--mlx-path", tmp_path / "w", "--window", "5") == 0
    config = config_of(tmp_path / "w")
    assert config["sliding_window"] == 5
    assert config["provenance"]["window_override"] == 5
    assert load(tmp_path / "w")[0].config.sliding_window == 5
    llama = checkpoint("llama", model_type="llama", architectures=["LlamaForCausalLM"])
    assert run("--hf-path", llama, "--mlx-path", tmp_path / "l", "--window", "5") == 0
    assert load(tmp_path / "l")[0].config.sliding_window == 5


@slow
def test_shards_are_cut_at_the_limit(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint()
    monkeypatch.setattr(writer, "MAX_SHARD_BYTES", 300_000)
    assert run("--hf-path", source, "--mlx-path", tmp_path / "s", "--dtype", "float16") == 0
    files = sorted((tmp_path / "s").glob("*.safetensors"))
    assert len(files) == 3  # of 657 KB
    assert all(sum(v.nbytes for v in load_file(f).values()) <= 300_000 for f in files)
    index = json.loads((tmp_path / "s" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        v.nbytes for v in tensors(tmp_path / "s").values()
    )
    assert tokens(tmp_path / "s", dtype="float16") == tokens(source, dtype="float16")


# Refusals: one line, exit code 2, nothing written.


def test_never_overwrites(
    checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint()
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    assert run("--hf-path", source, "--mlx-path", tmp_path / "there") == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "there" / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--q-bits", "4"], "-q"),
        (["-q", "--q-bits", "7"], "--q-bits"),
        (["--window", "-1"], "negative"),
        (["--plan", "nowhere"], "nowhere"),
        (["--revision", "main"], "--revision"),
        (["--bogus"], "--bogus"),
        (["--layout", "flat"], "--layout"),
        (["--gguf", "F16", "--upload-repo", "a/b"], "--upload-repo is for directories"),
    ],
)
def test_wrong_flags(
    checkpoint: MakeCheckpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    says: str,
) -> None:
    source = checkpoint()
    try:
        code = run("--hf-path", source, "--mlx-path", tmp_path / "x", *flags)
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    err = capsys.readouterr().err
    assert code == 2
    assert says in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_quantized_sources_are_not_packed_or_scaled_again(
    checkpoint: MakeCheckpoint,
    plan_file: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    packed = tmp_path / "q"
    assert run("--hf-path", checkpoint(), "--mlx-path", packed, "-q", "--q-group-size", 32) == 0
    assert run("--hf-path", packed, "--mlx-path", tmp_path / "x", "-q") == 2
    assert "quantized already" in capsys.readouterr().err
    plan = plan_file(scale=SCALE)
    common = ["--hf-path", packed, "--plan", plan, "--mlx-path", tmp_path / "x"]
    assert run(*common, "--layout", "unrolled") == 2
    assert "can't be scaled" in capsys.readouterr().err
    assert run(*common) == 0  # folded: the residual is scaled instead


def test_disk_space_is_asked_for_first(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
    with pytest.raises(CheckpointError, match=r"needs \d+\.\d MB of disk and 0\.0 MB are free"):
        convert(open_checkpoint(checkpoint()), tmp_path / "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_q_alone_spends_bits_by_plan_and_names_what_loses_less(
    checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint(num_hidden_layers=4)

    def widths(name: str, *flags: str) -> set[int]:
        words = ["--hf-path", str(source), "--mlx-path", str(tmp_path / name), "-q", *flags]
        assert main(words) == 0
        named = "--q-recipe gptq lost less" in capsys.readouterr().err
        assert named == ("--q-mode" not in flags)
        packed = [v for k, v in config_of(tmp_path / name)["quantization"].items() if "." in k]
        return {value["bits"] for value in [config_of(tmp_path / name)["quantization"], *packed]}

    assert len(widths("alone")) > 1
    assert widths("all", "--q-bits", "4") == {4}
    assert widths("float", "--q-mode", "mxfp4") == {4}


def test_a_group_size_that_fits_is_named(
    checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny model's rows have 64 or 96 weights."""
    source = str(checkpoint(intermediate_size=96))
    for size, code in ((128, 2), (64, 0), (32, 0)):
        argv = ["--hf-path", source, "--mlx-path", str(tmp_path / f"{size}"), "-q"]
        assert main([*argv, "--q-bits", "4", "--q-group-size", str(size)]) == code
        said = capsys.readouterr().err
        assert ("; --q-group-size 32 fits" in said) is (size != 32)
