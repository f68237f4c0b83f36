"""A model run a block at a time, each read from disk when its turn comes: for calibration.

All passages go through one position of the layer map before any goes through the next, so what is
held is one block, the hidden states, and what a visitor keeps. A block that the map runs twice is
read twice.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import mlx.core as mx

from convert.integrity import ReadError
from convert.layout import Output
from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.cpu import Linear
from mlx_cerebrum.model.forward import TransformerBlock
from mlx_cerebrum.model.tensors import BLOCK, module_path
from mlx_cerebrum.text import one_line
from mlx_cerebrum.weights.checkpoint import Checkpoint

# Told what goes into a matrix: its kind (q_proj stands for k_proj and v_proj, gate_proj for
# up_proj, which have the same inputs), and inputs `[N, n]`.
Heard = Callable[[str, mx.array], None]
LISTENED = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


class _Listening(Linear):
    """A projection that tells what it is given."""

    def __init__(self, kind: str, heard: Heard) -> None:
        super().__init__(1, 1, bias=False)
        self._tell = lambda x: heard(kind, x)

    def __call__(self, x: mx.array) -> mx.array:
        self._tell(x.reshape(-1, x.shape[-1]))
        return super().__call__(x)


def weight(checkpoint: Checkpoint, output: Output) -> mx.array:
    """What a conversion will write of one module, before it is packed. Read anew each time.

    Raises ReadError where it can't be read just now, CheckpointError for values not finite.
    """
    cpu = mx.default_stream(mx.cpu)
    try:
        stored = {"weight": checkpoint.dense(output.source)}
        array = replace(output.transform, unpack=None).dense(stored, None, cpu)["weight"]
        mx.eval(array)
    except (RuntimeError, CheckpointError) as error:  # a disk that is gone, too
        raise ReadError(f"{output.source} can't be read: {one_line(str(error), 200)}") from error
    if not mx.all(mx.isfinite(array)):
        raise CheckpointError(
            f"{output.source} has values that are NaN or infinite; the source is damaged, or"
            " convert with another --dtype"
        )
    return array


def block_of(
    checkpoint: Checkpoint,
    outputs: Mapping[str, Output],
    layer: int,
    config: ModelConfig,
    dtype: mx.Dtype,
    heard: Heard,
) -> TransformerBlock:
    """The source's layer as a block that computes in `dtype`, and tells `heard` what its
    matrices are given.

    outputs: what is written, by the source's module paths.
    """
    block = TransformerBlock(config)
    for kind in LISTENED:
        parent, name = kind.split(".")
        block[parent][name] = _Listening(kind, heard)
    for kind in BLOCK:
        array = weight(checkpoint, outputs[module_path(layer, kind)]).astype(dtype)
        mx.eval(array)
        block.load_weights([(f"{kind}.weight", array)], strict=False)
    return block
