"""What a conversion will write, decided before a weight is read."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from convert import fold, shim
from convert.output_config import output_config
from convert.outputs import Change, Output, folded, unrolled
from convert.recipe import choose
from mlx_cerebrum.errors import ConfigError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.tensors import matrix_shapes
from mlx_cerebrum.plan.layer_plan import LayerPlan
from mlx_cerebrum.weights.checkpoint import FLOAT_CODES, FLOATS, Checkpoint
from mlx_cerebrum.weights.opening import planned_config
from mlx_cerebrum.weights.quantize import Packing
from mlx_cerebrum.weights.safetensors_file import ITEM_BYTES

LAYOUTS = ("folded", "unrolled")
DTYPES = tuple(FLOAT_CODES)

Recipe = Callable[..., dict[str, Packing]]  # convert.recipe.choose, its name and budget given


@dataclass(frozen=True)
class Options:
    """What is asked of a conversion.

    plan: None keeps the source's own order.
    layout: "folded" or "unrolled".
    dtype: cast to; None keeps what is stored (unrolled: follows the plan, as mergekit does).
    packing: how matrices are quantized; None leaves them as they are.
    recipe: what each matrix gets instead, from the output's config and `packing`.
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
    recipe: Recipe | None = None
    dequantize: bool = False
    window: int | None = None
    verify: bool = True
    allow_nonfinite: bool = False
    shim: bool = False


@dataclass(frozen=True)
class Layout:
    """What an output will be, all of it known before a weight is read."""

    config: ModelConfig
    outputs: list[Output]
    raw: dict[str, Any]  # config.json, but for its provenance
    plan_text: str | None
    notes: list[str]

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)


def lay_out(checkpoint: Checkpoint, options: Options, found: fold.Folding) -> Layout:
    """Decide every tensor of the output. Raises ConfigError or PlanError for what can't be."""
    plan, dtype = options.plan, options.dtype
    if dtype not in (None, *DTYPES):
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    is_folded = options.layout == "folded"
    if options.dequantize and dtype is None and (is_folded or plan is None or plan.dtype is None):
        dtype = "float32"  # what the packed integers mean, exactly; norms with them
    quantized = checkpoint.config.quantization is not None and not options.dequantize
    follows = plan if dtype is None and not is_folded and not quantized else None
    notes: list[str] = []
    if plan is not None and dtype is None and follows is None:
        planned, stored = plan.out_dtype or plan.dtype, FLOATS[checkpoint.weight_dtype]
        if planned not in (None, stored):
            kept = "a quantized source" if quantized else "folded"
            notes.append(f"the plan says {planned}; {kept} keeps {stored} (see --dtype)")
    first, last = (follows.dtype, follows.out_dtype) if follows else (dtype, None)
    if options.packing is not None and first is None and follows is None:
        stated = checkpoint.raw_config.get("torch_dtype")  # mlx-lm casts to it before it packs
        first = stated if stated in DTYPES else None
    change = Change(options.dequantize, FLOAT_CODES.get(first or ""), FLOAT_CODES.get(last or ""))
    if is_folded and plan is not None and plan.tokenizer_source:
        tokens = checkpoint.tokenizer().vocab_size
        if tokens < checkpoint.config.vocab_size:
            notes.append("tokenizer_source cuts rows that have no token; folded keeps them")
    if is_folded:
        config = planned_config(checkpoint.config, plan, options.window)
        blocks = len(set(found.block_of))
        layer_map = tuple(found.block_of[layer] for layer in config.layer_map)
        config = replace(config, num_hidden_layers=blocks, layer_map=layer_map)
    else:  # any scale can be unrolled, so residual scales are not asked for
        config = planned_config(checkpoint.config, None, options.window)
        if plan is not None:
            config = config.with_map(plan.layer_map(config.num_hidden_layers))
            if plan.tokenizer_source:  # as mergekit: a row for each token, no more
                tokens = checkpoint.tokenizer().vocab_size
                change = replace(change, vocabulary=tokens)
                config = replace(config, vocab_size=tokens)
    if options.packing is not None:
        written = last or first or FLOATS[checkpoint.weight_dtype]
        bits = 8 * ITEM_BYTES[FLOAT_CODES[written]]
        packings = _packings(checkpoint, config, options, found, bits, notes)
        change = replace(change, packings=packings)
    if is_folded:
        outputs = folded(checkpoint, found.block_of, change)
    else:
        outputs = unrolled(checkpoint, config, plan, change)
    text = None if plan is None else plan.text
    if plan is None and found.repeats:
        text = fold.describe(config.layer_map, config.num_hidden_layers)[1]
    raw = output_config(checkpoint.raw_config, config, options.layout, change, outputs)
    if options.shim:
        raw = shim.with_shim(raw)
    return Layout(config, outputs, raw, text, notes)


def _packings(
    checkpoint: Checkpoint,
    config: ModelConfig,
    options: Options,
    found: fold.Folding,
    dense_bits: int,
    notes: list[str],
) -> dict[str, Packing]:
    """How each of the source's matrices is packed; scales have `dense_bits` bits."""
    assert options.packing is not None
    if options.recipe is None:
        chosen = choose("uniform", config, options.packing)
    else:
        unrolled = options.layout == "unrolled"
        chosen = options.recipe(config, options.packing, unrolled=unrolled, dense_bits=dense_bits)
    matrices = matrix_shapes(config)
    if not chosen:
        raise ConfigError(f"no matrix of {checkpoint.path} divides into {options.packing}")
    if dense := len(matrices) - len(chosen):
        notes.append(f"{dense} matrices don't divide into {options.packing} and stay dense")
    found_in: dict[str, Packing] = {}
    for module in matrix_shapes(checkpoint.config):
        name = module
        if module.startswith("model.layers."):
            layer = int(module.split(".")[2])
            name = module.replace(f"layers.{layer}.", f"layers.{found.block_of[layer]}.", 1)
        if name in chosen:
            found_in[module] = chosen[name]
    return found_in
