"""Speculative decoding says what plain decoding says, whatever is guessed, and so does its cache.

`CEREBRUM_TEST_TOKENS=2000 pytest -s tests/decoding/test_speculative.py -k trained` compares as
many tokens of the trained model for every drafter by itself; the suite takes a few, of all of them
together.
"""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import MakeCheckpoint, slow
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_map
from tiny import tiny_config, tiny_prompt, tiny_weights

from mlx_cerebrum import load
from mlx_cerebrum.decoding import decoder
from mlx_cerebrum.decoding.decode import Sampler, greedy, prefill
from mlx_cerebrum.decoding.decoder import generate_step
from mlx_cerebrum.decoding.drafters import Draft, Drafter, ModelDrafter, NGramDrafter
from mlx_cerebrum.decoding.policy import Policy
from mlx_cerebrum.decoding.prompt_cache import PromptCache
from mlx_cerebrum.decoding.sampling import make_sampler
from mlx_cerebrum.decoding.speculative import Speculation, speculation, verify
from mlx_cerebrum.decoding.stream import stream_generate
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.cache import REWIND, WindowedKVCache
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model, TransformerBlock
from mlx_cerebrum.weights.loading import fuse_projections

WINDOW = 20
TARGET = (0, 1, 2, 1, 2, 3, 2, 3)  # 8 positions over 4 blocks
SHORTER = (0, 1, 2, 3)  # the first three are the target's first ones
TOLERANCE = 1e-4  # on a logit: rows computed together round otherwise than alone, by 2e-6
TRAINED_TOKENS = int(os.environ.get("CEREBRUM_TEST_TOKENS", "0"))

Round = tuple[str, int] | None  # (drafter, drafts), or a plain step


def tiny_model(layer_map: tuple[int, ...] = TARGET) -> Model:
    raw = tiny_config(num_hidden_layers=4, sliding_window=WINDOW)
    model = Model(ModelConfig.from_dict(raw).with_map(layer_map))
    weights = tiny_weights(raw, seed=5)
    model.load_weights([(name, mx.array(value)) for name, value in weights.items()])
    for block in model.model.layers:
        fuse_projections(block)
    return model


PACKED = tiny_model()  # the target's map over the same blocks in few bits
nn.quantize(PACKED, group_size=64, bits=3)
TINY = tiny_model()
FEWER = TINY.view(SHORTER)
EXIT = TINY.view(TARGET[:3])  # the target, left early: all its positions are shared
# Three tokens nobody chose, then what the model says: every prefix has a known continuation.
TRUTH = tiny_prompt(tiny_config(), 3, seed=7)
TRUTH += list(generate_step(TRUTH, TINY, max_tokens=200))
LOGITS = np.array(TINY(mx.array([TRUTH]))[0])


def off(ours: mx.array, theirs: Any) -> float:
    return float(np.abs(np.array(ours) - np.array(theirs)).max())


class Oracle:
    """A drafter that knows the answer, and errs after `held` guesses of each draft."""

    name = "oracle"

    def __init__(self, truth: Sequence[int], held: Iterable[int]) -> None:
        self.truth, self.held = truth, iter(held)

    def offer(self, tokens: Sequence[int], most: int) -> tuple[str, int]:
        return self.name, min(most, len(self.truth) - len(tokens))

    def draft(
        self,
        tokens: Sequence[int],
        count: int,
        cache: Sequence[WindowedKVCache],
        sampler: Sampler,
        number: int,
    ) -> Draft:
        guesses = list(self.truth[len(tokens) : len(tokens) + count])
        held = next(self.held)
        if held < count:
            guesses[held] = (guesses[held] + 1) % 256
        return Draft(mx.array(guesses, dtype=mx.int32))


class Scripted(Policy):
    """Takes the rounds it is told to take, as far as they are on offer; then plain steps."""

    def __init__(self, names: Iterable[str], script: Iterable[Round]) -> None:
        super().__init__(dict.fromkeys(names, 0.0))
        self.script = iter(script)

    def choose(self, offers: Any, row: float | None = None) -> Round:
        wanted = next(self.script, None)
        if wanted is None or wanted[0] not in offers:
            return None
        name, drafts = wanted
        return name, min(drafts, offers[name][1])


