"""What a conversion will write, decided before a weight is read: its tensors and config.json."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import mlx.core as mx

from convert import fold
from convert.passages import Calibration
from convert.recipe import choose
from mlx_cerebrum.errors import ConfigError
from mlx_cerebrum.model.config import FORMAT_VERSION, ModelConfig
from mlx_cerebrum.model.tensors import (
    ATTENTION_OUT,
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    MATRICES,
    MLP_OUT,
    NORMS,
    matrix_shapes,
    module_path,
    place,
)
from mlx_cerebrum.plan.layer_plan import LayerPlan
from mlx_cerebrum.weights.checkpoint import FLOAT_CODES, FLOATS, Checkpoint
from mlx_cerebrum.weights.opening import planned_config
from mlx_cerebrum.weights.quantize import Packing, as_quantization
from mlx_cerebrum.weights.safetensors_file import ITEM_BYTES

LAYOUTS = ("folded", "unrolled")
DTYPES = tuple(FLOAT_CODES)
SHIM = "mlx_lm_model.py"  # the code for mlx-lm: here, and in the directory that carries it
# Keys that an output has only if this run gives them, that name code, or that say again what
# `sliding_window` says (mlx-lm fails on a list of layers that all slide).
_DROPPED = (
    "layer_types",
    *("layer_map", "residual_scales", "format_version", "provenance"),
    *("quantization", "quantization_config", "auto_map", "model_file"),
)
_MX: dict[str, mx.Dtype] = {code: getattr(mx, name) for code, name in FLOATS.items()}
_FLOAT_DTYPES = tuple(_MX.values())

Recipe = Callable[..., dict[str, Packing]]  # convert.recipe.choose, its name and budget given
UNIFORM: Recipe = partial(choose, "uniform")


@dataclass(frozen=True)
class Options:
    """What is asked of a conversion.

    plan: None keeps the source's own order.
    layout: "folded" or "unrolled".
    dtype: cast to; None keeps what is stored (unrolled: follows the plan, as mergekit does).
    packing: how matrices are quantized; None leaves them as they are.
    recipe: what each matrix gets instead, from the output's config and `packing`.
    calibration: what is read so that matrices are packed by what goes into them, not rounded.
    dequantize: make a quantized source dense.
    window: sliding window to record, in tokens; 0 for none; None keeps the source's.
    verify: hash every byte of the source and look for NaN and infinities.
    allow_nonfinite: note them rather than refuse.
    shim: add the file that lets stock mlx-lm run a folded directory.
    """

    plan: LayerPlan | None = None
    layout: str = "folded"
    dtype: str | None = None
    packing: Packing | None = None
    recipe: Recipe = UNIFORM
    calibration: Calibration | None = None
    dequantize: bool = False
    window: int | None = None
    verify: bool = True
    allow_nonfinite: bool = False
    shim: bool = False

    @property
    def is_folded(self) -> bool:
        return self.layout == "folded"


@dataclass(frozen=True)
class Spec:
    """One tensor of the output; `dtype` is safetensors' name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Transform:
    """What happens to one module's arrays on the way, in mergekit's order and with its
    rounding: packed ones made dense (float32), cast to `dtype`, scaled, cast to `out_dtype`,
    then packed. None: not done. Every step works row by row."""

    unpack: Packing | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    pack: Packing | None = None

    def final(self, stored: str) -> str:
        """The dtype that a tensor stored as `stored` ends up with, before packing."""
        return (self.out_dtype or self.dtype or stored) if stored in FLOATS else stored

    def keeps(self, stored: Iterable[str], scale: float | None) -> bool:
        """Whether arrays stored with these dtypes come out as the bytes they were."""
        if self.unpack or self.pack or scale is not None:
            return False
        wanted = {dtype for dtype in (self.dtype, self.out_dtype) if dtype is not None}
        return all(wanted <= {code} for code in stored if code in FLOATS)

    def dense(
        self, arrays: dict[str, mx.array], scale: float | None, cpu: mx.Stream
    ) -> dict[str, mx.array]:
        """All but packing. Runs on the CPU: a GPU may take subnormal numbers for zero."""
        if self.unpack is not None:
            arrays = {"weight": self.unpack.dequantize(arrays, mx.float32, cpu)}
        return {part: self._cast(array, scale, cpu) for part, array in arrays.items()}

    def packed(self, arrays: dict[str, mx.array], stream: mx.Stream) -> dict[str, mx.array]:
        """The last step. Runs where mlx-lm would run it, on the default device's `stream`."""
        return arrays if self.pack is None else self.pack.quantize(arrays["weight"], stream)

    def _cast(self, array: mx.array, scale: float | None, cpu: mx.Stream) -> mx.array:
        if array.dtype not in _FLOAT_DTYPES:  # packed integers, 8-bit scales
            return array
        if self.dtype is not None:
            array = array.astype(_MX[self.dtype], stream=cpu)
        if scale is not None:
            wide = array.astype(mx.float32, stream=cpu)
            scaled = mx.multiply(wide, mx.array(scale, mx.float32), stream=cpu)
            array = scaled.astype(array.dtype, stream=cpu)
        return array if self.out_dtype is None else array.astype(_MX[self.out_dtype], stream=cpu)


