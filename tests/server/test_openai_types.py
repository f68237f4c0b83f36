"""Answers are what OpenAI's own package takes them for: its types, strictly read."""

from collections.abc import Iterator
from typing import Any

import pytest
import server_room
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from server_room import (
    ANSWER,
    FakeTask,
    Running,
    chat,
    events,
    fake,
    piece,
    post,
)
from test_responses import CALL, TOOL, respond, told
from test_server_api import failing

from mlx_cerebrum.server.jobs import Event, Failed

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
FUNCTION = {"type": "function", "function": {"name": "weather", "parameters": TOOL["parameters"]}}
FORMAT = {"type": "json_schema", "schema": {"type": "object"}}
LOGPROBS = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}


tokenizer, one_server, server = server_room.tokenizer, server_room.one_server, server_room.server


def too_much(task: FakeTask) -> Iterator[Event]:
    yield piece(task.job, 0, 5, "H")
    yield Failed("the answer can't be held to what was asked: too large", asked=True)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"instructions": "Be brief.", "metadata": {"a": "b"}, "user": "u", "temperature": 0.5},
        {"max_output_tokens": 3, **LOGPROBS},
        {"text": {"format": FORMAT}},
        {"text": {"format": {"type": "json_object"}}},
        {"tools": [TOOL], "tool_choice": "auto"},
        {"tools": [TOOL], "tool_choice": "required"},
        {"tools": [TOOL], "tool_choice": {"type": "function", "name": "weather"}},
        {"tools": [TOOL], "tool_choice": "required", "max_output_tokens": 5},
        {"tools": [TOOL], "tool_choice": "required", "max_output_tokens": 40},
    ],
)
def test_responses(server: Running, more: dict[str, Any]) -> None:
    calls = more.get("tool_choice") not in (None, "auto")
    fake(server).script = fake(server).say(CALL if calls else ANSWER)
    whole = respond(server, **more).json()
    Response.model_validate(whole)
    streamed = told(respond(server, stream=True, **more))
    for value in streamed:
        EVENT.validate_python(value)
    last = streamed[-1]["response"]
    assert last["status"] == whole["status"]
    assert last["usage"] == whole["usage"]
    if more.get("max_output_tokens") == 5:  # before it is known what is called
        assert last["output"] == whole["output"] == []
        return
    (item,), (same,) = last["output"], whole["output"]
    names = ("content", "arguments", "name", "status")
    assert [item.get(name) for name in names] == [same.get(name) for name in names]
    if calls:
        deltas = [v["delta"] for v in streamed if v["type"].endswith("arguments.delta")]
        assert "".join(deltas) == item["arguments"]


@pytest.mark.parametrize(
    ("script", "status", "code"),
    [(failing, 500, "server_error"), (too_much, 400, "invalid_prompt")],
)
def test_responses_that_fail(server: Running, script: Any, status: int, code: str) -> None:
    fake(server).script = script
    assert respond(server).status_code == status
    streamed = told(respond(server, stream=True))
    for value in streamed:
        EVENT.validate_python(value)
    assert streamed[-1]["response"]["error"]["code"] == code


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"n": 2, "logprobs": True, "top_logprobs": 2},
        {"stream_options": {"include_usage": True}, "return_token_ids": True},
        {"tools": [FUNCTION], "tool_choice": "required", "n": 2},
        {"tools": [FUNCTION], "tool_choice": "required", "logprobs": True, "max_tokens": 40},
        {"tools": [FUNCTION], "tool_choice": "required", "max_tokens": 5},
    ],
)
def test_chat(server: Running, more: dict[str, Any]) -> None:
    fake(server).script = fake(server).say(CALL if "tools" in more else ANSWER)
    whole = ChatCompletion.model_validate(post(server, **chat(**more)).json())
    *chunks, done = events(post(server, **chat(stream=True, **more)))
    assert done == "[DONE]"
    found = [ChatCompletionChunk.model_validate(chunk) for chunk in chunks]
    for choice in whole.choices:
        own = [c for chunk in found for c in chunk.choices if c.index == choice.index]
        assert own[0].delta.role == "assistant"
        assert [c.finish_reason for c in own if c.finish_reason] == [choice.finish_reason]
        assert own[-1].finish_reason
        text = "".join(c.delta.content or "" for c in own)
        assert text == (choice.message.content or "")
        calls = [call for c in own for call in c.delta.tool_calls or ()]
        assert bool(calls) == bool(choice.message.tool_calls)
        for call in choice.message.tool_calls or ():
            assert call.type == "function"
            said = [one.function.arguments or "" for one in calls if one.function]
            assert "".join(said) == call.function.arguments
            assert calls[0].id
            assert calls[0].function
            assert calls[0].function.name == call.function.name
        listed = [one for c in own for one in (c.logprobs and c.logprobs.content) or ()]
        assert listed == ((choice.logprobs and choice.logprobs.content) or [])


@pytest.mark.parametrize("more", [{"echo": True}, {"logprobs": 2}])
def test_completions(server: Running, more: dict[str, Any]) -> None:
    body = {"prompt": ["Hi", "Ho"], "n": 2, **more}
    Completion.model_validate(post(server, "/v1/completions", **body).json())
