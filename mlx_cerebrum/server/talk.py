"""Conversations as requests have them: messages, tools, and the form an answer is to have."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from pydantic import BeforeValidator, FailFast, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from mlx_cerebrum.server.bodies import PARAM, Open, neutral, taken

MOST_TOOLS = 128
# OpenAI's other parts: what a person attached. So the refusal is in words for people.
NOT_TEXT = ("image_url", "input_image", "input_audio", "file", "input_file")


class TextPart(Open):
    type: Literal["text", "input_text", "output_text", "refusal"]
    text: str | None = None
    refusal: str | None = None
    cache_control: Any = taken()
    annotations: Any = taken()
    logprobs: Any = taken()

    @field_validator("type", mode="before")
    @classmethod
    def _can_be_read(cls, value: Any) -> Any:
        if value in NOT_TEXT:
            raise PydanticCustomError("unsupported_value", "the models read text only")
        return value

    @model_validator(mode="after")
    def _has_its_text(self) -> "TextPart":
        name = "refusal" if self.type == "refusal" else "text"
        if getattr(self, name) is None:
            raise PydanticCustomError("missing", "is required", {PARAM: name})
        return self

    @property
    def said(self) -> str:
        return (self.refusal if self.type == "refusal" else self.text) or ""


def text_or_parts(value: Any) -> Any:
    if value is None:
        return []
    if not isinstance(value, str | list):
        raise PydanticCustomError("content_type", "must be text, or a list of text parts")
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def or_text(schema: dict[str, Any]) -> None:
    """A list's JSON schema that allows text too."""
    if "anyOf" in schema:  # a list or null
        schema |= schema.pop("anyOf")[0]
    schema["anyOf"] = [{"type": "string"}, {"type": "array", "items": schema.pop("items")}]
    del schema["type"]


def or_null(schema: dict[str, Any]) -> None:
    or_text(schema)
    schema["anyOf"].append({"type": "null"})


def _arguments(value: Any) -> Any:
    """As text: Hugging Face's templates, and programs made for them, have an object."""
    if value is None:
        return ""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value


class CalledFunction(Open):
    name: str
    arguments: Annotated[str, BeforeValidator(_arguments)] = Field("", description="JSON")


