"""The language between machines: what is said is understood, and nothing else is obeyed."""

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_cerebrum.errors import MachineError
from mlx_cerebrum.ranks.announcement import (
    BEATS,
    HEAD,
    MAGIC,
    MOST_BODY,
    MOST_TOKENS,
    Announcement,
    Kind,
    Part,
    Step,
    View,
    What,
)
from mlx_cerebrum.ranks.last_words import MOST_MACHINES, SEEN, Why, Word, silent
from mlx_cerebrum.ranks.links import Numbers

NUMBERS = st.integers(0, 2**31 - 1)
ANY = st.integers(-(2**31), 2**31 - 1)
LEAST = st.integers(0, 3)  # counts and kinds, mostly
MAPS = st.lists(NUMBERS, max_size=70).map(tuple)
SCALES = st.floats(-1e29, 1e29)


@st.composite
def views(draw: st.DrawFn) -> View:
    layer_map = draw(MAPS)
    cuts = draw(st.lists(st.integers(0, len(layer_map)), max_size=4))
    pairs = st.lists(
        st.tuples(SCALES, SCALES), min_size=len(layer_map), max_size=len(layer_map)
    ).map(tuple)
    return View(draw(NUMBERS), layer_map, tuple(cuts), draw(st.none() | pairs))


PARTS = st.builds(
    Part,
    sequence=NUMBERS,
    view=NUMBERS,
    length=st.integers(0, MOST_TOKENS),
    offset=NUMBERS,
    marks=st.lists(NUMBERS, max_size=5).map(tuple),
    wanted=st.booleans(),
)
STEPS = st.builds(
    Step,
    parts=st.lists(PARTS, max_size=9),
    changes=st.lists(st.tuples(st.sampled_from(What), NUMBERS, NUMBERS, NUMBERS), max_size=40),
    views=st.lists(views(), max_size=3),
)


def heard(arrays: Sequence[Numbers], serial: int) -> Announcement:
    head, *rest = arrays
    assert Announcement.more(head) == sum(map(len, rest))
    return Announcement.of(head, rest[0] if rest else None, serial)


@given(STEPS)
def test_a_step_comes_as_it_was_sent(step: Step) -> None:
    assert Step.of(step.body()) == step


@given(st.sampled_from(Kind), NUMBERS, st.integers(0, MOST_TOKENS), st.lists(ANY, max_size=600))
def test_an_announcement_comes_as_it_was_sent(
    kind: Kind, serial: int, number: int, body: list[int]
) -> None:
    said = Announcement(kind, serial, number, body)
    arrays = said.packed()
    assert len(arrays[0]) == HEAD
    assert heard(arrays, serial) == said


def read(body: Sequence[int]) -> None:
    """It is the step that it says it is, or refused."""
    with suppress(MachineError):
        assert Step.of(body).body() == body


@given(st.lists(LEAST | ANY, max_size=80))
def test_numbers_that_are_no_step_are_refused(body: list[int]) -> None:
    read(body)


@given(STEPS, st.data())
def test_a_step_with_a_wrong_number_is_another_or_refused(step: Step, data: st.DataObject) -> None:
    body = step.body()
    body[data.draw(st.integers(0, len(body) - 1))] = data.draw(LEAST | ANY)
    read(body)


@pytest.mark.parametrize("at", range(5))
def test_a_number_that_can_not_be_is_refused(at: int) -> None:
    wrong = {0: MAGIC + 1, 1: len(Kind), 2: 8, 3: MOST_TOKENS + 1, 4: MOST_BODY + 1}
    for number in (wrong[at], -1):
        (head,) = Announcement(Kind.STEP, 7, 3, [1, 2]).packed()
        head[at] = number
        with pytest.raises(MachineError):
            heard([head], 7)


@pytest.mark.parametrize("kind", BEATS)
def test_beats_count_for_nothing(kind: Kind) -> None:
    assert heard(Announcement(kind, 3, 100).packed(), 9).number == 100


@given(st.binary(min_size=4 * HEAD, max_size=4 * HEAD))
def test_random_numbers_are_no_announcement(data: bytes) -> None:
    with pytest.raises(MachineError):
        heard([np.frombuffer(data, dtype=np.int32)], 0)


# Last words.


@given(st.sampled_from(Why), st.integers(0, 3), st.integers(1, SEEN + 3))
def test_last_words_are_understood_in_place_of_any_array(why: Why, value: int, count: int) -> None:
    word = Word(why, value)
    said = np.full(count, word.number, dtype=np.int32)
    assert Word.of(said, 4) == word
    assert -(2**31) <= Word(Why.WAITING, (1 << MOST_MACHINES) - 1).number < 2**31
    assert (np.abs(said.view(np.float32)) > 1e37).all()  # no hidden state


@given(st.lists(ANY, min_size=2, max_size=12))
def test_other_arrays_are_no_last_words(numbers: list[int]) -> None:
    assert Word.of(np.array(numbers, dtype=np.int32), 4) is None
    assert Word.of(np.zeros(0, dtype=np.int32), 4) is None


@given(st.integers(2, 8), st.data())
def test_who_waits_names_the_machine_that_does_not(machines: int, data: st.DataObject) -> None:
    """Where each of the others has said that it waits."""
    stopped = data.draw(st.integers(0, machines - 1))
    rank = data.draw(st.integers(0, machines - 1).filter(lambda r: r != stopped))
    everyone = (1 << machines) - 1
    assert silent(everyone & ~(1 << stopped), rank, machines) == stopped
    assert silent(everyone, rank, machines) is None
    assert silent(1 << rank, rank, machines) == (rank - 1) % machines
