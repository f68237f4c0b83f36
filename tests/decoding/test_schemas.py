"""JSON Schema's own test suite, and schemas as programs write them: kept, or refused by name."""

import json
import random
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from mlx_cerebrum.decoding.grammar_text import Ask, Written, first_line
from mlx_cerebrum.decoding.trial import LIMITS
from mlx_cerebrum.errors import RequestError

GOLDEN = Path(__file__).parent.parent / "golden"
SUITE = json.loads((GOLDEN / "schema_suite.json").read_text())
REAL = {
    f"{program}: {name}": schema
    for program in ("pydantic", "zod")
    for name, schema in json.loads((GOLDEN / f"schemas_{program}.json").read_text()).items()
}
BYTES = LLTokenizer("byte")


def matcher(schema: Any) -> LLMatcher:
    """Over bytes. Raises RequestError for a schema that is refused."""
    text = Written(Ask("json_schema", json.dumps(schema))).text
    made = LLMatcher(BYTES, text, log_level=0, limits=LLParserLimits(**LIMITS))  # type: ignore[arg-type]
    made.compute_bitmask()
    if made.is_error():
        raise RequestError(first_line(made.get_error()))
    return made


def names(schema: Any) -> list[str]:
    """Properties in the order in which an object is to have them."""
    if not isinstance(schema, dict | list):
        return []
    if isinstance(schema, list):
        return [name for part in schema for name in names(part)]
    own = schema.get("properties")
    found = [*own] if isinstance(own, dict) else []
    found += [name for name in schema.get("required") or () if isinstance(name, str)]
    return found + [name for part in schema.values() for name in names(part)]


def ordered(value: Any, order: list[str]) -> Any:
    if isinstance(value, dict):
        known = sorted(
            value, key=lambda name: (name not in order, name in order and order.index(name))
        )
        return {name: ordered(value[name], order) for name in known}
    return [ordered(item, order) for item in value] if isinstance(value, list) else value


def finite(digits: str) -> float:
    """1e999 is a number in JSON."""
    return max(-1e300, min(float(digits), 1e300))


def holds(schema: Any, made: LLMatcher, value: Any) -> bool:
    text = json.dumps(ordered(value, names(schema)), ensure_ascii=False).encode()
    held = made.deep_copy()
    return held.try_consume_tokens(list(text)) == len(text) and held.is_accepting()


@pytest.mark.parametrize(
    ("draft", "compiled", "strict"), [("draft2020-12", 158, 23), ("draft7", 154, 14)]
)
def test_the_suite_s_documents(draft: str, compiled: int, strict: int) -> None:
    """None that is invalid may come. Of those that are valid may not: another order of the
    properties, others than those listed, a whole number written as 1.0, and a `format` that is not
    kept."""
    found = refused = 0
    for name, schema, valid, invalid in SUITE[draft]:
        if draft == "draft7" and isinstance(schema, dict):
            schema = {"$schema": "http://json-schema.org/draft-07/schema#"} | schema
        try:
            made = matcher(schema)
        except RequestError:
            continue
        found += 1
        assert not [value for value in invalid if holds(schema, made, value)], name
        refused += sum(not holds(schema, made, value) for value in valid)
    assert (found, refused) == (compiled, strict)


@pytest.mark.parametrize("name", REAL)
def test_what_programs_write(name: str) -> None:
    """Random documents of them, such as end, are valid."""
    schema, ended = REAL[name], 0
    if name == "pydantic: Sets":
        with pytest.raises(RequestError, match="uniqueItems"):
            matcher(schema)
        return
    made = matcher(schema)
    for seed in range(12):
        held, draw, text = made.deep_copy(), random.Random(seed), bytearray()
        while not held.is_stopped() and len(text) < 400:
            mask = np.frombuffer(held.compute_bitmask(), np.uint8)
            choices = np.flatnonzero(np.unpackbits(mask, bitorder="little")[:256]).tolist()
            closing = [byte for byte in choices if byte in b'"}]']  # else texts go on and on
            text.append(draw.choice(closing if closing and draw.random() < 0.5 else choices))
            held.consume_token(text[-1])
        assert not held.is_error()
        if held.is_stopped():
            ended += 1
            document = json.loads(bytes(text), parse_float=finite)
            assert jsonschema_rs.is_valid(schema, document), text
    assert ended or "tree" in name.lower() or "Expression" in name


A_AND_B = {"properties": {"a": {"type": "integer"}, "b": {"properties": {"c": {"const": 1}}}}}
OBJECT = {"type": "object"}


@pytest.mark.parametrize(
    ("schema", "document", "may"),
    [
        (OBJECT | A_AND_B, {"a": 1, "b": {"c": 1}}, True),
        (OBJECT | A_AND_B, {"a": 1, "x": 2}, False),
        (OBJECT | A_AND_B, {"b": {"x": 1}}, False),
        (OBJECT | A_AND_B | {"additionalProperties": True}, {"a": 1, "x": 2}, True),
        (OBJECT | A_AND_B | {"required": ["x"]}, {"x": 2}, True),
        ({"allOf": [OBJECT | A_AND_B, {"properties": {"x": {}}}]}, {"a": 1, "x": 2}, True),
        (OBJECT, {"x": 2}, True),
        (OBJECT | {"properties": {}}, {}, True),
        (OBJECT | {"properties": {}}, {"x": 1}, False),
    ],
)
def test_objects_that_list_their_properties_have_no_others(
    schema: Any, document: Any, may: bool
) -> None:
    assert holds(schema, matcher(schema), document) == may


@pytest.mark.parametrize("required", [5, [{}], [5], "a"])
def test_what_is_required_in_no_list_of_names(required: Any) -> None:
    with pytest.raises(RequestError):
        matcher(OBJECT | A_AND_B | {"required": required})
