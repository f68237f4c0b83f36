"""Every type a GGUF tensor can have: its values, how it is held, what a model of it does."""

import builtins
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import mlx.core as mx
import numpy as np
import pytest
from conftest import plan_yaml, resting, slow, tensors
from gguf import GGMLQuantizationType as Type
from gguf_files import HALVES, MISTRAL_7B, SIZES, q4_k_m, random_blocks

from convert.layout import Options
from convert.pipeline import convert
from convert.verify import verify
from mlx_cerebrum import device, load
from mlx_cerebrum.errors import CheckpointError, ConfigError
from mlx_cerebrum.model.tensors import matrix_shapes
from mlx_cerebrum.plan.layer_plan import LayerPlan
from mlx_cerebrum.weights.checkpoint import FLOATS, Checkpoint
from mlx_cerebrum.weights.gguf_blocks import (
    BITS,
    REPACKED,
    WIDE,
    read_arrays,
    read_dense,
    stored_packing,
)
from mlx_cerebrum.weights.gguf_file import GGUFFile, GGUFTensor
from mlx_cerebrum.weights.loading import load_model
from mlx_cerebrum.weights.opening import open_checkpoint
from mlx_cerebrum.weights.quantize import Packing
from mlx_cerebrum.weights.storage import choose_storage, smaller_weights

ROWS, WIDTH = 24, 512
MIXED = {"attn_q": "Q4_K", "attn_k": "Q5_0", "attn_v": "Q6_K", "attn_output": "Q5_K"}
MIXED |= {"ffn_gate": "Q5_1", "ffn_up": "IQ4_XS", "ffn_down": "Q3_K"}
HALF = 2.0**-11  # the most that rounding to float16 changes a number, relatively


def mixed(name: str) -> str:
    """Another type for every matrix of a block."""
    return MIXED.get(name.split(".")[-2], "Q6_K")


def blocks_file(path: Path, kind: str, raw: gguf_files.Bytes) -> tuple[GGUFFile, GGUFTensor]:
    """One tensor of these rows, without a header."""
    path.write_bytes(bytes(5) + raw.tobytes())
    status = path.stat()
    width = raw.shape[1] // SIZES[kind][1] * SIZES[kind][0]
    tensor = GGUFTensor("x", (len(raw), width), kind, 5, raw.nbytes)
    return GGUFFile(path, {}, {"x": tensor}, (status.st_size, status.st_mtime_ns)), tensor


