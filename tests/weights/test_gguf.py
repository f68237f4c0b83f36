"""The GGUF reader against the `gguf` package (its writer, reader and dequantizer)."""

import json
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from conftest import slow
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_cerebrum.errors import CerebrumError, CheckpointError, ConfigError
from mlx_cerebrum.model.tensors import module_shapes
from mlx_cerebrum.weights.gguf_blocks import BITS, WIDE, read_arrays
from mlx_cerebrum.weights.gguf_checkpoint import GGUFCheckpoint
from mlx_cerebrum.weights.gguf_file import GGML_TYPES, GGUFFile, GGUFTensor

Array = npt.NDArray[Any]

HIDDEN, MLP, HEADS, KV_HEADS, HEAD_DIM, VOCAB, LAYERS = 64, 96, 4, 2, 16, 40, 2
SHAPES = {
    "model.embed_tokens": ("token_embd", (VOCAB, HIDDEN)),
    **{
        f"model.layers.{layer}.{path}": (f"blk.{layer}.{name}", shape)
        for layer in range(LAYERS)
        for path, name, shape in [
            ("input_layernorm", "attn_norm", (HIDDEN,)),
            ("self_attn.q_proj", "attn_q", (HEADS * HEAD_DIM, HIDDEN)),
            ("self_attn.k_proj", "attn_k", (KV_HEADS * HEAD_DIM, HIDDEN)),
            ("self_attn.v_proj", "attn_v", (KV_HEADS * HEAD_DIM, HIDDEN)),
            ("self_attn.o_proj", "attn_output", (HIDDEN, HEADS * HEAD_DIM)),
            ("post_attention_layernorm", "ffn_norm", (HIDDEN,)),
            ("mlp.gate_proj", "ffn_gate", (MLP, HIDDEN)),
            ("mlp.up_proj", "ffn_up", (MLP, HIDDEN)),
            ("mlp.down_proj", "ffn_down", (HIDDEN, MLP)),
        ]
    },
    "model.norm": ("output_norm", (HIDDEN,)),
    "lm_head": ("output", (VOCAB, HIDDEN)),
}
METADATA: dict[str, Any] = {
    "llama.block_count": LAYERS,
    "llama.context_length": 512,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": MLP,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": HEAD_DIM,
    "llama.vocab_size": VOCAB,
    "tokenizer.ggml.tokens": [f"▁{i}" for i in range(VOCAB)],
    "tokenizer.ggml.scores": [-float(i) for i in range(VOCAB)],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.add_bos_token": True,
}


