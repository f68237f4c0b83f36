"""What programs send as a conversation: taken in one form, or refused where it is wrong."""

from typing import Any

import pytest
from conftest import slow

from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.tokenizer.messages import (
    MAX_TEXT,
    check_messages,
    check_tools,
    ends_with_answer,
    size_of,
    unknown_keys,
)


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def calling(*functions: tuple[str, Any], content: Any = None) -> dict[str, Any]:
    calls = [
        {"id": f"id{at}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for at, (name, arguments) in enumerate(functions)
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls}


TEXT = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("message", "checked"),
    [
        (TEXT, TEXT),
        ({"role": "developer", "content": "x"}, {"role": "system", "content": "x"}),
        (user([{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]), user("ab")),
        (user([]), user("")),
        (
            {"role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
            {"role": "assistant", "content": "a"},
        ),
        (
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            {"role": "assistant", "content": "No."},
        ),
        (
            {"role": "assistant", "content": None, "refusal": "No."},
            {"role": "assistant", "content": "No."},
        ),
        ({"role": "assistant"}, {"role": "assistant", "content": ""}),
        (  # as OpenAI's packages send an earlier answer
            {
                **{"role": "assistant", "content": "a", "refusal": None, "annotations": []},
                **{"audio": None, "function_call": None, "tool_calls": None},
            },
            {"role": "assistant", "content": "a"},
        ),
        (
            user([{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}], name="B"),
            user("a"),
        ),
        (
            {"role": "assistant", "content": "a", "reasoning_content": "hm", "x": [{}]},
            {"role": "assistant", "content": "a"},
        ),
        (calling(("f", "{}")), calling(("f", "{}"), content="")),
        (calling(("f", {"é": 1})), calling(("f", '{"é": 1}'), content="")),
        (calling(("f", None), content="So:"), calling(("f", ""), content="So:")),
        (
            {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"type": "function", "function": {"name": "f", "arguments": "{}"}},
                ],
            },
        ),
        (
            {"role": "function", "name": "f", "content": None},
            {"role": "tool", "name": "f", "content": ""},
        ),
        (
            {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "x"}]},
            {"role": "tool", "tool_call_id": "a", "content": "x"},
        ),
    ],
)
def test_what_is_taken(message: dict[str, Any], checked: dict[str, Any]) -> None:
    assert check_messages([TEXT, message]) == [TEXT, checked]
    assert check_messages([checked]) == [checked]


def test_system_messages_anywhere_are_taken() -> None:
    roles = ["user", "system", "system", "assistant", "system"]
    messages = [{"role": role, "content": role} for role in roles]
    assert check_messages(messages) == messages


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (["user", "hi"], ": must be an object with role and content, not a list"),
        ({"content": "x"}, ".role: must be one of system, user, assistant, tool, dev"),
        ({"role": ["user"], "content": "x"}, ".role: must be one of "),
        ({"role": "robot" * 99, "content": "x"}, ".role: must be one of "),
        ({"role": "user"}, ".content: must be a string or a list of text parts, not null"),
        ({"role": "system", "content": None}, ".content: must be a string or a list"),
        (user(3), ".content: must be a string or a list of text parts, not a number"),
        (user({"text": "x"}), ".content: must be a string or a list of text parts, not an object"),
        (user(True), ".content: must be a string or a list of text parts, not true or false"),
        (user(["x"]), '.content[0]: must be an object {"type": "text", "text": "..."}, not a str'),
        (
            user([{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {}}]),
            ".content[1]: a part of type 'image_url' can't be read; give it as text",
        ),
        (user([{"type": "input_audio"}]), ".content[0]: a part of type 'input_audio' can't be"),
        (user([{"type": ["text"]}]), ".content[0]: a part of type ['text'] can't be read"),
        (user([{"type": "text"}]), ".content[0].text: must be a string, not null"),
        (user([{"type": "refusal", "text": "x"}]), ".content[0].refusal: must be a string"),
        (user("x", name=1), ".name: must be a string, not a number"),
        (user("x", tool_calls=[{"function": {"name": "f"}}]), ".tool_calls: only an assistant's"),
        ({"role": "assistant", "audio": {"id": "a"}}, ".audio: can't be read"),
        ({"role": "assistant", "refusal": []}, ".refusal: must be a string, not a list"),
        ({"role": "assistant", "tool_calls": {}}, ".tool_calls: must be a list, not an object"),
        ({"role": "assistant", "tool_calls": ["f"]}, ".tool_calls[0]: must be an object with id"),
        (
            {"role": "assistant", "tool_calls": [{"type": "custom", "custom": {}}]},
            ".tool_calls[0].type: must be 'function', not 'custom'",
        ),
        (
            {"role": "assistant", "tool_calls": [{"id": "a"}]},
            ".tool_calls[0].function: must be an object with name and arguments, not null",
        ),
        (calling((3, "{}")), ".tool_calls[0].function.name: must be a string"),  # type: ignore[arg-type]
        (calling(("f", 3)), ".tool_calls[0].function.arguments: must be a string, not a number"),
        (calling(("f", {"a": {1}})), ".tool_calls[0].function.arguments: must be JSON"),
        (
            {"role": "assistant", "tool_calls": [{"id": 3, "function": {"name": "f"}}]},
            ".tool_calls[0].id: must be a string, not a number",
        ),
        ({"role": "assistant", "function_call": "f"}, ".function_call: must be an object with"),
        ({"role": "tool", "content": "x", "tool_call_id": 1}, ".tool_call_id: must be a string"),
    ],
)
def test_what_is_wrong_is_named(message: Any, complaint: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_messages([TEXT, message])
    assert str(caught.value).startswith("messages[1]" + complaint)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("messages", [[], "hello", None, {}, 3, b"x"])
def test_no_conversation(messages: Any) -> None:
    with pytest.raises(RequestError, match="must be a list of at least one"):
        check_messages(messages)


@slow
def test_calls_count_as_text() -> None:
    """Else a conversation could hold any number of them."""
    call = {"function": {"name": "", "arguments": "x" * MAX_TEXT}}
    for calls in ([call], [{"function": {"name": ""}}] * 80_000):
        with pytest.raises(RequestError, match="are more than any context holds"):
            check_messages([{"role": "assistant", "tool_calls": calls}])
    assert size_of([TEXT]) == 2


def test_unknown_keys_are_named_once() -> None:
    messages = [
        user([{"type": "text", "text": "x", "mood": 1, "index": 0}], id="a", name="b"),
        user("x", id="c", timestamp=3),
        calling(("f", "{}")),
    ]
    assert unknown_keys(messages) == ["id", "mood", "index", "timestamp"]


def test_what_can_be_gone_on_with() -> None:
    assert ends_with_answer([TEXT, {"role": "assistant", "content": ""}])
    assert not ends_with_answer([TEXT])
    assert not ends_with_answer(check_messages([TEXT, calling(("f", "{}"))]))


def test_tools_are_objects() -> None:
    assert check_tools(None) is None
    assert check_tools([]) is None
    assert check_tools([{"type": "function"}]) == [{"type": "function"}]
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    for wrong in ("f", {"a": 1}, ["f"], [{"f": "x" * MAX_TEXT}], [{"f": deep}]):
        with pytest.raises(RequestError, match=r"tools.* must|more than any context|too deeply"):
            check_tools(wrong)
