"""The engine: jobs from any thread in, the same text as `stream_generate` out."""

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import INTERLEAVED_8, plan_yaml, slow, write_checkpoint
from tiny import tiny_config, tiny_prompt, tiny_weights

from mlx_cerebrum import load
from mlx_cerebrum.decoding.logprobs import TokenLogprob
from mlx_cerebrum.decoding.prompt_store import PromptStore
from mlx_cerebrum.decoding.sampling import Sampling
from mlx_cerebrum.decoding.stream import stream_generate
from mlx_cerebrum.decoding.text import AnswerText
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.limits import memory_limit
from mlx_cerebrum.server.batch import Batch
from mlx_cerebrum.server.engine import BatchEngine
from mlx_cerebrum.server.job_bytes import jobs_bytes
from mlx_cerebrum.server.jobs import BusyError, ClosedError, Event, Failed, Job, Piece, Reading
from mlx_cerebrum.server.task import choice_seed
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights.opening import ModelSpec, open_model
from mlx_cerebrum.weights.views import load_views

WINDOW = 12
CONFIG = tiny_config(
    num_hidden_layers=8, vocab_size=260, max_position_embeddings=2048, sliding_window=WINDOW
)
SECONDS = 60.0  # until a test gives up


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Model], Tokenizer]:
    """Two views, "small" and "plan", of one checkpoint."""
    folder = tmp_path_factory.mktemp("engine")
    path = write_checkpoint(folder / "small", CONFIG, tiny_weights(CONFIG, seed=3))
    (folder / "plan.yml").write_text(plan_yaml(INTERLEAVED_8))
    models, tokenizer = load_views(open_model(ModelSpec(path)), [str(folder / "plan.yml")])
    return dict(zip(("small", "plan"), models.values(), strict=True)), tokenizer


Make = Callable[..., BatchEngine]