def interleave(weight: Array, heads: int) -> Array:
    """The row order llama.cpp's converter gives q and k: row (half, pair) -> (pair, half)."""
    size = weight.shape[0] // heads
    order = [
        head * size + half * (size // 2) + pair
        for head in range(heads)
        for pair in range(size // 2)
        for half in (0, 1)
    ]
    return weight[order]


def weights() -> dict[str, Array]:
    rng = np.random.default_rng(7)
    return {
        path: rng.standard_normal(shape).astype(np.float32) for path, (_, shape) in SHAPES.items()
    }


def write(
    path: Path,
    kind: Type | Callable[[str], Type] = Type.F32,
    metadata: dict[str, Any] | None = None,
    *,
    drop: tuple[str, ...] = (),
    extra: dict[str, Array] | None = None,
    replace: dict[str, Array] | None = None,
    architecture: str = "llama",
) -> Path:
    """A tiny Llama as llama.cpp would write it; a metadata value of None removes the key."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (METADATA | (metadata or {})).items():
        if key == "general.alignment":
            writer.add_custom_alignment(value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value) if value >= 0 else writer.add_int32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}
    for module, weight in weights().items():
        name = SHAPES[module][0] + ".weight"
        if name in drop:
            continue
        weight = (replace or {}).get(name, weight)
        tensor_type = Type.F32 if weight.ndim == 1 else kind(module) if callable(kind) else kind
        if module.split(".")[-1] in heads:
            weight = interleave(weight, heads[module.split(".")[-1]])
        data = gguf.quants.quantize(weight, tensor_type)
        writer.add_tensor(name, data, raw_dtype=tensor_type)
    for name, weight in (extra or {}).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dense(arrays: dict[str, mx.array]) -> Array:
    """The float32 weights, as arithmetic in float32 sees them."""
    if "scales" not in arrays:
        return np.array(arrays["weight"].astype(mx.float32))
    groups = arrays["scales"].shape[-1]
    bits = arrays["weight"].shape[-1] // groups  # words of 32 bits in groups of 32
    scales, biases = (arrays[name].astype(mx.float32) for name in ("scales", "biases"))
    return np.array(mx.dequantize(arrays["weight"], scales, biases, group_size=32, bits=bits))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write(tmp_path / "tiny.gguf")


@pytest.fixture(scope="module")
def oracle(demo: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(demo)  # takes 2 s


def opened(path: Path) -> GGUFCheckpoint:
    return GGUFCheckpoint(GGUFFile.open(path))


def read(path: Path) -> dict[str, dict[str, mx.array]]:
    checkpoint = opened(path)
    return {module: checkpoint.read(module) for module in module_shapes(checkpoint.config)}


def refused(path: Path, error: type[CerebrumError]) -> str:
    """The one line that opening, checking and reading `path` fails with."""
    with pytest.raises(error) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    assert len(message) < len(str(path)) + 400
    return message


# --- values


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1])
def test_every_tensor_comes_back_exactly(kind: Type, tmp_path: Path) -> None:
    found = read(write(tmp_path / "model.gguf", kind))
    assert list(found) == list(SHAPES)
    for module, weight in weights().items():
        stored = Type.F32 if weight.ndim == 1 else kind
        oracle = gguf.quants.dequantize(gguf.quants.quantize(weight, stored), stored)
        np.testing.assert_array_equal(dense(found[module]), oracle.reshape(weight.shape))


def test_dtypes_and_layout(tmp_path: Path) -> None:
    for kind, dtype in [
        (Type.F32, mx.float32),
        (Type.F16, mx.float16),
        (Type.BF16, mx.bfloat16),
        (Type.Q4_0, mx.uint32),
    ]:
        found = read(write(tmp_path / "model.gguf", kind))
        head = found["lm_head"]
        assert head["weight"].dtype == dtype
        assert found["model.norm"]["weight"].dtype == mx.float32
    assert head["weight"].shape == (VOCAB, HIDDEN * 4 // 32)
    assert head["scales"].shape == head["biases"].shape == (VOCAB, HIDDEN // 32)
    assert head["scales"].dtype == head["biases"].dtype == mx.float16


def test_alignment_moves_the_data(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", metadata={"general.alignment": 4096})
    for module, arrays in read(path).items():
        np.testing.assert_array_equal(dense(arrays), weights()[module])


def test_row_order_matters_here(tmp_path: Path) -> None:
    """Guards the round trip above: the stored q rows do differ from the model's."""
    file = GGUFFile.open(write(tmp_path / "model.gguf"))
    stored = dense(read_arrays(file, file.tensors["blk.0.attn_q.weight"]))
    assert not np.array_equal(stored, weights()["model.layers.0.self_attn.q_proj"])


HALVES = st.integers(0, 2**16 - 1).map(lambda bits: np.uint16(bits).view(np.float16))
SCALES = st.one_of(
    st.sampled_from([0.0, -0.0, 6e-8, -6e-8, 6.1e-5, 65504.0, -65504.0, 511.8, 512.0, 8188.0]).map(
        np.float16
    ),
    HALVES.filter(lambda value: bool(np.isfinite(value))),
)


@settings(max_examples=150, deadline=None)
@given(st.data())
@slow
def test_random_blocks_dequantize_as_in_ggml(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    kind = data.draw(st.sampled_from([Type[name] for name in BITS]))
    rows, groups = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 3)))
    count = rows * groups
    halves = 1 if kind.name.endswith("_0") else 2
    scales = data.draw(st.lists(SCALES, min_size=count * halves, max_size=count * halves))
    seed = data.draw(st.integers(0, 2**32 - 1))
    width = GGML_TYPES[kind.value][2]
    raw = np.random.default_rng(seed).integers(0, 256, (count, width), dtype=np.uint8)
    raw[:, : 2 * halves] = np.array(scales, np.float16).reshape(count, halves).view(np.uint8)
    raw = raw.reshape(rows, groups * width)

    path = tmp_path_factory.getbasetemp() / "blocks.bin"
    path.write_bytes(b"\0" * 5 + raw.tobytes())
    status = path.stat()
    columns = groups * GGML_TYPES[kind.value][1]
    tensor = GGUFTensor("x", (rows, columns), kind.name, 5, raw.nbytes)
    file = GGUFFile(path, {}, {"x": tensor}, (status.st_size, status.st_mtime_ns))
    arrays = read_arrays(file, tensor)
    # Equal as numbers: the sign of a zero may differ, since x - x is +0 and 0 * -d is -0.
    np.testing.assert_array_equal(dense(arrays), gguf.quants.dequantize(raw, kind))
    largest = max(abs(float(scale)) for scale in scales) * 2 ** (BITS[kind.name] - 1)
    wide = kind.name in WIDE or (halves == 1 and largest > 65504)
    assert arrays["scales"].dtype == (mx.float32 if wide else mx.float16)
    assert arrays["biases"].dtype == arrays["scales"].dtype


