"""Caches of several rows: what each query sees, and what a row gets back when it leaves."""

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import slow
from hypothesis import given, settings
from hypothesis import strategies as st
from test_together import tiny_views

from mlx_cerebrum.model import rows as module
from mlx_cerebrum.model.cache import STEP, WindowedKVCache
from mlx_cerebrum.model.entries import unpack
from mlx_cerebrum.model.rows import Rows
from mlx_cerebrum.model.together import Part, run_together

EXAMPLES = int(os.environ.get("CEREBRUM_TEST_ROWS", "50"))  # of the random walk
WIDTH = 32
POSITIONS = 2


def entries(payload: Sequence[Sequence[int]]) -> mx.array:
    """Keys `[B, 1, L, WIDTH]`, each of which is its payload's number."""
    numbers = mx.array(np.array(payload, dtype=np.float32)[:, None, :, None])
    return mx.broadcast_to(numbers, (*numbers.shape[:3], WIDTH))


def payload(keys: Any) -> np.ndarray[Any, Any]:
    return np.array(unpack(keys, WIDTH))[:, 0, :, 0].round().astype(int)


@dataclass
class Row:
    """A sequence of numbered entries, and the caches that should hold the last of them."""

    own: list[WindowedKVCache]
    seen: list[int] = field(default_factory=list)
    highest: int = 0  # as many as it ever saw

    def taken(self, new: Sequence[int]) -> None:
        self.seen += new
        self.highest = max(self.highest, len(self.seen))

    def alone(self, new: Sequence[int]) -> None:
        """`new` come while it has its own caches; each query must see what it should."""
        for c in self.own:
            mask = c.make_mask(len(new), return_array=True)
            keys, values = c.update_and_fetch(entries([new]), -entries([new]))
            self.check(payload(keys)[0], -payload(values)[0], new, np.array(mask))
        self.taken(new)

    def check(
        self, keys: Sequence[int], values: Sequence[int], new: Sequence[int], mask: Any
    ) -> None:
        """Query by query, `mask` `[L, T]` shows it its window's entries, each once."""
        assert list(keys) == list(values)
        whole, window = [*self.seen, *new], self.own[0].window or 10**9
        for i in range(len(new)):
            end = len(self.seen) + i + 1
            shown = sorted(np.asarray(keys)[mask[i]])
            assert shown == sorted(whole[max(0, end - window) : end])

    def can_take_back(self) -> int:
        return self.own[0].rewind - (self.highest - len(self.seen))


class Several:
    """Rows with everything they should hold."""

    def __init__(self, window: int | None, rewind: int, step: int, bits: int | None = None) -> None:
        self.options = (window, rewind, step, bits)
        self.number = 0  # of the last entry
        self.rows: Rows | None = None
        self.members: list[Row] = []

    def numbers(self, count: int) -> list[int]:
        self.number += count
        return list(range(self.number - count + 1, self.number + 1))

    def fresh(self, *chunks: int) -> Row:
        row = Row([WindowedKVCache(*self.options) for _ in range(POSITIONS)])
        for count in chunks:
            row.alone(self.numbers(count))
        return row

    def join(self, row: Row) -> None:
        if self.rows is None:
            self.rows = Rows(row.own)
        self.rows.join(row.own)
        self.members.append(row)

    def leave(self, at: int) -> Row:
        assert self.rows is not None
        self.rows.leave(at)
        row = self.members.pop(at)
        assert {c.offset for c in row.own} == {len(row.seen)}
        return row

    def step(self, lengths: Sequence[int], counted: bool = True) -> None:
        rows = self.rows
        assert rows is not None
        new = [self.numbers(count) for count in lengths]
        most = max(lengths)
        rows.begin(lengths)
        assert rows.next_positions.tolist() == [len(row.seen) for row in self.members]
        padded = entries([[*one, *[0] * (most - len(one))] for one in new])
        for c in rows.caches:
            keys, values = (payload(kv) for kv in c.update_and_fetch(padded, -padded))
            shape = (len(lengths), most, keys.shape[1])
            mask = np.ones(shape, bool) if rows.mask is None else np.array(rows.mask)[:, 0]
            assert mask.shape == shape
            assert mask.any(axis=-1).all()  # padding sees itself
            for i, row in enumerate(self.members):
                row.check(keys[i], -values[i], new[i], mask[i])
        if counted:
            rows.commit()
            for row, one in zip(self.members, new, strict=True):
                row.taken(one)

    def take_back(self, counts: Sequence[int]) -> None:
        assert self.rows is not None
        self.rows.take_back(counts)
        for row, count in zip(self.members, counts, strict=True):
            row.seen = row.seen[: len(row.seen) - count]
        assert self.rows.offsets.tolist() == [len(row.seen) for row in self.members]


