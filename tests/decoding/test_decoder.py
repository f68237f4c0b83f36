"""One decoder for all: each sequence says what it says alone and unguessed, in any company.

`make test-long` takes 1,200 random sequences over four blocks, and 200 over the real orders' 32;
`CEREBRUM_TEST_SEEDS=25 pytest -m long tests/decoding/test_decoder.py` 5,000 of each, in an hour.
"""

import itertools
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from company import (
    FAULTS,
    TOLERANCE,
    Company,
    Counted,
    Eager,
    FaultError,
    in_a_sampler,
    in_reading_logprobs,
    tiny_views,
)
from conftest import slow
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from mlx_cerebrum.decoding import decoder
from mlx_cerebrum.decoding.decoder import Decoder, generate_step
from mlx_cerebrum.decoding.drafters import Drafter, NGramDrafter
from mlx_cerebrum.decoding.generation import Generation
from mlx_cerebrum.decoding.speculative import Speculation
from mlx_cerebrum.model import rows, together
from mlx_cerebrum.model.cache import WindowedKVCache
from mlx_cerebrum.model.forward import Model, TransformerBlock
from mlx_cerebrum.model.rows import Rows
from mlx_cerebrum.model.schedule import schedule
from mlx_cerebrum.plan.layer_plan import resolve
from mlx_cerebrum.weights.opening import ModelSpec, open_model
from mlx_cerebrum.weights.views import load_views

SEEDS = int(os.environ.get("CEREBRUM_TEST_SEEDS", "0"))
SHORT = (0, 1, 2, 3)
LONG = (0, 1, 1, 2, 2, 3)  # half of the blocks twice, as the 12.25B has them
VIEWS = {window: tiny_views(window, (SHORT, LONG)) for window in (12, None)}
Patch = pytest.MonkeyPatch


def company(draw: random.Random, views: list[Model], ahead: bool, patch: Patch) -> Company:
    """Settings drawn small, so that buffers fill up and are moved all the time.

    ahead: on a GPU a step is started before the last one's choices are known.
    """
    step = draw.choice([4, 16, 256])
    patch.setattr(decoder, "device", SimpleNamespace(on_gpu=lambda: ahead))
    patch.setattr(decoder, "STEP", step)
    return Company(draw, views, draw.choice([9, 64]), step, draw.randint(1, 7))


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("window", [12, None])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.one_in(12)
def test_random_company(seed: int, window: int | None, ahead: bool, monkeypatch: Patch) -> None:
    monkeypatch.setattr(Counted, "made", 0)
    there = company(random.Random(seed), VIEWS[window], ahead, monkeypatch)
    there.run(13)
    assert there.left == 13
    assert there.most > 1
    assert Counted.made > there.held > 0  # guesses


def test_orders_that_share_nothing(monkeypatch: Patch) -> None:
    """They take their steps one after the other."""
    views = tiny_views(12, ((0, 1), (2, 3)))
    assert schedule(view.config.layer_map for view in views) is None
    company(random.Random(5), views, False, monkeypatch).run(10)


@pytest.mark.long
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("window", [12, None])
@pytest.mark.parametrize("seed", range(SEEDS or 6))
def test_much_random_company(
    seed: int, window: int | None, ahead: bool, monkeypatch: Patch
) -> None:
    there = company(random.Random(100 + seed), VIEWS[window], ahead, monkeypatch)
    there.run(50)
    assert there.left == 50


@pytest.fixture(scope="module")
def cerebrum() -> dict[int | None, list[Model]]:
    """The 7B's and the 12.25B's orders over the same 32 tiny blocks."""
    orders = [resolve(name).layer_map(32) for name in ("cerebrum-7b", "cerebrum-12.25b")]
    return {window: tiny_views(window, orders) for window in (12, None)}


@pytest.mark.long
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("window", [12, None])
@pytest.mark.parametrize("seed", range(SEEDS or 1))
def test_both_orders_in_random_company(
    seed: int,
    window: int | None,
    ahead: bool,
    cerebrum: dict[int | None, list[Model]],
    monkeypatch: Patch,
) -> None:
    there = company(random.Random(200 + seed), cerebrum[window], ahead, monkeypatch)
    there.run(50)
    assert there.left == 50


