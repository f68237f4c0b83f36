"""GPTQ: the packed integers that keep a matrix's outputs, not its values, nearest.

Rounding a column of weights makes an error in what the matrix gives; the columns that are not
rounded yet can take most of it back, as far as their inputs go together (Frantar et al. 2022,
arXiv 2210.17323). How inputs go together is H, the sum of x x^T over the inputs of a calibration
text: columns are rounded one by one, the one with the strongest input first, and each one's error
is taken out of the rest by the rows of U, where U^T U is the inverse of H.

Scales and biases are those that plain rounding has, so any number of bits and any group size
come out in mlx-lm's layout, and a column's group does not depend on when its turn comes. Errors
are measured against scales as they will be stored.
"""

import mlx.core as mx

from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.weights.quantize import Packing

DAMPING = 0.01  # of H's mean diagonal, added to it: as in the paper
_COLUMNS = 64  # rounded before the rest of the matrix hears of their errors
_WORD = 32  # bits


def order_and_factor(hessian: mx.array) -> tuple[mx.array, mx.array]:
    """H `[n, n]`, float32 -> the columns `[n]` in the order of their turns, and U `[n, n]`.

    U is upper triangular, its rows and columns in that order. Raises CheckpointError for an H that
    is not finite.
    """
    diagonal = mx.diag(hessian)
    if not mx.all(mx.isfinite(diagonal)):
        raise CheckpointError(
            "the model's activations are not finite; convert with another --dtype"
        )
    order = mx.argsort(-diagonal)
    backwards = order[::-1]
    # With rows and columns backwards, Cholesky's lower factor of H is upper's of the inverse.
    turned = hessian[backwards][:, backwards]
    at = mx.arange(len(order))
    damping = mx.maximum(DAMPING * mx.mean(diagonal), mx.array(1e-30))
    turned[at, at] += damping
    mx.eval(turned)
    lower = mx.linalg.cholesky(turned, stream=mx.cpu)  # where MLX has it
    mx.eval(lower)
    del turned
    inverse = mx.linalg.tri_inv(lower, stream=mx.cpu)
    mx.eval(inverse)
    del lower
    upper = mx.contiguous(inverse[::-1, ::-1])
    mx.eval(order, upper)
    return order, upper


def pack(
    weight: mx.array, order: mx.array, upper: mx.array, packing: Packing
) -> dict[str, mx.array]:
    """A matrix `[rows, columns]` -> its packed arrays, as `Packing.quantize` names them.

    order, upper: what `order_and_factor` made of its inputs' H. `packing` is an affine one.
    """
    arrays = packing.quantize(weight)
    scales, biases = (arrays[part].astype(mx.float32) for part in ("scales", "biases"))
    scales = mx.where(scales == 0, 1.0, scales)  # of a group of zeros, in a narrow dtype
    left = weight.astype(mx.float32)[:, order]
    columns = left.shape[1]
    top = float(2**packing.bits - 1)
    turns = []
    for start in range(0, columns, _COLUMNS):
        stop = min(start + _COLUMNS, columns)
        groups = order[start:stop] // packing.group_size
        step, low = scales[:, groups], biases[:, groups]
        own, now = upper[start:stop, start:stop], left[:, : stop - start]
        chosen, errors = [], []
        for k in range(stop - start):
            column, s, b = now[:, :1], step[:, k : k + 1], low[:, k : k + 1]
            integer = mx.clip(mx.round((column - b) / s), 0.0, top)
            error = (column - (integer * s + b)) / own[k, k]
            now = now[:, 1:] - error * own[k, k + 1 :]
            chosen.append(integer.astype(mx.uint8))
            errors.append(error)
        left = left[:, stop - start :] - mx.concatenate(errors, 1) @ upper[start:stop, stop:]
        turns.append(mx.concatenate(chosen, 1))
        mx.eval(turns[-1], left)
    integers = mx.concatenate(turns, 1)[:, mx.argsort(order)]
    return arrays | {"weight": packed_words(integers, packing.bits)}


def pack_bytes(rows: int, columns: int) -> int:
    """Bytes held at most while a `[rows, columns]` matrix is packed: H, what its inverse is made
    by, and the matrix in float32, twice, with its integers."""
    return 4 * 4 * columns**2 + 12 * rows * columns


def packed_words(integers: mx.array, bits: int) -> mx.array:
    """Integers below `2 ** bits`, `[rows, columns]` -> `[rows, columns * bits / 32]` words.

    Row by row one stream of bits, the lowest first, as `mx.quantize` lays it out.
    """
    each = mx.unflatten(integers.astype(mx.uint32), -1, (-1, _WORD))  # 32 integers, `bits` words
    words = [mx.zeros(each.shape[:-1], mx.uint32) for _ in range(bits)]
    for i in range(_WORD):
        word, shift = divmod(i * bits, _WORD)
        words[word] = words[word] | (each[..., i] << shift)
        if shift + bits > _WORD:
            words[word + 1] = words[word + 1] | (each[..., i] >> (_WORD - shift))
    return mx.stack(words, -1).flatten(-2)
