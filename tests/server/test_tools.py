"""Tools, answers of a given form, continued answers, token ids: what clients ask of chat."""

import json
from typing import Any

import pytest
import server_room
from server_room import (
    ANSWER,
    CONTEXT,
    VOCABULARY,
    Running,
    chat,
    error,
    events,
    fake,
    post,
)

from mlx_cerebrum.server.answers import ChatCompletion
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Says how it is",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = '{"name": "weather", "arguments": {"city": "Ulm"}}'
NAMED = {"type": "function", "function": {"name": "weather"}}


tokenizer, one_server, server = server_room.tokenizer, server_room.one_server, server_room.server


@pytest.mark.parametrize("choice", [None, "auto", "none"])
def test_tools_that_need_not_be_called_give_text(server: Running, choice: str | None) -> None:
    plain = post(server, **chat())
    answer = post(server, **chat(tools=[WEATHER], tool_choice=choice))
    assert answer.headers["x-ignored-parameters"] == "tools"
    assert answer.json()["choices"] == plain.json()["choices"]
    without, with_tools = fake(server).jobs
    assert without.prompt == with_tools.prompt
    assert with_tools.grammar is None


@pytest.mark.parametrize(("choice", "reason"), [("required", "tool_calls"), (NAMED, "stop")])
def test_a_call_that_must_be(
    server: Running, tokenizer: Tokenizer, choice: Any, reason: str
) -> None:
    fake(server).script = fake(server).say(CALL)
    body = chat(tools=[WEATHER], tool_choice=choice)
    answer = post(server, **body)
    assert "x-ignored-parameters" not in answer.headers
    ChatCompletion.model_validate(answer.json())
    (only,) = answer.json()["choices"]
    assert only["finish_reason"] == reason
    assert only["message"]["content"] is None
    (call,) = only["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Ulm"}'}
    (job,) = fake(server).jobs
    assert job.grammar is not None
    assert job.stop == ()
    assert "Says how it is" in tokenizer.decode(job.prompt)

    found = events(post(server, **body | {"stream": True}))
    deltas = [one["choices"][0]["delta"] for one in found[1:-2]]
    first, *rest = [delta["tool_calls"][0] for delta in deltas]
    assert first["function"] == {"name": "weather", "arguments": ""}
    assert first["id"].startswith("call_")
    assert "".join(one["function"]["arguments"] for one in rest) == '{"city": "Ulm"}'
    assert found[-2]["choices"][0]["finish_reason"] == reason


def test_a_call_that_is_cut(server: Running) -> None:
    fake(server).script = fake(server).say(CALL)
    answer = post(server, **chat(tools=[WEATHER], tool_choice="required", max_tokens=40))
    (only,) = answer.json()["choices"]
    assert only["finish_reason"] == "length"
    (call,) = only["message"]["tool_calls"]
    assert '{"city": "Ulm"}'.startswith(call["function"]["arguments"])


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_a_stop_string_cuts_is_not_said_to_be_whole(
    server: Running, stream: bool
) -> None:
    fake(server).script = fake(server).say(CALL[:-6])
    answer = post(server, **chat(tools=[WEATHER], tool_choice="required", stream=stream))
    last = events(answer)[-2] if stream else answer.json()
    assert last["choices"][0]["finish_reason"] == "stop"


def test_a_talk_with_calls_goes_on(server: Running, tokenizer: Tokenizer) -> None:
    calls = [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]
    turns = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    answer = post(server, messages=turns, tools=[WEATHER])
    assert answer.status_code == 200
    text = tokenizer.decode(fake(server).jobs[0].prompt)
    assert "sunny" in text
    assert "weather" in text


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"function": {"name": "other"}}}, "tool_choice"),
        (
            {"tools": [WEATHER], "tool_choice": "required", "guided_regex": "a"},
            "tools",
        ),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_regex": "a", "min_tokens": 2}, "min_tokens"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"logit_bias": {str(VOCABULARY): 1}}, "logit_bias"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs.regex"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"$ref": "https://example.org/x"}},
                }
            },
            "response_format.json_schema.schema",
        ),
    ],
)
def test_what_cannot_be_held_to(server: Running, more: dict[str, Any], param: str) -> None:
    answer = post(server, **chat(**more))
    assert error(answer) == (400, "invalid_value", param)
    assert answer.json()["error"]["message"].replace("-", "_").startswith(param)