class ToolCall(Open):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Open):
    """A turn of any role."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[
        list[TextPart] | None,
        FailFast(),
        BeforeValidator(text_or_parts),
        Field(description="An assistant's may be missing or null", json_schema_extra=or_null),
    ] = None
    tool_calls: Annotated[
        list[ToolCall] | None,
        FailFast(),
        Field(max_length=MOST_TOOLS, description="Of an assistant: written as text"),
    ] = None
    tool_call_id: str | None = None
    function_call: CalledFunction | None = Field(None, description="As one of tool_calls")
    name: str | None = Field(None, description="Of a function; a speaker's is not used")
    audio: Any = neutral()
    refusal: str | None = Field(None, description="What an assistant says without content")
    annotations: Any = taken()
    reasoning_content: Any = taken("earlier thinking is not read again")
    reasoning: Any = taken("earlier thinking is not read again")
    cache_control: Any = taken()

    @model_validator(mode="after")
    def _says_something(self) -> "Message":
        if self.role != "assistant" and "content" not in self.model_fields_set:
            raise PydanticCustomError("missing", "is required", {PARAM: "content"})
        return self

    @property
    def text(self) -> str:
        return "".join(part.said for part in self.content or ())

    @property
    def plain(self) -> dict[str, Any]:
        """As the tokenizer takes it."""
        more = {
            "tool_calls": [call.model_dump() for call in self.tool_calls or ()],
            "tool_call_id": self.tool_call_id,
            "function_call": self.function_call and self.function_call.model_dump(),
            "name": self.name,
        }
        given = {name: value for name, value in more.items() if value}
        return {"role": self.role, "content": self.text or self.refusal or "", **given}


class Function(Open):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of its arguments")
    strict: Any = taken("arguments always keep to their schema")


class Tool(Open):
    type: Literal["function"]
    function: Function

    @property
    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        return self.model_dump(exclude_none=True)


def tool_choice_of(value: Any) -> Any:
    if value in (None, "none", "auto", "required"):
        return value
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise PydanticCustomError(
            "tool_choice", 'must be none, auto, required or {"function": {"name": ...}}'
        )
    return {"type": "function", "function": {"name": function["name"]}}


_NAMED = {
    "type": "object",
    "required": ["function"],
    "properties": {
        "type": {"type": "string"},
        "function": {
            "type": "object",
            "required": ["name"],
            "properties": {"name": {"type": "string"}},
        },
    },
}
TOOL_CHOICE = {"anyOf": [{"enum": ["none", "auto", "required", None]}, _NAMED]}


def _json_schema(value: Any) -> Any:
    if not isinstance(value, dict | bool | None):
        raise PydanticCustomError("json_schema_type", "must be a JSON schema: an object, or true")
    return value


# A JSON schema, as JSON.
Schema = Annotated[
    Any,
    BeforeValidator(_json_schema),
    Field(json_schema_extra={"type": ["object", "boolean", "null"]}),
]
ANY_OBJECT: dict[str, Any] = {"type": "object"}


class JsonSchema(Open):
    name: str | None = None
    description: Any = taken()
    schema_: Schema = Field(None, alias="schema")
    strict: Any = taken("answers always keep to their schema")


class ResponseFormat(Open):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: Schema = Field(None, alias="schema", description="llama.cpp's place for a schema")

    @model_validator(mode="after")
    def _has_its_schema(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None and self.schema_ is None:
            raise PydanticCustomError("missing", "is required", {PARAM: "json_schema"})
        return self

    @property
    def place(self) -> str:
        """Where the schema is."""
        inner = self.json_schema is not None and self.json_schema.schema_ is not None
        return "json_schema.schema" if inner else "schema"

    @property
    def wanted(self) -> dict[str, Any] | bool | None:
        """The schema that the answer must keep to, if any: true allows any JSON."""
        if self.type == "text":
            return None
        named = None if self.json_schema is None else self.json_schema.schema_
        found = self.schema_ if named is None else named
        return ANY_OBJECT if found is None else found


# Texts of which the answer is one.
Texts = Annotated[list[str] | None, Field(min_length=1, max_length=1000)]


class StructuredOutputs(Open):
    json_: Schema = Field(None, alias="json", description="As guided_json")
    regex: str | None = Field(None, description="As guided_regex")
    grammar: str | None = Field(None, description="As guided_grammar")
    choice: Texts = Field(None, description="As guided_choice")
    json_object: bool | None = Field(None, description="Any JSON object")
    structural_tag: Any = neutral()
    whitespace_pattern: Any = neutral()
    disable_any_whitespace: Any = neutral(False)
    disable_additional_properties: Any = neutral(False)


@dataclass(frozen=True)
class Talk:
    """A conversation to be answered, whatever endpoint it came to.

    messages: as the tokenizer takes them; `param` is what errors call them.
    continued, prompted: whether its last turn is gone on with, and else whether an answer is begun.
    tool_place: what errors call a tool's function, by its number.
    choice: none, auto, required or a function's name; None as auto.
    format: what the answer is to be, and what errors call that.
    top_logprobs: alternatives to each token of the answer; None: no log-probabilities.
    """

    messages: list[dict[str, Any]]
    param: str
    continued: bool = False
    prompted: bool = True
    tools: Sequence[Tool] = ()
    tool_place: str = "tools[{}].function"
    choice: str | None = None
    format: tuple[str, ResponseFormat | None] = ("", None)
    top_logprobs: int | None = None

    @property
    def to_call(self) -> dict[str, Tool]:
        """The functions of which the answer is to call one, by their place; none where it is
        text."""
        if self.choice in (None, "none", "auto"):
            return {}
        return {
            self.tool_place.format(number): tool
            for number, tool in enumerate(self.tools)
            if self.choice in ("required", tool.function.name)
        }


class EndsInMessages(Protocol):
    """A request that has these fields."""

    messages: list[Message]
    add_generation_prompt: bool | None
    continue_final_message: bool | None


def goes_on(asked: EndsInMessages) -> bool:
    """Whether the last of its messages is continued."""
    if asked.continue_final_message is not None:
        return asked.continue_final_message
    last = asked.messages[-1]
    ends = last.role == "assistant" and not last.tool_calls and not last.function_call
    return ends and not asked.add_generation_prompt
