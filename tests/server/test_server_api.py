"""Answers over HTTP, by an engine that says what a test tells it to."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
import schemathesis
import server_room
from conftest import slow
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi import checks
from server_room import (
    ANSWER,
    CONTEXT,
    VOCABULARY,
    WAIT,
    FakeEngine,
    FakeTask,
    Running,
    chat,
    error,
    events,
    fake,
    piece,
    post,
    serving,
    until_closed,
)

from bench import server_mix
from mlx_cerebrum.decoding.logprobs import TokenLogprob
from mlx_cerebrum.decoding.sampling import Sampling
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.server import log
from mlx_cerebrum.server.answers import ChatCompletion, TextCompletion
from mlx_cerebrum.server.jobs import BusyError, Event, Failed, Piece
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer

tokenizer, one_server, server = server_room.tokenizer, server_room.one_server, server_room.server


@pytest.fixture
def engine(server: Running) -> FakeEngine:
    return fake(server)


def test_a_whole_answer(server: Running, tokenizer: Tokenizer, engine: FakeEngine) -> None:
    answer = post(server, **chat("Hi"))
    body = answer.json()
    assert answer.status_code == 200
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["model"] == "small"
    assert body["system_fingerprint"].startswith("fp_")
    message = {"role": "assistant", "content": ANSWER, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    assert body["choices"] == [choice]
    prompt = len(tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}]))
    assert body["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": len(ANSWER),
        "total_tokens": prompt + len(ANSWER),
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    assert engine.jobs[0].stop == tokenizer.stop_strings


def test_what_the_engine_is_asked(server: Running, engine: FakeEngine) -> None:
    post(
        server,
        model="small-deep",
        messages=[{"role": "developer", "content": "Be"}, {"role": "user", "content": "Hi"}],
        max_completion_tokens=7,
        temperature=0.5,
        top_p=0.9,
        min_p=0.1,
        seed=-2,
        n=2,
        stop=["x", "y"],
        logprobs=True,
        top_logprobs=2,
    )
    job = engine.jobs[0]
    assert job.model == "small-deep"
    assert job.max_tokens == 7
    assert job.sampling == Sampling(0.5, 0.9, 0.1, 2**64 - 2)
    assert job.n == 2
    assert job.stop == ("x", "y", "\nUser:")
    assert job.top_logprobs == 2
    assert engine.tokenizer.decode(job.prompt).startswith("Be\nUser: Hi")


def test_more_tokens_at_least_than_at_most(server: Running) -> None:
    answer = post(server, **chat(max_tokens=2, min_tokens=3))
    assert error(answer) == (400, "invalid_value", "min_tokens")
    assert post(server, **chat(max_tokens=3, min_tokens=3)).status_code == 200


def test_defaults(server: Running, engine: FakeEngine) -> None:
    post(server, messages=[{"role": "user", "content": "Hi"}])
    job = engine.jobs[0]
    assert job.model == "small"
    assert job.sampling == Sampling()
    assert job.max_tokens == CONTEXT - len(job.prompt)  # less than the 1024 of the flag
    assert job.top_logprobs is None
    post(server, "/v1/completions", prompt="a", logprobs=0)
    assert engine.jobs[1].stop == ()
    assert engine.jobs[1].top_logprobs == 0


def test_log_probabilities(server: Running) -> None:
    body = post(server, **chat(max_tokens=2, logprobs=True, top_logprobs=2)).json()
    ChatCompletion.model_validate(body)  # as the OpenAPI document has it
    first = body["choices"][0]["logprobs"]["content"][0]
    top = [
        {"token": "H", "logprob": -0.5, "bytes": [72]},
        {"token": "</s>", "logprob": -1.5, "bytes": None},
    ]
    assert first == {"token": "H", "logprob": -0.5, "bytes": [72], "top_logprobs": top}
    body = post(server, **chat(max_tokens=2, logprobs=True)).json()
    assert body["choices"][0]["logprobs"]["content"][1]["top_logprobs"] == []
    assert body["choices"][0]["finish_reason"] == "length"


def test_log_probabilities_of_completions(server: Running) -> None:
    asked = {"prompt": "a", "max_tokens": 2, "logprobs": 3}
    body = post(server, "/v1/completions", **asked).json()
    TextCompletion.model_validate(body)
    whole = body["choices"][0]["logprobs"]
    assert whole["tokens"] == ["H", "e"]
    assert whole["token_logprobs"] == [-0.5, -0.5]
    assert whole["text_offset"] == [0, 1]
    assert set(whole["top_logprobs"][0].values()) == {-0.5, -1.5, -9999.0}  # JSON has no infinity
    found = events(post(server, "/v1/completions", **asked, stream=True))
    streamed = [one["choices"][0]["logprobs"] for one in found[:-1]]
    for key, values in whole.items():
        assert [value for one in streamed for value in one[key]] == values


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (0, {"X": -4.0}),
        (1, {"H": -0.5, "X": -4.0}),
        (2, {"H": -0.5, "e": -1.5, "X": -4.0}),
        (3, {"H": -0.5, "e": -1.5, "X": -4.0}),
    ],
)
def test_the_drawn_token_is_among_the_likeliest(
    server: Running,
    engine: FakeEngine,
    tokenizer: Tokenizer,
    asked: int,
    expected: dict[str, float],
    stream: bool,
) -> None:
    """As OpenAI's completions have it; their chats have only the likeliest."""
    likeliest, next_, drawn = tokenizer.encode("HeX", add_bos=False)
    top = ((likeliest, -0.5), (next_, -1.5), (drawn, -4.0))

    def script(task: FakeTask) -> Iterator[Event]:
        assert task.job.top_logprobs == asked
        yield Piece(0, drawn, "X", "length", 0, TokenLogprob(drawn, -4.0, top[:asked]))

    def choice(answer: httpx.Response, what: str) -> Any:
        found = events(answer)[:-1] if stream else [answer.json()]
        logprobs = [one["choices"][0]["logprobs"] for one in found]
        return next(filter(None, logprobs))[what]

    engine.script = script
    answer = post(server, "/v1/completions", prompt="a", logprobs=asked, stream=stream)
    assert list(choice(answer, "top_logprobs")[0].items()) == list(expected.items())
    assert choice(answer, "token_logprobs") == [-4.0]
    answer = post(server, **chat(logprobs=True, top_logprobs=asked, stream=stream))
    (token,) = choice(answer, "content")
    assert (token["token"], token["logprob"]) == ("X", -4.0)
    assert [one["logprob"] for one in token["top_logprobs"]] == [-0.5, -1.5, -4.0][:asked]


