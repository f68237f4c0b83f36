"""GPTQ: the words are MLX's, the factor is the inverse's, and outputs come out nearer."""

import mlx.core as mx
import numpy as np
import pytest

from convert import gptq
from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.weights.quantize import AFFINE_BITS, Packing


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def correlated(samples: int, columns: int) -> mx.array:
    """Inputs of few directions and some noise, as a model's are."""
    return normal(samples, 8) @ normal(8, columns, seed=1) + 0.3 * normal(samples, columns, seed=2)


@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_words_are_laid_out_as_mlx_does(bits: int) -> None:
    packing = Packing(bits, 32)
    arrays = packing.quantize(normal(5, 96))
    steps = packing.dequantize(arrays, mx.float32).reshape(5, 3, 32)
    integers = mx.round((steps - arrays["biases"][..., None]) / arrays["scales"][..., None])
    words = gptq.packed_words(integers.reshape(5, 96).astype(mx.uint8), bits)
    assert words.dtype == mx.uint32
    assert mx.array_equal(words, arrays["weight"])


def test_the_factor_is_that_of_the_inverse_strongest_input_first() -> None:
    inputs = correlated(200, 32) * mx.arange(1, 33)
    hessian = inputs.T @ inputs
    _, order, upper = gptq.inputs_of(hessian)
    assert mx.array_equal(mx.sort(order), mx.arange(32))
    strength = np.array(mx.diag(hessian))[np.array(order)]
    assert (np.diff(strength) <= 0).all()
    assert mx.array_equal(upper, mx.triu(upper))
    damped = np.array(hessian, np.float64) + gptq.DAMPING * strength.mean() * np.eye(32)
    damped = damped[np.ix_(np.array(order), np.array(order))]
    product = np.array(upper, np.float64).T @ np.array(upper, np.float64) @ damped
    assert np.abs(product - np.eye(32)).max() < 1e-3


def test_sums_that_rounding_made_indefinite_are_damped_until_they_are_not() -> None:
    """Of which MLX's factor says nothing: its last pivot would be -3."""
    _, _, upper = gptq.inputs_of(mx.array([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    inverse = np.array(upper, np.float64).T @ np.array(upper, np.float64)
    assert (np.linalg.eigvalsh(np.linalg.inv(inverse)) > 0).all()
    assert (np.array(mx.diag(upper)) > 0).all()
    _, _, same = gptq.inputs_of(mx.ones((4, 4)))  # of one direction only, as text without change
    assert mx.all(mx.isfinite(same) & (mx.diag(same) > 0))
    with pytest.raises(CheckpointError, match="activations are not finite"):
        gptq.inputs_of(mx.array([[1.0, mx.nan], [mx.nan, 1.0]]))


@pytest.mark.parametrize("bits", [3, 4])
def test_outputs_are_nearer_than_rounding_leaves_them(bits: int) -> None:
    packing, weight, inputs = Packing(bits, 32), normal(48, 192), correlated(600, 192)
    packed = gptq.pack(weight, gptq.inputs_of(inputs.T @ inputs), packing)
    rounded = packing.quantize(weight)

    def error(arrays: dict[str, mx.array]) -> float:
        off = inputs @ (packing.dequantize(arrays, mx.float32) - weight).T
        return float(np.square(np.array(off)).sum())

    assert error(packed) < 0.6 * error(rounded)
    share = mx.abs(packed["scales"] / rounded["scales"])
    assert 0.7 < mx.min(share) < mx.max(share) < 1.001


def test_inputs_that_have_nothing_in_common_leave_rounding_by_better_scales() -> None:
    packing, weight = Packing(3, 64), normal(6, 128).astype(mx.bfloat16)
    strength = mx.arange(1.0, 129.0)
    packed = gptq.pack(weight, gptq.inputs_of(mx.diag(strength)), packing)
    assert packed["scales"].dtype == mx.bfloat16
    exact = weight.astype(mx.float32)

    def error(arrays: dict[str, mx.array]) -> mx.array:
        return (mx.square(packing.dequantize(arrays, mx.float32) - exact) * strength).sum()

    assert error(packed) < 0.95 * error(packing.quantize(weight))


def test_pieces_of_rows_are_packed_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = normal(10, 64), gptq.inputs_of(correlated(100, 64).T @ correlated(100, 64))
    whole = gptq.pack(weight, inputs, Packing(4, 32))
    monkeypatch.setattr(gptq, "_ROWS", 3)
    pieces = gptq.pack(weight, inputs, Packing(4, 32))
    assert all(mx.array_equal(whole[part], pieces[part]) for part in whole)


def test_a_group_of_zeros_and_an_input_that_is_never_there() -> None:
    weight = mx.concatenate([mx.zeros((4, 32)), normal(4, 32)], 1).astype(mx.float16)
    inputs = normal(100, 64) * (mx.arange(64) < 40)
    packed = gptq.pack(weight, gptq.inputs_of(inputs.T @ inputs), Packing(4, 32))
    values = Packing(4, 32).dequantize(packed, mx.float32)
    assert mx.all(mx.isfinite(values))
    assert mx.abs(values[:, :32]).max() < 1e-5


def test_activations_that_overflow_are_refused_in_one_line() -> None:
    with pytest.raises(CheckpointError, match="not finite; convert with another --dtype"):
        gptq.inputs_of(mx.full((4, 4), float("inf")))
