"""Products and rotations that are computed otherwise on the CPU: the same numbers."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_cerebrum.model.cpu import Embedding, Linear, Rotary, _pieces, multiply


@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "pieces"),
    [
        (1, 576, 576, 1),
        (1, 3072, 576, 3),
        (1, 49152, 576, 48),  # 1024 rows of 576
        (1, 4096, 4096, 32),  # half a million: with 16 pieces it would be just above a million
        (1, 4096, 14336, 64),
        (1, 1000003, 16, 1),  # a prime: no equal pieces
        (1, 8, 2_000_000, 1),  # one row is too much
        (8, 4096, 4096, 256),
        (16, 4096, 14336, 1024),
        (17, 4096, 14336, 1),
        (2, 3072, 576, 1),  # narrow: no gain
    ],
)
def test_matrices_are_cut_into_equal_small_pieces(
    tokens: int, rows: int, columns: int, pieces: int
) -> None:
    assert _pieces(tokens, rows, columns) == pieces


@pytest.mark.parametrize(
    "shape", [(1, 1, 1152), (1, 5, 1152), (1152,), (2, 1, 1152), (2, 3, 1152), (1, 30, 1152)]
)
@pytest.mark.parametrize("rows", [1152, 2402, 3072])
def test_a_product_is_the_plain_one(shape: tuple[int, ...], rows: int) -> None:
    x, weight = mx.random.normal(shape), mx.random.normal((rows, 1152))
    found = multiply(x, weight)
    assert found.shape == (*shape[:-1], rows)
    assert mx.allclose(found, x @ weight.T, rtol=1e-4, atol=1e-4)


def test_modules_multiply_so_and_can_be_quantized() -> None:
    x = mx.random.normal((1, 1, 64))
    for module in (Linear(64, 2400, bias=False), Embedding(2400, 64)):
        product = module.as_linear(x) if isinstance(module, Embedding) else module(x)
        assert mx.allclose(product, x @ module.weight.T, rtol=1e-4, atol=1e-4)
        assert isinstance(module.to_quantized(64, 4), (nn.QuantizedLinear, nn.QuantizedEmbedding))


@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("offset", [0, 7, 4096, 32000])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_rotation_is_mlxs_own(width: int, offset: int, dtype: mx.Dtype) -> None:
    x = mx.random.normal((2, 3, 5, width)).astype(dtype)
    ours = Rotary(width, 10000.0)(x, offset)
    assert ours.dtype == dtype
    wide = x.astype(mx.float32)
    exact = mx.fast.rope(wide, width, traditional=False, base=10000.0, scale=1.0, offset=offset)
    off = mx.abs(ours.astype(mx.float32) - exact)
    # Rounded once, at the end.
    assert mx.all(off <= (1e-6 if dtype == mx.float32 else 2**-8 * mx.abs(exact) + 1e-6))


def test_rotation_takes_offsets_that_are_arrays() -> None:
    x = mx.random.normal((1, 2, 3, 32))
    rotary = Rotary(32, 10000.0)
    assert mx.allclose(rotary(x, mx.array(9)), rotary(x, 9), atol=1e-6)
