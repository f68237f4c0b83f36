"""From a request's body to jobs for the engine: parsed, checked, tokenized."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

from mlx_cerebrum import __version__
from mlx_cerebrum.decoding.sampling import GREEDY, Sampling
from mlx_cerebrum.errors import CerebrumError, PlanError
from mlx_cerebrum.server.answers import Layout
from mlx_cerebrum.server.faults import ApiError
from mlx_cerebrum.server.jobs import Job
from mlx_cerebrum.server.schema import ChatRequest, CompletionRequest, Sampled, parse_body
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights import views

# Tokenizing holds Python's lock for seconds a megabyte, and every answer waits. So a long text is
# first counted slice by slice, and refused as soon as it is sure to be too long.
SLICE = 16_384  # characters
_CUT = 16  # tokens that a cut between two slices may add


@dataclass(frozen=True)
class Defaults:
    """What a request that does not say gets."""

    max_tokens: int = 1024
    sampling: Sampling = GREEDY


class Intake:
    """Makes bodies into jobs. Its methods are slow for long prompts: not for the event loop.

    layouts: of every model by name, the one to use by default first.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        layouts: Mapping[str, Layout],
        dtype: str,
        defaults: Defaults,
    ) -> None:
        self.layouts = layouts
        self._tokenizer, self._defaults = tokenizer, defaults
        self.fingerprints = {
            name: "fp_" + sha256(f"{__version__} {name} {dtype} {layout}".encode()).hexdigest()[:12]
            for name, layout in layouts.items()
        }

    def find(self, asked: str | None) -> str:
        """The name of the model that is meant. Raises ApiError (404)."""
        if asked is None:
            return next(iter(self.layouts))
        try:
            return views.find(self.layouts, asked[:200])
        except PlanError as error:
            raise ApiError(404, str(error), code="model_not_found", param="model") from None

    def chat(self, body: bytes, owner: str) -> tuple[ChatRequest, list[Job]]:
        request = parse_body(ChatRequest, body)
        model = self.find(request.model)
        messages = [
            {
                "role": "system" if message.role == "developer" else message.role,
                "content": message.text,
            }
            for message in request.messages
        ]
        self._check_length("\n".join(turn["content"] for turn in messages), model, "messages")
        try:
            ids = self._tokenizer.apply_chat_template(messages)
        except CerebrumError as error:
            raise ApiError(400, str(error), code="invalid_value", param="messages") from None
        stop = (*(request.stop or ()), *self._tokenizer.stop_strings)
        top = (request.top_logprobs or 0) if request.logprobs else None
        return request, [self._job(request, model, ids, "messages", stop, top, owner)]

    def completion(self, body: bytes, owner: str) -> tuple[CompletionRequest, list[Job]]:
        request = parse_body(CompletionRequest, body)
        model = self.find(request.model)
        stop = tuple(request.stop or ())
        jobs = []
        for prompt in request.prompt:
            if isinstance(prompt, str):
                self._check_length(prompt, model, "prompt")
            ids = self._ids(prompt)
            job = self._job(request, model, ids, "prompt", stop, request.logprobs, owner)
            jobs.append(replace(job, echo=bool(request.echo)))
        return request, jobs

    def _ids(self, prompt: str | list[int]) -> list[int]:
        try:
            if isinstance(prompt, str):
                return self._tokenizer.encode(prompt)
            detokenizer = self._tokenizer.detokenizer()
            for token in set(prompt):
                detokenizer.add(token)  # raises for what is not an id
            return prompt
        except CerebrumError as error:
            raise ApiError(400, str(error), code="invalid_value", param="prompt") from None

    def _job(
        self,
        request: Sampled,
        model: str,
        ids: Sequence[int],
        param: str,
        stop: tuple[str, ...],
        top_logprobs: int | None,
        owner: str,
    ) -> Job:
        most = self._room(model, len(ids), request.most_tokens, param)
        if (request.min_tokens or 0) > most:
            message = f"min_tokens: there can be {most} tokens at most"
            raise ApiError(400, message, code="invalid_value", param="min_tokens")
        return Job(
            model=model,
            prompt=tuple(ids),
            max_tokens=most,
            sampling=sampling(request, self._defaults.sampling),
            n=request.n or 1,
            stop=stop,
            top_logprobs=top_logprobs,
            owner=owner,
        )

    def _check_length(self, text: str, model: str, param: str) -> None:
        """Raise ApiError for a text that is sure to be more than the model's positions."""
        context, least = self.layouts[model].context_length, 0
        for start in range(0, len(text), SLICE) if len(text) > SLICE else ():
            part = self._tokenizer.encode(text[start : start + SLICE], add_bos=False)
            least += max(0, len(part) - _CUT)
            if least > context:
                message = f"{model} has {context} positions; this is more than {least} tokens"
                raise ApiError(400, message, code="context_length_exceeded", param=param)

    def _room(self, model: str, prompt: int, asked: int | None, param: str) -> int:
        """Tokens to generate at most. Raises ApiError for more than the model's positions."""
        if prompt == 0:
            message = f"{param}: there is nothing to continue"
            raise ApiError(400, message, code="invalid_value", param=param)
        context = self.layouts[model].context_length
        most = min(self._defaults.max_tokens, context - prompt) if asked is None else asked
        if most < (asked != 0) or prompt + most > context:
            asks = "" if asked is None else f" and {asked} to generate"
            message = f"{model} has {context} positions; this is {prompt} prompt tokens{asks}"
            raise ApiError(400, message, code="context_length_exceeded", param=param)
        return most


def sampling(request: Sampled, defaults: Sampling) -> Sampling:
    """How a request says to choose tokens, and `defaults` what it does not say."""
    top_k, seed, biases = request.top_k, request.seed, request.logit_bias
    asked = {
        "temp": request.temperature,
        "top_p": request.top_p,
        "min_p": request.min_p,
        "seed": None if seed is None else seed % 2**64,
        "top_k": None if top_k is None else max(top_k, 0),
        "repetition_penalty": request.repetition_penalty,
        "repetition_context": request.repetition_context_size,
        "frequency_penalty": request.frequency_penalty,
        "presence_penalty": request.presence_penalty,
        "logit_bias": None if biases is None else tuple((int(t), b) for t, b in biases.items()),
        "min_tokens": request.min_tokens,
        "ignore_eos": request.ignore_eos,
    }
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    return replace(defaults, **given)