def test_pieces_of_a_character(server: Running, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("\u00e9", add_bos=False)

    def script(task: FakeTask) -> Iterator[Event]:
        yield piece(task.job, 0, tokens[0], "")
        yield piece(task.job, 0, tokens[1], "\u00e9")
        yield Piece(0, 2, "", "stop", 0)  # the end token, unseen

    engine.script = script
    body = post(server, **chat(logprobs=True)).json()
    assert body["choices"][0]["message"]["content"] == "\u00e9"
    content = body["choices"][0]["logprobs"]["content"]
    assert [one["token"] for one in content] == ["\\xc3", "\\xa9"]
    assert b"".join(bytes(one["bytes"]) for one in content).decode() == "\u00e9"
    assert body["usage"]["completion_tokens"] == 3
    body = post(server, "/v1/completions", prompt="a", logprobs=1).json()
    listed = body["choices"][0]["logprobs"]
    assert listed["tokens"] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert listed["text_offset"] == [0, 0]
    assert listed["top_logprobs"][0] == {"bytes:\\xc3": -0.5}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_log_probabilities_are_those_of_the_text(
    server: Running, engine: FakeEngine, tokenizer: Tokenizer, path: str, stream: bool
) -> None:
    """Tokens of a stop string that is found are in neither; one that is not found is in both."""

    def script(task: FakeTask) -> Iterator[Event]:
        ends = tokenizer.encode("ab<|", add_bos=False)
        for choice, (last, reason) in enumerate([("", "stop"), ("<|", "length")]):
            for token, text in zip(ends[:3], ("a", "b", ""), strict=True):
                yield piece(task.job, choice, token, text)
            ending = piece(task.job, choice, ends[3], last, reason)
            yield ending if last else replace(ending, logprob=None)  # unseen

    engine.script = script
    chatting = "chat" in path
    asked = chat(logprobs=True) if chatting else {"prompt": "a", "logprobs": 0}
    answer = post(server, path, **asked, n=2, stream=stream)
    parts = [
        choice
        for one in (events(answer)[:-1] if stream else [answer.json()])
        for choice in one["choices"]
    ]
    for index, expected in enumerate(("ab", "ab<|")):
        text, tokens = "", list[str]()
        for part in parts:
            if part["index"] == index:
                said = part.get("delta" if stream else "message", part)
                text += said.get("content" if chatting else "text", "")
                found = part["logprobs"] or {"content": [], "tokens": []}
                tokens += [t["token"] for t in found["content"]] if chatting else found["tokens"]
        assert text == expected
        assert tokens == list(expected)


def test_a_stream(server: Running) -> None:
    options = {"include_usage": True}
    *found, last, done = events(post(server, **chat(stream=True, stream_options=options)))
    assert done == "[DONE]"
    assert found[0]["object"] == "chat.completion.chunk"
    opening = {"role": "assistant", "content": "", "refusal": None}
    assert found[0]["choices"] == [
        {"index": 0, "delta": opening, "logprobs": None, "finish_reason": None}
    ]
    text = "".join(one["choices"][0]["delta"]["content"] for one in found[:-1])
    assert text == ANSWER
    assert found[-1]["choices"] == [
        {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    ]
    assert all(one["usage"] is None for one in found)
    assert len({one["id"] for one in [*found, last]}) == 1
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == len(ANSWER)


def test_a_stream_without_usage(server: Running) -> None:
    found = events(post(server, **chat(stream=True, logprobs=True)))
    assert all("usage" not in one and one["choices"] for one in found[:-1])
    logprobs = [one["choices"][0]["logprobs"] for one in found[1:-2]]
    assert [one["content"][0]["token"] for one in logprobs] == list(ANSWER)


def test_several_choices(server: Running) -> None:
    whole = post(server, **chat(n=3)).json()
    assert [one["index"] for one in whole["choices"]] == [0, 1, 2]
    assert {one["message"]["content"] for one in whole["choices"]} == {ANSWER}
    assert whole["usage"]["completion_tokens"] == 3 * len(ANSWER)
    found = events(post(server, **chat(n=3, stream=True)))
    for index in range(3):
        mine = [c for one in found[:-1] for c in one["choices"] if c["index"] == index]
        assert "".join(c["delta"].get("content", "") for c in mine) == ANSWER
        assert mine[-1]["finish_reason"] == "stop"


def test_several_prompts(server: Running, engine: FakeEngine) -> None:
    asked = {"prompt": ["a", "bc"], "n": 2, "max_tokens": 4}
    whole = post(server, "/v1/completions", **asked).json()
    assert whole["object"] == "text_completion"
    assert [one["index"] for one in whole["choices"]] == [0, 1, 2, 3]
    assert [len(job.prompt) for job in engine.jobs] == [2, 3]
    assert whole["usage"]["prompt_tokens"] == 5
    assert whole["usage"]["completion_tokens"] == 16
    assert whole["usage"]["prompt_tokens_details"]["cached_tokens"] == 2
    found = events(post(server, "/v1/completions", **asked, stream=True))
    ends = [c["index"] for one in found[:-1] for c in one["choices"] if c["finish_reason"]]
    assert sorted(ends) == [0, 1, 2, 3]


def test_token_ids_as_prompt(server: Running, engine: FakeEngine) -> None:
    assert post(server, "/v1/completions", prompt=[5, 6]).status_code == 200
    assert engine.jobs[0].prompt == (5, 6)
    assert error(post(server, "/v1/completions", prompt=[5, 600])) == (
        400,
        "invalid_value",
        "prompt",
    )


def test_models(server: Running) -> None:
    listed = server.client.get("/v1/models").json()
    assert [one["id"] for one in listed["data"]] == ["small", "small-deep"]
    first = listed["data"][0]
    assert first["cerebrum"] == {
        "positions": 8,
        "blocks": 8,
        "sliding_window": 12,
        "context_length": CONTEXT,
        "vocabulary_size": VOCABULARY,
        "layer_map": [],
        "bits": None,
    }
    drawn = {"max_tokens": 1024, "temperature": 0.0, "top_p": 1.0, "min_p": 0.0}
    assert first["defaults"] == drawn
    assert first["context_length"] == first["max_model_len"] == CONTEXT
    assert server.client.get("/v1/models/small").json() == first
    assert server.client.get("/v1/models/deep").json()["id"] == "small-deep"
    for answer in (server.client.get("/v1/models/gpt"), post(server, **chat() | {"model": "gpt"})):
        assert error(answer) == (404, "model_not_found", "model")
        assert "small, small-deep" in answer.json()["error"]["message"]


def test_what_is_not_here(server: Running) -> None:
    assert error(server.client.get("/nothing"))[:2] == (404, "not_found")
    answer = server.client.get("/v1/chat/completions")
    assert error(answer)[:2] == (405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


def test_head_is_get_without_a_body(server: Running) -> None:
    """Health checks ask so (`wget --spider`)."""
    for path in ("/health", "/v1/models", "/v1/models/small", "/metrics", "/"):
        answer = server.client.head(path)
        assert (answer.status_code, answer.content) == (200, b"")
    assert error(server.client.get("/v1/models/gpt"))[:2] == (404, "model_not_found")


def test_messages_the_template_refuses_are_mended(server: Running) -> None:
    twice = [{"role": "user", "content": "a"}] * 2
    late = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]
    for messages in (twice, late):
        assert post(server, messages=messages).status_code == 200


def test_more_than_the_model_s_positions(server: Running) -> None:
    answer = post(server, **chat("a" * CONTEXT))
    assert error(answer) == (400, "context_length_exceeded", "messages")
    assert str(CONTEXT) in answer.json()["error"]["message"]


@pytest.mark.parametrize("most", [-1, CONTEXT, 10**15])
def test_as_many_tokens_as_fit(server: Running, engine: FakeEngine, most: int) -> None:
    post(server, **chat("a" * 300, max_tokens=most))
    (job,) = engine.jobs
    assert job.max_tokens == CONTEXT - len(job.prompt)


def test_names_that_nobody_knows_are_told(
    server: Running, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        more: dict[str, Any] = {f"k{i}": i for i in range(9)} | {
            "a b": 1,
            "\u00e9\r\n": 2,
            "x" * 41: 3,
        }
        answer = post(server, **chat(**more))
        assert answer.status_code == 200
        told = "k0, k1, k2, k3, k4, k5, k6, k7, +4"
        assert answer.headers["x-ignored-parameters"] == told
        streamed = post(server, **chat(stream=True, foo=1))
        assert streamed.headers["x-ignored-parameters"] == "foo"
    assert "x-ignored-parameters" not in post(server, **chat()).headers
    log.flush(WAIT)
    lines = capfd.readouterr().err.splitlines()
    assert lines.count(f"not used, of what clients send: {told}") == 1
    assert lines.count("not used, of what clients send: foo") == 1


def test_the_same_without_v1(server: Running) -> None:
    assert post(server, "/chat/completions", **chat()).status_code == 200
    assert post(server, "/completions", prompt="a").status_code == 200
    assert server.client.get("/models").json() == server.client.get("/v1/models").json()
    assert server.client.get("/models/small").json()["max_model_len"] == CONTEXT


def test_a_full_queue(server: Running, engine: FakeEngine) -> None:
    engine.refuse = BusyError("3 requests are waiting already")
    answer = post(server, **chat())
    assert error(answer)[:2] == (429, "rate_limit_exceeded")
    assert int(answer.headers["retry-after"]) > 0


def test_a_queue_that_fills_between_prompts(
    server: Running, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.script = until_closed(engine)
    take = engine.submit

    def one_only(*args: Any, **more: Any) -> Callable[[], None]:
        if engine.tasks:
            raise BusyError("full")
        return take(*args, **more)

    monkeypatch.setattr(engine, "submit", one_only)
    assert post(server, "/v1/completions", prompt=["a", "b"]).status_code == 429
    assert engine.tasks[0].cancelled.wait(WAIT)


def test_a_job_the_engine_refuses(server: Running, engine: FakeEngine) -> None:
    engine.refuse = RequestError("that needs too much memory")
    assert error(post(server, **chat()))[0] == 400


def failing(task: FakeTask) -> Iterator[Event]:
    yield piece(task.job, 0, 5, "H")
    yield Failed("no memory left")


def test_a_job_that_fails(server: Running, engine: FakeEngine) -> None:
    engine.script = failing
    answer = post(server, **chat())
    assert error(answer)[:2] == (500, "generation_failed")
    found = events(post(server, **chat(stream=True)))
    assert found[1]["choices"][0]["delta"] == {"content": "H"}
    assert found[-1]["error"]["message"] == "no memory left"
    assert found[-1]["error"]["type"] == "server_error"
    assert len(found) == 3


def test_who_does_not_insist_on_so_many_tokens(server: Running, engine: FakeEngine) -> None:
    for most in (5, -1, None, 10**6):
        post(server, **chat(max_tokens=most))
    assert [job.fewer for job in engine.jobs] == [False, True, True, True]


def test_a_job_that_fails_for_what_it_asks(server: Running, engine: FakeEngine) -> None:
    def script(task: FakeTask) -> Iterator[Event]:
        yield piece(task.job, 0, 5, "H")
        yield Failed("it can't be", asked=True)

    engine.script = script
    assert error(post(server, **chat())) == (400, "invalid_value", None)
    last = events(post(server, **chat(stream=True)))[-1]
    assert last["error"]["type"] == "invalid_request_error"


def test_one_of_two_prompts_fails(server: Running, engine: FakeEngine) -> None:
    def script(task: FakeTask) -> Iterator[Event]:
        first = task.job.prompt == engine.jobs[0].prompt
        return iter((until_closed(engine) if first else failing)(task))

    engine.script = script
    answer = post(server, "/v1/completions", prompt=["a", "b"])
    assert answer.status_code == 500
    assert engine.tasks[0].cancelled.wait(WAIT)


def test_metrics(tokenizer: Tokenizer) -> None:
    with serving(FakeEngine(tokenizer), tokenizer) as server:
        post(server, **chat(max_tokens=3))
        post(server, **chat(n=0))
        server.client.get("/v1/models/small")
        server.client.get("/some/thing")
        answer = server.client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
    lines = answer.text.splitlines()
    for line in (
        'cerebrum_requests_total{route="/v1/chat/completions",status="200"} 1.0',
        'cerebrum_requests_total{route="/v1/chat/completions",status="400"} 1.0',
        'cerebrum_requests_total{route="/v1/models/{model}",status="200"} 1.0',
        'cerebrum_requests_total{route="other",status="404"} 1.0',
        "cerebrum_queued 1.0",
        "cerebrum_active 2.0",
        "cerebrum_prompt_tokens_total 30.0",
        "cerebrum_cached_tokens_total 4.0",
        "cerebrum_generated_tokens_total 50.0",
        'cerebrum_jobs_total{how="cancelled"} 7.0',
        "cerebrum_prefix_cache_bytes 8.0",
        "cerebrum_kv_bytes 9.0",
        "cerebrum_first_token_seconds_count 1.0",
        "cerebrum_token_seconds_count 2.0",
    ):
        assert line in lines


@pytest.mark.parametrize("examples", [8, pytest.param(100, marks=pytest.mark.long)])
@slow
def test_the_document_is_kept(tokenizer: Tokenizer, examples: int) -> None:
    """Requests that the OpenAPI document allows and such that it forbids, each with its answer."""
    with serving(FakeEngine(tokenizer), tokenizer) as server:
        document = server.client.get("/openapi.json").json()
        schema = schemathesis.openapi.from_dict(document)
        schema.config.update(base_url=server.url)
        statuses = set()
        for result in schema.get_all_operations():
            assert isinstance(result, Ok)
            operation = result.ok()
            modes = [GenerationMode.POSITIVE]
            if operation.method == "post":
                modes.append(GenerationMode.NEGATIVE)
            for mode in modes:
                statuses |= try_out(operation, mode, examples)
        assert {200, 400, 404} <= statuses


def try_out(
    operation: schemathesis.APIOperation[Any, Any, Any, Any], mode: GenerationMode, examples: int
) -> set[int]:
    """The statuses that came; each answer is one of those documented, and of its shape."""
    statuses = set()
    wanted: list[Any] = [
        not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
        checks.negative_data_rejection,
    ]

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case[Any]) -> None:
        answer = case.call(timeout=WAIT)
        statuses.add(answer.status_code)
        case.validate_response(answer, checks=wanted)

    check()
    return statuses


def test_what_the_load_sends_to_be_refused_is_refused(tokenizer: Tokenizer) -> None:
    with serving(FakeEngine(tokenizer), tokenizer) as server:
        model = server.client.get("/v1/models").json()["data"][0]["id"]
        for asked in server_mix.nonsense(model):
            kind = {"Content-Type": "application/json"}
            answer = server.client.post(asked.path, content=asked.data, headers=kind)
            assert 400 <= answer.status_code < 500, (asked.malformed, answer.text[:200])