@dataclass(frozen=True)
class Output:
    """One module of the output: `source`'s arrays, transformed, under `name`."""

    source: str
    name: str
    scale: float | None
    transform: Transform
    packing: Packing | None  # how it ends up being held
    specs: tuple[Spec, ...]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)


@dataclass(frozen=True)
class Change:
    """What is asked of all weights; `packings` by the source's module paths, `vocabulary` the
    rows that are kept of the embedding and the head."""

    dequantize: bool
    dtype: str | None
    out_dtype: str | None
    packings: Mapping[str, Packing]
    vocabulary: int


@dataclass(frozen=True)
class Layout:
    """What an output will be, all of it known before a weight is read."""

    config: ModelConfig
    order: tuple[int, ...]  # which of the source's layers runs at each position
    outputs: list[Output]
    raw: dict[str, Any]  # config.json, but for its provenance
    plan_text: str | None
    notes: list[str]

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)


def lay_out(checkpoint: Checkpoint, options: Options, found: fold.Folding) -> Layout:
    """Decide every tensor of the output. Raises ConfigError or PlanError for what can't be."""
    plan = options.plan
    notes: list[str] = []
    first, last = _dtypes(checkpoint, options, notes)
    if options.is_folded:
        if _rows(checkpoint, plan) < checkpoint.config.vocab_size:
            notes.append("tokenizer_source cuts rows that have no token; folded keeps them")
        config = planned_config(checkpoint.config, plan, options.window)
    else:
        config = unrolled_config(checkpoint, plan, options.window)
    blocks = len(set(found.block_of))
    layer_map = tuple(found.block_of[layer] for layer in config.layer_map)
    folded = replace(config, num_hidden_layers=blocks, layer_map=layer_map)
    packings = {}
    if options.packing is not None:
        dense_bits = 8 * ITEM_BYTES[last or first or checkpoint.weight_dtype]
        packings = _packings(checkpoint, folded, options, found, dense_bits, notes)
    change = Change(options.dequantize, first, last, packings, config.vocab_size)
    layers = [found.block_of.index(block) for block in range(blocks)]  # each as first stored
    order = tuple(layers[block] for block in layer_map)
    if options.is_folded:
        config = folded
        outputs = _output_modules(checkpoint, layers, change)
    else:
        # mergekit copies a head that a tied model stores in vain; mlx-lm's quantizing drops it.
        spare = () if packings else sorted(checkpoint.spare)

        def scale(position: int | None, module: str) -> float | None:
            inside = place(module)  # of a copy that is read in this one's place
            if position is not None and inside is not None:
                module = module_path(config.layer_map[position], inside[1])
            return tensor_scale(config, plan, position, module)

        outputs = _output_modules(checkpoint, order, change, scale, spare)
    text = None if plan is None else plan.text
    if plan is None and found.repeats and options.is_folded:
        text = fold.describe(config.layer_map, config.num_hidden_layers)[1]
    raw = _output_config(checkpoint.raw_config, config, options, change, outputs)
    return Layout(config, order, outputs, raw, text, notes)


