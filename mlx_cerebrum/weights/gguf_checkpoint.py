"""A Llama-family GGUF file as a Checkpoint: config, tokenizer and tensors from the one file.

llama.cpp's converter renames every tensor, reorders the rows of q and k (see
`gguf_blocks.half_split`) and turns config.json into metadata; this undoes all three.
Mistral models travel under the architecture "llama", usually without their window.
"""

import math
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_cerebrum.errors import CheckpointError, ConfigError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.tensors import EMBEDDING, FINAL_NORM, HEAD, module_shapes, place
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights.checkpoint import FLOAT_CODES, FLOATS, Checkpoint, Extent
from mlx_cerebrum.weights.gguf_blocks import (
    REPACKED,
    WIDE,
    read_arrays,
    read_dense,
    stored_packing,
)
from mlx_cerebrum.weights.gguf_file import GGUFFile, GGUFTensor, quote
from mlx_cerebrum.weights.quantize import Packing, as_quantization

# Metadata that changes the arithmetic, with the values that mean plain Llama.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "llama.expert_count": (0,),
    "llama.rope.scaling.attn_factor": (1.0,),
    "llama.attention.causal": (True,),
    "llama.attention.clamp_kqv": (0.0,),
    "llama.attention.max_alibi_bias": (0.0,),
    "llama.attention.scale": (0.0,),
    "llama.attention.sliding_window_pattern": (),
    "llama.attn_logit_softcapping": (0.0,),
    "llama.final_logit_softcapping": (0.0,),
    "llama.embedding_scale": (0.0, 1.0),
    "llama.logit_scale": (0.0, 1.0),
    "llama.residual_scale": (0.0, 1.0),
    "llama.use_parallel_residual": (False,),
}
_ROPE_FREQS = "rope_freqs.weight"
# What old converters stored, and every reader computes anew; `_refuse_scaled_rope` looks at one.
_BUFFERS = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd(\.weight)?")


# llama.cpp's names.
_OUTSIDE = {EMBEDDING: "token_embd", FINAL_NORM: "output_norm", HEAD: "output"}
_OF_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class GGUFCheckpoint(Checkpoint):
    """A GGUF file, or the parts of a split one; packed integers kept as they are where MLX can."""

    def __init__(self, file: GGUFFile) -> None:
        """The model that the header describes; its tensors' names, shapes and types are checked.

        Raises ConfigError for a model this engine cannot run and CheckpointError for tensors that
        are missing, unknown, misshapen or of another type.
        """
        self.file, self.path = file, file.path  # of a split model the first part
        _refuse(file)
        self.raw_config = _config_json(file)
        config = ModelConfig.from_dict(self.raw_config, f"{file.path} (metadata)")
        _refuse_scaled_rope(file, config)
        self._tensors = _modules(file, config)
        packings = {m: stored_packing(t) for m, t in self._tensors.items() if len(t.shape) == 2}
        dtype, quantization = _dtype(self._tensors), as_quantization(packings)
        self.raw_config["dtype"] = dtype
        if quantization is not None:
            self.raw_config["quantization"] = quantization
        self.config = replace(config, dtype=dtype, quantization=quantization)
        self.repacked = frozenset(m for m, t in self._tensors.items() if t.ggml_type in REPACKED)
        self.shapes, self.dtypes = {}, {}
        for module, tensor in self._tensors.items():
            packing = stored_packing(tensor)
            if packing is None:
                self.shapes[f"{module}.weight"] = tensor.shape
                self.dtypes[f"{module}.weight"] = tensor.ggml_type
                continue
            rows, columns = tensor.shape
            scales = "F32" if tensor.ggml_type in WIDE else "F16"
            for part, shape in packing.shapes(rows, columns).items():
                self.shapes[f"{module}.{part}"] = shape
                self.dtypes[f"{module}.{part}"] = "U32" if part == "weight" else scales

    def read(self, module: str) -> dict[str, mx.array]:
        return read_arrays(self.file, self._tensors[module], rotary_heads(self.config, module))

    def repack(self, module: str, packing: Packing) -> dict[str, mx.array]:
        heads = rotary_heads(self.config, module)
        return read_arrays(self.file, self._tensors[module], heads, packing)

    def dense(self, module: str) -> mx.array:
        if module not in self.repacked:
            return super().dense(module)
        heads = rotary_heads(self.config, module)
        return read_dense(self.file, self._tensors[module], heads)

    def extents(self, module: str) -> dict[str, Extent]:
        tensor = self._tensors[module]
        holder = self.file.holder(tensor).path
        return {"weight": Extent(holder, tensor.offset, tensor.nbytes)}

    @property
    def weight_dtype(self) -> str:
        """Of most matrices; packed ones' scales come from float16, whatever they are held in."""
        return FLOAT_CODES[self.raw_config["dtype"]]

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_gguf(self.file.metadata)

    def names(self) -> list[str]:
        said = (self.file.metadata.get(f"general.{key}") for key in ("name", "basename"))
        return [*super().names(), *(name for name in said if isinstance(name, str))]


