"""What an answer is to be held to, checked, and written as llguidance reads it.

A schema is read by https://json-schema.org/draft/2020-12, or the older draft that it names. An
object's properties come in the schema's order. A `format` that the specification does not name is
a note, as it says; any other keyword that can't be honoured is refused.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import unquote

from mlx_cerebrum.errors import RequestError, cut, shown
from mlx_cerebrum.files import json_file

Kind = Literal["json_object", "json_schema", "regex", "lark", "choice", "call"]
Json = dict[str, Any]
Path = tuple[str | int, ...]
Fixed = dict[str, set[str]]

MOST_BYTES = 128 << 10  # of what is asked
MOST_TEXT = 4096  # of a text, a constant or an expression: each step looks at all that it forces
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")  # of a function

# White space may be where JSON has it, but not for ever: a blank, or a new line and its indent.
OPTIONS = {"whitespace_pattern": r"( |\n[ ]{0,32}|\n\t{0,8})"}

# https://json-schema.org/draft/2020-12/json-schema-validation#section-7.3
FORMATS = {"date-time", "date", "time", "duration", "email", "idn-email", "hostname"}
FORMATS |= {"idn-hostname", "ipv4", "ipv6", "uri", "uri-reference", "iri", "iri-reference", "uuid"}
FORMATS |= {"uri-template", "json-pointer", "relative-json-pointer", "regex"}

# What asks for nothing, as programs write it: llguidance does not know these keywords.
NEUTRAL = {"uniqueItems": False, "propertyNames": {"type": "string"}}

# Keywords that hold a schema, schemas by name, or a list of schemas.
ONE = {"items", "additionalItems", "additionalProperties", "contains", "not", "if", "then", "else"}
ONE |= {"propertyNames", "unevaluatedItems", "unevaluatedProperties"}
NAMED = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
JOINED = {"anyOf", "oneOf", "$ref", "if", "not"}  # that may speak of the same object
OTHERS = {"additionalProperties", "patternProperties", "propertyNames", "unevaluatedProperties"}
OTHERS |= {"minProperties", "dependentSchemas", "dependentRequired"}
LISTED = {"allOf", "anyOf", "oneOf", "prefixItems", "items"}


@dataclass(frozen=True)
class Ask:
    """What an answer is to be held to.

    source: by kind, nothing (any JSON object), the JSON text of a schema, a regular expression,
        a Lark grammar (https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md), a JSON
        list of texts, or a JSON list of functions, `{"name": ..., "parameters": schema}` each, of
        which one is called (`calls.py`); `place`, if given, is what errors call a function.
    where: what errors call it.
    """

    kind: Kind
    source: str = ""
    where: str = field(default="", compare=False)

    @property
    def place(self) -> str:
        return self.where or self.kind


class Written:
    """The text of a grammar for llguidance, and where its parts come from.

    Raises RequestError, one line that begins with the place, for what is not well formed.
    """

    def __init__(self, ask: Ask) -> None:
        self.place, self.schemas = ask.place, list[tuple[str, Json]]()
        if len(ask.source) > MOST_BYTES:
            raise RequestError(f"{ask.place} is larger than {MOST_BYTES >> 10} KiB")
        if ask.kind in ("regex", "lark"):
            _short(ask.place, ask.source, 4 * MOST_TEXT)
        self.text = getattr(self, f"_{ask.kind}")(ask.source)

    def _json_object(self, source: str) -> str:
        return _of_schema({"type": "object"})

    def _json_schema(self, source: str) -> str:
        return _of_schema(self._checked(self._read(source), self.place))

    def _regex(self, source: str) -> str:
        from llguidance import LLMatcher

        return LLMatcher.grammar_from_regex(source)

    def _lark(self, source: str) -> str:
        return _of_lark(source)

    def _choice(self, source: str) -> str:
        texts = self._read(source)
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
            raise RequestError(f"{self.place} must be a list of texts, one at least")
        for i, text in enumerate(texts):
            _short(f"{self.place}[{i}]", text)
        return _of_lark("start: TEXT\nTEXT: " + " | ".join(map(json.dumps, dict.fromkeys(texts))))

    def _call(self, source: str) -> str:
        functions = self._read(source)
        if not isinstance(functions, list) or not functions:
            raise RequestError(f"{self.place} must be a list of functions, one at least")
        rules = ["start: " + " | ".join(f"call{i}" for i in range(len(functions)))]
        for i, function in enumerate(functions):
            found = function if isinstance(function, dict) else {}
            place, name = found.get("place", f"{self.place}[{i}]"), found.get("name")
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise RequestError(f"{place}.name must match {NAME.pattern}, not {shown(name)}")
            schema = found.get("parameters") or {}
            if isinstance(schema, dict):
                schema = {"type": "object"} | schema
            schema = self._checked(schema, f"{place}.parameters")
            head, tail = json.dumps(f'{{"name": "{name}", "arguments": '), json.dumps("}")
            rules.append(f"call{i}: {head} arguments{i} {tail}")
            rules.append(f"arguments{i}: %json {json.dumps(schema | {'x-guidance': OPTIONS})}")
        return _of_lark("\n".join(rules))

    def _read(self, source: str) -> Any:
        return json_file.parse(source, self.place, RequestError)

    def _checked(self, schema: Any, place: str) -> Json:
        """A schema without what it only notes."""
        if schema is True or schema is False:
            schema = {} if schema else {"not": {}}
        if not isinstance(schema, dict):
            raise RequestError(f"{place} must be a JSON schema, an object, not {shown(schema)}")
        found: Json = {key: value for key, value in schema.items() if key != "x-guidance"}
        for path, part in _parts(found):
            where = _spelled(place, path)
            reference = part.get("$ref", "#")
            if not isinstance(reference, str) or not reference.startswith("#"):
                raise RequestError(f"{where}.$ref must point into the schema itself (#/...)")
            if isinstance(part.get("format"), str) and part["format"] not in FORMATS:
                del part["format"]
            for key, nothing in NEUTRAL.items():
                if part.get(key) == nothing:
                    del part[key]
            for name in _named(part):
                _short(f"{where}.properties", name)
            for key in ("const", "enum"):
                for value in _list(part, key) if key == "enum" else [part.get(key)]:
                    _short(f"{where}.{key}", json.dumps(value, ensure_ascii=False))
            required = part.get("required")
            least = 1 + (len(required) if isinstance(required, list) else 0)
            if isinstance(part.get("minProperties"), int) and part["minProperties"] > least:
                # Names that are not in `properties` may come twice.
                raise RequestError(f"{where}.minProperties can't be kept above {least}")
            if "anyOf" not in part and _told_apart(found, _list(part, "oneOf")):
                # llguidance sees this for itself, but not through references.
                part["anyOf"] = part.pop("oneOf")
        _close(found)
        if not _ends(found):
            raise RequestError(f"{place}: no finite document can fulfil it")
        self.schemas.append((place, found))
        return found


def _close(schema: Json) -> None:
    """Let objects that list their properties have no others, as llama.cpp and xgrammar do: a small
    model would go on adding some until its tokens run out. Every such document is valid too.

    Where several schemas may speak of one object, all is left as it is.
    """
    parts = [part for _, part in _parts(schema)]
    if any("allOf" in part or ("properties" in part and JOINED & part.keys()) for part in parts):
        return
    for part in parts:
        known, required = part.get("properties"), part.get("required", [])
        if not isinstance(known, dict) or not isinstance(required, list) or OTHERS & part.keys():
            continue
        if all(isinstance(name, str) and name in known for name in required):
            part["additionalProperties"] = False


def _short(place: str, text: str, most: int = MOST_TEXT) -> None:
    if len(text) > most:
        raise RequestError(f"{place} is longer than {most} characters")


def first_line(error: str) -> str:
    """Of what llguidance says."""
    lines = (line.strip() for line in error.splitlines())
    return next((line for line in lines if line and line != "<non-verbose/>"), "not valid")[:300]


def _of_schema(schema: Json) -> str:
    return json.dumps({"grammars": [{"json_schema": schema | {"x-guidance": OPTIONS}}]})


def _of_lark(text: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": text}]})


def _children(schema: Any) -> Iterator[tuple[Path, Any]]:
    """The schemas right in a schema, and where."""
    if not isinstance(schema, dict):
        return
    for key, value in schema.items():
        if key in NAMED and isinstance(value, dict):
            yield from (((key, name), part) for name, part in value.items())
        elif key in LISTED and isinstance(value, list):
            yield from (((key, i), part) for i, part in enumerate(value))
        elif key in ONE:
            yield (key,), value


def _parts(schema: Any, path: Path = ()) -> Iterator[tuple[Path, Json]]:
    """A schema and all schemas in it, that are objects."""
    if isinstance(schema, dict):
        yield path, schema
    for place, child in _children(schema):
        yield from _parts(child, path + place)


def _spelled(place: str, path: Path) -> str:
    return place + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)


def blamed(schemas: Iterable[tuple[str, Json]], problem: Callable[[str], str]) -> str:
    """The place and error of the smallest part of these schemas, each with its place, that is
    refused by itself. `problem` says what is wrong with a text; empty if nothing."""
    for place, schema in schemas:
        if error := problem(_of_schema(schema)):
            path, error = _smallest(schema, error, problem)
            return cut(f"{_spelled(place, path)}: {first_line(error)}")
    return ""


def _smallest(schema: Json, error: str, problem: Callable[[str], str]) -> tuple[Path, str]:
    root = _moved(schema)
    path: Path = ()
    node: Any = root
    looking = True
    while looking:
        looking = False
        for place, child in _children(node):
            if place[0] in ("$defs", "definitions"):
                continue
            if found := problem(_alone(root, path + place)):
                path, node, error, looking = path + place, child, found, True
                break
    if isinstance(node, dict):  # the keyword without which it would do
        for key in list(node):
            value = node.pop(key)
            without = problem(_alone(root, path))
            node[key] = value
            if not without:
                return (*path, key), error
    return path, error


def _moved(value: Any) -> Any:
    """A schema that is to stand at `#/$defs/root`: its references point to where it is then."""
    if isinstance(value, list):
        return [_moved(item) for item in value]
    if not isinstance(value, dict):
        return value
    moved = {key: _moved(item) for key, item in value.items()}
    reference = moved.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = "#/$defs/root" + reference[1:].rstrip("/")
    return moved


def _alone(root: Json, path: Path) -> str:
    keys = (str(key).replace("~", "~0").replace("/", "~1") for key in ("$defs", "root", *path))
    schema: Json = {"$ref": "#/" + "/".join(keys), "$defs": {"root": root}}
    if "$schema" in root:
        schema["$schema"] = root["$schema"]
    return _of_schema(schema)


def _target(root: Json, reference: Any) -> Any:
    """What a reference such as `#/$defs/a` points to; None if nothing, or if it is an anchor."""
    if not isinstance(reference, str):
        return None
    found: Any = root
    for key in unquote(reference[1:]).split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict):
            found = found.get(key)
        elif isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        else:
            return None
    return found if reference.startswith("#/") or reference == "#" else None


def _told_apart(root: Json, options: list[Any]) -> bool:
    """Whether no two of these schemas can hold at once, for their types, or for a property that
    both require to be something else."""
    parts = [
        _target(root, p["$ref"]) if isinstance(p, dict) and "$ref" in p else p for p in options
    ]
    if not 1 < len(parts) <= 64 or not all(isinstance(part, dict) for part in parts):
        return False
    fixed = [_fixed(part) for part in parts]  # once each: there are 2000 pairs of 64
    pairs = ((i, j) for i in range(len(parts)) for j in range(i))
    return all(_apart(parts[i], parts[j], fixed[i], fixed[j]) for i, j in pairs)


def _apart(a: Json, b: Json, fixed_a: Fixed, fixed_b: Fixed) -> bool:
    kinds = [{part["type"]} if isinstance(part.get("type"), str) else set() for part in (a, b)]
    if all(kinds) and kinds[0] != kinds[1] and kinds[0] | kinds[1] != {"integer", "number"}:
        return True
    if kinds != [{"object"}, {"object"}]:
        return False
    return any(name in fixed_b and not values & fixed_b[name] for name, values in fixed_a.items())


def _fixed(part: Json) -> Fixed:
    """The properties that it requires to be one of some values, and these."""
    found = {n: _values(part, n) for n in _list(part, "required") if isinstance(n, str)}
    return {name: values for name, values in found.items() if values}


def _values(schema: Json, name: Any) -> set[str]:
    """The JSON texts of all that a property may be; empty if it is not given so."""
    part = _named(schema).get(name) if isinstance(name, str) else None
    if not isinstance(part, dict):
        return set()
    values = [part["const"]] if "const" in part else _list(part, "enum")
    plain = all(isinstance(value, str | bool | int) for value in values)  # 1.0 is 1
    return {json.dumps(value) for value in values} if plain else set()


def _ends(root: Json) -> bool:
    """Whether following its references can come to an end: `{"$ref": "#"}` can't.

    The references that can are found from those that need no other, as far as types tell.
    """
    left = {part["$ref"]: _target(root, part["$ref"]) for _, part in _parts(root) if "$ref" in part}
    left = {reference: target for reference, target in left.items() if target is not None}

    def ends(part: Any) -> bool:
        if not isinstance(part, dict):
            return part is not False
        reference = part.get("$ref")
        if isinstance(reference, str) and reference in left:
            return False
        if not all(map(ends, _list(part, "allOf"))):
            return False
        for key in ("anyOf", "oneOf"):
            if _list(part, key) and not any(map(ends, _list(part, key))):
                return False
        types = part.get("type")
        types = types if isinstance(types, list) else [types]
        if "const" in part or "enum" in part or any(t not in ("object", "array") for t in types):
            return True
        names = [name for name in _list(part, "required") if isinstance(name, str)]
        needed = [_named(part).get(name, True) for name in names]
        if "object" in types and all(map(ends, needed)):
            return True
        least, first = part.get("minItems", 0), _list(part, "prefixItems") or _list(part, "items")
        if "array" not in types or not isinstance(least, int):
            return "array" in types
        rest = part.get("items", True) if len(first) < least else True
        return all(map(ends, first[:least])) and ends(rest)

    found = True
    while found:
        found = False
        for reference in list(left):
            if ends(left[reference]):
                del left[reference]
                found = True
        left = dict(reversed(left.items()))  # whichever way a chain goes, it is soon through
    return ends(root)


def _named(part: Json) -> Json:
    properties = part.get("properties")
    return properties if isinstance(properties, dict) else {}


def _list(part: Json, key: str) -> list[Any]:
    value = part.get(key)
    return value if isinstance(value, list) else []
