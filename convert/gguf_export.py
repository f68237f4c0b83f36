"""A checkpoint and a plan as one GGUF file, which llama.cpp runs: unrolled, a layer a position.

Architecture "llama", as llama.cpp's own converter writes Mistral: its tensor names, the rows
of q and k in its order (pairs that rotate together side by side), norms in float32. Values
are computed in float32 (exact for any source), scaled, and rounded once to the kind asked
for, which takes the place of the plan's dtype.

Never more than one source tensor is in memory, and a slice of it in float32. A block that runs
again unchanged is copied from the file being written.
"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from convert.gguf_stream import Stream, Tensor, new_file
from convert.gguf_vocabulary import tokenizer_metadata
from convert.source import check_stamps, stamps
from mlx_cerebrum.errors import ConfigError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.tensors import (
    BLOCK,
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    matrix_shapes,
    module_path,
)
from mlx_cerebrum.plan.layer_plan import LayerPlan
from mlx_cerebrum.weights.checkpoint import Checkpoint
from mlx_cerebrum.weights.gguf_checkpoint import gguf_name, rotary_heads
from mlx_cerebrum.weights.opening import open_checkpoint

# What weights can be stored as, with llama.cpp's name for a file of them.
KINDS = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}

_MAX_LAYERS = 512  # llama.cpp's LLAMA_MAX_LAYERS


def export(
    checkpoint: Checkpoint,
    config: ModelConfig,
    plan: LayerPlan | None,
    destination: Path,
    *,
    kind: str = "F16",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write `checkpoint`, its blocks in the order of `config.layer_map`, as the new file
    `destination` (`NAME.gguf`). Scales come from `plan`, else from the config.

    The file is there whole or not at all. progress: called with the bytes of weights written
    and to write. Returns bytes, tensors, positions, bits_per_weight, sha256, and notes a person
    should see. Raises a CerebrumError for a file that exists, too little disk, weights that are
    not finite or too large for `kind`, and a tokenizer that GGUF can't express.
    """
    gguf = _package()
    if kind not in KINDS:
        raise ConfigError(f"GGUF weights can be {', '.join(KINDS)} here, not {kind}")
    if destination.suffix != ".gguf":
        raise ConfigError(f"{destination} must be a file named something.gguf")
    if config.num_positions > _MAX_LAYERS:
        raise ConfigError(f"{config.num_positions} layers; llama.cpp runs {_MAX_LAYERS} at most")
    tensors = _tensors(config, plan, kind)
    metadata, notes = tokenizer_metadata(checkpoint)
    notes += _notes(config, tensors, kind)
    total = sum(tensor.nbytes for tensor in tensors)
    before = stamps(checkpoint)
    with new_file(destination, total) as partial:
        _write_header(gguf, partial, config, kind, destination.stem, metadata, tensors)
        with partial.open("r+b") as file:
            stream = Stream(file, _quantize(gguf), total, progress)
            for tensor in tensors:
                stream.append(checkpoint, tensor)
            stream.finish()
        check_stamps(before)
        open_checkpoint(partial)  # what was written reads back: names, shapes, sizes
        size = partial.stat().st_size
    return {
        "bytes": size,
        "tensors": len(tensors),
        "positions": config.num_positions,
        "bits_per_weight": 8 * total / config.executed_parameters,
        "sha256": stream.digest.hexdigest(),
        "notes": notes,
    }


def _package() -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise ConfigError("writing GGUF needs the gguf package: pip install gguf") from None
    module: ModuleType = gguf
    return module


def _quantize(gguf: ModuleType) -> Callable[..., Any]:
    kinds = {kind: gguf.GGMLQuantizationType[kind] for kind in KINDS}
    return lambda rows, kind: gguf.quants.quantize(rows, kinds[kind])


def _tensors(config: ModelConfig, plan: LayerPlan | None, kind: str) -> list[Tensor]:
    """Every tensor of the file, in order."""
    matrices = matrix_shapes(config)

    def tensor(module: str, name: str, position: int | None = None) -> Tensor:
        shape = matrices.get(module, (config.hidden_size,))
        stored = "F32" if len(shape) == 1 else kind
        if stored == "Q8_0" and shape[-1] % 32:
            stored = "F16"  # as llama.cpp's converter does
        scale = _scale(config, plan, position, module)
        return Tensor(name, module, shape, stored, scale, rotary_heads(config, module))

    found = [tensor(EMBEDDING, gguf_name(EMBEDDING))]
    for position, block in enumerate(config.layer_map):
        found += [
            tensor(module_path(block, kind), gguf_name(module_path(position, kind)), position)
            for kind in BLOCK
        ]
    found.append(tensor(FINAL_NORM, gguf_name(FINAL_NORM)))
    if not config.tie_word_embeddings:  # llama.cpp takes token_embd for a missing output
        found.append(tensor(HEAD, gguf_name(HEAD)))
    return found


def _scale(
    config: ModelConfig, plan: LayerPlan | None, position: int | None, module: str
) -> float | None:
    """What a tensor is multiplied by: any mergekit scale, else the config's residual scales."""
    if plan is not None:
        return plan.tensor_scale(position, f"{module}.weight", config.num_hidden_layers)
    if config.residual_scales is None or position is None:
        return None
    attention, mlp = config.residual_scales[position]
    return {"o_proj": attention, "down_proj": mlp}.get(module.rpartition(".")[2])


def _notes(config: ModelConfig, tensors: list[Tensor], kind: str) -> list[str]:
    found = []
    window = config.sliding_window
    if window is not None and window < config.max_position_embeddings:
        found.append(
            f"llama.cpp runs this without its sliding window: past {window} tokens its answers"
            f" differ, so start it with -c {window}"
        )
    if dense := sum(t.kind != kind and len(t.shape) == 2 for t in tensors):
        found.append(f"{dense} matrices don't divide into blocks of 32 and are stored as F16")
    return found


def _write_header(
    gguf: ModuleType,
    path: Path,
    config: ModelConfig,
    kind: str,
    name: str,
    metadata: dict[str, Any],
    tensors: list[Tensor],
) -> None:
    """Everything before the tensors' data."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[KINDS[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_positions)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if config.sliding_window is not None:  # llama.cpp passes over it; we read it back
        writer.add_sliding_window(config.sliding_window)
    adders = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    for key, value in metadata.items():
        getattr(writer, f"add_{adders[type(value)]}")(key, value)
    for tensor in tensors:
        # raw_dtype says how the values are stored; the dtype before it is then not used.
        stored = gguf.GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, tensor.shape, np.float32, tensor.nbytes, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