@pytest.mark.parametrize(
    "more",
    [
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_object", "schema": {"type": "object"}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "null"}}}},
        {"json_schema": {"type": "integer"}},
        {"guided_json": {"type": "integer"}},
        {"guided_regex": "[a-z]+"},
        {"guided_choice": ["yes", "no"]},
        {"guided_grammar": 'start: "yes" | "no"'},
        {"structured_outputs": {"json": {"type": "integer"}}},
        {"structured_outputs": {"regex": "[a-z]+"}},
        {"structured_outputs": {"choice": ["yes", "no"]}},
        {"structured_outputs": {"grammar": 'start: "yes"'}},
        {"structured_outputs": {"json_object": True}},
    ],
)
def test_what_answers_are_held_to(server: Running, more: dict[str, Any]) -> None:
    assert post(server, **chat(**more)).status_code == 200
    assert post(server, "/v1/completions", prompt="a", **more).status_code == 200
    assert all(job.grammar is not None for job in fake(server).jobs)


def test_a_schema_is_honoured_wherever_it_stands(server: Running) -> None:
    schema = {"const": 1}
    for form in ({"json_schema": {"schema": schema}}, {"schema": schema}):
        assert post(server, **chat(response_format={"type": "json_object", **form})).is_success
    first, second = [job.grammar for job in fake(server).jobs]
    assert first is second
    post(server, **chat(response_format={"type": "json_object"}))
    assert fake(server).jobs[-1].grammar is not first


def test_a_call_goes_before_the_form_of_texts(server: Running) -> None:
    fake(server).script = fake(server).say(CALL)
    form = {"type": "json_schema", "json_schema": {"schema": {"type": "integer"}}}
    answer = post(server, **chat(tools=[WEATHER], tool_choice="required", response_format=form))
    assert answer.json()["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("choice", ["required", {"function": {"name": "bad"}}])
def test_the_tool_whose_schema_is_wrong_is_named(server: Running, choice: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "wrong"}}}
    function = {"name": "bad", "parameters": schema}
    tools = [WEATHER, {"type": "function", "function": function}]
    answer = post(server, **chat(tools=tools, tool_choice=choice))
    place = "parameters.properties.a.type: "
    assert error(answer)[0] == 400
    assert answer.json()["error"]["message"].startswith(f"tools[1].function.{place}")
    answer = post(
        server,
        "/v1/responses",
        input="Hi",
        tools=[{"type": "function", "name": "good"}, {"type": "function", **function}],
        tool_choice=choice if isinstance(choice, str) else {"name": "bad"},
    )
    assert answer.json()["error"]["message"].startswith(f"tools[1].{place}")


def test_names_with_dots_are_taken(server: Running) -> None:
    tool = {"type": "function", "function": {"name": "files.read"}}
    assert post(server, **chat(tools=[tool])).is_success
    fake(server).script = fake(server).say('{"name": "files.read", "arguments": {}}')
    answer = post(server, **chat(tools=[tool], tool_choice="required"))
    call = answer.json()["choices"][0]["message"]["tool_calls"][0]
    assert call["function"]["name"] == "files.read"


def test_what_a_tool_choice_must_be(server: Running) -> None:
    message = post(server, **chat(tool_choice="any")).json()["error"]["message"]
    assert message.endswith('{"function": {"name": ...}}')


def test_calls_count_as_much_as_texts(server: Running) -> None:
    call = {"id": "c", "function": {"name": "f", "arguments": "word " * 50 * CONTEXT}}
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    answer = post(server, messages=turns)
    assert error(answer) == (400, "context_length_exceeded", "messages")
    assert "is more than" in answer.json()["error"]["message"]  # it was not tokenized whole


def test_the_last_turn_is_continued(server: Running, tokenizer: Tokenizer) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Once upon"}]
    post(server, messages=turns)
    post(server, messages=turns, add_generation_prompt=True)
    post(server, messages=turns, continue_final_message=False)
    going, new, other = fake(server).jobs
    assert list(going.prompt) == tokenizer.apply_chat_template(turns, continue_final_message=True)
    assert tokenizer.decode(going.prompt).endswith("Once upon")
    assert list(new.prompt) == list(other.prompt) == tokenizer.apply_chat_template(turns)
    assert (going.continues, new.continues) == (True, False)


