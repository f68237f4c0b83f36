"""The windowed cache: what is visible, what is kept, what can be taken back. All as numbers."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import resting, slow
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_cerebrum.model.cache import (
    STEP,
    WindowedKVCache,
    attention_mask,
    causal_mask,
    entries_held,
)
from mlx_cerebrum.model.entries import Packed


def entries(start: int, length: int) -> mx.array:
    """Keys whose value is their token's number: `[1, 1, length, 1]`."""
    return mx.arange(start, start + length, dtype=mx.float32).reshape(1, 1, length, 1)


def feed(cache: WindowedKVCache, length: int) -> list[int]:
    """Append `length` tokens; the token numbers that came back."""
    keys = entries(cache.offset, length)
    fetched, values = cache.update_and_fetch(keys, keys + 0.5)
    assert mx.array_equal(fetched + 0.5, values)
    return [int(x) for x in np.array(fetched).reshape(-1)]


def test_window_counts_the_query_itself() -> None:
    mask = causal_mask(5, 0, 3)
    assert mx.sum(mask, axis=1).tolist() == [1, 2, 3, 3, 3]
    assert mask[4].tolist() == [False, False, True, True, True]


def test_mask_after_earlier_tokens() -> None:
    # Two visible keys before three queries, window 3: the first query sees 0, 1 and itself.
    assert causal_mask(3, 2, 3).tolist() == [
        [True, True, True, False, False],
        [False, True, True, True, False],
        [False, False, True, True, True],
    ]


def test_cheapest_mask() -> None:
    assert attention_mask(1, 0, 4) is None
    assert attention_mask(1, 3, 4) is None
    assert attention_mask(4, 0, 4) == "causal"
    assert attention_mask(4, 0, None) == "causal"
    assert isinstance(attention_mask(5, 0, 4), mx.array)
    assert isinstance(attention_mask(2, 3, 4), mx.array)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 12])
def test_visible_entries_are_the_window(chunk: int) -> None:
    cache = WindowedKVCache(window=4, rewind=2, step=5)
    for start in range(0, 60, chunk):
        assert feed(cache, chunk) == list(range(max(0, start - 3), start + chunk))


def test_room_is_predicted_at_once_however_many_tokens() -> None:
    """A prompt cache asks for two windows, and a config may say any window."""
    most = 10**12
    assert entries_held(most, 2 * most + 1, most, 512) == most - 1 + 64 + 513
    assert entries_held(None, most + 1, 256, 513) == most + 257
    assert entries_held(None, 1, most, 512) == most


@given(
    window=st.one_of(st.none(), st.integers(1, 900)),
    prompt=st.integers(1, 1500),
    generated=st.integers(1, 900),
    step=st.sampled_from([1, 100, 256, 512]),
)
@settings(deadline=None, max_examples=25)
@slow
def test_room_is_predicted_exactly(
    window: int | None, prompt: int, generated: int, step: int
) -> None:
    cache, most = WindowedKVCache(window), 0
    for start in range(0, prompt - 1, step):
        feed(cache, min(step, prompt - 1 - start))
        most = max(most, cache.nbytes)
    for _ in range(generated):
        feed(cache, 1)
        most = max(most, cache.nbytes)
    assert most == 2 * 4 * entries_held(window, prompt, generated, step)


def test_no_window_keeps_everything() -> None:
    cache = WindowedKVCache(step=8)
    for n in range(40):
        assert feed(cache, 1) == list(range(n + 1))
    assert cache.rewindable() == 40


def test_bounded_memory() -> None:
    cache = WindowedKVCache(window=16, rewind=4, step=8)
    most = 0
    for _ in range(500):
        feed(cache, 1)
        most = max(most, cache.nbytes)
    assert most == 2 * 4 * (16 - 1 + 4 + 8)  # keys and values, float32: window - 1 + rewind + step


@given(
    window=st.integers(1, 9),
    rewind=st.integers(1, 5),
    step=st.integers(1, 6),
    chunks=st.lists(st.integers(1, 8), min_size=1, max_size=25),
)
@settings(deadline=None, max_examples=60)
def test_rollback_is_as_if_never_seen(
    window: int, rewind: int, step: int, chunks: list[int]
) -> None:
    cache = WindowedKVCache(window, rewind, step)
    for chunk in chunks:
        feed(cache, chunk)
        back = min(rewind, cache.offset)
        assert cache.trim(back) == back
        offset = cache.offset
        assert feed(cache, back) == list(range(max(0, offset - window + 1), offset + back))


