"""One model's jobs: prompts being read, and answers written a token at a time, together.

All of it runs on the engine's thread. Prompts are read here, a chunk at a time, each in caches of
its own. So a chunk is computed exactly as for a request alone, a short prompt need not wait for a
long one, and the caches to be kept for later prompts are at hand. mlx-lm's
`BatchGenerator` then takes the caches and the prompt's last token, and decodes.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx

from mlx_cerebrum import device
from mlx_cerebrum.decoding.decode import greedy
from mlx_cerebrum.files.open_files import limit_kept
from mlx_cerebrum.model.cache import STEP
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.memory import forward_bytes
from mlx_cerebrum.server.jobs import Failed, Job, Piece, Reading, TokenLogprob
from mlx_cerebrum.server.prefix_cache import Caches, PrefixCache, make_caches
from mlx_cerebrum.server.task import Counts, Task, said

with limit_kept():
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.models.cache import BatchRotatingKVCache

log = logging.getLogger(__name__)


# Caches, and the tokens they were fed, from the last of the prompt on.
_Kept = tuple[Caches, Sequence[int]]


@dataclass
class _Prompt:
    """A prompt being read: its caches hold the first `done` tokens."""

    task: Task
    caches: Caches
    done: int

    @property
    def left(self) -> int:
        """Tokens to read; the last one is decoded."""
        return len(self.task.job.prompt) - 1 - self.done


class Batch:
    """Call `start` with each task, then `step` until none is left. It calls `ended` with each that
    is over."""

    def __init__(
        self,
        model: Model,
        prefixes: PrefixCache,
        counts: Counts,
        ended: Callable[[Task], None],
        *,
        max_rows: int,
        prefill_step_size: int,
    ) -> None:
        self.model = model
        self.tasks: list[Task] = []  # started and not over
        self._prefixes = prefixes
        self._counts = counts
        self._ended = ended
        self._max_rows = max_rows
        self._prefill_step_size = prefill_step_size
        self._item_bytes = model.dtype.size
        self._prompts: list[_Prompt] = []  # in the order they came
        self._rows: dict[int, tuple[Task, int]] = {}  # uid in the generator -> task, choice
        self._oldest_next = True
        self._generator = self._new_generator()

    def _new_generator(self) -> Any:
        generator = BatchGenerator(
            BatchModel(self.model),
            sampler=greedy,
            completion_batch_size=self._max_rows,
            prefill_batch_size=self._max_rows,
            stream=device.stream(),  # this thread's, as all else here
        )
        generator.close()  # gives back the wired limit it sets: the engine's own stays
        return generator

    @property
    def rows(self) -> int:
        """Sequences: being decoded, or waiting for their prompt to be read."""
        return sum(task.job.n - len(task.reasons) for task in self.tasks)

    @property
    def places(self) -> int:
        """Sequences that could still be started."""
        return self._max_rows - self.rows

    @property
    def kv_bytes(self) -> int:
        """Bytes of all caches now."""
        prompts = sum(int(c.nbytes) for prompt in self._prompts for c in prompt.caches)
        return prompts + int(self._generator.prompt_cache_nbytes)

    def predicted(self, new: Task | None = None) -> tuple[int, int]:
        """Bytes that all jobs, and `new`, may need at most: `(their caches, a forward pass)`."""
        more = [] if new is None else [new.job]
        sizes = (
            self.model.config,
            self._item_bytes,
            self._prefill_step_size,
            [task.job for task in self.tasks] + more,
            [prompt.task.job for prompt in self._prompts] + more,
        )
        return cache_bytes(*sizes), pass_bytes(*sizes)

    def start(self, task: Task) -> None:
        """Take a task. Its prompt is read from where the longest prefix that is cached ends."""
        key, total = (task.job.owner, task.job.model), len(task.job.prompt)
        self.tasks.append(task)
        try:
            caches, done = self._prefixes.find(key, task.job.prompt)
        except Exception as error:  # no memory for a copy
            self._fail(task, error)
            return
        if caches is None:
            caches = make_caches(self.model.config)
        task.cached_tokens = done
        self._counts.prompt_tokens += total
        self._counts.cached_tokens += done
        self._prompts.append(_Prompt(task, caches, done))
        task.deliver(Reading(done, total))

    def step(self) -> None:
        """A token for every sequence, then one chunk of one prompt."""
        self._drop_cancelled()
        self._join()
        if self._rows:
            try:
                _, responses = self._generator.next()
                self._hand_out(responses)
            except Exception as error:
                self._fail_rows(error)
        if prompt := self._next_prompt():
            try:
                self._read(prompt)
            except Exception as error:
                self._fail(prompt.task, error)

    def fail_all(self, message: str) -> None:
        """End every job."""
        for task in list(self.tasks):
            self._end(task, "failed")
            task.deliver(Failed(message))
        self._generator = self._new_generator()

    def _next_prompt(self) -> _Prompt | None:
        """The prompt to read a chunk of: by turns the oldest, and the one with the least left."""
        reading = [prompt for prompt in self._prompts if prompt.left]
        if not reading:
            return None
        self._oldest_next = not self._oldest_next or len(reading) == 1
        return reading[0] if self._oldest_next else min(reading, key=lambda p: p.left)

    def _read(self, prompt: _Prompt) -> None:
        ids, start = prompt.task.job.prompt, prompt.done
        end = min(start + self._prefill_step_size, len(ids) - 1)
        self.model(mx.array(ids[start:end], dtype=mx.int32)[None], prompt.caches)
        if start == 0:  # they hold views, which keep alive all that the projections wrote
            for c in prompt.caches:
                c.keys, c.values = mx.contiguous(c.keys), mx.contiguous(c.values)
        mx.eval([c.state for c in prompt.caches])
        mx.clear_cache()
        prompt.done = end
        prompt.task.deliver(Reading(end, len(ids)))
        window = self.model.config.sliding_window
        if not prompt.left and window is not None:
            job = prompt.task.job
            if len(ids) + job.max_tokens > window:  # what is kept at the end can't go back to here
                self._store(prompt.task, ids[:-1], prompt.caches)

    def _join(self) -> None:
        """Put prompts that have been read into the batch, once for each choice."""
        for prompt in [p for p in self._prompts if not p.left]:
            self._prompts.remove(prompt)
            task, n = prompt.task, prompt.task.job.n
            try:
                uids = self._generator.insert(
                    [[task.job.prompt[-1]]] * n,
                    max_tokens=[task.job.max_tokens] * n,
                    caches=[prompt.caches] * n,  # copied when they are merged
                    samplers=[task.sampler(choice) for choice in range(n)],
                )
            except Exception as error:
                self._fail(task, error)
                continue
            self._rows |= {uid: (task, choice) for choice, uid in enumerate(uids)}

    def _hand_out(self, responses: Sequence[Any]) -> None:
        responses = [response for response in responses if response.uid in self._rows]
        logprobs = token_logprobs(
            [(r.token, r.logprobs, self._rows[r.uid][0].job.top_logprobs) for r in responses]
        )
        over: dict[int, tuple[Task, int]] = {}
        kept: dict[int, _Kept] = {}  # of those that left the batch by themselves
        for response, logprob in zip(responses, logprobs, strict=True):
            task, choice = self._rows.get(response.uid, (None, 0))
            if task is None or task.cancelled:
                continue
            try:
                text, reason = task.texts[choice].add(response.token)
            except Exception as error:
                self._fail(task, error)
                continue
            self._counts.generated_tokens += 1
            if reason is not None:
                over[response.uid] = self._rows.pop(response.uid)
                if response.prompt_cache is not None:
                    kept[response.uid] = response.prompt_cache, response.all_tokens
                task.reasons.append(reason)
                if task.finish_reason is not None:
                    self._end(task, task.finish_reason)
            if task.texts[choice].is_end(response.token) or (reason == "stop" and not text):
                logprob = None  # it ends the answer unseen
            task.deliver(Piece(choice, response.token, text, reason, task.cached_tokens, logprob))
        self._leave(over, kept)

    def _leave(self, over: dict[int, tuple[Task, int]], kept: dict[int, _Kept]) -> None:
        """Take sequences out of the batch, keeping what they computed for later prompts.

        Only choice 0's is kept: a conversation goes on from one choice, and most have only one.
        """
        firsts = [uid for uid, (_, choice) in over.items() if choice == 0]
        wanted = [uid for uid in firsts if uid not in kept and self._prefixes.max_bytes]
        if wanted:
            kept = kept | self._generator.remove(wanted, return_prompt_caches=True)
        if others := [uid for uid in over if uid not in wanted]:
            self._generator.remove(others)
        self._generator.model.narrow |= bool(over)
        for uid in firsts:
            if uid in kept:
                # Not the tokens that were handed out: a cancelled task has not got its last one.
                (caches, seen), task = kept[uid], over[uid][0]
                self._store(task, [*task.job.prompt[:-1], *seen], caches)

    def _store(self, task: Task, seen: Sequence[int], caches: Caches) -> None:
        try:
            self._prefixes.store((task.job.owner, task.job.model), seen, caches)
        except Exception:  # no memory: a later prompt takes longer, nothing else
            log.exception("nothing could be kept for later prompts")
            self._prefixes.clear()
            mx.clear_cache()

    def _drop_cancelled(self) -> None:
        for task in [task for task in self.tasks if task.cancelled]:
            rows = {uid: row for uid, row in self._rows.items() if row[0] is task}
            self._end(task, "cancelled")
            self._leave(rows, {})

    def _end(self, task: Task, how: str) -> None:
        """Count a task as over and free its places. Comes before its last event, so that whoever
        gets that event finds it counted."""
        self.tasks.remove(task)
        self._prompts = [prompt for prompt in self._prompts if prompt.task is not task]
        self._rows = {uid: row for uid, row in self._rows.items() if row[0] is not task}
        self._counts.finished[how] += 1
        self._ended(task)

    def _fail(self, task: Task, error: Exception) -> None:
        """End this job and take it out of the batch, which goes on."""
        log.error("a job failed", exc_info=error)
        uids = [uid for uid, row in self._rows.items() if row[0] is task]
        self._end(task, "failed")
        task.deliver(Failed(said(error)))
        if uids:
            self._generator.remove(uids)
            self._generator.model.narrow = True
        mx.clear_cache()

    def _fail_rows(self, error: Exception) -> None:
        """End all that was being decoded: the state of the batch is not known."""
        log.error("a batch failed", exc_info=error)
        for task in {id(row[0]): row[0] for row in self._rows.values()}.values():
            self._end(task, "failed")
            task.deliver(Failed(said(error)))
        self._rows = {}
        self._generator = self._new_generator()
        mx.clear_cache()


class BatchModel:
    """A model as mlx-lm's `BatchGenerator` calls it: float32 logits `[B, 1, V]`.

    The caches of all positions share one array of offsets. Set `narrow` when sequences have left a
    batch: the next step then makes its buffers as short as the sequences that stay allow.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self.narrow = False

    def __call__(self, tokens: mx.array, cache: Sequence[Any]) -> mx.array:
        if self.narrow:
            self.narrow = False
            close_up(cache)
        for other in cache[1:]:
            other.offset = cache[0].offset  # equal, and now the same array: see Rotary
        # In 16 bits, subtracting the log-sum would make ties of tokens that differ.
        return self._model(tokens, cache).astype(mx.float32)


