"""What is not read here: how to know it, what people call it, and what to take instead.

Three kinds: another tool's quantization (known by config.json or tensor names), a folder in
another format, and a file that is not what its name says (a git-lfs pointer, a web page).
"""

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_INSTEAD = "take the unquantized checkpoint (it is packed here), or one for MLX or a GGUF"

# `quant_method` as config.json has it -> what people call it; any other keeps its name.
_METHODS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8 (fbgemm)",
    "compressed-tensors": "compressed-tensors",
    "modelopt": "ModelOpt",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "eetq": "EETQ",
    "quanto": "Quanto",
    "torchao": "torchao",
    "mxfp4": "MXFP4 (not MLX's)",
    "auto-round": "AutoRound",
    "intel/auto-round": "AutoRound",
    "bitnet": "BitNet",
    "vptq": "VPTQ",
    "higgs": "HIGGS",
    "spqr": "SpQR",
    "quark": "Quark",
}
# Keys of older configs, which have no `quant_method`.
_KEYS = {
    "load_in_4bit": "bitsandbytes",
    "load_in_8bit": "bitsandbytes",
    "bnb_4bit_quant_type": "bitsandbytes",
    "w_bit": "AWQ",
    "q_group_size": "AWQ",
    "desc_act": "GPTQ",
    "damp_percent": "GPTQ",
    "config_groups": "compressed-tensors",
    "activation_scheme": "FP8",
    "rotation_seed": "EXL2",
}
# Files that a quantizer leaves beside the weights.
_QUANTIZERS = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
    "quantization_config.json": "EXL3",
    "quanto_qmap.json": "Quanto",
    "qmodel.pt": "HQQ",
    "recipe.yaml": "compressed-tensors",
}
# How tensor names end; one such name is enough. The most telling come first.
_TENSORS = (
    (r"\.g_idx", "GPTQ"),
    (r"\.(qweight|qzeros)", "GPTQ or AWQ"),
    (r"\.(quant_map|quant_state\.bitsandbytes__\w+|absmax|nested_absmax)", "bitsandbytes (4 bit)"),
    (r"\.(SCB|weight_format)", "bitsandbytes (8 bit)"),
    (r"\.weight_packed", "compressed-tensors"),
    (r"\.weight_scale_2", "ModelOpt (NVFP4)"),
    (r"\.(q_weight|q_invperm|q_scale_max)", "EXL2"),
    (r"\.(trellis|suh|svh)", "EXL3"),
    (r"\.W_q", "HQQ"),
    (r"\.codebooks?", "AQLM"),
    (r"_blocks", "MXFP4 (not MLX's)"),
    (r"\.weight_scales", "EETQ"),
    (r"\.weight\._(data|scale|shift)", "Quanto"),
    (r"[._](qdata|tensor_impl\w*)", "torchao"),
    (r"\.(centroids|res_centroids)", "VPTQ"),
    (r"\.(Qidxs|SU|SV)", "QuIP#"),
    (r"\.qbiases", "Metal"),
    (r"\.global_scale", "NVFP4 with a global scale"),
    (r"\.(weight_scale(_inv)?|input_scale)", "FP8 or 8-bit integers"),
)

# Tensor names of checkpoints that are more, or other, than a plain Mistral or Llama.
_STRUCTURES = (
    (r"(^|\.)lora_[aAbB](\.|$)", "a LoRA adapter", "merge it into its base model first"),
    (
        r"(^|\.)(vision_tower|vision_model|visual|vision_encoder|multi_modal_projector|mm_projector"
        r"|patch_merger|audio_tower)\.",
        "a model for images or sound too",
        "take the text-only model it was made from",
    ),
    (
        r"\.(block_sparse_moe|experts|moe)\.|\.mlp\.gate\.weight$",
        "a mixture of experts",
        "only models of one expert run here",
    ),
    (
        r"^(layers\.\d+\.attention\.w[qkvo]|tok_embeddings)\.",
        "Mistral's own format (consolidated)",
        "take the Hugging Face one, of the same repository or by transformers' converter",
    ),
    (
        r"^(_orig_mod|module)\.",
        "a training snapshot (names that begin with module. or _orig_mod.)",
        "save it again with transformers' save_pretrained",
    ),
)

