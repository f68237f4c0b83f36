"""However a sequence goes back and forth on the lead, the other machines can follow."""

import copy
import gc
import random

import mlx.core as mx
import numpy as np
import pytest

from mlx_cerebrum.model.cache import WindowedKVCache
from mlx_cerebrum.ranks.announcement import Part, What
from mlx_cerebrum.ranks.follow import bring
from mlx_cerebrum.ranks.lead_cache import Journal, LeadCache


def entries(tokens: list[int]) -> mx.array:
    return mx.array(tokens, dtype=mx.float32)[None, None, :, None]


class Pair:
    """A sequence's first cache on the lead, and its cache on another machine."""

    def __init__(self, window: int | None, journal: Journal) -> None:
        self.lead = LeadCache(journal, 0, window, None)
        self.lead.rewind = self.lead.step = 4
        self.other = WindowedKVCache(window, 4, 4)
        self.tokens: list[int] = []

    def copied(self) -> "Pair":
        other = copy.copy(self)
        other.lead, other.other = copy.deepcopy(self.lead), copy.deepcopy(self.other)
        other.tokens = list(self.tokens)
        return other

    def run(self, tokens: list[int]) -> None:
        """A step, as `lead` announces it and `follow` takes it."""
        lead = self.lead
        bring([self.other], Part(1, 0, len(tokens), lead.offset, lead.marks, True))
        self.tokens += tokens
        seen = [c.update_and_fetch(entries(tokens), entries(tokens))[0] for c in (lead, self.other)]
        lead.told = lead.offset
        for each in seen:
            wanted = self.tokens
            if lead.window is not None:
                wanted = wanted[-(lead.window - 1 + len(tokens)) :]
            assert each[0, 0, :, 0].tolist() == wanted

    def back(self, point: int) -> None:
        self.lead.rewind_to(point)
        del self.tokens[point:]


@pytest.mark.parametrize("window", [1, 5, 12, None])
@pytest.mark.parametrize("seed", range(40))
@pytest.mark.one_in(4)
def test_any_history_can_be_followed(seed: int, window: int | None) -> None:
    draw, journal = random.Random(seed), Journal()
    pair = Pair(window, journal)
    for step in range(60):
        what = draw.random()
        if what < 0.55:
            pair.run([step * 10 + i for i in range(draw.choice([1, 1, 1, 2, 3, 7, 20]))])
        elif what < 0.65:
            pair.lead.mark(draw.randint(0, pair.lead.offset + 6))
        elif what < 0.7:
            pair.lead.drop_mark()
        elif what < 0.8:
            taken = pair.lead.trim(draw.randint(0, pair.lead.rewindable()))
            del pair.tokens[len(pair.tokens) - taken :]
        elif what < 0.92:
            pair.back(pair.lead.reachable(draw.randint(0, pair.lead.offset)))
        elif what < 0.96:
            pair.lead.compact()
            pair.other.compact()
        else:
            pair = pair.copied()


def test_the_last_tokens_can_always_be_taken_back() -> None:
    for window in (3, 12, None):
        pair = Pair(window, Journal())
        for step in range(50):
            pair.run([step])
            assert pair.lead.rewindable() >= min(4, pair.lead.offset)


def test_a_mark_is_reached_however_far_the_window_moved() -> None:
    pair = Pair(5, Journal())
    pair.run([1, 2, 3])
    pair.lead.mark()
    for step in range(100):
        pair.run([step])
    assert pair.lead.reachable(3) == 3
    assert pair.lead.reachable(50) == 3
    pair.back(3)
    pair.run([7])


def test_what_others_never_saw_is_not_gone_back_to() -> None:
    """A step that failed on the lead before it was announced."""
    pair = Pair(None, Journal())
    pair.run([1, 2, 3])
    pair.lead.update_and_fetch(entries([4]), entries([4]))
    assert pair.lead.reachable(4) == 3


def test_others_hear_of_copies_and_of_what_is_given_up() -> None:
    journal = Journal()
    first = LeadCache(journal, 2, 12, 8)
    second = copy.deepcopy(first)
    first.compact()
    said = journal.take()
    assert said == [
        (What.BEGUN, 1, 2, 8),
        (What.COPIED, 2, 1, 0),
        (What.COMPACTED, 1, 0, 0),
    ]
    np.testing.assert_equal((first.sequence, second.sequence), (1, 2))
    del second
    gc.collect()
    assert journal.take() == [(What.DROPPED, 2, 0, 0)]
