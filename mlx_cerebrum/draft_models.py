"""Models that draft for another: fewer of its positions, fewer of its bits, or both."""

from copy import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_cerebrum.cost import Costs, best_drafts, bytes_read
from mlx_cerebrum.memory import human, require
from mlx_cerebrum.model import Model
from mlx_cerebrum.plan import resolve
from mlx_cerebrum.policy import MARGIN, MODEL_PRIOR, MOST_DRAFTS
from mlx_cerebrum.quantize import Packing


def draft_model(model: Model, plan: str | None = None, bits: int | None = None) -> Model:
    """A drafter of `model`: laid out by `plan` (else as the model), packed to `bits` (else as is).

    Only packing takes memory. Raises PlanError or ConfigError for a plan these blocks can't run,
    MemoryBudgetError where the packed copy does not fit.
    """
    draft = model
    if plan is not None:
        layers, blocks = resolve(plan), model.config.num_hidden_layers
        draft = model.view(layers.layer_map(blocks), layers.residual_scales(blocks))
    return draft if bits is None else packed_copy(draft, Packing(bits, 64))


def stored_order(model: Model) -> Model | None:
    """Every block once, in the stored order, where that is expected to draft with a gain.

    For the 12.25B this is the 7B.
    """
    order = tuple(range(model.config.num_hidden_layers))
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
    arrays = dict(tree_flatten(packed.parameters())).values()
    fresh = sum(array.nbytes for array in arrays if array.ndim > 1)
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
    dense.weight = mx.dequantize(
        module.weight,
        module.scales,
        module.get("biases"),
        module.group_size,
        module.bits,
        module.mode,
    )
    return dense