# What a folder holds instead of safetensors.
_FOLDERS = (
    ("adapter_model.*", "a LoRA adapter", "merge it into its base model first"),
    ("adapters.safetensors", "an mlx-lm adapter", "merge it with mlx_lm.fuse first"),
    ("params.json", "Mistral's or Meta's own format", "take the Hugging Face one"),
    ("*.onnx", "ONNX", None),
    ("onnx/*.onnx", "ONNX", None),
    ("openvino_model*", "OpenVINO", None),
    ("*.mlpackage", "Core ML", None),
    ("*.mlmodelc", "Core ML", None),
    ("mlc-chat-config.json", "MLC", None),
    ("tf_model*.h5", "TensorFlow", None),
    ("flax_model*.msgpack", "Flax", None),
    ("*.engine", "TensorRT", None),
    ("*.nemo", "NeMo", None),
    ("weights*.npz", "an old MLX format (.npz)", None),
)

# How the names of unfinished downloads end.
UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".aria2", ".download", ".tmp")
_BINARY = (".safetensors", ".model", ".gguf")
_PAGE = re.compile(rb"\s*<(!doctype|html|head|\?xml)", re.IGNORECASE)


def quantization(raw: dict[str, Any]) -> str | None:
    """Which other tool quantized the checkpoint of this config.json, by its own words."""
    for key in ("quantization_config", "quantization", "compression_config"):
        found = raw.get(key)
        if isinstance(found, dict):
            return _method(found)
    text = raw.get("text_config")
    return quantization(text) if isinstance(text, dict) else None


def _method(found: dict[str, Any]) -> str | None:
    method = found.get("quant_method")
    if isinstance(method, str) and method:
        return _METHODS.get(method.lower(), method)
    if isinstance(found.get("quantization"), dict):  # ModelOpt's file has it one level down
        return "ModelOpt"
    if {"bits", "group_size"} <= found.keys() and "desc_act" not in found:
        return None  # MLX's
    return next((name for key, name in _KEYS.items() if key in found), None)


def config_problem(raw: dict[str, Any]) -> str | None:
    """Why a checkpoint with this config.json can't be read, and what to take instead."""
    if (method := quantization(raw)) is not None:
        return f"it is quantized by {method}, which is not read here; {_INSTEAD}"
    if isinstance(raw.get("vision_config"), dict) or isinstance(raw.get("text_config"), dict):
        kind = raw.get("model_type")
        return (
            f"it is a model for images or sound too (model_type {kind!r:.60}); take the text-only"
            " model it was made from"
        )
    return None


def tensor_problem(dtypes: Mapping[str, str], directory: Path) -> str | None:
    """What a checkpoint is, told by tensors that don't fit (names -> safetensors' dtypes)."""
    for pattern, what, instead in _STRUCTURES:
        if name := _first(pattern, dtypes):
            return f"it is {what} ({name}); {instead}"
    for pattern, method in _TENSORS:
        if name := _first(rf"{pattern}$", dtypes):
            left = [m for file, m in _QUANTIZERS.items() if (directory / file).exists()]
            if method == "GPTQ or AWQ" and left:
                method = left[0]
            if "FP8" in method and any(kind.startswith("F8") for kind in dtypes.values()):
                method = "FP8"
            return f"it is quantized by {method} ({name}), which is not read here; {_INSTEAD}"
    for name, kind in dtypes.items():
        if kind.startswith("F8"):
            return f"its weights are FP8 ({name} is {kind}), which is not read here; {_INSTEAD}"
    return None


def _first(pattern: str, names: Iterable[str]) -> str | None:
    compiled = re.compile(pattern)
    return next((name for name in names if compiled.search(name)), None)


