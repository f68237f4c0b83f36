"""The one thread that generates: it owns MLX, takes jobs, and hands out their events."""

import gc
import logging
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import mlx.core as mx

from mlx_cerebrum.decoding.decode import prefill_step
from mlx_cerebrum.decoding.prompt_store import PromptStore
from mlx_cerebrum.errors import MachineError, MemoryBudgetError, RequestError
from mlx_cerebrum.machine.awake import LINGER, Awake
from mlx_cerebrum.machine.pressure import Pressure
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.limits import limits, release, wire
from mlx_cerebrum.model.memory import HEADROOM, available_bytes, human
from mlx_cerebrum.server.batch import Batch
from mlx_cerebrum.server.holding import Holding, Laid, Source
from mlx_cerebrum.server.job_bytes import jobs_bytes
from mlx_cerebrum.server.jobs import ClosedError, Event, Failed, Job, Loading, Stats
from mlx_cerebrum.server.loader import Coming, Loader
from mlx_cerebrum.server.log import write
from mlx_cerebrum.server.refusals import check_job, too_large, too_little, why_not
from mlx_cerebrum.server.task import Counts, Task, said
from mlx_cerebrum.server.waiting import Waiting
from mlx_cerebrum.text import one_line
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights.opening import Opened

log = logging.getLogger(__name__)
_RELEASE = 5.0  # seconds of work after which freed memory goes back to the system
_LOOK = 5.0  # seconds between two looks at the machine's memory while nothing is to be done
_LAST_WORDS = 0.5  # seconds in which answers go out before the process ends
_SAY_LOADING = 0.5  # seconds after which those who wait for a model hear how far it is
_ENDS = ("stop", "length", "cancelled", "failed")
_CLOSING = "the server is shutting down; ask again later"
_STOPPED = "the engine has stopped; start it again"


