"""Packed matrices made dense."""

import mlx.core as mx
import pytest

from mlx_cerebrum.weights.quantize import Packing


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 128])
def test_dense_is_what_mlx_makes_of_it(dtype: mx.Dtype, bits: int, group_size: int) -> None:
    """To the bit, also by way of another precision than the scales'."""
    packing = Packing(bits, group_size)
    arrays = packing.quantize(mx.random.normal((24, 256), key=mx.random.key(bits)).astype(dtype))
    for wanted in (dtype, mx.float32):
        scales, biases = (arrays[name].astype(wanted) for name in ("scales", "biases"))
        theirs = mx.dequantize(arrays["weight"], scales, biases, group_size, bits)
        ours = packing.dequantize(arrays, wanted)
        assert ours.dtype == wanted
        assert mx.array_equal(ours, theirs)
