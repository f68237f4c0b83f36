"""What answers look like: OpenAI's objects, described for the OpenAPI document. Fields of vLLM's
are there only where they were asked for."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class ApiObject(BaseModel):
    """An object of OpenAI's API, as it is described."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(ApiObject):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(ApiObject):
    error: ErrorDetail


class PromptDetails(ApiObject):
    cached_tokens: int


class Usage(ApiObject):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Alternative(ApiObject):
    """A token with its natural log-probability, before temperature and filters."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenToken(Alternative):
    top_logprobs: list[Alternative]


class ChatLogprobs(ApiObject):
    content: list[ChosenToken]
    refusal: None = None


class CalledFunction(ApiObject):
    name: str
    arguments: str  # JSON


class ToolCall(ApiObject):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(ApiObject):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] = []


class ChatChoice(ApiObject):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    token_ids: list[int] = []
    prompt_token_ids: list[int] = []


class Headed(ApiObject):
    """What every answer says of itself, whole or streamed."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(Headed):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(ApiObject):
    tokens: list[str]
    token_logprobs: list[float | None]  # None for the first token of an echoed prompt
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(ApiObject):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]
    token_ids: list[int] = []
    prompt_token_ids: list[int] = []


class TextCompletion(Headed):
    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]
    usage: Usage


class Layout(ApiObject):
    """How a model is laid out over the stored weights."""

    positions: int
    blocks: int
    sliding_window: int | None
    context_length: int
    vocabulary_size: int
    layer_map: list[int] = []  # the block that runs at each position
    bits: int | None = None  # of a weight; null: not quantized


class DrawnBy(ApiObject):
    """What answers are drawn by where a request does not say."""

    max_tokens: int
    temperature: float
    top_p: float
    min_p: float


class ModelCard(ApiObject):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "mlx-cerebrum"
    context_length: int  # tokens of prompt and answer; vLLM's name for it is the next
    max_model_len: int
    cerebrum: Layout
    defaults: DrawnBy


class ModelList(ApiObject):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class LoadProgress(ApiObject):
    done: int  # bytes
    total: int


class ShelfModel(ApiObject):
    """A model on the shelf, and whether it is answered with."""

    id: str
    bytes: int  # of its files
    bits: int | None  # a weight; null: a GGUF file's own
    blocks: int | None
    positions: int | None
    plan: str | None  # a named plan, or "custom"; null: the blocks as they are stored
    window: int | None  # tokens
    state: Literal["loaded", "at rest", "loading", "on the shelf"]
    model: str | None  # what answers to it is called in /v1/models
    why_not: str | None  # it can't be loaded now
    loading: LoadProgress | None


class Memory(ApiObject):
    """Bytes."""

    held: int  # by MLX, weights and caches
    free: int  # for a further model, besides all that requests may need
    total: int  # of the machine


class ShelfList(ApiObject):
    models: list[ShelfModel]
    machine: str
    memory: Memory


class Health(ApiObject):
    status: Literal["ok"] = "ok"
