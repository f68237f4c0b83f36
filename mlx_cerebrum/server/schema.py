"""What requests may say: OpenAI's parameters, each honoured or refused, none ignored.

Parameters that can't be honoured are declared with the values that ask for nothing (their
`enum`), since many clients send those; any other value is refused by name.
"""

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from mlx_cerebrum.server.faults import ApiError

MOST_CHOICES = 128  # answers of one request, over all its prompts
MOST_STOPS = 16
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


class TextPart(Strict):
    type: Literal["text"]
    text: str


def _parts(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise PydanticCustomError("content_type", "must be text, or a list of text parts")
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _or_text(schema: dict[str, Any]) -> None:
    schema["anyOf"] = [{"type": "string"}, {"type": "array", "items": schema.pop("items")}]
    del schema["type"]


class Message(Strict):
    """A turn. An assistant's may carry the empty fields that answers come with."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[TextPart],
        FailFast(),
        BeforeValidator(_parts),
        Field(json_schema_extra=_or_text),
    ]
    name: Any = neutral("")
    refusal: Any = neutral()
    annotations: Any = neutral([])
    audio: Any = neutral()
    tool_calls: Any = neutral([])
    function_call: Any = neutral()

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content)


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Any = neutral(False)


_STOP = {"type": "string", "minLength": 1, "maxLength": 1000}


def _stops(value: Any) -> Any:
    """One or several stop strings as a list of them."""
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return None
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise PydanticCustomError("stop_type", "must be text, or a list of texts")
    if len(stops) > MOST_STOPS or not all(0 < len(stop) <= 1000 for stop in stops):
        raise PydanticCustomError(
            "stop", "must be at most {most} texts of 1 to 1000 characters", {"most": MOST_STOPS}
        )
    return stops


def _stop_schema(schema: dict[str, Any]) -> None:
    several = {"type": "array", "maxItems": MOST_STOPS, "items": _STOP}
    schema.pop("items", None)
    schema.pop("type", None)
    schema["anyOf"] = [_STOP, several, {"type": "null"}]


_TOKEN = re.compile(r"0|[1-9][0-9]{0,8}")


def _biases(value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(type(b) in (int, float) for b in value.values()):
        raise PydanticCustomError("logit_bias_type", "must be an object of numbers by token id")
    if not all(_TOKEN.fullmatch(token) for token in value):
        raise PydanticCustomError("logit_bias", 'must name token ids, such as "42"')
    if not all(-100 <= bias <= 100 for bias in value.values()):
        raise PydanticCustomError("logit_bias", "must be from -100 to 100")
    return value


def _bias_schema(schema: dict[str, Any]) -> None:
    schema["anyOf"][0] = {
        "type": "object",
        "propertyNames": {"pattern": f"^({_TOKEN.pattern})$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    }


def _labels(value: Any) -> Any:
    if isinstance(value, dict) and not all(isinstance(one, str) for one in value.values()):
        raise PydanticCustomError("labels_type", "must be an object of texts")
    return value


class Sampled(Strict):
    """What both endpoints take."""

    model: str | None = Field(None, description="One of /v1/models; without it the first")
    max_tokens: int | None = Field(
        None,
        ge=1,
        lt=2**31,
        description="Tokens at most; without it the server's --max-tokens, or what fits",
    )
    temperature: float | None = Field(
        None, ge=0, le=2, description="Without it the server's --temp; 0 is greedy, its default"
    )
    top_k: int | None = Field(
        None, ge=-1, lt=2**31, description="Likeliest tokens to draw from; 0 and -1 are all"
    )
    top_p: float | None = Field(None, gt=0, le=1, description="Probability mass to draw from")
    min_p: float | None = Field(
        None, ge=0, lt=1, description="Least probability, as a share of the likeliest token's"
    )
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**63, description="The same seed gives the same text"
    )
    stop: Annotated[
        list[str] | None,
        BeforeValidator(_stops),
        Field(
            description="The text ends before the first of these", json_schema_extra=_stop_schema
        ),
    ] = None
    n: int | None = Field(None, ge=1, le=MOST_CHOICES, description="Answers to each prompt")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Taken, and not used")
    # Not llama.cpp's `repeat_penalty`: it looks at 64 tokens, and would do another thing here.
    repetition_penalty: float | None = Field(
        None,
        gt=0,
        description="What the logits of tokens among the last ones are divided by (multiplied,"
        " below 0)",
    )
    repetition_context_size: int | None = Field(
        None,
        ge=1,
        lt=2**31,
        description="How many of prompt and answer; without it the server's --repetition-context",
    )
    frequency_penalty: float | None = Field(
        None,
        ge=-2,
        le=2,
        description="Subtracted from a token's logit for each time it is in the answer",
    )
    presence_penalty: float | None = Field(
        None, ge=-2, le=2, description="Subtracted once if it is in the answer"
    )
    logit_bias: Annotated[
        dict[str, float] | None,
        BeforeValidator(_biases),
        Field(
            description="What is added to the logits of token ids", json_schema_extra=_bias_schema
        ),
    ] = None
    min_tokens: int | None = Field(
        None, ge=0, lt=2**31, description="No end of text before the answer has so many tokens"
    )
    ignore_eos: bool | None = Field(
        None, description="No end of text at all: the answer goes on until max_tokens, or a stop"
    )

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise wrong("stream_options", "only means something with stream set to true")
        return self

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens


class ChatRequest(Sampled):
    messages: Annotated[list[Message], FailFast(), Field(min_length=1)]
    max_completion_tokens: int | None = Field(
        None, ge=1, lt=2**31, description="Same as max_tokens"
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    metadata: Annotated[dict[str, str] | None, BeforeValidator(_labels)] = Field(
        None, description="Taken, and not used"
    )
    safety_identifier: str | None = Field(None, description="Taken, and not used")
    prompt_cache_key: str | None = Field(None, description="Taken, and not used")
    store: Any = neutral(False)
    response_format: Any = neutral({"type": "text"})
    modalities: Any = neutral(["text"])
    tools: Any = neutral([])
    tool_choice: Any = neutral("none", "auto")
    parallel_tool_calls: Any = neutral(True, False)
    functions: Any = neutral([])
    function_call: Any = neutral("none", "auto")
    service_tier: Any = neutral("auto", "default")
    reasoning_effort: Any = neutral("none")
    verbosity: Any = neutral("medium")
    prediction: Any = neutral()
    audio: Any = neutral()
    web_search_options: Any = neutral()

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise wrong("top_logprobs", "only means something with logprobs set to true")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise wrong("max_completion_tokens", "is another number than max_tokens; send one")
        return self

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def _prompts(value: Any) -> Any:
    """One or several prompts, each text or token ids, as a list of them."""
    if isinstance(value, str) or (isinstance(value, list) and _ids(value)):
        return [value]
    texts = isinstance(value, list) and all(isinstance(one, str) for one in value)
    if value and (texts or (isinstance(value, list) and all(map(_ids, value)))):
        return value
    raise PydanticCustomError(
        "prompt_type", "must be text, a list of token ids, or a list of several of one kind"
    )


def _ids(value: Any) -> bool:
    ids = isinstance(value, list) and bool(value)
    return ids and all(type(token) is int and 0 <= token < 2**31 for token in value)


_IDS = {
    "type": "array",
    "minItems": 1,
    "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
}
_SEVERAL = {"type": "array", "minItems": 1, "maxItems": MOST_CHOICES}


def _prompt_schema(schema: dict[str, Any]) -> None:
    schema.clear()
    several = [_SEVERAL | {"items": one} for one in ({"type": "string"}, _IDS)]
    schema["anyOf"] = [{"type": "string"}, _IDS, *several]


class CompletionRequest(Sampled):
    prompt: Annotated[
        list[Any],
        BeforeValidator(_prompts),
        Field(max_length=MOST_CHOICES, json_schema_extra=_prompt_schema),
    ]
    max_tokens: int | None = Field(
        None,
        ge=0,
        lt=2**31,
        description="Tokens at most; without it the server's --max-tokens, or what fits."
        " 0 with echo only",
    )
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = Field(
        None, description="The text begins with the prompt; logprobs are of its tokens too"
    )
    suffix: Any = neutral("")
    best_of: Any = neutral(1)

    @model_validator(mode="after")
    def _not_too_many(self) -> Self:
        if len(self.prompt) * (self.n or 1) > MOST_CHOICES:
            raise wrong("n", f"asks for more than {MOST_CHOICES} answers over all prompts")
        if self.best_of and (self.n or 1) > 1:
            raise wrong("best_of", "is less than n; leave it out")
        if self.max_tokens == 0 and not self.echo:
            raise wrong("max_tokens", "0 asks for nothing without echo")
        return self


Asked = TypeVar("Asked", bound=Strict)

_CODES = {
    "unknown_parameter": "unknown_parameter",
    "unsupported_value": "unsupported_value",
    "missing": "missing_required_parameter",
    "json_invalid": "invalid_json",
}


def parse_body(kind: type[Asked], body: bytes) -> Asked:
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