def meant(kind: str, raw: gguf_files.Bytes) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The weights, as the gguf package has them."""
    found: np.ndarray[Any, np.dtype[np.float32]] = gguf.quants.dequantize(raw, Type[kind])
    return found


def unpacked(arrays: dict[str, mx.array], packing: Packing) -> np.ndarray[Any, Any]:
    return np.array(packing.dequantize(arrays, mx.float32))


# --- values


def test_every_type_of_the_gguf_package_is_read() -> None:
    known = {kind.name for kind in gguf.quants._type_traits} | {"F32", "F16"}
    assert known == {*FLOATS, *BITS, *REPACKED}
    assert set(WIDE) <= set(BITS)


@pytest.mark.parametrize("kind", BITS)
def test_integers_are_moved_exactly(kind: str, tmp_path: Path) -> None:
    raw = random_blocks(kind, ROWS, WIDTH)
    file, tensor = blocks_file(tmp_path / "x", kind, raw)
    arrays, packing = read_arrays(file, tensor), stored_packing(tensor)
    assert packing == Packing(BITS[kind], 32)
    assert arrays["scales"].dtype == (mx.float32 if kind in WIDE else mx.float16)
    np.testing.assert_array_equal(unpacked(arrays, packing), meant(kind, raw))


@pytest.mark.parametrize("kind", WIDE)
def test_scales_in_float16_move_a_weight_by_so_much(kind: str, tmp_path: Path) -> None:
    """The bound `gguf_blocks` states. It is tight, and float16 scales are not exact."""
    raw = random_blocks(kind, ROWS, WIDTH)
    file, tensor = blocks_file(tmp_path / "x", kind, raw)
    arrays, packing = read_arrays(file, tensor), Packing(BITS[kind], 32)
    exact = unpacked(arrays, packing)
    scales, biases = (np.array(arrays[part]).repeat(32, 1) for part in ("scales", "biases"))
    bound = HALF * (np.abs(exact - biases) + np.abs(biases))
    rounded = arrays | {part: arrays[part].astype(mx.float16) for part in ("scales", "biases")}
    error = np.abs(unpacked(rounded, packing) - exact)
    normal = np.minimum(np.abs(scales), np.abs(biases)) > 6.2e-5
    assert normal.mean() > 0.5
    share = error[normal] / bound[normal]
    assert 0.5 < share.max() <= 1.001


@pytest.mark.parametrize("kind", REPACKED)
def test_repacked_values(kind: str, tmp_path: Path) -> None:
    """Dense exactly as the package says; packed within a step of the 255 in a group."""
    raw = random_blocks(kind, ROWS, WIDTH)
    file, tensor = blocks_file(tmp_path / "x", kind, raw)
    expected = meant(kind, raw)
    np.testing.assert_array_equal(np.array(read_dense(file, tensor)), expected)
    for packing in (stored_packing(tensor), Packing(4, 32)):
        assert packing is not None
        found = unpacked(read_arrays(file, tensor, packing=packing), packing)
        groups = expected.reshape(ROWS, -1, packing.group_size)
        # MLX's range holds zero, and keeps it exact.
        low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
        step = (high - low) / (2**packing.bits - 1) + 2 * HALF * np.maximum(high, -low)
        assert (np.abs(found.reshape(groups.shape) - groups) <= step[..., None]).all()
    assert stored_packing(tensor) == Packing(8, 128)


def test_a_group_is_the_widest_that_divides_the_rows(tmp_path: Path) -> None:
    raw = random_blocks("IQ4_NL", 4, 576)  # SmolLM2's width
    file, tensor = blocks_file(tmp_path / "x", "IQ4_NL", raw)
    assert stored_packing(tensor) == Packing(8, 64)
    assert read_arrays(file, tensor)["scales"].shape == (4, 9)


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q5_0", "Q6_K", "IQ4_NL"])
def test_rows_of_heads_come_back_in_order(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they are read some at a time."""
    from mlx_cerebrum.weights.gguf_blocks import half_split

    raw = random_blocks(kind, ROWS, WIDTH)
    file, tensor = blocks_file(tmp_path / "x", kind, raw)
    packing = stored_packing(tensor)
    assert packing is not None
    plain = unpacked(read_arrays(file, tensor), packing)
    monkeypatch.setattr("mlx_cerebrum.weights.gguf_blocks.PIECE", 5 * WIDTH)
    monkeypatch.setattr("mlx_cerebrum.weights.gguf_blocks._CHUNK_BLOCKS", 7)
    found = unpacked(read_arrays(file, tensor, rotary_heads=3), packing)
    np.testing.assert_array_equal(found, half_split(plain, 3))
    assert not np.array_equal(found, plain)
    if kind in REPACKED:
        dense = np.array(read_dense(file, tensor, rotary_heads=3))
        np.testing.assert_array_equal(dense, half_split(meant(kind, raw), 3))


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("bits", [0x7C00, 0x7E00])
def test_scales_that_are_not_finite(kind: str, bits: int, tmp_path: Path) -> None:
    """Refused when they are read, and found by `verify`."""
    raw = random_blocks(kind, ROWS, WIDTH).reshape(-1, SIZES[kind][1])
    for offset in HALVES[kind]:
        damaged = raw.copy()
        damaged[5, offset : offset + 2] = list(struct.pack("<H", bits))
        file, tensor = blocks_file(tmp_path / "x", kind, damaged.reshape(ROWS, -1))
        with pytest.raises(CheckpointError, match="'x' has a scale that is not a finite number"):
            read_arrays(file, tensor)
    path = gguf_files.write(tmp_path / "model.gguf", kind)
    assert verify(path)["sound"]
    place = GGUFFile.open(path).tensors["blk.1.ffn_up.weight"].offset + HALVES[kind][-1]
    content = bytearray(path.read_bytes())
    content[place : place + 2] = struct.pack("<H", bits)
    path.write_bytes(content)
    (problem,) = verify(path)["problems"]
    assert problem["tensors"] == ["blk.1.ffn_up.weight (1)"]