def directory_problem(directory: Path) -> str | None:
    """Why a folder with PEFT's adapter_config.json, or with a pipe in it, is not a model."""
    for file in directory.iterdir():
        if problem := not_a_file(file):
            return problem
    if not (directory / "adapter_config.json").exists():
        return None
    return (
        "it holds a LoRA adapter, which is not supported: merge it into its base first"
        " (merge_and_unload of PEFT, or mlx_lm.fuse)"
    )


def folder_problem(directory: Path) -> str | None:
    """What a folder without safetensors, or without config.json, holds instead."""
    for pattern, what, instead in _FOLDERS:
        if next(directory.glob(pattern), None) is not None:
            instead = instead or "take the Hugging Face checkpoint (safetensors), or a GGUF file"
            return f"it holds {what}; {instead}"
    for file in sorted(directory.glob("*")):
        if file.suffix in UNFINISHED:
            return f"{file.name} is an unfinished download; finish it, or start it again"
        if ".safetensors" in file.name.lower() and file.suffix not in (".safetensors", ".json"):
            return f"{file.name} may be one under another name; rename it"
    if (inner := next(directory.glob("*/*.safetensors"), None)) is not None:
        return f"{inner.relative_to(directory)} lies deeper; name its folder"
    return None


def unfinished(path: Path) -> str:
    """What to say besides where `path` is missing or cut short: that its download is unfinished."""
    beside = [path.with_name(path.name + suffix) for suffix in UNFINISHED]
    caches = (path.parent / ".cache" / "huggingface" / "download", path.parent / "../../blobs")
    beside += [file for cache in caches for file in cache.glob("*.incomplete")]
    with suppress(OSError):  # a name that is as long as names may be has none beside it
        if left := next((file for file in beside if file.exists()), None):
            return f" ({left.name} is left of an unfinished download)"
    return ""


def stand_in(path: Path, data: bytes | None = None) -> str | None:
    """What lies at `path` instead of the file that its name promises, and what to do: one line.

    None where it is that file, and where it can't be read at all.
    data: the file's bytes, if they have been read.
    """
    try:
        if data is None and (problem := not_a_file(path)):
            return problem
        size = path.stat().st_size if data is None else len(data)
        head = _head(path) if data is None else data[:512]
    except OSError:
        return None

    def again() -> str:  # only for a file that is wrong: it looks for what a download left
        return f"download it again{unfinished(path)}"

    if head.startswith((b"version https://git-lfs", b"version https://hawser")):
        return (
            f"{path} is a git-lfs pointer, not the file itself: run `git lfs install` and"
            f" `git lfs pull` in that folder"
        )
    if head.startswith(b"# xet version"):
        return f"{path} is a git-xet pointer, not the file itself: {again()}"
    if path.suffix == ".jinja":
        return None
    if size == 0:
        return f"{path} is empty: {again()}"
    if _PAGE.match(head.removeprefix(b"\xef\xbb\xbf")):
        return f"{path} is a web page, not the file itself: {again()}, by its download link"
    if not any(head):
        return f"{path} begins with {len(head)} zeros, as an unfinished download does: {again()}"
    if path.suffix not in _BINARY:
        return None
    if head.startswith(b"PK\x03\x04"):
        return f"{path} is a zip archive, perhaps a pickle of PyTorch's: take it as safetensors"
    if path.suffix == ".safetensors" and head.startswith(b"GGUF"):
        return f"{path} is a GGUF file: give it a name that ends in .gguf"
    text = " ".join(head.decode("ascii", "replace").split())
    if 16 <= size < 2000 and text.isascii() and text.isprintable():
        return f"{path} is text, not the file itself ({text[:60]!r}): {again()}"
    return None


def not_a_file(path: Path) -> str | None:
    """What is wrong with a pipe or a device, which can't be read to its end."""
    odd = path.exists() and not path.is_file() and not path.is_dir()
    return f"{path} is no regular file" if odd else None


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(512)
