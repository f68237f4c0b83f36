"""Random company for the decoder: sequences that come, guess, are cancelled and end."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from tiny import tiny_config, tiny_weights

from mlx_cerebrum.decoding.decoder import Decoder
from mlx_cerebrum.decoding.drafters import Drafter, ModelDrafter, NGramDrafter
from mlx_cerebrum.decoding.generation import Generation
from mlx_cerebrum.decoding.logprobs import Logprobs, TokenLogprob
from mlx_cerebrum.decoding.policy import Policy
from mlx_cerebrum.decoding.sampling import Sampling
from mlx_cerebrum.decoding.speculative import Speculation
from mlx_cerebrum.model.cache import WindowedKVCache
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model, TransformerBlock

Map = tuple[int, ...]
Fault = Callable[["Company"], AbstractContextManager[None]]
TOLERANCE = 1e-4  # on a logit: rows computed together round otherwise than alone
VOCABULARY = 12  # so few that the same pairs come again, and what follows them is guessed


def tiny_views(
    window: int | None, maps: Sequence[Map], seed: int = 3, **changes: Any
) -> list[Model]:
    """Views over the same blocks: each map by itself, and the longest also with scales."""
    blocks = 1 + max(block for one in maps for block in one)
    sizes = {"num_hidden_layers": blocks, "sliding_window": window, "vocab_size": VOCABULARY}
    raw = tiny_config(**(sizes | changes))
    model = Model(ModelConfig.from_dict(raw))
    # Blocks that write more than the stream began with: the answer depends on all that came before.
    weights = tiny_weights(raw, seed, write=0.05 / blocks)
    model.update(tree_unflatten([(k, mx.array(v)) for k, v in weights.items()]))
    longest = max(maps, key=len)
    scales = tuple((1.0, 0.9) if i % 2 else (0.7, 1.2) for i in range(len(longest)))
    return [*(model.view(one) for one in maps), model.view(longest, scales)]


class Eager(Policy):
    """Guesses whenever it can, as much as it likes: what is measured must not decide a test."""

    def __init__(self, names: Sequence[str], draw: random.Random) -> None:
        super().__init__(dict.fromkeys(names, 0.0))
        self.draw = draw

    def choose(self, offers: Any, row: float | None = None) -> tuple[str, int] | None:
        if not offers or self.draw.random() < 0.1:
            return None
        name = self.draw.choice(sorted(offers))
        return name, self.draw.randint(1, min(self.most, offers[name][1]))


class Counted(NGramDrafter):
    """N-grams, also of one token, that are counted."""

    made = 0

    def guesses(self, tokens: Sequence[int], count: int) -> list[int]:
        Counted.made += count
        return super().guesses(tokens, count)


@dataclass
class Job:
    """A sequence, and how it came to be."""

    generation: Generation
    prompt: list[int]
    sampling: Sampling
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of the answer, as reported

    def chosen(self, logits: mx.array) -> list[int]:
        """What follows the prompt and each token of the answer, given their logits."""
        tokens, first = self.generation.tokens, len(self.prompt) - 1
        logits, adjust = logits[first:], self.sampling.adjust(self.prompt, [5])
        if adjust is not None:
            logits = adjust(logits, tokens[:first], mx.array(tokens[first:]), 0)
        return cast(list[int], self.sampling.sampler()(logits, 0).tolist())


class Company:
    """A decoder with sequences in it, each of which is checked as it leaves."""

    def __init__(
        self,
        draw: random.Random,
        views: Sequence[Model],
        rewind: int,
        step: int,
        prefill_step: int,
    ) -> None:
        self.draw, self.views, self.rewind, self.step_size = draw, views, rewind, step
        self.decoder = Decoder(prefill_step)
        self.jobs: list[Job] = []
        self.left = 0  # sequences that were checked
        self.most = 0  # answers in one step
        self.held = 0  # guesses
        self.failed = 0  # steps
        self.faults: Sequence[Fault] = FAULTS

    def add(
        self, model: Model | None = None, length: int | None = None, most: int | None = None
    ) -> Job:
        """A sequence of its own kind; its prompt repeats itself, so that there is what to guess."""
        job = self.made(model, length, most)
        if self.draw.random() < 0.2:
            job.generation.top_logprobs = job.generation.scored = 2
        self.jobs.append(job)
        self.decoder.add(job.generation)
        return job

    def made(
        self, model: Model | None = None, length: int | None = None, most: int | None = None
    ) -> Job:
        draw = self.draw
        model = model or draw.choice(self.views)
        pattern = [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, 7))]
        prompt = (pattern * 100)[: length or draw.choice([1, 2, draw.randint(1, 25)])]
        sampling = Sampling()
        if draw.random() < 0.4:
            sampling = Sampling(0.6, top_p=0.9, seed=draw.randrange(2**32))
        if draw.random() < 0.3:
            sampling = replace(
                sampling, repetition_penalty=1.1, frequency_penalty=0.1, min_tokens=9
            )
        positions = model.config.layer_map
        generation = Generation(
            model,
            list(prompt),
            self.caches(model),
            most or draw.randint(1, 24),
            sampling.sampler(),
            adjust=sampling.adjust(prompt, [5]),
        )
        if draw.random() < 0.3:
            for c in generation.caches:
                c.mark(len(prompt) // 2)
                c.mark(len(prompt) - 1)
        job = Job(generation, prompt, sampling)
        if draw.random() < 0.7:
            drafters: list[Drafter] = [Counted(shortest=1)]
            shorter = self.views[0]
            fits = {*shorter.config.layer_map} <= {*positions}
            drafts = fits and model.elsewhere is None  # several machines have no models that draft
            if drafts and shorter is not model and draw.random() < 0.5:
                drafters.append(ModelDrafter(shorter, model, "model"))
            named = {d.name: d for d in drafters}
            policy = Eager(list(named), draw)
            policy.most = self.rewind - 1
            generation.speculation = Speculation(named, policy)
        return job

    def caches(self, model: Model) -> list[WindowedKVCache]:
        """Empty ones for a sequence."""
        window, positions = model.config.sliding_window, model.config.layer_map
        return [WindowedKVCache(window, self.rewind, self.step_size) for _ in positions]

    def alone(self, model: Model, tokens: list[int]) -> mx.array:
        """What the model says of each of the tokens, read at once: logits `[L, V]`."""
        return model(mx.array([tokens]))[0]

    def step(self, fault: Fault | None = None) -> None:
        """One step, at the `fault`'s place in vain: then all must be as if it had not begun."""
        try:
            with fault(self) if fault else nullcontext():
                advances = self.decoder.step()
        except FaultError:
            self.failed += 1
            if (dropped := self.decoder.recover()) is not None:
                self.left_with(next(job for job in self.jobs if job.generation is dropped))
            return
        self.most = max(self.most, sum(bool(new) for _, new, _ in advances))
        for generation, new, logprobs in advances:
            job = next(job for job in self.jobs if job.generation is generation)
            job.logprobs += logprobs
            assert generation.left >= 0
            self.held += max(0, len(new) - 1)
        for job in [job for job in self.jobs if job.generation.left <= 0]:
            self.leave(job)

    def leave(self, job: Job) -> None:
        keep = self.draw.random() < 0.8
        self.decoder.leave(job.generation, keep)
        if not keep:  # then a check of the caches has nothing to go on from
            for c in job.generation.caches:
                c.rewind_to(0)
        self.left_with(job)

    def left_with(self, job: Job) -> None:
        self.jobs.remove(job)
        self.check(job)
        self.left += 1

    def check(self, job: Job) -> None:
        """Its answer is what it is alone and unguessed, and its caches hold the beginning of it."""
        generation = job.generation
        tokens, caches = generation.tokens, generation.caches
        assert tokens[: len(job.prompt)] == job.prompt
        logits = self.alone(generation.model, tokens)
        assert tokens[len(job.prompt) :] == job.chosen(logits)[:-1]
        if generation.scored is not None:
            self.check_logprobs(job, np.array(nn.log_softmax(logits, axis=-1)))
        offset = caches[0].offset
        assert [c.offset for c in caches] == [offset] * len(caches)
        assert offset < len(tokens)
        for point in (offset, *(p for p in reversed(caches[0].marks) if p <= offset)):
            for c in caches:
                c.rewind_to(point)
            more = generation.model(mx.array([[tokens[point]]]), caches)[0, 0]
            np.testing.assert_allclose(np.array(more), np.array(logits[point]), atol=TOLERANCE)

    def check_logprobs(self, job: Job, logprobs: np.ndarray[Any, Any]) -> None:
        """Of every token of the answer, and of the prompt as far as it was read."""
        generation, read = job.generation, len(job.prompt)
        of_prompt = generation.prompt_logprobs
        assert generation.chosen == 0 or len(of_prompt) == read - 1
        assert len(job.logprobs) == generation.chosen
        for first, reported in ((1, of_prompt), (read, job.logprobs)):
            for i, one in enumerate(reported, first):
                row = logprobs[i - 1]
                assert one.token == generation.tokens[i]
                told = [one.logprob, *(value for _, value in one.top)]
                wanted = [row[one.token], *sorted(row)[:-3:-1]]
                np.testing.assert_allclose(told, wanted, atol=TOLERANCE)

    def finish(self) -> None:
        while self.jobs:
            self.step()

    def run(self, sequences: int) -> None:
        """So many sequences, that come at any time; some are cancelled, all others end."""
        came = 0
        while came < sequences or self.jobs:
            if came < sequences and len(self.jobs) < 6 and self.draw.random() < 0.5:
                self.add()
                came += 1
            if self.jobs and self.draw.random() < 0.03:
                self.leave(self.draw.choice(self.jobs))
            self.step(self.draw.choice(self.faults) if self.draw.random() < 0.03 else None)