def test_a_call_that_must_be_is_a_turn_of_its_own(server: Running, tokenizer: Tokenizer) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Once upon"}]
    must: dict[str, Any] = {"messages": turns, "tools": [WEATHER], "tool_choice": "required"}
    assert post(server, **must).is_success
    (job,) = fake(server).jobs
    assert not job.continues
    assert not tokenizer.decode(job.prompt).endswith("Once upon")
    answer = post(server, **must, continue_final_message=True)
    assert error(answer) == (400, "unsupported_value", "tool_choice")


def test_token_ids_come_back(server: Running, tokenizer: Tokenizer) -> None:
    said = tokenizer.encode(ANSWER, add_bos=False)
    for path, body in (
        ("/v1/chat/completions", chat()),
        ("/v1/completions", {"prompt": ["Hi", "Ho"]}),
    ):
        fake(server).tasks.clear()
        more = {"return_token_ids": True}
        whole = post(server, path, **body, **more).json()["choices"]
        assert [choice["token_ids"] for choice in whole] == [said] * len(whole)
        prompts = [list(job.prompt) for job in fake(server).jobs]
        assert [choice["prompt_token_ids"] for choice in whole] == prompts
        streamed = [
            choice
            for one in events(post(server, path, **body, **more, stream=True))[:-1]
            for choice in one["choices"]
        ]
        for index, prompt in enumerate(prompts):
            own = [choice for choice in streamed if choice["index"] == index]
            assert [token for choice in own for token in choice.get("token_ids", ())] == said
            first = [choice["prompt_token_ids"] for choice in own if "prompt_token_ids" in choice]
            assert first == [prompt]
    assert "token_ids" not in post(server, **chat()).json()["choices"][0]


def test_tokenize(server: Running, tokenizer: Tokenizer) -> None:
    def ids(**body: Any) -> Any:
        return post(server, "/tokenize", **body).json()

    text = tokenizer.encode("Hi")
    found = ids(prompt="Hi", return_token_strs=True)
    assert found["tokens"] == text
    assert found["count"] == len(text)
    assert found["max_model_len"] == CONTEXT
    assert len(found["token_strs"]) == len(text)
    assert ids(content="Hi")["tokens"] == ids(prompt="Hi", add_special_tokens=False)["tokens"]
    assert ids(content="Hi", add_special=True)["tokens"] == text
    turns = [{"role": "user", "content": "Hi"}]
    assert ids(messages=turns)["tokens"] == tokenizer.apply_chat_template(turns)
    turns.append({"role": "assistant", "content": "Ho"})
    cases: list[dict[str, Any]] = [{}, {"add_generation_prompt": True}]
    for more in (*cases, {"continue_final_message": False}):
        post(server, messages=turns, **more)
        assert ids(messages=turns, **more)["tokens"] == list(fake(server).jobs[-1].prompt)
    assert post(server, "/tokenize", prompt="a", foo=1).headers["x-ignored-parameters"] == "foo"
    assert post(server, "/detokenize", tokens=[5], foo=1).headers["x-ignored-parameters"] == "foo"
    back = post(server, "/v1/detokenize", tokens=text).json()
    assert back == {"prompt": "Hi", "content": "Hi"}
    for path, body in (
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "content": "b"}),
        ("/tokenize", {"prompt": "a" * 10 * CONTEXT * 64}),
        ("/detokenize", {"tokens": [10**6]}),
        ("/detokenize", {"tokens": [-1]}),
    ):
        assert post(server, path, **body).status_code == 400


def test_calls_of_a_choice_each(server: Running) -> None:
    fake(server).script = fake(server).say(CALL)
    answer = post(server, **chat(tools=[WEATHER], tool_choice="required", n=2)).json()
    calls = [choice["message"]["tool_calls"][0] for choice in answer["choices"]]
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"city": "Ulm"}] * 2
    assert calls[0]["id"] != calls[1]["id"]
