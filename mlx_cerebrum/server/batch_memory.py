"""Bytes that jobs decoded together will take, predicted before one joins."""

from collections.abc import Sequence

from mlx_cerebrum.model.cache import STEP
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.memory import forward_bytes
from mlx_cerebrum.server.jobs import Job


def job_bytes(model: Model, prefill_step: int, job: Job) -> int:
    """Bytes a job takes at most when nothing else runs."""
    item_bytes = model.dtype.size
    sizes = (model.config, item_bytes, prefill_step, [job], [job])
    return cache_bytes(*sizes) + pass_bytes(*sizes)


def cache_bytes(
    config: ModelConfig,
    item_bytes: int,
    prefill_step: int,
    jobs: Sequence[Job],
    reading: Sequence[Job],
) -> int:
    """Bytes of all caches at most: the batch `jobs` share, and prompts still read on their own.

    A batch's buffers have its longest row's length for every row. `reading` are those of the
    jobs whose prompts have not joined it yet.
    """
    entry = config.kv_values_per_token() * item_bytes  # one token in all positions
    longest = max((_decoded(config.sliding_window, job) for job in jobs), default=0)
    batch = sum(job.n for job in jobs) * longest * entry
    prompts = [_read(config.sliding_window, job, prefill_step) * entry for job in reading]
    # A batch grows one position at a time; a chunk is added to all positions of one prompt.
    moved = batch // config.num_positions + max(prompts, default=0)
    return batch + sum(prompts) + moved


def pass_bytes(
    config: ModelConfig,
    item_bytes: int,
    prefill_step: int,
    jobs: Sequence[Job],
    reading: Sequence[Job],
) -> int:
    """Bytes one forward pass makes at most: a chunk of a prompt, or a token of every row."""
    rows = sum(job.n for job in jobs)
    longest = max((_decoded(config.sliding_window, job) for job in jobs), default=0)
    # In float32 logits, log-probabilities of this step and the last, and what sampling makes.
    needs = [forward_bytes(config, rows, longest, item_bytes) + 6 * rows * config.vocab_size * 4]
    for job in reading:
        length, keys = (
            min(prefill_step, len(job.prompt)),
            _read(config.sliding_window, job, prefill_step),
        )
        needs.append(forward_bytes(config, length, keys, item_bytes))
    return max(needs)


def _decoded(window: int | None, job: Job) -> int:
    """Entries of a position's buffer for one row; it grows by STEP."""
    total = len(job.prompt) + job.max_tokens + STEP
    return total if window is None else min(total, window)


def _read(window: int | None, job: Job, prefill_step: int) -> int:
    """Entries while the prompt is read: the window before a chunk, and the chunk."""
    total = len(job.prompt) + STEP
    return total if window is None else min(total, window - 1 + prefill_step)
