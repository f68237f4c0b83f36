"""Products and rotations that are computed otherwise on the CPU: the same numbers."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_cerebrum import device
from mlx_cerebrum.model.cpu import Embedding, Linear, Rotary, _pieces, multiply


@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "pieces"),
    [
        (1, 3072, 2048, 1),  # few rows
        (1, 49152, 576, 48),
        (2, 49152, 576, 1),  # few columns
        (1, 4096, 4096, 4),  # 1024 rows each
        (1, 28672, 4096, 28),
        (2, 28672, 4096, 28),
        (32, 4096, 14336, 4),
        (33, 4096, 14336, 1),  # many tokens
        (1, 6001, 4096, 1),  # 353 times 17: no equal pieces of some size
        (1, 1000003, 4096, 1),  # a prime
    ],
)
def test_large_matrices_are_cut_into_equal_pieces(
    tokens: int, rows: int, columns: int, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "openblas_kernels", lambda: "Haswell")
    assert _pieces.__wrapped__(tokens, rows, columns) == pieces


@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "pieces"),
    [
        (1, 960, 576, 1),  # as small as it is
        (1, 3072, 576, 3),
        (2, 3072, 576, 6),  # 512 rows: twice as many are a result of 1024
        (1, 576, 1536, 1),
        (2, 576, 1536, 2),  # 288 rows: 884,736 products
        (1, 49152, 576, 48),
        (1, 28672, 4096, 128),
        (4, 4096, 4096, 128),
        (4, 1000003, 4096, 1),  # a prime
        (1, 4096, 1 << 20, 1),  # no row is small
        (5, 3072, 576, 1),  # many tokens: as without such kernels
        (8, 28672, 4096, 28),
    ],
)
@pytest.mark.parametrize("kernels", ["SkylakeX", "Cooperlake"])
def test_pieces_are_as_small_as_kernels_for_small_products_take(
    kernels: str,
    tokens: int,
    rows: int,
    columns: int,
    pieces: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device, "openblas_kernels", lambda: kernels)
    assert _pieces.__wrapped__(tokens, rows, columns) == pieces


@pytest.mark.parametrize(
    "shape", [(1, 1, 1152), (1, 5, 1152), (1152,), (2, 1, 1152), (2, 3, 1152), (1, 40, 1152)]
)
@pytest.mark.parametrize("rows", [1152, 4099, 6144])
@pytest.mark.one_in(10)
def test_a_product_is_the_plain_one(shape: tuple[int, ...], rows: int) -> None:
    x, weight = mx.random.normal(shape), mx.random.normal((rows, 1152))
    if device.on_linux_cpu():
        cut = _pieces(x.size // 1152, rows, 1152) > 1
        assert cut or rows != 6144 or x.size >= 40 * 1152
    found = multiply(x, weight)
    assert found.shape == (*shape[:-1], rows)
    assert mx.allclose(found, x @ weight.T, rtol=1e-4, atol=1e-4)


def test_modules_multiply_so_and_can_be_quantized() -> None:
    x = mx.random.normal((1, 1, 1024))
    for module in (Linear(1024, 4800, bias=False), Embedding(4800, 1024)):
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
