"""Answers that are held to a grammar: the same alone, in any company, and with any guesses."""

import itertools
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jsonschema_rs
import mlx.core as mx
import numpy as np
import pytest
from company import VOCABULARY, Company, Counted, Eager, Job, tiny_views
from conftest import slow
from test_constraint import PERSON, TREE, bytes_vocabulary

from mlx_cerebrum.decoding import decoder
from mlx_cerebrum.decoding.constraint import Constraint, Grammar, Grammars
from mlx_cerebrum.decoding.decode import greedy
from mlx_cerebrum.decoding.decoder import Decoder, generate_step
from mlx_cerebrum.decoding.drafters import ModelDrafter, NGramDrafter
from mlx_cerebrum.decoding.generation import Generation
from mlx_cerebrum.decoding.grammar_text import Ask
from mlx_cerebrum.decoding.sampling import Sampling
from mlx_cerebrum.decoding.speculative import Speculation
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer

END = 5
PIECES = {3: "a", 4: "b", 6: "ab", 7: "[", 8: "]", 9: ",", 10: "ba", 11: "x"}
VIEWS = {window: tiny_views(window, ((0, 1, 2, 3), (0, 1, 1, 2, 2, 3))) for window in (12, None)}
LISTS = 'start: "[" (item ("," item)*)? "]"\nitem: start | /a(b|ab)*x?/'
GRAMMARS = [
    Ask("lark", LISTS),
    Ask("regex", r"\[abab,baba\]x*(\[ab,ab\])?"),
    Ask("regex", "[ab]*x"),
]


def tokenizer(ends: frozenset[int] = frozenset({END})) -> Tokenizer:
    """Of a few letters, which cuts a text up greedily."""
    longest = sorted(PIECES.values(), key=len, reverse=True)
    ids = {text: token for token, text in PIECES.items()}
    found = re.compile("|".join(map(re.escape, longest)))
    made = SimpleNamespace(
        vocab_size=VOCABULARY,
        eos_token_ids=ends,
        control_ids=frozenset({0, 1, 2}),
        piece=lambda token: PIECES.get(token, ""),
        content=lambda token: PIECES.get(token, f"<{token}>"),
        encode_segments=lambda parts, bos: [0, *(ids[t] for t in found.findall(parts[1]))],
    )
    return cast(Tokenizer, made)


@pytest.fixture(scope="module")
def grammars() -> list[Grammar]:
    made = Grammars(tokenizer(), VOCABULARY)
    return [made.compile(ask) for ask in GRAMMARS]


def text_of(tokens: list[int]) -> str:
    return "".join(PIECES.get(token, "") for token in tokens)


@dataclass
class HeldJob(Job):
    """A job that is held to a grammar."""

    grammar: Grammar | None = None

    def chosen(self, logits: mx.array) -> list[int]:
        """By a plain loop, with a matcher of its own."""
        assert self.grammar is not None
        assert self.generation.failure is None
        tokens, first, held = self.generation.tokens, len(self.prompt) - 1, self.grammar.start()
        logits, adjust = logits[first:], self.sampling.adjust(self.prompt, [END])
        if adjust is not None:
            logits = adjust(logits, tokens[:first], mx.array(tokens[first:]), 0)
        found, sampler = list[int](), self.sampling.sampler()
        for number in range(len(logits)):
            row = held.apply(logits[number][None], [])
            found += cast(list[int], sampler(row, number).tolist())
            held.accept(tokens[first + 1 + number :][:1])
        return found


class ConstrainedCompany(Company):
    """Of which most are held to a grammar."""

    grammars: list[Grammar]

    def made(self, *args: Any) -> Job:
        job = super().made(*args)
        if self.draw.random() < 0.3:
            return job
        g, grammar, own = job.generation, self.draw.choice(self.grammars), job.sampling
        penalty = self.draw.choice([0, 1])
        sampling = Sampling(own.temp, top_p=own.top_p, seed=own.seed, frequency_penalty=penalty)
        g.sampler, g.adjust = sampling.sampler(), sampling.adjust(job.prompt, [END])
        g.constraint = grammar.start()
        return HeldJob(g, job.prompt, sampling, grammar=grammar)


SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(100, 107))]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("window", [12, None])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.one_in(8)
def test_random_company(
    seed: int, window: int | None, ahead: bool, grammars: list[Grammar], monkeypatch: Any
) -> None:
    draw, count = random.Random(seed), 25 if seed < 100 else 100
    step = draw.choice([4, 16, 256])
    monkeypatch.setattr(decoder, "device", SimpleNamespace(on_gpu=lambda: ahead))
    monkeypatch.setattr(decoder, "STEP", step)
    monkeypatch.setattr(Counted, "made", 0)
    there = ConstrainedCompany(draw, VIEWS[window], draw.choice([9, 64]), step, draw.randint(1, 7))
    there.grammars = grammars
    there.run(count)
    assert there.left == count
    assert there.held > 0


def generation(constraint: Constraint, most: int = 24, model: Model | None = None) -> Generation:
    model = model or VIEWS[None][0]
    return Generation(model, [3, 4, 3, 4], model.make_cache(), most, constraint=constraint)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, seed=5)])
