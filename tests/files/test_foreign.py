"""What is not read here is called by its name, with what to take instead: one line each."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeCheckpoint
from safetensors.numpy import load_file, save_file

from convert.__main__ import main as convert
from convert.verify import verify
from mlx_cerebrum import load
from mlx_cerebrum.errors import CerebrumError, PlanError
from mlx_cerebrum.plan.layer_plan import LayerPlan

PROJECTION = "model.layers.3.mlp.up_proj"
WAY_OUT = "take the unquantized checkpoint"
Arrays = dict[str, Any]


def refused(path: Path, capsys: pytest.CaptureFixture[str], *says: str) -> None:
    """Loading and converting refuse `path` in the same line, and verifying says it too."""
    with pytest.raises(CerebrumError) as caught:
        load(path)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    capsys.readouterr()
    assert convert(["--hf-path", str(path), "--mlx-path", f"{path}-out"]) == 2
    assert capsys.readouterr().err == f"error: {line}\n"
    try:
        problems = " ".join(f"{p['file']} {p['problem']}" for p in verify(path)["problems"])
    except CerebrumError as error:
        problems = str(error)
    for text in says:
        assert text in line
        assert text.removeprefix(f"{path}{os.sep}") in problems


def edit(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def i32(*shape: int) -> Any:
    return np.zeros(shape, np.int32)


def u8(*shape: int) -> Any:
    return np.zeros(shape, np.uint8)


def f32(*shape: int) -> Any:
    return np.ones(shape, np.float32)


# How each quantizer stores a matrix [128, 64]: the parts that take the place of `weight`.
STORED: dict[str, tuple[Arrays, str]] = {
    "gptq": (
        {"qweight": i32(8, 128), "qzeros": i32(1, 16), "scales": f32(1, 128), "g_idx": i32(64)},
        "GPTQ",
    ),
    "awq": ({"qweight": i32(64, 16), "qzeros": i32(1, 16), "scales": f32(1, 128)}, "AWQ"),
    "bitsandbytes nf4": (
        {
            "weight": u8(4096, 1),
            "weight.absmax": f32(128),
            "weight.quant_map": f32(16),
            "weight.quant_state.bitsandbytes__nf4": u8(80),
        },
        "bitsandbytes (4 bit)",
    ),
    "bitsandbytes int8": (
        {"weight": np.zeros((128, 64), np.int8), "SCB": f32(128)},
        "bitsandbytes (8 bit)",
    ),
    "compressed-tensors": (
        {"weight_packed": i32(128, 8), "weight_scale": f32(128, 1), "weight_shape": i32(2)},
        "compressed-tensors",
    ),
    "nvfp4": (
        {"weight": u8(128, 32), "weight_scale": u8(128, 4), "weight_scale_2": f32(1)},
        "ModelOpt",
    ),
    "exl2": ({"q_weight": i32(8, 128), "q_invperm": i32(64), "q_scale": i32(1, 16)}, "EXL2"),
    "exl3": ({"trellis": np.zeros((4, 8, 64), np.int16), "suh": f32(64), "svh": f32(128)}, "EXL3"),
    "hqq": ({"W_q": u8(64, 64), "meta": u8(4)}, "HQQ"),
    "aqlm": (
        {"codes": i32(128, 8, 1), "codebooks": f32(1, 256, 1, 8), "scales": f32(128, 1, 1, 1)},
        "AQLM",
    ),
    "eetq": ({"weight": np.zeros((64, 128), np.int8), "weight_scales": f32(128)}, "EETQ"),
    "quanto": ({"weight._data": u8(128, 64), "weight._scale": f32(128, 1)}, "Quanto"),
    "torchao": ({"weight_qdata": u8(128, 32), "weight_scale_and_zero": f32(2, 128, 2)}, "torchao"),
    "mxfp4": ({"weight_blocks": u8(128, 2, 16), "weight_scales": u8(128, 2)}, "MXFP4"),
    "vptq": ({"centroids": f32(1, 16), "indices": i32(8, 8)}, "VPTQ"),
    "int8": (
        {"weight": np.zeros((128, 64), np.int8), "weight_scale": f32(128, 1)},
        "8-bit integers",
    ),
    "global scale": ({"weight": f32(128, 64), "global_scale": f32(1)}, "global scale"),
}


def stored(path: Path, parts: Arrays) -> None:
    """Every matrix of one kind in another tool's form."""
    file = path / "model.safetensors"
    tensors: Arrays = dict(load_file(file))
    for name in [n for n in tensors if n.endswith("up_proj.weight")]:
        del tensors[name]
        tensors |= {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(("parts", "name"), STORED.values(), ids=STORED)
def test_a_quantizer_is_named_by_its_tensors(
    checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str], parts: Arrays, name: str
) -> None:
    source = checkpoint()
    stored(source, parts)
    refused(source, capsys, name, WAY_OUT, "model.layers.0.mlp.up_proj")


