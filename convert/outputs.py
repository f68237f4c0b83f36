"""What a conversion writes: every output tensor, its size known before any is computed."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import mlx.core as mx

from mlx_cerebrum.errors import ConfigError
from mlx_cerebrum.model.tensors import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    MATRICES,
    NORMS,
    matrix_shapes,
    module_path,
)
from mlx_cerebrum.weights.checkpoint import FLOATS, Checkpoint
from mlx_cerebrum.weights.quantize import Packing
from mlx_cerebrum.weights.safetensors_file import ITEM_BYTES

_MX: dict[str, mx.Dtype] = {code: getattr(mx, name) for code, name in FLOATS.items()}
_FLOAT_DTYPES = tuple(_MX.values())


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

    def dense(self, arrays: dict[str, mx.array], scale: float | None) -> dict[str, mx.array]:
        """All but packing. Runs on the CPU: a GPU may take subnormal numbers for zero."""
        if self.unpack is not None:
            arrays = {"weight": self.unpack.dequantize(arrays, mx.float32)}
        return {part: self._cast(array, scale) for part, array in arrays.items()}

    def packed(self, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        """The last step. Runs where mlx-lm would run it, on the default device."""
        return arrays if self.pack is None else self.pack.quantize(arrays["weight"])

    def _cast(self, array: mx.array, scale: float | None) -> mx.array:
        if array.dtype not in _FLOAT_DTYPES:  # packed integers, 8-bit scales
            return array
        if self.dtype is not None:
            array = array.astype(_MX[self.dtype])
        if scale is not None:
            array = (array.astype(mx.float32) * mx.array(scale, mx.float32)).astype(array.dtype)
        return array if self.out_dtype is None else array.astype(_MX[self.out_dtype])


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

    dequantize: bool = False
    dtype: str | None = None
    out_dtype: str | None = None
    packings: Mapping[str, Packing] = field(default_factory=dict)
    vocabulary: int | None = None


def output_modules(
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
            f"{checkpoint.path}: {source} is quantized and can't be scaled; add --dequantize"
        )
    if change.vocabulary is not None and source in (EMBEDDING, HEAD):
        rows = change.vocabulary
        stored = {part: (dtype, (rows, *shape[1:])) for part, (dtype, shape) in stored.items()}
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