def test_tensors_larger_than_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "model.gguf", Type.Q4_1)
    whole = read(path)
    monkeypatch.setattr("mlx_cerebrum.weights.gguf_blocks._CHUNK_BLOCKS", 7)
    for module, arrays in read(path).items():
        for name, array in arrays.items():
            assert mx.array_equal(array, whole[module][name])


@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E00])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_infinite_or_nan_scale_is_refused(kind: str, bits: int, tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", Type[kind])
    tensor = GGUFFile.open(path).tensors["blk.1.ffn_up.weight"]
    content = bytearray(path.read_bytes())
    content[tensor.offset : tensor.offset + 2] = struct.pack("<H", bits)
    path.write_bytes(content)
    assert "blk.1.ffn_up.weight" in refused(path, CheckpointError)


# --- the demo model


@slow
def test_demo_header_equals_the_gguf_package(demo: Path, oracle: gguf.GGUFReader) -> None:
    file = GGUFFile.open(demo)
    fields = {key: field.contents() for key, field in oracle.fields.items() if key[:5] != "GGUF."}
    assert file.metadata == fields
    assert {
        tensor.name: GGUFTensor(
            tensor.name,
            tuple(int(size) for size in tensor.shape[::-1]),
            tensor.tensor_type.name,
            tensor.data_offset,
            tensor.n_bytes,
        )
        for tensor in oracle.tensors
    } == file.tensors


@pytest.mark.long
def test_demo_values_equal_the_gguf_package(demo: Path, oracle: gguf.GGUFReader) -> None:
    file = GGUFFile.open(demo)
    for tensor in oracle.tensors[:11] + oracle.tensors[-3:]:
        found = dense(read_arrays(file, file.tensors[tensor.name]))
        part = tensor.data[:1024]
        expected = gguf.quants.dequantize(part, tensor.tensor_type)
        np.testing.assert_array_equal(found[: len(part)], expected)


def test_demo_config(demo: Path) -> None:
    found = opened(demo)
    config, raw = found.config, found.raw_config
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim) == (30, 576, 64)
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert (config.rope_theta, config.rms_norm_eps) == (100000.0, 1e-5)
    assert config.tie_word_embeddings
    assert config.sliding_window is None
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    assert raw["quantization"] == {
        "group_size": 32,
        "mode": "affine",
        "bits": 4,
        "model.embed_tokens": {"group_size": 32, "bits": 8, "mode": "affine"},
    }


# --- config


