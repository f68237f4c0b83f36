"""Where guesses come from, what they are expected to bring and cost, and who decides."""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import slow
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config, tiny_prompt, tiny_weights

from mlx_cerebrum.decoding.decode import greedy, prefill
from mlx_cerebrum.decoding.drafters import Drafter, ModelDrafter, NGramDrafter, borrowed
from mlx_cerebrum.decoding.policy import (
    MARGIN,
    Agreement,
    Costs,
    Pace,
    Policy,
    best_drafts,
    bytes_read,
    expected_tokens,
    speedup,
)
from mlx_cerebrum.decoding.speculative import Speculation, verify
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model, TransformerBlock

CEREBRUM = tuple(block for start in range(0, 25, 4) for block in range(start, start + 8))


def tiny_model(layer_map: Sequence[int], scales: Any = None) -> Model:
    raw = tiny_config(num_hidden_layers=6, sliding_window=20)
    model = Model(ModelConfig.from_dict(raw).with_map(tuple(layer_map), scales))
    weights = tiny_weights(raw, seed=4)
    model.load_weights([(name, mx.array(value)) for name, value in weights.items()])
    return model


# N-grams.


def naive(tokens: Sequence[int], longest: int, shortest: int) -> tuple[int, int]:
    """`(n, end)`: the longest run at the end that came before, where it stood last."""
    for n in range(longest, shortest - 1, -1):
        for end in range(len(tokens) - 1, n - 1, -1):
            if list(tokens[end - n : end]) == list(tokens[-n:]):
                return n, end
    return 0, 0


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=40),
    st.lists(st.integers(1, 7), min_size=1, max_size=12),
    st.integers(0, 16),
    st.sampled_from([(4, 2), (4, 1), (2, 2), (6, 3)]),
)
@settings(deadline=None, max_examples=200)
def test_ngrams_as_a_plain_search_finds_them(
    tokens: list[int], steps: list[int], most: int, lengths: tuple[int, int]
) -> None:
    """However many tokens come at a time, and whether a draft is then asked for or not."""
    drafter, seen = NGramDrafter(*lengths), 0
    for step in itertools.cycle(steps):
        seen = min(seen + step, len(tokens))
        now = tokens[:seen]
        n, end = naive(now, *lengths)
        kind, count = drafter.offer(now, most)
        assert (kind, count) == (f"ngram-{n}", most if n else 0)
        if count:
            guess = drafter.draft(now, count, [], greedy, 0)
            repeated = itertools.islice(itertools.cycle(now[end:]), count)
            assert guess.tokens.tolist() == list(repeated)
            assert (guess.tokens.size, guess.hidden) == (count, None)
        if seen == len(tokens):
            break


def test_ngrams_index_every_run_once() -> None:
    """A round costs what its new tokens are, not what the whole text is."""
    drafter = NGramDrafter()
    tokens = list(range(1000))
    drafter.offer(tokens, 16)

    class Counted(list[int]):
        read = 0

        def __getitem__(self, at: Any) -> Any:
            Counted.read += 1
            return super().__getitem__(at)

    drafter.offer(Counted([*tokens, 7, 8]), 16)
    assert Counted.read < 20


# Models as drafters.


def test_borrowed_positions() -> None:
    assert borrowed(range(32), CEREBRUM) == (
        *range(8),  # blocks 0-7
        *range(12, 16),  # 8-11, first run by the third row's
        *range(20, 24),
        *range(28, 32),
        *range(36, 40),
        *range(44, 48),
        *range(52, 56),
    )
    assert borrowed(CEREBRUM, CEREBRUM) == tuple(range(56))
    assert borrowed((1, 1, 0), (0, 1, 2, 1)) == (1, 3, 0)
    with pytest.raises(RequestError, match="block 1 more often than the model does") as caught:
        borrowed((0, 1, 1, 1), (0, 1, 2, 1))
    assert "\n" not in str(caught.value)
    with pytest.raises(RequestError, match="block 5"):
        borrowed((5,), (0, 1))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.data())
@settings(deadline=None, max_examples=100)
def test_any_part_of_a_map_can_borrow(target: list[int], data: Any) -> None:
    picked = data.draw(st.lists(st.sampled_from(range(len(target))), min_size=1, unique=True))
    draft = [target[position] for position in picked]
    positions = borrowed(draft, target)
    assert [target[position] for position in positions] == draft
    assert len(set(positions)) == len(draft)
    spare = Counter(target)
    spare.subtract(draft)
    for block, left in spare.items():
        with pytest.raises(RequestError):
            borrowed([*draft, *[block] * (left + 1)], target)