def check_marks(row: Row) -> None:
    """Every mark that its caches have seen can be gone back to, the latest first."""
    for point in reversed([p for p in row.own[0].marks if p <= len(row.seen)]):
        for c in row.own:
            assert c.reachable(point) == point
            c.rewind_to(point)
        row.seen = row.seen[:point]
        row.alone([10**6])
        row.seen.pop()
        for c in row.own:
            c.trim(1)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([None, 2, 5, 12]))
@slow
def test_each_query_sees_its_window(seed: int, window: int | None) -> None:
    """Whatever joins, leaves, is taken back or interrupted; and marks stay good meanwhile."""
    draw = random.Random(seed)
    there = Several(window, rewind=draw.choice([1, 4, 9]), step=draw.choice([1, 3, 8]))
    waiting: list[Row] = []
    for _ in range(40):
        action = draw.random()
        if action < 0.15 and len(there.members) + len(waiting) < 5:
            waiting.append(there.fresh(*(draw.randint(1, 9) for _ in range(draw.randint(1, 3)))))
        elif action < 0.3 and waiting:
            row = waiting.pop(draw.randrange(len(waiting)))
            if draw.random() < 0.5:
                for c in row.own:
                    c.mark()
            there.join(row)
        elif action < 0.4 and there.members:
            row = there.leave(draw.randrange(len(there.members)))
            if draw.random() < 0.3:
                check_marks(row)
            else:
                waiting.append(row)
        elif action < 0.5:
            for row in waiting:
                row.alone(there.numbers(draw.choice([1, 4])))
        elif there.members:
            lengths = [draw.choice([0, 1, 1, 2, 6]) for _ in there.members]
            if not any(lengths):
                continue
            there.step(lengths, counted=draw.random() < 0.9)
            if draw.random() < 0.5:
                most = [min(row.can_take_back(), len(row.seen) - 1) for row in there.members]
                there.take_back([draw.choice([0, count, draw.randint(0, count)]) for count in most])
    for row in [*waiting, *(there.leave(0) for _ in list(there.members))]:
        check_marks(row)


@pytest.mark.parametrize("window", [12, None])
def test_all_that_rewind_allows_can_be_taken_back_right_after_a_compaction(
    window: int | None,
) -> None:
    for before in range(1, 14):  # so that the buffer is full at every place
        there = Several(window, rewind=7, step=4)
        there.join(there.fresh(20))
        there.join(there.fresh(9, 8))
        for _ in range(before):
            there.step([1, 1])
        there.take_back([7, 7])
        there.step([6, 2])
        there.step([1, 1])


def test_more_than_rewind_is_refused() -> None:
    there = Several(12, rewind=7, step=4)
    there.join(there.fresh(20))
    assert there.rows is not None
    with pytest.raises(ValueError, match="can take back 7 tokens, not 8"):
        there.rows.take_back([8])
    with pytest.raises(ValueError, match="together"):
        there.rows.caches[0].trim(1)


def test_rows_leave_in_any_order() -> None:
    for order in ((0, 0, 0), (2, 1, 0), (1, 1, 0), (0, 1, 0)):
        there = Several(12, rewind=7, step=4)
        for count in (30, 17, 24):
            there.join(there.fresh(count))
        there.step([3, 1, 2])
        for at in order:
            row = there.leave(at)
            row.alone(there.numbers(1))
            if there.members:
                there.step([1] * len(there.members))
        assert there.rows is not None
        assert there.rows.nbytes == 0


@pytest.mark.parametrize("window", [12, None])
def test_a_step_that_was_not_counted_leaves_nothing(window: int | None) -> None:
    """Its columns may lie within those that a longer newcomer brings."""
    there = Several(window, rewind=7, step=30)
    there.join(there.fresh(4))
    there.step([8], counted=False)
    there.join(there.fresh(15))
    for _ in range(12):
        there.step([1, 1])
    there.leave(0).alone(there.numbers(1))