@pytest.mark.parametrize(
    ("file", "name"),
    [("quantize_config.json", "quantized by GPTQ ("), ("quant_config.json", "quantized by AWQ (")],
)
def test_a_file_a_quantizer_left_tells_two_apart(
    checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str], file: str, name: str
) -> None:
    source = checkpoint()
    stored(source, STORED["awq"][0])
    refused(source, capsys, "GPTQ or AWQ (")
    (source / file).write_text("{}")
    refused(source, capsys, name)


def test_the_files_alone_refuse_nothing(checkpoint: MakeCheckpoint) -> None:
    source = checkpoint()
    for file in ("quantize_config.json", "recipe.yaml", "params.json", "model.onnx"):
        (source / file).write_text("{}")
    load(source)
    assert verify(source)["sound"]


@pytest.mark.parametrize("scaled", ["", "weight_scale", "weight_scale_inv"])
def test_fp8(checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str], scaled: str) -> None:
    source = checkpoint()
    file = source / "model.safetensors"
    weights: Arrays = dict(load_file(file))
    name = f"{PROJECTION}.weight"
    weights[name] = weights[name].astype(np.uint8)
    if scaled:
        weights[f"{PROJECTION}.{scaled}"] = f32(1)
    save_file(weights, file)
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(b'"U8"', b'"F8_E4M3"')
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    refused(source, capsys, "FP8", WAY_OUT, PROJECTION)


METHODS: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}, "GPTQ"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, "AWQ"),
    "bnb 4 bit": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    "bnb of old": ({"load_in_8bit": True, "llm_int8_threshold": 6.0}, "bitsandbytes"),
    "gptq of old": ({"bits": 4, "group_size": 128, "desc_act": True, "damp_percent": 0.01}, "GPTQ"),
    "awq of old": ({"w_bit": 4, "q_group_size": 128, "zero_point": True}, "AWQ"),
    "fp8": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "FP8"),
    "fbgemm": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "FP8"),
    "compressed": (
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        "compressed-tensors",
    ),
    "modelopt": (
        {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}},
        "ModelOpt",
    ),
    "exl2": ({"quant_method": "exl2", "bits": 4.25}, "EXL2"),
    "exl3": ({"quant_method": "exl3", "bits": 3.0}, "EXL3"),
    "hqq": ({"quant_method": "hqq", "quant_config": {}}, "HQQ"),
    "aqlm": ({"quant_method": "aqlm", "nbits_per_codebook": 16}, "AQLM"),
    "eetq": ({"quant_method": "eetq", "weights": "int8"}, "EETQ"),
    "quanto": ({"quant_method": "quanto", "weights": "int8"}, "Quanto"),
    "torchao": ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, "torchao"),
    "mxfp4": ({"quant_method": "mxfp4"}, "MXFP4"),
    "one of tomorrow": ({"quant_method": "nanobits", "bits": 4, "group_size": 32}, "nanobits"),
}


