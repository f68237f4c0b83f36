"""The conversion itself: open, lay out, stream to disk, read back, rename."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from convert.card import card
from convert.outputs import FLOATS, Change, Module, folded, unrolled
from convert.writer import nbytes, new_directory, write_json, write_weights
from mlx_cerebrum import __version__
from mlx_cerebrum.checkpoint import Checkpoint, open_checkpoint
from mlx_cerebrum.config import FORMAT_VERSION, ModelConfig
from mlx_cerebrum.errors import ConfigError
from mlx_cerebrum.load import load_tokenizer, planned_config
from mlx_cerebrum.plan import LayerPlan
from mlx_cerebrum.quantize import Packing

LAYOUTS = ("folded", "unrolled")
_CODES = {name: code for code, name in FLOATS.items()}
DTYPES = tuple(_CODES)
# Keys of a folded config.json that an output has only if this run gives them.
_OURS = ("layer_map", "residual_scales", "format_version", "provenance")


def convert(
    checkpoint: Checkpoint,
    destination: Path,
    plan: LayerPlan | None = None,
    *,
    layout: str = "folded",
    dtype: str | None = None,
    packing: Packing | None = None,
    window: int | None = None,
    source: str = "",
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write `checkpoint`, laid out by `plan`, into the new directory `destination`.

    It is written under a temporary name, read back, and renamed: it is there whole or not
    at all. Returns what was written: bytes, positions, layers, bits_per_weight. Raises a
    CerebrumError for anything that can't be honoured, before writing where it can be known.
    """
    if packing is not None and checkpoint.config.quantization is not None:
        raise ConfigError(f"{checkpoint.path} is quantized already; drop -q")
    blocks = checkpoint.config.num_hidden_layers
    if layout == "folded":
        config = planned_config(checkpoint.config, plan, window)
        change = Change(_CODES.get(dtype or ""), None, packing)
        modules = folded(checkpoint, change)
    else:
        config = planned_config(checkpoint.config, None, window)
        if plan is not None:  # any scale can be unrolled, so residual scales are not asked for
            config = config.with_map(plan.layer_map(blocks))
            dtype = dtype or plan.dtype
        out_dtype = None if plan is None else plan.out_dtype
        change = Change(_CODES.get(dtype or ""), _CODES.get(out_dtype or ""), packing)
        modules = unrolled(checkpoint, config, plan, change)
    tokenizer = load_tokenizer(checkpoint)  # a broken one is refused before anything is written
    specs = tuple(spec for module in modules for spec in module.specs)
    with new_directory(destination, nbytes(specs)) as partial:
        form = "pt" if layout == "unrolled" and packing is None else "mlx"
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
    raw = {key: value for key, value in source.items() if key not in _OURS} | {
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
        raw["dtype" if "dtype" in raw else "torch_dtype"] = FLOATS[wanted]
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
