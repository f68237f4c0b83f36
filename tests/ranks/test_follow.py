"""A follower does what is announced, and refuses what it can't have been asked for."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, cast

import mlx.core as mx
import pytest
from company import tiny_views

from mlx_cerebrum.errors import MachineError
from mlx_cerebrum.ranks.announcement import Announcement, Kind, Part, Step, View, What
from mlx_cerebrum.ranks.follow import Follower
from mlx_cerebrum.ranks.links import Links
from mlx_cerebrum.ranks.shares import Shares

MAP = (0, 1, 2, 3)
VIEW = View(0, MAP, (2,))
BEGUN = (What.BEGUN, 1, 0, 0)


class OneSided:
    """Links of machine 1 of 2 to a lead that has said all it will."""

    rank, before, after = 1, 0, 0

    def __init__(self, said: Sequence[Announcement], width: int) -> None:
        self.left: list[mx.array] = []
        self.sent: list[mx.array] = []
        for each in said:
            self.left += [mx.array(numbers) for numbers in each.packed()]
            if each.kind == Kind.STEP and each.number:
                self.left.append(mx.zeros((each.number, width)))

    def receive(self, shape: Sequence[int], dtype: mx.Dtype, source: int) -> mx.array:
        found = self.left.pop(0)
        assert (found.shape, found.dtype) == (tuple(shape), dtype)
        return found

    def send(self, array: mx.array, to: int) -> None:
        self.sent.append(array)

    def bound(self, summing: bool) -> Any:
        return nullcontext()

    def in_step(self) -> Any:
        return nullcontext()


def part(**changes: Any) -> Part:
    return replace(Part(1, 0, 3, 0, (), True), **changes)


def hears(*said: Announcement) -> Follower:
    """A follower with blocks 2 and 3, after it has heard all this."""
    model = tiny_views(12, [(0, 1)])[0]
    links = OneSided(said, model.config.hidden_size)
    shares = Shares(((0, 1), (2, 3)), MAP, (2,))
    follower = Follower(cast(Links, links), shares, model, mx.float32)
    follower.run()
    assert not links.left
    return follower


def follow(*steps: Step) -> Follower:
    said = [Announcement(Kind.STEP, i, step.tokens, step.body()) for i, step in enumerate(steps)]
    return hears(*said, Announcement(Kind.END, len(steps)))


def test_caches_follow_the_lead() -> None:
    first = Step([part(marks=(2,))], [BEGUN], [VIEW])
    again = Step([part(offset=2, length=1, wanted=False)])
    copied = Step([part(sequence=2, offset=3)], [(What.COPIED, 2, 1, 0)])
    follower = follow(first, again, copied)
    offsets = {n: [c.offset for c in caches] for n, caches in follower.caches.items()}
    assert offsets == {1: [3, 3], 2: [6, 6]}
    sent = cast(OneSided, follower.links).sent
    assert [len(each) for each in sent] == [3, 3]  # what is not wanted does not go back


def test_what_is_given_up_needs_no_step() -> None:
    dropped = Step([], [(What.COMPACTED, 1, 0, 0), (What.DROPPED, 1, 0, 0)])
    assert not follow(Step([part()], [BEGUN], [VIEW]), dropped).caches


@pytest.mark.parametrize(
    "step",
    [
        Step([part()]),  # of no sequence
        Step([part()], [BEGUN]),  # of no view
        Step([part(offset=1)], [BEGUN], [VIEW]),  # of tokens it never saw
        Step([part()], [(What.BEGUN, 1, 0, 5)], [VIEW]),  # bits that entries can't have
        Step([part()], [(What.COPIED, 1, 9, 0)], [VIEW]),
        Step([], [(What.DROPPED, 9, 0, 0)]),
        Step([], [], [View(0, MAP, (1,))]),  # blocks that it does not hold
        Step([], [], [View(0, MAP, ())]),  # no part for it
        Step([], [], [View(0, MAP, (4,))]),  # an empty one
    ],
)
def test_what_it_cannot_do_is_refused(step: Step) -> None:
    with pytest.raises(MachineError, match="asks for what is not here"):
        follow(step)


def test_a_step_of_another_size_is_refused() -> None:
    with pytest.raises(MachineError, match="a step of 3 tokens as one of 5"):
        hears(Announcement(Kind.STEP, 0, 5, Step([part()], [BEGUN], [VIEW]).body()))


def test_a_step_that_was_missed_is_seen() -> None:
    with pytest.raises(MachineError, match="is at step 7, this one at 0"):
        hears(Announcement(Kind.END, 7))
