"""In which order the lead hands on what a step is of, and takes what comes back."""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast
from unittest import mock

import mlx.core as mx
import pytest
from company import tiny_views

from mlx_cerebrum.errors import MachineError
from mlx_cerebrum.model.together import Part, run_together
from mlx_cerebrum.ranks.announcement import HEAD, Announcement, Kind
from mlx_cerebrum.ranks.lead import Lead, LeadModel
from mlx_cerebrum.ranks.links import Links
from mlx_cerebrum.ranks.shares import Shares

MAP = (0, 1, 2, 3)


class Told:
    """A lead with blocks 0 and 1 of 4, or with some heads of all, and what became of its links:
    "sent N" for a step of N tokens, "received N", and "beat" or "round" for those."""

    def __init__(self, machines: int = 2, heads: tuple[int, ...] = ()) -> None:
        self.events: list[str] = []
        self.came = 0.0
        self.links = mock.MagicMock(
            rank=0, size=machines, after=1, before=machines - 1, broken=True
        )
        self.links.send, self.links.receive = self.send, self.receive
        own, whole = (tiny_views(None, [one])[0] for one in (MAP[:2], MAP))
        shares = Shares(((0, 1), (2, 3)), MAP, (2,))
        if heads:
            own, shares = whole, Shares((MAP, MAP), MAP, (), heads)
        self.lead = Lead(self.links, shares, own)
        self.model = LeadModel(self.lead, whole.config)
        self.lead.close()
        self.events.clear()

    def part(self, length: int, wanted: bool = True) -> Part:
        return Part(self.model, mx.array([[3] * length]), self.model.make_cache(), wanted)

    def send(self, array: mx.array, to: int) -> None:
        if array.dtype == mx.int32:
            assert array.size == HEAD
            kind = Kind(cast(int, array[1].item()))
            self.events.append(
                f"sent {array[3].item()}" if kind == Kind.STEP else kind.name.lower()
            )

    def receive(self, shape: Sequence[int], dtype: mx.Dtype, source: int) -> mx.array:
        if dtype == mx.int32:
            return mx.array(Announcement(Kind.ROUND, 0, 100).packed()[0])
        self.events.append(f"received {shape[0]}")
        self.came += 1
        return mx.full(shape, self.came, dtype)


def test_a_chunk_is_not_waited_for() -> None:
    told = Told()
    chunk = told.part(5, wanted=False)
    told.lead.begin([chunk])()
    told.lead.begin([chunk])()
    assert told.events == ["sent 5", "sent 5"]


def test_a_step_is_computed_while_the_others_run_the_one_before() -> None:
    """It is sent when that has come back: who sends a step's result takes nothing meanwhile."""
    told = Told()
    first, second = told.part(1), told.part(2)
    come = told.lead.begin([first])
    received = told.links.receive

    def receive(*args: Any) -> Any:
        assert second.caches[-1].offset == 2
        return received(*args)

    told.links.receive = receive
    after = told.lead.begin([second])
    assert told.events == ["sent 1", "received 1", "sent 2"]
    assert mx.all(come()[0] == 1.0)
    assert mx.all(after()[0] == 2.0)
    assert told.events[3:] == ["received 2"]


def test_of_three_machines_each_has_a_step() -> None:
    told = Told(machines=3)
    for length in (1, 2, 3):
        told.lead.begin([told.part(length)])
    told.lead.begin([told.part(4, wanted=False)])
    assert told.events == ["sent 1", "sent 2", "received 1", "sent 3", "received 2", "sent 4"]
    told.lead.begin([told.part(5)])
    assert told.events[6:] == ["received 3", "sent 5"]  # nothing comes back of the chunk


def test_what_is_wanted_comes_back_of_a_step_with_more() -> None:
    told = Told()
    found = told.lead.begin([told.part(4, wanted=False), told.part(1), told.part(2)])()
    assert told.events == ["sent 7", "received 3"]
    assert [h.shape[1] for h in found] == [4, 1, 2]
    assert mx.all(found[1] == 1.0)
    assert mx.all(found[2] == 1.0)


def test_a_step_that_fails_here_is_never_sent() -> None:
    told = Told()
    come = told.lead.begin([told.part(1)])

    def fails(parts: Sequence[Part]) -> list[mx.array]:
        if parts[0].tokens.shape[1] == 5:
            raise RuntimeError("no memory")
        return run_together(parts)

    patched = mock.patch("mlx_cerebrum.ranks.lead.run_together", fails)
    with patched, pytest.raises(RuntimeError):
        told.lead.begin([told.part(5)])
    assert mx.all(come()[0] == 1.0)
    assert told.events == ["sent 1", "received 1"]


def test_what_nobody_waits_for_is_taken_before_the_next_and_at_rest() -> None:
    told = Told()
    parts = [told.part(1), told.part(2)]  # caches that are dropped would be told of in a beat
    for part in parts:
        told.lead.begin([part])
    assert told.events == ["sent 1", "received 1", "sent 2"]
    told.lead._beat(0)  # it computes: others may have a step to run
    assert told.events[3:] == ["beat"]
    told.lead._beat(100)
    assert told.events[4:] == ["received 2", "round"]


def test_a_step_that_fails_where_all_run_every_block_ends_all() -> None:
    """The others are in it, waiting for a sum: another step would give them its sums."""
    told = Told(heads=(1, 1))
    told.links.bound, told.links.broken = partial(Links.bound, told.links), False
    failing = mock.Mock(side_effect=RuntimeError("no memory"))
    patched = mock.patch("mlx_cerebrum.ranks.lead.run_together", failing)
    with patched, pytest.raises(MachineError, match="could not run its part: no memory"):
        told.lead.begin([told.part(1)])
    assert told.events == ["sent 1"]
    assert told.links.broken  # nothing more is sent, no last words either: they would be a sum
    told.links.failed.assert_not_called()