@slow
def test_rollback_at_every_offset() -> None:
    """Every rewind of up to 6 tokens, at every offset across several compactions."""
    for offset in range(1, 60):
        for back in range(1, min(6, offset) + 1):
            cache = WindowedKVCache(window=5, rewind=6, step=7)
            for _ in range(offset):
                feed(cache, 1)
            cache.trim(back)
            assert feed(cache, 1) == list(range(max(0, offset - back - 4), offset - back + 1))


def test_rollback_beyond_what_is_kept_raises() -> None:
    cache = WindowedKVCache(window=4, rewind=2, step=1)
    feed(cache, 3)
    for _ in range(40):
        feed(cache, 1)
    kept = cache.rewindable()
    assert kept >= 2
    with pytest.raises(ValueError, match="can take back"):
        cache.trim(kept + 1)
    assert cache.offset == 43


def test_trim_of_more_than_there_is_empties() -> None:
    cache = WindowedKVCache(window=4)
    feed(cache, 3)
    with pytest.raises(ValueError, match="-1"):
        cache.trim(-1)
    assert cache.trim(10) == 3
    assert cache.offset == 0
    assert feed(cache, 2) == [0, 1]


def test_saved_state_continues() -> None:
    cache = WindowedKVCache(window=4, rewind=2, step=3)
    for _ in range(11):
        feed(cache, 1)
    other = WindowedKVCache.from_state(cache.state)
    assert (other.window, other.rewind, other.step) == (4, 2, 3)
    for length in (2, 1, 1, 4, 1, 7, 1):
        assert feed(cache, length) == feed(other, length)
        assert cache.nbytes >= other.nbytes > 0


def test_state_says_how_entries_are_held() -> None:
    cache = WindowedKVCache(window=4, rewind=2, step=3, kv_bits=8)
    assert cache.state == (None, None, 0, 0, 4, 2, 3, 8)
    keys = mx.zeros((1, 1, 2, 32))
    cache.update_and_fetch(keys, keys)
    other = WindowedKVCache.from_state(cache.state)
    assert (other.kv_bits, other.window, other.offset) == (8, 4, 2)
    assert isinstance(other.keys, Packed)
    assert WindowedKVCache.from_state(WindowedKVCache().state).window is None


def test_a_mark_outlives_the_window_and_costs_one() -> None:
    cache = WindowedKVCache(window=6, rewind=2, step=4)
    feed(cache, 9)
    cache.mark()
    for _ in range(40):
        feed(cache, 1)
    live = 2 * 4 * cache.keys.shape[2]
    assert cache.nbytes == live + 2 * 4 * 5  # window - 1 entries, keys and values
    assert [cache.reachable(n) for n in (49, 20, 10, 9, 8, 0)] == [49, 9, 9, 9, 0, 0]
    with pytest.raises(ValueError, match="gone"):
        cache.rewind_to(20)
    cache.rewind_to(9)
    assert (cache.offset, cache.marks) == (9, (9,))
    assert feed(cache, 2) == list(range(4, 11))
    for _ in range(40):
        feed(cache, 1)
    cache.drop_mark()
    assert (cache.marks, cache.reachable(20)) == ((), 0)
    assert cache.nbytes == 2 * 4 * cache.keys.shape[2]


def test_a_point_yet_to_come_is_marked() -> None:
    cache = WindowedKVCache(window=6, rewind=2, step=4)
    cache.mark(23)
    for _ in range(8):
        feed(cache, 7)
    assert cache.reachable(40) == 23
    assert cache.entries_for_marks() == 5


def test_marks_less_than_a_window_apart_keep_what_is_between() -> None:
    cache = WindowedKVCache(window=6, rewind=2, step=4)
    for mark in (10, 15, 19, 30):
        cache.mark(mark)
    for _ in range(50):
        feed(cache, 1)
    reach = [n for n in range(40) if cache.reachable(n) == n]
    assert reach == [0, *range(10, 20), 30]
    assert cache.entries_for_marks() == (19 - 5) + (30 - 25)
    assert cache.whole().start > 30
    cache.rewind_to(30)
    assert (cache.whole().start, cache.whole().end) == (25, 30)
    feed(cache, 3)
    for _ in range(20):
        feed(cache, 1)
    cache.rewind_to(17)
    assert cache.marks == (10, 15)
    assert cache.whole().start == 5
    assert feed(cache, 1) == list(range(12, 18))


