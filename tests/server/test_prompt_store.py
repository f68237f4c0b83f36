"""Prompts that begin as earlier ones did take over what was computed, and change no token."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import pytest
from conftest import resting, slow, write_checkpoint
from tiny import tiny_config, tiny_prompt, tiny_weights

from mlx_cerebrum import load
from mlx_cerebrum.decoding.decoder import generate_step
from mlx_cerebrum.decoding.prompt_cache import PromptCache
from mlx_cerebrum.decoding.prompt_store import PromptStore
from mlx_cerebrum.model.cache import REWIND, STEP
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.server.batch import Batch
from mlx_cerebrum.server.jobs import Event, Job, Piece
from mlx_cerebrum.server.task import Counts, Task
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer

WINDOW = 12
CONFIG = tiny_config(
    num_hidden_layers=2, vocab_size=260, max_position_embeddings=2048, sliding_window=WINDOW
)
KEY = ("someone", "m")
ROOM = 10**8
Loaded = tuple[Model, Tokenizer]


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    directory = tmp_path_factory.mktemp("prefix") / "m"
    return load(str(write_checkpoint(directory, CONFIG, tiny_weights(CONFIG, seed=3))))


@pytest.fixture(scope="module")
def unlimited(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    directory = tmp_path_factory.mktemp("prefix") / "m"
    return load(str(write_checkpoint(directory, CONFIG, tiny_weights(CONFIG, seed=3))), window=0)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(tiny_prompt(CONFIG, length, seed))


def read(model: Model, tokens: Sequence[int], step: int = 100, marks: bool = False) -> PromptCache:
    """A cache that holds `tokens`; with marks where a prompt of one token less would have them."""
    cache = PromptCache(model, max_bytes=None if marks else 0)
    cache.begin([*tokens, 0])
    for start in range(0, len(tokens), step):
        model(mx.array([tokens[start : start + step]]), cache.cache)
    cache.end(tokens)
    return cache


def holding(model: Model, *lengths: int) -> PromptStore:
    store = PromptStore(ROOM)
    for seed, length in enumerate(lengths):
        store.keep(KEY, read(model, prompt(length, seed)))
    return store


def length_found(store: PromptStore, key: object, wanted: Sequence[int]) -> int:
    found = store.find(key, wanted)
    return 0 if found is None else len(found.tokens)


def continuation(model: Model, cache: PromptCache | None, wanted: Sequence[int]) -> list[int]:
    rest = list(wanted) if cache is None else cache.begin(wanted)
    caches = None if cache is None else cache.cache
    return list(generate_step(rest, model, max_tokens=30, cache=caches))


@pytest.mark.parametrize("length", [1, 5, 11, 12, 13, 40])
@pytest.mark.parametrize("more", [1, 2, 30])
@pytest.mark.one_in(5)
def test_a_longer_prompt_goes_on_from_all_of_it(windowed: Loaded, length: int, more: int) -> None:
    model, _ = windowed
    wanted = prompt(length + more)
    found = holding(model, length).find(KEY, wanted)
    assert found is not None
    assert len(found.tokens) == length
    assert continuation(model, found, wanted) == continuation(model, None, wanted)


@pytest.mark.parametrize("shared", [1, 5, 10])
def test_within_the_window_it_goes_back(windowed: Loaded, shared: int) -> None:
    model, _ = windowed
    wanted = prompt(shared) + prompt(20, seed=9)
    found = holding(model, 11).find(KEY, wanted)
    assert found is not None
    assert len(found.tokens) == shared
    assert continuation(model, found, wanted) == continuation(model, None, wanted)


@pytest.mark.parametrize("length", [WINDOW + REWIND, 140])
def test_past_the_window_it_goes_back_a_little(windowed: Loaded, length: int) -> None:
    model, _ = windowed
    store = holding(model, length)
    for back in (1, REWIND):
        wanted = prompt(length - back) + prompt(20, seed=9)
        found = store.find(KEY, wanted)
        assert found is not None
        assert len(found.tokens) == length - back
        assert continuation(model, found, wanted) == continuation(model, None, wanted)
    assert store.find(KEY, prompt(length - REWIND - 1) + prompt(20, seed=9)) is None


def test_past_the_window_it_goes_back_to_a_question(windowed: Loaded) -> None:
    """As far as the question that was asked, wherever it begins."""
    model, _ = windowed
    store = PromptStore(ROOM)
    cache = read(model, prompt(50), marks=True)
    longer = prompt(50) + prompt(120, seed=5)
    model(mx.array([cache.begin([*longer, 0])[:-1]]), cache.cache)
    cache.end(longer)
    store.keep(KEY, cache)
    wanted = prompt(50) + prompt(20, seed=9)
    found = store.find(KEY, wanted)
    assert found is not None
    assert len(found.tokens) == 50
    assert continuation(model, found, wanted) == continuation(model, None, wanted)


def test_without_a_window_any_point_will_do(unlimited: Loaded) -> None:
    model, _ = unlimited
    wanted = prompt(33) + prompt(20, seed=9)
    store = holding(model, 40)
    found = store.find(KEY, wanted)
    assert found is not None
    assert len(found.tokens) == 33
    assert continuation(model, found, wanted) == continuation(model, None, wanted)
    assert length_found(store, KEY, prompt(40)) == 39
    assert length_found(store, KEY, prompt(7)) == 6
    assert store.find(KEY, prompt(1)) is None


def test_using_an_entry_does_not_change_it(windowed: Loaded) -> None:
    model, _ = windowed
    store = holding(model, 11)
    wanted = prompt(11) + prompt(20, seed=9)
    expected = continuation(model, None, wanted)
    for _ in range(3):
        assert continuation(model, store.find(KEY, wanted), wanted) == expected
        other = prompt(6) + prompt(9, seed=4)
        found = store.find(KEY, other)
        assert found is not None
        assert len(found.tokens) == 6
        assert continuation(model, found, other) == continuation(model, None, other)


def test_the_longest_is_taken(unlimited: Loaded) -> None:
    model, _ = unlimited
    store = PromptStore(ROOM)
    for tokens in (prompt(9) + prompt(5, seed=1), prompt(12) + prompt(5, seed=2)):
        store.keep(KEY, read(model, tokens))
    assert length_found(store, KEY, prompt(30)) == 12


def test_nothing_is_shared_between_owners_or_models(unlimited: Loaded) -> None:
    model, _ = unlimited
    store = holding(model, 20)
    assert store.find(("someone else", "m"), prompt(30)) is None
    assert store.find(("someone", "m2"), prompt(30)) is None
    assert length_found(store, KEY, prompt(30)) == 20


def test_what_a_longer_one_covers_is_given_up(windowed: Loaded, unlimited: Loaded) -> None:
    for (model, _), kept in ((unlimited, 1), (windowed, 2)):
        store = holding(model, 5)
        store.keep(KEY, read(model, prompt(90)))
        assert len(store) == kept  # past the window, the longer one can't go back
        store.keep(KEY, read(model, prompt(90)))
        assert len(store) == kept
        assert store.nbytes == sum(e.nbytes for e in store._entries.values())


def test_the_least_recently_used_goes_first(unlimited: Loaded) -> None:
    model, _ = unlimited
    one = holding(model, 20).nbytes
    store = PromptStore(3 * one)
    for seed in (1, 2, 3):
        store.keep(KEY, read(model, prompt(20, seed)))
    assert length_found(store, KEY, prompt(21, 1)) == 20
    store.keep(KEY, read(model, prompt(20, 4)))
    assert [length_found(store, KEY, prompt(21, seed)) for seed in (1, 2, 3, 4)] == [20, 0, 20, 20]


def test_bytes_are_those_allocated(windowed: Loaded) -> None:
    """A view would keep the buffer it looks into: here a batch's row, a prompt's last chunk."""
    model, _ = windowed
    read(model, prompt(600), step=600)  # the rotation's tables stay
    before = resting()
    store = PromptStore(ROOM)
    store.keep(KEY, read(model, prompt(600), step=600))
    mx.clear_cache()
    taken = mx.get_active_memory() - before
    per_token = CONFIG["num_key_value_heads"] * CONFIG["head_dim"] * 4 * 2 * 2
    assert store.nbytes == (WINDOW - 1 + REWIND) * per_token
    assert taken <= store.nbytes + 16384 * 8  # MLX rounds buffers up


def test_the_bound_holds(unlimited: Loaded) -> None:
    model, _ = unlimited
    one = holding(model, 20).nbytes
    store = PromptStore(int(2.5 * one))
    for seed in range(6):
        store.keep(KEY, read(model, prompt(20, seed)))
        assert store.nbytes <= store.max_bytes
    assert len(store) == 2
    store.keep(KEY, read(model, prompt(51, 7)))  # would take all and more
    assert len(store) == 2
    store.limit(one)
    assert (len(store), store.nbytes) == (1, one)
    store.keep(KEY, read(model, prompt(21, 8)))
    assert (len(store), store.nbytes) == (1, one)
    store.limit(-5)
    assert (len(store), store.nbytes) == (0, 0)
    store.limit(10**12)
    store.keep(KEY, read(model, prompt(51, 7)))
    assert len(store) == 0  # never more than max_bytes
    store.keep(KEY, read(model, prompt(20)))
    store.clear()
    assert (len(store), store.nbytes) == (0, 0)


def test_zero_bytes_keep_nothing(unlimited: Loaded) -> None:
    model, _ = unlimited
    store = PromptStore(0)
    store.keep(KEY, read(model, prompt(20)))
    PromptStore(ROOM).keep(KEY, PromptCache(model))  # which holds nothing
    assert len(store) == 0


def new_batch(model: Model, store: PromptStore, step: int = 8) -> Batch:
    models = {"m": model}
    return Batch(models, store, Counts(), lambda task: None, max_rows=4, prefill_step_size=step)


def five_tokens(batch: Batch, tokenizer: Tokenizer) -> tuple[Task, list[Event]]:
    """A job of 50 tokens that has five so far, and what it was told."""
    events: list[Event] = []
    task = Task(Job("m", prompt(20), 50), tokenizer, events.append, lambda task: None)
    batch.start(task)
    while sum(isinstance(event, Piece) for event in events) < 5:
        batch.step()
    return task, events


def answer(batch: Batch, tokenizer: Tokenizer, ids: Sequence[int], n: int = 1) -> list[Piece]:
    events: list[Event] = []
    task = Task(Job("m", tuple(ids), 7, n=n), tokenizer, events.append, lambda task: None)
    batch.start(task)
    while batch.tasks:
        batch.step()
    return [event for event in events if isinstance(event, Piece)]


def turns(loaded: Loaded, cache_bytes: int, step: int) -> tuple[list[list[int]], list[int]]:
    """A conversation of six turns: its answers, and how much of each prompt was cached."""
    model, tokenizer = loaded
    store = PromptStore(cache_bytes)
    batch = new_batch(model, store, step)
    ids, answers, cached = list(prompt(4)), [], []
    for turn in range(6):
        pieces = answer(batch, tokenizer, ids)
        answers.append([piece.token for piece in pieces])
        cached.append(pieces[0].cached_tokens)
        # The last token of an answer is seldom part of the next prompt (it ends the text).
        ids += [*answers[-1][:-1], *prompt(3 + turn, seed=turn + 1)]
        assert store.nbytes <= cache_bytes
    return answers, cached


@pytest.mark.parametrize("step", [2, 16])
@slow
def test_a_conversation_is_the_same_with_it(windowed: Loaded, unlimited: Loaded, step: int) -> None:
    for loaded in (windowed, unlimited):
        plain, none = turns(loaded, 0, step)
        answers, cached = turns(loaded, ROOM, step)
        assert answers == plain
        assert not any(none)
        assert all(cached[1:])
        assert turns(loaded, 30_000, step)[0] == plain  # some of it given up on the way


def test_the_answer_is_found_too(windowed: Loaded, unlimited: Loaded) -> None:
    for loaded in (windowed, unlimited):
        _, cached = turns(loaded, ROOM, 16)
        lengths = [4]
        for turn in range(5):
            lengths.append(lengths[-1] + 6 + 3 + turn)
        assert cached[1:] == [length + 6 for length in lengths[:-1]]


def test_asking_again_computes_the_last_token_only(windowed: Loaded) -> None:
    model, tokenizer = windowed
    batch = new_batch(model, PromptStore(ROOM))
    first = answer(batch, tokenizer, prompt(40), n=2)
    again = answer(batch, tokenizer, prompt(40), n=2)
    assert {piece.cached_tokens for piece in again} == {39}
    assert [p.token for p in first] == [p.token for p in again]


def test_a_cancelled_answer_is_gone_on_from(unlimited: Loaded) -> None:
    model, tokenizer = unlimited
    batch = new_batch(model, PromptStore(ROOM))
    task, events = five_tokens(batch, tokenizer)
    task.cancel()
    batch.step()
    said = [event.token for event in events if isinstance(event, Piece)]
    longer = [*prompt(20), *said, *prompt(3, seed=1)]
    pieces = answer(batch, tokenizer, longer)
    assert pieces[0].cached_tokens == 20 + len(said) - 1
    assert [piece.token for piece in pieces] == continuation(model, None, longer)[:7]


@pytest.mark.parametrize("with_window", [True, False])
def test_an_answer_cancelled_within_a_step_is_gone_on_from(
    windowed: Loaded, unlimited: Loaded, with_window: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caches then hold a token that nobody was told."""
    model, tokenizer = windowed if with_window else unlimited
    batch = new_batch(model, PromptStore(ROOM))
    task, events = five_tokens(batch, tokenizer)
    real = batch._decoder.step

    def meanwhile() -> Any:
        made = real()
        task.cancel()
        return made

    monkeypatch.setattr(batch._decoder, "step", meanwhile)
    batch.step()
    monkeypatch.undo()
    batch.step()
    said = [event.token for event in events if isinstance(event, Piece)]
    unsaid = continuation(model, None, prompt(20))[: len(said) + 1]
    assert unsaid[:-1] == said
    for last in (unsaid[-1], (unsaid[-1] + 1) % 256):
        longer = [*prompt(20), *said, last, *prompt(3, seed=1)]
        pieces = answer(batch, tokenizer, longer)
        assert [piece.token for piece in pieces] == continuation(model, None, longer)[:7]


