"""Prompts that begin as earlier ones did take over what was computed, and change no token."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import pytest
from conftest import write_checkpoint
from mlx_lm.models.cache import KVCache, RotatingKVCache
from tiny import tiny_config, tiny_prompt, tiny_weights

from mlx_cerebrum import load
from mlx_cerebrum.decoding.decoder import generate_step
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.server.batch import Batch
from mlx_cerebrum.server.jobs import Event, Job, Piece
from mlx_cerebrum.server.prefix_cache import Caches, PrefixCache, make_caches
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


def read(model: Model, tokens: Sequence[int], step: int = 100) -> Caches:
    """Caches that have seen `tokens`."""
    caches = make_caches(model.config)
    for start in range(0, len(tokens), step):
        model(mx.array([tokens[start : start + step]]), caches)
    mx.eval([c.state for c in caches])
    return caches


def held(model: Model, *lengths: int) -> PrefixCache:
    prefixes = PrefixCache(ROOM)
    for seed, length in enumerate(lengths):
        prefixes.store(KEY, prompt(length, seed), read(model, prompt(length, seed)))
    return prefixes


def continuation(model: Model, caches: Caches | None, rest: Sequence[int]) -> list[int]:
    return list(generate_step(list(rest), model, max_tokens=30, cache=caches))


def test_kinds_of_cache(windowed: Loaded, unlimited: Loaded) -> None:
    assert [type(c) for c in make_caches(windowed[0].config)] == [RotatingKVCache] * 2
    assert [type(c) for c in make_caches(unlimited[0].config)] == [KVCache] * 2


@pytest.mark.parametrize("length", [1, 5, 11, 12, 13, 40])
@pytest.mark.parametrize("more", [1, 2, 30])
def test_a_longer_prompt_goes_on_from_all_of_it(windowed: Loaded, length: int, more: int) -> None:
    model, _ = windowed
    wanted = prompt(length + more)
    caches, found = held(model, length).find(KEY, wanted)
    assert found == length
    assert continuation(model, caches, wanted[length:]) == continuation(model, None, wanted)


@pytest.mark.parametrize("shared", [1, 5, 10])
def test_within_the_window_it_goes_back(windowed: Loaded, shared: int) -> None:
    model, _ = windowed
    wanted = prompt(shared) + prompt(20, seed=9)
    caches, found = held(model, 11).find(KEY, wanted)
    assert found == shared
    assert continuation(model, caches, wanted[shared:]) == continuation(model, None, wanted)


@pytest.mark.parametrize("length", [12, 13, 40])
def test_past_the_window_only_all_of_it_will_do(windowed: Loaded, length: int) -> None:
    model, _ = windowed
    prefixes = held(model, length)
    assert prefixes.find(KEY, prompt(length - 1) + prompt(20, seed=9)) == (None, 0)
    assert prefixes.find(KEY, prompt(length)) == (None, 0)  # its last token is to be computed
    assert prefixes.find(KEY, prompt(length + 1))[1] == length


def test_without_a_window_any_point_will_do(unlimited: Loaded) -> None:
    model, _ = unlimited
    wanted = prompt(33) + prompt(20, seed=9)
    prefixes = held(model, 40)
    caches, found = prefixes.find(KEY, wanted)
    assert found == 33
    assert continuation(model, caches, wanted[33:]) == continuation(model, None, wanted)
    assert prefixes.find(KEY, prompt(40))[1] == 39
    assert prefixes.find(KEY, prompt(7))[1] == 6
    assert prefixes.find(KEY, prompt(1)) == (None, 0)


def test_using_an_entry_does_not_change_it(windowed: Loaded) -> None:
    model, _ = windowed
    prefixes = held(model, 11)
    wanted = prompt(11) + prompt(20, seed=9)
    expected = continuation(model, None, wanted)
    for _ in range(3):
        caches, found = prefixes.find(KEY, wanted)
        assert continuation(model, caches, wanted[found:]) == expected
        other = prompt(6) + prompt(9, seed=4)
        caches, found = prefixes.find(KEY, other)
        assert found == 6
        assert continuation(model, caches, other[6:]) == continuation(model, None, other)


def test_the_longest_is_taken(unlimited: Loaded) -> None:
    model, _ = unlimited
    prefixes = PrefixCache(ROOM)
    for tokens in (prompt(9) + prompt(5, seed=1), prompt(12) + prompt(5, seed=2)):
        prefixes.store(KEY, tokens, read(model, tokens))
    assert prefixes.find(KEY, prompt(30))[1] == 12


def test_nothing_is_shared_between_owners_or_models(unlimited: Loaded) -> None:
    model, _ = unlimited
    prefixes = held(model, 20)
    assert prefixes.find(("someone else", "m"), prompt(30)) == (None, 0)
    assert prefixes.find(("someone", "m2"), prompt(30)) == (None, 0)
    assert prefixes.find(KEY, prompt(30))[1] == 20


def test_what_a_longer_one_covers_is_given_up(windowed: Loaded, unlimited: Loaded) -> None:
    for (model, _), kept in ((unlimited, 1), (windowed, 2)):
        prefixes = held(model, 5)
        prefixes.store(KEY, prompt(40), read(model, prompt(40)))
        assert len(prefixes) == kept  # past the window, the longer one can't go back
        prefixes.store(KEY, prompt(40), read(model, prompt(40)))
        assert len(prefixes) == kept
        assert prefixes.nbytes == sum(e.nbytes for e in prefixes._entries.values())


def test_the_least_recently_used_goes_first(unlimited: Loaded) -> None:
    model, _ = unlimited
    one = held(model, 20).nbytes
    prefixes = PrefixCache(3 * one)
    for seed in (1, 2, 3):
        prefixes.store(KEY, prompt(20, seed), read(model, prompt(20, seed)))
    assert prefixes.find(KEY, prompt(21, 1))[1] == 20
    prefixes.store(KEY, prompt(20, 4), read(model, prompt(20, 4)))
    assert [prefixes.find(KEY, prompt(21, seed))[1] for seed in (1, 2, 3, 4)] == [20, 0, 20, 20]


def test_bytes_are_those_allocated(windowed: Loaded) -> None:
    """A view would keep the buffer it looks into: here a batch's row, a prompt's last chunk."""
    model, _ = windowed
    read(model, prompt(600), step=600)  # the rotation's tables stay
    mx.clear_cache()
    before = mx.get_active_memory()
    prefixes = PrefixCache(ROOM)
    prefixes.store(KEY, prompt(600), read(model, prompt(600), step=600))
    mx.clear_cache()
    taken = mx.get_active_memory() - before
    per_token = CONFIG["num_key_value_heads"] * CONFIG["head_dim"] * 4 * 2 * 2
    assert prefixes.nbytes == WINDOW * per_token
    assert taken <= prefixes.nbytes + 16384 * 8  # MLX rounds buffers up


def test_the_bound_holds(unlimited: Loaded) -> None:
    model, _ = unlimited
    one = held(model, 20).nbytes
    prefixes = PrefixCache(int(2.5 * one))
    for seed in range(6):
        prefixes.store(KEY, prompt(20, seed), read(model, prompt(20, seed)))
        assert prefixes.nbytes <= prefixes.max_bytes
    assert len(prefixes) == 2
    prefixes.store(KEY, prompt(51, 7), read(model, prompt(51, 7)))  # would take all and more
    assert len(prefixes) == 2
    prefixes.limit(one)
    assert (len(prefixes), prefixes.nbytes) == (1, one)
    prefixes.store(KEY, prompt(21, 8), read(model, prompt(21, 8)))
    assert (len(prefixes), prefixes.nbytes) == (1, one)
    prefixes.limit(-5)
    assert (len(prefixes), prefixes.nbytes) == (0, 0)
    prefixes.limit(10**12)
    prefixes.store(KEY, prompt(51, 7), read(model, prompt(51, 7)))
    assert len(prefixes) == 0  # never more than max_bytes
    prefixes.store(KEY, prompt(20), read(model, prompt(20)))
    prefixes.clear()
    assert (len(prefixes), prefixes.nbytes) == (0, 0)


def test_zero_bytes_keep_nothing(unlimited: Loaded) -> None:
    model, _ = unlimited
    prefixes = PrefixCache(0)
    prefixes.store(KEY, prompt(20), read(model, prompt(20)))
    prefixes.store(KEY, (), make_caches(model.config))
    assert len(prefixes) == 0


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
    prefixes = PrefixCache(cache_bytes)
    batch = Batch(model, prefixes, Counts(), lambda task: None, max_rows=4, prefill_step_size=step)
    ids, answers, cached = list(prompt(4)), [], []
    for turn in range(6):
        pieces = answer(batch, tokenizer, ids)
        answers.append([piece.token for piece in pieces])
        cached.append(pieces[0].cached_tokens)
        # The last token of an answer is seldom part of the next prompt (it ends the text).
        ids += [*answers[-1][:-1], *prompt(3 + turn, seed=turn + 1)]
        assert prefixes.nbytes <= cache_bytes
    return answers, cached


@pytest.mark.parametrize("step", [2, 16])
def test_a_conversation_is_the_same_with_it(windowed: Loaded, unlimited: Loaded, step: int) -> None:
    for loaded in (windowed, unlimited):
        plain, none = turns(loaded, 0, step)
        answers, cached = turns(loaded, ROOM, step)
        assert answers == plain
        assert not any(none)
        assert all(cached[1:])
        assert turns(loaded, 30_000, step)[0] == plain  # some of it given up on the way


def test_past_the_window_the_last_prompt_is_found_again(windowed: Loaded) -> None:
    """What is kept at an answer's end holds a token the next prompt lacks; it can't go back."""
    _, cached = turns(windowed, ROOM, 16)
    lengths = [4]
    for turn in range(5):
        lengths.append(lengths[-1] + 6 + 3 + turn)
    assert cached[2:] == [length - 1 for length in lengths[1:-1]]


def test_without_a_window_the_answer_is_found_too(unlimited: Loaded) -> None:
    _, cached = turns(unlimited, ROOM, 16)
    lengths = [4]
    for turn in range(5):
        lengths.append(lengths[-1] + 6 + 3 + turn)
    assert cached[1:] == [length + 6 for length in lengths[:-1]]


def test_asking_again_computes_the_last_token_only(windowed: Loaded) -> None:
    model, tokenizer = windowed
    batch = Batch(
        model, PrefixCache(ROOM), Counts(), lambda task: None, max_rows=4, prefill_step_size=8
    )
    first = answer(batch, tokenizer, prompt(40), n=2)
    again = answer(batch, tokenizer, prompt(40), n=2)
    assert {piece.cached_tokens for piece in again} == {39}
    assert [p.token for p in first] == [p.token for p in again]


def test_a_cancelled_answer_is_gone_on_from(unlimited: Loaded) -> None:
    model, tokenizer = unlimited
    batch = Batch(
        model, PrefixCache(ROOM), Counts(), lambda task: None, max_rows=4, prefill_step_size=8
    )
    events: list[Event] = []
    task = Task(Job("m", prompt(20), 50), tokenizer, events.append, lambda task: None)
    batch.start(task)
    while sum(isinstance(event, Piece) for event in events) < 5:
        batch.step()
    task.cancel()
    batch.step()
    said = [event.token for event in events if isinstance(event, Piece)]
    longer = [*prompt(20), *said, *prompt(3, seed=1)]
    pieces = answer(batch, tokenizer, longer)
    assert pieces[0].cached_tokens == 20 + len(said)
    assert [piece.token for piece in pieces] == continuation(model, None, longer)[:7]


@pytest.mark.parametrize("with_window", [True, False])
def test_an_answer_cancelled_within_a_step_is_gone_on_from(
    windowed: Loaded, unlimited: Loaded, with_window: bool
) -> None:
    """The caches then hold a token that nobody was told."""
    model, tokenizer = windowed if with_window else unlimited
    batch = Batch(
        model, PrefixCache(ROOM), Counts(), lambda task: None, max_rows=4, prefill_step_size=8
    )
    events: list[Event] = []
    task = Task(Job("m", prompt(20), 50), tokenizer, events.append, lambda task: None)
    batch.start(task)
    while sum(isinstance(event, Piece) for event in events) < 5:
        batch.step()
    real = batch._generator.next

    def meanwhile() -> Any:
        made = real()
        task.cancel()
        return made

    batch._generator.next = meanwhile
    batch.step()
    batch._generator.next = real
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
    prefixes = held(model, 1500)
    wanted = prompt(20) + prompt(9, seed=9)
    caches, found = prefixes.find(KEY, wanted)
    assert caches is not None
    assert found == 20
    each = prefixes.nbytes // 1500
    assert sum(c.nbytes for c in caches) == 20 * each
    assert continuation(model, caches, wanted[20:]) == continuation(model, None, wanted)
    assert sum(c.nbytes for c in caches) <= (20 + 2 * KVCache.step) * each
