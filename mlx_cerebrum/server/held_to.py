"""What a request holds its answer to: a schema, an expression, a grammar, some texts, a call."""

import json
from collections.abc import Sequence
from typing import Any

from mlx_cerebrum.decoding.grammar_text import Ask
from mlx_cerebrum.server.faults import ApiError
from mlx_cerebrum.server.schema import Drawn, ResponseFormat, Tool


def held_to(
    request: Drawn, format: tuple[str, ResponseFormat | None], to_call: Sequence[Tool] = ()
) -> Ask | None:
    """What the answer must be as a whole, if anything. Raises ApiError for two such wishes."""
    where, asked = format
    found: list[Ask] = []
    if asked is not None and asked.type == "json_object" and asked.schema_ is None:
        found.append(Ask("json_object", "", where))
    elif asked is not None and (schema := asked.wanted) is not None:
        place = where if where != "response_format" else f"{where}.{asked.place}"
        found.append(Ask("json_schema", _text(schema), place))
    for name, schema in (
        ("guided_json", request.guided_json),
        ("json_schema", request.json_schema),
    ):
        if schema is not None:
            found.append(Ask("json_schema", _text(schema), name))
    if request.guided_regex is not None:
        found.append(Ask("regex", request.guided_regex, "guided_regex"))
    if request.guided_grammar is not None:
        found.append(Ask("lark", request.guided_grammar, "guided_grammar"))
    if request.guided_choice is not None:
        found.append(Ask("choice", _text(request.guided_choice), "guided_choice"))
    if to_call:
        functions = [
            {"name": tool.function.name, "parameters": tool.function.parameters or {}}
            for tool in to_call
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


def call_note(to_call: Sequence[Tool]) -> str:
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