def test_without_the_package_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name == "gguf":
            raise ModuleNotFoundError("No module named 'gguf'")
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    load(gguf_files.write(tmp_path / "moved.gguf", "Q4_K"))
    with pytest.raises(
        CheckpointError, match=r"token_embd\.weight' .* Q6_K.* the gguf package to read: "
    ):
        load(gguf_files.write(tmp_path / "model.gguf", lambda n: "Q6_K" if "emb" in n else "Q4_K"))


@pytest.mark.parametrize("kind", ["Q8_K", "I8", "F64", "Q1_0"])
def test_other_types_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    def odd(name: str) -> str:
        return kind if name == "blk.0.ffn_up.weight" else "Q4_K"

    path = gguf_files.write_hole(tmp_path / "model.gguf", odd, gguf_files.SMALL)
    with pytest.raises(CheckpointError, match=rf"blk\.0\.ffn_up\.weight is stored as {kind}"):
        open_checkpoint(path)


# --- a whole model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_files.write(tmp_path_factory.mktemp("kinds") / "model.gguf", mixed)


@pytest.fixture(scope="module")
def dense(model: Path) -> Callable[[str], mx.array]:
    """What a matrix of `model` means, by the gguf package and Hugging Face's name."""
    reader = gguf.GGUFReader(model)
    names = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in reader.tensors
    }
    short = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    short |= {f"{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")}

    def find(module: str) -> mx.array:
        if not module.startswith("model.layers."):
            return mx.array(names[{"lm_head": "output"}.get(module, "token_embd") + ".weight"])
        kind = module.rpartition(".")[2]
        rows = names[f"blk.{module.split('.')[2]}.{short[kind]}.weight"]
        if kind in ("q_proj", "k_proj"):  # pairs that rotate together are neighbours in the file
            heads = 4 if kind == "q_proj" else 2
            rows = rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)
        return mx.array(rows)

    return find


def logits(model: Any) -> mx.array:
    found: mx.array = model(mx.array([[1, 70, 71, 72, 90, 33]]))
    return found


def test_dense_weights_are_what_the_file_means(
    model: Path, dense: Callable[[str], mx.array]
) -> None:
    source = open_checkpoint(model)
    for module in matrix_shapes(source.config):
        assert mx.array_equal(source.dense(module), dense(module)), module
    assert source.repacked == {
        m for m in matrix_shapes(source.config)
        if m.endswith(("embed_tokens", "lm_head", "v_proj", "up_proj", "down_proj"))
    }  # fmt: skip


def test_where_memory_allows_it_runs_the_exact_weights(model: Path, tmp_path: Path) -> None:
    """On the CPU, in float32: as the same file made dense does, bit for bit."""
    convert(open_checkpoint(model), tmp_path / "dense", Options(dequantize=True))
    exact, _ = load(tmp_path / "dense", dtype="float32")
    source = open_checkpoint(model)
    storage = choose_storage(source, None, "auto")
    if not storage.dequantize:
        pytest.skip("packed weights stay packed on a GPU")
    assert mx.array_equal(logits(load_model(source, source.config, storage)), logits(exact))


