"""What can't be had, in one line each: a job that can never run, weights that can't be loaded."""

from collections.abc import Mapping

from mlx_cerebrum.decoding.stream import check_request
from mlx_cerebrum.decoding.text import StopText
from mlx_cerebrum.errors import CerebrumError, RequestError
from mlx_cerebrum.model.memory import human, left
from mlx_cerebrum.server.holding import Source, pathless
from mlx_cerebrum.server.job_bytes import Sized
from mlx_cerebrum.server.jobs import Job

MOST_LOGPROBS = 20  # alternatives a token, as OpenAI's


def too_little(name: str, needed: int, free: int) -> str:
    """What to say where weights don't fit."""
    return f"{name} needs {human(needed)} and {left(free)}"


def why_not(error: Exception, source: Source, name: str) -> str:
    """Why weights can't be loaded, in one line without a path."""
    if isinstance(error, CerebrumError):
        return pathless(error, source.path, name)
    text = str(error).lower()
    if isinstance(error, MemoryError) or "alloc" in text or "memory" in text:
        return "the device ran out of memory"
    return f"its weights can't be read ({type(error).__name__})"


def too_large(job: Job, needed: int, free: int) -> str:
    return (
        f"a prompt of {len(job.prompt)} tokens with {job.n} x {job.max_tokens} more needs"
        f" {human(needed)}, and there are {human(max(0, free))} for all requests;"
        " ask for fewer tokens"
    )


def check_job(job: Job, models: Mapping[str, Sized], max_batch: int) -> None:
    """Raise RequestError for a job that can never run, however much memory there is."""
    if job.model not in models:
        raise RequestError(f"there is no model {job.model!r}; there are {', '.join(models)}")
    config = models[job.model].config
    check_request(config, job.prompt, job.max_tokens, least=0 if job.echo else 1)
    job.sampling.check_vocabulary(config.vocab_size)
    if not 1 <= job.n <= max_batch:
        raise RequestError(f"n must be from 1 to {max_batch}, not {job.n}")
    k = job.top_logprobs
    if k is not None and not 0 <= k <= MOST_LOGPROBS:
        raise RequestError(
            f"top_logprobs must be from 0 to {MOST_LOGPROBS}, not {job.top_logprobs}"
        )
    StopText(job.stop)
