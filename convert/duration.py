"""How long a calibrated recipe will take here: its parts timed at the model's own sizes, now.

One passage goes through a block of zeros, what goes into its matrices is added up, and some rows of
a matrix are packed. On a CPU that counts: two thirds of the demo model's time is no product.
"""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import mlx.core as mx
from mlx.utils import tree_map

from convert import gptq
from convert.distilled import EPOCHS
from convert.passages import LENGTH
from mlx_cerebrum.model.cache import attention_mask
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import TransformerBlock
from mlx_cerebrum.model.tensors import matrix_shapes
from mlx_cerebrum.weights.quantize import Packing

T = TypeVar("T")
_ROWS = 2048  # of a matrix that are packed
_GROUP = 32  # weights
# A step of distillation in passes forward: there, once more on the way back, and back to what went
# in and to the weights.
_PASSES = 4


def predicted_seconds(
    method: str, config: ModelConfig, tokens: int, blocks: int, dtype: mx.Dtype
) -> float:
    """Of a recipe that reads `tokens`, without what is read from disk and written. `blocks` that
    differ run at the positions, in `dtype`."""
    D, inner = config.hidden_size, config.intermediate_size
    passages = tokens / LENGTH
    forward = _forward_seconds(config, dtype)
    inputs = [mx.ones((LENGTH, n)) for n in (D, config.num_attention_heads * config.head_dim, D)]
    inputs.append(mx.ones((LENGTH, inner)))
    sums = _seconds(lambda: [x.T @ x for x in inputs])
    runs = passages * config.num_positions
    columns = max(_GROUP, D // _GROUP * _GROUP)
    identity = mx.eye(columns)
    known, solving = _timed(lambda: gptq.inputs_of(identity))
    solving *= sum((len(x[0]) / columns) ** 3 for x in inputs)
    rows = mx.random.normal((_ROWS, columns))
    packing = _seconds(lambda: gptq.pack(rows, known, Packing(4, _GROUP)))
    # A column's turn changes all columns after it.
    packing *= sum(a * b * b for a, b in matrix_shapes(config).values()) / (_ROWS * columns**2)
    packing *= blocks / config.num_hidden_layers  # an unrolled model has some more than once
    took = runs * (forward + sums) + blocks * solving + packing
    if method == "dwq":
        x, head = mx.ones((LENGTH, D), dtype), mx.zeros((D, config.vocab_size), dtype)
        saying = _seconds(lambda: mx.softmax((x @ head).astype(mx.float32), axis=-1))
        took += EPOCHS * _PASSES * (runs * forward + passages * saying)
    return took


def _forward_seconds(config: ModelConfig, dtype: mx.Dtype) -> float:
    """Of one passage through one block."""
    block = TransformerBlock(config)
    block.update(tree_map(lambda array: mx.zeros(array.shape, dtype), block.parameters()))
    x = mx.ones((1, LENGTH, config.hidden_size), dtype)
    mask = attention_mask(LENGTH, 0, config.sliding_window)
    return _seconds(lambda: block(x, mask, None, None))


def _seconds(work: Callable[[], Any]) -> float:
    """Of `work`, the second time: the first makes arrays and kernels."""
    mx.eval(work())
    return _timed(work)[1]


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    mx.eval(found := work())
    return found, time.perf_counter() - start