@slow
def test_packed_it_computes_the_same(model: Path, tmp_path: Path) -> None:
    packed, _ = load(model, dtype="float32")
    block = packed.model.layers[0]
    held = {n: (p.bits, p.group_size) for n, p in block.named_modules() if "scales" in p}
    assert held == {
        "self_attn.q_proj": (4, 32), "self_attn.k_proj": (5, 32), "self_attn.v_proj": (8, 128),
        "self_attn.o_proj": (5, 32), "mlp.gate_proj": (5, 32), "mlp.up_proj": (8, 128),
        "mlp.down_proj": (8, 128),
    }  # fmt: skip
    convert(open_checkpoint(model), tmp_path / "packed")
    convert(open_checkpoint(tmp_path / "packed"), tmp_path / "dense", Options(dequantize=True))
    same, _ = load(tmp_path / "dense", dtype="float32")
    wanted = logits(same)
    assert float(mx.abs(logits(packed) - wanted).max()) < 1e-4
    halves, _ = load(model, dtype="float16")
    assert halves.model.layers[0].self_attn.q_proj.scales.dtype == mx.float16
    assert float(mx.abs(logits(halves) - wanted).max()) < 0.1 < float(mx.std(wanted))


def test_bits_asked_for_are_for_what_is_repacked(model: Path) -> None:
    packed, _ = load(model, q_bits=4, q_group_size=32, dtype="float32")
    block = packed.model.layers[0]
    assert (block.self_attn.v_proj.bits, block.self_attn.v_proj.group_size) == (4, 32)
    assert block.self_attn.o_proj.bits == 5
    assert [flag for flag, _ in smaller_weights(open_checkpoint(model), None, "float16")] == [
        "--q-bits 4"
    ]


def test_bits_of_a_file_that_is_only_moved_are_its_own(tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path / "model.gguf", "Q4_K")
    with pytest.raises(ConfigError, match="quantized already; drop --q-bits"):
        load(path, q_bits=4)


def test_auto_is_16_bits_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_checkpoint(gguf_files.write(tmp_path / "model.gguf", "Q4_K"))
    convert(source, tmp_path / "converted", Options())
    converted = open_checkpoint(tmp_path / "converted")
    assert converted.dtypes["model.layers.0.self_attn.q_proj.scales"] == "F32"

    monkeypatch.setattr(device, "backend", lambda: "cuda")
    for checkpoint in (source, converted):
        storage = choose_storage(checkpoint, None, "auto")
        assert (storage.dtype, storage.dequantize) == (mx.float16, False)


def test_scales_too_large_for_float16_are_named(tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path / "model.gguf", "Q4_K")
    place = GGUFFile.open(path).tensors["blk.1.ffn_up.weight"].offset
    content = bytearray(path.read_bytes())
    content[place : place + 16] = struct.pack("<ee", 60000, 0) + b"\x3f" * 12
    path.write_bytes(content)
    load(path, dtype="float32")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj.*float16.*--dtype"):
        load(path, dtype="float16")


# --- memory


def test_q4_k_m_of_a_7b_is_predicted_within_a_seventh_of_its_file(tmp_path: Path) -> None:
    """1.15 x, what loading takes besides included. The file is a hole: only headers are read."""
    path = gguf_files.write_hole(tmp_path / "7b.gguf", lambda n: q4_k_m(n, 32), MISTRAL_7B)
    size = path.stat().st_size
    assert 4.1e9 < size < 4.4e9
    storage = choose_storage(open_checkpoint(path), None, "float16")
    assert storage.nbytes + storage.transient < 1.15 * size
    assert 0 <= storage.transient < 0.05e9


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "IQ4_NL", "mixed"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "auto"])
@pytest.mark.one_in(5)
def test_loading_takes_what_was_predicted(kind: str, dtype: str, tmp_path: Path) -> None:
    geometry = gguf_files.Geometry(512, 2048, 8, 2, 4, 2000)
    path = gguf_files.write(tmp_path / "x.gguf", mixed if kind == "mixed" else kind, geometry)
    source: Checkpoint = open_checkpoint(path)
    storage = choose_storage(source, None, dtype)
    mx.clear_cache()
    mx.synchronize()
    before = resting()
    model = load_model(source, source.config, storage)
    norms = storage.dtype.size * 512 * 9
    assert mx.get_active_memory() - before <= 1.01 * (storage.nbytes + norms)
    assert mx.get_peak_memory() - before <= 1.01 * (storage.nbytes + storage.transient + norms)
    del model


