"""What answers look like: OpenAI's objects, as the OpenAPI document describes them."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Reply):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(Reply):
    error: ErrorDetail


class PromptDetails(Reply):
    cached_tokens: int


class Usage(Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Alternative(Reply):
    """A token with its natural log-probability, before temperature and filters."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenToken(Alternative):
    top_logprobs: list[Alternative]


class ChatLogprobs(Reply):
    content: list[ChosenToken]
    refusal: None = None


class Answer(Reply):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Reply):
    index: int
    message: Answer
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class Headed(Reply):
    """What every answer says of itself, whole or streamed."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(Headed):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(Reply):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(Reply):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class TextCompletion(Headed):
    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]
    usage: Usage


class Layout(Reply):
    """How a model is laid out over the stored weights."""

    positions: int
    blocks: int
    sliding_window: int | None
    context_length: int


class ModelCard(Reply):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "mlx-cerebrum"
    cerebrum: Layout


class ModelList(Reply):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(Reply):
    status: Literal["ok"] = "ok"


def streamed(kind: type[Reply]) -> dict[str, Any]:
    """The OpenAPI document's entry for an answer that may come in pieces instead."""
    stream = {"text/event-stream": {"schema": {"type": "string"}}}
    return {"model": kind, "description": "The answer, or its pieces as events", "content": stream}
