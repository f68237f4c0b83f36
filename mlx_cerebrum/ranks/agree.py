"""What machines tell each other before anything is loaded, so that they can work on one model.

Only numbers are exchanged: texts as their bytes, of a bounded length, and shown as plain ASCII.
"""

import hashlib
import secrets
import socket
from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np

from mlx_cerebrum.errors import MachineError
from mlx_cerebrum.model.memory import human
from mlx_cerebrum.ranks.announcement import MAGIC
from mlx_cerebrum.ranks.links import Links, Numbers, heard

PROTOCOL = 1
_NAME, _SHOWN = 48, 64  # bytes
_HASH = 4  # numbers


def introduce(links: Links, available: int) -> list[int]:
    """Find that the ring is one, and learn the machines' names and how many bytes each has free.

    A number that nobody can guess goes round: where hosts are listed in a wrong order, or another
    job uses the same ports, it does not come back, or a machine says it is another. Raises
    MachineError.
    """
    rank, size, nonce = links.rank, links.size, secrets.randbits(31)

    def first() -> mx.array:
        return links.receive((5,), mx.int32, links.before)

    if rank == 0:
        links.send(_numbers([MAGIC, PROTOCOL, 0, size, nonce]), links.after)
    came = [int(n) for n in np.array(heard(first))]
    if came[0] != MAGIC:
        raise MachineError(f"what runs on machine {links.before} is another program")
    if came[1] != PROTOCOL:
        raise MachineError(
            f"machine {links.before} speaks protocol {came[1]}, this one {PROTOCOL}: install the"
            " same version on all"
        )
    if came[2:4] != [links.before, size] or (rank == 0 and came[4] != nonce):
        raise MachineError(
            f"machine {links.before} of {size} should come before this one, and it is machine"
            f" {came[2]} of {came[3]}, or of another job: check the hosts and their ports"
        )
    if rank != 0:
        links.send(_numbers([MAGIC, PROTOCOL, rank, size, came[4]]), links.after)
    card = [rank, came[4], min(max(available, 0) // 1024, 2**31 - 1)]
    rows = links.gather([*card, *_text(socket.gethostname(), _NAME)])
    if [int(row[0]) for row in rows] != list(range(size)) or len({int(r[1]) for r in rows}) > 1:
        raise MachineError("the machines are not of one job: check the hosts and their ports")
    links.names = [_read(row[3:]) for row in rows]
    return [int(row[2]) * 1024 for row in rows]


def agree(links: Links, topics: Mapping[str, str], remedies: Mapping[str, str]) -> None:
    """Raise MachineError, on every machine alike, where one differs from machine 0 in a topic.

    remedies: what to do where a topic differs.
    """
    numbers: list[int] = []
    for text in topics.values():
        numbers += [*_hash(text), *_text(text, _SHOWN)]
    rows, each = links.gather(numbers), _HASH + _SHOWN
    for number, topic in enumerate(topics):
        columns = slice(number * each, (number + 1) * each)
        said = rows[:, columns]
        for rank, row in enumerate(said):
            if not np.array_equal(row[:_HASH], said[0, :_HASH]):
                theirs, ours = _read(row[_HASH:]), _read(said[0, _HASH:])
                both = f"{links.name(rank)} has {theirs}, {links.name(0)} {ours}"
                raise MachineError(f"not the same {topic}: {both}; {remedies[topic]}")


def fits_everywhere(links: Links, needed: int, free: int) -> None:
    """Raise MachineError, on every machine alike, where one lacks memory for what it would hold.

    needed: bytes that loading this machine's share takes at most. free: what it may take.
    """
    rows = links.gather([-(-needed // 1024), free // 1024])
    for rank, row in enumerate(rows):
        most, there = int(row[0]) * 1024, int(row[1]) * 1024
        if most > there:
            raise MachineError(
                f"{links.name(rank)} would need {human(most)} and may take {human(there)}: give it"
                " less with --split, hold the weights in fewer bits with --q-bits, or add a machine"
            )


def ready(links: Links, dtype: mx.Dtype, free: int) -> list[int]:
    """Wait until all have loaded; the bytes that each has left. Raises MachineError where one had
    to take another dtype."""
    kinds = [mx.float32, mx.float16, mx.bfloat16]
    rows = links.gather([kinds.index(dtype), max(free, 0) // 1024], patience=_LOADING)
    for rank, row in enumerate(rows):
        if int(row[0]) != int(rows[0][0]):
            raise MachineError(
                f"{links.name(rank)} computes in another dtype than {links.name(0)}: give --dtype"
            )
    return [int(row[1]) * 1024 for row in rows]


_LOADING = 1800.0  # seconds


def _numbers(values: Sequence[int]) -> mx.array:
    return mx.array(np.asarray(values, dtype=np.int32))


def _text(text: str, most: int) -> list[int]:
    data = text.encode("ascii", "replace")[:most]
    return [*data, *[0] * (most - len(data))]


def _read(numbers: Numbers) -> str:
    kept = (chr(n) if 32 <= n < 127 else "?" for n in map(int, numbers) if n)
    return "".join(kept) or "?"


def _hash(text: str) -> list[int]:
    data = hashlib.sha256(text.encode()).digest()[: 4 * _HASH]
    return [int(n) for n in np.frombuffer(data, dtype="<i4")]
