"""What a conversion writes: every output tensor, its size known before any is computed."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from mlx_cerebrum.checkpoint import FLOATS, Checkpoint, matrix_shapes, norm_names
from mlx_cerebrum.config import ModelConfig
from mlx_cerebrum.errors import ConfigError
from mlx_cerebrum.plan import LayerPlan
from mlx_cerebrum.quantize import Packing

_MX: dict[str, mx.Dtype] = {code: getattr(mx, name) for code, name in FLOATS.items()}


@dataclass(frozen=True)
class Spec:
    """One tensor of the output; `dtype` is safetensors' name."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Module:
    """One output module: its tensors, and the call that computes them, by full name."""

    name: str
    packing: Packing | None
    specs: tuple[Spec, ...]
    arrays: Callable[[], dict[str, mx.array]]


@dataclass(frozen=True)
class Change:
    """What happens to weights on the way, in mergekit's order and with its rounding: packed
    ones made dense (float32), cast to `dtype`, scaled, cast to `out_dtype` (None: no cast),
    then packed."""

    dequantize: bool = False
    dtype: str | None = None
    out_dtype: str | None = None
    packing: Packing | None = None

    def final(self, stored: str) -> str:
        """The dtype that a tensor stored as `stored` ends up with."""
        return (self.out_dtype or self.dtype or stored) if stored in FLOATS else stored

    def apply(self, array: mx.array, scale: float | None) -> mx.array:
        if array.dtype not in _MX.values():  # packed integers, 8-bit scales
            return array
        if self.dtype is not None:
            array = array.astype(_MX[self.dtype])
        if scale is not None:
            array = (array.astype(mx.float32) * mx.array(scale, mx.float32)).astype(array.dtype)
        return array if self.out_dtype is None else array.astype(_MX[self.out_dtype])


def folded(checkpoint: Checkpoint, change: Change) -> list[Module]:
    """Each stored block once, under its own number."""
    return [_module(checkpoint, name, name, None, change) for name in _modules(checkpoint.config)]


def unrolled(
    checkpoint: Checkpoint, config: ModelConfig, plan: LayerPlan | None, change: Change
) -> list[Module]:
    """One physical layer per position of `config.layer_map`, numbered as mergekit does.

    Scales come from `plan` (any mergekit scale), else from the config's residual scales.
    """
    blocks: dict[int, list[str]] = {}
    rest: list[str] = []
    for name in _modules(config):
        if name.startswith("model.layers."):
            blocks.setdefault(int(name.split(".")[2]), []).append(name)
        else:
            rest.append(name)

    def scale(position: int | None, source: str) -> float | None:
        if plan is not None:
            return plan.tensor_scale(position, f"{source}.weight", config.num_hidden_layers)
        if config.residual_scales is None or position is None:
            return None
        attention, mlp = config.residual_scales[position]
        return {"o_proj": attention, "down_proj": mlp}.get(source.rpartition(".")[2])

    found = [_module(checkpoint, name, name, scale(None, name), change) for name in rest]
    for position, block in enumerate(config.layer_map):
        for source in blocks[block]:
            name = source.replace(f"layers.{block}.", f"layers.{position}.", 1)
            found.append(_module(checkpoint, source, name, scale(position, source), change))
    return found


def _modules(config: ModelConfig) -> list[str]:
    """Module paths of the stored model: embedding, head and final norm, then the blocks."""
    names = [*matrix_shapes(config), *(n.removesuffix(".weight") for n in norm_names(config))]
    return sorted(names, key=lambda n: int(n.split(".")[2]) if "layers." in n else -1)


def _module(
    checkpoint: Checkpoint, source: str, name: str, scale: float | None, change: Change
) -> Module:
    """The module `source` of the checkpoint, changed, under `name`."""
    stored = {
        part: (checkpoint.dtypes[f"{source}.{part}"], checkpoint.shapes[f"{source}.{part}"])
        for part in ("weight", "scales", "biases")
        if f"{source}.{part}" in checkpoint.shapes
    }
    unpack = checkpoint.packing(source) if change.dequantize else None
    if unpack is not None:
        stored = {"weight": ("F32", matrix_shapes(checkpoint.config)[source])}
    held = None if change.dequantize else checkpoint.packing(source)
    if scale is not None and held is not None:
        raise ConfigError(
            f"{checkpoint.path}: {source} is quantized and can't be scaled; add --dequantize"
        )
    parts = {part: (change.final(dtype), shape) for part, (dtype, shape) in stored.items()}
    code, shape = parts["weight"]
    pack = change.packing if len(shape) == 2 and change.packing else None
    if pack is not None and pack.fits(shape[1]):
        held, scales = pack, code if pack.mode == "affine" else "U8"
        packed = pack.shapes(shape[0], shape[1])
        parts = {part: ("U32" if part == "weight" else scales, packed[part]) for part in packed}
    else:
        pack = None

    def arrays() -> dict[str, mx.array]:
        read = checkpoint.read(source)
        if unpack is not None:
            read = {"weight": unpack.dequantize(read, mx.float32)}
        read = {part: change.apply(array, scale) for part, array in read.items()}
        if pack is not None:
            read = pack.quantize(read["weight"])
        return {f"{name}.{part}": array for part, array in read.items()}

    specs = (Spec(f"{name}.{part}", dtype, shape) for part, (dtype, shape) in parts.items())
    return Module(name, held, tuple(specs), arrays)