@pytest.mark.long
def test_trained_model_in_company(demo: Path) -> None:
    """Both orders of the demo model, from a text of this repository."""
    views, tokenizer = load_views(open_model(ModelSpec(str(demo))), ["demo-interleaved"])
    draw, there, waiting = random.Random(4), Decoder(), []
    text = Path(decoder.__file__).read_text(encoding="utf-8")
    for _ in range(24):
        start = draw.randrange(len(text) - 400)
        ids = tokenizer.encode(text[start : start + draw.randint(20, 400)])
        model, how = draw.choice([*views.values()]), Eager(["ngram"], draw)
        drafters: dict[str, Drafter] = {"ngram": NGramDrafter()}
        g = Generation(model, ids, model.make_cache(), draw.randint(1, 28))
        g.speculation = Speculation(drafters, how)
        waiting.append(g)
    present: list[Generation] = []
    while waiting or present:
        if waiting and len(present) < 8 and draw.random() < 0.5:
            present.append(waiting.pop())
            there.add(present[-1])
        there.step()
        for g in [g for g in present if g.left <= 0]:
            there.leave(g)
            present.remove(g)
            prompt = g.tokens[: g.prompt]
            alone = list(generate_step(prompt, g.model, max_tokens=g.max_tokens))
            assert g.tokens[g.prompt :] == alone


class Machine(RuleBasedStateMachine):
    """The same with steps that hypothesis chooses, and makes fewer of where one fails."""

    @initialize(seed=st.integers(0, 2**20), window=st.sampled_from([12, None]), ahead=st.booleans())
    def begin(self, seed: int, window: int | None, ahead: bool) -> None:
        self.patch = pytest.MonkeyPatch()
        self.there = company(random.Random(seed), VIEWS[window], ahead, self.patch)

    @precondition(lambda self: len(self.there.jobs) < 6)
    @rule(view=st.integers(0, 2))
    def come(self, view: int) -> None:
        self.there.add(self.there.views[view])

    @rule(steps=st.integers(1, 9))
    def go(self, steps: int) -> None:
        for _ in range(steps):
            self.there.step()

    @precondition(lambda self: self.there.jobs)
    @rule(which=st.integers(0, 5))
    def cancel(self, which: int) -> None:
        self.there.leave(self.there.jobs[which % len(self.there.jobs)])

    @rule(fault=st.sampled_from(FAULTS))
    def fail(self, fault: Any) -> None:
        self.there.step(fault)

    def teardown(self) -> None:
        if hasattr(self, "there"):
            self.there.finish()
            self.patch.undo()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=12, stateful_step_count=20, deadline=None)


# Sequences that are chosen.


def some(count: int, **changes: Any) -> Company:
    """So many that answer, of every view by turns."""
    there = Company(random.Random(1), VIEWS[12], 64, 16, 7)
    for i in range(count):
        there.add(there.views[i % 3], **({"length": 12, "most": 12} | changes))
    while there.decoder._reading:
        there.step()
    return there


