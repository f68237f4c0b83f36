"""What requests may say: the one description of their bodies.

From it come the checks, the OpenAPI document (openapi.py) and the table of fields in the docs. The
rule: what changes the answer is honoured, or refused by name; what can't change it is taken; names
that nobody knows are taken too, and named in the answer's headers (`Ignored`).

Names and meanings are OpenAI's; then vLLM's and llama.cpp's, whose clients come here too.
"""

import re
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BeforeValidator, FailFast, Field, model_validator
from pydantic_core import PydanticCustomError

from mlx_cerebrum.server.bodies import Open, neutral, taken, wrong
from mlx_cerebrum.server.talk import (
    MOST_TOOLS,
    TOOL_CHOICE,
    Message,
    ResponseFormat,
    Schema,
    StructuredOutputs,
    Talk,
    Texts,
    Tool,
    goes_on,
    tool_choice_of,
)

MOST_CHOICES = 128  # answers of one request, over all its prompts
MOST_STOPS = 16
LLAMA_CPP_REPEATS = 64  # tokens that its `repeat_penalty` looks at


class StreamOptions(Open):
    include_usage: bool | None = None
    include_obfuscation: Any = taken()


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
        BeforeValidator(tool_choice_of),
        Field(
            description="required, or a function: the answer is a call. Else it is text",
            json_schema_extra=dict(TOOL_CHOICE),
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