def unrolled_config(
    checkpoint: Checkpoint, plan: LayerPlan | None, window: int | None
) -> ModelConfig:
    """The model that is stored position by position, as mergekit would have it: with any scale,
    so that residual scales are not asked for."""
    config = planned_config(checkpoint.config, None, window)
    if plan is not None:
        config = config.with_map(plan.layer_map(config.num_hidden_layers))
    return replace(config, vocab_size=_rows(checkpoint, plan))


def tensor_scale(
    config: ModelConfig, plan: LayerPlan | None, position: int | None, module: str
) -> float | None:
    """What an unrolled tensor is multiplied by: any scale of the plan's, without a plan the
    source's own residual scales."""
    if plan is not None:
        return plan.tensor_scale(position, f"{module}.weight", config.num_hidden_layers)
    inside = place(module)
    if config.residual_scales is None or position is None or inside is None:
        return None
    attention, mlp = config.residual_scales[position]
    return {ATTENTION_OUT: attention, MLP_OUT: mlp}.get(inside[1])


def _rows(checkpoint: Checkpoint, plan: LayerPlan | None) -> int:
    """Rows of the tables: where the plan makes the tokenizer anew, mergekit keeps those that have
    a token."""
    rows = checkpoint.config.vocab_size
    if plan is None or not plan.tokenizer_source:
        return rows
    return min(rows, checkpoint.tokenizer().vocab_size)


def _dtypes(
    checkpoint: Checkpoint, options: Options, notes: list[str]
) -> tuple[str | None, str | None]:
    """What is cast to before scaling, and after, by safetensors' names; None leaves it."""
    plan, dtype = options.plan, options.dtype
    if dtype not in (None, *DTYPES):
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    follows = not options.is_folded and plan is not None and plan.dtype is not None
    if options.dequantize and dtype is None and not follows:
        dtype = "float32"  # what the packed integers mean, exactly; norms with them
    quantized = checkpoint.config.quantization is not None and not options.dequantize
    if dtype is None and plan is not None:
        if not options.is_folded and not quantized:
            return FLOAT_CODES.get(plan.dtype or ""), FLOAT_CODES.get(plan.out_dtype or "")
        planned, stored = plan.out_dtype or plan.dtype, FLOATS[checkpoint.weight_dtype]
        if planned not in (None, stored):
            kept = "a quantized source" if quantized else "folded"
            notes.append(f"the plan says {planned}; {kept} keeps {stored} (see --dtype)")
    if dtype is None and options.packing is not None:
        stated = checkpoint.raw_config.get("torch_dtype")  # mlx-lm casts to it before it packs
        dtype = stated if stated in DTYPES else None
    return FLOAT_CODES.get(dtype or ""), None


def _packings(
    checkpoint: Checkpoint,
    config: ModelConfig,
    options: Options,
    found: fold.Folding,
    dense_bits: int,
    notes: list[str],
) -> dict[str, Packing]:
    """How each of the source's matrices is packed; scales have `dense_bits` bits."""
    chosen = options.recipe(
        config, options.packing, unrolled=not options.is_folded, dense_bits=dense_bits
    )
    dense = {m: columns for m, (_, columns) in matrix_shapes(config).items() if m not in chosen}
    fits = "" if options.packing is None else options.packing.refit(dense.values())
    if not chosen:
        raise ConfigError(f"no matrix of {checkpoint.path} divides into {options.packing}{fits}")
    if dense:
        notes.append(
            f"{len(dense)} matrices don't divide into {options.packing} and stay dense{fits}"
        )
    packings = {}
    for module in matrix_shapes(checkpoint.config):
        inside = place(module)
        name = module_path(found.block_of[inside[0]], inside[1]) if inside else module
        if name in chosen:
            packings[module] = chosen[name]
    return packings


