"""Weights packed on this backend are those that the CPU packs.

A GPU may round a quotient that lies between two integers the other way. So words that differ are
counted, and each may differ by one step of its group's scale.
"""

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_cerebrum import device
from mlx_cerebrum.doctor.check import Found, Settings
from mlx_cerebrum.doctor.program import run
from mlx_cerebrum.weights.quantize import AFFINE_BITS, AFFINE_GROUPS, Packing

TYPES = ("float32", "float16", "bfloat16")
SHARE = 1e-3  # of the values may differ, by one step
_ROWS, _COLUMNS = 128, 768
_QUICK_BITS, _QUICK_GROUPS = (4, 8), (64,)

Numbers = npt.NDArray[np.float32]


def quantize(packing: Packing, weight: mx.array) -> dict[str, mx.array]:
    made = packing.quantize(weight)
    mx.eval(made)
    return made


def quantizing(settings: Settings) -> Found:
    """Every number of bits, group size and type: within a step of what was packed, and as the CPU
    packs it."""
    bits = _QUICK_BITS if settings.quick else AFFINE_BITS
    groups = _QUICK_GROUPS if settings.quick else AFFINE_GROUPS
    values = different = 0
    furthest = apart = 0.0
    for dtype in TYPES:
        weight = mx.random.normal((_ROWS, _COLUMNS), key=mx.random.key(1))
        weight = weight.astype(getattr(mx, dtype))
        mx.eval(weight)
        for packing in (Packing(b, g) for b in bits for g in groups):
            here = quantize(packing, weight)
            with mx.stream(mx.cpu):
                there = quantize(packing, weight)
                step = np.abs(_each(packing, np.array(here["scales"].astype(mx.float32))))
                own, cpus = (_meant(packing, parts) for parts in (here, there))
                given = np.array(weight.astype(mx.float32))
            # Scales of few bits are rounded too, and count as often as the largest integer. A
            # hundredth is for what rounds here.
            allowed = 1.01 + 2**packing.bits * float(mx.finfo(weight.dtype).eps)
            furthest = max(furthest, float((np.abs(own - given) / step).max()) / allowed)
            between = np.abs(own - cpus) / step
            apart = max(apart, float(between.max()))
            different += int((between > 0.5).sum())
            values += between.size
    words = f"at most {furthest:.2f} steps from what was packed"
    if device.on_gpu():
        words += f"; {different} of {values} values differ from the CPU's, by {apart:.2f} steps"
    else:
        words += "; this is the CPU"
    # Half a step more for scales that round differently.
    passed = furthest <= 1 and apart <= 1.5 and different <= SHARE * values
    data = {"values": values, "different": different, "steps": furthest, "apart": apart}
    return Found(passed, words, data=data)


def _meant(packing: Packing, parts: dict[str, mx.array]) -> Numbers:
    """What packed arrays stand for."""
    return np.array(packing.dequantize(parts, mx.float32))


def _each(packing: Packing, scales: Numbers) -> Numbers:
    """The scale of every value."""
    return np.repeat(scales, packing.group_size, axis=-1)


def converting(settings: Settings) -> Found:
    """The demo model, converted to 4 bits here and on the CPU; and `verify` of it and of a copy."""
    here, there, copy = (Path(settings.work) / name for name in ("here", "cpu", "copy"))
    for directory in (here, there):
        command = ["convert", "--hf-path", settings.small, "--mlx-path", str(directory)]
        how = ["--dequantize", "--dtype", "float16", "-q", "--quiet"]
        run([*command, *how], on_cpu=directory is there)
    run(["verify", str(here), "--quiet"])  # it fails with what is wrong
    run(["convert", "--hf-path", str(here), "--mlx-path", str(copy), "--quiet"])
    run(["verify", str(copy), "--quiet"])
    words = different = 0
    names = []
    for (name, own), (_, cpus) in zip(_tensors(here), _tensors(there), strict=True):
        found = int((own != cpus).sum()) if own.shape == cpus.shape else own.size
        different += found
        words += own.size
        names += [name] if found else []
    said = f"{different} of {words} words differ from the CPU's" + (
        f", in {len(names)} tensors, such as {names[0]}" if names else ""
    )
    if not device.on_gpu():
        said = f"{different} of {words} words differ the second time (this is the CPU)"
    said += "; verify finds nothing, nor in a copy"
    data = {"words": words, "different": different, "tensors": names[:20]}
    return Found(different <= SHARE * words, said, data=data)


def _tensors(directory: Path) -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
    """Each tensor's bytes, by 4: the words that are written."""
    for file in sorted(directory.glob("*.safetensors")):
        loaded = mx.load(str(file), stream=mx.cpu)
        assert isinstance(loaded, dict)
        for name in sorted(loaded):
            array = loaded[name].reshape(-1)
            odd = array.nbytes % 4
            yield name, np.array(array.view(mx.uint8 if odd else mx.uint32, stream=mx.cpu))