class BatchEngine:
    """Answers jobs with any of `models`, several at once (`jobs.Engine`), and with those that
    `load` adds.

    source: where the weights of `models` are from; None: they are never put to rest.
    unload_after: seconds without work after which weights and caches are released, to be loaded
        again for the next job; None: never.
    max_batch: sequences of one model decoded together, at most.
    max_queue: jobs that may wait besides; where so many do, no new request is taken.
    cache_bytes: most bytes of prompts' caches kept for later prompts; 0 keeps none.
    prefill_step_size: tokens of a prompt read at a time; other answers wait for that long. By
        default as `generate` reads them.
    memory_limit: most bytes MLX should hold, weights included; by default what is free now.
    kv_bits: bits a value of cache entries, 8 or 4; None leaves them as they are.
    draft: where guesses of the next tokens come from: "none", "ngram" or "auto".
    wiring: whether weights may be wired (`limits.wire`).
    alone: called with one line where another machine that runs a part of the models is gone, after
        all who wait were told. It ends the process.
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
        source: Source | None = None,
        unload_after: float | None = None,
        wiring: bool = True,
        alone: Callable[[str], None] | None = None,
    ) -> None:
        laid = {name: Laid(model.config, model.dtype, tokenizer) for name, model in models.items()}
        first = Holding(laid, source)
        first.models = dict(models)
        self._holdings: tuple[Holding, ...] = (first,)  # never changed, but replaced
        self._loader = Loader()
        self._unload_after = unload_after
        self._awake, self._pressure = Awake(), Pressure()
        self._short = False  # of memory
        self._max_batch = max_batch
        self._cache_bytes = cache_bytes
        self._prefill_step_size = prefill_step(prefill_step_size)
        self._memory_limit, self._wiring, self._alone = memory_limit, wiring, alone
        self._kv_bits, self._draft = kv_bits, draft
        self._budget = 0  # bytes for jobs and kept prompts together
        self._counts = Counts()
        self._loads = self._rests = self._reliefs = 0
        self._kept_bytes = self._kv_bytes = self._active = 0  # as last seen by the thread
        self._room = 0  # bytes that a further checkpoint may take, as last seen
        # What follows is shared between threads; whoever touches it holds `_changed`.
        self._changed = threading.Condition()
        self._waiting = Waiting(self._changed, max_batch, max_queue)
        for name in models:
            self._waiting.add_model(name)
        self._deadline: float | None = None  # set once it is closing
        self._why = _CLOSING
        self._begun: Coming | None = None  # whose weights the loader loads; None: what was at rest
        self._release_next = self._say_next = 0.0
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
        return tuple(self.laid)

    @property
    def holdings(self) -> tuple[Holding, ...]:
        """The checkpoints that it answers with."""
        return self._holdings

    @property
    def rests(self) -> bool:
        """Whether weights that have nothing to do may be released."""
        return self._unload_after is not None

    @property
    def room(self) -> int:
        """Bytes that a further checkpoint may take now, besides all that jobs may need; where
        weights may rest, those of idle ones too."""
        return self._room

    @property
    def laid(self) -> Mapping[str, Laid]:
        """Its models by name, as they are without their weights."""
        return {name: laid for holding in self._holdings for name, laid in holding.laid.items()}

    def _of(self, model: str) -> Holding:
        return next(holding for holding in self._holdings if model in holding.laid)

    def load(self, name: str, opened: Opened, over: Callable[[str | None], None]) -> Coming:
        """Have a further model, called `name`: a view of weights that are held already, where that
        is all it is. Others are answered meanwhile.

        over: called on the engine's thread once jobs for it are taken, or with why none can be.
        Raises ClosedError, and RequestError for a name that is taken.
        """
        if name in self.laid:
            raise RequestError(f"there is a model {name} already")
        laid = Laid(opened.config, opened.storage.dtype, opened.tokenizer)
        coming = Coming(name, laid, Source.of(opened), opened, over)
        with self._changed:
            if self._deadline is not None:
                raise ClosedError(self._why)
            self._loader.coming.append(coming)
            self._changed.notify_all()
        return coming

    def submit(
        self, job: Job, deliver: Callable[[Event], None], *, follows: bool = False
    ) -> Callable[[], None]:
        """See `jobs.Engine`."""
        job = self._checked(job)
        task = Task(job, self.laid[job.model].tokenizer, deliver, self._waiting.forget)
        with self._changed:
            if self._deadline is not None:
                raise ClosedError(self._why)
            self._waiting.add(task, follows)
            self._changed.notify_all()
        return task.cancel

    @property
    def closed(self) -> bool:
        return self._deadline is not None

    def stats(self) -> Stats:
        """What happened so far, what is held now."""
        counts = self._counts
        finished = {how: counts.finished[how] for how in _ENDS}
        finished["cancelled"] += self._waiting.never_started
        return Stats(
            queued=len(self._waiting),
            active=self._active,
            prompt_tokens=counts.prompt_tokens,
            cached_tokens=counts.cached_tokens,
            generated_tokens=counts.generated_tokens,
            finished=finished,
            cache_bytes=self._kept_bytes,
            kv_bytes=self._kv_bytes,
            weights_bytes=sum(holding.nbytes for holding in self._holdings),
            loaded=sum(holding.models is not None for holding in self._holdings),
            at_rest=sum(holding.models is None for holding in self._holdings),
            loads=self._loads,
            rests=self._rests,
            short_of_memory=self._short,
            reliefs=self._reliefs,
        )

    def close(self, grace: float = 0.0) -> None:
        """See `jobs.Engine`. Queued jobs fail at once. Returns when the thread is gone."""
        with self._changed:
            ends = time.monotonic() + grace
            self._deadline = ends if self._deadline is None else min(ends, self._deadline)
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def lose(self, why: str) -> None:
        """Tell all who wait that no answer will come: from any thread, while the engine's own may
        wait for another machine for ever. The process is about to end."""
        with self._changed:
            if self._why == why:  # they were told
                return
            self._deadline, self._why = time.monotonic(), why
        failed = Failed(why, unavailable=True)
        for task in [*self._waiting.of(), *(task for each in self._batches for task in each.tasks)]:
            task.deliver(failed)
        time.sleep(_LAST_WORDS)

    def _checked(self, job: Job) -> Job:
        """The job, as short as `_most` has it. Raises RequestError for one that can never run."""
        check_job(job, self.laid, self._max_batch)
        holding = self._of(job.model)
        if holding.models is None and holding.source is not None:
            return job  # what memory there is shows once it is loaded, and others made room
        job = replace(job, max_tokens=self._most(job))
        if (needed := self._bytes(job)) > self._budget:
            raise RequestError(too_large(job, needed, self._budget))
        return job

    def _most(self, job: Job) -> int:
        """Tokens of its answer: fewer where there is no memory for all, and fewer will do."""
        if not job.fewer or self._bytes(job) <= self._budget:
            return job.max_tokens
        lengths = range(1, job.max_tokens)
        return max(1, bisect_right(lengths, self._budget, key=lambda n: self._bytes(job, n)))

    def _bytes(self, job: Job, most: int | None = None) -> int:
        job = job if most is None else replace(job, max_tokens=most)
        how = self._prefill_step_size, self._kv_bits, self._draft
        return jobs_bytes(self.laid, [job], *how)

    # On the engine's own thread.

    def _run(self) -> None:
        lost = ""
        try:
            with limits(self._memory_limit, wiring=self._wiring):
                self._start()
                self._ready.set()
                while self._turn():
                    pass
        except MachineError as error:
            lost = str(error)
            self.lose(lost)
        except BaseException as error:
            log.exception("the engine stopped")
            if not self._ready.is_set():
                self._failure = error
        finally:
            self._stop()
            mx.clear_streams()  # MLX asks for it: else the process may abort when it exits
            self._ready.set()
            if lost and self._alone is not None:
                self._alone(lost)

    def _start(self) -> None:
        self._weights_changed()
        if self._budget <= 0:
            raise MemoryBudgetError("no memory is left for requests; use a smaller model")
        self._prompts = PromptStore(min(self._cache_bytes, self._budget))
        for holding in self._holdings:
            self._begin_to_answer(holding)
        self._share_memory()

    def _weights_changed(self) -> None:
        """Wire those that are held now, and see what jobs and kept prompts may take beside them."""
        held = [holding.models for holding in self._holdings if holding.models is not None]
        wire(*(next(iter(models.values())) for models in held))  # the others are views of it
        self._measure()

    def _measure(self) -> None:
        """What jobs and kept prompts may take beside the weights."""
        self._budget = int((available_bytes() + self._kv_bytes + self._kept_bytes) * HEADROOM)

    def _begin_to_answer(self, holding: Holding) -> None:
        assert holding.models is not None
        holding.used = time.monotonic()
        holding.batch = Batch(
            holding.models,
            self._prompts,
            self._counts,
            self._left,
            max_rows=self._max_batch,
            prefill_step_size=self._prefill_step_size,
            kv_bits=self._kv_bits,
            draft=self._draft,
            freed=self._share_memory,
        )

    def _turn(self) -> bool:
        """One step of all jobs that run; False when the engine is to stop."""
        running = self._running
        if not running or time.monotonic() >= self._release_next:
            release()  # caches grow and shrink: what they leave adds up to gigabytes
            self._release_next = time.monotonic() + _RELEASE
        with self._changed:
            while not (running or self._has_work or self._deadline is not None):
                if not self._changed.wait(self._idle_for()):
                    break
            closing = self._deadline is not None
            if closing and (not running or time.monotonic() >= (self._deadline or 0.0)):
                return False
        self._relieve()
        if closing:
            self._fail_queued(_CLOSING)
        else:
            self._take_coming()
            self._admit()
        self._step()
        if self._loader.holding is not None and not closing:
            self._load_on(self._loader.holding)
        self._rest_idle()
        self._share_memory()
        self._look()
        if self._running or self._has_work:
            self._awake.hold()
        else:
            self._awake.settle()
        return True

    def _step(self) -> None:
        # On its own: a batch that was still named here could not be released.
        for batch in self._batches:
            if batch.tasks:
                self._guarded(batch, batch.step)

    @property
    def _batches(self) -> list[Batch]:
        return [holding.batch for holding in self._holdings if holding.batch is not None]

    @property
    def _running(self) -> bool:
        return any(batch.tasks for batch in self._batches)

    @property
    def _has_work(self) -> bool:
        return bool(len(self._waiting) or self._loader.coming or self._loader.holding)

    def _predicted(self, new: Task | None = None) -> int:
        """Bytes that all jobs, and `new`, may need at most."""
        total = 0
        for holding in self._holdings:
            if holding.batch is not None:
                own = new if new is not None and new.job.model in holding.laid else None
                total += holding.batch.predicted(own)
        return total

    def _look(self) -> None:
        self._active = sum(batch.rows() for batch in self._batches)
        self._kv_bytes = sum(batch.kv_bytes for batch in self._batches)
        self._kept_bytes = self._prompts.nbytes

    def _share_memory(self) -> None:
        """What jobs don't need is for earlier prompts, or a further checkpoint."""
        free = self._budget - self._loader.reserved - self._predicted()
        self._keep_prompts(free)
        self._room = free + sum(holding.nbytes for holding in self._idle())

    # Weights that come and go.

    def _take_coming(self) -> None:
        """Begin with the next model that is asked for, unless another is being loaded."""
        while self._loader.coming and self._loader.holding is None:
            coming = self._loader.coming.popleft()
            name, source, opened = coming.name, coming.source, coming.opened
            coming.opened = None
            same = [h for h in self._holdings if h.source is not None and h.source.shares(source)]
            try:
                if same:
                    self._waiting.add_model(name)
                    same[0].add(name, coming.laid)
                    coming.holding = same[0]
                    coming.end(None)
                    continue
                self._make_room(name, source)
                coming.holding = Holding({name: coming.laid}, source)
                self._loader.begin(coming.holding, opened)
                self._begun = coming
            except Exception as error:
                self._not_loaded(coming, why_not(error, source, name))

    def _make_room(self, name: str, source: Source) -> None:
        """Where weights may rest, let those rest that have nothing to do, the longest idle first,
        until these fit. Raises MemoryBudgetError where they don't even then."""
        self._measure()
        for holding in sorted(self._idle(), key=lambda holding: holding.used):
            if source.needed <= self._budget - self._predicted():
                return
            self._rest(holding)
        if source.needed > (free := self._budget - self._predicted()):
            raise MemoryBudgetError(too_little(name, source.needed, free))

    def _idle(self) -> list[Holding]:
        """What has nothing to do, and may rest."""
        if self._unload_after is None:
            return []
        idle = [h for h in self._holdings if h.batch is not None and h.source is not None]
        return [h for h in idle if h.batch and not h.batch.tasks and not self._queued(h)]

    def _not_loaded(self, coming: Coming, why: str) -> None:
        write(f"{one_line(coming.name)} can't be loaded: {one_line(why)}")
        coming.end(why)

    def _load_on(self, holding: Holding) -> None:
        """A matrix more of what is being loaded."""
        coming, problem, there = self._begun, None, False
        try:
            there = self._loader.go_on(self._running)
        except Exception as error:
            assert holding.source is not None
            problem = why_not(error, holding.source, holding.name)
        if problem is not None:  # here the error, which has what was loaded, is forgotten
            self._begun = None
            gc.collect()
            release()
            self._measure()
            if coming is not None:
                self._not_loaded(coming, problem)
            else:
                self._give_up(holding, problem)
            return
        if not there:
            if time.monotonic() >= self._say_next:
                self._say_next = time.monotonic() + _SAY_LOADING
                done, total = holding.loading or (0, 0)
                for task in self._queued(holding):
                    task.deliver(Loading(done, total))
            return
        self._loads += 1
        self._begin_to_answer(holding)
        if coming is not None:
            self._begun = None
            self._waiting.add_model(coming.name)
            self._holdings = (*self._holdings, holding)
        self._weights_changed()
        if coming is not None:
            coming.end(None)

    def _wake(self, holding: Holding) -> bool:
        """Begin to load what is at rest. Whether other jobs may start meanwhile: not where it
        waits for the memory of those that run."""
        if self._loader.holding is not None:
            return True
        assert holding.source is not None
        try:
            self._make_room(holding.name, holding.source)
            self._loader.begin(holding)
        except Exception as error:
            if isinstance(error, MemoryBudgetError) and self._running:
                return False
            self._give_up(holding, why_not(error, holding.source, holding.name))
        return True

    def _give_up(self, holding: Holding, why: str) -> None:
        """What is at rest can't be loaded: its jobs fail, later ones try again."""
        message = f"{holding.name} can't be loaded: {one_line(why)}"
        write(message)
        self._fail(self._queued(holding), Failed(message, unavailable=True))

    def _idle_for(self) -> float | None:
        """Seconds until something is to be done though nothing happens; None: for ever."""
        after: list[float] = []
        if self._unload_after is not None:
            loaded = [h for h in self._holdings if h.models is not None and h.source is not None]
            after += [h.used + self._unload_after - time.monotonic() for h in loaded]
        if self._short or self._prompts.nbytes:
            after.append(_LOOK)
        if self._awake.held:
            after.append(LINGER)
        return max(0.0, min(after)) if after else None

    def _relieve(self) -> None:
        """Where the machine runs short of memory, what is kept for later prompts goes first."""
        if (short := self._pressure.look()) == self._short:
            return
        if not short:
            self._short = False
            write("there is memory again: what prompts computed is kept for later ones")
            return
        kept = self._prompts.nbytes + mx.get_cache_memory()
        self._prompts.clear()
        release()
        self._look()
        self._short, self._reliefs = True, self._reliefs + 1
        write(f"memory is short: {human(kept)} kept for later prompts are given up")

    def _keep_prompts(self, nbytes: int) -> None:
        """Keep so much of earlier prompts at most."""
        self._prompts.limit(0 if self._short else nbytes)

    def _rest_idle(self) -> None:
        """Release the weights and caches that had no work for long."""
        now, idle = time.monotonic(), self._idle()
        for holding in self._holdings:
            if holding not in idle:
                holding.used = now
            elif self._unload_after is not None and now - holding.used >= self._unload_after:
                self._rest(holding)

    def _rest(self, holding: Holding) -> None:
        before = mx.get_active_memory()
        models = tuple(holding.laid)
        self._prompts.forget(lambda key: isinstance(key, tuple) and key[1] in models)
        self._look()
        holding.drop()
        gc.collect()
        release()
        self._weights_changed()
        self._rests += 1
        freed = human(max(0, before - mx.get_active_memory()))
        write(f"{holding.name}: at rest, {freed} released; the next request loads it again")

    # Jobs.

    def _queued(self, holding: Holding) -> list[Task]:
        return self._waiting.of(holding.laid)

    def _admit(self) -> None:
        """Start queued jobs in the order they came, as far as places and memory go.

        A model without a free place holds up only its own jobs. A job that waits for memory holds
        up all that came after it: else small ones could keep it waiting for ever.
        """
        for task in self._waiting.oldest_first():
            holding = self._of(task.job.model)
            batch = holding.batch
            if batch is None:
                if not self._wake(holding):
                    return
                continue
            if batch.places(task.job.model) < task.job.n:
                continue
            if (most := self._most(task.job)) < task.job.max_tokens:
                task.shorten(most)
            needed, budget = self._predicted(task), self._budget - self._loader.reserved
            if needed > budget:
                if not self._running and self._loader.holding is None:  # nothing will be freed
                    self._fail([task], Failed(too_large(task.job, needed, budget), True))
                    continue
                return
            with self._changed:
                if not self._waiting.take(task):  # cancelled meanwhile
                    continue
            holding.used = time.monotonic()  # the job may be over within this turn
            room = 0 if self._short else budget - needed
            self._guarded(batch, partial(batch.start, task, room))

    def _guarded(self, batch: Batch, do: Callable[[], None]) -> None:
        """`do` something with the batch. It handles its jobs' errors itself; one that gets past it
        ends all jobs."""
        try:
            do()
        except MachineError:
            raise
        except Exception as error:
            log.exception("a batch failed")
            batch.fail_all(said(error))

    def _left(self, task: Task) -> None:
        """A started job is over; its places are free."""
        self._active = sum(batch.rows() for batch in self._batches)
        with self._changed:
            self._waiting.free(task)

    def _fail_queued(self, message: str) -> None:
        self._fail(self._waiting.of(), Failed(message))

    def _fail(self, tasks: list[Task], failed: Failed) -> None:
        """End jobs that are queued, but those that were cancelled meanwhile."""
        for task in self._waiting.give_up(tasks):
            self._counts.finished["failed"] += 1
            task.deliver(failed)

    def _stop(self) -> None:
        with self._changed:
            if self._deadline is None:  # an error ended the thread
                self._deadline, self._why = time.monotonic(), _STOPPED
        self._fail_queued(self._why)
        for coming in [*filter(None, [self._begun]), *self._loader.coming]:
            coming.end(self._why)
        if self._failure is None and hasattr(self, "_prompts"):
            for batch in self._batches:
                batch.fail_all(self._why)
            self._prompts.clear()
            self._look()
            if self._loader.holding is not None:
                self._loader.holding.drop()
        mx.clear_cache()
        self._awake.release()