TARGET = (0, 1, 2, 1, 2, 3, 4, 3, 4, 5)


def test_shared_positions() -> None:
    model = tiny_model(TARGET)
    drafts = {(0, 1, 2, 3): 3, (0, 1, 2, 1, 2, 5): 5, (1, 2, 3): 0, TARGET[:4]: 3, TARGET: 9}
    for layer_map, shared in drafts.items():
        assert ModelDrafter(model.view(layer_map), model).shared == shared
    half = ((1.0, 1.0), (0.5, 1.0), *((1.0, 1.0),) * 8)
    # Where scales differ, what is computed does; where all are 1, as if there were none.
    assert ModelDrafter(model.view(TARGET, half), model).shared == 1
    assert ModelDrafter(model.view(TARGET, ((1.0, 1.0),) * 10), model).shared == 9
    assert ModelDrafter(tiny_model(TARGET), model).shared == 0  # other weights


@pytest.mark.parametrize("layer_map", [(0, 1, 2, 3, 5), (1, 2, 3), TARGET[:4]])
def test_a_round_runs_shared_positions_once_for_each_token(
    layer_map: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(TARGET)
    drafter = ModelDrafter(model.view(layer_map), model)
    prompt, drafts = tiny_prompt(tiny_config(), 30, seed=1), 5
    cache = model.make_cache()
    prefill(model, mx.array(prompt[:-1]), cache)
    rows: Counter[tuple[str, int]] = Counter()  # (block or cache, which) -> token rows
    block_call, append = TransformerBlock.__call__, type(cache[0]).update_and_fetch

    def counted(self: TransformerBlock, x: mx.array, *args: Any) -> mx.array:
        which = next(i for i, block in enumerate(model.model.layers) if block is self)
        rows["block", which] += x.shape[1]
        return block_call(self, x, *args)

    def appended(self: Any, keys: mx.array, values: mx.array) -> Any:
        rows["cache", next(i for i, c in enumerate(cache) if c is self)] += keys.shape[2]
        return append(self, keys, values)

    monkeypatch.setattr(TransformerBlock, "__call__", counted)
    monkeypatch.setattr(type(cache[0]), "update_and_fetch", appended)
    draft = drafter.draft(prompt, drafts, cache, greedy, 0)
    offsets = {i: c.offset - 29 for i, c in enumerate(cache) if c.offset != 29}
    assert offsets == dict.fromkeys(range(drafter.shared), drafts)
    new = verify(model, prompt[-1], draft, cache, lambda logits, _: greedy(logits))
    assert {c.offset for c in cache} == {29 + len(new)}
    for position in range(len(TARGET)):
        again = position in drafter.positions and position >= drafter.shared
        assert rows["cache", position] == drafts + 1 + drafts * again
    assert sum(n for (what, _), n in rows.items() if what == "block") == (
        (drafts + 1) * len(TARGET) + drafts * (len(layer_map) - drafter.shared)
    )


# Costs.


@pytest.mark.parametrize("agreement", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("drafts", [1, 4, 16])
def test_expected_tokens_are_what_chance_gives(agreement: float, drafts: int) -> None:
    chance, rounds = random.Random(1), 20_000

    def simulated() -> int:
        return 1 + next((i for i in range(drafts) if chance.random() >= agreement), drafts)

    mean = sum(simulated() for _ in range(rounds)) / rounds
    assert abs(mean - expected_tokens(agreement, drafts)) < 4 * (drafts + 1) / 2 / rounds**0.5


def test_the_best_round() -> None:
    free = Costs(draft=0.0, row=0.0)
    assert expected_tokens(0.5, 3) == 1.875
    assert speedup(0.5, 3, Costs(draft=0.2, row=0.05)) == pytest.approx(1.875 / 1.75)
    assert best_drafts(1.0, free, 16) == (16, 17.0)
    assert best_drafts(0.0, free, 16) == (0, 1.0)  # a gain of 1 is none
    assert best_drafts(0.9, free, 0) == (0, 1.0)
    assert best_drafts(0.5, Costs(0.5, 0.1), 16) == (0, 1.0)
    for agreement, cost, most in itertools.product((0.2, 0.6, 0.95), (0.05, 0.3), (1, 5, 16)):
        costs = Costs(cost, 0.02)
        drafts, gain = best_drafts(agreement, costs, most)
        every = [1.0, *(speedup(agreement, k, costs) for k in range(1, most + 1))]
        assert (gain, every[drafts]) == (max(every), max(every))


def test_bytes_of_the_real_geometry() -> None:
    """Only shapes: MLX's arrays are made when they are read."""
    raw = tiny_config(
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=32000,
    )
    seven = Model(ModelConfig.from_dict(raw))
    seven.set_dtype(mx.bfloat16)
    block = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    assert bytes_read(seven) == 2 * (32 * block + 32000 * 4096) == 14_221_312_000
    merged = seven.view(CEREBRUM)
    assert bytes_read(merged) == 2 * (56 * block + 32000 * 4096) == 24_690_688_000

    packed = Model(ModelConfig.from_dict(raw))
    packed.set_dtype(mx.bfloat16)
    nn.quantize(packed, group_size=64, bits=4)
    norms = 2 * 4096
    bits = 4 + 32 / 64  # with a scale and a bias of 16 bits for each group
    per_block = (block - norms) * bits / 8 + norms * 2
    assert bytes_read(packed) == 32 * per_block + 32000 * 4096 * bits / 8


def test_bytes_of_a_tied_head_count_the_table_once() -> None:
    untied = Model(ModelConfig.from_dict(tiny_config()))
    tied = Model(ModelConfig.from_dict(tiny_config(tie_word_embeddings=True)))
    assert bytes_read(tied) == bytes_read(untied)


# The policy, on a clock that does as it is told.


Offer = Callable[[int], dict[str, tuple[str, int]]]


def always(**kinds: str) -> Offer:
    """Every drafter has 16 guesses of its kind, whatever was said so far."""
    return lambda said: {name: (kind, 16) for name, kind in kinds.items()}


class Run:
    """A request of `tokens` whose drafters agree and cost as given, in plain steps."""

    def __init__(
        self,
        offers: Offer,
        agreement: Callable[[str, int], float],
        draft: dict[str, float],
        row: float,
        *,
        tokens: int = 300,
        predicted: dict[str, float] | None = None,
        noise: float = 0.0,
        first: float = 1.0,
        seed: int = 1,
    ) -> None:
        chance = random.Random(seed)
        self.policy = Policy(draft if predicted is None else predicted)
        self.rounds: list[tuple[int, str, int, int]] = []  # tokens before, name, drafts, held
        self.clock = plain = 0.0
        said = 0

        def disturbed(seconds: float) -> float:
            return seconds * (1 + noise * chance.random())

        while said < tokens:
            most = tokens - said - 1
            open_ = {k: (kind, min(n, most)) for k, (kind, n) in offers(said).items() if most}
            choice = self.policy.choose(open_)
            if choice is None:
                seconds = disturbed(first if said == 0 else 1.0)
                plain += seconds
                self.policy.plain(seconds)
                said += 1
            else:
                name, drafts = choice
                kind, offered = open_[name]
                assert 1 <= drafts <= min(offered, self.policy.most)
                right = agreement(kind, said)
                held = next((i for i in range(drafts) if chance.random() >= right), drafts)
                seconds = disturbed(1 + drafts * (draft[name] + row))
                self.policy.round(name, kind, drafts, held, seconds)
                self.rounds.append((said, name, drafts, held))
                said += held + 1
            self.clock += seconds
        self.gain = tokens * (1 + noise / 2) / (self.clock - (first - 1))


ALL = always(ngram="ngram-4", model="model", low="low")
COSTS = {"ngram": 0.0, "model": 0.57, "low": 0.28}


def mixed(said: int) -> dict[str, tuple[str, int]]:
    """N-grams of every length in turn, each of whose evidence has to be gathered."""
    return ALL(said) | {"ngram": (f"ngram-{2 + said % 3}", 16)}


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("row", [0.02, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("names", [("ngram",), ("model",), ("low",), ("ngram", "model", "low")])
def test_guesses_that_never_hold_cost_less_than_three_percent(
    names: tuple[str, ...], row: float, noise: float
) -> None:
    def offers(said: int) -> dict[str, tuple[str, int]]:
        return {name: mixed(said)[name] for name in names}

    # Only the length of a run decides how far noise averages out.
    for tokens in (300,) if noise else (100, 300):
        run = Run(offers, lambda kind, said: 0.0, COSTS, row, noise=noise, tokens=tokens)
        assert run.gain > 0.97 - noise / 20, (tokens, run.gain)


@pytest.mark.parametrize("real", [0.3, 3.0])
def test_costs_far_above_the_prediction_are_noticed(real: float) -> None:
    """And what is measured decides: the same guesses pay at the cost predicted."""
    predicted = {"low": 0.05}
    dear = Run(always(low="low"), lambda kind, said: 0.4, {"low": real}, 0.4, predicted=predicted)
    assert dear.gain > 0.965
    assert sum(drafts for _, _, drafts, _ in dear.rounds) < 20
    cheap = Run(always(low="low"), lambda kind, said: 0.9, predicted, 0.05)
    assert cheap.gain > 2


def test_a_slow_first_step_does_not_make_guesses_look_cheap() -> None:
    run = Run(ALL, lambda kind, said: 0.0, COSTS, 0.1, first=20.0)
    assert run.gain > 0.97


def test_a_disturbed_round_does_not_decide() -> None:
    policy = Policy({"low": 0.2})
    for _ in range(3):
        policy.plain(1.0)
    for _ in range(5):
        policy.round("low", "low", 2, 2, 1.5)
    before = policy.costs("low")
    policy.round("low", "low", 2, 2, 40.0)
    assert policy.costs("low") == before
    assert policy.choose({"low": ("low", 16)}) is not None


def test_useless_guesses_are_few_and_tried_again() -> None:
    run = Run(always(model="model"), lambda kind, said: 0.0, COSTS, 0.1, tokens=400)
    at = [said for said, *_ in run.rounds]
    for start in range(0, 400, 100):
        assert sum(start <= said < start + 100 for said in at) <= 4
    assert max(at) > 50


def test_a_drafter_that_becomes_good_is_found_again() -> None:
    run = Run(
        always(ngram="ngram-2"),
        lambda kind, said: 0.0 if said < 150 else 1.0,
        COSTS,
        0.05,
        tokens=400,
    )
    late = [drafts for said, _, drafts, _ in run.rounds if said > 250]
    assert max(late) == 16
    assert run.gain > 1.5


def test_guesses_that_hold_are_taken_far() -> None:
    """Dear ones less far: what is remembered leaves some doubt."""
    for name, cost in COSTS.items():
        run = Run(always(**{name: name}), lambda kind, said: 1.0, COSTS, 0.02)
        assert (
            max(drafts for _, _, drafts, _ in run.rounds)
            >= {"ngram": 16, "low": 12, "model": 8}[name]
        )
        assert run.gain > 0.8 * 17 / (1 + 16 * (cost + 0.02)), name


def test_the_better_of_two_is_taken() -> None:
    rates = {"model": 0.8, "low": 0.95}
    run = Run(always(model="model", low="low"), lambda kind, said: rates[kind], COSTS, 0.02)
    taken = Counter(name for _, name, _, _ in run.rounds)
    assert taken["low"] > 5 * taken["model"]
    assert run.gain > 1.4


@given(st.data())
@settings(deadline=None, max_examples=30)
@slow
def test_no_round_without_a_promise(data: Any) -> None:
    """Never more than `most` or is offered, never without an offer, never below the margin."""
    policy = Policy(COSTS, row=data.draw(st.floats(0, 2)), most=data.draw(st.integers(1, 16)))
    kinds = {"ngram": "ngram-3", "model": "model", "low": "low"}
    assert policy.choose(ALL(0)) is None  # nothing is known of a plain step
    for _ in range(data.draw(st.integers(0, 40))):
        offered = data.draw(st.dictionaries(st.sampled_from(list(kinds)), st.integers(1, 20)))
        choice = policy.choose({name: (kinds[name], n) for name, n in offered.items()})
        if choice is None:
            policy.plain(data.draw(st.floats(0.5, 2)))
            continue
        name, drafts = choice
        assert 1 <= drafts <= min(offered[name], policy.most)
        rate = policy.agreement[kinds[name]].rate
        assert speedup(rate, drafts, policy.costs(name)) > MARGIN
        held = data.draw(st.integers(0, drafts))
        policy.round(name, kinds[name], drafts, held, data.draw(st.floats(0.5, 9)))
    assert policy.choose({}) is None


def test_a_plain_step_is_timed_again() -> None:
    run = Run(always(low="low"), lambda kind, said: 1.0, COSTS, 0.02, tokens=3000)
    between = itertools.groupby(
        itertools.pairwise(run.rounds), lambda pair: pair[1][0] - pair[0][0] == pair[0][3] + 1
    )
    assert max(len(list(rounds)) for unbroken, rounds in between if unbroken) <= 64


def test_agreement_counts_what_was_tested() -> None:
    """After the first miss nothing is known of the drafts that followed."""
    agreement = Agreement(prior=0.5)
    assert agreement.rate == 0.5
    agreement.seen(accepted=3, drafts=8)
    assert (agreement.hits, agreement.trials) == (3, 4)
    agreement.seen(accepted=4, drafts=4)
    assert (agreement.hits, agreement.trials) == (7, 8)
    agreement.age(10_000)
    assert agreement.rate == pytest.approx(0.5)


def test_offers_of_nothing_are_not_put_to_the_policy() -> None:
    asked: list[Any] = []

    class Recorded(Policy):
        def choose(self, offers: Any, row: float | None = None) -> None:
            asked.append(dict(offers))

    model = tiny_model(TARGET)
    drafters: dict[str, Drafter] = {"ngram": NGramDrafter()}
    drafters["model"] = ModelDrafter(model.view((0, 1)), model)
    how = Speculation(drafters, Recorded({}))
    assert how.choose([1, 2, 3], 4) is None
    assert how.choose([1, 2, 3, 1, 2], 4) is None
    assert how.choose([1, 2, 3, 1, 2], 0) is None
    assert asked == [{"model": ("model", 4)}, {"ngram": ("ngram-2", 4), "model": ("model", 4)}, {}]


def test_a_slow_first_round_does_not_count_for_ever() -> None:
    """Its kernels may have been loaded in it, or the machine slept."""
    policy = Policy({"ngram": 0.0})
    for _ in range(5):
        policy.plain(0.02)
    policy.round("ngram", "ngram-4", 2, 0, 60.0)
    assert policy.choose({"ngram": ("ngram-4", 8)}) is None
    for _ in range(300):
        policy.plain(0.02)
    assert policy.choose({"ngram": ("ngram-4", 8)}) is not None


def test_ngrams_of_a_shorter_text_are_found_anew() -> None:
    drafter = NGramDrafter()
    drafter.offer([1, 2, 3, 4, 1, 2, 3, 4, 1, 2], 4)
    assert drafter.offer([1, 2], 4)[1] == 0
    tokens = [5, 1, 2, 6, 1, 2]
    assert drafter.offer(tokens, 4) == ("ngram-2", 4)
    assert drafter.draft(tokens, 4, [], greedy, 0).tokens.tolist() == [6, 1, 2, 6]


def test_what_guesses_cost_in_company() -> None:
    """A step of 4 answers takes 1 s, and each guess in it 0.1 s more: 0.4 of an answer's share."""
    pace = Pace()
    assert pace.row(4) is None  # no plain step was timed
    for _ in range(5):
        pace.saw(4, guesses=0, chunk=0, seconds=1.0)
    assert pace.row(4) == pytest.approx(4 * Policy.row)  # as predicted
    for _ in range(5):
        pace.saw(4, guesses=3, chunk=0, seconds=1.3)
    assert pace.row(4) == pytest.approx(0.4)
    assert pace.row(5) is None  # another company is timed first
    assert pace.plain(5) == 1.0  # until then the nearest tells
    pace.saw(5, guesses=0, chunk=0, seconds=1.25)
    assert pace.row(5) == pytest.approx(0.4)
    for _ in range(64):
        pace.saw(5, guesses=1, chunk=0, seconds=1.35)
    assert pace.row(5) is None  # a plain step is timed again
    pace.saw(5, guesses=0, chunk=0, seconds=1.25)
    assert pace.row(5) == pytest.approx(0.4)


def test_chunks_fit_the_gap() -> None:
    """A quarter of a second, or six plain steps where those are longer."""
    pace = Pace()
    assert pace.chunk(2) == 64
    pace.saw(2, guesses=0, chunk=0, seconds=0.01)
    pace.saw(2, guesses=0, chunk=64, seconds=0.01 + 64 * 0.002)
    assert pace.chunk(2) == 125
    for _ in range(9):
        pace.saw(2, guesses=0, chunk=0, seconds=0.05)
    assert pace.chunk(2) == 150
    for _ in range(9):
        pace.saw(2, guesses=0, chunk=9, seconds=9.0)
    assert pace.chunk(2) == 16  # never less


def test_guesses_in_company_are_made_where_they_pay() -> None:
    for row, made in ((0.1, True), (1.5, False)):
        policy, rounds = Policy({"ngram": 0.0}), 0
        for _ in range(200):
            if (choice := policy.choose({"ngram": ("ngram-3", 7)}, row)) is None:
                policy.plain_in_company()
            else:
                rounds += 1
                policy.round_in_company("ngram-3", choice[1], choice[1], row)
        assert (rounds > 100) == made
