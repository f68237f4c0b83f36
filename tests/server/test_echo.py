"""Prompts that come back with their answers: text, log-probabilities, or nothing besides them."""

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import mistral_model, resting, slow, write_checkpoint
from server_room import WAIT, Running, error, events, post, serving
from tiny import tiny_config, tiny_prompt, tiny_weights

from mlx_cerebrum import load
from mlx_cerebrum.decoding import decoder
from mlx_cerebrum.decoding.logprobs import TokenLogprob
from mlx_cerebrum.decoding.prompt_store import PromptStore
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.server.answers import TextCompletion
from mlx_cerebrum.server.batch import Batch
from mlx_cerebrum.server.engine import BatchEngine
from mlx_cerebrum.server.jobs import NO_TOKEN, BusyError, Event, Failed, Job, Piece
from mlx_cerebrum.server.task import Counts, Task
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights.views import describe

WINDOW = 12
CONFIG = tiny_config(
    num_hidden_layers=4, vocab_size=260, max_position_embeddings=400, sliding_window=WINDOW
)
Loaded = tuple[Model, Tokenizer]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A window of 12, a token a byte."""
    folder = tmp_path_factory.mktemp("echo")
    return load(write_checkpoint(folder / "small", CONFIG, tiny_weights(CONFIG, seed=3)))


@pytest.fixture
def make(loaded: Loaded) -> Iterator[Callable[..., BatchEngine]]:
    engines: list[BatchEngine] = []

    def make(**options: Any) -> BatchEngine:
        settings = {"max_batch": 6, "cache_bytes": 10**7, "prefill_step_size": 5} | options
        engines.append(BatchEngine({"small": loaded[0]}, loaded[1], **settings))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close(0)


class Heard:
    """A job's pieces, by choice."""

    def __init__(self, engine: BatchEngine, job: Job, follows: bool = False) -> None:
        self.job, self.left = job, job.n
        self.pieces: list[list[Piece]] = [[] for _ in range(job.n)]
        self.failed: str | None = None
        self.over = threading.Event()
        self.cancel = engine.submit(job, self._deliver, follows=follows)

    def _deliver(self, event: Event) -> None:
        if isinstance(event, Piece):
            self.pieces[event.choice].append(event)
            self.left -= event.finish_reason is not None
        if isinstance(event, Failed):
            self.failed, self.left = event.message, 0
        if not self.left:
            self.over.set()

    def done(self) -> "Heard":
        assert self.over.wait(WAIT)
        assert self.failed is None
        return self


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(tiny_prompt(CONFIG, length, seed))


def chances(model: Model, ids: Sequence[int]) -> Any:
    """Log-probabilities of what follows each token, from one pass without a cache, in float64."""
    logits = np.array(model(mx.array([ids]))[0]).astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def are_right(model: Model, ids: Sequence[int], found: Sequence[TokenLogprob], k: int) -> None:
    """`found` are the scores of `ids` from the second on."""
    assert [of.token for of in found] == list(ids[1:])
    for row, of in zip(chances(model, ids), found, strict=False):
        assert of.logprob == pytest.approx(row[of.token], abs=1e-4)
        assert [logprob for _, logprob in of.top] == pytest.approx(-np.sort(-row)[:k], abs=1e-4)
        for token, logprob in of.top:
            assert logprob == pytest.approx(row[token], abs=1e-4)
            assert (logprob == of.logprob) or token != of.token  # to the bit: clients compare them