@pytest.fixture
def make(loaded: tuple[dict[str, Model], Tokenizer]) -> Iterator[Make]:
    engines: list[BatchEngine] = []

    def make(**options: Any) -> BatchEngine:
        settings = {"max_batch": 4, "max_queue": 8, "cache_bytes": 0, "prefill_step_size": 5}
        engines.append(BatchEngine(*loaded, **(settings | options)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close(0)


class Client:
    """Submits a job; keeps what it hears of it."""

    def __init__(self, engine: BatchEngine, job: Job, hold: bool = False) -> None:
        self.job, self.events = job, list[Event]()
        self.over, self.first = threading.Event(), threading.Event()
        self.go_on = threading.Event()  # `hold`: the engine's thread stops at the first token
        self._left = job.n
        if not hold:
            self.go_on.set()
        self.cancel = engine.submit(job, self._deliver)

    def _deliver(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Piece):
            self.first.set()
            assert self.go_on.wait(SECONDS)
            self._left -= event.finish_reason is not None
        if isinstance(event, Failed) or not self._left:
            self.over.set()

    def started(self) -> "Client":
        assert self.first.wait(SECONDS)
        return self

    def done(self) -> "Client":
        assert self.over.wait(SECONDS)
        return self

    @property
    def failed(self) -> str | None:
        return next((e.message for e in self.events if isinstance(e, Failed)), None)

    def pieces(self, choice: int = 0) -> list[Piece]:
        assert self.failed is None
        return [e for e in self.events if isinstance(e, Piece) and e.choice == choice]

    def tokens(self, choice: int = 0) -> list[int]:
        return [piece.token for piece in self.pieces(choice)]

    def text(self, choice: int = 0) -> str:
        return "".join(piece.text for piece in self.pieces(choice))


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(tiny_prompt(CONFIG, length, seed))


def job(length: int, max_tokens: int, seed: int = 0, **more: Any) -> Job:
    return Job(more.pop("model", "small"), prompt(length, seed), max_tokens, **more)


def expected(loaded: Any, wanted: Job) -> tuple[str, list[int], str | None]:
    """`(text, tokens, finish reason)` of stream_generate for choice 0."""
    models, tokenizer = loaded
    s = wanted.sampling
    sampler = s.sampler()
    responses = list(
        stream_generate(
            models[wanted.model],
            tokenizer,
            wanted.prompt,
            max_tokens=wanted.max_tokens,
            sampler=sampler,
            stop=wanted.stop,
        )
    )
    text = "".join(r.text for r in responses)
    return text, [r.token for r in responses], responses[-1].finish_reason


def is_right(loaded: Any, client: Client) -> None:
    text, tokens, reason = expected(loaded, client.job)
    assert client.tokens() == tokens
    assert client.text() == text
    assert [piece.finish_reason for piece in client.pieces()][-1] == reason
    assert all(piece.finish_reason is None for piece in client.pieces()[:-1])


@slow
def test_many_at_once_get_what_stream_generate_gives(make: Make, loaded: Any) -> None:
    engine = make(cache_bytes=10**6)
    assert engine.names == ("small", "plan")
    jobs = [
        job(3 + 7 * (i % 6), 5 + 9 * (i % 4), i, model=("small", "plan")[i % 2]) for i in range(10)
    ]
    for client in [Client(engine, wanted).done() for wanted in jobs]:
        is_right(loaded, client)
    stats = engine.stats()
    assert stats.finished == {"stop": 0, "length": 10, "cancelled": 0, "failed": 0}
    assert stats.prompt_tokens == sum(len(wanted.prompt) for wanted in jobs)
    assert stats.generated_tokens == sum(wanted.max_tokens for wanted in jobs)


@slow
def test_submitting_from_many_threads(make: Make, loaded: Any) -> None:
    engine = make(max_queue=100)
    clients: list[Client] = []

    def submit(seed: int) -> None:
        clients.extend(Client(engine, job(4 + seed, 9, seed + i)) for i in range(3))

    threads = [threading.Thread(target=submit, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for client in clients:
        is_right(loaded, client.done())


@slow
def test_stop_strings(make: Make, loaded: Any) -> None:
    engine = make()
    text = expected(loaded, job(9, 60))[0]
    for stop in ((text[20:23],), (text[5:9], text[30]), ("not in it",), (text[-1] + "zz",)):
        client = Client(engine, job(9, 60, stop=stop)).done()
        is_right(loaded, client)
        assert not any(s in client.text() for s in stop)
    assert engine.stats().finished["stop"] == 2


def test_an_end_token_frees_the_place_and_is_not_in_the_text(
    make: Make, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = expected(loaded, job(9, 60))[1]
    end = next(t for i, t in enumerate(tokens) if i > 10 and t not in tokens[:i])
    monkeypatch.setattr(loaded[1], "eos_token_ids", frozenset({end}))
    client = Client(make(), job(9, 60, top_logprobs=0)).done()
    is_right(loaded, client)
    last = client.pieces()[-1]
    assert (last.token, last.text, last.finish_reason, last.logprob) == (end, "", "stop", None)
    assert all(piece.logprob is not None for piece in client.pieces()[:-1])


def test_an_end_token_that_frees_held_text_is_unseen_too(
    make: Make, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could have become a stop string comes with it; the token itself is in no text."""
    tokens = expected(loaded, job(9, 60))[1]
    end = next(t for i, t in enumerate(tokens) if i > 10 and t not in tokens[:i])
    monkeypatch.setattr(loaded[1], "eos_token_ids", frozenset({end}))
    text = expected(loaded, job(9, 60))[0]
    client = Client(make(), job(9, 60, top_logprobs=0, stop=(text[-1] + "zz",))).done()
    is_right(loaded, client)
    last = client.pieces()[-1]
    assert (last.token, last.text, last.logprob) == (end, text[-1], None)


SAMPLED = Sampling(0.9, top_p=0.95, min_p=0.01, seed=7)


@slow
def test_a_seed_gives_the_same_text_alone_and_among_others(make: Make, loaded: Any) -> None:
    engine = make(max_batch=8)
    wanted = job(10, 40, sampling=SAMPLED)
    alone = Client(engine, wanted).done()
    is_right(loaded, alone)
    held = Client(engine, job(5, 2, 3), hold=True).started()
    others = [Client(engine, job(4 + i, 30, i, sampling=Sampling(1.0))) for i in range(3)]
    among = Client(engine, wanted)
    greedy_too = Client(engine, job(20, 30, 2))
    held.go_on.set()
    for client in [*others, greedy_too, among]:
        client.done()
    assert among.tokens() == alone.tokens()
    is_right(loaded, greedy_too)


def test_without_a_seed_every_request_is_another(make: Make) -> None:
    engine = make()
    wanted = job(10, 30, sampling=Sampling(1.5), n=2)
    clients = [Client(engine, wanted).done() for _ in range(2)]
    texts = {tuple(client.tokens(choice)) for client in clients for choice in (0, 1)}
    assert len(texts) == 4


@slow
def test_choices_draw_with_keys_of_their_own(make: Make, loaded: Any) -> None:
    engine = make()
    wanted = job(10, 30, sampling=SAMPLED, n=3)
    client, again = Client(engine, wanted).done(), Client(engine, wanted).done()
    is_right(loaded, client)
    assert len({tuple(client.tokens(choice)) for choice in range(3)}) == 3
    for choice in range(3):
        assert client.tokens(choice) == again.tokens(choice)
    seeds = [choice_seed(Sampling(1.0, seed=s), i) for s in (0, 1, 2**64 - 1) for i in range(4)]
    assert seeds[:4][0] == 0
    assert len(set(seeds)) == 12
    assert all(seed is not None and 0 <= seed < 2**64 for seed in seeds)
    assert engine.stats().finished["length"] == 2


def test_at_temperature_zero_nothing_else_matters(make: Make, loaded: Any) -> None:
    client = Client(make(), job(10, 20, sampling=Sampling(0.0, 0.3, 0.2, 5), n=2)).done()
    assert client.tokens(0) == client.tokens(1) == expected(loaded, job(10, 20))[1]


@pytest.mark.parametrize("k", [0, 1, 5, 20])
@slow
def test_logprobs_are_of_the_plain_distribution(make: Make, loaded: Any, k: int) -> None:
    sampling = Sampling(1.2, top_p=0.5, seed=1)
    engine = make()
    client = Client(engine, job(10, 12, sampling=sampling, top_logprobs=k, n=2)).done()
    unasked = Client(engine, job(10, 12, sampling=sampling)).done()
    assert [piece.logprob for piece in unasked.pieces()] == [None] * 12
    model = loaded[0]["small"]
    for choice in (0, 1):
        seen = list(client.job.prompt)
        for piece in client.pieces(choice):
            logits = model(mx.array([seen]), model.make_cache())[0, -1]
            row: Any = (logits - mx.logsumexp(logits)).tolist()
            assert isinstance(piece.logprob, TokenLogprob)
            assert piece.logprob.token == piece.token
            assert piece.logprob.logprob == pytest.approx(row[piece.token], abs=1e-4)
            best = sorted(range(len(row)), key=lambda i: -row[i])[:k]
            assert [token for token, _ in piece.logprob.top] == best
            for token, logprob in piece.logprob.top:
                assert logprob == pytest.approx(row[token], abs=1e-4)
                assert type(token) is int
            assert math.isfinite(piece.logprob.logprob)
            seen.append(piece.token)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "none"}, "no model 'none'; there are small, plan"),
        ({"length": 0}, "the prompt is empty"),
        ({"max_tokens": 0}, "max-tokens must be at least 1"),
        ({"max_tokens": 2040}, "more than the model's 2048 positions"),
        ({"n": 0}, "n must be from 1 to 4"),
        ({"n": 5}, "n must be from 1 to 4"),
        ({"top_logprobs": 21}, "top_logprobs must be from 0 to 20"),
        ({"stop": ("",)}, "a stop string is empty"),
        ({"sampling": Sampling(logit_bias=((260, 1.0),))}, "token id 260 is not below 260"),
    ],
)
def test_jobs_that_can_never_run(make: Make, changes: dict[str, Any], said: str) -> None:
    engine = make()
    with pytest.raises(RequestError, match=said):
        engine.submit(job(**({"length": 9, "max_tokens": 5} | changes)), print)
    with pytest.raises(RequestError, match="token id 260 is not below 260"):
        engine.submit(Job("small", (5, 260), 5), print)
    assert engine.stats().queued == 0


@slow
def test_a_full_queue_refuses(make: Make, loaded: Any) -> None:
    engine = make(max_batch=2, max_queue=3)
    held = Client(engine, job(5, 30), hold=True).started()
    taken = [Client(engine, job(6, 5, seed)) for seed in range(4)]  # one has a place, three wait
    with pytest.raises(BusyError, match="3 requests are waiting already"):
        engine.submit(job(6, 5), print)
    other = Client(engine, job(6, 5, model="plan"))  # places of its own
    assert engine.stats().queued == 5
    taken[-1].cancel()
    taken.append(Client(engine, job(6, 5, 9)))
    with pytest.raises(BusyError):
        engine.submit(job(6, 5), print)
    held.go_on.set()
    for client in [held, *taken[:3], taken[4], other]:
        is_right(loaded, client.done())
    assert taken[3].events == []


def test_jobs_start_in_the_order_they_came(make: Make) -> None:
    engine = make(max_batch=2, max_queue=20)
    held = Client(engine, job(5, 2), hold=True).started()
    order: list[int] = []
    over = threading.Semaphore(0)

    def deliver(number: int) -> Callable[[Event], None]:
        def told(event: Event) -> None:
            if isinstance(event, Reading) and number not in order:
                order.append(number)
            if isinstance(event, Piece) and event.finish_reason:
                over.release()

        return told

    for number in range(8):  # one of two sequences is not passed by those of one
        engine.submit(job(4, 3, number, n=2 if number == 3 else 1), deliver(number))
    held.go_on.set()
    for _ in range(9):
        assert over.acquire(timeout=SECONDS)
    assert order == list(range(8))


def test_models_do_not_pass_each_other_either(make: Make) -> None:
    engine = make()
    held = Client(engine, job(5, 1, 5), hold=True).started()
    started: list[Job] = []
    jobs = [job(4, 2, seed, model=("plan", "small")[seed % 2]) for seed in range(4)]
    over = [_starts(engine, wanted, started) for wanted in jobs]
    held.go_on.set()
    for event in over:
        assert event.wait(SECONDS)
    assert started == jobs


def test_who_leaves_the_queue_leaves_the_place(make: Make, loaded: Any) -> None:
    engine = make(max_batch=2, max_queue=0)
    held = Client(engine, job(5, 5), hold=True).started()
    for seed in range(3):
        Client(engine, job(5, 5, seed)).cancel()
    last = Client(engine, job(5, 5, 9))
    with pytest.raises(BusyError):
        engine.submit(job(5, 5), print)
    held.go_on.set()
    is_right(loaded, last.done())


def test_a_job_waits_for_places_without_being_passed(make: Make) -> None:
    engine = make(max_batch=4, max_queue=20)
    held = Client(engine, job(5, 30), hold=True).started()
    wide = Client(engine, job(4, 3, n=4))
    narrow = Client(engine, job(4, 3, 1))
    held.go_on.set()
    narrow.done()
    assert wide.over.is_set()


def test_models_take_turns(make: Make) -> None:
    engine = make()
    held = Client(engine, job(5, 1, 5), hold=True).started()
    heard: list[str] = []
    over = threading.Semaphore(0)

    def deliver(name: str) -> Callable[[Event], None]:
        def told(event: Event) -> None:
            if isinstance(event, Piece):
                heard.append(name)
                if event.finish_reason:
                    over.release()

        return told

    for name in ("small", "plan"):
        engine.submit(job(5, 30, model=name), deliver(name))
    held.go_on.set()
    for _ in range(2):
        assert over.acquire(timeout=SECONDS)
    both = heard[4:-4]
    assert all(one != other for one, other in pairwise(both))


@pytest.mark.parametrize("stage", ["queued", "running"])
def test_cancelling(make: Make, loaded: Any, stage: str) -> None:
    engine = make(max_batch=1)
    held = Client(engine, job(5, 10), hold=True).started()
    waiting = Client(engine, job(5, 2, 1))
    after = Client(engine, job(5, 2, 2))
    gone = waiting if stage == "queued" else held
    gone.cancel()
    told = len(gone.events)
    held.go_on.set()
    after.done()
    assert len(gone.events) == told
    assert engine.stats().finished["cancelled"] == 1
    for client in {held, waiting, after} - {gone}:
        is_right(loaded, client.done())
    gone.cancel()  # again, and when it is long gone
    assert engine.stats().finished["cancelled"] == 1
    is_right(loaded, Client(engine, job(5, 3, 4)).done())


def test_a_job_may_be_cancelled_from_its_own_event(make: Make, loaded: Any) -> None:
    engine = make(max_batch=1)
    cancels: list[Callable[[], None]] = []
    known, heard = threading.Event(), list[Event]()

    def deliver(event: Event) -> None:
        assert known.wait(SECONDS)
        heard.append(event)
        if isinstance(event, Piece):
            cancels[0]()

    cancels.append(engine.submit(job(9, 50), deliver))
    known.set()
    is_right(loaded, Client(engine, job(5, 5)).done())
    assert sum(isinstance(event, Piece) for event in heard) == 1


def job_bytes(models: dict[str, Model], *jobs: Job) -> int:
    return jobs_bytes(models, jobs, 5, None, "none")


def _limit(engine_bytes: float) -> int:
    mx.clear_cache()
    return int(mx.get_active_memory() + engine_bytes)


def test_a_job_that_never_fits_is_refused_with_the_numbers(make: Make) -> None:
    engine = make(memory_limit=_limit(10e6), prefill_step_size=1024)
    with pytest.raises(RequestError, match=r"1500 tokens with 4 x 500 more needs \S+ MB"):
        engine.submit(job(1500, 500, n=4, model="plan"), print)
    Client(engine, job(5, 3)).done()


@slow
def test_fewer_tokens_where_that_will_do(tmp_path: Path) -> None:
    """With no window every token takes memory: as many as there is memory for."""
    path = write_checkpoint(tmp_path / "m", CONFIG, tiny_weights(CONFIG, seed=3))
    model, tokenizer = load(str(path), window=0)
    engine = BatchEngine({"m": model}, tokenizer, prefill_step_size=5)
    try:
        wanted = job(9, 40, model="m", sampling=Sampling(ignore_eos=True))
        engine._budget = job_bytes({"m": model}, wanted)
        with pytest.raises(RequestError, match="ask for fewer tokens"):
            engine.submit(replace(wanted, max_tokens=1500), print)
        client = Client(engine, replace(wanted, max_tokens=1500, fewer=True)).done()
        assert 40 <= len(client.tokens()) < 1500
        assert job_bytes({"m": model}, client.job) > engine._budget
        assert client.pieces()[-1].finish_reason == "length"
    finally:
        engine.close(0)


def _starts(engine: BatchEngine, wanted: Job, started: list[Job]) -> threading.Event:
    """Submit a job that notes itself when it starts; set when it is over."""
    over = threading.Event()

    def deliver(event: Event) -> None:
        if isinstance(event, Reading) and wanted not in started:
            started.append(wanted)
        if isinstance(event, Failed) or (isinstance(event, Piece) and event.finish_reason):
            over.set()

    engine.submit(wanted, deliver)
    return over


def test_a_job_that_does_not_fit_now_waits_and_is_not_passed(make: Make, loaded: Any) -> None:
    engine = make(max_batch=9)
    models = loaded[0]
    first, big = job(9, 40), job(9, 20, 1, n=8)
    small = job(5, 3, 2, model="plan")
    engine._budget = job_bytes(models, big)
    # It is the big one that waits: the small one would fit beside the first.
    alone = job_bytes(models, first, small)
    assert alone <= engine._budget
    held = Client(engine, first, hold=True).started()
    started: list[Job] = []
    over = [_starts(engine, wanted, started) for wanted in (big, small)]
    held.go_on.set()
    is_right(loaded, held.done())
    for event in over:
        assert event.wait(SECONDS)
    assert started == [big, small]


def test_the_prefix_cache_gives_way_to_jobs(make: Make, loaded: Any) -> None:
    engine = make(cache_bytes=10**8)
    for seed in range(4):
        Client(engine, job(40, 3, seed)).done()
    wanted = job(40, 3, 9)
    needed = job_bytes(loaded[0], wanted)
    before = engine._prompts.nbytes
    engine._budget = needed + before // 2
    kept: list[int] = []

    class Looking(Client):
        def _deliver(self, event: Event) -> None:
            kept.append(engine._prompts.nbytes)
            super()._deliver(event)

    is_right(loaded, Looking(engine, wanted).done())
    assert 0 < kept[0] <= before // 2  # when it starts; some of it is left


@slow
def test_a_job_that_waits_for_memory_costs_no_prefix(make: Make, loaded: Any) -> None:
    engine = make(cache_bytes=10**8, max_batch=9)
    Client(engine, job(40, 3)).done()
    before = engine._prompts.nbytes
    assert before
    first, big = job(9, 40, 1), job(9, 20, 2, n=8)
    engine._budget = job_bytes(loaded[0], big)
    assert job_bytes(loaded[0], first) + before <= engine._budget
    kept: list[int] = []

    class Looking(Client):
        def _deliver(self, event: Event) -> None:
            kept.append(engine._prompts.nbytes)
            super()._deliver(event)

    held = Looking(engine, first, hold=True).started()
    waiting = Client(engine, big)
    held.go_on.set()
    is_right(loaded, held.done())
    is_right(loaded, waiting.done())
    assert min(kept) >= before


def test_a_conversation_goes_on_in_the_memory_of_one_request(make: Make, loaded: Any) -> None:
    """What one request computed is kept once its memory is free, and handed to the next."""
    engine = make(cache_bytes=10**8)
    ids, cached = list(job(60, 3).prompt), []
    for _ in range(3):
        wanted = replace(job(60, 9), prompt=tuple(ids))
        engine._budget = job_bytes(loaded[0], wanted)
        client = Client(engine, wanted).done()
        is_right(loaded, client)
        cached.append(client.pieces()[0].cached_tokens)
        ids += [*client.tokens()[:-1], 7, 8, 9]
    assert cached == [0, 68, 79]
    assert 0 < engine.stats().cache_bytes <= engine._budget


@slow
def test_cached_tokens_are_told_and_counted(make: Make, loaded: Any) -> None:
    engine = make(cache_bytes=10**7)
    first = Client(engine, job(40, 5, owner="a")).done()
    again = Client(engine, job(40, 5, owner="a")).done()
    other = Client(engine, job(40, 5, owner="b")).done()
    model = Client(engine, job(40, 5, owner="a", model="plan")).done()
    for client, cached in ((first, 0), (again, 39), (other, 0), (model, 0)):
        is_right(loaded, client)
        assert {piece.cached_tokens for piece in client.pieces()} == {cached}
    assert again.events[0] == Reading(39, 40)
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.cached_tokens) == (160, 39)
    assert 0 < stats.cache_bytes <= 10**7


def _failing(
    monkeypatch: pytest.MonkeyPatch, method: str, error: Exception, of: type = Batch
) -> threading.Event:
    """The next call of a class's method raises, once set."""
    armed = threading.Event()
    real = getattr(of, method)

    def failing(*args: Any) -> Any:
        if armed.is_set():
            armed.clear()
            raise error
        return real(*args)

    monkeypatch.setattr(of, method, failing)
    return armed


def test_the_engine_outlives_an_error(
    make: Make, loaded: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make()
    armed = _failing(monkeypatch, "add", RuntimeError("no /such/file"), AnswerText)
    held = Client(engine, job(5, 9), hold=True).started()
    armed.set()
    waiting = Client(engine, job(40, 9, 1))
    held.go_on.set()
    assert held.done().failed == "generating failed (RuntimeError); the server's log says more"
    is_right(loaded, waiting.done())
    is_right(loaded, Client(engine, job(5, 9)).done())
    assert engine.stats().finished["failed"] == 1
    assert "no /such/file" in caplog.text  # for who runs the server


@pytest.mark.parametrize("where", ["find", "step", "_advance", "_leave"])
def test_a_fault_anywhere_ends_in_an_answer(
    make: Make,
    loaded: Any,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = make()
    of = PromptStore if where == "find" else Batch
    _failing(monkeypatch, where, RuntimeError("a fault"), of).set()
    assert Client(engine, job(5, 9)).done().failed is not None
    assert "a fault" in caplog.text
    is_right(loaded, Client(engine, job(5, 9)).done())
    assert engine.stats().queued == engine.stats().active == 0


def test_a_fault_of_the_loop_fails_everybody_at_once(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A dead engine must not look like a slow one."""
    engine = make(max_batch=1)
    armed = _failing(monkeypatch, "predicted", RuntimeError("a fault"))
    held = Client(engine, job(5, 9), hold=True).started()
    waiting = Client(engine, job(5, 9))
    armed.set()
    held.go_on.set()
    assert held.done().failed == waiting.done().failed == "the engine has stopped; start it again"
    assert "a fault" in caplog.text
    assert engine.closed
    with pytest.raises(ClosedError, match="the engine has stopped"):
        engine.submit(job(5, 9), print)


def test_closing_lets_running_jobs_end(make: Make, loaded: Any) -> None:
    engine = make(max_batch=1)
    held = Client(engine, job(5, 10), hold=True).started()
    waiting = Client(engine, job(5, 2, 1))
    closing = threading.Thread(target=engine.close, args=(SECONDS,))
    closing.start()
    while engine._deadline is None:
        pass
    with pytest.raises(ClosedError, match="shutting down"):
        engine.submit(job(5, 2), print)
    held.go_on.set()
    closing.join()
    is_right(loaded, held)
    assert waiting.failed == "the server is shutting down; ask again later"
    assert not engine._thread.is_alive()
    stats = engine.stats()
    assert (stats.queued, stats.active, stats.kv_bytes, stats.cache_bytes) == (0, 0, 0, 0)


def test_closing_without_grace_fails_what_runs(make: Make) -> None:
    engine = make()
    held = Client(engine, job(5, 2000), hold=True).started()
    closing = threading.Thread(target=engine.close, args=(0,))
    closing.start()
    while engine._deadline is None:
        pass
    held.go_on.set()
    closing.join()
    assert held.failed == "the server is shutting down; ask again later"
    assert isinstance(held.events[-1], Failed)
    engine.close(5)  # again
    assert engine.stats().finished["failed"] == 1


def test_an_idle_engine_sleeps_and_holds_nothing(make: Make) -> None:
    engine = make()
    Client(engine, job(40, 9)).done()
    turns = 0
    real = engine._turn

    def counting() -> bool:
        nonlocal turns
        turns += 1
        return real()

    engine._turn = counting  # type: ignore[method-assign]
    with engine._changed:  # it has been waiting since, or is about to
        engine._changed.notify_all()
    Client(engine, job(5, 1)).done()
    done = turns
    engine.close(0)
    assert turns <= done + 2  # one that finds nothing left, one that ends
    stats = engine.stats()
    assert (stats.queued, stats.active, stats.kv_bytes) == (0, 0, 0)


def test_limits_are_put_back(make: Make) -> None:
    before = (memory_limit(), mx.set_cache_limit(0))
    mx.set_cache_limit(before[1])
    engine = make(memory_limit=_limit(1e9))
    Client(engine, job(5, 3)).done()
    engine.close(0)
    after = (memory_limit(), mx.set_cache_limit(0))
    mx.set_cache_limit(after[1])
    assert after == before


def test_no_memory_at_all(make: Make) -> None:
    with pytest.raises(Exception, match="no memory is left for requests"):
        make(memory_limit=1)