def test_config_of_a_plain_model(tmp_path: Path) -> None:
    found = opened(write(tmp_path / "model.gguf", Type.BF16))
    config, raw = found.config, found.raw_config
    assert config.model_type == raw["model_type"] == "llama"
    assert (config.rope_theta, config.rms_norm_eps) == (10000.0, 1e-5)
    assert config.dtype == "bfloat16"
    assert config.sliding_window is None
    assert not config.tie_word_embeddings
    assert config.quantization is None
    assert "quantization" not in raw
    assert json.loads(json.dumps(raw)) == raw


def test_window_makes_it_mistral(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", Type.F16, {"llama.attention.sliding_window": 32})
    found = opened(path)
    config, raw = found.config, found.raw_config
    assert (config.model_type, config.sliding_window, config.dtype) == ("mistral", 32, "float16")
    assert raw["architectures"] == ["MistralForCausalLM"]


def test_no_output_tensor_means_tied(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", drop=("output.weight",))
    config = opened(path).config
    assert config.tie_word_embeddings
    assert list(read(path)) == [module for module in SHAPES if module != "lm_head"]


@pytest.mark.parametrize(
    ("metadata", "field", "value"),
    [
        ({"llama.rope.freq_base": 1e6}, "rope_theta", 1e6),
        ({"llama.vocab_size": None}, "vocab_size", VOCAB),
        ({"llama.rope.dimension_count": None}, "head_dim", HEAD_DIM),
        ({"llama.attention.key_length": HEAD_DIM}, "head_dim", HEAD_DIM),
        ({"tokenizer.ggml.eot_token_id": 5}, "eos_token_ids", (2, 5)),
        ({"tokenizer.ggml.eot_token_id": 2}, "eos_token_ids", (2,)),
        ({"tokenizer.ggml.eos_token_id": None}, "eos_token_ids", ()),
        ({"tokenizer.ggml.bos_token_id": None}, "bos_token_id", None),
        ({"llama.rope.scaling.type": "none"}, "rope_theta", 1e4),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, "rope_theta", 1e4),
        ({"llama.rope.scaling.type": "linear"}, "rope_theta", 1e4),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0}, "head_dim", 16),
        ({"llama.rope.scaling.attn_factor": 1.0}, "rope_theta", 1e4),
        ({"llama.expert_count": 0}, "hidden_size", HIDDEN),
        ({"split.count": 1}, "hidden_size", HIDDEN),
    ],
)
def test_metadata_becomes_config(
    metadata: dict[str, Any], field: str, value: Any, tmp_path: Path
) -> None:
    config = opened(write(tmp_path / "model.gguf", metadata=metadata)).config
    assert getattr(config, field) == value


def test_heads_of_another_size_than_hidden_over_heads(tmp_path: Path) -> None:
    """As in Mistral-Nemo: head_dim comes from the metadata, not from a division."""
    wide = {f"blk.{i}.{name}.weight" for i in range(LAYERS) for name in ("attn_q", "attn_k")}
    path = write(
        tmp_path / "model.gguf",
        metadata={"llama.attention.key_length": 8, "llama.rope.dimension_count": 8},
        replace={name: np.ones((16 if "_k" in name else 32, HIDDEN), np.float32) for name in wide}
        | {f"blk.{i}.attn_v.weight": np.ones((16, HIDDEN), np.float32) for i in range(LAYERS)}
        | {f"blk.{i}.attn_output.weight": np.ones((HIDDEN, 32), np.float32) for i in range(LAYERS)},
    )
    assert opened(path).config.head_dim == 8


def mixed(module: str) -> Type:
    if module == "model.embed_tokens":
        return Type.F16
    return Type.Q8_0 if "down_proj" in module or module == "lm_head" else Type.Q4_0


def test_mixed_bits_are_written_as_mlx_lm_does(tmp_path: Path) -> None:
    raw = opened(write(tmp_path / "model.gguf", mixed)).raw_config
    eight = {"group_size": 32, "bits": 8, "mode": "affine"}
    assert raw["quantization"] == {
        "group_size": 32,
        "bits": 4,
        "mode": "affine",
        "model.embed_tokens": False,
        "model.layers.0.mlp.down_proj": eight,
        "model.layers.1.mlp.down_proj": eight,
        "lm_head": eight,
    }
    assert raw["dtype"] == "float16"