def close_up(caches: Sequence[Any]) -> None:
    """Drop the padding that all rows begin with: it was there for a longer row, which has left.

    mlx-lm's caches without a window do so themselves. Those with a window would keep the length of
    the longest row there ever was: a batch that is never empty would come to hold the whole window
    for every row.
    """
    if not isinstance(caches[0], BatchRotatingKVCache):
        return
    padding = min(caches[0].left_padding.tolist())  # the same in all positions
    if padding <= 0:
        return
    for c in caches:
        keys, values, offset, left_padding, window, _, end, rotated = c.state
        if rotated:  # into the order of time
            keys, values = (mx.roll(kv, -end, 2) for kv in (keys, values))
            end = window
        keys, values = keys[..., padding:end, :], values[..., padding:end, :]
        length = end - padding
        c.state = keys, values, offset, left_padding - padding, window, length, length, False


def token_logprobs(
    rows: Sequence[tuple[int, mx.array, int | None]],
) -> list[TokenLogprob | None]:
    """For each `(token, log-probabilities [V], alternatives)`; None where alternatives are None.

    One round trip to the device for all of them, and none where nobody asks.
    """
    wanted: list[tuple[mx.array, ...]] = []
    for token, row, k in rows:
        if k is None:
            wanted.append(())
            continue
        arrays: tuple[mx.array, ...] = (row[token],)
        if k:
            likeliest = mx.argpartition(-row, kth=min(k, row.size) - 1)[:k]
            arrays += (likeliest, row[likeliest])
        wanted.append(arrays)
    if any(wanted):
        mx.eval(wanted)
    return [
        _read(token, arrays) if arrays else None
        for (token, _, _), arrays in zip(rows, wanted, strict=True)
    ]