# Memory.


def failing(original: Callable[..., Any], at: int) -> Callable[..., Any]:
    """`original`, which has no memory the `at`-th time."""
    calls = iter(range(10**6))

    def instead(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            raise RuntimeError("no memory")
        return original(*args, **kwargs)

    return instead


@pytest.mark.parametrize("others", [0, 2])
@pytest.mark.parametrize("what", ["eval", "lent", "concatenate"])
@pytest.mark.parametrize("at", range(POSITIONS))
def test_a_row_that_has_no_memory_to_join(
    others: int, what: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are as they were, the newcomer with its marks; and it may try again."""
    there = Several(12, rewind=7, step=4)
    newcomer = there.fresh(30)
    for c in newcomer.own:
        c.mark()
    newcomer.alone(there.numbers(25))
    there.rows = Rows(newcomer.own)
    for _ in range(others):
        there.join(there.fresh(21))
        there.step([1] * len(there.members))
    with monkeypatch.context() as patch:
        place = WindowedKVCache if what == "lent" else mx
        patch.setattr(place, what, failing(getattr(place, what), at))
        with pytest.raises(RuntimeError, match="no memory"):
            there.join(newcomer)
    newcomer.alone(there.numbers(2))
    assert len(there.rows) == others
    if others:
        there.step([2, 1])
    there.join(newcomer)
    there.step([1] * len(there.members))
    if others:
        there.leave(0)
    check_marks(there.leave(len(there.members) - 1))


def test_a_row_that_has_no_memory_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has not left."""
    there = Several(12, rewind=7, step=4)
    there.join(there.fresh(21))
    there.join(there.fresh(17))
    assert there.rows is not None
    with monkeypatch.context() as patch:
        patch.setattr(mx, "eval", failing(mx.eval, 0))
        with pytest.raises(RuntimeError, match="no memory"):
            there.rows.leave(0)
    there.step([1, 2])
    there.leave(0).alone(there.numbers(1))
    there.step([1])


def room(row: Row) -> int:
    """Entries that a sequence alone has room for, as `decoder._alike` reckons."""
    cache, seen = row.own[0], len(row.seen)
    kept = seen if cache.window is None else min(seen, cache.window - 1 + cache.rewind)
    return kept + STEP


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("window", [300, None])
@pytest.mark.parametrize("short", [1, 44, 256, 300])
@pytest.mark.one_in(5)
def test_bytes_are_twice_those_of_the_rows_alone_at_most(
    bits: int | None, window: int | None, short: int
) -> None:
    """As long as the longest has room for twice the shortest's entries; predicted as numbers."""
    there = Several(window, rewind=64, step=STEP, bits=bits)
    longest = 2 * (short + STEP) - STEP
    chunk = (256,) * (longest // 256) + ((longest % 256,) if longest % 256 else ())
    for row in (there.fresh(*chunk), there.fresh(short), there.fresh(short), there.fresh(short)):
        there.join(row)
    rows = there.rows
    assert rows is not None
    dense = WIDTH * 4
    packed = {8: WIDTH + 8, 4: WIDTH // 2 + 8}  # with a scale and a bias in float32
    each = 2 * POSITIONS * (dense if bits is None else packed[bits])

    def within() -> None:
        most = 2 * sum(map(room, there.members)) * each
        assert rows.nbytes <= most
        assert rows.nbytes % (each * len(there.members)) == 0

    within()
    for turn in range(40):  # padding and guesses taken back leave holes
        lengths = [8 if turn % len(there.members) == i else 1 for i in range(len(there.members))]
        rows.begin(lengths)
        new = mx.zeros((len(lengths), 1, 8, WIDTH))
        for c in rows.caches:
            c.update_and_fetch(new, new)
        rows.commit()
        for row, count in zip(there.members, lengths, strict=True):
            row.seen += [0] * count
        there.take_back([count - 1 for count in lengths])
        within()
    while rows.used + 8 <= rows.columns.shape[1]:  # until there is no room, most of it holes
        rows.begin([8] * len(rows))
        rows.commit()
        rows.take_back([7] * len(rows))
        for row in there.members:
            row.seen += [0]
    there.join(there.fresh(len(there.members[-1].seen)))
    within()
    there.members.pop(0)
    rows.leave(0)
    within()


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_entries_are_those_of_one_row_bit_for_bit(bits: int) -> None:
    random_state = np.random.default_rng(4)

    def new(count: int) -> mx.array:
        return mx.array(random_state.standard_normal((1, 2, count, WIDTH)).astype(np.float32))

    own, alone = ([WindowedKVCache(12, 7, 4, bits) for _ in range(2)] for _ in range(2))
    for mine, theirs, count in zip(own, alone, (20, 14), strict=True):
        start = new(count)
        for c in (mine, theirs):
            c.update_and_fetch(start, -start)
    rows = Rows(own[:1])
    for mine in own:
        rows.join([mine])
    for lengths in ([1, 1], [3, 1], [1, 6], [1, 0], [2, 2], [1, 1], [1, 1]):
        most = max(lengths)
        both = [new(count) if count else None for count in lengths]
        padded = [
            mx.zeros((1, 2, most, WIDTH))
            if part is None
            else mx.pad(part, [(0, 0), (0, 0), (0, most - part.shape[2]), (0, 0)])
            for part in both
        ]
        together = mx.concatenate(padded)
        rows.begin(lengths)
        rows.caches[0].update_and_fetch(together, -together)
        rows.commit()
        for theirs, part in zip(alone, both, strict=True):
            if part is not None:
                theirs.update_and_fetch(part, -part)
    for mine, theirs in zip(own, alone, strict=True):
        rows.leave(0)
        assert mine.offset == theirs.offset
        for ours, wanted in zip(mine.state[:2], theirs.state[:2], strict=True):
            for a, b in zip(ours, wanted, strict=True):
                count = min(a.shape[2], b.shape[2], 11)
                assert count == 11
                assert mx.array_equal(a[..., -count:, :], b[..., -count:, :])


@pytest.mark.parametrize("window", [12, None])
def test_padded_queries_give_numbers(window: int | None) -> None:
    model = tiny_views(window)[1]
    rows = None
    for count in (20, 3, 9):
        own = [WindowedKVCache(window, 7, 4) for _ in model.config.layer_map]
        model(mx.array([[5] * count]), own)
        rows = rows or Rows(own)
        rows.join(own)
    assert rows is not None
    for lengths in ([1, 8, 0], [0, 0, 1], [8, 1, 1], [5, 8, 2]):
        rows.begin(lengths)
        tokens = mx.full((3, max(lengths)), 7)
        (h,) = run_together([Part(model, tokens, rows.caches)])
        rows.commit()
        assert mx.isfinite(model.logits(h)).all().item()


# Faults that these tests must notice.


def without_window(rows: Rows, lengths: Sequence[int]) -> None:
    window, rows.window = rows.window, None
    begin(rows, lengths)
    rows.window = window


def no_holes(rows: Rows, counts: Sequence[int]) -> None:
    rows.offsets = rows.offsets - np.asarray(counts)


def swapped(rows: Rows, lengths: Sequence[int]) -> None:
    rows.offsets = rows.offsets[::-1]
    begin(rows, lengths)
    rows.offsets = rows.offsets[::-1]


def keeps_no_rewind(rows: Rows) -> np.ndarray[Any, Any]:
    first = rows.offsets - (rows.window or 0)
    return np.asarray(first + 1)


def all_that_happens() -> None:
    there = Several(12, rewind=7, step=4)
    for count in (30, 17):
        row = there.fresh(count)
        for c in row.own:
            c.mark()
        there.join(row)
    for _ in range(9):
        there.step([3, 2])
        there.take_back([1, 0])
    there.take_back([6, 7])
    there.step([1, 1])
    for _ in range(20):
        there.step([1, 1])
    check_marks(there.leave(0))


begin = Rows.begin
FAULTS: dict[str, list[Callable[..., Any]]] = {
    "begin": [without_window, swapped],
    "take_back": [no_holes],
    "_kept": [keeps_no_rewind],
    "_set_aside": [lambda rows, kept: None],
}


@pytest.mark.parametrize(
    ("name", "fault"), [(name, fault) for name, faults in FAULTS.items() for fault in faults]
)
def test_a_fault_would_be_noticed(
    name: str, fault: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.Rows, name, fault)
    with pytest.raises(AssertionError):
        all_that_happens()


def test_without_a_fault_all_is_well() -> None:
    all_that_happens()