@pytest.mark.parametrize(("said", "name"), METHODS.values(), ids=METHODS)
def test_a_quantizer_is_named_by_the_config(
    checkpoint: MakeCheckpoint,
    capsys: pytest.CaptureFixture[str],
    said: dict[str, Any],
    name: str,
) -> None:
    source = checkpoint()
    edit(source, quantization_config=said)
    refused(source, capsys, f"quantized by {name}", WAY_OUT)


def test_mlx_quantization_is_nobody_elses(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    argv = ["--hf-path", str(checkpoint()), "--mlx-path", str(packed), "--quiet", "-q"]
    assert convert([*argv, "--q-group-size", "32"]) == 0
    for keys in (
        ("quantization",),
        ("quantization_config",),
        ("quantization", "quantization_config"),
    ):
        raw = json.loads((packed / "config.json").read_text())
        own = raw.get("quantization") or raw["quantization_config"]
        for key in ("quantization", "quantization_config"):
            raw.pop(key, None)
        (packed / "config.json").write_text(json.dumps(raw | dict.fromkeys(keys, own)))
        load(packed)
        assert verify(packed)["sound"]


# Other structures.


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"], "a LoRA adapter"),
        (["vision_tower.patch.weight", "multi_modal_projector.linear_1.weight"], "images"),
        (["model.layers.0.block_sparse_moe.gate.weight"], "mixture of experts"),
        (["model.layers.0.mlp.experts.0.up_proj.weight"], "mixture of experts"),
        (["layers.0.attention.wq.weight", "tok_embeddings.weight"], "Mistral's own format"),
        (["_orig_mod.model.norm.weight"], "training snapshot"),
    ],
)
def test_another_structure_is_named_by_its_tensors(
    checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str], names: list[str], says: str
) -> None:
    source = checkpoint()
    save_file({name: f32(4, 4) for name in names}, source / "model.safetensors", {"format": "pt"})
    refused(source, capsys, says, sorted(names)[0])


def test_a_wrapper_is_named_by_its_config(
    checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint()
    edit(source, model_type="mistral3", text_config={"model_type": "mistral"}, vision_config={})
    refused(source, capsys, "'mistral3'", "take the text-only model")


def test_an_adapter_is_no_model(
    checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint()
    (source / "adapter_config.json").write_text('{"base_model_name_or_path": "x/y"}')
    refused(source, capsys, "merge it into its base first")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["adapter_model.bin"], "LoRA adapter"),
        (["model.onnx"], "ONNX"),
        (["onnx/model.onnx"], "ONNX"),
        (["openvino_model.xml", "openvino_model.bin"], "OpenVINO"),
        (["consolidated.00.pth", "params.json"], "Mistral's or Meta's own format"),
        (["mlc-chat-config.json", "params_shard_0.bin"], "MLC"),
        (["tf_model.h5"], "TensorFlow"),
        (["weights.npz"], "old MLX format"),
        (["pytorch_model.bin"], "pickled weights"),
        (["model.safetensors.crdownload"], "unfinished download"),
        (["model.safetensors.incomplete"], "unfinished download"),
        (["model.safetensors?download=true"], "under another name"),
        (["MODEL.SAFETENSORS"], "under another name"),
        (["weights/model.safetensors"], "weights/model.safetensors lies deeper"),
    ],
)
@pytest.mark.parametrize("config", [True, False])
def test_a_folder_of_another_format(
    checkpoint: MakeCheckpoint,
    capsys: pytest.CaptureFixture[str],
    files: list[str],
    says: str,
    config: bool,
) -> None:
    source = checkpoint()
    (source / "model.safetensors").unlink()
    for file in files:
        (source / file).parent.mkdir(exist_ok=True)
        (source / file).write_bytes(b"x")
    if not config:
        (source / "config.json").unlink()
        with pytest.raises(CerebrumError, match=says if says != "pickled weights" else "config"):
            load(source)
    else:
        refused(source, capsys, says)


