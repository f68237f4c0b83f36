"""What a speculative round costs and brings, before one is run.

A round drafts `k` tokens and checks them in one target pass of `k + 1` rows. With `agreement`
the chance that a draft is what the target chooses (taken as independent from one draft to the
next: Leviathan et al. 2023, arXiv 2211.17192, eq. 1), it yields 1 + a + a^2 + ... + a^k tokens.
Costs are shares of a plain decode step, so that what comes out is a speed-up.
"""

from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_cerebrum.model.forward import Model


@dataclass(frozen=True)
class Costs:
    """In plain decode steps of the target."""

    draft: float  # one drafted token
    row: float  # each row of a target pass after its first


def expected_tokens(agreement: float, drafts: int) -> float:
    """Tokens a round of `drafts` yields, the target's own one included."""
    return sum(agreement**i for i in range(drafts + 1))


def speedup(agreement: float, drafts: int, costs: Costs) -> float:
    """Of rounds of `drafts`, over plain decoding."""
    return expected_tokens(agreement, drafts) / (1 + drafts * (costs.draft + costs.row))


def best_drafts(agreement: float, costs: Costs, most: int) -> tuple[int, float]:
    """`(drafts, speed-up)` of the best round of at most `most`; `(0, 1.0)` where none pays."""
    rounds = [(speedup(agreement, drafts, costs), drafts) for drafts in range(1, most + 1)]
    gain, drafts = max(rounds, default=(1.0, 0))
    return (drafts, gain) if gain > 1 else (0, 1.0)


def bytes_read(model: Model) -> int:
    """Bytes of weights that a decode step reads: every position's block, and the head."""
    blocks = [_nbytes(block) for block in model.model.layers]
    tied = model.config.tie_word_embeddings
    head = _nbytes(model.model.embed_tokens if tied else model.lm_head)
    return head + sum(blocks[block] for block in model.config.layer_map)


def _nbytes(module: nn.Module) -> int:
    arrays = cast(list[tuple[str, mx.array]], tree_flatten(module.parameters()))
    return sum(array.nbytes for _, array in arrays)