@slow
def test_one_that_leaves_between_rounds_of_guesses() -> None:
    """At every place."""
    for steps in range(8):
        there = some(4)
        for _ in range(steps):
            there.step()
        there.leave(there.jobs[len(there.jobs) // 2])
        there.finish()


def test_one_that_has_said_all_and_stays() -> None:
    """It takes no part in steps, and its neighbours' entries grow beside its own."""
    there = some(3)
    there.add(there.views[0], most=3)
    while any(job.generation.left > 0 for job in there.jobs):
        there.decoder.step()
    assert [job.generation.chosen for job in there.jobs] == [12, 12, 12, 3]
    assert there.decoder.step() == []
    there.finish()


def test_a_sampler_that_raises_ends_no_other() -> None:
    """The step is taken back for all, those guessed and those that share caches too."""
    there = some(4, most=20)
    for _ in range(5):
        there.step()
        before = [list(job.generation.tokens) for job in there.jobs]
        with pytest.raises(FaultError), in_a_sampler(there):
            there.decoder.step()
        assert there.decoder.recover() is None
        assert [job.generation.tokens for job in there.jobs] == before
    there.finish()


def test_logprobs_that_can_not_be_read_lose_no_token() -> None:
    """Of all answers or of none: what was chosen and not handed out would be missing."""
    there = some(4, most=20)
    for job in there.jobs:
        job.generation.top_logprobs = 2
    for _ in range(5):
        before = [list(job.generation.tokens) for job in there.jobs]
        with pytest.raises(FaultError), in_reading_logprobs(there):
            there.decoder.step()
        assert there.decoder.recover() is None
        assert [job.generation.tokens for job in there.jobs] == before
        there.step()
    there.finish()


def test_without_recovering_others_would_say_something_else() -> None:
    """Their last token is in their caches, and the next step gives it again."""
    there = some(4, most=20)
    with pytest.raises(FaultError), in_a_sampler(there):
        there.decoder.step()
    with pytest.raises(AssertionError):
        there.finish()


@pytest.mark.parametrize("length", [9, pytest.param(40, marks=pytest.mark.long)])
@slow
def test_interrupted_while_two_run(length: int, monkeypatch: Patch) -> None:
    """As the terminal's /compare: wherever it is, both caches hold what the target computed."""
    original = TransformerBlock.__call__
    for call in itertools.count(0, 3):
        calls = itertools.count()

        def block(self: TransformerBlock, *args: Any, at: int = call, n: Any = calls) -> mx.array:
            if next(n) == at:
                raise KeyboardInterrupt
            return original(self, *args)

        there = Company(random.Random(call), VIEWS[12], 9, 4, 30)
        jobs = [there.made(model, length, most=6) for model in VIEWS[12][:2]]
        both = [there.decoder.run(job.generation) for job in jobs]
        handed: list[list[int]] = [[], []]
        monkeypatch.setattr(TransformerBlock, "__call__", block)
        try:
            for turn in itertools.cycle((0, 1)):
                handed[turn].append(next(both[turn])[0])
        except StopIteration:
            break
        except KeyboardInterrupt:
            pass
        finally:
            monkeypatch.setattr(TransformerBlock, "__call__", original)
            for run in both:
                run.close()
            for job, tokens in zip(jobs, handed, strict=True):
                assert job.generation.tokens == [*job.prompt, *tokens]
                there.check(job)
    assert call > 20


@contextmanager
def interrupted(at: int, files: set[str], patch: Patch) -> Iterator[None]:
    """As by Ctrl-C, before the at-th line of these files within the decoder's steps."""
    step, lines = Decoder.step, itertools.count()

    def line(frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        if event == "line" and next(lines) == at:
            raise KeyboardInterrupt
        return line

    def traced(self: Decoder) -> Any:
        before = sys.gettrace()
        sys.settrace(line)
        try:
            return step(self)
        finally:
            sys.settrace(before)

    with patch.context() as patched:
        patched.setattr(Decoder, "step", traced)
        yield


# Moving rows between caches has the most to lose: its lines are tried closer together.
MOVING, ALL = {rows.__file__}, {decoder.__file__, rows.__file__}
PLACES = [
    *((at, MOVING) for at in range(126, 2800, 700)),
    *(pytest.param(at, MOVING, marks=pytest.mark.long) for at in range(0, 2800, 40)),
    *(pytest.param(at, ALL, marks=pytest.mark.long) for at in range(0, 9680, 240)),
]


@pytest.mark.parametrize(("at", "files"), PLACES)
def test_interrupted_anywhere_while_four_run(at: int, files: set[str], monkeypatch: Patch) -> None:
    """Three of them share caches, which are moved when they are full."""
    monkeypatch.setattr(decoder, "STEP", 4)
    there = Company(random.Random(at), VIEWS[12], 9, 4, 30)
    models = [VIEWS[12][n] for n in (0, 0, 0, 1)]
    jobs = [there.made(model, 9, most=16) for model in models]
    runs = [there.decoder.run(job.generation) for job in jobs]
    handed: list[list[int]] = [[] for _ in jobs]
    try:
        with interrupted(at, files, monkeypatch):
            for turn in itertools.cycle(range(len(jobs))):
                handed[turn].append(next(runs[turn])[0])
    except (KeyboardInterrupt, StopIteration):
        pass
    for run in runs:
        run.close()
    for job, tokens in zip(jobs, handed, strict=True):
        assert job.generation.tokens == [*job.prompt, *tokens]
        there.check(job)


@pytest.mark.parametrize("at", range(4))
@slow
def test_no_memory_to_share_caches(
    at: int, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    """That one goes on alone, and says the same."""
    original, calls = Rows.join, itertools.count()

    def join(self: Rows, own: Any) -> None:
        if next(calls) == at:
            raise RuntimeError("no memory")
        original(self, own)

    monkeypatch.setattr(Rows, "join", join)
    there = Company(random.Random(at), VIEWS[12], 64, 16, 7)
    for _ in range(4):
        there.add(there.views[1], 9, most=20)
    while there.decoder._reading or there.decoder._changed:
        there.step()
    assert len(there.decoder._loners) == 1
    assert "could not share" in caplog.text
    there.finish()


def test_one_of_two_that_run_ends_in_an_error() -> None:
    """In its report of progress, or its sampler: the other says what it would have said."""

    def stop(done: int, total: int) -> None:
        if done > 20:
            raise FaultError

    def sampler(logits: mx.array, number: int) -> mx.array:
        raise FaultError

    for fault in (stop, sampler):
        there = Company(random.Random(3), VIEWS[12], 64, 16, 3)
        short = there.made(there.views[0], 4, most=30)
        long = there.made(there.views[1], 30, most=30)
        said = there.decoder.run(short.generation)
        tokens = [next(said)[0] for _ in range(3)]
        if fault is sampler:
            long.generation.sampler = sampler
        other = there.decoder.run(long.generation, stop if fault is stop else None)
        with pytest.raises(FaultError):
            next(other)
        tokens += [token for token, _ in said]
        assert short.generation.tokens == [*short.prompt, *tokens]
        assert len(tokens) == 30
        there.check(short)
        there.check(long)


@slow
def test_positions_that_forgot_unequally_much_go_back_to_one_point() -> None:
    """A draft model uses some positions' caches, which then move their entries at other times."""
    model, points = VIEWS[12][1], set()
    tokens = [5 + i % 7 for i in range(60)]
    logits = np.array(model(mx.array([tokens]))[0])
    for more in range(1, 24):
        caches = [WindowedKVCache(12, 9, 16) for _ in model.config.layer_map]
        model(mx.array([tokens[:30]]), caches)
        guessed = mx.zeros((1, 2, 9, 16))
        caches[2].update_and_fetch(guessed, guessed)
        caches[2].trim(9)
        for token in tokens[30 : 30 + more]:
            model(mx.array([[token]]), caches)
        decoder._go_back(Generation(model, tokens[:26], caches, 9))
        (point,) = {c.offset for c in caches}
        points.add(point)
        found = model(mx.array([[tokens[point]]]), caches)[0, 0]
        np.testing.assert_allclose(np.array(found), logits[point], atol=TOLERANCE)
    assert points == {0, 25}


def test_a_prompt_of_one_token_shares_from_its_second_step_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, there = VIEWS[12][1], Decoder()
    sequences = [Generation(model, [token], model.make_cache(), 5) for token in (5, 6)]
    for g in sequences:
        there.add(g)
    there.step()
    there.step()
    (group,) = there._groups
    assert set(group.members) == set(sequences)
    assert not caplog.records


# Faults that these tests must notice.


def window_ignored(rows: Rows, lengths: Any) -> None:
    window, rows.window = rows.window, None
    begin(rows, lengths)
    rows.window = window


def no_holes(rows: Rows, counts: Any) -> None:
    rows.offsets = rows.offsets - np.asarray(counts)


def offsets_swapped(rows: Rows, lengths: Any) -> None:
    begin(rows, lengths)
    rows.next_positions = rows.next_positions[::-1]


def two_entries_swapped(maps: Any) -> Any:
    order = list(schedule(maps) or ())
    order[2:4] = order[3:1:-1]
    return tuple(order) or None


def all_guesses_held(guesses: Any, chosen: Any) -> int:
    return len(guesses)


begin = Rows.begin
MUTANTS: list[tuple[Any, str, Callable[..., Any]]] = [
    (Rows, "begin", window_ignored),
    (Rows, "take_back", no_holes),
    (Rows, "begin", offsets_swapped),
    (together, "schedule", two_entries_swapped),
    (decoder, "held_guesses", all_guesses_held),
]


@pytest.mark.parametrize(("place", "name", "fault"), MUTANTS)
def test_a_fault_would_be_noticed(place: Any, name: str, fault: Any, monkeypatch: Patch) -> None:
    monkeypatch.setattr(place, name, fault)
    there = company(random.Random(1), VIEWS[12], False, monkeypatch)
    with pytest.raises((AssertionError, ValueError)):
        there.run(13)