# A file that is not what its name says.

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 493443\n"
)
STAND_INS = {
    "pointer": (POINTER, "is a git-lfs pointer, not the file itself: run `git lfs install` and"),
    "page": (b"\n<!DOCTYPE html>\n<html><head>", "is a web page, not the file itself: download it"),
    "page without a type": (b"<html lang='en'>", "is a web page"),
    "xet pointer": (b"# xet version 0\nfilesize = 3\n", "is a git-xet pointer"),
    "empty": (b"", "is empty: download it again"),
    "hole": (bytes(5000), "begins with 512 zeros, as an unfinished download does"),
}
NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "added_tokens.json",
    "chat_template.json",
)


@pytest.mark.parametrize(("data", "says"), STAND_INS.values(), ids=STAND_INS)
@pytest.mark.parametrize("name", NAMES)
def test_a_stand_in_is_called_so(
    checkpoint: MakeCheckpoint,
    capsys: pytest.CaptureFixture[str],
    name: str,
    data: bytes,
    says: str,
) -> None:
    source = checkpoint()
    (source / name).write_bytes(data)
    refused(source, capsys, f"{source / name} {says}")


@pytest.mark.parametrize(("data", "says"), STAND_INS.values(), ids=STAND_INS)
@pytest.mark.parametrize("name", ["tokenizer.model", "x.gguf"])
def test_a_stand_in_for_a_binary_file(
    checkpoint: MakeCheckpoint, name: str, data: bytes, says: str
) -> None:
    source = checkpoint()
    (source / "tokenizer.json").unlink()
    (source / name).write_bytes(data)
    with pytest.raises(CerebrumError) as caught:
        load(source / name if name.endswith("gguf") else source)
    assert f"{source / name} {says}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        (
            "model.safetensors",
            b"Access to model x/y is restricted.",
            "is text, not the file itself",
        ),
        (
            "model.safetensors",
            b'{"error":"Repository not found"}\n',
            "is text, not the file itself",
        ),
        ("model.safetensors", b"PK\x03\x04" + bytes(100), "is a zip archive"),
        ("model.safetensors", b"GGUF\x03\0\0\0" + bytes(100), "is a GGUF file: give it a name"),
        ("chat_template.jinja", POINTER, "is a git-lfs pointer"),
    ],
)
def test_other_things_under_a_files_name(
    checkpoint: MakeCheckpoint,
    capsys: pytest.CaptureFixture[str],
    name: str,
    data: bytes,
    says: str,
) -> None:
    source = checkpoint()
    (source / name).write_bytes(data)
    refused(source, capsys, f"{source / name} {says}")


@pytest.mark.parametrize(
    "left", ["x.aria2", "x.part", "x.crdownload", ".cache/huggingface/download/y.incomplete"]
)
@pytest.mark.parametrize("cut", [True, False])
def test_what_is_left_of_a_download_is_said(
    checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str], left: str, cut: bool
) -> None:
    source = checkpoint(shards=2)
    file = source / "model-00002-of-00002.safetensors"
    beside = source / left.replace("x.", f"{file.name}.")
    beside.parent.mkdir(parents=True, exist_ok=True)
    beside.write_bytes(b"x")
    if cut:
        file.write_bytes(file.read_bytes()[:-100])
    else:
        file.unlink()
    refused(source, capsys, f"({beside.name} is left of an unfinished download)")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "README.md"]
)
def test_a_pipe_is_not_waited_for(
    checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    source = checkpoint()
    (source / name).unlink(missing_ok=True)
    os.mkfifo(source / name)
    refused(source, capsys, f"{source / name} is no regular file")


@pytest.mark.parametrize(
    ("data", "says"),
    [STAND_INS["pointer"], STAND_INS["page"], STAND_INS["page without a type"]],
)
def test_a_stand_in_for_a_plan(tmp_path: Path, data: bytes, says: str) -> None:
    file = tmp_path / "plan.yml"
    file.write_bytes(data)
    with pytest.raises(PlanError) as caught:
        LayerPlan.from_file(file)
    assert str(caught.value).startswith(f"{file} {says}")
