"""/v1/tokenize and /v1/detokenize: what vLLM's and llama.cpp's servers call so, both at once."""

from typing import Annotated, Any

from pydantic import FailFast, Field, model_validator
from pydantic_core import PydanticCustomError

from mlx_cerebrum.server.answers import ApiObject
from mlx_cerebrum.server.bodies import Open, neutral
from mlx_cerebrum.server.talk import Message


class TokenizeRequest(Open):
    model: str | None = None
    prompt: str | None = Field(None, description="Text; as vLLM, with the beginning's token")
    content: str | None = Field(None, description="Text; as llama.cpp, without it")
    messages: Annotated[
        list[Message],
        FailFast(),
        Field(default_factory=list, description="A conversation, instead of a text"),
    ]
    add_special_tokens: bool | None = Field(None, description="Whether with the beginning's token")
    add_special: bool | None = Field(None, description="llama.cpp's name for it")
    add_generation_prompt: bool | None = Field(None, description="As for chat")
    continue_final_message: bool | None = Field(None, description="As for chat")
    return_token_strs: bool | None = Field(None, description="Tokens come back as texts too")
    with_pieces: Any = neutral(False)

    @model_validator(mode="after")
    def _one(self) -> "TokenizeRequest":
        given = [self.prompt is not None, self.content is not None, bool(self.messages)]
        if sum(given) != 1:
            message = "is needed, or content or messages, and only one of them"
            raise PydanticCustomError("one_of", "{m}", {"m": message, "param": "prompt"})
        if self.continue_final_message and (
            not self.messages or self.messages[-1].role != "assistant"
        ):
            message = "the last message is not an assistant's"
            context = {"m": message, "param": "continue_final_message"}
            raise PydanticCustomError("unsupported_value", "{m}", context)
        return self

    @property
    def prompted(self) -> bool:
        return self.add_generation_prompt is not False

    @property
    def special(self) -> bool:
        """Whether a text's ids begin with the beginning's token."""
        given = self.add_special if self.add_special_tokens is None else self.add_special_tokens
        return self.prompt is not None if given is None else given


class Tokenized(ApiObject):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(Open):
    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]


class Detokenized(ApiObject):
    prompt: str  # vLLM's name
    content: str  # llama.cpp's