def _read(token: int, arrays: tuple[mx.array, ...]) -> TokenLogprob:
    chosen, *top = [cast(list[float], array.tolist()) for array in arrays]
    pairs = [(int(other), logprob) for other, logprob in zip(*top, strict=True)]
    pairs.sort(key=lambda pair: (-pair[1], pair[0]))
    return TokenLogprob(token, cast(float, chosen), tuple(pairs))


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
    longest = max((_decoded_entries(config.sliding_window, job) for job in jobs), default=0)
    batch = sum(job.n for job in jobs) * longest * entry
    prompts = [_read_entries(config.sliding_window, job, prefill_step) * entry for job in reading]
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
    longest = max((_decoded_entries(config.sliding_window, job) for job in jobs), default=0)
    # In float32 logits, log-probabilities of this step and the last, and what sampling makes.
    needs = [forward_bytes(config, rows, longest, item_bytes) + 6 * rows * config.vocab_size * 4]
    for job in reading:
        length, keys = (
            min(prefill_step, len(job.prompt)),
            _read_entries(config.sliding_window, job, prefill_step),
        )
        needs.append(forward_bytes(config, length, keys, item_bytes))
    return max(needs)


def _decoded_entries(window: int | None, job: Job) -> int:
    """Entries of a position's buffer for one row; it grows by STEP."""
    total = len(job.prompt) + job.max_tokens + STEP
    return total if window is None else min(total, window)


def _read_entries(window: int | None, job: Job, prefill_step: int) -> int:
    """Entries while the prompt is read: the window before a chunk, and the chunk."""
    total = len(job.prompt) + STEP
    return total if window is None else min(total, window - 1 + prefill_step)