# --- conversion


def test_it_converts_folded_and_back(model: Path, tmp_path: Path) -> None:
    """Written as it is read, and read back so: packed integers, and scales in float32."""
    source = open_checkpoint(model)
    convert(source, tmp_path / "folded", Options(plan=LayerPlan.from_text(plan_yaml("0-2,1-2"))))
    folded = open_checkpoint(tmp_path / "folded")
    assert verify(tmp_path / "folded")["sound"]
    for module in matrix_shapes(source.config):
        assert folded.packing(module) == source.packing(module)
        own, back = source.read(module), folded.read(module)
        assert own.keys() == back.keys()
        for part in own:
            assert own[part].dtype == back[part].dtype
            assert mx.array_equal(own[part], back[part]), (module, part)


def test_dequantized_it_is_exact(
    model: Path, dense: Callable[[str], mx.array], tmp_path: Path
) -> None:
    options = Options(
        dequantize=True, layout="unrolled", plan=LayerPlan.from_text(plan_yaml("0-2,1-2"))
    )
    convert(open_checkpoint(model), tmp_path / "out", options)
    found = tensors(tmp_path / "out")
    for position, block in enumerate((0, 1, 1)):
        for kind in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj", "mlp.gate_proj"):
            name = f"model.layers.{position}.{kind}.weight"
            assert mx.array_equal(found[name], dense(f"model.layers.{block}.{kind}"))
    assert mx.array_equal(found["lm_head.weight"], dense("lm_head"))


def test_quantized_anew_it_starts_from_what_is_stored(
    model: Path, dense: Callable[[str], mx.array], tmp_path: Path
) -> None:
    convert(
        open_checkpoint(model), tmp_path / "out", Options(dequantize=True, packing=Packing(4, 64))
    )
    found = open_checkpoint(tmp_path / "out")
    for module in ("lm_head", "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"):
        for part, array in Packing(4, 64).quantize(dense(module)).items():
            assert mx.array_equal(found.read(module)[part], array), (module, part)
    with pytest.raises(ConfigError, match="need --dequantize"):
        convert(open_checkpoint(model), tmp_path / "no", Options(packing=Packing(4, 64)))


def test_mlx_lm_loads_the_unrolled_result(model: Path, tmp_path: Path) -> None:
    """Bits and groups that differ by tensor, in its own layout; the same logits."""
    from mlx_lm.utils import load_model as load_mlx_lm

    plan = LayerPlan.from_text(plan_yaml("0-2,1-2"))
    convert(open_checkpoint(model), tmp_path / "out", Options(layout="unrolled", plan=plan))
    assert verify(tmp_path / "out")["sound"]
    theirs, _ = load_mlx_lm(tmp_path / "out")
    ours, _ = load(model, plan=plan, dtype="float32")
    found = theirs(mx.array([[1, 70, 71, 72, 90, 33]]))
    wanted = logits(ours)
    # Its activations begin in float16, as the scales of the embedding are.
    assert float(mx.abs(found - wanted).max()) < 0.005 * float(mx.std(wanted))


def test_it_is_exported_from_what_is_stored(
    model: Path, dense: Callable[[str], mx.array], tmp_path: Path
) -> None:
    from convert.gguf_export import export

    source = open_checkpoint(model)
    export(source, tmp_path / "out.gguf", kind="F32")
    back = open_checkpoint(tmp_path / "out.gguf")
    for module in ("lm_head", "model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj"):
        assert mx.array_equal(back.dense(module), dense(module))


@pytest.mark.parametrize("kind", ["Q5_K", "Q6_K", "IQ4_XS"])
def test_a_file_of_one_type_is_sound(kind: str, tmp_path: Path) -> None:
    result = verify(gguf_files.write(tmp_path / "model.gguf", kind))
    assert result["sound"]
    assert result["unchecked"] == ["hashes of model.gguf: none recorded"]
