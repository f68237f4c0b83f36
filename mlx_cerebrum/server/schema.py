"""What requests may say: the one description of their bodies.

From it come the checks, the OpenAPI document (openapi.py) and the table of fields in the docs. The
rule: what changes the answer is honoured, or refused by name; what can't change it is taken; names
that nobody knows are taken too, and named in the answer's headers (`Ignored`).

Names and meanings are OpenAI's; then vLLM's and llama.cpp's, whose clients come here too.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, TypeVar

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
from pydantic_core import PydanticCustomError, from_json

from mlx_cerebrum.server.faults import ApiError

MOST_CHOICES = 128  # answers of one request, over all its prompts
MOST_STOPS = 16
MOST_TOOLS = 128
LLAMA_CPP_REPEATS = 64  # tokens that its `repeat_penalty` looks at
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


# ---- Messages


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


# ---- Tools, and the shape of an answer


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


def _tool_choice(value: Any) -> Any:
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
_TOOL_CHOICE = {"anyOf": [{"enum": ["none", "auto", "required", None]}, _NAMED]}


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


class StreamOptions(Open):
    include_usage: bool | None = None
    include_obfuscation: Any = taken()


# ---- What both endpoints take

_STOP = {"type": "string", "maxLength": 1000}


def _stops(value: Any) -> Any:
    """One or several stop strings as a list of them; an empty one stops nothing."""
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return None
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise PydanticCustomError("stop_type", "must be text, or a list of texts")
    if len(stops) > MOST_STOPS or not all(len(stop) <= 1000 for stop in stops):
        raise PydanticCustomError(
            "stop", "must be at most {most} texts of at most 1000 characters", {"most": MOST_STOPS}
        )
    return [stop for stop in stops if stop]


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


class Drawn(Open):
    """What every endpoint takes."""

    model: str | None = Field(
        None, description="One of /v1/models; without it, or empty, the first of them"
    )
    temperature: float | None = Field(
        None, ge=0, description="Without it the server's --temp; 0 is greedy, its default"
    )
    top_k: int | None = Field(
        None, ge=-1, lt=2**31, description="Likeliest tokens to draw from; 0 and -1 are all"
    )
    top_p: float | None = Field(
        None, ge=0, le=1, description="Probability mass to draw from; 0 is the likeliest token"
    )
    min_p: float | None = Field(
        None, ge=0, lt=1, description="Least probability, as a share of the likeliest token's"
    )
    seed: int | None = Field(
        None,
        ge=-(2**63),
        lt=2**63,
        description="The same seed gives the same text; -1, as llama.cpp has it, a new one",
    )
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
        description="How many of prompt and answer; without it repeat_last_n, or the server's"
        " --repetition-context",
    )
    repeat_penalty: float | None = Field(
        None,
        gt=0,
        description="llama.cpp's repetition_penalty, which goes before; it looks at"
        f" {LLAMA_CPP_REPEATS} tokens where nothing is said",
    )
    repeat_last_n: int | None = Field(
        None,
        ge=-1,
        lt=2**31,
        description="llama.cpp's repetition_context_size, which goes before; 0 penalizes nothing,"
        " -1 looks at all tokens",
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
    stop: Annotated[
        list[str] | None,
        BeforeValidator(_stops),
        Field(
            description="The text ends before the first of these; an empty one is none",
            json_schema_extra=_stop_schema,
        ),
    ] = None
    # What must be the answer's whole text. vLLM's names.
    guided_json: Schema = Field(None, description="JSON schema that the answer keeps to")
    guided_regex: str | None = Field(None, description="Regular expression that it matches whole")
    guided_grammar: str | None = Field(None, description="Lark grammar that it keeps to")
    guided_choice: Texts = Field(None, description="Texts of which it is one")
    grammar: Any = neutral("")  # GBNF
    json_schema: Schema = Field(None, description="llama.cpp's guided_json")
    structured_outputs: StructuredOutputs | None = Field(
        None, description="vLLM's newer place for json, regex, grammar or choice"
    )
    regex: Any = neutral()  # SGLang's names
    ebnf: Any = neutral()
    # Samplers and searches that there are not.
    typical_p: Any = neutral(0, 1)
    mirostat: Any = neutral(0)
    tfs_z: Any = neutral(1)
    top_a: Any = neutral(0)
    xtc_probability: Any = neutral(0)
    dry_multiplier: Any = neutral(0)
    dynatemp_range: Any = neutral(0)
    smoothing_factor: Any = neutral(0)
    top_n_sigma: Any = neutral(0, -1)
    no_repeat_ngram_size: Any = neutral(0)
    use_beam_search: Any = neutral(False)
    stop_token_ids: Any = neutral([])
    bad_words: Any = neutral([])
    allowed_token_ids: Any = neutral()
    logits_processors: Any = neutral([])
    prompt_logprobs: Any = neutral()
    skip_special_tokens: Any = neutral(True)
    include_stop_str_in_output: Any = neutral(False)
    truncate_prompt_tokens: Any = neutral()
    # They say where, when or how the answer is made; the text is the same.
    user: Any = taken()
    metadata: Any = taken()
    service_tier: Any = taken()
    store: Any = taken("nothing is stored")
    safety_identifier: Any = taken()
    prompt_cache_key: Any = taken("prompts that begin alike are found without it")
    prompt_cache_retention: Any = taken("--cache-gb says how much is kept")
    cache_prompt: Any = taken("prompts that begin alike are found without it")
    priority: Any = taken()
    timings_per_token: Any = taken()

    @property
    def most_tokens(self) -> int | None:
        """Tokens of an answer at most; -1: as many as fit; None: not said."""
        raise NotImplementedError

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return 1


class Sampled(Drawn):
    """What both of OpenAI's older endpoints take."""

    max_tokens: int | None = Field(
        None,
        ge=-1,
        lt=2**63,
        description="Tokens at most; without it the server's --max-tokens. -1 and more than fit"
        " are what fits",
    )
    n_predict: int | None = Field(
        None, ge=-1, lt=2**63, description="llama.cpp's name for max_tokens, which goes before"
    )
    n: int | None = Field(
        None,
        ge=1,
        le=MOST_CHOICES,
        description="Answers to each prompt; as many as the server's --batch at most",
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(
        None, description="include_usage: a last event with the tokens used"
    )
    response_format: ResponseFormat | None = Field(
        None, description="json_schema: the answer keeps to its schema; json_object: to JSON"
    )
    return_token_ids: bool | None = Field(
        None, description="Prompts and answers come back as token ids too"
    )

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def most_tokens(self) -> int | None:
        return self.n_predict if self.max_tokens is None else self.max_tokens

    @property
    def choices(self) -> int:
        return self.n or 1


class ChatRequest(Sampled):
    messages: Annotated[list[Message], FailFast(), Field(min_length=1)]
    max_completion_tokens: int | None = Field(
        None, ge=-1, lt=2**63, description="Goes before max_tokens"
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    add_generation_prompt: bool | None = Field(
        None, description="Whether an answer is begun; by default, unless the last turn is one"
    )
    continue_final_message: bool | None = Field(
        None, description="Whether the last turn, an assistant's, is continued; by default it is"
    )
    tools: Annotated[
        list[Tool] | None,
        FailFast(),
        Field(
            max_length=MOST_TOOLS,
            description="Go to a chat template that knows tools; with any other they are only used"
            " where tool_choice asks for a call",
        ),
    ] = None
    tool_choice: Annotated[
        Any,
        BeforeValidator(_tool_choice),
        Field(
            description="required, or a function: the answer is a call. Else it is text",
            json_schema_extra=dict(_TOOL_CHOICE),
        ),
    ] = None
    parallel_tool_calls: Any = taken("there is one call at most")
    functions: Any = taken("as tools with tool_choice auto")
    function_call: Any = neutral("none", "auto")
    echo: Any = neutral(False)
    chat_template: Any = neutral()
    documents: Any = neutral([])
    modalities: Any = neutral(["text"])
    audio: Any = neutral()
    web_search_options: Any = neutral()
    reasoning_effort: Any = taken("the models have one way to think")
    verbosity: Any = taken("the models have one way to write")
    thinking: Any = taken("the models have one way to think")
    prediction: Any = taken("guesses are made without it")
    chat_template_kwargs: Any = taken("the template has no settings")
    reasoning_format: Any = taken()

    def unknown(self, place: str = "") -> Iterator[str]:
        yield from super().unknown(place)
        if self.functions:  # as tools that need not be called
            yield "functions"

    @model_validator(mode="after")
    def _agree(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise wrong("top_logprobs", "only means something with logprobs set to true")
        if self.most_tokens == 0:
            names = ("max_completion_tokens", "max_tokens", "n_predict")
            said = next(name for name in names if getattr(self, name) is not None)
            raise wrong(said, "0 tokens ask for nothing")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise wrong("continue_final_message", "the last message is not an assistant's")
        if self.continue_final_message and self.add_generation_prompt:
            raise wrong("add_generation_prompt", "is not possible with continue_final_message")
        return self

    @property
    def most_tokens(self) -> int | None:
        most = self.max_completion_tokens
        return super().most_tokens if most is None else most

    @property
    def talk(self) -> Talk:
        choice = self.tool_choice
        must_call = choice not in (None, "none", "auto") and self.continue_final_message is None
        return Talk(
            [message.plain for message in self.messages],
            "messages",
            continued=goes_on(self) and not must_call,
            prompted=self.add_generation_prompt is not False,
            tools=self.tools or (),
            choice=choice["function"]["name"] if isinstance(choice, dict) else choice,
            format=("response_format", self.response_format),
            top_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


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
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = Field(
        None, description="The text begins with the prompt; logprobs are of its tokens too"
    )
    add_special_tokens: Any = neutral(True)
    suffix: Any = neutral("")
    best_of: int | None = Field(None, description="Only as many as n")

    @model_validator(mode="after")
    def _not_too_many(self) -> "CompletionRequest":
        if len(self.prompt) * (self.n or 1) > MOST_CHOICES:
            raise wrong("n", f"asks for more than {MOST_CHOICES} answers over all prompts")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise wrong("best_of", "is another number than n; leave it out")
        if self.most_tokens == 0 and not self.echo:
            raise wrong("max_tokens", "0 tokens ask for nothing without echo")
        return self


# ---- From bytes to one of these

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