def test_going_back_takes_what_is_left_and_no_more(unlimited: Loaded) -> None:
    """A short prompt that begins as a long one did must not copy all of the long one's."""
    model, _ = unlimited
    store = holding(model, 1500)
    wanted = prompt(20) + prompt(9, seed=9)
    found = store.find(KEY, wanted)
    assert found is not None
    assert len(found.tokens) == 20
    each = store.nbytes // 1500
    assert found.nbytes == 20 * each
    assert continuation(model, found, wanted) == continuation(model, None, wanted)
    assert found.nbytes <= (20 + 2 * STEP) * each


@pytest.mark.parametrize("with_window", [True, False])
def test_what_does_not_fit_beside_is_handed_over(
    windowed: Loaded, unlimited: Loaded, with_window: bool
) -> None:
    """Where there is no memory for a copy too, a conversation goes on in the entries it had."""
    model, _ = windowed if with_window else unlimited
    store = PromptStore(ROOM)
    store.keep(KEY, read(model, prompt(300)))
    store.keep("another", read(model, prompt(300, seed=1)))
    held, wanted = store.nbytes // 2, prompt(300) + prompt(20, seed=9)
    found = store.find(KEY, wanted, held)
    assert found is not None
    assert len(store) == 1  # the other goes first
    store.limit(ROOM)
    mx.synchronize()
    before = resting()
    found = store.find(KEY, wanted, 0)
    assert found is not None
    assert len(store) == 0
    assert mx.get_peak_memory() <= before  # nothing was copied
    assert len(found.tokens) == 300
    assert continuation(model, found, wanted) == continuation(model, None, wanted)
    assert store.find(KEY, wanted, 0) is None


def test_a_handed_over_entry_is_not_there_twice(unlimited: Loaded) -> None:
    model, _ = unlimited

    def peak(room: int) -> tuple[int, int]:
        store = holding(model, 700)
        mx.synchronize()
        before = resting()
        found = store.find(KEY, prompt(701), room)
        assert found is not None
        mx.eval(model(mx.array([[5]]), found.cache))
        return mx.get_peak_memory() - before, found.nbytes

    kept, all_of_it = peak(ROOM)
    handed_over, _ = peak(0)
    assert kept > all_of_it
    assert handed_over < 0.8 * all_of_it  # one of two positions at a time