@pytest.mark.parametrize("drafter", ["ngram", "model", "prefix"])
@pytest.mark.one_in(12)
def test_alone_with_guesses_of_any_drafter(
    drafter: str, sampling: Sampling, grammars: list[Grammar]
) -> None:
    """The text is that without guesses; some of them hold."""
    shortest, model = VIEWS[12][0], VIEWS[12][1]
    if drafter == "prefix":  # its first positions are the model's own
        shortest = model.view((0, 1, 1, 2))
    held = 0
    for seed, grammar in enumerate([*grammars, *grammars]):
        prompt = [3, 4, 7, 3, 4, 9, 6, 3, 8][seed:]
        made = Counted(shortest=1) if drafter == "ngram" else ModelDrafter(shortest, model, drafter)
        guessing = Speculation({drafter: made}, Eager([drafter], random.Random(seed)))
        guessing.policy.most = 5
        own = [Generation(model, list(prompt), model.make_cache(), 24) for _ in range(2)]
        for g in own:
            g.constraint, g.sampler = grammar.start(), sampling.sampler()
        own[0].speculation = guessing
        found, wanted = ([token for token, _ in Decoder().run(g)] for g in own)
        assert found == wanted
        held += sum(kept * times for (_, _, kept), times in guessing.rounds.items())
    assert held > 0


def test_a_complete_answer_only_ends(grammars: list[Grammar]) -> None:
    g = generation(grammars[1].start())
    tokens = [token for token, _ in Decoder().run(g)]
    end = tokens.index(END)
    assert re.fullmatch(GRAMMARS[1].source, text_of(tokens[:end]))
    assert tokens[end:] == [END] * (24 - end)


def test_without_an_end_token_an_answer_ends_itself() -> None:
    grammar = Grammars(tokenizer(frozenset()), VOCABULARY).compile(Ask("choice", '["abab", "ba"]'))
    g = generation(grammar.start())
    tokens = [token for token, _ in Decoder().run(g)]
    assert text_of(tokens) in ("abab", "ba")
    assert g.left == 0
    assert g.failure is None


def test_forced_tokens_save_passes(grammars: list[Grammar]) -> None:
    """They are checked like any guess, so the text is what it is without them."""
    g, decoder = generation(grammars[1].start()), Decoder()
    decoder.add(g)
    steps = 0
    while g.left > 0 and END not in g.tokens[g.prompt :]:
        decoder.step()
        steps += 1
    assert g.chosen >= 6
    assert steps <= g.chosen - 3


def test_log_probabilities_are_those_before_the_mask(grammars: list[Grammar]) -> None:
    g = generation(grammars[0].start(), most=6)
    g.top_logprobs = 3
    decoder = Decoder()
    decoder.add(g)
    found = list(itertools.chain(*(a.logprobs for _ in range(12) for a in decoder.step())))
    logits = g.model(mx.array([g.tokens]))[0].astype(mx.float32)
    wanted = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    for number, one in enumerate(found, g.prompt):
        assert one.token == g.tokens[number]
        assert abs(one.logprob - wanted[number - 1][one.token]) < 1e-4
        assert abs(one.top[0][1] - wanted[number - 1].max()) < 1e-4


def test_one_that_fails_leaves_the_others_alone(grammars: list[Grammar]) -> None:
    broken, fine, free = generation(grammars[0].start()), generation(grammars[2].start()), None
    free = Generation(broken.model, [3, 4, 3, 4], broken.model.make_cache(), 24)
    wanted = list(generate_step([3, 4, 3, 4], broken.model, max_tokens=24))
    decoder = Decoder()
    runs = [decoder.run(g) for g in (broken, fine, free)]
    for run in runs:
        next(run)
    cast(Constraint, broken.constraint)._fail("as if a limit was met")
    with pytest.raises(RequestError, match="can't be held to what was asked: as if"):
        list(runs[0])
    assert [free.tokens[4], *(token for token, _ in runs[2])] == wanted
    list(runs[1])
    assert set(text_of(fine.tokens[4:])) <= set("abx")


def test_end_tokens_must_stay_possible(grammars: list[Grammar]) -> None:
    for sampling in (Sampling(ignore_eos=True), Sampling(min_tokens=3)):
        adjust = sampling.adjust([3], [END])
        with pytest.raises(RequestError, match="ignore-eos and min-tokens"):
            Generation(VIEWS[None][0], [3], [], 9, adjust=adjust, constraint=grammars[0].start())


@slow
def test_documents_of_a_random_model(tmp_path: Path) -> None:
    """Many at once, drawn and greedy: those that end are valid."""
    (model, *_) = tiny_views(12, ((0, 1, 1),), vocab_size=260)
    made, ended = bytes_vocabulary(tmp_path), 0
    grammars, decoder = Grammars(made, 260), Decoder(8)
    asked: list[Any] = [
        PERSON,
        TREE,
        {"enum": ["a", {"b": [1]}]},
        {"type": "array", "items": PERSON},
    ]
    held = [grammars.compile(Ask("json_schema", json.dumps(schema))) for schema in asked]
    jobs = []
    for seed in range(24):
        sampler = Sampling(1.0, seed=seed).sampler() if seed % 4 else greedy
        ids = made.encode(f"{seed}: ")
        g = Generation(model, ids, model.make_cache(), 160, sampler)
        g.constraint = held[seed % 3 if seed < 18 else 3].start()
        g.speculation = Speculation(
            {"ngram": NGramDrafter()}, Eager(["ngram"], random.Random(seed))
        )
        decoder.add(g)
        jobs.append((g, asked[seed % 3 if seed < 18 else 3]))
    while any(g.left > 0 for g, _ in jobs):
        decoder.step()
    for g, schema in jobs:
        assert g.failure is None
        answer = g.tokens[g.prompt :]
        if 2 in answer:
            ended += 1
            text = made.decode(answer[: answer.index(2)])
            assert jsonschema_rs.is_valid(schema, json.loads(text)), text
    assert ended > 8