def rotary_heads(config: ModelConfig, module: str) -> int | None:
    """How many heads' rows llama.cpp reordered in this module; None for none."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return heads.get(module.rpartition(".")[2])


def _modules(file: GGUFFile, config: ModelConfig) -> dict[str, GGUFTensor]:
    """Hugging Face module path -> the tensor that holds its weight, all names and shapes checked.

    Raises CheckpointError naming the tensors otherwise.
    """
    expected = _expected(config)
    unknown = [n for n in file.tensors if n not in expected and not _BUFFERS.fullmatch(n)]
    if unknown:
        raise CheckpointError(
            f"{file.path} has tensors a Llama or Mistral model does not: {_some(unknown)}"
        )
    missing = [name for name in expected if name not in file.tensors]
    if missing:
        raise CheckpointError(f"{file.path} lacks tensors: {_some(missing)}")
    found: dict[str, GGUFTensor] = {}
    for name, (path, shape) in expected.items():
        tensor = file.tensors[name]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{file.path}: tensor {name} has shape {tensor.shape}, its metadata means {shape}"
            )
        if tensor.ggml_type not in FLOATS and (len(shape) == 1 or not stored_packing(tensor)):
            raise CheckpointError(
                f"{file.path}: tensor {name} is stored as {tensor.ggml_type}, which cannot be read "
                f"here: take the model as Q4_K_M, Q6_K, Q8_0, F16 or BF16"
            )
        found[path] = tensor
    return found


def _expected(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """GGUF tensor name -> Hugging Face module path and shape."""
    return {gguf_name(path): (path, shape) for path, shape in module_shapes(config).items()}


def gguf_name(module: str) -> str:
    """What llama.cpp calls the weight of the module at a Hugging Face path."""
    inside = place(module)
    if inside is None:
        return f"{_OUTSIDE[module]}.weight"
    block, kind = inside
    return f"blk.{block}.{_OF_BLOCK[kind]}.weight"


def _refuse(file: GGUFFile) -> None:
    """Raise for a file that is sound but not a whole plain Llama-family model."""
    architecture = file.metadata.get("general.architecture")
    if architecture != "llama":
        # llama.cpp knows no architecture "mistral"; converters write Mistral as "llama".
        named = quote(str(architecture)) if architecture is not None else "missing"
        raise ConfigError(
            f"{file.path}: architecture {named} is not supported; only 'llama' is (the name "
            f"GGUF files give Llama and Mistral models)"
        )
    for key, plain in _PLAIN.items():
        if key in file.metadata and file.metadata[key] not in plain:
            raise ConfigError(
                f"{file.path}: {key} = {quote(str(file.metadata[key]))} is not supported"
            )
    experts = [name for name in file.tensors if "_exps." in name or ".ffn_gate_inp." in name]
    if experts:
        raise ConfigError(f"{file.path} is a mixture of experts: {_some(experts)}; not supported")
    scaling = "llama.rope.scaling.type"
    kind = file.metadata.get(scaling, "linear")  # llama.cpp's default: positions divided
    if kind not in ("none", "linear"):
        raise ConfigError(f"{file.path}: {scaling} = {quote(str(kind))} is not supported")
    for key in ("llama.rope.scaling.factor", "llama.rope.scale_linear"):
        if kind == "linear" and file.metadata.get(key, 1) not in (0, 1):
            raise ConfigError(f"{file.path}: {key} is not supported; only plain RoPE is")


def _refuse_scaled_rope(file: GGUFFile, config: ModelConfig) -> None:
    """Llama 3's RoPE scaling hides in a tensor of divisors; only all ones is plain RoPE."""
    tensor = file.tensors.get(_ROPE_FREQS)
    if tensor is None:
        return
    plain = tensor.ggml_type == "F32" and tensor.shape == (config.head_dim // 2,)
    if not plain or not np.all(file.read(tensor).view("<f4") == 1):
        raise ConfigError(
            f"{file.path}: tensor {_ROPE_FREQS} scales RoPE, which is not supported; only plain "
            f"RoPE is"
        )


def _config_json(file: GGUFFile) -> dict[str, Any]:
    """The config.json the metadata means, without what depends on the tensors' types.

    Only the kind of each value is checked here, its range by ModelConfig.
    """

    def number(key: str, default: Any = None) -> Any:
        value = file.metadata.get(key, default)
        if value is None:
            raise ConfigError(f"{file.path}: metadata {key} is missing")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{file.path}: metadata {key} must be one number")
        return value

    def llama(key: str, default: Any = None) -> Any:
        return number(f"llama.{key}", default)

    blocks = llama("block_count")
    if blocks > len(file.tensors):  # before anything of that length is made
        raise ConfigError(
            f"{file.path}: llama.block_count is {blocks} but there are only "
            f"{len(file.tensors)} tensors"
        )
    heads = llama("attention.head_count")
    hidden = llama("embedding_length")
    # A zero is left to ModelConfig to refuse.
    rotated = llama("rope.dimension_count", hidden // heads if heads else 0)
    head_dim = llama("attention.key_length", rotated)
    for key in ("rope.dimension_count", "attention.value_length"):
        if llama(key, head_dim) != head_dim:
            raise ConfigError(
                f"{file.path}: llama.{key} is {llama(key)}, not the head size {head_dim}: "
                f"not supported"
            )
    vocabulary = file.metadata.get("tokenizer.ggml.tokens")
    window = "llama.attention.sliding_window" in file.metadata
    raw: dict[str, Any] = {
        "architectures": ["MistralForCausalLM" if window else "LlamaForCausalLM"],
        "model_type": "mistral" if window else "llama",
        "hidden_size": hidden,
        "intermediate_size": llama("feed_forward_length"),
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": llama("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": llama("context_length"),
        "vocab_size": llama(
            "vocab_size", len(vocabulary) if isinstance(vocabulary, list) else None
        ),
        "rms_norm_eps": _shortest(llama("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(llama("rope.freq_base", 10000.0)),
        "attention_bias": False,
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    if window:
        raw["sliding_window"] = llama("attention.sliding_window")
    if "tokenizer.ggml.bos_token_id" in file.metadata:
        raw["bos_token_id"] = number("tokenizer.ggml.bos_token_id")
    # A chat model may end its turn with another token than its documents.
    ends = [f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom")]
    ids = list(dict.fromkeys(number(key) for key in ends if key in file.metadata))
    if ids:
        raw["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    return raw


def _shortest(value: float) -> float:
    """A float32 as the shortest decimal that means it: 1e-05, not 9.999999747378752e-06."""
    if not math.isfinite(value) or abs(value) > 1e30:
        return value
    short = float(str(np.float32(value)))
    return short if np.float32(value) == value else value


def _dtype(found: dict[str, GGUFTensor]) -> str:
    """The dtype of most matrices; quantized ones have float16 scales."""
    kinds = (FLOATS.get(t.ggml_type, "float16") for t in found.values() if len(t.shape) == 2)
    return Counter(kinds).most_common(1)[0][0]


def _some(names: list[str]) -> str:
    shown = ", ".join(quote(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