# Faults in a step.


class FaultError(Exception):
    """What a fault raises."""


@contextmanager
def in_a_sampler(company: Company) -> Iterator[None]:
    """Of one sequence, when its logits are there."""

    def sampler(logits: mx.array, number: int) -> mx.array:
        raise FaultError

    if not company.jobs:
        yield
        return
    generation = company.draw.choice(company.jobs).generation
    own, generation.sampler = generation.sampler, sampler
    try:
        yield
    finally:
        generation.sampler = own


@contextmanager
def in_a_block(company: Company) -> Iterator[None]:
    """So that some positions have taken their tokens, and the others have not."""
    original, calls = TransformerBlock.__call__, count()
    at = company.draw.randrange(6)

    def block(self: TransformerBlock, *args: Any) -> mx.array:
        if next(calls) == at:
            raise FaultError
        return original(self, *args)

    TransformerBlock.__call__ = block  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        TransformerBlock.__call__ = original  # type: ignore[method-assign]


@contextmanager
def in_reading_logprobs(company: Company) -> Iterator[None]:
    """When those of some answers have been read, and others not."""
    original, calls = Logprobs.read, count()
    at = company.draw.randrange(3)

    def read(self: Logprobs) -> list[TokenLogprob]:
        if next(calls) == at:
            raise FaultError
        return original(self)

    Logprobs.read = read  # type: ignore[method-assign]
    try:
        yield
    finally:
        Logprobs.read = original  # type: ignore[method-assign]


FAULTS = (in_a_sampler, in_a_block, in_reading_logprobs)
