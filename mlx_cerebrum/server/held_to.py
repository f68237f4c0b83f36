"""What a request holds its answer to: a schema, an expression, a grammar, some texts, a call."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from mlx_cerebrum.decoding.grammar_text import Ask, Kind
from mlx_cerebrum.server.faults import ApiError
from mlx_cerebrum.server.schema import Drawn
from mlx_cerebrum.server.talk import ANY_OBJECT, ResponseFormat, StructuredOutputs, Tool


def held_to(
    request: Drawn, format: tuple[str, ResponseFormat | None], to_call: Mapping[str, Tool]
) -> Ask | None:
    """What the answer must be as a whole, if anything. Raises ApiError for two such wishes.

    format: what a text is to be, and what errors call that. to_call: functions of which one is to
        be called, by what errors call them.
    """
    where, asked = format
    found: list[Ask] = []
    if asked is not None and not to_call:  # it says what a text is like, and a call is none
        if asked.wanted == ANY_OBJECT:
            found.append(Ask("json_object", "", where))
        elif asked.wanted is not None:
            place = where if where != "response_format" else f"{where}.{asked.place}"
            found.append(Ask("json_schema", _text(asked.wanted), place))
    newer = request.structured_outputs or StructuredOutputs.model_validate({})
    if newer.json_object:
        found.append(Ask("json_object", "", "structured_outputs.json_object"))
    wishes: list[tuple[str, Kind, Any]] = [
        ("guided_json", "json_schema", request.guided_json),
        ("json_schema", "json_schema", request.json_schema),
        ("guided_regex", "regex", request.guided_regex),
        ("guided_grammar", "lark", request.guided_grammar),
        ("guided_choice", "choice", request.guided_choice),
        ("structured_outputs.json", "json_schema", newer.json_),
        ("structured_outputs.regex", "regex", newer.regex),
        ("structured_outputs.grammar", "lark", newer.grammar),
        ("structured_outputs.choice", "choice", newer.choice),
    ]
    for name, kind, value in wishes:
        if value is not None:
            source = value if kind in ("regex", "lark") else _text(value)
            found.append(Ask(kind, source, name))
    if to_call:
        functions = [
            {
                "name": tool.function.name,
                "parameters": tool.function.parameters or {},
                "place": place,
            }
            for place, tool in to_call.items()
        ]
        found.append(Ask("call", _text(functions), "tools"))
    if len(found) > 1:
        message = f"{found[1].place}: the answer is held to {found[0].place} already; send one"
        raise ApiError(400, message, code="invalid_value", param=found[1].place)
    if found and (request.min_tokens or request.ignore_eos):
        name = "ignore_eos" if request.ignore_eos else "min_tokens"
        message = f"{name}: an answer that is held to {found[0].place} ends where that does"
        raise ApiError(400, message, code="invalid_value", param=name)
    return found[0] if found else None


def call_note(to_call: Iterable[Tool]) -> str:
    """What a model that never learnt to call functions is told."""
    functions = [
        tool.function.model_dump(include={"name", "description", "parameters"}, exclude_none=True)
        for tool in to_call
    ]
    listed = "\n".join(_text(function) for function in functions)
    form = '{"name": "...", "arguments": {...}}'
    return f"Answer with one call of a function, as JSON: {form}\n\nThe functions:\n{listed}"


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
