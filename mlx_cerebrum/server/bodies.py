"""What every request's body is made of: objects that take what they name, read from bytes."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError, from_json

from mlx_cerebrum.server.faults import ApiError

PARAM = "param"  # in a custom error's context: the parameter to name, where `loc` can't say
TAKEN = "Taken, and not used"


def neutral(*values: Any) -> Any:
    """A parameter that is not honoured, and would change the answer: only null and `values`, which
    ask for nothing, are let through."""
    return Field(default=None, json_schema_extra={"enum": [*values, None]})


def taken(why: str = "") -> Any:
    """A parameter that can't change the answer, whatever it says."""
    return Field(default=None, description=f"{TAKEN}{': ' * bool(why)}{why}")


def _same(a: Any, b: Any) -> bool:
    """JSON equality: 0 is 0.0, and false is not 0."""
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def _nullable(schema: dict[str, Any], kind: type[BaseModel]) -> None:
    """A null stands for a field that is left out, also where its default is another."""
    for field_name, field in kind.model_fields.items():
        name = field.alias or field_name
        if not field.is_required() and field.default is not None:
            schema["properties"][name] = {"anyOf": [schema["properties"][name], {"type": "null"}]}


class Open(BaseModel):
    """An object that takes the fields it names, of the types it names; others are not looked at."""

    model_config = ConfigDict(
        extra="allow",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        populate_by_name=True,
        hide_input_in_errors=True,  # they may come to be logged
        json_schema_extra=_nullable,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _honoured(cls, value: Any, info: Any) -> Any:
        field = cls.model_fields[info.field_name]
        if value is None and not field.is_required():
            return field.get_default(call_default_factory=True)
        extra = field.json_schema_extra
        allowed = extra.get("enum") if isinstance(extra, dict) else None
        if isinstance(allowed, list) and not any(_same(value, one) for one in allowed):
            raise PydanticCustomError("unsupported_value", "not supported here; leave it out")
        return value

    def unknown(self, place: str = "") -> Iterator[str]:
        """The names of fields that are not looked at: `user_tag`, `messages.weight`."""
        yield from (place + name for name in self.model_extra or ())
        for name in type(self).model_fields:
            value = getattr(self, name)
            for one in value if isinstance(value, list) else (value,):
                if isinstance(one, Open):
                    yield from one.unknown(f"{place}{name}.")


def wrong(param: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("unsupported_value", "{message}", {PARAM: param, "message": message})


Asked = TypeVar("Asked", bound=Open)
_CODES = {
    "unsupported_value": "unsupported_value",
    "missing": "missing_required_parameter",
    "json_invalid": "invalid_json",
}


def parse_body(kind: type[Asked], body: bytes) -> Asked:
    """The request a body holds. Raises ApiError (400) for the first thing wrong with it."""
    try:
        asked = kind.model_validate_json(body)
        if b"NaN" in body or b"Infinity" in body:  # where anything may stand, pydantic takes them
            from_json(body, allow_inf_nan=False)
        return asked
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    except ValueError as error:
        raise ApiError(400, f"the body: Invalid JSON: {error}", code="invalid_json") from None
    if first["type"] == "json_invalid":
        raise ApiError(400, f"the body: {first['msg']}", code="invalid_json")
    named = first.get("ctx", {}).get(PARAM)
    param = _spelled([*first["loc"], *([] if named is None else [named])])
    message = first["msg"]
    if first["type"] == "missing":
        message = "is required"
    where = f"{param}: " if param else ""
    code = _CODES.get(first["type"])
    if code is None:
        code = "invalid_type" if first["type"].endswith("_type") else "invalid_value"
    raise ApiError(400, f"{where}{message[:1].lower()}{message[1:]}", code=code, param=param)


def _spelled(loc: Sequence[int | str]) -> str | None:
    """A place in the body, as people write it: messages[0].content."""
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text or None
