"""What a machine says to the next one when the work can't go on.

Whoever waits for a machine only knows that one, which may be waiting itself, or have ended because
of another. So a machine that ends, or has waited too long, says why to the next in the ring, who
says it to its next. It takes the place of whatever is waited for there: one number, over and over.
MLX's ring carries bytes, and does not mind that their count is another.
"""

from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

REPEATED = 1 << 14  # times; 64 KB fit into the system's buffers, also where nobody reads
MOST_MACHINES = 16
SEEN = 8  # equal numbers that make a word
_BASE = 0x7E000000  # as float32, and as two of 16 bits, larger than any hidden state


class Why(IntEnum):
    OVER = 0  # machine 0 has ended, and says itself why
    GONE = 1  # `value` is a machine whose link is cut
    FAILED = 2  # `value` is a machine that ended by an error
    WAITING = 3  # `value` has a bit for each machine that has waited too long


class Word(NamedTuple):
    why: Why
    value: int

    @property
    def number(self) -> int:
        return _BASE | self.why << MOST_MACHINES | self.value

    @classmethod
    def of(cls, numbers: npt.NDArray[np.int32], machines: int) -> "Word | None":
        """The word that an array begins with, if it does."""
        first = numbers[:SEEN]
        if not len(first) or (first != first[0]).any():
            return None
        rest = int(first[0]) - _BASE
        why, value = rest >> MOST_MACHINES, rest & ((1 << MOST_MACHINES) - 1)
        if why not in [*Why] or value >= (1 << machines if why == Why.WAITING else machines):
            return None
        return cls(Why(why), value)


def silent(waiting: int, rank: int, machines: int) -> int | None:
    """The nearest machine before `rank` that does not wait itself; None where all of them do."""
    for back in range(1, machines):
        found = (rank - back) % machines
        if not waiting >> found & 1:
            return found
    return None
