"""Loading: every accepted form gives the same model; every damaged one gives one line."""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import MakeCheckpoint, parameters, resting, slow
from safetensors.numpy import load_file, save_file

from convert.__main__ import main as convert
from mlx_cerebrum import device, load
from mlx_cerebrum.decoding.prompt_cache import PromptCache
from mlx_cerebrum.decoding.stream import stream_generate
from mlx_cerebrum.errors import CerebrumError, CheckpointError, ConfigError, MemoryBudgetError
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.weights.loading import load_model
from mlx_cerebrum.weights.opening import open_checkpoint
from mlx_cerebrum.weights.quantize import Packing
from mlx_cerebrum.weights.storage import choose_storage

IDS = mx.array([[5, 80, 44, 120, 7, 99, 201, 5, 17, 42, 9, 30, 77, 150, 3, 6]])


def logits(path: Path, **options: Any) -> mx.array:
    model, _ = load(path, **options)
    return model(IDS)


def edit(path: Path, **changes: Any) -> None:
    """Change keys of config.json; None removes one."""
    file = path / "config.json"
    raw = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(CerebrumError) as caught:
        load(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_sharded_is_single(checkpoint: MakeCheckpoint) -> None:
    one, three = checkpoint("one"), checkpoint("three", shards=3)
    assert mx.array_equal(logits(one), logits(three))


@slow
def test_both_config_spellings(checkpoint: MakeCheckpoint) -> None:
    old = checkpoint("old", rope_theta=5000.0)
    new = checkpoint("new", rope_theta=5000.0)
    edit(
        new,
        rope_theta=None,
        rope_parameters={"rope_theta": 5000.0, "rope_type": "default"},
        torch_dtype=None,
        dtype="float32",
    )
    assert mx.array_equal(logits(old), logits(new))
    assert not mx.array_equal(logits(old), logits(checkpoint("other", rope_theta=10000.0)))


def test_defaults_are_transformers_not_peers(checkpoint: MakeCheckpoint) -> None:
    path = checkpoint()
    edit(path, tie_word_embeddings=None)
    raw = json.loads((path / "config.json").read_text())
    del raw["sliding_window"]
    (path / "config.json").write_text(json.dumps(raw))
    config = open_checkpoint(path).config
    assert config.tie_word_embeddings is False
    assert config.sliding_window == 4096


@slow
def test_window_can_be_overridden(checkpoint: MakeCheckpoint) -> None:
    path = checkpoint()
    assert load(path)[0].config.sliding_window == 12
    model, _ = load(path, window=4)
    assert model.config.sliding_window == 4
    assert model.make_cache()[0].window == 4
    assert load(path, window=0)[0].config.sliding_window is None
    assert not mx.array_equal(logits(path), logits(path, window=4))
    assert "negative" in refused(path, window=-1)
    assert load(path, window=10**400)[0].config.sliding_window == 2**31 - 1


def test_a_window_beyond_any_sequence(checkpoint: MakeCheckpoint) -> None:
    """Neither the prediction nor the run takes longer for it, nor anything but its meaning."""
    model, tokenizer = load(checkpoint(sliding_window=10**12))
    cache = PromptCache(model, max_bytes=10**9)
    found = list(stream_generate(model, tokenizer, "abc", max_tokens=2, prompt_cache=cache))
    model, tokenizer = load(checkpoint("none", sliding_window=None))
    expected = list(stream_generate(model, tokenizer, "abc", max_tokens=2))
    assert [r.token for r in found] == [r.token for r in expected]


def test_llama_has_no_window(checkpoint: MakeCheckpoint) -> None:
    path = checkpoint(model_type="llama", architectures=["LlamaForCausalLM"])
    assert load(path)[0].config.sliding_window is None
    assert mx.array_equal(logits(path), logits(checkpoint("plain", sliding_window=None)))


def test_tied_head(checkpoint: MakeCheckpoint) -> None:
    path = checkpoint(tie_word_embeddings=True)
    model, _ = load(path)
    assert "lm_head" not in model
    weights = load_file(path / "model.safetensors")
    # Some checkpoints carry the tied head, or old RoPE buffers, all the same.
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    save_file(weights, path / "model.safetensors")
    assert mx.array_equal(model(IDS), logits(path))


def test_a_tied_table_that_is_stored_as_the_head(checkpoint: MakeCheckpoint) -> None:
    """As safetensors.torch.save_model leaves it; transformers 5.24 reads it as the embedding."""
    path = checkpoint(tie_word_embeddings=True)
    expected = logits(path)

    def rename(weights: dict[str, Any]) -> None:
        weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")

    rewrite(path, rename)
    assert mx.array_equal(logits(path), expected)
    edit(path, tie_word_embeddings=False)
    assert "tensors missing: model.embed_tokens.weight" in refused(path)


def own_head(path: Path, identical: bool = False) -> None:
    """Give a tied checkpoint a stored head: another one, or the embedding once more."""

    def change(weights: dict[str, Any]) -> None:
        table = weights["model.embed_tokens.weight"]
        weights["lm_head.weight"] = table.copy() if identical else table[::-1].copy()

    rewrite(path, change)


def test_a_head_that_is_not_the_embedding_is_used(checkpoint: MakeCheckpoint) -> None:
    """Whatever tie_word_embeddings says, as transformers does; an identical one costs nothing."""
    tied = checkpoint(tie_word_embeddings=True)
    plain = open_checkpoint(tied).config
    assert plain.tie_word_embeddings
    expected = logits(tied)
    own_head(tied, identical=True)
    checkpointed = open_checkpoint(tied)
    assert (checkpointed.config, checkpointed.spare) == (plain, frozenset({"lm_head"}))
    assert mx.array_equal(logits(tied), expected)

    own_head(tied)
    other = open_checkpoint(tied)
    assert not other.config.tie_word_embeddings
    assert not other.spare
    table = 260 * 64
    assert other.config.stored_parameters == plain.stored_parameters + table
    more = choose_storage(other, None, "float32").nbytes
    assert more == choose_storage(checkpointed, None, "float32").nbytes + 4 * table
    # In another order of columns a BLAS may add in another order.
    assert mx.allclose(logits(tied), expected[..., ::-1], rtol=1e-5, atol=1e-6)
    # The last value of several pieces decides too, and so does the dtype.
    own_head(tied, identical=True)
    rewrite(tied, lambda w: w["lm_head.weight"].__setitem__((-1, -1), 7.0))
    assert not open_checkpoint(tied).config.tie_word_embeddings
    rewrite(tied, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"][:9].copy()}))
    assert "lm_head.weight is [9, 64]" in refused(tied)


def test_a_norm_without_an_epsilon(checkpoint: MakeCheckpoint) -> None:
    model, tokenizer = load(checkpoint(rms_norm_eps=0.0))
    assert bool(mx.isfinite(model(mx.array([tokenizer.encode("a")]))).all())


def test_plan_at_load(checkpoint: MakeCheckpoint, plan_file: Callable[..., Path]) -> None:
    path = checkpoint()
    model, _ = load(path, plan=str(plan_file("0-4,2-6,4-8")))
    assert model.config.layer_map == (0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7)
    assert len(model.model.layers) == 8
    assert not mx.array_equal(model(IDS), logits(path))
    assert "past the model" in refused(path, plan=str(plan_file("0-9")))


def test_generation_config_and_config_eos(checkpoint: MakeCheckpoint) -> None:
    path = checkpoint(eos_token_id=[2, 9])
    assert load(path)[1].eos_token_ids == {2, 9}
    (path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert load(path)[1].eos_token_ids == {2, 7, 9}
    (path / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert load(path)[1].eos_token_ids == {2, 5, 9}


def test_cpu_auto_is_float32_and_dtype_is_kept_when_asked(checkpoint: MakeCheckpoint) -> None:
    path = checkpoint(dtype=np.float16)
    for dtype, expected in (("float16", mx.float16), ("bfloat16", mx.bfloat16)):
        model, _ = load(path, dtype=dtype)
        assert {v.dtype for v in parameters(model).values()} == {expected}
    if not device.on_gpu():
        model, _ = load(path)
        assert {v.dtype for v in parameters(model).values()} == {mx.float32}
    assert "dtype" in refused(path, dtype="int8")


@pytest.mark.parametrize("bits", [4, 8])
@slow
def test_q_bits_at_load(checkpoint: MakeCheckpoint, tmp_path: Path, bits: int) -> None:
    from convert.layout import Options
    from convert.pipeline import convert

    path, converted = checkpoint(), tmp_path / "converted"
    packed, _ = load(path, q_bits=bits, q_group_size=32)  # asked for, so kept packed
    convert(open_checkpoint(path), converted, Options(packing=Packing(bits, 32)))
    assert packed.model.layers[0].self_attn.qkv_proj.bits == bits
    assert packed.model.embed_tokens.weight.dtype == mx.uint32
    dense, _ = load(converted, dtype="auto")  # on the CPU: dequantized
    off = mx.abs(packed(IDS) - dense(IDS)).max()
    assert off < 1e-4
    exact = logits(path)
    assert mx.abs(dense(IDS) - exact).max() > 1e-3  # it did quantize
    assert mx.abs(dense(IDS) - exact).max() < (3 if bits == 4 else 0.3)


def test_mlx_lm_quantized_directory(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    from mlx_lm.convert import convert as mlx_lm_convert

    path = checkpoint()
    theirs = tmp_path / "theirs"
    mlx_lm_convert(str(path), str(theirs), quantize=True, q_group_size=32, q_bits=4)
    ours = logits(path, q_bits=4, q_group_size=32, dtype="float32")
    assert mx.array_equal(logits(theirs, dtype="float32"), ours)
    assert "quantized already" in refused(theirs, q_bits=4)


def test_mixed_bits_in_one_block(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """v_proj in 8 bits beside q and k in 4, o_proj not at all: read right, packed and dense."""
    from mlx_lm.convert import convert as mlx_lm_convert
    from mlx_lm.utils import load_model as mlx_lm_load

    def predicate(path: str, _: Any, *__: Any) -> bool | dict[str, int]:
        return {"group_size": 32, "bits": 8} if "v_proj" in path else "o_proj" not in path

    source, theirs = checkpoint(sliding_window=None), tmp_path / "theirs"
    options: dict[str, Any] = {"quantize": True, "q_group_size": 32, "q_bits": 4}
    mlx_lm_convert(str(source), str(theirs), quant_predicate=predicate, **options)
    reference, _ = mlx_lm_load(theirs)
    packed, _ = load(theirs, dtype="float32")
    assert "q_proj" in packed.model.layers[0].self_attn  # not packed alike, so not fused
    assert "gate_up_proj" in packed.model.layers[0].mlp
    assert mx.abs(packed(IDS) - reference(IDS)).max() < 1e-4
    assert mx.abs(logits(theirs) - reference(IDS)).max() < 1e-4


@slow
def test_loading_holds_the_model_and_one_block(checkpoint: MakeCheckpoint) -> None:
    path = checkpoint(hidden_size=256, intermediate_size=1024, vocab_size=6000, dtype=np.float16)
    source = open_checkpoint(path)
    before = resting()
    model = load_model(source, source.config, choose_storage(source, None, "float32"))
    held = mx.get_active_memory() - before
    exact = 4 * source.config.stored_parameters
    assert exact <= held <= 1.05 * exact
    assert mx.get_peak_memory() - before <= held + 4 * source.config.block_parameters
    del model


@pytest.mark.parametrize("stored", [np.float16, np.float32])
@slow
def test_packing_on_the_way_takes_no_more_than_was_predicted(
    checkpoint: MakeCheckpoint, stored: Any
) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 32000}
    source = open_checkpoint(checkpoint(dtype=stored, num_hidden_layers=2, **sizes))
    slack = 50_000  # norms, and what MLX rounds up
    for bits, dtype in product((8, 4), ("float16", "float32")):
        storage = choose_storage(source, Packing(bits, 64), dtype)
        before = resting()
        model = load_model(source, source.config, storage)
        assert mx.get_active_memory() - before <= storage.nbytes + slack, (bits, dtype)
        peak = mx.get_peak_memory() - before
        assert peak <= storage.nbytes + storage.transient + slack, (bits, dtype)
        del model


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.one_in(10)
def test_logits_and_cache_have_the_dtype(
    checkpoint: MakeCheckpoint, tmp_path: Path, mode: str, dtype: str
) -> None:
    """mlx-lm's float formats too, whose embeddings come out as bfloat16."""
    from mlx_lm.convert import convert as mlx_lm_convert

    theirs = tmp_path / mode
    sizes = {"affine": (32, 4), "mxfp4": (32, 4), "nvfp4": (16, 4)}[mode]
    options: dict[str, Any] = {"q_group_size": sizes[0], "q_bits": sizes[1], "q_mode": mode}
    mlx_lm_convert(str(checkpoint(dtype=np.float16)), str(theirs), quantize=True, **options)
    model, _ = load(theirs, dtype=dtype)
    cache = model.make_cache()
    assert model(IDS, cache).dtype == getattr(mx, dtype)
    assert cache[0].keys is not None
    assert cache[0].keys.dtype == getattr(mx, dtype)
    ours, exact = (
        np.array(x.astype(mx.float32)) for x in (model(IDS), logits(checkpoint("exact")))
    )
    assert np.corrcoef(ours.ravel(), exact.ravel())[0, 1] > 0.8  # 4 bits, not noise


def test_null_packing_means_the_default(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """As mlx-lm's mixed recipes write it."""
    from mlx_lm.convert import convert as mlx_lm_convert

    theirs = tmp_path / "mixed"
    source = checkpoint(hidden_size=128)
    mlx_lm_convert(str(source), str(theirs), quantize=True, quant_predicate="mixed_2_6")
    load(theirs)
    raw = json.loads((theirs / "config.json").read_text())["quantization"]
    assert any(isinstance(v, dict) and v.get("group_size") is None for v in raw.values())


def test_packed_tensors_of_the_wrong_dtype(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    from convert.layout import Options
    from convert.pipeline import convert

    packed = tmp_path / "packed"
    convert(open_checkpoint(checkpoint()), packed, Options(packing=Packing(4, 32)))
    file = next(packed.glob("*.safetensors"))
    weights = load_file(file)
    name = "model.layers.0.mlp.up_proj"
    save_file(weights | {f"{name}.weight": weights[f"{name}.weight"].view(np.int32)}, file)
    assert f"{name}.weight is I32" in refused(packed)
    scales = weights[f"{name}.scales"].astype(np.uint8)
    save_file(weights | {f"{name}.scales": scales}, file)
    assert f"{name}.scales is U8" in refused(packed)


def test_bits_that_divide_nothing(checkpoint: MakeCheckpoint) -> None:
    path = checkpoint(intermediate_size=96)
    wanted = "divides into 4-bit groups of 128; --q-group-size 32 fits"
    assert wanted in refused(path, q_bits=4, q_group_size=128)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_stored_dtype_is_seen(checkpoint: MakeCheckpoint, dtype: Any) -> None:
    name = {"float16": "F16", "float32": "F32"}[np.dtype(dtype).name]
    assert open_checkpoint(checkpoint(dtype=dtype)).weight_dtype == name


def test_too_large_is_refused_with_the_numbers(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint()
    monkeypatch.setattr("mlx_cerebrum.model.memory.available_bytes", lambda: 100_000)
    with pytest.raises(MemoryBudgetError, match=r"needs \d\.\d MB and 0\.1 MB are free; .*q-bits"):
        load(path, dtype="float32")


def test_progress_reaches_the_end(checkpoint: MakeCheckpoint) -> None:
    seen: list[tuple[int, int]] = []
    load(checkpoint(), progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 0


# What is damaged, and what the one line must say.


def test_missing_path(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nowhere")


def test_not_a_checkpoint(tmp_path: Path) -> None:
    assert "no config.json" in refused(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    assert "is not a checkpoint" in refused(tmp_path / "notes.txt")


def test_pickle_only(checkpoint: MakeCheckpoint) -> None:
    path = checkpoint()
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    message = refused(path)
    assert "safetensors" in message
    assert "pickle" in message
    assert "pickle" in refused(path / "pytorch_model.bin")


def test_no_weights(checkpoint: MakeCheckpoint) -> None:
    path = checkpoint()
    (path / "model.safetensors").unlink()
    assert "no safetensors files" in refused(path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "qwen2"}, "'qwen2' is not supported"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be finite"),
        ({"rope_theta": float("inf")}, "rope_theta must be finite"),
        ({"rope_theta": "big"}, "rope_theta must be a number"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": 64.5}, "hidden_size"),
        ({"num_attention_heads": True}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "share 3 key/value heads"),
        ({"num_hidden_layers": 10**9}, "at most"),
        ({"sliding_window": -4}, "sliding_window"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"layer_map": [0, 8]}, "layer_map[1] is 8"),
        ({"layer_map": []}, "layer_map"),
        ({"layer_map": [0, 1], "residual_scales": [[1.0, 1.0]]}, "residual_scales"),
        ({"residual_scales": [[float("nan"), 1.0]] * 8}, "residual_scales[0]"),
        ({"format_version": 2}, "format_version"),
        ({"eos_token_id": "two"}, "eos_token_id"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": True}, "layer_types"),
        ({"layer_types": [[1]]}, "layer_types"),
        ({"rope_theta": 10**400}, "rope_theta must be finite"),
        ({"residual_scales": [[10**400, 1.0]] * 8}, "residual_scales[0]"),
        ({"model_type": None, "architectures": {"a": 1}}, "model_type is missing"),
        ({"model_type": None, "architectures": ["Foo"]}, "'Foo' is not supported"),
        ({"quantization": {"bits": 4}}, "quantization"),
        ({"quantization": {"bits": 4, "group_size": 7}, "x": 1}, None),
    ],
)
def test_bad_config(checkpoint: MakeCheckpoint, changes: dict[str, Any], says: str | None) -> None:
    path = checkpoint()
    edit(path, **changes)
    if says is None:  # a packing that no tensor uses changes nothing
        load(path)
        return
    message = refused(path)
    assert says in message
    assert "config.json" in message


@pytest.mark.parametrize(
    "change", [{"bits": 4.0}, {"group_size": 32.0}, {"bits": "4"}, {"bits": 0}]
)
def test_packings_are_whole_numbers(
    checkpoint: MakeCheckpoint, tmp_path: Path, change: dict[str, Any]
) -> None:
    """4.0 equals 4, but MLX takes no floats."""
    path = tmp_path / "packed"
    flags = ["-q", "--q-group-size", "32", "--quiet"]
    assert convert(["--hf-path", str(checkpoint()), "--mlx-path", str(path), *flags]) == 0
    packing = json.loads((path / "config.json").read_text())["quantization"]
    edit(path, quantization=packing | change)
    assert "quantization of" in refused(path)


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1' + "0" * 5000 + "}", "\xff"])
def test_config_that_is_not_an_object(checkpoint: MakeCheckpoint, text: str) -> None:
    path = checkpoint()
    (path / "config.json").write_text(text, encoding="latin-1")
    assert "config.json" in refused(path)


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    weights: dict[str, Any] = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors")


def test_missing_extra_and_misshapen_tensors(checkpoint: MakeCheckpoint) -> None:
    name = "model.layers.3.mlp.up_proj.weight"
    path = checkpoint("missing")
    rewrite(path, lambda w: w.pop(name))
    assert f"tensors missing: {name}" in refused(path)
    path = checkpoint("extra")
    rewrite(path, lambda w: w.update({"model.layers.8.mlp.up_proj.weight": w[name]}))
    assert "no place for: model.layers.8.mlp.up_proj.weight" in refused(path)
    path = checkpoint("misshapen")
    rewrite(path, lambda w: w.update({name: w[name].T.copy()}))
    assert f"{name} is [64, 128], not [128, 64]" in refused(path)
    path = checkpoint("integers")
    rewrite(path, lambda w: w.update({name: w[name].astype(np.int32)}))
    assert f"{name} is I32" in refused(path)
    path = checkpoint("bias")
    rewrite(path, lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": w[name][0]}))
    assert "q_proj.bias" in refused(path)


def test_truncated_shard(checkpoint: MakeCheckpoint) -> None:
    path = checkpoint(shards=2) / "model-00002-of-00002.safetensors"
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        message = refused(path.parent)
        assert path.name in message
        assert "truncated" in message
    path.write_bytes(whole + b"x")
    assert "after its last tensor" in refused(path.parent)


def header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8 : 8 + length])
    change(entries)
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"data_offsets": [0, 4]}, "need"),
        ({"data_offsets": [-8, 65536 - 8]}, "offsets"),
        ({"data_offsets": "x"}, "offsets"),
        ({"shape": [2**70, 2**70]}, "need"),
        ({"shape": [-1, 64]}, "shape"),
        ({"dtype": "F3"}, "dtype"),
        ({"dtype": []}, "dtype"),
        ({"dtype": {"F32": 1}}, "dtype"),
        ({"dtype": None}, "dtype"),
        ({"shape": [True, 64]}, "shape"),
        ({"shape": [64.0]}, "shape"),
        ({"shape": {"0": 1}}, "shape"),
        ({"shape": [10**4000, 64]}, "shape"),
        ({"shape": [10**99] * 32}, "need"),
        ({"shape": [1] * 100_000}, "shape"),
        ({"data_offsets": [0, float("nan")]}, "offsets"),
        ({"data_offsets": [0, 10**99]}, "need"),
        ({"data_offsets": [0, 10, 20]}, "offsets"),
        ({"data_offsets": [False, True]}, "offsets"),
    ],
)
def test_lying_header(checkpoint: MakeCheckpoint, entry: dict[str, Any], says: str) -> None:
    path = checkpoint()
    file = path / "model.safetensors"
    header(file, lambda entries: entries["lm_head.weight"].update(entry))
    message = refused(path)
    assert says in message
    assert "lm_head.weight" in message


@pytest.mark.parametrize("entry", [7, None, [], "F32", {}, {"shape": [1]}])
def test_a_header_entry_that_is_none(checkpoint: MakeCheckpoint, entry: Any) -> None:
    path = checkpoint()
    header(path / "model.safetensors", lambda entries: entries.update({"lm_head.weight": entry}))
    assert "the header of 'lm_head.weight' has no known dtype" in refused(path)


@pytest.mark.parametrize(
    "metadata", [[1], [], "", "x", {"format": 7}, {"format": None}, {"a": ["b"]}]
)
def test_metadata_that_is_not_text(checkpoint: MakeCheckpoint, metadata: Any) -> None:
    path = checkpoint()
    header(path / "model.safetensors", lambda entries: entries.update(__metadata__=metadata))
    assert "__metadata__ is not text by name" in refused(path)


@slow
def test_more_tensors_than_any_model_has(checkpoint: MakeCheckpoint) -> None:
    path = checkpoint()
    many = {str(i): {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}
    header(path / "model.safetensors", lambda entries: entries.update(many))
    assert "100000 are supported" in refused(path)


def test_overlapping_tensors(checkpoint: MakeCheckpoint) -> None:
    path = checkpoint()

    def overlap(entries: dict[str, Any]) -> None:
        entries["lm_head.weight"]["data_offsets"] = entries["model.embed_tokens.weight"][
            "data_offsets"
        ]

    header(path / "model.safetensors", overlap)
    assert "overlaps" in refused(path)


def test_header_that_names_a_tensor_twice(checkpoint: MakeCheckpoint) -> None:
    path = checkpoint()
    file = path / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = raw[8 : 8 + length].rstrip()[:-1]
    text += b',"lm_head.weight":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    assert "twice" in refused(path)


@pytest.mark.parametrize(
    "name", ["../escape.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "", 7]
)
def test_index_outside_the_directory(checkpoint: MakeCheckpoint, name: Any) -> None:
    path = checkpoint(shards=2)
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["lm_head.weight"] = name
    file.write_text(json.dumps(index))
    message = refused(path)
    assert "not a safetensors file of the directory" in message


def test_index_that_disagrees(checkpoint: MakeCheckpoint) -> None:
    path = checkpoint(shards=2)
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    other = names[index["weight_map"]["lm_head.weight"] == names[0]]
    index["weight_map"]["lm_head.weight"] = other
    file.write_text(json.dumps(index))
    assert f"lm_head.weight is in {other}" in refused(path)
    index["weight_map"]["lm_head.weight"] = "model-00003-of-00002.safetensors"
    file.write_text(json.dumps(index))
    assert "is missing" in refused(path)


def test_same_tensor_in_two_shards(checkpoint: MakeCheckpoint) -> None:
    path = checkpoint(shards=2)
    first, second = sorted(path.glob("*.safetensors"))
    a, b = load_file(first), load_file(second)
    name = next(iter(a))
    save_file(b | {name: a[name]}, second)
    assert "is in both" in refused(path)


def test_adapter_is_refused(checkpoint: MakeCheckpoint) -> None:
    path = checkpoint()
    (path / "adapter_config.json").write_text("{}")
    assert "LoRA" in refused(path)


def test_code_in_a_checkpoint_never_runs(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    path = checkpoint()
    (path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    edit(path, model_file="evil.py", auto_map={"AutoModelForCausalLM": "evil.Model"})
    load(path)
    assert not (tmp_path / "ran").exists()


def test_tokenizer_larger_than_the_model(checkpoint: MakeCheckpoint) -> None:
    path = checkpoint(vocab_size=200)
    with pytest.raises(ConfigError, match="259 tokens, the model 200"):
        load(path)


def test_demo_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    def missing(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(CheckpointError, match="mlx-cerebrum pull demo"):
        load("demo")


@slow
def test_demo_file_loads_packed(demo: Path) -> None:
    """The integers of the file are what the model multiplies with."""
    model, tokenizer = load(demo, dtype="float16")
    assert isinstance(model, Model)
    attention = model.model.layers[0].self_attn.qkv_proj
    assert (attention.bits, attention.group_size) == (4, 32)
    assert (model.model.embed_tokens.bits, model.model.embed_tokens.group_size) == (8, 32)
    assert tokenizer.bos_token_id == 1
    assert tokenizer.add_bos is False
