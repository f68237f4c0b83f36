"""/v1/responses: OpenAI's newer API, for one text or one call of a function; nothing is stored.

https://platform.openai.com/docs/api-reference/responses
"""

import secrets
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, FailFast, Field, model_validator
from pydantic_core import PydanticCustomError

from mlx_cerebrum.decoding.calls import CallText
from mlx_cerebrum.decoding.logprobs import TokenLogprob
from mlx_cerebrum.server.answers import ApiObject
from mlx_cerebrum.server.bodies import Open, neutral, taken, wrong
from mlx_cerebrum.server.jobs import Piece
from mlx_cerebrum.server.schema import Drawn
from mlx_cerebrum.server.shapes import (
    Choice,
    Head,
    HeldLogprobs,
    Json,
    call_id,
    chat_logprobs,
    event,
)
from mlx_cerebrum.server.spelling import Spelling
from mlx_cerebrum.server.talk import (
    MOST_TOOLS,
    Function,
    ResponseFormat,
    Schema,
    Talk,
    TextPart,
    Tool,
    or_null,
    or_text,
    text_or_parts,
)

LOGPROBS = "message.output_text.logprobs"


# ---- What a request may say


class InputItem(Open):
    """A turn; or a function that an assistant called, or what came of that; or earlier thinking."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Annotated[
        list[TextPart] | None,
        FailFast(),
        BeforeValidator(text_or_parts),
        Field(json_schema_extra=or_null),
    ] = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Annotated[
        list[TextPart] | None,
        FailFast(),
        BeforeValidator(text_or_parts),
        Field(json_schema_extra=or_null),
    ] = None
    id: Any = taken()
    status: Any = taken()
    summary: Any = taken("earlier thinking is not read again")
    encrypted_content: Any = taken("earlier thinking is not read again")

    @model_validator(mode="after")
    def _has_its_fields(self) -> "InputItem":
        needed = {
            "message": ("role", "content"),
            "function_call": ("call_id", "name", "arguments"),
            "function_call_output": ("call_id", "output"),
            "reasoning": (),
        }
        for name in needed[self.type]:
            if getattr(self, name) is None:
                raise PydanticCustomError("missing", "is required", {"param": name})
        return self

    @property
    def message(self) -> Json | None:
        """As the tokenizer takes it."""
        if self.type == "reasoning":
            return None
        if self.type == "function_call":
            function = {"name": self.name, "arguments": self.arguments}
            calls = [{"id": self.call_id, "type": "function", "function": function}]
            return {"role": "assistant", "content": "", "tool_calls": calls}
        if self.type == "function_call_output":
            text = "".join(part.said for part in self.output or ())
            return {"role": "tool", "tool_call_id": self.call_id, "content": text}
        return {"role": self.role, "content": "".join(part.said for part in self.content or ())}


def _items(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise PydanticCustomError("input_type", "must be text, or a list of items")
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class TextFormat(Open):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: Any = taken()
    schema_: Schema = Field(None, alias="schema")
    strict: Any = taken("answers always keep to their schema")

    @model_validator(mode="after")
    def _has_its_schema(self) -> "TextFormat":
        if self.type == "json_schema" and self.schema_ is None:
            raise PydanticCustomError("missing", "is required", {"param": "schema"})
        return self


class TextSettings(Open):
    format: TextFormat | None = None
    verbosity: Any = taken("the models have one way to write")


class ResponsesTool(Function):
    type: Literal["function"]


def _tool_choice(value: Any) -> Any:
    if value in (None, "none", "auto", "required"):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise PydanticCustomError(
            "tool_choice", 'must be none, auto, required or {"type": "function", "name": ...}'
        )
    return {"type": "function", "name": value["name"]}


class ResponsesRequest(Drawn):
    input: Annotated[
        list[InputItem],
        FailFast(),
        BeforeValidator(_items),
        Field(min_length=1, json_schema_extra=or_text),
    ]
    instructions: str | None = Field(None, description="A system message before the input")
    max_output_tokens: int | None = Field(
        None, ge=-1, lt=2**63, description="As max_tokens of the other endpoints"
    )
    text: TextSettings | None = Field(
        None, description="format: as response_format of the other endpoints"
    )
    tools: Annotated[
        list[ResponsesTool] | None,
        FailFast(),
        Field(max_length=MOST_TOOLS, description="As for chat"),
    ] = None
    tool_choice: Annotated[
        Any,
        BeforeValidator(_tool_choice),
        Field(
            description="As for chat",
            json_schema_extra={
                "anyOf": [
                    {"enum": ["none", "auto", "required", None]},
                    {
                        "type": "object",
                        "required": ["name"],
                        "properties": {"name": {"type": "string"}},
                    },
                ]
            },
        ),
    ] = None
    stream: bool | None = None
    include: list[str] | None = Field(
        None, description=f"{LOGPROBS}: log-probabilities; others have nothing to add"
    )
    top_logprobs: int | None = Field(None, ge=0, le=20)
    previous_response_id: Any = neutral()  # nothing is stored
    conversation: Any = neutral()
    prompt: Any = neutral()
    background: Any = neutral(False)
    stream_options: Any = taken()
    parallel_tool_calls: Any = taken("there is one call at most")
    max_tool_calls: Any = taken("there is one call at most")
    reasoning: Any = taken("the models have one way to think")
    truncation: Any = taken("what does not fit is refused")

    @model_validator(mode="after")
    def _agree(self) -> "ResponsesRequest":
        if self.max_output_tokens == 0:
            raise wrong("max_output_tokens", "0 asks for nothing")
        return self

    @property
    def most_tokens(self) -> int | None:
        return self.max_output_tokens

    @property
    def logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    @property
    def talk(self) -> Talk:
        tools = [{"type": "function", "function": tool} for tool in self.tools or ()]
        choice = self.tool_choice
        return Talk(
            self._messages,
            "input",
            tools=[Tool.model_validate(tool) for tool in tools],
            tool_place="tools[{}]",
            choice=choice["name"] if isinstance(choice, dict) else choice,
            format=("text.format", self._format),
            top_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )

    @property
    def _messages(self) -> list[Json]:
        first = [{"role": "system", "content": self.instructions}] if self.instructions else []
        return first + [item.message for item in self.input if item.message is not None]

    @property
    def _format(self) -> ResponseFormat | None:
        asked = self.text and self.text.format
        if not asked:
            return None
        return ResponseFormat(type=asked.type, schema=asked.schema_)


# ---- What an answer looks like


class InputDetails(ApiObject):
    cached_tokens: int
    cache_write_tokens: int  # what one pays for; here nothing


class OutputDetails(ApiObject):
    reasoning_tokens: int


class ResponseUsage(ApiObject):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class OutputText(ApiObject):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class OutputMessage(ApiObject):
    type: Literal["message"]
    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"]
    content: list[OutputText]


class OutputCall(ApiObject):
    type: Literal["function_call"]
    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    call_id: str
    name: str
    arguments: str


class ResponseObject(ApiObject):
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    model: str
    output: list[OutputMessage | OutputCall]
    usage: ResponseUsage | None
    error: Any
    incomplete_details: Any
    instructions: str | None
    max_output_tokens: int | None
    metadata: Any
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: Any
    store: bool
    temperature: float | None
    text: Any
    tool_choice: Any
    tools: list[Any]
    top_logprobs: int
    top_p: float | None
    truncation: str
    user: Any


class ResponsesShape:
    """Writes one choice down. calls: whether it is a call of a function."""

    def __init__(
        self,
        head: Head,
        spelling: Spelling,
        asked: ResponsesRequest,
        calls: bool,
    ) -> None:
        self._head, self._spelling, self._asked, self._calls = head, spelling, asked, calls
        self._item = f"{'fc' if calls else 'msg'}_{secrets.token_hex(12)}"
        self._call = call_id()
        self._called = CallText()
        self._choice = Choice(0)
        self._held = HeldLogprobs()
        self._number = 0  # of the next event
        self._begun = False  # whether its item has been told

    def whole(self, choices: Sequence[Choice], usage: Json) -> Json:
        (self._choice,) = choices
        if self._calls:
            self._choice.text = self._called.add(self._choice.text)
        return self._response(self._status, self._items, usage)

    def opening(self, choices: Iterable[int]) -> list[bytes]:
        begun = {"response": self._response("in_progress", [], None)}
        names = ("response.created", "response.in_progress")
        found = [self._event(name, begun) for name in names]
        return found if self._calls else found + self._begin()

    def pieces(self, index: int, piece: Piece) -> list[bytes]:
        settled = self._held.add(piece)
        self._choice.logprobs += settled
        self._choice.finish_reason = piece.finish_reason
        new = self._called.add(piece.text) if self._calls else piece.text
        self._choice.text += new
        found = self._begin() if self._called.name is not None else []
        if not new:
            return found
        if self._calls:
            delta = {"item_id": self._item, "output_index": 0, "delta": new}
            return [*found, self._event("response.function_call_arguments.delta", delta)]
        logprobs = self._logprobs(settled)
        delta = self._place | {"delta": new, "logprobs": logprobs}
        return [self._event("response.output_text.delta", delta)]

    def _begin(self) -> list[bytes]:
        """The answer's one item, once it is known what it is."""
        if self._begun:
            return []
        self._begun = True
        added = {"output_index": 0, "item": self._output("in_progress", empty=True)}
        found = [self._event("response.output_item.added", added)]
        if not self._calls:
            part = self._place | {"part": self._part("", [])}
            found.append(self._event("response.content_part.added", part))
        return found

    def ending(self, usage: Json) -> list[bytes]:
        text, status, items = self._choice.text, self._status, self._items
        whole = {"response": self._response(status, items, usage)}
        if not items:
            return [self._event(f"response.{status}", whole)]
        found, (item,) = self._begin(), items
        if self._calls:
            done = {"item_id": self._item, "output_index": 0}
            done |= {"name": item["name"], "arguments": text}
            found.append(self._event("response.function_call_arguments.done", done))
        else:
            (part,) = item["content"]
            said = self._place | {"text": text, "logprobs": part["logprobs"]}
            found.append(self._event("response.output_text.done", said))
            found.append(self._event("response.content_part.done", self._place | {"part": part}))
        found.append(self._event("response.output_item.done", {"output_index": 0, "item": item}))
        return [*found, self._event(f"response.{status}", whole)]

    def failing(self, error: Json) -> list[bytes]:
        asked = error["error"]["type"] == "invalid_request_error"
        code = "invalid_prompt" if asked else "server_error"  # of the few that its clients know
        told = {"code": code, "message": error["error"]["message"]}
        failed = self._response("failed", [], None) | {"error": told}
        return [self._event("response.failed", {"response": failed})]

    @property
    def _items(self) -> list[Json]:
        """None where a call was cut before it was known of what."""
        known = self._called.name is not None or not self._calls
        return [self._output(self._status)] if known else []

    @property
    def _status(self) -> str:
        return "completed" if self._choice.finish_reason == "stop" else "incomplete"

    @property
    def _place(self) -> Json:
        return {"item_id": self._item, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, value: Json) -> bytes:
        number, self._number = self._number, self._number + 1
        return event({"type": kind, "sequence_number": number, **value}, kind)

    def _logprobs(self, found: Iterable[TokenLogprob]) -> list[Json]:
        """As chat has them, but that `bytes` is a list always."""
        listed = chat_logprobs(self._spelling, found) if self._asked.logprobs else []
        for token in (token for one in listed for token in (one, *one["top_logprobs"])):
            token["bytes"] = token["bytes"] or []
        return listed

    def _part(self, text: str, logprobs: list[Json]) -> Json:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _output(self, status: str, empty: bool = False) -> Json:
        if self._calls:
            call = {"call_id": self._call, "name": self._called.name}
            call["arguments"] = "" if empty else self._choice.text
            return {"type": "function_call", "id": self._item, "status": status, **call}
        logprobs = self._logprobs(self._choice.logprobs)
        content = [] if empty else [self._part(self._choice.text, logprobs)]
        message = {"role": "assistant", "content": content}
        return {"type": "message", "id": self._item, "status": status, **message}

    def _response(self, status: str, output: list[Json], usage: Json | None) -> Json:
        asked, head = self._asked, self._head
        short = {"reason": "max_output_tokens"} if status == "incomplete" else None
        told_format: Json = {"type": "text"}
        if asked.text and asked.text.format:
            told_format = asked.text.format.model_dump(by_alias=True, exclude_none=True)
            if told_format["type"] == "json_schema":
                told_format.setdefault("name", "answer")  # OpenAI's clients need one
        return {
            "id": head.id,
            "object": "response",
            "created_at": head.created,
            "status": status,
            "model": head.model,
            "output": output,
            "usage": None if usage is None else _usage(usage),
            "error": None,
            "incomplete_details": short,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": asked.temperature,
            "text": {"format": told_format},
            "tool_choice": asked.tool_choice or "auto",
            "tools": [tool.model_dump(exclude_none=True) for tool in asked.tools or ()],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": asked.top_p,
            "truncation": "disabled",
            "user": asked.user,
        }


def _usage(usage: Json) -> Json:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
