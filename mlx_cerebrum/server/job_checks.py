"""Whether a job can run at all, asked before it is queued."""

from collections.abc import Mapping

from mlx_cerebrum.decoding.sampling import check_sampling
from mlx_cerebrum.decoding.stream import StopText, check_request
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.server.jobs import Job

MOST_LOGPROBS = 20  # alternatives a token, as OpenAI's


def check_job(
    job: Job, models: Mapping[str, Model], max_batch: int, prefill_step_size: int
) -> None:
    """Raise RequestError for a job that can never run, however much memory there is."""
    if job.model not in models:
        raise RequestError(f"there is no model {job.model!r}; there are {', '.join(models)}")
    config = models[job.model].config
    check_request(config, len(job.prompt), job.max_tokens, prefill_step_size)
    outside = [token for token in job.prompt if not 0 <= token < config.vocab_size]
    if outside:
        raise RequestError(f"token id {outside[0]} is not below {config.vocab_size}")
    if not 1 <= job.n <= max_batch:
        raise RequestError(f"n must be from 1 to {max_batch}, not {job.n}")
    k = job.top_logprobs
    if k is not None and not 0 <= k <= MOST_LOGPROBS:
        raise RequestError(
            f"top_logprobs must be from 0 to {MOST_LOGPROBS}, not {job.top_logprobs}"
        )
    sampling = job.sampling
    check_sampling(sampling.temperature, sampling.top_p, sampling.min_p, sampling.seed)
    StopText(job.stop)