# ---- the engine


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("draft", ["none", "ngram"])
@pytest.mark.parametrize("step", [5, 300])
@pytest.mark.one_in(8)
def test_scores_are_those_of_one_forward_pass(
    make: Callable[..., BatchEngine],
    loaded: Loaded,
    draft: str,
    step: int,
    ahead: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Alone and in company, past the window, at chunks' ends, and when the prompt is kept."""
    monkeypatch.setattr(decoder, "device", SimpleNamespace(on_gpu=lambda: ahead))
    engine = make(prefill_step_size=step, draft=draft)
    asked = [
        (1, 1, 1),
        (2, 0, 2),
        (5, 5, 1),
        (6, 20, 1),
        (7, 1, 3),
        (WINDOW + 1, 2, 1),
        (300, 1, 1),  # more than are scored at once
    ]
    for _ in range(2):
        other = Heard(engine, Job("small", prompt(20, 7) * 3, 60))
        heard = [
            Heard(engine, Job("small", prompt(length, k), 6, n=n, top_logprobs=k, echo=True))
            for length, k, n in asked
        ]
        for (length, k, _), job in zip(asked, heard, strict=True):
            for pieces in job.done().pieces:
                first, *rest = pieces
                answer = [piece.logprob for piece in pieces if piece.logprob is not None]
                ids = [*prompt(length, k), *(piece.token for piece in pieces)]
                assert len(pieces) == len(answer) == 6
                are_right(loaded[0], ids, [*first.scores, *answer], k)
                assert len(first.scores) == length - 1
                assert not any(piece.scores for piece in rest)
                assert first.cached_tokens == 0
        other.done()
    again = Heard(engine, Job("small", prompt(300, 1), 1)).done()  # what was scored is kept
    assert again.pieces[0][0].cached_tokens == 299


@pytest.mark.parametrize("length", [1, 5, 6, 30])
def test_nothing_is_generated_where_nothing_is_asked_for(
    make: Callable[..., BatchEngine], loaded: Loaded, length: int
) -> None:
    engine = make()
    other = Heard(engine, Job("small", prompt(9), 40))
    for _ in range(2):
        job = Job("small", prompt(length), 0, n=2, top_logprobs=2, echo=True)
        for choice, pieces in enumerate(Heard(engine, job).done().pieces):
            (only,) = pieces
            are_right(loaded[0], job.prompt, only.scores, 2)
            assert only == Piece(choice, NO_TOKEN, "", "length", 0, scores=only.scores)
        bare = Heard(engine, Job("small", prompt(length), 0, echo=True)).done()
        assert bare.pieces[0][0].scores == []
    other.done()
    stats = engine.stats()
    assert (stats.generated_tokens, stats.active) == (40, 0)
    assert stats.finished["length"] == 5


def test_an_end_token_is_listed_after_a_prompt(
    make: Callable[..., BatchEngine], loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its text stays unseen; who reads scores counts on a token after the prompt's."""
    first = int(np.argmax(chances(loaded[0], prompt(9))[-1]))
    monkeypatch.setattr(loaded[1], "eos_token_ids", frozenset({first}))
    for echo in (True, False):
        job = Job("small", prompt(9), 5, top_logprobs=0, echo=echo)
        (piece,) = Heard(make(), job).done().pieces[0]
        assert (piece.token, piece.text, piece.finish_reason) == (first, "", "stop")
        assert (piece.logprob is not None) == echo


@pytest.mark.parametrize("k", [0, 5])
@slow
def test_no_more_memory_than_predicted(tmp_path: Path, k: int) -> None:
    config = tiny_config(num_hidden_layers=2, vocab_size=32000, max_position_embeddings=400)
    model, tokenizer = load(write_checkpoint(tmp_path / "m", config, tiny_weights(config, seed=3)))
    batch = Batch(
        {"small": model},
        PromptStore(0),
        Counts(),
        lambda task: None,
        max_rows=1,
        prefill_step_size=300,
    )
    job = Job("small", prompt(400), 0, top_logprobs=k, echo=True)
    mx.synchronize()
    before = resting()
    batch.start(Task(job, tokenizer, lambda event: None, lambda task: None))
    predicted = batch.predicted()
    while batch.tasks:
        batch.step()
    assert mx.get_peak_memory() - before <= predicted


def test_a_request_is_taken_whole(make: Callable[..., BatchEngine]) -> None:
    engine = make(max_batch=1, max_queue=1)
    jobs = [Job("small", prompt(6, seed), 40) for seed in range(5)]
    heard = [Heard(engine, job, follows=number > 0) for number, job in enumerate(jobs)]
    with pytest.raises(BusyError):
        Heard(engine, jobs[0])
    for each in heard:
        each.done()


def test_an_answer_keeps_the_space_between_it_and_the_prompt(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("mistral")
    (folder / "tokenizer.model").write_bytes(mistral_model().read_bytes())
    tokenizer = Tokenizer.from_directory(folder)
    for before, after in [("Once upon", " a time"), (" \u00e9", "\U0001f600 x"), ("</s>\n", "  y")]:
        ids = tokenizer.encode(before + after)
        for cut in range(1, len(ids)):
            job = Job("small", tuple(ids[:cut]), len(ids) - cut, echo=True)
            (answer,) = Task(job, tokenizer, lambda event: None, lambda task: None).texts
            shown = "".join(map(tokenizer.detokenizer().add, ids[:cut]))
            assert shown + "".join(answer.add(token)[0] for token in ids[cut:]) == before + after


# ---- the API


@pytest.fixture(scope="module")
def server(loaded: Loaded) -> Iterator[Running]:
    engine = BatchEngine({"small": loaded[0]}, loaded[1], max_batch=4, max_queue=3)
    with serving(engine, loaded[1], {"small": describe(loaded[0])}) as running:
        yield running


def same(one: Any, other: Any) -> None:
    """Equal but for a score's last bit: which rows are computed together differs by the run."""
    if isinstance(one, list) and isinstance(other, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            same(a, b)
    elif isinstance(one, dict) and isinstance(other, dict):
        assert one.keys() == other.keys()
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, float):
        assert one == pytest.approx(other, abs=1e-5)
    else:
        assert one == other


def answered(server: Running, **body: Any) -> tuple[list[Any], Any]:
    """Choices and usage, which are the same whole and streamed."""
    answer = post(server, "/v1/completions", **body)
    assert answer.status_code == 200, answer.text
    whole = answer.json()
    TextCompletion.model_validate(whole)  # as the OpenAPI document has it
    *found, last, done = events(
        post(server, "/v1/completions", **body, stream=True, stream_options={"include_usage": True})
    )
    assert done == "[DONE]"
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    for choice in whole["choices"]:
        parts = [c for one in found for c in one["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        for key, values in (choice["logprobs"] or {}).items():
            listed = [part["logprobs"] for part in parts if part["logprobs"]]
            same([value for one in listed for value in one[key]], values)
    return whole["choices"], whole["usage"]


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("max_tokens", [0, 1, 5])
@pytest.mark.one_in(8)
def test_text_and_scores_of_prompt_and_answer(
    server: Running, loaded: Loaded, n: int, max_tokens: int
) -> None:
    model, tokenizer = loaded
    prompts = ["Once upon a time, far past the window", "a", "\u00e9\n"]
    choices, usage = answered(
        server, prompt=prompts, max_tokens=max_tokens, n=n, logprobs=2, echo=True, ignore_eos=True
    )
    assert len(choices) == 3 * n
    assert usage["completion_tokens"] == 3 * n * max_tokens
    for choice in choices:
        text, found = prompts[choice["index"] // n], choice["logprobs"]
        ids = tokenizer.encode(text)
        assert choice["text"].startswith(text)
        assert len(found["tokens"]) == len(ids) + max_tokens
        assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
        rows = chances(model, ids)
        for i, row in enumerate(rows[:-1], start=1):
            assert found["token_logprobs"][i] == pytest.approx(row[ids[i]], abs=1e-4)
            top = found["top_logprobs"][i]
            assert top[found["tokens"][i]] == found["token_logprobs"][i]
            assert max(top.values()) == pytest.approx(row.max(), abs=1e-4)
        ends = [*found["text_offset"][1:], len(choice["text"])]
        for token, start, end in zip(found["tokens"], found["text_offset"], ends, strict=True):
            if token.isascii() and token.isprintable() and not token.startswith(("bytes:", "<")):
                assert choice["text"][start:end] == token


def test_a_prompt_without_scores_or_as_ids(server: Running, loaded: Loaded) -> None:
    _, tokenizer = loaded
    (plain,), _ = answered(server, prompt="Hello", max_tokens=3)
    (echoed,), _ = answered(server, prompt="Hello", max_tokens=3, echo=True)
    ids = tokenizer.encode("Hello")
    (from_ids,), _ = answered(server, prompt=ids, max_tokens=3, echo=True)
    assert echoed == from_ids == plain | {"text": f"Hello{plain['text']}"}
    (nothing,), usage = answered(server, prompt="Hello", max_tokens=0, echo=True)
    assert nothing == plain | {"text": "Hello"}
    assert usage["total_tokens"] == usage["prompt_tokens"] == len(ids)


def test_a_prompt_may_take_all_positions(server: Running) -> None:
    body = {"prompt": [5] * 400, "echo": True}
    (choice,), _ = answered(server, **body, max_tokens=0, logprobs=0)
    assert len(choice["logprobs"]["tokens"]) == 400
    refused = post(server, "/v1/completions", **body, max_tokens=1)
    assert error(refused) == (400, "context_length_exceeded", "prompt")


@slow
def test_more_prompts_than_may_wait(server: Running) -> None:
    prompts = [f"Question {number}" for number in range(40)]
    choices, _ = answered(server, prompt=prompts, max_tokens=1, logprobs=1, echo=True)
    assert [choice["text"][: len(text)] for choice, text in zip(choices, prompts, strict=True)] == (
        prompts
    )
