"""What a conversation may hold: messages as programs send them, checked and put in one form.

They come as OpenAI's chat API has them (https://platform.openai.com/docs/api-reference/chat). A
checked message is {role, content}: the role one of system, user, assistant and tool, the content
text. An assistant's may have `tool_calls` besides, each {id, type, function: {name, arguments}}
with the arguments as JSON text; a tool's may have `name` and `tool_call_id`. What is checked can
be checked again, and stays as it is.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from mlx_cerebrum.errors import RequestError

Message = dict[str, Any]

# Of a conversation, more than any context holds: tokenizing takes up to 350 bytes a character.
MAX_TEXT, MAX_MESSAGES = 2_000_000, 20_000

_ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    "developer": "system",  # its name for newer models
    "function": "tool",  # and that of older clients
}
_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
# What is read, and what is known to be of no use here: reasoning, marks for a cache, quotes.
_KEYS = {
    *("role", "content", "name", "tool_calls", "function_call", "tool_call_id", "refusal"),
    *("audio", "annotations", "reasoning", "reasoning_content", "cache_control"),
}
_PART_KEYS = {"type", "text", "refusal", "annotations", "cache_control"}


def check_messages(messages: Any) -> list[Message]:
    """A conversation in the form above. RequestError names the place that is wrong.

    What can't change an answer is dropped: a person's `name`, annotations, what `unknown_keys`
    finds.
    """
    if not _is_list(messages) or not messages:
        raise RequestError("messages must be a list of at least one {role, content} object")
    if len(messages) > MAX_MESSAGES:
        raise RequestError(f"{len(messages):,} messages are more than {MAX_MESSAGES:,}: drop some")
    checked = [_message(f"messages[{at}]", message) for at, message in enumerate(messages)]
    check_length(size_of(checked))
    return checked


def unknown_keys(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys of messages, and of parts of their content, that mean nothing here: each once, in
    the order found. Of messages that `check_messages` takes."""
    found: dict[str, None] = {}
    for message in messages:
        found.update(dict.fromkeys(key for key in message if key not in _KEYS))
        content = message.get("content")
        for part in content if _is_list(content) else ():
            found.update(dict.fromkeys(key for key in part if key not in _PART_KEYS))
    return list(found)


def ends_with_answer(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether checked messages end with an assistant's text, which can be gone on with."""
    last = messages[-1]
    return bool(last["role"] == "assistant" and not last.get("tool_calls"))


def size_of(messages: Sequence[Mapping[str, Any]]) -> int:
    """Characters of checked messages: of their content, and of all there is to tool calls."""
    contents = sum(len(message["content"]) for message in messages)
    return contents + sum(characters(message) for message in messages if len(message) > 2)


def characters(value: Any) -> int:
    """Characters of the texts in a JSON value, its names among them."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(characters(name) + characters(each) for name, each in value.items())
    return sum(map(characters, value)) if _is_list(value) else 1


def check_length(count: int) -> None:
    """Raise RequestError for a text that no context holds, before memory is taken for its ids."""
    if count > MAX_TEXT:
        raise RequestError(
            f"{count:,} characters are more than any context holds ({MAX_TEXT:,} are read):"
            " shorten the text"
        )


def check_tools(tools: Any) -> list[dict[str, Any]] | None:
    """The tools that a template is to show, None for none. RequestError says what is wrong."""
    if tools is None:
        return None
    if not _is_list(tools) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RequestError("tools must be a list of objects")
    try:
        check_length(characters(tools))
    except RecursionError:
        raise RequestError("tools: nested too deeply") from None
    return [dict(tool) for tool in tools] or None


def _message(where: str, message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where}: must be an object with role and content, not {kind(message)}")
    given = message.get("role")
    role = _ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise RequestError(f"{where}.role: must be one of {', '.join(_ROLES)}, not {given!r:.60}")
    if message.get("audio") is not None:
        raise RequestError(f"{where}.audio: can't be read; give what was said as text")
    checked: Message = {"role": role, "content": _content(where, message, role)}
    if calls := _calls(where, message):
        if role != "assistant":
            raise RequestError(f"{where}.tool_calls: only an assistant's message calls tools")
        checked["tool_calls"] = calls
    for key in ("name", "tool_call_id"):
        value = _optional(where, message, key)
        if role == "tool" and value is not None:
            checked[key] = value
    return checked


def _content(where: str, message: Mapping[str, Any], role: str) -> str:
    content, refusal = message.get("content"), _optional(where, message, "refusal")
    if content is None and role in ("assistant", "tool"):
        return refusal or ""  # it has only called tools, or refused; a tool gave nothing back
    where += ".content"
    if isinstance(content, str):
        return content
    if not _is_list(content):
        must = "must be a string or a list of text parts"
        raise RequestError(f"{where}: {must}, not {kind(content)}")
    return "".join(_part(f"{where}[{at}]", part) for at, part in enumerate(content))


def _part(where: str, part: Any) -> str:
    if not isinstance(part, Mapping):
        must = 'must be an object {"type": "text", "text": "..."}'
        raise RequestError(f"{where}: {must}, not {kind(part)}")
    sort = part.get("type")
    key = _PARTS.get(sort) if isinstance(sort, str) else None
    if key is None:
        raise RequestError(f"{where}: a part of type {sort!r:.60} can't be read; give it as text")
    return _string(f"{where}.{key}", part.get(key))


def _calls(where: str, message: Mapping[str, Any]) -> list[dict[str, Any]]:
    calls, older = message.get("tool_calls"), message.get("function_call")
    if calls is not None and not _is_list(calls):
        raise RequestError(f"{where}.tool_calls: must be a list, not {kind(calls)}")
    if calls or older is None:
        return [_call(f"{where}.tool_calls[{at}]", call) for at, call in enumerate(calls or ())]
    return [{"type": "function", "function": _function(f"{where}.function_call", older)}]


def _call(where: str, call: Any) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise RequestError(f"{where}: must be an object with id and function, not {kind(call)}")
    if (sort := call.get("type")) not in (None, "function"):
        raise RequestError(f"{where}.type: must be 'function', not {sort!r:.60}")
    function = _function(f"{where}.function", call.get("function"))
    identity = _optional(where, call, "id")
    named = {} if identity is None else {"id": identity}
    return {**named, "type": "function", "function": function}


def _function(where: str, function: Any) -> dict[str, str]:
    if not isinstance(function, Mapping):
        must = "must be an object with name and arguments"
        raise RequestError(f"{where}: {must}, not {kind(function)}")
    arguments = function.get("arguments")
    if isinstance(arguments, Mapping):  # as Hugging Face's templates have them
        try:
            arguments = json.dumps(arguments, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):
            raise RequestError(f"{where}.arguments: must be JSON") from None
    return {
        "name": _string(f"{where}.name", function.get("name")),
        "arguments": "" if arguments is None else _string(f"{where}.arguments", arguments),
    }


def _optional(where: str, holder: Mapping[str, Any], key: str) -> str | None:
    value = holder.get(key)
    return None if value is None else _string(f"{where}.{key}", value)


def _string(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{where}: must be a string, not {kind(value)}")
    return value


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def kind(value: Any) -> str:
    """What a value is, in the words of JSON."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, Mapping):
        return "an object"
    names = {int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), type(value).__name__)
