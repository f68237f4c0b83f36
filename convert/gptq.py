"""GPTQ: the packed integers that keep a matrix's outputs, not its values, nearest.

Rounding a column of weights makes an error in what the matrix gives; the columns that are not
rounded yet can take most of it back, as far as their inputs go together (Frantar et al. 2022,
arXiv 2210.17323). How inputs go together is H, the sum of x x^T over the inputs of a calibration
text: columns are rounded one by one, the one with the strongest input first, and each one's error
is taken out of the rest by the rows of U, where U^T U is the inverse of H.

A group's scale and bias are fixed before the first column's turn, so any number of bits and any
group size come out in mlx-lm's layout, and it does not matter when a column's turn comes. They are
those of plain rounding made smaller by what leaves the group's outputs nearest, each column's error
counted by the strength of its input: a few weights at the ends are cut off, and all others are
rounded more finely. Errors are measured against scales as they will be stored.
"""

from typing import NamedTuple

import mlx.core as mx

from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.weights.quantize import Packing

DAMPING = 0.01  # of H's mean diagonal, added to it: as in the paper
_TRIES = 8  # the last adds more than all there is
_COLUMNS = 64  # rounded before the rest of the matrix hears of their errors
_ROWS = 4096  # of a matrix at a time
_SHARES = (0.96, 0.92, 0.88, 0.84, 0.8, 0.75)  # of a scale that are tried
_WORD = 32  # bits


class Inputs(NamedTuple):
    """What goes into a matrix of n columns: each input's strength, and the columns in the order of
    their turns, `[n]`; U, upper triangular, its rows and columns in that order, `[n, n]`."""

    strength: mx.array
    order: mx.array
    upper: mx.array


def inputs_of(hessian: mx.array) -> Inputs:
    """From H `[n, n]`, float32. Raises CheckpointError for one that is not finite."""
    unfit = CheckpointError("the model's activations are not finite; convert with another --dtype")
    diagonal = mx.diag(hessian)
    if not mx.all(mx.isfinite(diagonal)):
        raise unfit
    order = mx.argsort(-diagonal)
    backwards = order[::-1]
    # With rows and columns backwards, Cholesky's lower factor of H is upper's of the inverse.
    turned = hessian[backwards][:, backwards]
    at = mx.arange(len(order))
    damping = mx.maximum(DAMPING * mx.mean(diagonal), mx.array(1e-30))
    for _ in range(_TRIES):
        turned[at, at] += damping
        mx.eval(turned)
        lower = mx.linalg.cholesky(turned, stream=mx.cpu)  # where MLX has it
        if mx.all(mx.isfinite(mx.diag(lower)) & (mx.diag(lower) > 0)):
            break
        damping = 10 * damping  # rounding made it indefinite, of which MLX says nothing
    else:
        raise unfit
    del turned
    inverse = mx.linalg.tri_inv(lower, stream=mx.cpu)
    mx.eval(inverse)
    del lower
    upper = mx.contiguous(inverse[::-1, ::-1])
    mx.eval(diagonal, order, upper)
    return Inputs(diagonal, order, upper)


def pack(weight: mx.array, inputs: Inputs, packing: Packing) -> dict[str, mx.array]:
    """A matrix `[rows, columns]` -> its packed arrays, as `Packing.quantize` names them.

    `packing` is an affine one.
    """
    pieces = []
    for row in range(0, len(weight), _ROWS):  # they have nothing to do with each other
        pieces.append(_pack(weight[row : row + _ROWS], inputs, packing))
        mx.eval(pieces[-1])
    return {part: mx.concatenate([piece[part] for piece in pieces]) for part in pieces[0]}


def _pack(weight: mx.array, inputs: Inputs, packing: Packing) -> dict[str, mx.array]:
    order, upper = inputs.order, inputs.upper
    scales, biases = _scales(weight, inputs.strength, packing)
    step_of, low_of = scales.astype(mx.float32), biases.astype(mx.float32)
    left = weight.astype(mx.float32)[:, order]
    columns = left.shape[1]
    top = float(2**packing.bits - 1)
    turns = []
    for start in range(0, columns, _COLUMNS):
        stop = min(start + _COLUMNS, columns)
        groups = order[start:stop] // packing.group_size
        step, low = step_of[:, groups], low_of[:, groups]
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
    return {"weight": packed_words(integers, packing.bits), "scales": scales, "biases": biases}


def _scales(weight: mx.array, strength: mx.array, packing: Packing) -> tuple[mx.array, mx.array]:
    """The scales and biases `[rows, groups]`, in the weight's dtype, that rounding by loses least
    with, of those that plain rounding has and shares of them."""
    plain = packing.quantize(weight)
    best, top = None, float(2**packing.bits - 1)
    values = mx.unflatten(weight.astype(mx.float32), -1, (-1, packing.group_size))
    counts = strength.reshape(-1, packing.group_size)
    for share in (1.0, *_SHARES):
        scales, biases = (
            (plain[p].astype(mx.float32) * share).astype(weight.dtype) for p in ("scales", "biases")
        )
        scales = mx.where(scales == 0, mx.array(1.0, weight.dtype), scales)  # of nothing but zeros
        s, b = (array.astype(mx.float32)[..., None] for array in (scales, biases))
        off = mx.clip(mx.round((values - b) / s), 0.0, top) * s + b - values
        loss = (off * off * counts).sum(-1)
        if best is not None:
            better = loss < best[0]
            now = loss, scales, biases
            best = [mx.where(better, x, y) for x, y in zip(now, best, strict=True)]
        else:
            best = [loss, scales, biases]
        mx.eval(best)
    assert best is not None
    return best[1], best[2]


def pack_bytes(rows: int, columns: int) -> int:
    """Bytes held at most while a `[rows, columns]` matrix is packed: H, and what its inverse is
    made by; or U, the matrix, and of some of its rows their values, errors and integers."""
    held = 4 * columns**2 + 4 * rows * columns
    return max(4 * 4 * columns**2, held + 6 * 4 * min(rows, _ROWS) * columns)


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
