"""How much memory jobs need besides the weights, predicted."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import mlx.core as mx

from mlx_cerebrum.decoding.decoder import MOST_TOGETHER
from mlx_cerebrum.decoding.logprobs import ROWS
from mlx_cerebrum.decoding.policy import MOST_DRAFTS
from mlx_cerebrum.model.cache import STEP
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.memory import Workload, forward_bytes
from mlx_cerebrum.server.jobs import Job


class Sized(Protocol):
    """What a job's memory depends on: a model, or what is known of one without its weights."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def dtype(self) -> mx.Dtype: ...


def jobs_bytes(
    models: Mapping[str, Sized],
    jobs: Sequence[Job],
    prefill_step: int,
    kv_bits: int | None,
    draft: str,
) -> int:
    """Bytes that these jobs take at most: their caches, a pass, and what choosing tokens takes.

    The models are views of the same weights.
    """
    if not jobs:
        return 0
    guesses = 0 if draft == "none" else MOST_DRAFTS  # of one alone; in company they are fewer
    if any(job.grammar is not None for job in jobs):  # what only can come is checked, like a guess
        guesses = max(guesses, MOST_TOGETHER - 1)
    works: list[Workload] = []  # of each sequence
    for job in jobs:
        model, lengths = models[job.model], (len(job.prompt), job.max_tokens)
        size = model.dtype.size
        work = Workload(model.config, size, *lengths, prefill_step, kv_bits, guesses)
        works += [work] * job.n
    if len(works) == 1:
        rows, made = 1 + guesses, _alone(works[0])
    else:
        rows = len(works)
        if guesses:
            rows = max(rows * MOST_TOGETHER, 1 + guesses)
        made = _together(works, rows)
    scored = [job for job in jobs if job.scored is not None]
    # In float32 logits, what sampling makes of them, and log-probabilities; of a prompt's tokens
    # the likeliest too.
    logits = (6 * rows + (8 * ROWS if scored else 0)) * works[0].config.vocab_size * 4
    return made + logits + sum(len(job.prompt) * (2 + (job.scored or 0)) * 128 for job in scored)


def _alone(work: Workload) -> int:
    """As for `generate`: its caches stay its own, and are never copied. Begun where a kept prompt
    ends, they may come to have room for that much more."""
    return work.bytes + STEP * work.entry_bytes


def _own(work: Workload) -> int:
    """Bytes of the caches of a sequence in company, wherever they were begun."""
    return max(work.cache_bytes, work.shared_bytes)


def _together(works: Sequence[Workload], rows: int) -> int:
    """Sequences of one order share caches, and take twice at most what they take alone. While one
    joins, it is there twice, and so is one position's buffer. A pass has a token of each sequence,
    with its guesses, and a chunk of a prompt."""
    orders: dict[tuple[Any, ...], list[Workload]] = {}
    for work in works:
        order = work.config.layer_map, work.config.residual_scales
        orders.setdefault(order, []).append(work)
    caches, joining = 0, 0
    for own in orders.values():
        shared = sum(map(_own, own))
        if len(own) > 1:
            shared = min(2 * shared, len(own) * max(work.shared_bytes for work in own))
            joining = max(joining, *map(_own, own))
        caches += shared + shared // own[0].config.num_positions
    config, size, kv_bits = works[0].config, works[0].item_bytes, works[0].kv_bits
    chunk = max(min(work.prefill_step, work.prompt) for work in works)
    keys = max(map(_keys, works))
    made = sum(forward_bytes(config, length, keys, size, kv_bits) for length in (rows, chunk))
    return caches + joining + made


def _keys(work: Workload) -> int:
    """Entries that a token of it sees at most."""
    total, window = work.prompt + work.generated, work.config.sliding_window
    return total if window is None else min(total, window + work.prefill_step)
