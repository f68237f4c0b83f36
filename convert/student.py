"""A packed model that learns: its scales and biases move, its integers stay.

Of each group of weights w, of scale s, two numbers are learned: `(1 + share) w + shift s` takes its
place, rounded as it will be stored. They go down the KL divergence of the packed model's next token
from the dense model's. A block that runs at several positions has the slopes of all of them added
up: it is stored once.

Of a pass only what goes into each position is kept. The way back makes the rest anew, a position
at a time, so that no more than one block is dense at once.

Shapes: B passages of L tokens, D = hidden_size, V tokens in the vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from mlx_cerebrum.model.cache import causal_mask
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import TransformerBlock
from mlx_cerebrum.model.tensors import BLOCK, EMBEDDING, HEAD, module_path
from mlx_cerebrum.weights.quantize import Packing

ROWS = 256  # tokens whose logits are held at once
TEMPERATURE = 1.0  # that logits are divided by
_MEAN, _SQUARE, _LEAST = 0.9, 0.99, 1e-12  # Adam's: how much of its moments a step keeps

# Told a matrix's module path, and a loss's slopes by what it learns, once they are complete.
Found = Callable[[str, mx.array], None]


@dataclass
class Matrix:
    """A packed matrix, and what has been learned of its groups.

    start: its packed arrays before.
    learned: share and shift, `[2, rows, groups]`; `mean` and `square`: the moments of their slopes.
    """

    packing: Packing
    start: dict[str, mx.array]
    learned: mx.array = field(init=False)
    mean: mx.array = field(init=False)
    square: mx.array = field(init=False)

    def __post_init__(self) -> None:
        self.learned = self.mean = self.square = mx.zeros((2, *self.start["scales"].shape))
        mx.eval(self.start, self.learned)

    def stored(self) -> dict[str, mx.array]:
        """Its arrays as they would be written now."""
        scales, biases = (self.start[part].astype(mx.float32) for part in ("scales", "biases"))
        share, shift = self.learned
        moved = {"scales": scales * (1 + share), "biases": biases * (1 + share) + scales * shift}
        dtype = self.start["scales"].dtype
        return self.start | {part: array.astype(dtype) for part, array in moved.items()}

    def dense(self, dtype: mx.Dtype, rows: mx.array | None = None) -> mx.array:
        """The matrix as it would be written now, or those of its `rows` `[n]`."""
        arrays = self.stored()
        if rows is not None:
            arrays = {part: array[rows] for part, array in arrays.items()}
        return self.packing.dequantize(arrays, dtype)

    def slopes(self, dense: mx.array, error: mx.array) -> mx.array:
        """A loss's slopes by what is learned, `[2, rows, groups]`, from `error`, its slopes by the
        `dense` matrix."""
        size = self.packing.group_size
        of, by = (mx.unflatten(x.astype(mx.float32), -1, (-1, size)) for x in (dense, error))
        share, shift = self.learned
        by_shift = self.start["scales"].astype(mx.float32) * by.sum(-1)
        by_share = ((by * of).sum(-1) - shift * by_shift) / (1 + share)
        return mx.stack([by_share, by_shift])

    def learn(self, slopes: mx.array, step: int, rate: float) -> None:
        """A step of Adam (Kingma & Ba 2014, arXiv 1412.6980), `step` counted from 0."""
        self.mean = _MEAN * self.mean + (1 - _MEAN) * slopes
        self.square = _SQUARE * self.square + (1 - _SQUARE) * slopes * slopes
        mean = self.mean / (1 - _MEAN ** (step + 1))
        square = self.square / (1 - _SQUARE ** (step + 1))
        self.learned = self.learned - rate * mean / (mx.sqrt(square) + _LEAST)
        mx.eval(self.learned, self.mean, self.square)


@dataclass
class Student:
    """The packed model, with the dense one's head.

    order: the layer that runs at each position, as `matrices` and `dense` number them: what is
        packed and what is not, by module path.
    norm, teacher: the final norm, and the dense head `[V, D]`. All is computed in its dtype.
    """

    config: ModelConfig
    order: tuple[int, ...]
    matrices: Mapping[str, Matrix]
    dense: Mapping[str, mx.array]
    norm: nn.RMSNorm
    teacher: mx.array

    def slopes(self, tokens: mx.array, said: mx.array, found: Found) -> float:
        """The divergence in nats, added up over `tokens` `[B, L]`. Its slopes by all that is
        learned are told to `found`, which may change the matrix it is told of.

        said: what the dense model gives its head, `[B, L, D]`.
        """
        # Of four dimensions, so that a CPU too takes MLX's own attention: ours has no slopes.
        mask = causal_mask(tokens.shape[1], 0, self.config.sliding_window)[None, None]
        inputs = [self._embedded(tokens)]
        for position in range(len(self.order)):
            run, _, weights = self._position(position, mask)
            inputs.extend(run(inputs[-1], *weights))
            mx.eval(inputs[-1])
        head = HEAD if HEAD in self.matrices or HEAD in self.dense else EMBEDDING
        table = self._dense(head)
        divergence, error, by_table = self._divergence(inputs.pop(), said, table)
        if head == HEAD:
            self._tell(head, table, by_table, found)
            del table, by_table
        waiting: dict[str, mx.array] = {}
        for position in reversed(range(len(self.order))):
            run, names, weights = self._position(position, mask)
            _, (error, *errors) = mx.vjp(run, [inputs.pop(), *weights], [error])
            for name, dense, by in zip(names, weights, errors, strict=True):
                slopes = self.matrices[name].slopes(dense, by)
                waiting[name] = waiting[name] + slopes if name in waiting else slopes
            del run, weights, errors
            mx.eval(error, waiting)
            if self.order[position] not in self.order[:position]:
                for name in names:
                    found(name, waiting.pop(name))
        if head == EMBEDDING:  # it is looked up in too
            by_table = by_table.at[tokens.reshape(-1)].add(error.reshape(-1, error.shape[-1]))
            self._tell(head, table, by_table, found)
        return divergence

    def _tell(self, module: str, dense: mx.array, error: mx.array, found: Found) -> None:
        if module in self.matrices:
            found(module, self.matrices[module].slopes(dense, error))

    def _dense(self, module: str) -> mx.array:
        if module in self.matrices:
            return self.matrices[module].dense(self.teacher.dtype)
        return self.dense[module].astype(self.teacher.dtype)

    def _embedded(self, tokens: mx.array) -> mx.array:
        ids = tokens.reshape(-1)
        table = self.matrices.get(EMBEDDING)
        rows = self.dense[EMBEDDING][ids] if table is None else table.dense(self.teacher.dtype, ids)
        return rows.astype(self.teacher.dtype).reshape(*tokens.shape, -1)

    def _position(
        self, position: int, mask: mx.array
    ) -> tuple[Callable[..., list[mx.array]], list[str], list[mx.array]]:
        """What runs at a position, as a function of what goes in and of its dense matrices; their
        module paths; and they themselves."""
        layer, scales = self.order[position], self.config.residual_scales
        own = None if scales is None else scales[position]
        block = TransformerBlock(self.config)
        paths = {kind: module_path(layer, kind) for kind in BLOCK}
        packed = [kind for kind, path in paths.items() if path in self.matrices]
        fixed = [(f"{k}.weight", self._dense(p)) for k, p in paths.items() if k not in packed]
        block.load_weights(fixed, strict=False)

        def run(x: mx.array, *weights: mx.array) -> list[mx.array]:
            named = [(f"{kind}.weight", w) for kind, w in zip(packed, weights, strict=True)]
            block.load_weights(named, strict=False)
            return [block(x, mask, None, own)]

        names = [paths[kind] for kind in packed]
        return run, names, [self._dense(name) for name in names]

    def _divergence(
        self, h: mx.array, said: mx.array, table: mx.array
    ) -> tuple[float, mx.array, mx.array]:
        """The sum over all tokens, and its slopes by `h` `[B, L, D]` and by the head `table`."""
        normed = self.norm(h).reshape(-1, h.shape[-1])
        said = said.reshape(normed.shape)
        total, errors, by_table = mx.array(0.0), [], mx.zeros(table.shape)
        for start in range(0, len(normed), ROWS):
            rows = normed[start : start + ROWS]
            ours, theirs = (
                _log_softmax((x @ w.T).astype(mx.float32) / TEMPERATURE)
                for x, w in ((rows, table), (said[start : start + ROWS], self.teacher))
            )
            wanted = mx.exp(theirs)
            total = total + (wanted * (theirs - ours)).sum()
            off = ((mx.exp(ours) - wanted) / TEMPERATURE).astype(h.dtype)
            errors.append(off @ table)
            by_table = by_table + off.T @ rows
            mx.eval(total, errors, by_table)
        error = mx.concatenate(errors).reshape(h.shape)
        _, (error,) = mx.vjp(lambda x: [self.norm(x)], [h], [error])
        mx.eval(error)
        return cast(float, total.item()), error, by_table


def _log_softmax(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