def scripted(drafters: Sequence[Drafter], script: Iterable[Round]) -> Speculation:
    named = {drafter.name: drafter for drafter in drafters}
    return Speculation(named, Scripted(named, script))


def model_drafters(model: Model = TINY) -> list[Drafter]:
    views = {"fewer": FEWER, "packed": PACKED, "exit": EXIT, "same": model}
    return [ModelDrafter(view, model, name) for name, view in views.items()]


def caches(step: int = 256, rewind: int = REWIND) -> list[WindowedKVCache]:
    """With a small `step` they move their entries often, with a small `rewind` forget more."""
    return [WindowedKVCache(WINDOW, rewind, step) for _ in TARGET]


def assert_holds(cache: Sequence[WindowedKVCache], tokens: Sequence[int], least: int = 0) -> None:
    """The cache is what the model computes for the first `offset` of `tokens`, `least` of them."""
    offset = cache[0].offset
    assert [c.offset for c in cache] == [offset] * len(cache)
    assert least <= offset <= len(tokens)
    more = [*tokens, 9, 8, 7]
    theirs = TINY(mx.array([more]))[0, offset:]
    assert off(TINY(mx.array([more[offset:]]), cache)[0], theirs) < TOLERANCE


# Greedy exactness.


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.long)])
@slow
def test_every_draft_at_every_offset_around_the_window(every: int) -> None:
    """Not only the choices: every row of logits they were made from."""
    rows: list[mx.array] = []

    def recorder(logits: mx.array, inputs: mx.array) -> mx.array:
        rows.append(logits)
        return greedy(logits)

    for seen in range(WINDOW - 17, WINDOW + 18):
        cache = caches(9 if seen % 2 else 256, rewind=17)
        prefill(TINY, mx.array(TRUTH[: seen - 1]), cache)
        for drafts in range(1 + seen % every, 17, every):
            held = (0, drafts // 2, drafts)[(seen + drafts) % 3]
            draft = Oracle(TRUTH, [held]).draft(TRUTH[:seen], drafts, cache, greedy, 0)
            new = verify(TINY, TRUTH[seen - 1], draft, cache, recorder)
            assert new == TRUTH[seen : seen + held + 1]
            assert off(rows[-1][: held + 1], LOGITS[seen - 1 : seen + held]) < TOLERANCE
            assert {c.offset for c in cache} == {seen + held}
            for c in cache:
                c.trim(held + 1)


@given(st.data())
@settings(deadline=None, max_examples=12)
@pytest.mark.long
def test_any_rounds_from_anywhere(data: Any) -> None:
    """Mixed drafters and draft lengths, wherever the cache moves its entries."""
    names = ["ngram", "fewer", "packed", "exit", "same", "oracle"]
    rounds = st.none() | st.tuples(st.sampled_from(names), st.integers(1, 16))
    script = data.draw(st.lists(rounds, min_size=6, max_size=12))
    held = data.draw(st.lists(st.integers(0, 16), min_size=12, max_size=12))
    prompt = data.draw(st.integers(3, 60))
    cache = caches(data.draw(st.integers(2, 40)), rewind=data.draw(st.sampled_from([17, REWIND])))
    drafters = [NGramDrafter(), *model_drafters(), Oracle(TRUTH, held)]
    said = generate_step(
        TRUTH[:prompt], TINY, speculation=scripted(drafters, script), max_tokens=40, cache=cache
    )
    assert list(said) == TRUTH[prompt : prompt + 40]
    assert_holds(cache, TRUTH[: prompt + 40], least=prompt + 39)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("name", ["ngram", "fewer", "packed", "auto"])
@pytest.mark.one_in(8)
def test_tiny_with_the_real_policy(name: str, ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ahead`: with a plain step in flight, as on a GPU."""
    monkeypatch.setattr(decoder, "device", SimpleNamespace(on_gpu=lambda: ahead))
    models = {"fewer": [FEWER], "packed": [PACKED], "auto": [FEWER, PACKED]}.get(name, [])
    how = speculation(TINY, models, ngrams=name in ("ngram", "auto"))
    said = list(generate_step(TRUTH[:60], TINY, speculation=how, max_tokens=60))
    assert said == TRUTH[60:120]
    assert sum((accepted + 1) * n for (_, _, accepted), n in how.rounds.items()) == 60


def test_a_plain_step_in_flight_gives_way_to_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "device", SimpleNamespace(on_gpu=lambda: True))
    # After a plain step the policy is asked what comes next, and asked again if that is guesses.
    script = [None, None, ("fewer", 3), ("fewer", 3), None, ("same", 16), ("same", 16)]
    how = scripted(model_drafters(), forever_for(60, *script))
    cache = caches()
    said = list(generate_step(TRUTH[:30], TINY, speculation=how, max_tokens=70, cache=cache))
    assert said == TRUTH[30:100]
    assert {name for name, _, _ in how.rounds} == {"plain", "fewer", "same"}
    assert_holds(cache, TRUTH[:100], least=99)


def forever_for(times: int, *rounds: Round) -> Iterator[Round]:
    return itertools.islice(itertools.cycle(rounds), times)


@pytest.fixture(scope="module")
def trained(demo: Path) -> tuple[Model, Model, list[int]]:
    """The demo model with a window, its blocks rounded to 4 bits again, and a text to continue.

    The rounded copy is dense: MLX's packed matmuls are slow on a CPU.
    """
    model, tokenizer = load(demo, window=256)
    rounded, _ = load(demo, window=256)

    def few_bits(weight: mx.array) -> mx.array:
        if weight.ndim < 2:
            return weight
        return mx.dequantize(*mx.quantize(weight, 64, 4), 64, 4).astype(weight.dtype)

    rounded.update(tree_map(few_bits, rounded.parameters()))
    text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    return model, rounded, tokenizer.encode(text)[:250]


INTERLEAVED = tuple(block for start in range(0, 21, 5) for block in range(start, start + 10))


@pytest.mark.long
@pytest.mark.parametrize("positions", [30, 50] if TRAINED_TOKENS else [50])
def test_trained_model_past_its_window(
    positions: int, trained: tuple[Model, Model, list[int]]
) -> None:
    own, rounded, prompt = trained
    model = own if positions == 30 else own.view(INTERLEAVED)
    models = [rounded.view(model.config.layer_map), *([own] if positions == 50 else [])]
    sets: list[tuple[list[Model], bool]] = [(models, True)]
    if TRAINED_TOKENS:
        sets += [([], True), *(([draft], False) for draft in models)]
    start = model.make_cache()
    prefill(model, mx.array(prompt[:-1]), start)
    states = [c.state for c in start]

    def resumed() -> list[WindowedKVCache]:
        return [WindowedKVCache.from_state(state) for state in states]

    most = TRAINED_TOKENS or 14
    plain = list(generate_step(prompt[-1:], model, cache=resumed(), max_tokens=most))
    for drafts, ngrams in sets:
        how = speculation(model, drafts, ngrams)
        drafters = list(how.drafters.values())
        rounds = [(drafter.name, k) for k in (3, 7, 1, 16) for drafter in drafters]
        for chosen in (how, scripted(drafters, itertools.cycle(rounds))):
            said = generate_step(
                prompt[-1:],
                model,
                speculation=chosen,
                cache=resumed(),
                history=prompt[:-1],
                max_tokens=most,
            )
            assert list(said) == plain
            if TRAINED_TOKENS:
                print(f"{positions} positions, {most} tokens: {sorted(chosen.rounds.items())}")


# Where it stops.


@pytest.mark.parametrize("name", ["fewer", "exit", "oracle"])
@slow
def test_max_tokens_inside_a_draft(name: str) -> None:
    drafters = [*model_drafters(), Oracle(TRUTH, itertools.cycle([7, 3]))]
    for most in range(1, 14):
        cache = caches(step=16)
        how = scripted(drafters, [(name, 8)] * 20)
        said = list(generate_step(TRUTH[:30], TINY, speculation=how, max_tokens=most, cache=cache))
        assert said == TRUTH[30 : 30 + most]
        # The last round drafts no more than could still be said.
        assert sum(accepted + 1 for _, _, accepted in how.rounds.elements()) == most
        assert_holds(cache, TRUTH[: 30 + most], least=29 + most)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("name", ["fewer", "same", "oracle", "none"])
@pytest.mark.one_in(8)
def test_consumer_stops_inside_a_burst(
    name: str, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every place. All but the last token handed out is in the cache, and no more."""
    monkeypatch.setattr(decoder, "device", SimpleNamespace(on_gpu=lambda: ahead))
    drafters = [*model_drafters(), Oracle(TRUTH, itertools.cycle([6, 0, 2]))]
    for taken in range(1, 13):
        cache = caches(step=16)
        how = scripted(drafters, [(name, 6)] * 20)
        steps = generate_step(TRUTH[:30], TINY, speculation=how, max_tokens=40, cache=cache)
        handed = [next(steps) for _ in range(taken)]
        steps.close()
        assert handed == TRUTH[30 : 30 + taken]
        assert {c.offset for c in cache} == {29 + taken}
        assert_holds(cache, TRUTH[: 30 + taken])


def interrupt_at(call: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Raise KeyboardInterrupt in place of the `call`-th block that runs; says whether it did."""
    calls = itertools.count()
    original = TransformerBlock.__call__
    raised = False

    def block(self: TransformerBlock, *args: Any) -> mx.array:
        nonlocal raised
        if next(calls) == call:
            raised = True
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(TransformerBlock, "__call__", block)
    return lambda: raised


@pytest.mark.parametrize("name", ["fewer", "packed", "exit"])
@pytest.mark.one_in(4)
def test_interrupted_between_two_positions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever in prefill, draft or check: the cache holds only what the target computed."""
    for call in itertools.count():
        cache = caches(step=16)
        handed: list[int] = []
        how = scripted(model_drafters(), [(name, 2)] * 2)
        with monkeypatch.context() as patch:
            interrupted = interrupt_at(call, patch)
            try:
                for token in generate_step(
                    TRUTH[:30], TINY, speculation=how, max_tokens=4, cache=cache
                ):
                    handed.append(token)
            except KeyboardInterrupt:
                pass
        assert handed == TRUTH[30 : 30 + len(handed)]
        assert_holds(cache, TRUTH[: 30 + len(handed)], least=29 if call >= len(TARGET) else 0)
        if not interrupted():
            assert len(handed) == 4
            assert call > 3 * len(TARGET)  # prefill, and rounds
            break


@pytest.mark.parametrize("where", ["first", "later"])
def test_interrupted_while_evaluating(where: str) -> None:
    """An error from a sampler stands for one from the device: all caches have the tokens then."""
    calls = itertools.count()

    def sampler(logits: mx.array, number: int) -> mx.array:
        if next(calls) == (0 if where == "first" else 6):
            raise KeyboardInterrupt
        return greedy(logits)

    cache = caches()
    handed: list[int] = []
    how = scripted(model_drafters(), [("packed", 4)] * 9)
    steps = generate_step(TRUTH[:30], TINY, speculation=how, sampler=sampler, cache=cache)
    with pytest.raises(KeyboardInterrupt):
        handed.extend(steps)
    assert_holds(cache, TRUTH[: 30 + len(handed)], least=29)


def test_refuses_what_cannot_be_drafted() -> None:
    for most in (0, REWIND):
        with pytest.raises(RequestError, match="draft-tokens must be from 1 to 63"):
            speculation(TINY, most=most)
    with pytest.raises(RequestError, match="empty"):
        next(generate_step([], TINY, speculation=speculation(TINY)))
    with pytest.raises(RequestError, match="prefill-step-size"):
        next(generate_step([1], TINY, speculation=speculation(TINY), prefill_step_size=0))


def test_the_longest_draft_can_be_undone() -> None:
    cache = caches(step=16)
    oracle = Oracle(TRUTH, itertools.cycle([0, 63, 20]))
    how = scripted([oracle, *model_drafters()], forever_for(99, ("oracle", 63), ("same", 63)))
    said = generate_step(TRUTH[:30], TINY, speculation=how, max_tokens=160, cache=cache)
    assert list(said) == TRUTH[30:190]
    assert_holds(cache, TRUTH[:190], least=189)


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.long)])
@slow
def test_an_answer_ends_inside_a_draft(checkpoint: MakeCheckpoint, every: int) -> None:
    """By EOS or by a stop string: the text, the last token and the cache are plain decoding's."""
    model, tokenizer = load(checkpoint(sliding_window=20))
    ids = tokenizer.encode("A list of colours: red, green")
    plain = [r.token for r in stream_generate(model, tokenizer, ids, max_tokens=20)]
    text = tokenizer.decode(plain)
    endings: list[tuple[set[int], list[str]]] = [({plain[at]}, []) for at in range(2, 16, every)]
    endings += [(set(), [text[at : at + 2]]) for at in range(2, min(16, len(text) - 2), every)]
    for eos, stop in endings:
        tokenizer.eos_token_ids = frozenset(eos)
        held = PromptCache(model)
        how = scripted([Oracle(ids + plain, [99] * 9)], [("oracle", 8)] * 9)
        ours, theirs = (
            list(
                stream_generate(
                    model,
                    tokenizer,
                    ids,
                    max_tokens=20,
                    stop=stop,
                    speculation=guesses,
                    prompt_cache=held if guesses else None,
                )
            )
            for guesses in (how, None)
        )
        assert [(r.text, r.token, r.finish_reason) for r in ours] == (
            [(r.text, r.token, r.finish_reason) for r in theirs]
        )
        assert ours[-1].finish_reason == "stop"
        assert held.tokens == (ids + plain)[: len(ids) + len(ours) - 1]
        assert {c.offset for c in held.cache} == {len(held.tokens)}


# Sampling.


@slow
def test_a_seed_gives_the_same_text_with_any_drafter() -> None:
    def sampler(seed: int = 11) -> Sampler:
        return make_sampler(0.7, top_p=0.95, min_p=0.01, seed=seed)

    prompt = TRUTH[:25]
    options: dict[str, Any] = {"max_tokens": 40}
    plain = list(generate_step(prompt, TINY, sampler=sampler(), **options))
    assert plain != TRUTH[25:65]
    assert plain != list(generate_step(prompt, TINY, sampler=sampler(12), **options))
    for drafter in [NGramDrafter(), *model_drafters(), Oracle(prompt + plain, [5, 0, 9] * 9)]:
        how = scripted([drafter], forever_for(99, (drafter.name, 4), None, (drafter.name, 9)))
        said = generate_step(prompt, TINY, speculation=how, sampler=sampler(), **options)
        assert list(said) == plain, drafter.name
        if drafter.name == "same":  # it draws with the target's own random numbers
            assert all(held == drafts for _, drafts, held in how.rounds)
    how = speculation(TINY, [FEWER, PACKED])
    assert list(generate_step(prompt, TINY, speculation=how, sampler=sampler(), **options)) == plain


class Chain:
    """Stands for a Model whose next token depends on the last one alone, as a table says."""

    def __init__(self, table: list[list[float]]) -> None:
        self.log = mx.log(mx.array(table))  # [V, V]
        self.model = self
        self.config = ModelConfig.from_dict(tiny_config(num_hidden_layers=1, sliding_window=None))

    def embed(self, tokens: mx.array) -> mx.array:
        return tokens[..., None].astype(mx.float32)

    def run(self, h: mx.array, cache: Any, start: int = 0, stop: int | None = None) -> mx.array:
        for c in cache[start:stop]:
            c.offset += h.shape[1]
        return h

    def logits(self, h: mx.array) -> mx.array:
        return self.log[h[..., 0].astype(mx.int32)]


class Counter:
    """A cache that only counts."""

    offset = 0

    def trim(self, n: int) -> None:
        self.offset -= n


P = [[0.5, 0.25, 0.15, 0.1], [0.1, 0.6, 0.1, 0.2], [0.25] * 4, [0.05, 0.05, 0.8, 0.1]]
Q = [[0.2, 0.4, 0.3, 0.1], [0.2, 0.5, 0.1, 0.2], [0.7, 0.1, 0.1, 0.1], [0.05, 0.15, 0.7, 0.1]]
Verify = Callable[..., list[int]]


def accept_all(model: Any, token: int, draft: Draft, *args: Any) -> list[int]:
    """A wrong rule: whatever is drafted is said."""
    return [*np.array(draft.tokens).tolist(), *verify(model, token, draft, *args)[-1:]]


OTHER_DRAWS, _draws = make_sampler(1.0, seed=77), itertools.count()


def draw_again(model: Any, token: int, draft: Draft, cache: Any, choose: Any) -> list[int]:
    """A wrong rule: what replaces a guess is drawn anew, the guess not left out."""
    new = verify(model, token, draft, cache, choose)
    if len(new) <= draft.tokens.size:
        row = model.logits(model.embed(mx.array([[new[-2] if len(new) > 1 else token]])))[0]
        new[-1:] = np.array(OTHER_DRAWS(row, next(_draws))).tolist()
    return new


def rounds_of(count: int, drafter: str, rule: Verify) -> tuple[np.ndarray[Any, Any], float]:
    """First two tokens said after token 0, `count` times over, `[V, V]` counts; and how often
    the first guess held."""
    target, draft_model = Chain(P), Chain(Q)
    model: Any = target
    counts, held = np.zeros((4, 4)), 0
    sampler = make_sampler(1.0, seed=2)
    number = 0
    for _ in range(count):
        cache: Any = [Counter()]
        tokens = [0]
        while len(tokens) < 3:
            if drafter == "certain":
                draft = Draft(mx.array([1, 2], dtype=mx.int32))
            else:
                made = ModelDrafter(draft_model, model)  # type: ignore[arg-type]  # a stand-in
                draft = made.draft(tokens, 2, cache, sampler, number)

            def choose(logits: mx.array, _: mx.array, number: int = number) -> mx.array:
                return sampler(logits, number)

            new = rule(model, tokens[-1], draft, cache, choose)
            if len(tokens) == 1:
                held += len(new) > 1
            number += len(new)
            tokens += new
            assert rule is not verify or cache[0].offset == len(tokens) - 1
        counts[tokens[1], tokens[2]] += 1
    return counts, held / count


def chi_square(counts: np.ndarray[Any, Any]) -> float:
    """How far counts of pairs are from what P says, in standard deviations (Wilson, Hilferty)."""
    expected = counts.sum() * np.array(P[0])[:, None] * np.array(P)
    statistic, freedom = float(((counts - expected) ** 2 / expected).sum()), counts.size - 1
    spread = 2 / (9 * freedom)
    return float(((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5)


@pytest.mark.parametrize("drafter", ["model", "certain"])
@slow
def test_what_is_said_follows_the_target(drafter: str) -> None:
    counts, held = rounds_of(1500, drafter, verify)
    assert chi_square(counts) < 4
    noise = 4 * (0.25 / 1500) ** 0.5
    if drafter == "certain":
        assert abs(held - P[0][1]) < noise
        return
    p, q = np.array(P[0]), np.array(Q[0])
    distance = 0.5 * np.abs(p - q).sum()
    # Both draws take the same Gumbel noise; they agree on i where i wins under either.
    same = sum(1 / np.maximum(p / p[i], q / q[i]).sum() for i in range(4))
    assert (1 - distance) / (1 + distance) < same < 1 - distance
    assert abs(held - same) < noise


@pytest.mark.parametrize("rule", [accept_all, draw_again])
@pytest.mark.parametrize("drafter", ["model", "certain"])
@pytest.mark.one_in(8)
def test_a_wrong_rule_would_be_noticed(drafter: str, rule: Verify) -> None:
    counts, _ = rounds_of(700, drafter, rule)
    assert chi_square(counts) > 5
