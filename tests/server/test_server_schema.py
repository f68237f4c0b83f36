"""Bodies: what is taken, and what the answer says of what is not."""

import contextlib
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_cerebrum.decoding.sampling import GREEDY, Sampling
from mlx_cerebrum.server.faults import ApiError
from mlx_cerebrum.server.intake import sampling
from mlx_cerebrum.server.schema import (
    MOST_CHOICES,
    ChatRequest,
    CompletionRequest,
    Strict,
    parse_body,
)

HI = {"messages": [{"role": "user", "content": "Hi"}]}


def refusal(kind: type[Strict], body: Any) -> tuple[str | None, str | None, str]:
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
    chat(
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        response_format={"type": "text"},
        tools=[],
        tool_choice="none",
        parallel_tool_calls=True,
        store=False,
        service_tier="auto",
        reasoning_effort=None,
        user="someone",
        metadata={"a": "b"},
        modalities=["text"],
        temperature=None,
        n=None,
        stop=None,
    )


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"store": True}, "store"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 0}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(more: dict[str, Any], param: str) -> None:
    found, code, message = refusal(ChatRequest, HI | more)
    assert (found, code) == (param, "unsupported_value")
    assert message.startswith(f"{param}: ")


@pytest.mark.parametrize(
    ("more", "param", "code"),
    [
        ({"foo": 1}, "foo", "unknown_parameter"),
        ({"stream": True, "stream_options": {"foo": 1}}, "stream_options.foo", "unknown_parameter"),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"temperature": "1"}, "temperature", "invalid_type"),
        ({"top_k": -2}, "top_k", "invalid_value"),
        ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
        ({"repetition_context_size": 0}, "repetition_context_size", "invalid_value"),
        ({"repeat_penalty": 1.1}, "repeat_penalty", "unknown_parameter"),
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
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"min_p": 1}, "min_p", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_type"),
        ({"n": 1.5}, "n", "invalid_type"),
        ({"seed": 2**63}, "seed", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 10**4000}, "max_tokens", "invalid_value"),
        ({"max_completion_tokens": 2**31}, "max_completion_tokens", "invalid_value"),
        ({"logprobs": 1}, "logprobs", "invalid_type"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"stop": ["a"] * 17}, "stop", "invalid_value"),
        ({"stop": [1]}, "stop", "invalid_type"),
        ({"metadata": {"a": 1}}, "metadata", "invalid_type"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "Hi"}, "messages", "invalid_type"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        (
            {"messages": [{"role": "tool", "content": ""}]},
            "messages[0].role",
            "invalid_value",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]},
            "messages[0].content[0].type",
            "invalid_value",
        ),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type"),
        (
            {"messages": [{"role": "user", "content": "", "name": "Eve"}]},
            "messages[0].name",
            "unsupported_value",
        ),
    ],
)
def test_what_is_wrong_is_named(more: dict[str, Any], param: str, code: str) -> None:
    assert refusal(ChatRequest, HI | more)[:2] == (param, code)


def test_how_a_request_says_to_choose() -> None:
    asked = chat(
        temperature=1e-30,
        top_p=0.9,
        min_p=0.1,
        seed=-1,
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
    wanted = Sampling(1e-30, 0.9, 0.1, 2**64 - 1, 40, 1.1, 64, 2.0, -2.0, biases, 3, True)
    assert sampling(asked, GREEDY) == wanted
    assert sampling(chat(), wanted) == wanted
    unset = chat(top_k=-1, logit_bias={}, min_tokens=0, ignore_eos=False, temperature=0)
    assert sampling(unset, wanted) == replace(
        wanted, temp=0, top_k=0, logit_bias=(), min_tokens=0, ignore_eos=False
    )


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


def test_a_million_faults_make_one_error() -> None:
    keys = ",".join(f'"k{i}":1' for i in range(100_000))
    body = b'{"messages": [], ' + keys.encode() + b"}"
    assert refusal(ChatRequest, body)[0] == "k0"
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
        ({"max_tokens": -1, "echo": True}, "max_tokens"),
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