def test_mlx_lm_loads_what_was_read(tmp_path: Path) -> None:
    """Config and arrays, saved side by side, are a checkpoint to mlx-lm; mixed bits included."""
    from mlx_lm.utils import load_model

    path = write(tmp_path / "model.gguf", mixed)
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(opened(path).raw_config))
    arrays = {
        f"{module}.{name}": array
        for module, parts in read(path).items()
        for name, array in parts.items()
    }
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    model, _ = load_model(folder)
    layer = model.layers[1]
    assert (layer.mlp.down_proj.bits, layer.mlp.up_proj.bits) == (8, 4)
    assert model(mx.array([[1, 2, 3]])).shape == (1, 3, VOCAB)


# --- laziness


def test_only_the_asked_tensor_is_read(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    original = GGUFFile.blocks

    def blocks(self: GGUFFile, tensor: GGUFTensor, limit: int) -> Iterator[npt.NDArray[np.uint8]]:
        asked.append(tensor.name)
        return original(self, tensor, limit)

    monkeypatch.setattr(GGUFFile, "blocks", blocks)
    checkpoint = opened(tiny)
    assert module_shapes(checkpoint.config) == {m: shape for m, (_, shape) in SHAPES.items()}
    assert asked == []
    checkpoint.read("model.layers.1.mlp.up_proj")
    assert asked == ["blk.1.ffn_up.weight"]


def test_a_file_that_changes_is_noticed(tiny: Path) -> None:
    checkpoint = opened(tiny)
    with tiny.open("ab") as handle:
        handle.write(b"\0")
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        checkpoint.read("model.norm")
    tiny.unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        checkpoint.read("model.norm")


def test_a_tensor_cut_short_while_reading(tiny: Path) -> None:
    file = GGUFFile.open(tiny)
    beyond = GGUFTensor("x", (8,), "F32", tiny.stat().st_size - 16, 32)
    with pytest.raises(CheckpointError, match="ended inside tensor 'x'"):
        read_arrays(file, beyond)


# --- models that are refused


@pytest.mark.parametrize(
    ("metadata", "error", "says"),
    [
        ({"llama.block_count": 2**32 - 1}, ConfigError, "block_count"),
        ({"llama.block_count": 0}, ConfigError, "num_hidden_layers"),
        ({"llama.block_count": None}, ConfigError, "llama.block_count is missing"),
        ({"llama.block_count": 2.0}, ConfigError, "num_hidden_layers"),
        ({"llama.block_count": 1}, CheckpointError, "blk.1.attn_norm.weight"),
        ({"llama.block_count": 3}, CheckpointError, "blk.2.attn_norm.weight"),
        ({"llama.embedding_length": 0}, ConfigError, "hidden_size"),
        ({"llama.embedding_length": -64}, ConfigError, "hidden_size"),
        ({"llama.embedding_length": 128}, CheckpointError, "token_embd.weight"),
        ({"llama.embedding_length": "64"}, ConfigError, "llama.embedding_length"),
        ({"llama.feed_forward_length": [96, 96]}, ConfigError, "feed_forward_length"),
        ({"llama.attention.head_count": 0}, ConfigError, "num_attention_heads"),
        ({"llama.attention.head_count": True}, ConfigError, "head_count must be one number"),
        ({"llama.attention.head_count_kv": 3}, ConfigError, "3 key/value heads"),
        ({"llama.attention.head_count_kv": 4}, CheckpointError, "attn_k"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, ConfigError, "rms_norm_eps"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, ConfigError, "epsilon is missing"),
        ({"llama.rope.freq_base": float("inf")}, ConfigError, "rope_theta"),
        ({"llama.rope.freq_base": 0.0}, ConfigError, "rope_theta"),
        ({"llama.rope.dimension_count": 8}, CheckpointError, "attn_q"),
        ({"llama.rope.dimension_count": 15}, ConfigError, "head_dim must be even"),
        (
            {"llama.attention.key_length": 16, "llama.rope.dimension_count": 8},
            ConfigError,
            "rope.dimension_count",
        ),
        ({"llama.attention.value_length": 32}, ConfigError, "value_length"),
        ({"llama.attention.sliding_window": 0}, ConfigError, "sliding_window"),
        ({"llama.rope.scaling.type": "yarn"}, ConfigError, "yarn"),
        ({"llama.rope.scaling.type": ["none"]}, ConfigError, "scaling.type"),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            ConfigError,
            "rope.scaling.factor",
        ),
        ({"llama.rope.scaling.attn_factor": 1.2}, ConfigError, "attn_factor"),
        ({"llama.rope.scaling.factor": 4.0}, ConfigError, "rope.scaling.factor"),
        ({"llama.rope.scale_linear": 4.0}, ConfigError, "scale_linear"),
        ({"llama.expert_count": 8}, ConfigError, "expert_count"),
        ({"llama.logit_scale": 0.5}, ConfigError, "logit_scale"),
        ({"llama.attention.causal": False}, ConfigError, "causal"),
        ({"llama.vocab_size": 41}, CheckpointError, "token_embd.weight"),
        ({"llama.vocab_size": None, "tokenizer.ggml.tokens": 3}, ConfigError, "vocab_size"),
        ({"tokenizer.ggml.eos_token_id": 1.5}, ConfigError, "eos_token_id"),
        ({"split.count": 3}, CheckpointError, "--merge"),
    ],
)
def test_refused_metadata(
    metadata: dict[str, Any], error: type[CerebrumError], says: str, tmp_path: Path
) -> None:
    assert says in refused(write(tmp_path / "model.gguf", metadata=metadata), error)


