"""In which order the lead hands on what a step is of."""

from collections.abc import Sequence
from unittest import mock

import mlx.core as mx
import pytest
from company import tiny_views

from mlx_cerebrum.model.together import Part, run_together
from mlx_cerebrum.ranks.announcement import HEAD
from mlx_cerebrum.ranks.lead import Lead, LeadModel
from mlx_cerebrum.ranks.shares import Shares

MAP = (0, 1, 2, 3)


class Told:
    """A lead with blocks 0 and 1 of 4, and what became of its links: "sent N" for a step of N
    tokens, "received N"."""

    def __init__(self) -> None:
        self.events: list[str] = []
        links = mock.MagicMock(rank=0, after=1, before=1, broken=True)
        links.send, links.receive = self.send, self.receive
        own, whole = (tiny_views(None, [one])[0] for one in (MAP[:2], MAP))
        lead = Lead(links, Shares(((0, 1), (2, 3)), MAP, (2,)), own)
        self.model = LeadModel(lead, whole.config)
        lead.close()
        self.answer, self.chunk = (
            Part(self.model, mx.array([[3] * length]), self.model.make_cache(), wanted)
            for length, wanted in ((1, True), (5, False))
        )

    def send(self, array: mx.array, to: int) -> None:
        if array.dtype == mx.int32:
            assert array.size == HEAD
            self.events.append(f"sent {array[3].item()}")

    def receive(self, shape: Sequence[int], dtype: mx.Dtype, source: int) -> mx.array:
        self.events.append(f"received {shape[0]}")
        self.read = self.chunk.caches[-1].offset
        return mx.full(shape, 7.0, dtype)


def test_a_chunk_alone_is_not_waited_for() -> None:
    told = Told()
    told.model.lead.run([told.chunk])
    assert told.events == ["sent 5"]


@pytest.mark.parametrize("turned", [False, True])
def test_a_chunk_is_computed_while_the_others_run_the_answers(turned: bool) -> None:
    told = Told()
    parts = [told.answer, told.chunk]
    found = told.model.lead.run(parts[::-1] if turned else parts)
    assert told.events == ["sent 1", "received 1", "sent 5"]
    assert told.read == 5
    assert [h.shape[1] for h in found] == ([5, 1] if turned else [1, 5])
    assert mx.all(found[turned] == 7.0)


def test_what_is_under_way_is_received_whatever_happens() -> None:
    told = Told()

    def fails(parts: Sequence[Part]) -> list[mx.array]:
        if parts[0].tokens.shape[1] == 5:
            raise RuntimeError("no memory")
        return run_together(parts)

    patched = mock.patch("mlx_cerebrum.ranks.lead.run_together", fails)
    with patched, pytest.raises(RuntimeError):
        told.model.lead.run([told.answer, told.chunk])
    assert told.events == ["sent 1", "received 1"]
