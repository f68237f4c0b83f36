"""The openai package of Python."""

import json
from collections.abc import Iterator, Sequence
from typing import TypeVar

import clients_room
import openai
import pytest
from clients_room import ASKED, KEY, MODEL, MOST_TOKENS, City
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from openai.types.responses import FunctionToolParam

Call = TypeVar("Call")
address = clients_room.address
HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": ASKED}]
PARAMETERS: dict[str, object] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: ChatCompletionToolParam = {
    "type": "function",
    "function": {"name": "weather", "parameters": PARAMETERS},
}
FLAT: FunctionToolParam = {
    "type": "function",
    "name": "weather",
    "parameters": PARAMETERS,
    "strict": True,
}


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=address, api_key=KEY, max_retries=0) as client:
        yield client


def only(calls: Sequence[Call] | None) -> Call:
    assert calls
    assert len(calls) == 1
    return calls[0]


def test_models(client: openai.OpenAI) -> None:
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).object == "model"


def test_a_streamed_chat_says_the_same(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=HI)
    assert whole.choices[0].message.content
    assert whole.usage
    assert 0 < whole.usage.completion_tokens <= MOST_TOKENS
    chunks = list(client.chat.completions.create(model=MODEL, messages=HI, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    with client.chat.completions.stream(model=MODEL, messages=HI) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == text


def test_an_answer_is_parsed(client: openai.OpenAI) -> None:
    whole = client.chat.completions.parse(model=MODEL, messages=HI, response_format=City)
    assert isinstance(whole.choices[0].message.parsed, City)
    with client.chat.completions.stream(model=MODEL, messages=HI, response_format=City) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == whole.choices[0].message.parsed


def test_a_tool_is_called(client: openai.OpenAI) -> None:
    text = client.chat.completions.create(model=MODEL, messages=HI, tools=[TOOL])
    assert text.choices[0].message.content
    assert not text.choices[0].message.tool_calls
    whole = client.chat.completions.create(
        model=MODEL, messages=HI, tools=[TOOL], tool_choice="required"
    )
    assert whole.choices[0].finish_reason == "tool_calls"
    call = only(whole.choices[0].message.tool_calls)
    assert call.type == "function"
    assert call.function.name == "weather"
    assert set(json.loads(call.function.arguments)) == {"city"}
    with client.chat.completions.stream(
        model=MODEL, messages=HI, tools=[TOOL], tool_choice="required"
    ) as stream:
        final = stream.get_final_completion()
    streamed = only(final.choices[0].message.tool_calls)
    assert streamed.type == "function"
    assert streamed.function.name == "weather"
    assert streamed.function.arguments == call.function.arguments
    # What came of it goes back.
    again: list[ChatCompletionMessageParam] = [
        *HI,
        {"role": "assistant", "tool_calls": [call.model_dump()]},  # type: ignore[list-item]
        {"role": "tool", "tool_call_id": call.id, "content": "Rain"},
    ]
    answer = client.chat.completions.create(model=MODEL, messages=again, tools=[TOOL])
    assert answer.choices[0].message.content


def test_completions(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=8)
    assert whole.choices[0].text
    stream = client.completions.create(
        model=MODEL, prompt="Once upon a time", max_tokens=8, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text


def test_responses(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(model=MODEL, messages=HI)
    whole = client.responses.create(model=MODEL, input=ASKED)
    assert whole.output_text == chat.choices[0].message.content
    events = list(client.responses.create(model=MODEL, input=ASKED, stream=True))
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    with client.responses.stream(model=MODEL, input=ASKED) as stream:
        final = stream.get_final_response()
    assert final.output_text == text
    assert final.usage == whole.usage


def test_a_response_is_parsed(client: openai.OpenAI) -> None:
    whole = client.responses.parse(model=MODEL, input="A city", text_format=City)
    assert isinstance(whole.output_parsed, City)
    assert whole.status == "completed"
    with client.responses.stream(model=MODEL, input="A city", text_format=City) as stream:
        assert stream.get_final_response().output_parsed == whole.output_parsed


def test_a_response_calls_a_tool(client: openai.OpenAI) -> None:
    whole = client.responses.create(model=MODEL, input=ASKED, tools=[FLAT], tool_choice="required")
    (call,) = whole.output
    assert call.type == "function_call"
    assert set(json.loads(call.arguments)) == {"city"}
    with client.responses.stream(
        model=MODEL, input=ASKED, tools=[FLAT], tool_choice="required"
    ) as stream:
        (streamed,) = stream.get_final_response().output
    assert streamed.type == "function_call"
    assert streamed.arguments == call.arguments
    answer = client.responses.create(
        model=MODEL,
        tools=[FLAT],
        input=[
            {"role": "user", "content": ASKED},
            call.model_dump(exclude_none=True),  # type: ignore[list-item]
            {"type": "function_call_output", "call_id": call.call_id, "output": "Rain"},
        ],
    )
    assert answer.output_text


def test_unknown_parameters_are_taken_and_told(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=HI, max_tokens=1, extra_body={"mood": "good"}
    )
    assert raw.headers["X-Ignored-Parameters"] == "mood"