@pytest.mark.parametrize("architecture", ["qwen2", "mistral3", "mistral"])
def test_another_architecture_is_named(architecture: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", architecture=architecture)
    assert f"'{architecture}'" in refused(path, ConfigError)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("blk.0.attn_q.bias", CheckpointError),
        ("blk.7.attn_q.weight", CheckpointError),
        ("a name\nin two lines", CheckpointError),
        ("blk.0.ffn_gate_exps.weight", ConfigError),
        ("blk.0.ffn_gate_inp.weight", ConfigError),
    ],
)
def test_unknown_tensors_are_named(name: str, error: type[CerebrumError], tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", extra={name: np.ones(HIDDEN, np.float32)})
    assert repr(name) in refused(path, error)


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    drop = ("blk.0.ffn_up.weight", "output_norm.weight")
    message = refused(write(tmp_path / "model.gguf", drop=drop), CheckpointError)
    assert all(name in message for name in drop)


def test_old_buffers_are_computed_anew(tmp_path: Path) -> None:
    extra = {f"blk.{i}.attn_rot_embd.weight": np.ones(8, np.float32) for i in range(LAYERS)}
    assert list(read(write(tmp_path / "model.gguf", extra=extra))) == list(SHAPES)


def test_rope_divisors_must_be_ones(tmp_path: Path) -> None:
    ones = np.ones(HEAD_DIM // 2, np.float32)
    read(write(tmp_path / "model.gguf", extra={"rope_freqs.weight": ones}))
    for other in (ones * [*[1.0] * 7, 8.0], np.ones(3)):
        extra = {"rope_freqs.weight": other.astype(np.float32)}
        assert "rope_freqs" in refused(write(tmp_path / "model.gguf", extra=extra), ConfigError)


# --- files that are damaged


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(name: str, offset: int = 0, shape: tuple[int, ...] = (8,), kind: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def container(pairs: list[bytes], entries: list[bytes], data: int = 64, version: int = 3) -> bytes:
    head = struct.pack("<4sIQQ", b"GGUF", version, len(entries), len(pairs))
    body = head + b"".join(pairs) + b"".join(entries)
    return body + b"\0" * (-len(body) % 32 + data)


HUGE = struct.pack("<Q", 2**63)
STRING, ARRAY, U32 = 8, 9, 4


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"GG", "past the end"),
        (b"PK\3\4" + bytes(60), "is a zip archive"),
        (container([], [], version=1), "version 1"),
        (container([], [], version=4), "version 4"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0) + bytes(32), "big-endian"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 2**63, 0), "past the end"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**63), "past the end"),
        (container([HUGE], []), "past the end"),
        (container([pair("a", STRING, HUGE)], []), "'a'): it runs past the end"),
        (container([pair("a", ARRAY, struct.pack("<I", 5) + HUGE)], []), "past the end"),
        (container([pair("a", ARRAY, struct.pack("<I", STRING) + HUGE)], []), "past the end"),
        (
            container([pair("a", ARRAY, struct.pack("<IQ", STRING, 2) + text("b") + HUGE)], []),
            "past the end",
        ),
        (container([pair("a", ARRAY, struct.pack("<IQ", ARRAY, 1))], []), "type 9"),
        (container([pair("a", 13, b"")], []), "value type 13"),
        (container([pair("a", STRING, struct.pack("<Q", 1) + b"\xff")], []), "not UTF-8"),
        (
            container(
                [pair("a", ARRAY, struct.pack("<IQQ", STRING, 1, 1) + b"\xff")],
                [],
            ),
            "entry 0 is not UTF-8",
        ),
        (container([pair("a", U32, bytes(4))] * 2, []), "'a'): it is there twice"),
        (container([pair("general.alignment", U32, bytes(4))], []), "power of two"),
        (container([pair("general.alignment", U32, b"\x18\0\0\0")], []), "power of two"),
        (container([], [entry("t"), entry("t", 32)]), "'t'): it is there twice"),
        (container([], [entry("t"), entry("u", 0)]), "overlaps that of"),
        (container([], [entry("t", 16)]), "not a multiple of 32"),
        (container([], [entry("t", 64)]), "truncated"),
        (container([], [entry("t", 2**63)]), "truncated"),
        (container([], [entry("t", shape=(17,))]), "truncated"),
        (container([], [entry("t", shape=(2**63, 2**63, 2**63))]), "truncated"),
        (container([], [entry("t", shape=(0,))]), "cannot be stored"),
        (container([], [entry("t", shape=(33,), kind=2)]), "cannot be stored as Q4_0"),
        (container([], [entry("t", shape=())]), "0 dimensions"),
        (container([], [entry("t", shape=(1,) * 5)]), "5 dimensions"),
        (container([], [entry("t", kind=4)]), "type number 4"),
    ],
)
def test_damaged_container(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    assert says in refused(path, CheckpointError)


def test_smallest_container_and_version_2(tmp_path: Path) -> None:
    """The damaged ones above fail for their damage alone."""
    path = tmp_path / "good.gguf"
    path.write_bytes(
        container([pair("a", U32, b"\7\0\0\0")], [entry("t"), entry("u", 32)], version=2)
    )
    file = GGUFFile.open(path)
    assert file.metadata == {"a": 7}
    assert [tensor.offset % 32 for tensor in file.tensors.values()] == [0, 0]


def test_header_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_cerebrum.weights.gguf_file.MAX_HEADER", 1 << 10)
    path = write(tmp_path / "model.gguf")
    assert "larger than" in refused(path, CheckpointError)


def test_unreadable_paths(tmp_path: Path) -> None:
    assert "cannot be read" in refused(tmp_path / "none.gguf", CheckpointError)
    assert "cannot be read" in refused(tmp_path, CheckpointError)


@slow
def test_cut_anywhere(tiny: Path) -> None:
    """Every length of the header, and some of the data."""
    content = tiny.read_bytes()
    start = min(tensor.offset for tensor in GGUFFile.open(tiny).tensors.values())
    # The writer pads the last tensor too; without that padding the file is still whole.
    for length in [*range(start), *range(start, len(content) - 64, 997)]:
        tiny.write_bytes(content[:length])
        refused(tiny, CheckpointError)


def test_type_table_equals_the_gguf_package() -> None:
    sizes = {kind.value: (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    # Newer releases of the package may know more types.
    assert {number: sizes.get(number) for number in GGML_TYPES} == GGML_TYPES


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "word", "cut", "insert", "delete"]),
        st.floats(0, 1, exclude_max=True),
        st.sampled_from([b"\0" * 8, b"\xff" * 8, b"\0" * 7 + b"\x80", b"\1" + b"\0" * 7, b"\n" * 8])
        | st.binary(min_size=8, max_size=8),
    ),
    min_size=1,
    max_size=3,
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("fuzz")
    ones = np.ones(HEAD_DIM // 2, np.float32)
    return write(folder / "model.gguf", mixed, extra={"rope_freqs.weight": ones}).read_bytes()


@settings(max_examples=600, deadline=None)
@given(edits=EDITS)
@slow
def test_fuzz(sound: bytes, tmp_path_factory: pytest.TempPathFactory, edits: list[Any]) -> None:
    """Whatever happens to the bytes, the file is read or refused in one line."""
    content = bytearray(sound)
    header = 4000  # most edits should land here, not in the weights
    for edit, where, value in edits:
        at = int(where * min(header, len(content))) if where < 0.95 else int(where * len(content))
        if edit == "flip" and content:
            content[at] ^= 1 << (value[0] % 8)
        elif edit == "word":
            content[at : at + 8] = value
        elif edit == "cut":
            del content[at:]
        elif edit == "insert":
            content[at:at] = value
        else:
            del content[at : at + 1 + value[0] % 16]
    path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    path.write_bytes(content)
    try:
        read(path)
    except (CheckpointError, ConfigError) as error:
        message = str(error)
        assert "\n" not in message
        assert len(message) < len(str(path)) + 500


# --- headers made to take memory or time


def numbers(kind: int, size: int, count: int) -> bytes:
    return pair("a", ARRAY, struct.pack("<IQ", kind, count)) + bytes(size * count)


@pytest.mark.parametrize(
    ("pairs", "entries", "says"),
    [
        ([numbers(1, 1, 5_000_000)], [], "arrays of more than 2000000 values"),
        ([numbers(0, 1, 1_500_000), text("b") + numbers(7, 1, 1_500_000)[9:]], [], "2000000"),
        (
            [pair("a", ARRAY, struct.pack("<IQ", STRING, 5_000_000)) + bytes(40_000_000)],
            [],
            "2000000",
        ),
        ([pair(f"{i:x}", 0, b"\0") for i in range(100_001)], [], "100001 keys, more than 100000"),
        ([], [entry(f"{i:x}", 32 * i) for i in range(100_001)], "100001 tensors, more than"),
    ],
)
def test_more_values_than_a_header_has(
    pairs: list[bytes], entries: list[bytes], says: str, tmp_path: Path
) -> None:
    """Each value would become an object: 60 million of a byte took 3 GB."""
    path = tmp_path / "many.gguf"
    path.write_bytes(container(pairs, entries))
    tracemalloc.start()
    try:
        assert says in refused(path, CheckpointError)
        assert tracemalloc.get_traced_memory()[1] < 100_000_000
    finally:
        tracemalloc.stop()


@slow
def test_a_large_vocabulary_is_read(tmp_path: Path) -> None:
    """256 thousand tokens with scores and types, as Gemma's; a million values at most."""
    count = 262_144
    texts = b"".join(text(f"{i:x}") for i in range(count))
    pairs = [
        pair("a", ARRAY, struct.pack("<IQ", STRING, count) + texts),
        pair("b", ARRAY, struct.pack("<IQ", 6, count) + bytes(4 * count)),
        pair("c", ARRAY, struct.pack("<IQ", 5, count) + bytes(4 * count)),
    ]
    path = tmp_path / "large.gguf"
    path.write_bytes(container(pairs, []))
    assert [len(GGUFFile.open(path).metadata[key]) for key in "abc"] == [count] * 3