def _output_modules(
    checkpoint: Checkpoint,
    layers: Sequence[int],
    change: Change,
    scale: Callable[[int | None, str], float | None] = lambda position, module: None,
    spare: Iterable[str] = (),
) -> list[Output]:
    """What is written: the tables, the final norm, and stored layer `layers[i]` as layer `i`.

    scale: what a module is multiplied by, in the layer `i` or outside (None).
    spare: stored modules that the model never reads and that are written too.
    """
    head = [] if checkpoint.config.tie_word_embeddings else [HEAD]
    outside = [*spare, EMBEDDING, *head, FINAL_NORM]
    found = [_output(checkpoint, name, name, scale(None, name), change) for name in outside]
    for position, layer in enumerate(layers):
        for kind in (*MATRICES, *NORMS):
            source, name = module_path(layer, kind), module_path(position, kind)
            found.append(_output(checkpoint, source, name, scale(position, source), change))
    return found


def _output(
    checkpoint: Checkpoint, source: str, name: str, scale: float | None, change: Change
) -> Output:
    packing, unpack = checkpoint.packing(source), None
    stored = {
        part: (checkpoint.dtypes[own], checkpoint.shapes[own])
        for part, own in checkpoint.parts(source).items()
    }
    if packing is not None and change.dequantize:
        matrices = matrix_shapes(checkpoint.config)
        stored = {"weight": ("F32", matrices.get(source, matrices[EMBEDDING]))}  # or a spare head
        unpack = None if source in checkpoint.repacked else packing  # those come unpacked
        packing = None
    elif packing is not None and scale is not None:
        raise ConfigError(
            f"{checkpoint.path}: {source} is quantized and can't be scaled; convert with"
            " --dequantize"
        )
    if source in (EMBEDDING, HEAD):
        kept = change.vocabulary
        stored = {part: (dtype, (kept, *shape[1:])) for part, (dtype, shape) in stored.items()}
    pack = change.packings.get(source)
    transform = Transform(unpack, change.dtype, change.out_dtype, pack)
    parts = {part: (transform.final(dtype), shape) for part, (dtype, shape) in stored.items()}
    if pack is not None:
        code, (rows, columns) = parts["weight"]
        scales = code if pack.mode == "affine" else "U8"
        shapes = pack.shapes(rows, columns)
        parts = {part: ("U32" if part == "weight" else scales, shapes[part]) for part in shapes}
    specs = (Spec(f"{name}.{part}", dtype, shape) for part, (dtype, shape) in parts.items())
    return Output(source, name, scale, transform, pack or packing, tuple(specs))


def _output_config(
    source: dict[str, Any],
    config: ModelConfig,
    options: Options,
    change: Change,
    outputs: list[Output],
) -> dict[str, Any]:
    """The output's config.json: the source's keys, what changed, and what tools would otherwise
    guess (defaults differ by model type; mlx-lm takes a missing `tie_word_embeddings` as true,
    and reads only a top-level `rope_theta`)."""
    identity = config.layer_map == tuple(range(config.num_hidden_layers))
    folds = options.is_folded and not (identity and config.residual_scales is None)
    llama = config.model_type == "llama" and config.sliding_window is None
    raw = {key: value for key, value in source.items() if key not in _DROPPED} | {
        "model_type": "llama" if llama else "mistral",
        "architectures": ["LlamaForCausalLM" if llama else "MistralForCausalLM"],
        "num_hidden_layers": (
            config.num_hidden_layers if options.is_folded else config.num_positions
        ),
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
    if options.shim and not folds:
        raise ConfigError(
            "--mlx-lm-shim is for a folded plan; this output is plain"
            f" {raw['model_type']}, which mlx-lm knows: drop the flag"
        )
    return raw | ({"model_file": SHIM} if options.shim else {})
