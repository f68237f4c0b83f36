"""What machines compare before anything is loaded, each on a thread."""

import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import pytest

from mlx_cerebrum.errors import MachineError
from mlx_cerebrum.ranks.agree import PROTOCOL, agree, fits_everywhere, introduce, ready
from mlx_cerebrum.ranks.announcement import MAGIC
from mlx_cerebrum.ranks.links import Links, Numbers

WAIT = 10.0  # seconds
Wires = list["queue.Queue[Numbers]"]


class Thread(Links):
    """A machine whose ring is a queue to the next one. `change` alters what it sends."""

    def __init__(self, wires: Wires, rank: int, change: Callable[[Numbers], Numbers]) -> None:
        self.rank, self.size, self.names = rank, len(wires), []
        self.after, self.before = (rank + 1) % self.size, (rank - 1) % self.size
        self._wires, self._change = wires, change

    def send(self, array: mx.array, to: int) -> None:
        self._wires[to].put(self._change(np.array(array)))

    def receive(self, shape: Any, dtype: Any, source: int, patience: float | None = None) -> Any:
        return mx.array(self._wires[self.rank].get(timeout=WAIT))


def as_it_is(numbers: Numbers) -> Numbers:
    return numbers


def together(
    machines: int, what: Callable[[Links], Any], changes: dict[int, Any] | None = None
) -> list[Any]:
    """What each of the machines gets, or the error that ends it."""
    wires: Wires = [queue.Queue() for _ in range(machines)]

    def run(rank: int) -> Any:
        links = Thread(wires, rank, (changes or {}).get(rank, as_it_is))
        try:
            return what(links)
        except (MachineError, queue.Empty) as error:
            return error

    with ThreadPoolExecutor(machines) as pool:
        return list(pool.map(run, range(machines)))


def one_line(found: list[Any]) -> str:
    """The line that all machines have said."""
    assert all(isinstance(each, MachineError) for each in found), found
    (line,) = {str(each) for each in found}
    assert "\n" not in line
    return line


@pytest.mark.parametrize("machines", [2, 3, 5])
def test_all_learn_all_names_and_what_each_has_free(machines: int) -> None:
    def met(links: Links) -> Any:
        with patch("socket.gethostname", lambda: "höst\x1b[31m" + "x" * 99):
            return introduce(links, (links.rank + 1) << 40), links.names

    free = [min(r << 40, (2**31 - 1) * 1024) for r in range(1, machines + 1)]
    names = ["h?st?[31m" + "x" * 39] * machines
    assert together(machines, met) == [(free, names)] * machines


@pytest.mark.parametrize(
    ("at", "number", "says"),
    [
        (0, 0x47455420, "what runs on machine 0 is another program"),  # GET
        (1, PROTOCOL + 1, f"speaks protocol {PROTOCOL + 1}, this one {PROTOCOL}: install"),
        (2, 1, "it is machine 1 of 3"),
        (3, 2, "it is machine 0 of 2"),
    ],
)
def test_who_is_another_is_refused(at: int, number: int, says: str) -> None:
    def wrong(numbers: Numbers) -> Numbers:
        return np.where(np.arange(len(numbers)) == at, number, numbers).astype(np.int32)

    with patch.dict(globals(), WAIT=0.2):
        found = together(3, lambda links: introduce(links, 1), {0: wrong})
    assert isinstance(found[1], MachineError)
    assert says in str(found[1])


def test_two_jobs_that_are_one_ring_are_refused() -> None:
    """Both lists say that two machines are there: 0 and 1, and again 0 and 1."""
    wires: Wires = [queue.Queue() for _ in range(4)]

    def run(place: int) -> Any:
        links = Thread(wires, place, as_it_is)
        links.send = lambda array, to: wires[(place + 1) % 4].put(np.array(array))  # type: ignore[method-assign]
        links.receive = lambda *_: mx.array(wires[place].get(timeout=0.5))  # type: ignore[method-assign]
        links.rank, links.size, links.after, links.before = (
            place % 2,
            2,
            1 - place % 2,
            1 - place % 2,
        )
        try:
            return introduce(links, 1)
        except (MachineError, queue.Empty) as error:
            return error

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, range(4)))
    assert "of another job" in str(found[0])
    assert "of another job" in str(found[2])
    assert all(isinstance(each, Exception) for each in found)


def test_what_differs_is_named_on_all_machines() -> None:
    def compared(links: Links) -> None:
        topics = {"version": "1.0", "window": "12" if links.rank == 2 else "4096"}
        agree(links, topics, {"version": "install it", "window": "give the same flags"})

    line = "not the same window: machine 2 has 12, machine 0 4096; give the same flags"
    assert one_line(together(3, compared)) == line


def test_long_texts_are_compared_as_a_whole() -> None:
    def compared(links: Links) -> None:
        agree(links, {"plan": "p" * 500 + str(links.rank)}, {"plan": "look"})

    assert "not the same plan: machine 1 has ppp" in one_line(together(2, compared))
    assert together(2, lambda links: agree(links, {"plan": "p" * 500}, {})) == [None, None]


def test_a_machine_without_enough_memory_is_named_on_all() -> None:
    def fits(links: Links) -> None:
        fits_everywhere(links, 3_000_000_000, 2_000_000_000 if links.rank == 1 else 4_000_000_000)

    line = one_line(together(3, fits))
    assert line.startswith("machine 1 would need 3.00 GB and may take 2.00 GB: ")


def test_all_have_loaded_in_one_dtype() -> None:
    assert together(2, lambda links: ready(links, mx.float16, 4096)) == [[4096] * 2] * 2

    def mixed(links: Links) -> list[int]:
        return ready(links, mx.float32 if links.rank else mx.bfloat16, 1)

    assert "computes in another dtype" in one_line(together(2, mixed))


@pytest.mark.parametrize("machines", [2, 3, 4])
def test_what_is_gathered_is_the_same_on_all(machines: int) -> None:
    found = together(machines, lambda links: links.gather([links.rank, MAGIC]).tolist())
    assert found == [[[rank, MAGIC] for rank in range(machines)]] * machines
    assert cast(int, found[0][0][1]) == MAGIC
