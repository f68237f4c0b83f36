"""Bodies: what is taken, and what the answer says of what is not."""

import contextlib
import json
from dataclasses import replace
from typing import Any

import pytest
from conftest import slow
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mlx_cerebrum.decoding.sampling import GREEDY, Sampling
from mlx_cerebrum.server.bodies import (
    Open,
    parse_body,
)
from mlx_cerebrum.server.faults import ApiError
from mlx_cerebrum.server.intake import sampling
from mlx_cerebrum.server.responses import ResponsesRequest
from mlx_cerebrum.server.schema import (
    MOST_CHOICES,
    ChatRequest,
    CompletionRequest,
)
from mlx_cerebrum.server.tokens import TokenizeRequest

HI = {"messages": [{"role": "user", "content": "Hi"}]}


def refusal(kind: type[Open], body: Any) -> tuple[str | None, str | None, str]:
    """`(param, code, message)`."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(ApiError) as caught:
        parse_body(kind, data)
    assert caught.value.status == 400
    assert len(caught.value.message) < 500
    assert "\n" not in caught.value.message
    return caught.value.param, caught.value.code, caught.value.message


def chat(**more: Any) -> ChatRequest:
    return parse_body(ChatRequest, json.dumps(HI | more).encode())


def test_what_clients_send_for_nothing_is_taken() -> None:
    asked = chat(
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        repeat_penalty=1,
        response_format={"type": "text"},
        tools=[],
        tool_choice="none",
        temperature=None,
        n=None,
        stop="",
        stream_options={"include_usage": True, "include_obfuscation": False},
        top_logprobs=0,
        best_of=1,
        mirostat=0,
        typical_p=1.0,
        modalities=["text"],
    )
    assert asked.stop == []
    assert list(asked.unknown()) == ["best_of"]


def test_what_cannot_change_an_answer_is_taken_whatever_it_says() -> None:
    asked = chat(
        parallel_tool_calls=True,
        store=True,
        service_tier="flex",
        reasoning_effort="high",
        verbosity="low",
        prediction={"type": "content", "content": "Hi"},
        user=5,
        metadata={"a": [1]},
        cache_prompt=True,
    )
    assert list(asked.unknown()) == []


def test_unknown_names_are_taken_and_told() -> None:
    part = {"type": "text", "text": "Hi", "weight": 1}
    asked = chat(
        messages=[{"role": "user", "content": [part, part], "id": "m1"}],
        foo=1,
        stream_options={"bar": None},
        response_format={"type": "text", "hint": 2},
    )
    told = ["foo", "messages.content.weight", "messages.id", "response_format.hint"]
    assert sorted(set(asked.unknown())) == [*told, "stream_options.bar"]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"grammar": "root ::= x"}, "grammar"),
        ({"mirostat": 2}, "mirostat"),
        ({"top_n_sigma": 1.5}, "top_n_sigma"),
        ({"allowed_token_ids": [1]}, "allowed_token_ids"),
        ({"regex": "a"}, "regex"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"echo": True}, "echo"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"stop_token_ids": [2]}, "stop_token_ids"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 0}, "max_completion_tokens"),
        ({"n_predict": 0}, "n_predict"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(more: dict[str, Any], param: str) -> None:
    found, code, message = refusal(ChatRequest, HI | more)
    assert (found, code) == (param, "unsupported_value")
    assert message.startswith(f"{param}: ")


def test_how_many_tokens() -> None:
    assert chat(n_predict=5).most_tokens == 5
    assert chat(n_predict=5, max_tokens=None).most_tokens == 5
    assert chat(n_predict=5, max_tokens=3).most_tokens == 3
    assert list(chat(n_predict=5, max_tokens=3).unknown()) == []
    assert chat(max_tokens=3, max_completion_tokens=4).most_tokens == 4
    assert chat(max_tokens=-1).most_tokens == -1
    assert chat(max_tokens=10**12).most_tokens == 10**12
    assert chat().most_tokens is None


def test_whether_the_last_turn_is_continued() -> None:
    def continued(**more: Any) -> bool:
        turns = [*HI["messages"], {"role": "assistant", "content": "Ho"}]
        return chat(messages=turns, **more).talk.continued

    assert continued()
    assert continued(add_generation_prompt=False)
    assert not continued(add_generation_prompt=True)
    assert not continued(continue_final_message=False)
    assert not chat().talk.continued
    both = {"continue_final_message": True, "add_generation_prompt": True}
    turns = {"messages": [{"role": "assistant", "content": "Ho"}]}
    assert refusal(ChatRequest, turns | both)[0] == "add_generation_prompt"


@pytest.mark.parametrize(
    ("more", "param", "code"),
    [
        ({"temperature": "1"}, "temperature", "invalid_type"),
        ({"top_k": -2}, "top_k", "invalid_value"),
        ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
        ({"repetition_context_size": 0}, "repetition_context_size", "invalid_value"),
        ({"frequency_penalty": 2.1}, "frequency_penalty", "invalid_value"),
        ({"frequency_penalty": False}, "frequency_penalty", "invalid_type"),
        ({"presence_penalty": -2.1}, "presence_penalty", "invalid_value"),
        ({"logit_bias": [1]}, "logit_bias", "invalid_type"),
        ({"logit_bias": {"5": "1"}}, "logit_bias", "invalid_type"),
        ({"logit_bias": {"5": True}}, "logit_bias", "invalid_type"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5": 10**400}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"05": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"-5": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"five": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {str(10**9): 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"\u0665": 1}}, "logit_bias", "invalid_value"),
        ({"min_tokens": -1}, "min_tokens", "invalid_value"),
        ({"ignore_eos": 1}, "ignore_eos", "invalid_type"),
        ({"temperature": -0.1}, "temperature", "invalid_value"),
        ({"repeat_penalty": 0}, "repeat_penalty", "invalid_value"),
        ({"repeat_last_n": -2}, "repeat_last_n", "invalid_value"),
        ({"top_p": -0.1}, "top_p", "invalid_value"),
        ({"top_p": 1.1}, "top_p", "invalid_value"),
        ({"min_p": 1}, "min_p", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_type"),
        ({"n": 1.5}, "n", "invalid_type"),
        ({"seed": 2**63}, "seed", "invalid_value"),
        ({"max_tokens": 10**4000}, "max_tokens", "invalid_value"),
        ({"max_completion_tokens": -2}, "max_completion_tokens", "invalid_value"),
        ({"tool_choice": "always"}, "tool_choice", "invalid_value"),
        ({"tool_choice": {"function": {}}}, "tool_choice", "invalid_value"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            "missing_required_parameter",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
            "response_format.json_schema.schema",
            "invalid_type",
        ),
        ({"guided_json": "x"}, "guided_json", "invalid_type"),
        ({"guided_choice": []}, "guided_choice", "invalid_value"),
        ({"messages": [{"role": "x", "content": ""}]}, "messages[0].role", "invalid_value"),
        ({"logprobs": 1}, "logprobs", "invalid_type"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"stop": ["a"] * 17}, "stop", "invalid_value"),
        ({"stop": [1]}, "stop", "invalid_type"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "Hi"}, "messages", "invalid_type"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        (
            {"messages": [{"role": "user", "content": [{"type": "x", "text": ""}]}]},
            "messages[0].content[0].type",
            "invalid_value",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
            "unsupported_value",
        ),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type"),
    ],
)
def test_what_is_wrong_is_named(more: dict[str, Any], param: str, code: str) -> None:
    assert refusal(ChatRequest, HI | more)[:2] == (param, code)


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_what_is_attached_is_refused_in_words_for_people(kind: str) -> None:
    attached = [{"role": "user", "content": [{"type": "text", "text": "See:"}, {"type": kind}]}]
    said = refusal(ChatRequest, {"messages": attached})[2]
    assert said == "messages[0].content[1].type: the models read text only"


def test_how_a_request_says_to_choose() -> None:
    asked = chat(
        temperature=1e-30,
        top_p=0.9,
        min_p=0.1,
        seed=-2,
        top_k=40,
        repetition_penalty=1.1,
        repetition_context_size=64,
        frequency_penalty=2,
        presence_penalty=-2.0,
        logit_bias={"5": -100, "0": 1.5},
        min_tokens=3,
        ignore_eos=True,
    )
    biases = ((5, -100.0), (0, 1.5))
    wanted = Sampling(1e-30, 0.9, 0.1, 2**64 - 2, 40, 1.1, 64, 2.0, -2.0, biases, 3, True)
    assert sampling(asked, GREEDY) == wanted
    assert sampling(chat(), wanted) == wanted
    assert sampling(chat(seed=-1), wanted) == replace(wanted, seed=None)
    assert sampling(chat(top_p=0), GREEDY).top_p == pytest.approx(0, abs=1e-6)
    unset = chat(top_k=-1, logit_bias={}, min_tokens=0, ignore_eos=False, temperature=0)
    assert sampling(unset, wanted) == replace(
        wanted, temp=0, top_k=0, logit_bias=(), min_tokens=0, ignore_eos=False
    )


@pytest.mark.parametrize(
    ("more", "penalty", "context"),
    [
        ({"repeat_penalty": 1.1}, 1.1, 64),
        ({"repeat_penalty": 1.1, "repeat_last_n": 5}, 1.1, 5),
        ({"repeat_penalty": 1.1, "repeat_last_n": -1}, 1.1, 2**31 - 1),
        ({"repeat_penalty": 1.1, "repeat_last_n": 0}, 1.0, 20),
        ({"repeat_last_n": 5}, 1.0, 5),
        ({"repetition_penalty": 1.2, "repeat_last_n": 5}, 1.2, 5),
        ({"repetition_penalty": 1.2, "repeat_last_n": 0}, 1.0, 20),
        ({"repeat_penalty": 1.1, "repetition_context_size": 7, "repeat_last_n": 5}, 1.1, 7),
        ({"repetition_penalty": 1.2, "repeat_penalty": 1.1}, 1.2, 20),
    ],
)
def test_llama_cpp_s_repetition(more: dict[str, Any], penalty: float, context: int) -> None:
    found = sampling(chat(**more), GREEDY)
    assert (found.repetition_penalty, found.repetition_context) == (penalty, context)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"messages": NaN}x',
        b"[" * 100_000,
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b'{"model": "\\ud800"}',
        b'{"model": "\xff"}',
        b'{"seed": ' + b"9" * 10_000 + b"}",
    ],
)
def test_what_is_no_json(body: bytes) -> None:
    assert refusal(ChatRequest, body)[1] == "invalid_json"


def test_not_a_number_is_not_a_temperature() -> None:
    body = json.dumps(HI | {"temperature": float("nan")}).encode()
    assert refusal(ChatRequest, body)[:2] == ("temperature", "invalid_value")


@pytest.mark.parametrize("name", ["metadata", "user", "foo"])
@pytest.mark.parametrize("number", ["NaN", "-Infinity"])
def test_what_no_json_can_say_is_not_taken_anywhere(name: str, number: str) -> None:
    body = json.dumps(HI).encode()[:-1] + f', "{name}": [{number}]}}'.encode()
    assert refusal(ChatRequest, body)[1] == "invalid_json"
    assert parse_body(ChatRequest, body.replace(number.encode(), f'"{number}"'.encode()))


def test_no_error_quotes_a_request() -> None:
    for kind in (ChatRequest, ResponsesRequest):
        with pytest.raises(ValidationError) as caught:
            kind.model_validate({"messages": "secret", "input": 5, "seed": "secret"})
        assert "secret" not in str(caught.value)


def test_null_is_as_if_left_out() -> None:
    call = {"id": "c", "type": None, "function": {"name": "f", "arguments": None}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    (message,) = chat(messages=[turn]).messages
    assert message.tool_calls
    assert message.tool_calls[0].type == "function"
    for kind, body in (
        (ChatRequest, HI),
        (CompletionRequest, {"prompt": "a"}),
        (ResponsesRequest, {"input": [{"role": "user", "content": "Hi", "type": None}]}),
        (TokenizeRequest, {"prompt": "a"}),
    ):
        names = {name for name, field in kind.model_fields.items() if not field.is_required()}
        nothing = {field.alias or name: None for name, field in kind.model_fields.items()}
        full = json.dumps({**{n: nothing[n] for n in names & nothing.keys()}, **body})
        asked = parse_body(kind, full.encode())
        assert list(asked.unknown()) == []
        plain = parse_body(kind, json.dumps(body).encode())
        assert all(getattr(asked, name) == getattr(plain, name) for name in kind.model_fields)


def test_a_call_that_comes_back_as_others_write_it() -> None:
    call = {"id": "c", "function": {"name": "f", "arguments": {"city": "Ulm"}}}
    refused = [{"type": "refusal", "refusal": "No."}]
    asked = chat(
        messages=[
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "assistant", "content": refused},
            {"role": "assistant", "content": None, "refusal": "Never."},
        ]
    )
    first, *rest = [message.plain for message in asked.messages]
    assert first["tool_calls"][0]["function"]["arguments"] == '{"city": "Ulm"}'
    assert [each["content"] for each in rest] == ["No.", "Never."]
    bad = {"messages": [{"role": "assistant", "content": [{"type": "refusal", "text": "No."}]}]}
    assert refusal(ChatRequest, bad)[0] == "messages[0].content[0].refusal"


def test_a_million_faults_make_one_error() -> None:
    keys = ",".join(f'"k{i}":1' for i in range(100_000))
    body = b'{"messages": [], ' + keys.encode() + b"}"
    assert refusal(ChatRequest, body)[0] == "messages"
    many = {"messages": [{"role": "x", "content": "y"}] * 50_000}
    assert refusal(ChatRequest, many)[0] == "messages[0].role"


def test_parts_join_and_an_answer_can_come_back() -> None:
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "you"}]
    answer: dict[str, Any] = {
        "role": "assistant",
        "content": "Ho",
        "refusal": None,
        "annotations": [],
    }
    asked = chat(messages=[{"role": "user", "content": parts}, answer])
    assert [message.text for message in asked.messages] == ["Hi you", "Ho"]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        ([1, 2], [[1, 2]]),
        (["a", "b"], ["a", "b"]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompts(prompt: Any, prompts: list[Any]) -> None:
    assert parse_body(CompletionRequest, json.dumps({"prompt": prompt}).encode()).prompt == prompts


@pytest.mark.parametrize(
    "prompt", [[], [[]], ["a", 1], [1, "a"], [[1], "a"], None, 5, [-1], [True], [2**31], {"a": 1}]
)
def test_what_is_no_prompt(prompt: Any) -> None:
    assert refusal(CompletionRequest, {"prompt": prompt})[:2] == ("prompt", "invalid_type")


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "echo": False}, "max_tokens"),
        ({"max_tokens": -2, "echo": True}, "max_tokens"),
        ({"echo": 1}, "echo"),
        ({"prompt": ["a"] * (MOST_CHOICES + 1)}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"prompt": ["a", "b"], "n": MOST_CHOICES}, "n"),
        ({"logprobs": 6}, "logprobs"),
    ],
)
def test_what_completions_refuse(more: dict[str, Any], param: str) -> None:
    assert refusal(CompletionRequest, {"prompt": "a"} | more)[0] == param


def test_a_prompt_may_come_back() -> None:
    for more in ({"max_tokens": 0}, {"prompt": ["a"] * MOST_CHOICES}, {"prompt": [1], "n": 2}):
        body = {"prompt": "a", "logprobs": 1, "echo": True} | more
        assert parse_body(CompletionRequest, json.dumps(body).encode()).echo


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
NAMES = st.sampled_from([*ChatRequest.model_fields, *CompletionRequest.model_fields])


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(NAMES, JSON, max_size=4), st.booleans())
@slow
def test_anything_is_taken_or_refused(fields: dict[str, Any], valid: bool) -> None:
    body = json.dumps((HI | {"prompt": "a"} if valid else {}) | fields).encode("utf-8")
    for kind in (ChatRequest, CompletionRequest):
        with contextlib.suppress(ApiError):
            parse_body(kind, body)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_taken_or_refused(body: bytes) -> None:
    with pytest.raises(ApiError):
        parse_body(ChatRequest, body)
