"""The conversion itself: lay out, stream to disk, check what was written, rename."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from convert.card import card
from convert.outputs import Change, Module, folded, unrolled
from convert.writer import nbytes, new_directory, write_json, write_weights
from mlx_cerebrum import __version__
from mlx_cerebrum.checkpoint import FLOATS, Checkpoint, open_checkpoint
from mlx_cerebrum.config import FORMAT_VERSION, ModelConfig
from mlx_cerebrum.errors import ConfigError
from mlx_cerebrum.load import load_tokenizer, planned_config
from mlx_cerebrum.plan import LayerPlan
from mlx_cerebrum.quantize import Packing

LAYOUTS = ("folded", "unrolled")
_CODES = {name: code for code, name in FLOATS.items()}
DTYPES = tuple(_CODES)
# Keys that an output has only if this run gives them, or that name code.
_DROPPED = (
    *("layer_map", "residual_scales", "format_version", "provenance"),
    *("quantization", "quantization_config", "auto_map", "model_file"),
)


def convert(
    checkpoint: Checkpoint,
    destination: Path,
    plan: LayerPlan | None = None,
    *,
    layout: str = "folded",
    dtype: str | None = None,
    packing: Packing | None = None,
    dequantize: bool = False,
    window: int | None = None,
    source: str = "",
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write `checkpoint`, laid out by `plan`, into the new directory `destination`.

    It is written under a temporary name, its headers checked, and renamed: it is there whole
    or not at all. Returns what was written: bytes, positions, layers, bits_per_weight, and
    notes a person should see. Raises a CerebrumError for anything that can't be honoured,
    before writing where it can be known.
    """
    if dequantize and checkpoint.config.quantization is None:
        raise ConfigError(f"{checkpoint.path} is dense already; drop --dequantize")
    if dequantize and dtype is None and not (layout == "unrolled" and plan and plan.dtype):
        dtype = "float32"  # what the packed integers mean, exactly; norms with them
    quantized = checkpoint.config.quantization is not None and not dequantize
    if quantized and (packing is not None or dtype is not None):
        raise ConfigError(
            f"{checkpoint.path} is quantized already: -q and --dtype need --dequantize"
        )
    if checkpoint.path.is_dir() and destination.absolute().resolve().is_relative_to(
        checkpoint.path.resolve()
    ):
        raise ConfigError(f"{destination} is inside the source; name a directory elsewhere")
    notes: list[str] = []
    blocks = checkpoint.config.num_hidden_layers
    if plan is not None and dtype is None and (layout == "folded" or quantized):
        planned, stored = plan.out_dtype or plan.dtype, FLOATS[checkpoint.weight_dtype]
        if planned not in (None, stored):
            kept = "a quantized source" if quantized else "folded"
            notes.append(f"the plan says {planned}; {kept} keeps {stored} (see --dtype)")
    if layout == "folded":
        config = planned_config(checkpoint.config, plan, window)
        change = Change(dequantize, _CODES.get(dtype or ""), None, packing)
        modules = folded(checkpoint, change)
    else:
        config = planned_config(checkpoint.config, None, window)
        first, last = (plan.dtype, plan.out_dtype) if plan and not quantized else (None, None)
        if plan is not None:  # any scale can be unrolled, so residual scales are not asked for
            config = config.with_map(plan.layer_map(blocks))
        if dtype is not None:
            first, last = dtype, None
        change = Change(dequantize, _CODES.get(first or ""), _CODES.get(last or ""), packing)
        modules = unrolled(checkpoint, config, plan, change)
    if packing is not None:
        dense = [m.name for m in modules if m.packing is None and len(m.specs[0].shape) == 2]
        if len(dense) == len([m for m in modules if len(m.specs[0].shape) == 2]):
            raise ConfigError(f"no matrix of {checkpoint.path} divides into {packing}")
        if dense:
            notes.append(f"{len(dense)} matrices don't divide into {packing} and stay dense")
    tokenizer = load_tokenizer(checkpoint)  # a broken one is refused before anything is written
    specs = tuple(spec for module in modules for spec in module.specs)
    with new_directory(destination, nbytes(specs)) as partial:
        packed = any(module.packing for module in modules)
        form = "mlx" if packed or layout == "folded" else "pt"
        hashes = write_weights(partial, modules, {"format": form}, progress)
        raw = output_config(checkpoint.raw_config, config, layout, change, modules)
        raw["provenance"] = {
            "tool": f"mlx-cerebrum {__version__}",
            "source": source,
            "revision": revision,
            "layout": layout,
            "plan": None if plan is None else plan.text,
            "window_override": window,
            "sha256": hashes,
            "notes": notes,
            "from": checkpoint.raw_config.get("provenance"),
        }
        write_json(partial / "config.json", raw)
        tokenizer.save(partial)
        (partial / "README.md").write_text(card(raw, destination.name), encoding="utf-8")
        open_checkpoint(partial)  # what was written reads back: names, shapes, sizes
    weights = config.stored_parameters if layout == "folded" else config.executed_parameters
    return {
        "bytes": nbytes(specs),
        "positions": config.num_positions,
        "layers": blocks if layout == "folded" else config.num_positions,
        "bits_per_weight": 8 * nbytes(specs) / weights,
        "notes": notes,
    }


def output_config(
    source: dict[str, Any],
    config: ModelConfig,
    layout: str,
    change: Change,
    modules: list[Module],
) -> dict[str, Any]:
    """The output's config.json: the source's keys, what changed, and what stock tools would
    otherwise guess (mlx-lm takes a missing `tie_word_embeddings` as true, and reads only a
    top-level `rope_theta`)."""
    identity = config.layer_map == tuple(range(config.num_hidden_layers))
    folds = layout == "folded" and not (identity and config.residual_scales is None)
    layers = config.num_hidden_layers if layout == "folded" else config.num_positions
    llama = config.model_type == "llama" and config.sliding_window is None
    raw = {key: value for key, value in source.items() if key not in _DROPPED} | {
        "model_type": "llama" if llama else "mistral",
        "architectures": ["LlamaForCausalLM" if llama else "MistralForCausalLM"],
        "num_hidden_layers": layers,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    if not llama:
        raw["sliding_window"] = config.sliding_window
    if "layer_types" in raw:
        kind = "sliding_attention" if config.sliding_window else "full_attention"
        raw["layer_types"] = [kind] * layers
    if wanted := change.out_dtype or change.dtype:
        key = "dtype" if "dtype" in raw else "torch_dtype"  # as the source spells it
        raw = {k: v for k, v in raw.items() if k not in ("dtype", "torch_dtype")}
        raw[key] = FLOATS[wanted]
    if quantization := _quantization(modules):
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


def _quantization(modules: list[Module]) -> dict[str, Any] | None:
    """mlx-lm's `quantization`: the commonest packing, and each module that differs by path."""
    packings = {module.name: module.packing for module in modules if module.packing is not None}
    if not packings:
        return None
    common = Counter(packings.values()).most_common(1)[0][0]
    others = {name: p.as_config() for name, p in packings.items() if p != common}
    return common.as_config() | others
