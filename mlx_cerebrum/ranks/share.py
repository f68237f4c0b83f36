"""What one machine holds of a checkpoint, read as if it were a checkpoint of its own.

Its blocks are counted from 0, and only the lead has embedding, final norm and head. Everything that
opens, predicts and loads a checkpoint then does the same for a share of one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn

from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.tensors import (
    ATTENTION_OUT,
    MLP_OUT,
    PARTS,
    module_path,
    module_shapes,
    place,
)
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights.checkpoint import Checkpoint, Extent
from mlx_cerebrum.weights.quantize import Packing

_GROUP = 64  # columns; MLP shares begin at multiples of it


@dataclass(frozen=True)
class Columns:
    """The part of every block that one of several machines runs, where all run every block:
    key/value heads `heads[0]` to `heads[1]`, with the query heads that read them, and MLP columns
    `inner[0]` to `inner[1]`."""

    heads: tuple[int, int]
    inner: tuple[int, int]

    @staticmethod
    def all(config: ModelConfig, heads: Sequence[int]) -> "list[Columns]":
        """The parts of machines that run so many key/value heads each.

        Raises RequestError where the model's heads or columns can't be shared out like that.
        """
        total = config.num_key_value_heads
        if sum(heads) != total or min(heads) < 1:
            raise RequestError(
                f"the model has {total} key/value heads; shares of {', '.join(map(str, heads))}"
                f" are not all of them: give --split with {len(heads)} numbers that add up to"
                f" {total}"
            )
        units = config.intermediate_size // _GROUP
        if units * _GROUP != config.intermediate_size or units < len(heads):
            raise RequestError(
                f"an MLP of {config.intermediate_size} columns can't be shared out in groups of"
                f" {_GROUP}: leave out --tensor-parallel"
            )
        found, first, column = [], 0, 0
        for machine, count in enumerate(heads):
            last = first + count
            left = len(heads) - machine - 1  # each of these takes a group at least
            end = min(max(round(units * last / total), column + 1), units - left)
            found.append(Columns((first, last), (column * _GROUP, end * _GROUP)))
            first, column = last, end
        return found

    @staticmethod
    def even(config: ModelConfig, machines: int) -> "list[Columns]":
        """Equal parts. Raises RequestError where key/value heads don't divide."""
        total = config.num_key_value_heads
        if total % machines:
            raise RequestError(
                f"{total} key/value heads can't be shared out evenly to {machines} machines: give"
                " --split, such as 2,1, or leave out --tensor-parallel"
            )
        return Columns.all(config, [total // machines] * machines)


class ShareCheckpoint(Checkpoint):
    """`blocks` of a checkpoint, in their order; `columns` of each, where they are not whole.

    config: the whole model's, with the window asked for.
    """

    def __init__(
        self,
        whole: Checkpoint,
        config: ModelConfig,
        blocks: Sequence[int],
        lead: bool,
        columns: Columns | None = None,
    ) -> None:
        self.whole, self.blocks, self.columns = whole, tuple(blocks), columns
        self.path, self.raw_config = whole.path, whole.raw_config
        self.config = replace(
            config,
            num_hidden_layers=len(self.blocks),
            layer_map=tuple(range(len(self.blocks))),
            residual_scales=None,
            blocks_only=not lead,
        )
        if columns is not None:
            heads = columns.heads[1] - columns.heads[0]
            self.config = replace(
                self.config,
                num_attention_heads=heads * self._group,
                num_key_value_heads=heads,
                intermediate_size=columns.inner[1] - columns.inner[0],
            )
        self.repacked = frozenset(
            m for m in module_shapes(self.config) if self._whole(m) in whole.repacked
        )
        self.shapes, self.dtypes = {}, {}
        for module, shape in module_shapes(self.config).items():
            packing = self.packing(module)
            if columns is not None and len(shape) == 2:
                self._check(module, packing)
            inside = None if packing is None else packing.shapes(shape[0], shape[1])
            for part, name in whole.parts(self._whole(module)).items():
                own = f"{module}.{part}"
                self.shapes[own] = shape if inside is None else inside[part]
                self.dtypes[own] = whole.dtypes[name]

    @property
    def _group(self) -> int:
        """Query heads to a key/value head."""
        return self.whole.config.num_attention_heads // self.whole.config.num_key_value_heads

    def _whole(self, module: str) -> str:
        """The module's path in the whole checkpoint."""
        inside = place(module)
        return module if inside is None else module_path(self.blocks[inside[0]], inside[1])

    def _cut(self, module: str) -> tuple[int, int, int] | None:
        """Which part of the whole matrix it is: axis (0 rows, 1 columns), first, end."""
        inside = place(module)
        if self.columns is None or inside is None or "norm" in inside[1]:
            return None
        kind, width = inside[1], self.whole.config.head_dim
        (first, end), inner = self.columns.heads, self.columns.inner
        if kind in (ATTENTION_OUT, "self_attn.q_proj"):
            axis = int(kind == ATTENTION_OUT)
            return axis, first * self._group * width, end * self._group * width
        if kind.startswith("self_attn"):
            return 0, first * width, end * width
        return int(kind == MLP_OUT), *inner

    def _check(self, module: str, packing: Packing | None) -> None:
        cut = self._cut(module)
        if cut is None or cut[0] == 0 or packing is None:
            return
        if not all(packing.fits(at) for at in cut[1:]):
            raise RequestError(
                f"{self._whole(module)} is packed in {packing}, which a share of its columns would"
                " cut through: give another --split, or leave out --tensor-parallel"
            )

    def packing(self, module: str) -> Packing | None:
        return self.whole.packing(self._whole(module))

    def read(self, module: str) -> dict[str, mx.array]:
        arrays, cut = self.whole.read(self._whole(module)), self._cut(module)
        if cut is None:
            return arrays
        packing = self.packing(module)
        return {part: _sliced(array, part, cut, packing) for part, array in arrays.items()}

    def read_bytes(self, module: str) -> int:
        whole = 0 if self._cut(module) is None else self.whole.read_bytes(self._whole(module))
        return whole + super().read_bytes(module)

    def dense(self, module: str) -> mx.array:
        array, cut = self.whole.dense(self._whole(module)), self._cut(module)
        return array if cut is None else _sliced(array, PARTS[0], cut, None)

    def extents(self, module: str) -> dict[str, Extent]:
        return self.whole.extents(self._whole(module))

    def tokenizer(self) -> Tokenizer:
        return self.whole.tokenizer()


def _sliced(
    array: mx.array, part: str, cut: tuple[int, int, int], packing: Packing | None
) -> mx.array:
    axis, first, end = cut
    if axis == 1 and packing is not None:
        if part == PARTS[0]:
            first, end = first * packing.bits // 32, end * packing.bits // 32
        else:
            first, end = first // packing.group_size, end // packing.group_size
    piece = array[first:end] if axis == 0 else array[:, first:end]
    return mx.contiguous(piece)  # a slice would keep the whole alive


class Share(Model):
    """The positions that this machine runs: hidden states in, hidden states out."""

    def embed(self, tokens: mx.array) -> mx.array:
        return tokens  # the lead has done it


class Summed(nn.Module):
    """A matrix of which every machine holds some columns: what they give is added up."""

    def __init__(self, inner: nn.Module, summed: Callable[[mx.array], mx.array]) -> None:
        super().__init__()
        self.inner, self._summed = inner, summed

    def __call__(self, x: mx.array) -> mx.array:
        return self._summed(self.inner(x))


def sum_up(model: Model, summed: Callable[[mx.array], mx.array]) -> None:
    """Have a model whose matrices are shares of columns add up what they give."""
    for block in model.model.layers:
        for parent, name in ((block.self_attn, "o_proj"), (block.mlp, "down_proj")):
            setattr(parent, name, Summed(parent[name], summed))


def only_blocks(model: Model) -> None:
    """Let go of what a follower has no values for."""
    model.model.pop("embed_tokens")
    model.pop("lm_head", None)