def test_without_a_window_every_point_stays() -> None:
    cache = WindowedKVCache(step=4)
    for _ in range(30):
        feed(cache, 1)
    assert all(cache.reachable(n) == n for n in range(31))
    cache.rewind_to(11)
    assert feed(cache, 2) == list(range(13))


class Everything:
    """A cache that forgets nothing: what WindowedKVCache must look like."""

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.seen: list[int] = []

    def feed(self, new: list[int]) -> list[int]:
        first = 0 if self.window is None else max(0, len(self.seen) - (self.window - 1))
        self.seen += new
        return self.seen[first:]


OPERATIONS = st.one_of(
    st.tuples(st.just("feed"), st.integers(1, 12)),
    st.tuples(st.just("feed"), st.integers(1, 3)),
    st.tuples(st.just("trim"), st.integers(0, 9)),
    st.tuples(st.just("mark"), st.integers(0, 6)),
    st.tuples(st.just("rewind"), st.integers(0, 60)),
    st.tuples(st.just("drop"), st.just(0)),
)


@given(
    window=st.one_of(st.none(), st.integers(1, 9)),
    rewind=st.integers(1, 4),
    step=st.integers(1, 5),
    operations=st.lists(OPERATIONS, min_size=5, max_size=40),
)
@settings(deadline=None, max_examples=60)
def test_going_back_is_as_if_never_seen(
    window: int | None, rewind: int, step: int, operations: list[tuple[str, int]]
) -> None:
    cache, whole = WindowedKVCache(window, rewind, step), Everything(window)
    fed = 0  # every entry ever fed is another number: one taken back is told apart

    def append(count: int) -> None:
        nonlocal fed
        keys = entries(fed, count)
        fetched, values = cache.update_and_fetch(keys, keys + 0.5)
        assert mx.array_equal(fetched + 0.5, values)
        found = [int(x) for x in np.array(fetched).reshape(-1)]
        assert found == whole.feed(list(range(fed, fed + count)))
        fed += count

    for kind, amount in operations:
        if kind == "feed":
            append(amount)
        elif kind == "trim":
            taken = cache.trim(min(amount, cache.rewindable()))
            del whole.seen[len(whole.seen) - taken :]
        elif kind == "mark":
            cache.mark(cache.offset + amount)
        elif kind == "drop":
            cache.drop_mark()
        else:
            wanted = max(0, cache.offset - amount)
            point = cache.reachable(wanted)
            # A window of one token sees nothing before it: nothing is set aside for a mark.
            marked = [mark for mark in cache.marks if mark <= wanted] if window != 1 else []
            assert max([0, *marked]) <= point <= wanted
            if amount <= cache.rewindable():
                assert point == wanted
            cache.rewind_to(point)
            del whole.seen[point:]
        assert cache.offset == len(whole.seen)
        live = 0 if cache.keys is None else cache.keys.shape[2]
        assert cache.nbytes // 8 - live <= cache.entries_for_marks()
    append(1)


def test_another_window_is_refused() -> None:
    with pytest.raises(ValueError, match="window"):
        WindowedKVCache(window=4).make_mask(3, window_size=5)


def test_mask_matches_what_is_fetched() -> None:
    cache = WindowedKVCache(window=4, rewind=2, step=3)
    for length in (1, 6, 1, 2, 5, 3):
        mask = cache.make_mask(length, return_array=True)
        assert isinstance(mask, mx.array)
        assert mx.array_equal(mask, causal_mask(length, cache.size(), 4))
        assert mask.shape == (length, len(feed(cache, length)))


@pytest.mark.parametrize("length", [STEP, 2 * STEP])
def test_a_chunk_that_fills_the_buffer_is_copied(length: int) -> None:
    """Keys are a view of a larger array, as qkv_proj's output is; only they may stay."""
    mx.synchronize()
    before = resting()
    cache = WindowedKVCache()
    both = mx.zeros((1, 20, length, 32)) + 1
    _, keys = mx.split(both, [16], axis=1)
    cache.update_and_fetch(keys, keys)
    mx.eval(cache.keys, cache.values)
    del both, keys, _
    mx.synchronize()
    assert mx.get_active_memory() - before <= 1.1 * cache.nbytes


def test_a_point_is_reachable_only_with_its_whole_window() -> None:
    """What is set aside ends before the point asked for: the point it can go to counts."""
    from mlx_cerebrum.model.rewind import Marks, Stretch

    marks = Marks(20)
    keys = mx.zeros((1, 1, 10, 4))
    marks.aside = [Stretch(keys, keys, 150, 160)]
    assert marks.reachable(190, 300, 400) == 0
