"""The output's config.json, as stock tools read it."""

from collections.abc import Sequence
from typing import Any

from convert.outputs import Change, Output
from mlx_cerebrum.model.config import FORMAT_VERSION, ModelConfig
from mlx_cerebrum.weights.checkpoint import FLOATS
from mlx_cerebrum.weights.quantize import as_quantization

# Keys that an output has only if this run gives them, that name code, or that say again what
# `sliding_window` says (mlx-lm fails on a list of layers that all slide).
_DROPPED = (
    "layer_types",
    *("layer_map", "residual_scales", "format_version", "provenance"),
    *("quantization", "quantization_config", "auto_map", "model_file"),
)


def output_config(
    source: dict[str, Any],
    config: ModelConfig,
    layout: str,
    change: Change,
    outputs: Sequence[Output],
) -> dict[str, Any]:
    """The output's config.json: the source's keys, what changed, and what tools would otherwise
    guess (defaults differ by model type; mlx-lm takes a missing `tie_word_embeddings` as true,
    and reads only a top-level `rope_theta`)."""
    identity = config.layer_map == tuple(range(config.num_hidden_layers))
    folds = layout == "folded" and not (identity and config.residual_scales is None)
    layers = config.num_hidden_layers if layout == "folded" else config.num_positions
    llama = config.model_type == "llama" and config.sliding_window is None
    raw = {key: value for key, value in source.items() if key not in _DROPPED} | {
        "model_type": "llama" if llama else "mistral",
        "architectures": ["LlamaForCausalLM" if llama else "MistralForCausalLM"],
        "num_hidden_layers": layers,
        "vocab_size": config.vocab_size,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    if not llama:
        raw["sliding_window"] = config.sliding_window
    if wanted := change.out_dtype or change.dtype:
        key = "dtype" if "dtype" in raw else "torch_dtype"  # as the source spells it
        raw = {k: v for k, v in raw.items() if k not in ("dtype", "torch_dtype")}
        raw[key] = FLOATS[wanted]
    packings = {output.name: output.packing for output in outputs if output.packing is not None}
    if quantization := as_quantization(packings):
        # mlx-lm writes both keys: its own, and the one transformers looks for.
        raw["quantization"] = raw["quantization_config"] = quantization
    if folds:
        raw |= {
            # A name no stock tool knows: it refuses, rather than run 32 positions in silence.
            "model_type": "cerebrum",
            "architectures": ["CerebrumForCausalLM"],
            "format_version": FORMAT_VERSION,
            "layer_map": list(config.layer_map),
            "sliding_window": config.sliding_window,
        }
        if config.residual_scales is not None:
            raw["residual_scales"] = [list(pair) for pair in config.residual_scales]
    return raw
