"""The one decoder: everything that generates goes through it, one sequence or many.

A **sequence** is a prompt and the answer that grows after it. A **step** takes all sequences
forward at once: a chunk of one prompt, and for every answer a token, or a round of guesses that
is checked. It is one pass over the blocks, whatever plans the sequences run (model/together.py).

On several machines in turn several steps are under way, one for each, of some of the answers or of
a chunk: so all have something to do.

Prompts are read in a sequence's own caches. Then answers of one model whose lengths are alike
share their caches (model/rows.py); one that is alone keeps its own.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import mlx.core as mx

from mlx_cerebrum import device
from mlx_cerebrum.decoding.decode import Sampler, check_prompt, greedy, prefill_step
from mlx_cerebrum.decoding.drafters import Draft
from mlx_cerebrum.decoding.generation import Generation
from mlx_cerebrum.decoding.logprobs import ROWS, Logprobs, TokenLogprob
from mlx_cerebrum.decoding.policy import Pace
from mlx_cerebrum.decoding.speculative import Speculation, held_guesses, verify
from mlx_cerebrum.model.cache import STEP, Cache, WindowedKVCache, common_point
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.rows import Rows
from mlx_cerebrum.model.together import Part, begin_together

log = logging.getLogger(__name__)

MOST_TOGETHER = 8  # new tokens of a row in company: what Metal's attention for few queries takes


class Advance(NamedTuple):
    """What a step did for a sequence: read on in its prompt (no tokens), or chose tokens; or no
    more will come, for its `failure`: then it is to be taken out."""

    generation: Generation
    tokens: list[int]
    logprobs: Sequence[TokenLogprob] = ()  # of the tokens, where asked for


@dataclass(eq=False)
class _Flight:
    """A step that has been started; what it computes may not be there yet."""

    answers: list[Generation]
    guesses: list[list[int]]  # of each answer, that are checked
    reading: Generation | None  # whose caches take a chunk of its prompt
    chunk: int  # tokens of it
    ahead: mx.array | None  # the answers' last tokens, where the host does not know them yet
    rows: list[list[int]]  # of each part's hidden states, those of tokens that are real
    hidden: Callable[[], list[mx.array]]  # of each part, waited for
    seconds: float = 0.0  # that starting took, then all of it
    found: bool = False  # whether what follows has been asked for
    choices: mx.array | None = None  # for all answers, one more than guesses each
    logprobs: dict[Generation, Logprobs] = field(default_factory=dict)
    scores: list[Logprobs] = field(default_factory=list)  # of the chunk


class _Group:
    """Answers that share their caches."""

    def __init__(self, members: Sequence[Generation]) -> None:
        self.rows = Rows(members[0].caches)
        self.members: list[Generation] = []
        try:
            for generation in members:
                self.join(generation)
        except BaseException:
            for generation in list(self.members):
                self.leave(generation)
            raise

    def join(self, generation: Generation) -> None:
        self.members.append(generation)
        try:
            self.rows.join(generation.caches)
        finally:  # it may be in, and the joining interrupted
            del self.members[len(self.rows) :]

    def leave(self, generation: Generation, keep: bool = True) -> None:
        self.rows.leave(self.members.index(generation), keep)
        self.members.remove(generation)


def _alike(generations: Sequence[Generation]) -> bool:
    """Whether these may share caches: in room for the longest, each takes twice its own at most."""
    models = {(g.model.config.layer_map, g.model.config.residual_scales) for g in generations}
    bits = {g.caches[0].kv_bits for g in generations}
    room = [_entries(g) + STEP for g in generations]
    begun = all(g.caches[0].offset for g in generations)  # else there is nothing to share yet
    return begun and len(models) == len(bits) == 1 and 2 * min(room) >= max(room)


def _entries(generation: Generation) -> int:
    cache, seen = generation.caches[0], len(generation.tokens)
    return seen if cache.window is None else min(seen, cache.window - 1 + cache.rewind)


def _go_back(generation: Generation) -> None:
    """Let a sequence's own caches hold the same tokens, all but its last at most: interrupted,
    they may have come unequally far, and entries of guesses or of a drafter may be there."""
    caches = generation.caches
    least = min([generation.before + len(generation.tokens) - 1, *(c.offset for c in caches)])
    least = common_point([c for c in caches if isinstance(c, WindowedKVCache)], least)
    for c in caches:
        if (more := c.offset - least) > 0:
            if isinstance(c, WindowedKVCache) and more > c.rewindable():
                c.rewind_to(least)
            else:
                c.trim(more)


class Decoder:
    """Takes all sequences that were added forward, step by step. Their models are views of the
    same weights.

    prefill_step_size: tokens of a prompt read at once, at most (`decode.prefill_step`); in company
    fewer, so that the others need not wait long.
    """

    def __init__(self, prefill_step_size: int | None = None) -> None:
        self._step_size = prefill_step(prefill_step_size)
        self._reading: list[Generation] = []  # in the order they came
        self._answers: list[Generation] = []
        self._groups: list[_Group] = []
        self._loners: set[Generation] = set()  # that could not join others
        self._flights: deque[_Flight] = deque()  # in the order they were started
        self._since_chunk = 0  # answers taken forward, where chunks are steps of their own
        self._chosen_to_read: Generation | None = None  # in the step under way
        self._turn = 0  # of three that prompts take at being read
        self._changed = False  # since answers were put together last
        self._steps = 0
        self._pace = Pace()

    def add(self, generation: Generation) -> None:
        """Take a sequence. What its caches hold of the prompt is not read again."""
        self._reading.append(generation)
        self._move_on()

    @property
    def nbytes(self) -> int:
        """Bytes of all caches now."""
        own = {id(c): c for g in [*self._reading, *self._answers] for c in g.caches}
        return sum(c.nbytes for c in own.values()) + sum(g.rows.nbytes for g in self._groups)

    def leave(self, generation: Generation, keep: bool = True) -> None:
        """Take a sequence out, at any time. Its caches then hold the first of its tokens: all but
        the last, or fewer where the prompt was not read or a step was interrupted. Where they are
        not to be kept they may be left empty."""
        for some in (self._reading, self._answers):
            if generation in some:
                some.remove(generation)
        self._loners.discard(generation)
        self._leave_group(generation, keep)
        self._changed = True
        if keep:
            _go_back(generation)

    def step(self) -> list[Advance]:
        """Take every sequence a step forward, or with several steps under way those of one. Says
        what it did, first what it read."""
        self._chosen_to_read = None
        if not self._flights and (advance := self._round_alone()):
            return [advance]
        while len(self._flights) < self._lanes and (flight := self._launch()) is not None:
            self._flights.append(flight)
        if not self._flights:
            return self._failed()
        flight = self._flights.popleft()
        # On a GPU the next step is started before this one is read, so that the host's work hides
        # behind the device's. The CPU's queue is short: there it would delay this step's tokens.
        if device.on_gpu() and (after := self._launch_after(flight)) is not None:
            self._flights.append(after)
        return self._land(flight) + self._failed()

    def run(
        self, generation: Generation, progress: Callable[[int, int], None] | None = None
    ) -> Generator[tuple[int, float], None, None]:
        """Add a sequence, and yield its tokens, each with the time it was there (perf_counter's).

        Several may run at once: whichever is asked for its next token takes all of them forward,
        and the others find theirs when they are asked. However it ends, the sequence has left.
        Raises the RequestError that is its `failure`, if any.
        """
        begun, yielded = generation.read, 0
        try:
            self.add(generation)
            while generation.left > 0 or generation.ready:
                while not generation.ready:
                    try:
                        advances = self.step()
                    except BaseException:
                        self._take_back()
                        raise
                    now = time.perf_counter()
                    for other, new, _ in advances:
                        other.ready.extend((token, now) for token in new)
                    read = any(g is generation and not new for g, new, _ in advances)
                    if read and progress is not None:  # last: it may raise, to end this one
                        progress(generation.read - begun, generation.prompt - 1 - begun)
                yielded += 1
                yield generation.ready.popleft()
            if generation.failure is not None:
                raise generation.failure
        finally:
            del generation.tokens[generation.prompt + yielded :]
            self.leave(generation)

    def recover(self) -> Generation | None:
        """After a step that raised: every sequence is as if it had not been begun, and the next
        step may be tried. Where a prompt was being read, that sequence has left, and is returned:
        a chunk takes most memory.
        """
        self._take_back()
        reading, self._chosen_to_read = self._chosen_to_read, None
        if reading is not None:
            self.leave(reading)
        return reading

    def _take_back(self) -> None:
        """Undo a step that raised."""
        self._flights.clear()
        for group in self._groups:
            held = zip(group.rows.offsets, group.members, strict=True)
            group.rows.take_back([int(at) - g.before - len(g.tokens) + 1 for at, g in held])
        for g in [*self._answers, *self._reading]:
            if not self._grouped(g):
                _go_back(g)

    # ---- Starting a step

    @property
    def _lanes(self) -> int:
        """Steps that may be under way."""
        some = [*self._answers, *self._reading]
        elsewhere = some[0].model.elsewhere if some else None
        # What a prompt's log-probabilities are read from has to come back before it goes on.
        if elsewhere is None or any(g.scored is not None for g in self._reading):
            return 1
        return int(elsewhere.lanes)

    def _launch(self) -> _Flight | None:
        self._put_together()
        answers = [g for g in self._in_order() if g.left > 0]
        if self._lanes == 1:
            reading, chunk = self._next_chunk(len(answers))
        else:
            answers, reading, chunk = self._next_lane(answers)
        if not answers and reading is None:
            return None
        return self._run(answers, self._guesses(answers), reading, chunk)

    def _next_lane(
        self, answers: list[Generation]
    ) -> tuple[list[Generation], Generation | None, list[int]]:
        """Some of the answers that are in no step under way; or a chunk, once all had a turn."""
        if self._since_chunk >= len(answers) and not any(f.reading for f in self._flights):
            self._since_chunk = 0
            reading, chunk = self._next_chunk(len(answers))
            if reading is not None:
                return [], reading, chunk
        under_way = {g for flight in self._flights for g in flight.answers}
        waiting = [g for g in answers if g not in under_way]
        waiting.sort(key=lambda g: g.model.config.layer_map)  # of one model: they share reads
        # While a prompt is read one machine has a chunk of it to run: answers that came back behind
        # that would keep the next chunk waiting.
        lanes = self._lanes - bool(self._reading)
        share = waiting[: -(-len(answers) // lanes)]
        self._since_chunk += len(share)
        return [g for g in answers if g in share], None, []

    def _launch_after(self, flight: _Flight) -> _Flight | None:
        """The step after one whose choices are not known yet; None where it may not be plain."""
        answers = flight.answers
        if self._changed or self._reading or flight.reading is not None or any(flight.guesses):
            return None
        if answers != self._in_order() or min(g.left for g in answers) < 2:
            return None
        if any(g.constraint is not None for g in answers):  # a mask wants to know the last token
            return None
        if answers[0].model.elsewhere is not None:  # they are told of no step that may not be
            return None
        if self._guess_alone(answers) is not None or any(self._guesses(answers)):
            return None
        return self._run(answers, flight.guesses, None, [], flight.choices)

    def _run(
        self,
        answers: list[Generation],
        guesses: list[list[int]],
        reading: Generation | None,
        chunk: list[int],
        ahead: mx.array | None = None,
    ) -> _Flight:
        """Start a pass of a token for each answer, its guesses, and a chunk of a prompt.

        `ahead` are the answers' last tokens where the host does not know them yet.
        """
        started = time.perf_counter()
        new = {g: [g.tokens[-1], *more] for g, more in zip(answers, guesses, strict=True)}
        parts, rows_run, real, start = [], [], [], 0
        for members, rows in self._sets():
            own = [new.get(g, []) for g in members]
            most = max(map(len, own))
            if not most:
                continue
            if ahead is None:
                tokens = mx.array([more + [0] * (most - len(more)) for more in own])
            else:
                tokens = ahead[start : start + len(members), None]
            if rows is not None:
                rows.begin([len(more) for more in own])
                rows_run.append(rows)
            caches = members[0].caches if rows is None else rows.caches
            parts.append(Part(members[0].model, tokens, caches))
            real.append([i * most + j for i, more in enumerate(own) for j in range(len(more))])
            start += len(members)
        if reading is not None:
            wanted = reading.scored is not None
            parts.append(Part(reading.model, mx.array([chunk]), reading.caches, wanted))
        hidden = begin_together(parts)
        for rows in rows_run:
            rows.commit()
        flight = _Flight(answers, guesses, reading, len(chunk), ahead, real, hidden)
        if self._lanes == 1:  # nothing is gained by waiting
            self._find(flight)
        flight.seconds = time.perf_counter() - started
        return flight

    def _find(self, flight: _Flight) -> None:
        """Have what a step's tokens are followed by computed."""
        hidden, flight.found = flight.hidden(), True
        answers, guesses, ahead = flight.answers, flight.guesses, flight.ahead
        if answers:
            states = []
            for h, indices in zip(hidden, flight.rows, strict=False):  # without the chunk's
                flat = h.reshape(1, -1, h.shape[-1])
                whole = len(indices) == flat.shape[1]
                states.append(flat if whole else flat[:, mx.array(indices)])
            h = states[0] if len(states) == 1 else mx.concatenate(states, axis=1)
            logits = answers[0].model.logits(h).squeeze(0)
            if ahead is None:
                asked = zip(answers, guesses, strict=True)
                inputs = mx.array([token for g, more in asked for token in (g.tokens[-1], *more)])
            else:
                inputs = ahead
            if any(g.constraint is not None for g in answers):
                mx.async_eval(logits)  # meanwhile the host finds out what may come
            flight.choices, flight.logprobs = _choose(
                logits, answers, guesses, inputs, ahead is not None
            )
            mx.async_eval(flight.choices, *(found.arrays for found in flight.logprobs.values()))
        if flight.reading is not None:
            flight.scores = _scores(flight.reading, hidden[-1], flight.chunk)

    def _sets(self) -> list[tuple[list[Generation], Rows | None]]:
        """All answers, by the caches they share; those that share none come last."""
        grouped = {g for group in self._groups for g in group.members}
        alone: list[tuple[list[Generation], Rows | None]]
        alone = [([g], None) for g in self._answers if g not in grouped]
        return [*((group.members, group.rows) for group in self._groups), *alone]

    def _in_order(self) -> list[Generation]:
        return [g for members, _ in self._sets() for g in members]

    def _next_chunk(self, company: int) -> tuple[Generation | None, list[int]]:
        """What to read next of a prompt: of three turns the one with the least left has one, and
        the one that was asked for first has two."""
        if not self._reading:
            return None, []
        self._turn = 0 if len(self._reading) == 1 else (self._turn + 1) % 3
        if self._turn == 1:
            generation = min(self._reading, key=lambda g: g.prompt - g.read)
        else:
            generation = min(self._reading, key=lambda g: g.asked)
        length = self._step_size
        if company:
            length = min(length, self._pace.chunk(company))
        start, self._chosen_to_read = generation.read, generation
        return generation, generation.tokens[start : min(start + length, generation.prompt - 1)]

    def _guesses(self, answers: list[Generation]) -> list[list[int]]:
        """What is guessed for each answer in company; for one that is alone only what is sure."""
        (first,) = self._answers if len(self._answers) == 1 else (None,)
        alone = first is not None and not self._reading and first.top_logprobs is None
        row = None if alone else self._pace.row(len(answers))
        found = []
        for g in answers:
            most = min(g.left, MOST_TOGETHER) - 1
            guesses = g.constraint.forced(most) if g.constraint is not None else []
            g.sure = bool(guesses)
            if g.speculation is not None and row is not None and not g.sure:
                guesses = g.speculation.guess(g.tokens, most, row)
                guesses = guesses if g.constraint is None else g.constraint.cut(guesses)
            found.append(guesses)
        return found

    # ---- Finishing a step

    def _land(self, flight: _Flight) -> list[Advance]:
        started = time.perf_counter()
        if not flight.found:
            self._find(flight)
        advances, reading = [], flight.reading
        if reading is not None:
            mx.eval([c.state for c in reading.caches], [found.arrays for found in flight.scores])
            for found in flight.scores:
                reading.prompt_logprobs += found.read()
            if reading in (*self._reading, *self._answers):  # it may have left meanwhile
                advances.append(Advance(reading, []))
        if flight.choices is not None:
            advances += self._accept(flight, cast(list[int], flight.choices.tolist()))
        flight.seconds += time.perf_counter() - started
        self._learn(flight, advances)
        self._steps += 1
        if reading is not None or self._steps % 256 == 0:
            mx.clear_cache()
        self._move_on()
        return advances

    def _accept(self, flight: _Flight, choices: list[int]) -> list[Advance]:
        """Keep the guesses that were chosen too, and the choice after them; take back the rest."""
        advances, back = [], {}
        for g, guessed in zip(flight.answers, flight.guesses, strict=True):
            own, choices = choices[: len(guessed) + 1], choices[len(guessed) + 1 :]
            held = held_guesses(guessed, own)
            back[g] = len(guessed) - held
            # It may have left since the step was started, or its masks may have failed.
            if g in self._answers and g.failure is None:
                found = flight.logprobs.get(g)
                logprobs = found.read()[: held + 1] if found else ()
                advances.append(Advance(g, own[: held + 1], logprobs))
        for members, rows in self._sets() if any(back.values()) else ():
            if rows is not None:
                rows.take_back([back.get(g, 0) for g in members])
            elif count := back.get(members[0]):
                for c in members[0].caches:
                    c.trim(count)
        for g, new, _ in advances:  # last: what raises before leaves all without this step
            g.tokens += new
        return advances

    def _guess_alone(self, answers: list[Generation]) -> tuple[str, str, int] | None:
        """The next round of an answer that is alone, by any drafter; None for a plain step."""
        if len(answers) != 1 or self._reading or answers[0].top_logprobs is not None:
            return None
        (g,) = answers
        held, most = g.constraint, g.left - 1
        if g.speculation is None or (held is not None and (held.closed or held.forced(most))):
            return None
        return g.speculation.choose(g.tokens, most)

    def _round_alone(self) -> Advance | None:
        started = time.perf_counter()
        if (choice := self._guess_alone(self._answers)) is None:
            return None
        (g,), (name, kind, drafts) = self._answers, choice
        how, held = cast(Speculation, g.speculation), g.constraint
        sampler = g.sampler if held is None else held.guiding(g.sampler)
        draft = how.drafters[name].draft(g.tokens, drafts, g.caches, sampler, g.chosen)
        if held is not None and not draft.shared:
            guesses = held.cut(cast(list[int], draft.tokens.tolist()))
            draft = Draft(mx.array(guesses, dtype=mx.int32))
        new = verify(g.model, g.tokens[-1], draft, g.caches, g.choose)
        if g.failure is not None:
            return Advance(g, [])
        how.counted(name, kind, drafts, len(new) - 1, time.perf_counter() - started)
        g.tokens += new
        return Advance(g, new)

    def _failed(self) -> list[Advance]:
        return [Advance(g, []) for g in self._answers if g.failure is not None]

    def _learn(self, flight: _Flight, advances: list[Advance]) -> None:
        """Note how long a step took, and which guesses held."""
        answers, seconds = flight.answers, flight.seconds
        row = self._pace.row(len(answers)) or 0.0
        self._pace.saw(len(answers), sum(map(len, flight.guesses)), flight.chunk, seconds)
        alone = len(answers) == len(self._answers) == 1 and not flight.chunk
        held = {advance.generation: len(advance.tokens) - 1 for advance in advances}
        for g, guesses in zip(answers, flight.guesses, strict=True):
            if g.sure:
                continue
            if g.speculation is not None and guesses:
                g.speculation.guessed(held.get(g, 0), row)
            elif g.speculation is not None:
                g.speculation.plain(seconds if alone else None)

    # ---- Who shares caches

    def _move_on(self) -> None:
        """Sequences whose prompt has been read, but for the last token, begin to answer."""
        for g in [g for g in self._reading if g.read >= g.prompt - 1]:
            self._reading.remove(g)
            self._answers.append(g)
            self._changed = True

    def _put_together(self) -> None:
        """Let answers whose lengths have become alike share their caches."""
        if not self._changed and self._steps % STEP:
            return
        # A prompt of one token has no entries to share before its first step.
        self._changed = not all(g.caches[0].offset for g in self._answers)
        for g in list(self._answers):
            if g in self._loners or self._grouped(g):
                continue
            try:
                self._share(g)
            except Exception:  # no memory: alone it goes on as well
                log.exception("an answer could not share its caches")
                self._loners.add(g)
                mx.clear_cache()

    def _share(self, g: Generation) -> None:
        if g.model.elsewhere is not None:  # other machines have its other caches
            return
        for group in self._groups:
            if _alike([*group.members, g]):
                group.join(g)
                return
        for members, rows in self._sets():
            if rows is None and members[0] is not g and _alike([members[0], g]):
                self._groups.append(_Group([members[0], g]))
                return

    def _grouped(self, g: Generation) -> bool:
        return any(g in group.members for group in self._groups)

    def _leave_group(self, generation: Generation, keep: bool) -> None:
        for group in [group for group in self._groups if generation in group.members]:
            group.leave(generation, keep)
            if len(group.members) == 1:  # its own caches are the faster way for one
                group.leave(group.members[0])
            if not group.members:
                self._groups.remove(group)


def _choose(
    logits: mx.array,
    answers: Sequence[Generation],
    guesses: Sequence[list[int]],
    inputs: mx.array,
    ahead: bool,
) -> tuple[mx.array, dict[Generation, Logprobs]]:
    """The token that follows each of the step's `inputs` `[N]`, given their logits `[N, V]`."""
    if all(
        g.sampler is greedy and g.adjust is None and g.constraint is None and g.top_logprobs is None
        for g in answers
    ):
        return greedy(logits), {}
    found, logprobs, start = [], {}, 0
    for g, guessed in zip(answers, guesses, strict=True):
        own = slice(start, start := start + 1 + len(guessed))
        found.append(g.choose(logits[own], inputs[own], ahead, guessed))
        if g.top_logprobs is not None:
            logprobs[g] = Logprobs(logits[own], found[-1], g.top_logprobs)
    return mx.concatenate(found), logprobs


def _scores(generation: Generation, h: mx.array, length: int) -> list[Logprobs]:
    """Of the tokens that follow those of a chunk, whose hidden states are `[1, L, D]`."""
    if generation.scored is None:
        return []
    following = generation.tokens[generation.read - length + 1 :][:length]
    found = []
    for start in range(0, length, ROWS):
        part = slice(start, start + ROWS)
        logits = generation.model.logits(h[:, part])[0]
        found.append(Logprobs(logits, mx.array(following[part]), generation.scored))
        mx.eval(found[-1].arrays)  # so that one part's logits are held at a time
    return found


def generate_step(
    prompt: Sequence[int],
    model: Model,
    *,
    max_tokens: int = 256,
    sampler: Sampler = greedy,
    cache: Sequence[Cache] | None = None,
    prefill_step_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    speculation: Speculation | None = None,
    history: Sequence[int] = (),
) -> Generator[int, None, None]:
    """Yield up to `max_tokens` tokens that continue `prompt`; the caller decides when to stop.

    `cache` resumes a conversation: `prompt` is then what comes after the tokens it holds, which
    `history` repeats where guesses are to look there too. However it ends, the cache holds the
    first `offset` of all tokens read and yielded. `progress` is told how many of the prompt's
    tokens have been read, all but the last, and how many there are.

    Raises RequestError for an empty `prompt`, a prefill step below 1, or a speculation made for
    another model or request.
    """
    decoder = Decoder(prefill_step_size)
    check_prompt(prompt)
    if speculation is not None:
        speculation.check_unused(model)
    cache = model.make_cache() if cache is None else cache
    # mlx-lm's will do as well: a sequence alone asks no more of them than attention does.
    caches = cast(Sequence[WindowedKVCache], cache)
    tokens, before = [*history, *prompt], int(cache[0].offset) - len(history)
    generation = Generation(model, tokens, caches, max_tokens, sampler, speculation, before)
    for token, _ in decoder.run(generation, progress):
        yield token
