"""Request objects that take what they name and nothing else, and say what is wrong in a line."""

from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from mlx_cerebrum.server.faults import ApiError

PARAM = "param"  # in a custom error's context: the parameter to name, where `loc` can't say


def neutral(*values: Any) -> Any:
    """A parameter that is not honoured: only null and `values` are let through."""
    return Field(default=None, json_schema_extra={"enum": [*values, None]})


def _same(a: Any, b: Any) -> bool:
    """JSON equality: 0 is 0.0, and false is not 0."""
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


class Strict(BaseModel):
    """An object that takes the fields it names, of the types it names."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        # The first is enough: a body could hold a million, each an error object of its own.
        for name in data if isinstance(data, dict) else ():
            if name not in cls.model_fields:
                shown = name if len(name) <= 64 else f"{name[:64]}..."
                raise PydanticCustomError(
                    "unknown_parameter", "unknown parameter: {param}", {PARAM: shown}
                )
        return data

    @field_validator("*", mode="before")
    @classmethod
    def _honoured(cls, value: Any, info: Any) -> Any:
        extra = cls.model_fields[info.field_name].json_schema_extra
        allowed = extra.get("enum") if isinstance(extra, dict) else None
        if isinstance(allowed, list) and not any(_same(value, one) for one in allowed):
            raise PydanticCustomError("unsupported_value", "not supported here; leave it out")
        return value


def wrong(param: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("unsupported_value", "{message}", {PARAM: param, "message": message})


Asked = TypeVar("Asked", bound=Strict)

_CODES = {
    "unknown_parameter": "unknown_parameter",
    "unsupported_value": "unsupported_value",
    "missing": "missing_required_parameter",
    "json_invalid": "invalid_json",
}


def parse(kind: type[Asked], body: bytes) -> Asked:
    """The request a body holds. Raises ApiError (400) for the first thing wrong with it."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        raise ApiError(400, f"the body: {first['msg']}", code="invalid_json")
    named = first.get("ctx", {}).get(PARAM)
    param = _spelled([*first["loc"], *([] if named is None else [named])])
    message = first["msg"]
    if first["type"] == "missing":
        message = "is required"
    where = f"{param}: " if param and first["type"] != "unknown_parameter" else ""
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
