"""Models that draft for another: fewer of its positions, fewer of its bits, or both."""

from copy import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_cerebrum.decoding.drafters import borrowed
from mlx_cerebrum.decoding.policy import (
    MARGIN,
    MODEL_PRIOR,
    MOST_DRAFTS,
    Costs,
    best_drafts,
    bytes_read,
)
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.memory import human, require
from mlx_cerebrum.model.tensors import matrix_shapes, place
from mlx_cerebrum.plan.layer_plan import resolve
from mlx_cerebrum.weights.quantize import Packing, matrix_bytes

AS_MUCH = (
    "the drafter would read as much as the model does: give a shorter --draft-plan, or fewer"
    " --draft-bits"
)
_GROUP = 64  # weights


def check_draft(config: ModelConfig, plan: str | None, bits: int | None) -> ModelConfig:
    """The config of a drafter laid out by `plan`; a wrong plan is refused without any weights.

    Raises PlanError or ConfigError for a plan these blocks can't run, RequestError for one that
    is not a smaller part of the model's own.
    """
    if plan is None:
        return config
    layers, blocks = resolve(plan), config.num_hidden_layers
    draft = config.with_map(layers.layer_map(blocks), layers.residual_scales(blocks))
    borrowed(draft.layer_map, config.layer_map)
    if bits is None and draft.num_positions == config.num_positions:
        raise RequestError(AS_MUCH)
    return draft


def copy_bytes(config: ModelConfig, bits: int, item_bytes: int) -> int:
    """Bytes of a packed copy of the blocks that `config` runs, with embedding and head."""
    packing, run = Packing(bits, _GROUP), set(config.layer_map)
    kept = {
        module: shape
        for module, shape in matrix_shapes(config).items()
        if (inside := place(module)) is None or inside[0] in run
    }
    return sum(matrix_bytes(shape, packing, item_bytes) for shape in kept.values())


def draft_model(model: Model, plan: str | None = None, bits: int | None = None) -> Model:
    """A drafter for `model`: laid out by `plan` (else as the model), packed to `bits` (else as is).

    Only packing takes memory. Raises PlanError or ConfigError for a plan these blocks can't run,
    RequestError where the drafter would read as much as the model itself, MemoryBudgetError where
    the packed copy does not fit.
    """
    config, draft = check_draft(model.config, plan, bits), model
    if plan is not None:
        draft = model.view(config.layer_map, config.residual_scales)
    if bits is not None:
        draft = packed_copy(draft, Packing(bits, _GROUP))
    if bytes_read(draft) >= bytes_read(model):
        raise RequestError(AS_MUCH)
    return draft


def stored_order(model: Model) -> Model | None:
    """Every block once, in the stored order, where that is expected to draft with a gain.

    For the 12.25B this is the 7B.
    """
    order = tuple(range(model.config.num_hidden_layers))
    if model.elsewhere is not None:  # drafting runs a part of the positions only
        return None
    if not set(order) <= set(model.config.layer_map) or order == model.config.layer_map:
        return None
    draft = model.view(order)
    costs = Costs(bytes_read(draft) / bytes_read(model), 0.0)
    gain = best_drafts(MODEL_PRIOR, costs, MOST_DRAFTS)[1]
    return draft if gain > MARGIN else None


def packed_copy(model: Model, packing: Packing) -> Model:
    """The same model with its matrices in fewer bits, a block at a time; norms are shared.

    Raises MemoryBudgetError before anything is computed where it does not fit.
    """
    packed: Model = _packed(model, packing)
    for block in set(range(model.config.num_hidden_layers)) - set(model.config.layer_map):
        packed.model.layers[block] = model.model.layers[block]  # it does not run
    shared = {id(array) for array in dict(tree_flatten(model.parameters())).values()}
    arrays = dict(tree_flatten(packed.parameters())).values()
    fresh = sum(array.nbytes for array in arrays if id(array) not in shared)
    require(
        fresh,
        f"a {packing.bits}-bit copy of the blocks to draft with ({human(fresh)})",
        "use --draft-plan or n-grams, which take no memory",
    )
    for part in (*packed.model.layers, packed):
        mx.eval(part.parameters())
        mx.clear_cache()
    return packed


def _packed(module: Any, packing: Packing) -> Any:
    """A module tree like `module`, its matrices packed and all else shared."""
    if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
        return module if module.bits <= packing.bits else _packed(_dense(module), packing)
    if isinstance(module, (nn.Linear, nn.Embedding)):
        fits = packing.fits(module.weight.shape[-1])
        return module.to_quantized(packing.group_size, packing.bits) if fits else module
    if isinstance(module, list):
        return [_packed(child, packing) for child in module]
    if not isinstance(module, nn.Module):
        return module
    copied = copy(module)
    for name, child in module.items():
        copied[name] = _packed(child, packing)
    return copied


def _dense(module: nn.QuantizedLinear | nn.QuantizedEmbedding) -> nn.Linear | nn.Embedding:
    tabled = isinstance(module, nn.QuantizedEmbedding)
    dense = nn.Embedding(1, 1) if tabled else nn.Linear(1, 1, bias=False)
    packing = Packing(module.bits, module.group_size, module.mode)
    arrays = {name: module[name] for name in packing.parameters}
    affine = packing.mode == "affine"  # the float formats keep their scales as bytes
    dense.weight = packing.dequantize(arrays, module.scales.dtype if affine else mx.bfloat16)
    return dense
