"""From a request's body to jobs for the engine: parsed, checked, tokenized."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, Generic, Literal, TypeVar

from mlx_cerebrum import __version__
from mlx_cerebrum.decoding.constraint import Grammar, Grammars
from mlx_cerebrum.decoding.grammar_text import Ask
from mlx_cerebrum.decoding.sampling import GREEDY, Sampling
from mlx_cerebrum.errors import CerebrumError, PlanError, RequestError
from mlx_cerebrum.server.answers import Layout
from mlx_cerebrum.server.bodies import Asked, parse_body
from mlx_cerebrum.server.faults import ApiError
from mlx_cerebrum.server.held_to import call_note, held_to
from mlx_cerebrum.server.ignored import listed
from mlx_cerebrum.server.jobs import Job
from mlx_cerebrum.server.responses import ResponsesRequest
from mlx_cerebrum.server.schema import LLAMA_CPP_REPEATS, ChatRequest, CompletionRequest, Drawn
from mlx_cerebrum.server.spelling import Spelling
from mlx_cerebrum.server.talk import Talk, Tool, goes_on
from mlx_cerebrum.server.tokens import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights import views

# Tokenizing holds Python's lock for seconds a megabyte, and every answer waits. So a long text is
# first counted slice by slice, and refused as soon as it is sure to be too long.
SLICE = 16_384  # characters
_CUT = 16  # tokens that a cut between two slices may add
_LEAST_MASS = 1e-9  # of top_p: the likeliest token alone


Calls = Literal["stop", "tool_calls"] | None
Conversation = TypeVar("Conversation", bound=ChatRequest | ResponsesRequest)


@dataclass(frozen=True)
class Defaults:
    """What a request that does not say gets."""

    max_tokens: int = 1024
    sampling: Sampling = GREEDY


@dataclass(frozen=True)
class Accepted(Generic[Asked]):
    """A request, and what the engine is to do for it.

    ignored: names of what is not looked at, as the client is told them. calls: the finish reason of
    an answer that is a call of a function; None where it is text.
    """

    request: Asked
    jobs: list[Job]
    ignored: str = ""
    calls: Calls = None


@dataclass(frozen=True)
class Served:
    """A model, as far as requests are read for it."""

    layout: Layout
    fingerprint: str
    tokenizer: Tokenizer
    spelling: Spelling
    grammars: Grammars


class Intake:
    """Makes bodies into jobs. Its methods are slow for long prompts: not for the event loop.

    layouts: of every model by name, the one to use by default first.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        spelling: Spelling,
        layouts: Mapping[str, Layout],
        dtype: str,
        defaults: Defaults,
    ) -> None:
        self._defaults = defaults
        self.also: Callable[[str], str | None] = lambda _: None  # what else a name may mean
        self.models: Mapping[str, Served] = {}  # never changed, but replaced
        self.add(tokenizer, spelling, layouts, dtype)

    def add(
        self, tokenizer: Tokenizer, spelling: Spelling, layouts: Mapping[str, Layout], dtype: str
    ) -> None:
        """Take requests for these too: models of the same weights."""
        size = next(iter(layouts.values())).vocabulary_size
        grammars, models = Grammars(tokenizer, size), dict(self.models)
        for name, layout in layouts.items():
            print_ = sha256(f"{__version__} {name} {dtype} {layout}".encode()).hexdigest()[:12]
            models[name] = Served(layout, f"fp_{print_}", tokenizer, spelling, grammars)
        self.models = models

    def find(self, asked: str | None) -> str:
        """The name of the model that is meant. Raises ApiError (404)."""
        if not asked:
            return next(iter(self.models))
        try:
            return views.find(self.models, asked[:200])
        except PlanError as error:
            if (meant := self.also(asked[:200])) is not None:
                return meant
            raise ApiError(404, str(error), code="model_not_found", param="model") from None

    def talk(self, kind: type[Conversation], body: bytes, owner: str) -> Accepted[Conversation]:
        """A conversation to be answered."""
        request = parse_body(kind, body)
        model, talk = self.find(request.model), request.talk
        tokenizer = self.models[model].tokenizer
        knows_tools, to_call = tokenizer.template_takes_tools, self._to_call(talk)
        messages = talk.messages
        if to_call and not knows_tools:
            messages = [*messages, {"role": "user", "content": call_note(to_call.values())}]
        tools = [tool.plain for tool in talk.tools] if knows_tools and talk.tools else None
        ids = self._rendered(messages, model, talk.param, talk.prompted, talk.continued, tools)
        held = held_to(request, talk.format, to_call)
        grammar = self._grammar(model, held)
        # A checkpoint's own stop strings end a turn; in a JSON text they may mean themselves.
        own = tokenizer.stop_strings if grammar is None else ()
        stop = (*(request.stop or ()), *own)
        job = self._job(request, model, ids, talk.param, stop, talk.top_logprobs, owner, grammar)
        job = replace(job, continues=talk.continued)
        ignored = set(request.unknown())
        if talk.tools and tools is None and not to_call:
            ignored.add("tools")
        named = talk.choice != "required"
        calls: Calls = None if not to_call else "stop" if named else "tool_calls"
        return Accepted(request, [job], listed(ignored), calls)

    def _to_call(self, talk: Talk) -> Mapping[str, Tool]:
        """The functions of which one must be called. Raises ApiError where there is none."""
        to_call = talk.to_call
        if not to_call and talk.choice not in (None, "none", "auto"):
            message = "tool_choice: there is no such function among tools"
            raise ApiError(400, message, code="invalid_value", param="tool_choice")
        if to_call and talk.continued:
            message = "tool_choice: a call can't go on from an assistant's message"
            raise ApiError(400, message, code="unsupported_value", param="tool_choice")
        return to_call

    def _grammar(self, model: str, held: Ask | None) -> Grammar | None:
        try:
            return None if held is None else self.models[model].grammars.compile(held)
        except RequestError as error:
            param = held.where if held else None
            raise ApiError(400, str(error), code="invalid_value", param=param) from None

    def completion(self, body: bytes, owner: str) -> Accepted[CompletionRequest]:
        request = parse_body(CompletionRequest, body)
        model = self.find(request.model)
        stop = tuple(request.stop or ())
        held = held_to(request, ("response_format", request.response_format), {})
        grammar = self._grammar(model, held)
        jobs = []
        for prompt in request.prompt:
            if isinstance(prompt, str):
                self._check_length(prompt, model, "prompt")
            ids = self._ids(model, prompt)
            top = request.logprobs
            job = self._job(request, model, ids, "prompt", stop, top, owner, grammar)
            jobs.append(replace(job, echo=bool(request.echo)))
        return Accepted(request, jobs, listed(set(request.unknown())))

    def tokenize(self, body: bytes) -> tuple[Tokenized, str]:
        """What a text is in ids; and the names of what is not looked at."""
        request = parse_body(TokenizeRequest, body)
        model = self.find(request.model)
        tokenizer, spelling = self.models[model].tokenizer, self.models[model].spelling
        text = request.prompt if request.content is None else request.content
        param = "messages" if text is None else "prompt" if request.content is None else "content"
        if text is None:
            turns, prompted = [turn.plain for turn in request.messages], request.prompted
            found = self._rendered(turns, model, param, prompted, goes_on(request))
        else:
            self._check_length(text, model, param)
            try:
                found = tokenizer.encode(text, add_bos=tokenizer.add_bos and request.special)
            except CerebrumError as error:
                raise ApiError(400, str(error), code="invalid_value", param=param) from None
        names = [spelling(token)[0] for token in found] if request.return_token_strs else None
        context = self.models[model].layout.context_length
        told = Tokenized(count=len(found), max_model_len=context, tokens=found, token_strs=names)
        return told, listed(set(request.unknown()))

    def detokenize(self, body: bytes) -> tuple[Detokenized, str]:
        """The text of ids; and the names of what is not looked at."""
        request = parse_body(DetokenizeRequest, body)
        model = self.find(request.model)
        try:
            text = self.models[model].tokenizer.decode(request.tokens)
        except CerebrumError as error:
            raise ApiError(400, str(error), code="invalid_value", param="tokens") from None
        return Detokenized(prompt=text, content=text), listed(set(request.unknown()))

    def _rendered(
        self,
        messages: Sequence[dict[str, Any]],
        model: str,
        param: str,
        prompted: bool,
        continued: bool,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> list[int]:
        """A conversation's ids."""
        tokenizer = self.models[model].tokenizer
        try:
            segments = tokenizer.render(messages, prompted, continued, tools)
            text = "".join(part for part in segments if isinstance(part, str))
            self._check_length(text, model, param)
            return tokenizer.encode_segments(segments)
        except CerebrumError as error:
            raise ApiError(400, str(error), code="invalid_value", param=param) from None

    def _ids(self, model: str, prompt: str | list[int]) -> list[int]:
        tokenizer = self.models[model].tokenizer
        try:
            if isinstance(prompt, str):
                return tokenizer.encode(prompt)
            detokenizer = tokenizer.detokenizer()
            for token in set(prompt):
                detokenizer.add(token)  # raises for what is not an id
            return prompt
        except CerebrumError as error:
            raise ApiError(400, str(error), code="invalid_value", param="prompt") from None

    def _job(
        self,
        request: Drawn,
        model: str,
        ids: Sequence[int],
        param: str,
        stop: tuple[str, ...],
        top_logprobs: int | None,
        owner: str,
        grammar: Grammar | None,
    ) -> Job:
        most = self._room(model, len(ids), request.most_tokens, param)
        if (request.min_tokens or 0) > most:
            message = f"min_tokens: there can be {most} tokens at most"
            raise ApiError(400, message, code="invalid_value", param="min_tokens")
        chosen = sampling(request, self._defaults.sampling)
        try:
            chosen.check_vocabulary(self.models[model].layout.vocabulary_size)
        except RequestError as error:
            raise ApiError(400, str(error), code="invalid_value", param="logit_bias") from None
        if grammar is not None:  # which says where the answer ends, and not the command line
            chosen = replace(chosen, min_tokens=0, ignore_eos=False)
        return Job(
            model=model,
            prompt=tuple(ids),
            max_tokens=most,
            sampling=chosen,
            n=request.choices,
            stop=stop,
            top_logprobs=top_logprobs,
            owner=owner,
            grammar=grammar,
            fewer=request.most_tokens != most,
        )

    def _check_length(self, text: str, model: str, param: str) -> None:
        """Raise ApiError for a text that is sure to be more than the model's positions."""
        served, least = self.models[model], 0
        context = served.layout.context_length
        for start in range(0, len(text), SLICE) if len(text) > SLICE else ():
            part = served.tokenizer.encode(text[start : start + SLICE], add_bos=False)
            least += max(0, len(part) - _CUT)
            if least > context:
                message = f"{model} has {context} positions; this is more than {least} tokens"
                raise ApiError(400, message, code="context_length_exceeded", param=param)

    def _room(self, model: str, prompt: int, asked: int | None, param: str) -> int:
        """Tokens to generate at most: what was asked for, as far as the model's positions go.
        Raises ApiError for a prompt that leaves none."""
        if prompt == 0:
            message = f"{param}: there is nothing to continue"
            raise ApiError(400, message, code="invalid_value", param=param)
        context = self.models[model].layout.context_length
        if context - prompt < (asked != 0):
            message = f"{model} has {context} positions; this is {prompt} prompt tokens"
            raise ApiError(400, message, code="context_length_exceeded", param=param)
        asked = self._defaults.max_tokens if asked is None else asked
        return context - prompt if asked < 0 else min(asked, context - prompt)


def sampling(request: Drawn, defaults: Sampling) -> Sampling:
    """How a request says to choose tokens, and `defaults` what it does not say."""
    top_k, seed, biases = request.top_k, request.seed, request.logit_bias
    if seed == -1:
        defaults, seed = replace(defaults, seed=None), None
    asked = {
        "temp": request.temperature,
        "top_p": None if request.top_p is None else request.top_p or _LEAST_MASS,
        "min_p": request.min_p,
        "seed": None if seed is None else seed % 2**64,
        "top_k": None if top_k is None else max(top_k, 0),
        **_repetition(request),
        "frequency_penalty": request.frequency_penalty,
        "presence_penalty": request.presence_penalty,
        "logit_bias": None if biases is None else tuple((int(t), b) for t, b in biases.items()),
        "min_tokens": request.min_tokens,
        "ignore_eos": request.ignore_eos,
    }
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    return replace(defaults, **given)


def _repetition(request: Drawn) -> dict[str, float | int | None]:
    """vLLM's and mlx-lm's spelling, then llama.cpp's: programs send several at once."""
    penalty, context = request.repetition_penalty, request.repetition_context_size
    context = request.repeat_last_n if context is None else context
    if penalty is None and request.repeat_penalty is not None:
        penalty = request.repeat_penalty
        context = LLAMA_CPP_REPEATS if context is None else context
    if context == 0:
        penalty, context = 1.0, None
    context = 2**31 - 1 if context == -1 else context
    return {"repetition_penalty": penalty, "repetition_context": context}
