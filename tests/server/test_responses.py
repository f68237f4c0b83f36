"""/v1/responses: OpenAI's newer API, over the same engine."""

import json
from typing import Any

import httpx
import pytest
import server_room
from server_room import ANSWER, Running, error, fake, post
from test_server_api import failing

from mlx_cerebrum.server.responses import ResponseObject
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer

CALL = '{"name": "weather", "arguments": {"city": "Ulm"}}'
TOOL = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}


tokenizer, one_server, server = server_room.tokenizer, server_room.one_server, server_room.server


def respond(server: Running, input: Any = "Hi", **more: Any) -> httpx.Response:
    return post(server, "/v1/responses", input=input, **more)


def told(answer: httpx.Response) -> list[dict[str, Any]]:
    """A stream's events. Each has its name twice, and its number."""
    found = []
    for block in answer.text.strip().split("\n\n"):
        name, data = block.split("\n")
        value = json.loads(data.removeprefix("data: "))
        assert name == f"event: {value['type']}"
        found.append(value)
    assert [value["sequence_number"] for value in found] == list(range(len(found)))
    return found


def test_a_whole_answer(server: Running, tokenizer: Tokenizer) -> None:
    answer = respond(server, metadata={"a": "b"}).json()
    ResponseObject.model_validate(answer)
    (item,) = answer["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert item["content"] == [
        {"type": "output_text", "text": ANSWER, "annotations": [], "logprobs": []}
    ]
    assert (answer["status"], answer["metadata"]) == ("completed", {"a": "b"})
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert answer["usage"] == {
        "input_tokens": len(prompt),
        "input_tokens_details": {"cached_tokens": 1, "cache_write_tokens": 0},
        "output_tokens": len(ANSWER),
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": len(prompt) + len(ANSWER),
    }


def test_the_conversation(server: Running, tokenizer: Tokenizer) -> None:
    items: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Sunny.", "annotations": []}],
        },
        {"role": "user", "content": "Thanks"},
    ]
    assert respond(server, items, instructions="Be brief.").status_code == 200
    function = {"name": "weather", "arguments": "{}"}
    calls = [{"id": "c1", "type": "function", "function": function}]
    assert list(fake(server).jobs[0].prompt) == tokenizer.apply_chat_template(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
            {"role": "assistant", "content": "Sunny."},
            {"role": "user", "content": "Thanks"},
        ]
    )


def test_a_stream(server: Running) -> None:
    found = told(respond(server, stream=True, max_output_tokens=3))
    assert [value["type"] for value in found] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * 3,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    text = "".join(v["delta"] for v in found if v["type"].endswith("delta"))
    last = found[-1]["response"]
    ResponseObject.model_validate(last)
    assert text == found[-4]["text"] == last["output"][0]["content"][0]["text"] == ANSWER[:3]
    assert last["incomplete_details"] == {"reason": "max_output_tokens"}
    assert len({value["item_id"] for value in found if "item_id" in value}) == 1
    assert told(respond(server, stream=True))[-1]["type"] == "response.completed"


def test_a_stream_that_fails(server: Running) -> None:
    fake(server).script = failing
    last = told(respond(server, stream=True))[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["error"]["message"] == "no memory left"


@pytest.mark.parametrize("stream", [False, True])
def test_a_call(server: Running, stream: bool) -> None:
    fake(server).script = fake(server).say(CALL)
    answer = respond(server, tools=[TOOL], tool_choice="required", stream=stream)
    if stream:
        found = told(answer)
        deltas = [v["delta"] for v in found if v["type"].endswith("arguments.delta")]
        assert "".join(deltas) == '{"city": "Ulm"}'
        added = next(v for v in found if v["type"] == "response.output_item.added")
        assert added["item"]["name"] == "weather"
        assert added["item"]["arguments"] == ""
        whole = found[-1]["response"]
    else:
        whole = answer.json()
    ResponseObject.model_validate(whole)
    (item,) = whole["output"]
    assert (item["type"], item["name"]) == ("function_call", "weather")
    assert item["arguments"] == '{"city": "Ulm"}'
    assert fake(server).jobs[0].grammar is not None


def test_log_probabilities(server: Running) -> None:
    more = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    part = respond(server, max_output_tokens=2, **more).json()["output"][0]["content"][0]
    assert [one["logprob"] for one in part["logprobs"]] == [-0.5, -0.5]
    assert len(part["logprobs"][0]["top_logprobs"]) == 2
    found = told(respond(server, max_output_tokens=2, stream=True, **more))
    deltas = [v for v in found if v["type"] == "response.output_text.delta"]
    assert [one for v in deltas for one in v["logprobs"]] == part["logprobs"]


def test_a_form(server: Running) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    form = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    answer = respond(server, text={"format": form}).json()
    assert answer["text"]["format"]["schema"] == schema
    assert fake(server).jobs[0].grammar is not None
    respond(server, text={"format": {"type": "text"}, "verbosity": "low"})
    assert fake(server).jobs[1].grammar is None


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search", "name": "x"}]}, "tools[0].type"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ],
)
def test_what_is_refused(server: Running, more: dict[str, Any], param: str) -> None:
    answer = respond(server, **{"input": "Hi"} | more)
    assert (answer.status_code, error(answer)[2]) == (400, param)


def test_what_is_taken(server: Running) -> None:
    answer = respond(
        server,
        store=True,
        truncation="auto",
        reasoning={"effort": "high"},
        include=["reasoning.encrypted_content"],
        parallel_tool_calls=True,
        stream_options={"include_obfuscation": False},
        foo=1,
    )
    assert answer.status_code == 200
    assert answer.headers["x-ignored-parameters"] == "foo"
