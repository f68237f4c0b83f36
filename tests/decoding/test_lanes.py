"""Several steps under way, one for each machine: of which sequences, and what they say."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from weakref import WeakSet

import mlx.core as mx
import pytest
from company import Company, tiny_views

from mlx_cerebrum.decoding.decoder import Decoder
from mlx_cerebrum.decoding.generation import Generation
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.together import Part, run_together

SHORT = (0, 1, 2, 3)
LONG = (0, 1, 1, 2, 2, 3)


class Late:
    """Stands for other machines: the result of a step comes when it is asked for, and only then
    may a sequence be in another one."""

    def __init__(self, lanes: int) -> None:
        self.lanes, self.most = lanes, 0
        self.under_way: WeakSet[UnderWay] = WeakSet()  # what the decoder lets go of is gone
        self.lengths: list[list[int]] = []  # of every step's parts

    def begin(self, parts: Sequence[Part]) -> Callable[[], list[mx.array]]:
        own = [part._replace(model=Model(part.model.config, part.model.model)) for part in parts]
        caches = {id(part.caches[0]) for part in parts}
        assert not any(caches & step.caches for step in self.under_way)
        self.lengths.append([part.tokens.shape[1] for part in parts])
        begun = UnderWay(self, caches, run_together(own))
        if any(part.wanted for part in parts):
            self.under_way.add(begun)
        self.most = max(self.most, len(self.under_way))
        assert self.most <= self.lanes
        return begun


@dataclass(eq=False)
class UnderWay:
    late: Late
    caches: set[int]
    found: list[mx.array]

    def __call__(self) -> list[mx.array]:
        self.late.under_way.discard(self)
        return self.found


def views(window: int | None, lanes: int) -> tuple[Late, list[Model]]:
    late, models = Late(lanes), tiny_views(window, (SHORT, LONG))
    for model in models:
        object.__setattr__(model, "elsewhere", late)
    return late, models


@pytest.mark.parametrize("lanes", [2, 4])
@pytest.mark.parametrize("window", [12, None])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.one_in(10)
def test_random_company(seed: int, window: int | None, lanes: int) -> None:
    late, models = views(window, lanes)
    draw = random.Random(seed)
    there = Company(draw, models, 64, 256, draw.randint(1, 7))
    there.run(20)
    assert there.left == 20
    assert late.most == lanes


def answering(models: Sequence[Model], decoder: Decoder) -> list[Generation]:
    found = [
        Generation(model, [3 + i, 4], model.make_cache(), 40) for i, model in enumerate(models)
    ]
    for each in found:
        decoder.add(each)
    while not all(each.chosen for each in found):
        decoder.step()
    return found


def test_answers_are_shared_out_by_model() -> None:
    late, (short, long, _) = views(None, 2)
    decoder = Decoder()
    first, other, second, more = answering([short, long, short, long], decoder)
    for _ in range(4):
        decoder.step()
    together = [{advance.generation for advance in decoder.step()} for _ in range(2)]
    assert {frozenset(some) for some in together} == {
        frozenset({first, second}),
        frozenset({other, more}),
    }
    assert late.most == 2


def test_three_answers_all_have_their_turn() -> None:
    _, (short, *_) = views(None, 2)
    decoder = Decoder()
    found = answering([short] * 3, decoder)
    before = [each.chosen for each in found]
    for _ in range(8):
        decoder.step()
    assert [each.chosen - was for each, was in zip(found, before, strict=True)] == [4, 4, 4]


def test_a_chunk_is_read_when_all_answers_had_a_turn() -> None:
    late, (short, *_) = views(None, 2)
    decoder = Decoder(prefill_step_size=5)
    answering([short] * 4, decoder)
    decoder.add(Generation(short, [3] * 16, short.make_cache(), 4))
    late.lengths.clear()
    for _ in range(7):
        decoder.step()
    at = [i for i, lengths in enumerate(late.lengths) if lengths == [5]]
    assert len(at) >= 2
    assert [b - a for a, b in pairwise(at)] == [2] * (len(at) - 1)
    assert late.lengths[at[0] + 1] == [1] * 4  # and all of them at once, lest the next chunk waits


def test_one_whose_prompt_is_scored_goes_with_the_others() -> None:
    late, (short, *_) = views(None, 2)
    decoder = Decoder(prefill_step_size=5)
    answering([short] * 2, decoder)
    scored = Generation(short, [3, 4, 5] * 4, short.make_cache(), 4, scored=1)
    decoder.add(scored)
    late.lengths.clear()
    while not scored.chosen:
        decoder.step()
    assert [1, 1, 5] in late.lengths
    assert len(scored.prompt_logprobs) == 11


def test_a_chunk_under_way_is_nobodys_when_its_sequence_has_left() -> None:
    late, (short, *_) = views(None, 2)
    decoder = Decoder(prefill_step_size=5)
    answering([short] * 2, decoder)
    new = Generation(short, [3] * 16, short.make_cache(), 4)
    decoder.add(new)
    while late.lengths[-1] != [5]:
        decoder.step()
    assert new.read == 5
    decoder.leave(new)
    advanced = [advance.generation for _ in range(6) for advance in decoder.step()]
    assert advanced
    assert new not in advanced
