"""The jobs that run: from a task to sequences of the decoder, and from their tokens to events.

All of it runs on the engine's thread.
"""

import logging
from collections.abc import Callable, Mapping

import mlx.core as mx

from mlx_cerebrum.decoding.decoder import Advance, Decoder
from mlx_cerebrum.decoding.draft_models import stored_order
from mlx_cerebrum.decoding.generation import Generation
from mlx_cerebrum.decoding.prompt_cache import PromptCache
from mlx_cerebrum.decoding.prompt_store import PromptStore
from mlx_cerebrum.decoding.speculative import Speculation, speculation
from mlx_cerebrum.errors import MachineError, RequestError
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.server.job_bytes import jobs_bytes
from mlx_cerebrum.server.jobs import NO_TOKEN, Failed, Job, Piece, Reading
from mlx_cerebrum.server.task import Counts, Task, said

log = logging.getLogger(__name__)


class Batch:
    """Call `start` with each task, then `step` until none is left. It calls `ended` with each that
    is over, and `freed` before what one computed is kept in `prompts`: then its memory is free.

    max_rows: sequences of one model at once, at most.
    draft: where guesses come from: "none", "ngram", or "auto": a shorter order of the blocks too.
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        prompts: PromptStore,
        counts: Counts,
        ended: Callable[[Task], None],
        *,
        max_rows: int,
        prefill_step_size: int,
        kv_bits: int | None = None,
        draft: str = "none",
        freed: Callable[[], None] = lambda: None,
    ) -> None:
        self.tasks: list[Task] = []  # started and not over
        self._models = dict(models)
        self._prompts = prompts
        self._counts = counts
        self._ended, self._freed = ended, freed
        self._max_rows = max_rows
        self._prefill_step_size = prefill_step_size
        self._kv_bits = kv_bits
        self._draft = draft
        self._shorter: dict[str, Model | None] = {}
        for name, model in models.items():
            self.add(name, model)
        self._decoder = Decoder(prefill_step_size)
        self._rows: dict[Generation, tuple[Task, int, PromptCache]] = {}  # task, choice, caches

    def add(self, name: str, model: Model) -> None:
        """Take a further view of the same weights."""
        self._models[name] = model
        self._shorter[name] = stored_order(model) if self._draft == "auto" else None

    def rows(self, model: str | None = None) -> int:
        """Sequences being written, or waiting for their prompt to be read."""
        tasks = [task for task in self.tasks if model in (None, task.job.model)]
        return sum(task.job.n - len(task.reasons) for task in tasks)

    def places(self, model: str) -> int:
        """Sequences of a model that could still be started."""
        return self._max_rows - self.rows(model)

    @property
    def kv_bytes(self) -> int:
        """Bytes of all caches now."""
        return self._decoder.nbytes

    def predicted(self, new: Task | None = None) -> int:
        """Bytes that all jobs, and `new`, may need at most."""
        jobs = [task.job for task in self.tasks] + ([] if new is None else [new.job])
        how = self._prefill_step_size, self._kv_bits, self._draft
        return jobs_bytes(self._models, jobs, *how) + sum(task.mark_bytes for task in self.tasks)

    def start(self, task: Task, room: int | None = None) -> None:
        """Take a task. Its prompt is read from where the longest prefix that is cached ends, or
        from its beginning if its tokens are scored: that is done as they are read.

        room: bytes that earlier prompts may take beside it; None leaves that as it is.
        """
        self.tasks.append(task)
        try:
            self._start(task, room)
        except Exception as error:  # no memory for a copy
            self._fail(task, error)

    def _start(self, task: Task, room: int | None) -> None:
        job, total = task.job, len(task.job.prompt)
        prefix = job.prompt if job.scored is None else ()
        cache = self._prompts.find((job.owner, job.model), prefix, room)
        if cache is None:
            cache = PromptCache(self._models[job.model], self._kv_bits, self._prompts.max_bytes)
        # Places to go back to past the window are kept where there is memory for them too.
        cache.allow_marks(self._prompts.room)
        task.mark_bytes = cache.marks_bytes(total + job.max_tokens)
        task.cached_tokens = total - len(cache.begin(job.prompt))
        self._counts.prompt_tokens += total
        self._counts.cached_tokens += task.cached_tokens
        task.deliver(Reading(task.cached_tokens, total))
        first = self._add(task, 0, cache)
        if first.read == total - 1:
            self._has_read(first)

    def _add(self, task: Task, choice: int, cache: PromptCache) -> Generation:
        job, model = task.job, self._models[task.job.model]
        sampling = task.sampling(choice)
        generation = Generation(
            model,
            list(job.prompt),
            cache.cache,
            job.max_tokens,
            sampling.sampler(),
            self._speculation(job),
            adjust=sampling.adjust(job.prompt, task.end_ids),
            top_logprobs=job.top_logprobs,
            scored=job.scored,
            constraint=None if job.grammar is None else job.grammar.start(),
            asked=task.asked,
        )
        self._rows[generation] = task, choice, cache
        self._decoder.add(generation)
        return generation

    def _has_read(self, first: Generation) -> None:
        """The other choices go on from what the first has read; where none is to generate
        anything, the job is over."""
        task, _, cache = self._rows[first]
        task.scores = first.prompt_logprobs
        if task.job.max_tokens:
            for choice in range(1, task.job.n):
                own = cache.copy()
                own.allow_marks(0)  # it is not kept
                self._add(task, choice, own)
            return
        task.reasons = ["length"] * task.job.n
        self._end(task, "length")
        for choice in range(task.job.n):
            cached, scores = task.cached_tokens, task.scores
            task.deliver(Piece(choice, NO_TOKEN, "", "length", cached, scores=scores))

    def _speculation(self, job: Job) -> Speculation | None:
        if self._draft == "none":
            return None
        shorter = self._shorter[job.model]
        return speculation(self._models[job.model], [] if shorter is None else [shorter])

    def step(self) -> None:
        """A token or more for every sequence, and a chunk of one prompt."""
        for task in [task for task in self.tasks if task.cancelled]:
            self._end(task, "cancelled")
        try:
            advances = self._decoder.step()
        except MachineError as error:  # nothing here can go on
            self.fail_all(str(error), unavailable=True)
            raise
        except Exception as error:
            self._step_failed(error)
            return
        for advance in advances:
            if advance.generation in self._rows:  # its task may have failed meanwhile
                task = self._rows[advance.generation][0]
                try:
                    self._advance(advance)
                except Exception as error:
                    self._fail(task, error)

    def fail_all(self, message: str, unavailable: bool = False) -> None:
        """End every job. unavailable: whether the model can't be had any more."""
        for task in list(self.tasks):
            self._end(task, "failed", keep=False)
            task.deliver(Failed(message, unavailable=unavailable))
        self._decoder, self._rows = Decoder(self._prefill_step_size), {}

    def _advance(self, advance: Advance) -> None:
        generation = advance.generation
        task, choice, _ = self._rows[generation]
        if generation.failure is not None:
            raise generation.failure
        if not advance.tokens:
            task.deliver(Reading(generation.read, len(task.job.prompt)))
            if generation.read == generation.prompt - 1:
                self._has_read(generation)
        begin = generation.chosen - len(advance.tokens)
        for number, token in enumerate(advance.tokens, start=1):
            if task.cancelled:
                break
            # A model without end tokens stops where what its answer is held to is complete.
            held = generation.held_to()
            complete = number == len(advance.tokens) and held is not None and held.over
            text, reason = task.texts[choice].add(token, complete)
            self._counts.generated_tokens += 1
            logprob = advance.logprobs[number - 1] if advance.logprobs else None
            if task.texts[choice].is_end(token):
                # lm-evaluation-harness takes the last one listed for the one generated token's.
                unseen = not task.job.echo
            else:
                unseen = reason == "stop" and not text
            piece = Piece(
                choice,
                token,
                text,
                reason,
                task.cached_tokens,
                None if unseen else logprob,
                task.scores if begin + number == 1 else (),
            )
            if reason is None:
                task.deliver(piece)
                continue
            del generation.tokens[generation.prompt + begin + number :]
            task.reasons.append(reason)
            if task.finish_reason is not None:
                self._end(task, task.finish_reason)
            else:
                self._leave(generation)
            task.deliver(piece)
            break

    def _leave(self, generation: Generation, keep: bool = True) -> None:
        """Take a sequence out, keeping what it computed for later prompts.

        Only choice 0's is kept: a conversation goes on from one choice, and most have only one.
        """
        task, choice, cache = self._rows.pop(generation)
        keep = keep and choice == 0 and self._prompts.max_bytes > 0
        try:
            self._decoder.leave(generation, keep)
            if keep:
                self._freed()
                cache.end(generation.tokens)
                self._prompts.keep((task.job.owner, task.job.model), cache)
        except Exception:  # no memory: a later prompt takes longer, nothing else
            log.exception("nothing could be kept for later prompts")
            self._prompts.clear()
            mx.clear_cache()

    def _end(self, task: Task, how: str, keep: bool = True) -> None:
        """Count a task as over and free its places. Comes before its last event, so that whoever
        gets that event finds it counted."""
        self.tasks.remove(task)
        for generation in [g for g, row in self._rows.items() if row[0] is task]:
            self._leave(generation, keep)
        self._counts.finished[how] += 1
        self._ended(task)

    def _fail(self, task: Task, error: Exception) -> None:
        """End this job; the others go on."""
        asked = isinstance(error, RequestError)
        if not asked:  # the client is told; it may quote what was asked
            log.error("a job failed", exc_info=error)
        if task in self.tasks:
            self._end(task, "failed", keep=False)
        task.deliver(Failed(said(error), asked))
        mx.clear_cache()

    def _step_failed(self, error: Exception) -> None:
        """A prompt that was being read is given up, and the others go on; if there was none, all
        are: what the decoder holds is not known."""
        reading = self._decoder.recover()
        mx.clear_cache()
        if reading in self._rows:
            self._fail(self._rows[reading][0], error)
            return
        log.error("a step failed", exc_info=error)
        self.fail_all(said(error))
