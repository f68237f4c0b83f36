"""Fewer bits a weight, in mlx-lm's layout: how matrices are packed and unpacked.

Affine quantization (MLX's `mx.quantize`) cuts each row into groups and stores, per group,
a scale and a bias beside the packed integers: `bits + 32 / group_size` bits a weight with
16-bit scales. Norms stay as they are; embedding and head are quantized too.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_cerebrum import device
from mlx_cerebrum.errors import ConfigError, shown
from mlx_cerebrum.model.tensors import PARTS

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)
# Bits and group size where a config says null; float formats have no others, and no biases.
DEFAULTS = {"affine": (4, 64), "mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}

PIECE = 1 << 20  # weights of a matrix made at a time, where making them takes memory


@dataclass(frozen=True)
class Packing:
    """How one matrix is quantized."""

    bits: int
    group_size: int
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode not in DEFAULTS:
            raise ConfigError(f"mode {shown(self.mode)} is not one of {', '.join(DEFAULTS)}")
        for value in (self.bits, self.group_size):
            if type(value) is not int:  # 4.0 equals 4, but MLX does not take it
                raise ConfigError(f"bits and group_size are whole numbers, not {shown(value)}")
        if self.mode != "affine":
            if (self.bits, self.group_size) != DEFAULTS[self.mode]:
                bits, group = DEFAULTS[self.mode]
                raise ConfigError(f"{self.mode} has {bits} bits in groups of {group} only")
        elif self.bits not in AFFINE_BITS:
            raise ConfigError(f"{shown(self.bits)} bits a weight are not one of {AFFINE_BITS}")
        elif self.group_size not in AFFINE_GROUPS:
            raise ConfigError(
                f"a group size of {shown(self.group_size)} is not one of {AFFINE_GROUPS}"
            )

    @classmethod
    def from_config(cls, quantization: dict[str, Any], path: str) -> "Packing":
        """The packing of the module at `path`, as mlx-lm's config.json says it.

        Raises ConfigError for values MLX has no kernel for.
        """
        own = quantization.get(path)
        source = own if isinstance(own, dict) else quantization
        mode = source.get("mode") or "affine"
        bits, group_size = DEFAULTS.get(mode, (None, None)) if isinstance(mode, str) else (0, 0)
        bits = bits if source.get("bits") is None else source["bits"]
        group_size = group_size if source.get("group_size") is None else source["group_size"]
        try:
            return cls(bits, group_size, str(mode))  # type: ignore[arg-type]  # checked there
        except ConfigError as error:
            raise ConfigError(f"quantization of {path}: {error}") from None

    @property
    def parameters(self) -> tuple[str, ...]:
        """The arrays a packed matrix is made of."""
        return PARTS if self.mode == "affine" else PARTS[:2]

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Shapes of a packed `[rows, columns]` matrix's arrays."""
        groups = (rows, columns // self.group_size)
        packed = (rows, columns * self.bits // 32)
        return {name: packed if name == "weight" else groups for name in self.parameters}

    def fits(self, columns: int) -> bool:
        """Whether rows of `columns` weights divide into groups and into packed words."""
        return columns % self.group_size == 0 and columns * self.bits % 32 == 0

    def refit(self, columns: Iterable[int]) -> str:
        """For rows of so many weights that don't fit: which smaller groups would, as the end of a
        line; "" where none do."""
        counts, finer = set(columns), [size for size in AFFINE_GROUPS if size < self.group_size]
        for size in reversed(finer if self.mode == "affine" else []):
            if all(Packing(self.bits, size).fits(count) for count in counts):
                return f"; --q-group-size {size} fits"
        return ""

    def __str__(self) -> str:
        return f"{self.bits}-bit groups of {self.group_size}"

    def as_config(self) -> dict[str, Any]:
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def quantize(self, weight: mx.array, stream: mx.Stream | None = None) -> dict[str, mx.array]:
        """A matrix `[rows, columns]` -> its packed arrays; scales keep the matrix's dtype.

        stream: what computes it; the default device's unless one is given.
        """
        dtype, wide = weight.dtype, weight
        if self.mode == "affine" and _on_cpu(stream):
            # The CPU's kernel widens value by value; all at once takes 0.9 of the time, and
            # gives the same bits.
            wide = weight.astype(mx.float32, stream=stream)
        packed, *rest = mx.quantize(wide, self.group_size, self.bits, mode=self.mode, stream=stream)
        if wide is not weight:
            rest = [array.astype(dtype, stream=stream) for array in rest]
        return dict(zip(self.parameters, (packed, *rest), strict=True))

    def dequantize(
        self, arrays: dict[str, mx.array], dtype: mx.Dtype, stream: mx.Stream | None = None
    ) -> mx.array:
        """`arrays` as `parameters` names them -> the `[rows, columns]` matrix.

        stream: as for `quantize`.
        """
        scales, biases = arrays["scales"], arrays.get("biases")
        if biases is not None:  # affine: in the target's precision, not the stored scales'
            scales = scales.astype(dtype, stream=stream)
            biases = biases.astype(dtype, stream=stream)
        packed = arrays["weight"]
        count, columns = len(packed), packed.shape[-1] * 32 // self.bits
        step = max(1, PIECE // columns)

        def rows(packed: mx.array, scales: mx.array, biases: mx.array | None = None) -> mx.array:
            if biases is not None and self.bits in (4, 8) and _on_cpu(stream):
                return self._widened(packed, scales, biases, stream)
            how = self.group_size, self.bits, self.mode
            dense = mx.dequantize(packed, scales, biases, *how, stream=stream)
            return dense.astype(dtype, stream=stream)

        parts = (packed, scales) if biases is None else (packed, scales, biases)
        if count <= step:
            return rows(*parts)
        # The CPU makes several arrays of the matrix's size on the way.
        cuts = list(range(step, count, step))
        pieces = zip(*(mx.split(part, cuts, stream=stream) for part in parts), strict=True)
        return joined((count, columns), (rows(*piece) for piece in pieces), stream)

    def _widened(
        self, packed: mx.array, scales: mx.array, biases: mx.array, stream: mx.Stream | None
    ) -> mx.array:
        """As `mx.dequantize`, whole bytes at a time: 1.1 to 5 times as fast on a CPU, and the same
        bits. Scales and biases `[rows, groups]` -> `[rows, columns]`."""
        integers = packed.view(mx.uint8, stream=stream)
        if self.bits == 4:
            low = mx.bitwise_and(integers, 15, stream=stream)
            high = mx.right_shift(integers, 4, stream=stream)
            integers = mx.stack([low, high], axis=-1, stream=stream)
        groups = mx.reshape(integers, (*scales.shape, self.group_size), stream=stream)
        scaled = mx.multiply(groups, mx.expand_dims(scales, -1, stream=stream), stream=stream)
        moved = mx.add(scaled, mx.expand_dims(biases, -1, stream=stream), stream=stream)
        return mx.flatten(moved, 1, stream=stream)


def _on_cpu(stream: mx.Stream | None) -> bool:
    return not device.on_gpu() if stream is None else stream.device == mx.cpu


def matrix_bytes(shape: tuple[int, int], packing: Packing | None, item_bytes: int) -> int:
    """Bytes of a matrix as it will be held; `item_bytes` of a dense weight, a scale, a bias."""
    rows, columns = shape
    if packing is None or not packing.fits(columns):
        return rows * columns * item_bytes
    scale_bytes = item_bytes * 2 if packing.mode == "affine" else 1
    return rows * columns * packing.bits // 8 + rows * columns // packing.group_size * scale_bytes


def as_quantization(packings: Mapping[str, Packing | None]) -> dict[str, Any] | None:
    """A config's `quantization` as mlx-lm writes it: the commonest packing, and each module that
    differs by its path; None where nothing is packed."""
    packed = Counter(packing for packing in packings.values() if packing is not None)
    if not packed:
        return None
    common = packed.most_common(1)[0][0]
    others = {name: p.as_config() if p else False for name, p in packings.items() if p != common}
    return common.as_config() | others


def joined(
    shape: tuple[int, ...], pieces: Iterable[mx.array], stream: mx.Stream | None = None
) -> mx.array:
    """One array of `shape`, evaluated, from pieces of its rows; the whole is never held twice."""
    whole: mx.array | None = None
    start = 0
    for piece in pieces:
        if whole is None:
            whole = mx.zeros(shape, piece.dtype, stream=stream)
        whole = mx.slice_update(whole, piece, mx.array([start]), (0,), stream=stream)
        mx.eval(whole)  # in place: nothing else refers to it
        start += len(piece)
    assert whole is not None
    return whole
