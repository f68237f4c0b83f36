"""Fuzzing, the same every time: readers let nothing but our own errors out.

`python -m tests.fuzz` goes on from there, with other seeds.
"""

from pathlib import Path
from random import Random

import pytest
from fuzz.readers import READERS
from fuzz.run import _Folder, _one, fuzz

SEED = 1


def test_every_reader_reads_what_is_valid(tmp_path: Path) -> None:
    for name in READERS:
        assert _one(_Folder(name, tmp_path), {}) == (False, None), name


# Inputs of each reader: some seconds in the suite, a minute of one core in the long run.
@pytest.mark.parametrize("inputs", [50, pytest.param(500, marks=pytest.mark.long)])
def test_no_reader_is_at_fault(inputs: int) -> None:
    counts = dict.fromkeys(READERS, inputs)
    tallies = fuzz(counts, SEED)
    assert {name: tally.faults for name, tally in tallies.items() if tally.faults} == {}
    assert {name: tally.inputs for name, tally in tallies.items()} == counts
    for name, tally in tallies.items():
        assert tally.refused < tally.inputs, name  # some are read to the end
        assert tally.refused or name == "journal", name  # which is read as far as it is sound


def test_a_fault_of_any_kind_is_noticed() -> None:
    seed = 9  # has them all
    songs = [Random(f"canary/{seed}/{index}").randrange(8) for index in range(12)]
    assert set(songs) >= {1, 2, 3, 4, 5, 6}
    (tally,) = fuzz({"canary": len(songs)}, seed).values()
    kinds = {1: "died: -6", 2: "MemoryError at fuzz", 3: "GeneratorExit at fuzz"}
    kinds |= {5: "died: 0", 6: "KeyError at fuzz"}
    assert tally.faults == {
        fault: [index for index, song in enumerate(songs) if song == kind]
        for kind, fault in kinds.items()
    }
    assert (tally.inputs, tally.refused) == (len(songs), songs.count(4))
