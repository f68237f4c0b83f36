"""The one thread that generates: it owns MLX, takes jobs, and hands out their events."""

import logging
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import mlx.core as mx

from mlx_cerebrum.decoding.decode import prefill_step
from mlx_cerebrum.decoding.prompt_store import PromptStore
from mlx_cerebrum.decoding.stream import check_request
from mlx_cerebrum.decoding.text import StopText
from mlx_cerebrum.errors import MemoryBudgetError, RequestError
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.limits import limits, release
from mlx_cerebrum.model.memory import HEADROOM, available_bytes, human
from mlx_cerebrum.server.batch import Batch, jobs_bytes
from mlx_cerebrum.server.jobs import BusyError, ClosedError, Event, Failed, Job, Stats
from mlx_cerebrum.server.task import Counts, Task, said
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer

log = logging.getLogger(__name__)
_RELEASE = 5.0  # seconds of work after which freed memory goes back to the system
_ENDS = ("stop", "length", "cancelled", "failed")
_CLOSING = "the server is shutting down; ask again later"
_STOPPED = "the engine has stopped; start it again"
MOST_LOGPROBS = 20  # alternatives a token, as OpenAI's


class BatchEngine:
    """Answers jobs with any of `models`, several at once (`jobs.Engine`).

    max_batch: sequences of one model decoded together, at most.
    max_queue: jobs that may wait besides; where so many do, no new request is taken.
    cache_bytes: most bytes of prompts' caches kept for later prompts; 0 keeps none.
    prefill_step_size: tokens of a prompt read at a time; other answers wait for that long. By
        default as `generate` reads them.
    memory_limit: most bytes MLX should hold, weights included; by default what is free now.
    kv_bits: bits a value of cache entries, 8 or 4; None leaves them as they are.
    draft: where guesses of the next tokens come from: "none", "ngram" or "auto".
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        tokenizer: Tokenizer,
        *,
        max_batch: int = 8,
        max_queue: int = 64,
        cache_bytes: int = 0,
        prefill_step_size: int | None = None,
        memory_limit: int | None = None,
        kv_bits: int | None = None,
        draft: str = "none",
    ) -> None:
        self._models = dict(models)
        self._tokenizer = tokenizer
        self._max_batch, self._max_queue = max_batch, max_queue
        self._cache_bytes = cache_bytes
        self._prefill_step_size = prefill_step(prefill_step_size)
        self._memory_limit = memory_limit
        self._kv_bits, self._draft = kv_bits, draft
        self._budget = 0  # bytes for jobs and kept prompts together
        self._counts = Counts()
        self._kept_bytes = self._kv_bytes = self._active = 0  # as last seen by the thread
        # What follows is shared between threads; whoever touches it holds `_changed`.
        self._changed = threading.Condition()
        self._queues: dict[str, deque[Task]] = {name: deque() for name in models}
        self._arrived: dict[Task, int] = {}  # those queued, each with its number
        self._number = 0
        self._never_started = 0  # cancelled while queued
        self._places_taken = dict.fromkeys(models, 0)  # by sequences queued or running
        self._deadline: float | None = None  # set once it is closing
        self._why = _CLOSING
        self._release_next = 0.0
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure

    # From any thread.

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._models)

    def submit(
        self, job: Job, deliver: Callable[[Event], None], *, follows: bool = False
    ) -> Callable[[], None]:
        """See `jobs.Engine`."""
        job = self._checked(job)
        task = Task(job, self._tokenizer, deliver, self._forget)
        with self._changed:
            if self._deadline is not None:
                raise ClosedError(self._why)
            task.overflows = self._places_taken[job.model] + job.n > self._max_batch
            waiting = sum(queued.overflows for queued in self._arrived)
            if task.overflows and waiting >= self._max_queue and not follows:
                raise BusyError(f"{waiting} requests are waiting already; try again later")
            self._places_taken[job.model] += job.n
            self._queues[job.model].append(task)
            self._arrived[task] = self._number
            self._number += 1
            self._changed.notify_all()
        return task.cancel

    @property
    def closed(self) -> bool:
        return self._deadline is not None

    def stats(self) -> Stats:
        """What happened so far, what is held now."""
        counts = self._counts
        finished = {how: counts.finished[how] for how in _ENDS}
        finished["cancelled"] += self._never_started
        return Stats(
            queued=len(self._arrived),
            active=self._active,
            prompt_tokens=counts.prompt_tokens,
            cached_tokens=counts.cached_tokens,
            generated_tokens=counts.generated_tokens,
            finished=finished,
            cache_bytes=self._kept_bytes,
            kv_bytes=self._kv_bytes,
        )

    def close(self, grace: float = 0.0) -> None:
        """See `jobs.Engine`. Queued jobs fail at once. Returns when the thread is gone."""
        with self._changed:
            ends = time.monotonic() + grace
            self._deadline = ends if self._deadline is None else min(ends, self._deadline)
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _checked(self, job: Job) -> Job:
        """The job, with fewer tokens where there is no memory for all and fewer will do. Raises
        RequestError for one that can never run."""
        check_job(job, self._models, self._max_batch)
        if job.fewer and self._bytes(job) > self._budget:
            fits = bisect_right(
                range(1, job.max_tokens),
                self._budget,
                key=lambda most: self._bytes(replace(job, max_tokens=most)),
            )
            job = replace(job, max_tokens=max(fits, 1))
        if (needed := self._bytes(job)) > self._budget:
            raise RequestError(
                f"a prompt of {len(job.prompt)} tokens with {job.n} x {job.max_tokens} more needs"
                f" {human(needed)}, and there are {human(self._budget)} for all requests;"
                " ask for fewer tokens"
            )
        return job

    def _bytes(self, job: Job) -> int:
        how = self._prefill_step_size, self._kv_bits, self._draft
        return jobs_bytes(self._models, [job], *how)

    def _forget(self, task: Task) -> None:
        """A cancelled task that is still queued leaves at once."""
        with self._changed:
            if task in self._arrived:
                self._dequeue(task)
                self._places_taken[task.job.model] -= task.job.n
                self._never_started += 1

    def _dequeue(self, task: Task) -> None:
        self._queues[task.job.model].remove(task)
        del self._arrived[task]

    # On the engine's own thread.

    def _run(self) -> None:
        try:
            with limits(self._memory_limit):
                self._start()
                self._ready.set()
                while self._turn():
                    pass
        except BaseException as error:
            log.exception("the engine stopped")
            if not self._ready.is_set():
                self._failure = error
        finally:
            self._stop()
            mx.clear_streams()  # MLX asks for it: else the process may abort when it exits
            self._ready.set()

    def _start(self) -> None:
        self._budget = int(available_bytes() * HEADROOM)
        if self._budget <= 0:
            raise MemoryBudgetError("no memory is left for requests; use a smaller model")
        self._prompts = PromptStore(min(self._cache_bytes, self._budget))
        self._batch = Batch(
            self._models,
            self._prompts,
            self._counts,
            self._left,
            max_rows=self._max_batch,
            prefill_step_size=self._prefill_step_size,
            kv_bits=self._kv_bits,
            draft=self._draft,
        )

    def _turn(self) -> bool:
        """One step of all jobs that run; False when the engine is to stop."""
        running = bool(self._batch.tasks)
        if not running or time.monotonic() >= self._release_next:
            release()  # caches grow and shrink: what they leave adds up to gigabytes
            self._release_next = time.monotonic() + _RELEASE
        with self._changed:
            while not (running or self._arrived or self._deadline is not None):
                self._changed.wait()
            closing = self._deadline is not None
            if closing and (not running or time.monotonic() >= (self._deadline or 0.0)):
                return False
        if closing:
            self._fail_queued(_CLOSING)
        else:
            self._admit()
        if self._batch.tasks:
            self._guarded(self._batch.step)
        self._prompts.limit(self._budget - self._batch.predicted())
        self._look()
        return True

    def _look(self) -> None:
        self._active = self._batch.rows()
        self._kv_bytes = self._batch.kv_bytes
        self._kept_bytes = self._prompts.nbytes

    def _admit(self) -> None:
        """Start queued jobs in the order they came, as far as places and memory go.

        A model without a free place holds up only its own jobs. A job that waits for memory holds
        up all that came after it: else small ones could keep it waiting for ever.
        """
        for task in self._oldest_first():
            if self._batch.places(task.job.model) < task.job.n:
                continue
            needed = self._batch.predicted(task)
            if needed > self._budget:
                return
            self._prompts.limit(self._budget - needed)
            with self._changed:
                if task not in self._arrived:  # cancelled meanwhile
                    continue
                self._dequeue(task)
            self._guarded(partial(self._batch.start, task))

    def _guarded(self, do: Callable[[], None]) -> None:
        """`do` something with the batch. It handles its jobs' errors itself; one that gets past it
        ends all jobs."""
        try:
            do()
        except Exception as error:
            log.exception("a batch failed")
            self._batch.fail_all(said(error))

    def _oldest_first(self) -> Iterator[Task]:
        """Queued tasks, the oldest first. After one that was not started, none of its model's."""
        passed: set[str] = set()
        while True:
            with self._changed:
                heads = [
                    queue[0] for name, queue in self._queues.items() if queue and name not in passed
                ]
                if not heads:
                    return
                task = min(heads, key=self._arrived.__getitem__)
            yield task
            with self._changed:
                if task in self._arrived:
                    passed.add(task.job.model)

    def _left(self, task: Task) -> None:
        """A started job is over; its places are free."""
        self._active = self._batch.rows()
        with self._changed:
            self._places_taken[task.job.model] -= task.job.n

    def _fail_queued(self, message: str) -> None:
        with self._changed:
            tasks = sorted(self._arrived, key=self._arrived.__getitem__)
            for task in tasks:
                self._dequeue(task)
                self._places_taken[task.job.model] -= task.job.n
        for task in tasks:
            self._counts.finished["failed"] += 1
            task.deliver(Failed(message))

    def _stop(self) -> None:
        with self._changed:
            if self._deadline is None:  # an error ended the thread
                self._deadline, self._why = time.monotonic(), _STOPPED
        self._fail_queued(self._why)
        if self._failure is None and hasattr(self, "_batch"):
            self._batch.fail_all(self._why)
            self._prompts.clear()
            self._look()
        mx.clear_cache()


def check_job(job: Job, models: Mapping[str, Model], max_batch: int) -> None:
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
