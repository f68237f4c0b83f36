"""The official client, against the real engine and a small random model: text, not sense."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from conftest import INTERLEAVED_8, SMALL, plan_yaml, slow, write_checkpoint
from openai.types.chat import ChatCompletionMessageParam
from server_room import WAIT, FakeEngine, Running, serving
from tiny import tiny_config, tiny_weights

from mlx_cerebrum import load
from mlx_cerebrum.decoding.stream import generate
from mlx_cerebrum.server.engine import BatchEngine
from mlx_cerebrum.server.jobs import BusyError
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights.opening import ModelSpec, open_model
from mlx_cerebrum.weights.views import describe, load_views

HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello, who are you?"}]
MODELS = ("small", "small@deep")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("openai")
    config = tiny_config(**SMALL, max_position_embeddings=2048)
    write_checkpoint(folder / "small", config, tiny_weights(config, seed=3))
    (folder / "deep.yml").write_text(plan_yaml(INTERLEAVED_8))
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    models, tokenizer = load_views(
        open_model(ModelSpec(folder / "small")), [str(folder / "deep.yml")]
    )
    assert tuple(models) == MODELS
    engine = BatchEngine(models, tokenizer, max_batch=4, max_queue=8, cache_bytes=10**8)
    described = {name: describe(model) for name, model in models.items()}
    with serving(engine, tokenizer, described) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=WAIT
    ) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == list(MODELS)
    one = client.models.retrieve(MODELS[1])
    assert one.owned_by == "mlx-cerebrum"
    assert one.model_dump()["cerebrum"]["positions"] == 12
    with pytest.raises(openai.NotFoundError, match="small, small@deep"):
        client.models.retrieve("gpt-4")


@pytest.mark.parametrize("name", MODELS)
@slow
def test_the_text_is_the_command_line_s(client: openai.OpenAI, folder: Path, name: str) -> None:
    plan = None if name == "small" else str(folder / "deep.yml")
    model, tokenizer = load(folder / "small", plan)
    expected = generate(
        model,
        tokenizer,
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello, who are you?"}]),
        max_tokens=24,
        stop=tokenizer.stop_strings,
    )
    answer = client.chat.completions.create(model=name, messages=HI, max_tokens=24)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "length"
    assert answer.model == name
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 24


def test_streaming(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="small", messages=HI, max_tokens=16)
    chunks = list(
        client.chat.completions.create(
            model="small",
            messages=HI,
            max_tokens=16,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens == 16
    assert usage.prompt_tokens_details is not None
    # The same prompt as before: its cache was kept.
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1


def test_a_seed_gives_the_same_text(client: openai.OpenAI) -> None:
    def ask(seed: int) -> list[str | None]:
        answer = client.chat.completions.create(
            model="small", messages=HI, max_tokens=12, temperature=1, seed=seed, n=2
        )
        return [choice.message.content for choice in answer.choices]

    first = ask(7)
    assert ask(7) == first
    assert ask(8) != first
    assert first[0] != first[1]


def test_log_probabilities(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="small", messages=HI, max_tokens=5, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 5
    for token in logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob  # greedy: the likeliest
        assert token.token == token.top_logprobs[0].token
    data = b"".join(bytes(token.bytes or ()) for token in logprobs.content)
    assert data.decode("utf-8", "replace") == answer.choices[0].message.content


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="small", prompt=["Once upon", "a time"], max_tokens=6, logprobs=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert len(logprobs.tokens) == 6
    again = client.completions.create(model="small", prompt="Once upon", max_tokens=6)
    assert again.choices[0].text == answer.choices[0].text
    stream = client.completions.create(model="small", prompt="Once upon", max_tokens=6, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == again.choices[0].text


def test_log_probabilities_of_what_is_drawn(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="small", prompt="Once", max_tokens=30, logprobs=1, temperature=2, seed=1
    )
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    for token, logprob, top in zip(
        found.tokens, found.token_logprobs, found.top_logprobs, strict=True
    ):
        assert top[token] == logprob
    assert 2 in map(len, found.top_logprobs)  # some are not the likeliest


def test_stop(client: openai.OpenAI) -> None:
    free = client.completions.create(model="small", prompt="Once", max_tokens=40).choices[0].text
    stop = free[8:11]
    answer = client.completions.create(model="small", prompt="Once", max_tokens=40, stop=[stop])
    assert answer.choices[0].text == free[: free.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_an_answer_goes_back_as_it_came(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model="small", messages=HI, max_tokens=4)
    said = first.choices[0].message
    turns: list[ChatCompletionMessageParam] = [
        *HI,
        said,  # type: ignore[list-item]  # the client takes its own answers, its types do not
        {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
    ]
    second = client.chat.completions.create(model="small", messages=turns, max_tokens=4)
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details.cached_tokens


@slow
def test_many_at_once(server: Running, client: openai.OpenAI) -> None:
    """More than fit into a batch, streamed and whole, of both models: each gets its own text."""
    prompts = [f"Number {i}" for i in range(8)]
    alone = [
        client.completions.create(model=MODELS[i % 2], prompt=prompt, max_tokens=12).choices[0].text
        for i, prompt in enumerate(prompts)
    ]

    async def one(there: openai.AsyncOpenAI, i: int) -> str:
        if i % 3:
            answer = await there.completions.create(
                model=MODELS[i % 2], prompt=prompts[i], max_tokens=12
            )
            return answer.choices[0].text
        stream = await there.completions.create(
            model=MODELS[i % 2], prompt=prompts[i], max_tokens=12, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them() -> list[str]:
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=WAIT) as there:
            return await asyncio.gather(*(one(there, i) for i in range(len(prompts))))

    assert asyncio.run(all_of_them()) == alone


def test_a_stream_that_is_closed_frees_its_place(server: Running, client: openai.OpenAI) -> None:
    before = server.service.engine.stats().finished["cancelled"]
    stream = client.completions.create(model="small", prompt="Once", max_tokens=1500, stream=True)
    next(iter(stream))
    stream.close()
    # Answered only once the first one's place is free, as it takes all of them.
    client.completions.create(model="small", prompt="Next", max_tokens=2, n=4)
    assert server.service.engine.stats().finished["cancelled"] == before + 1


def test_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=HI)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="small", messages=HI, presence_penalty=3)
    assert refused.value.param == "presence_penalty"
    assert refused.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="2048 positions"):
        client.completions.create(model="small", prompt="a" * 3000)
    with pytest.raises(openai.BadRequestError, match="n must be from 1 to 4"):
        client.chat.completions.create(model="small", messages=HI, n=5)
    with pytest.raises(openai.BadRequestError, match="260"):
        client.completions.create(model="small", prompt=[400])


def test_errors_of_keys_and_queues(server: Running, folder: Path) -> None:
    tokenizer = Tokenizer.from_directory(folder / "small")
    engine = FakeEngine(tokenizer)
    with serving(engine, tokenizer, api_key="the-key") as locked:
        url = f"{locked.url}/v1"
        with openai.OpenAI(base_url=url, api_key="other", max_retries=0) as other:
            with pytest.raises(openai.AuthenticationError) as refused:
                other.models.list()
            assert refused.value.code == "invalid_api_key"
            assert refused.value.request_id
        with openai.OpenAI(base_url=url, api_key="the-key", max_retries=0) as ours:
            engine.refuse = BusyError("8 requests are waiting already")
            with pytest.raises(openai.RateLimitError, match="8 requests"):
                ours.completions.create(model="small", prompt="Hi")
