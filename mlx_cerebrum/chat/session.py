"""A conversation and the models that answer it. Knows no terminal."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from mlx_cerebrum.chat.kept import new_name
from mlx_cerebrum.decoding.decode import Sampler, greedy, prefill_step
from mlx_cerebrum.decoding.decoder import Decoder
from mlx_cerebrum.decoding.draft_models import stored_order
from mlx_cerebrum.decoding.prompt_cache import REWORD, PromptCache
from mlx_cerebrum.decoding.sampling import GREEDY, Sampling
from mlx_cerebrum.decoding.speculative import Speculation, speculation
from mlx_cerebrum.decoding.stream import Response, stream_generate
from mlx_cerebrum.decoding.text import AnswerText, StopText
from mlx_cerebrum.errors import MemoryBudgetError, RequestError
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.memory import Workload, available_bytes
from mlx_cerebrum.tokenizer.fitting import in_turns
from mlx_cerebrum.tokenizer.messages import Message
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer

Messages = list[Message]

CACHE_SHARE = 0.8  # of the memory that is free at the start: what all caches may come to hold


@dataclass(frozen=True)
class Drawn:
    """How an answer's tokens are chosen."""

    number: int  # of the answer, from 0
    asked: Sampling  # as the settings were
    sampling: Sampling  # with this answer's own temperature and seed
    sampler: Sampler

    def after(self, count: int) -> Sampler:
        """The same draws for an answer that goes on after `count` tokens."""
        own = self.sampler
        return own if own is greedy or not count else lambda logits, n: own(logits, n + count)


@dataclass
class Answer:
    """What a model said, as far as it got."""

    model: str = ""  # "": from a file
    text: str = ""
    reason: str = ""  # "stop", "length" or "interrupted"; "" while it comes, and from some files
    prompt: list[int] = field(default_factory=list)
    said: list[int] = field(default_factory=list)  # its tokens, after those of `begun`
    begun: str = ""  # what it had in the file that it comes from
    drawn: Drawn | None = None
    last: Response | None = None  # with the figures so far

    @property
    def greedy(self) -> bool:
        return self.drawn is not None and self.drawn.sampling.temp == 0

    @property
    def pace(self) -> float:
        """Tokens a second after the first."""
        return self.last.generation_tps if self.last else 0.0

    @property
    def tokens(self) -> int:
        """Of the prompt and the answer."""
        return self.last.prompt_tokens + self.last.generation_tokens if self.last else 0


class _StoppedError(Exception):
    """Raised between two chunks of a prompt."""


class AnswerStream(Iterator[str]):
    """An answer on its way: its text, piece by piece, which it adds to `answer`.

    It asks `stopped` before every token and after every chunk of the prompt. Once that says yes,
    the answer ends there: `answer` and the model's caches keep what was yielded.
    It tells `progress` how many of the prompt's tokens have been computed, and how many there are.
    """

    def __init__(
        self,
        answer: Answer,
        start: Callable[[Callable[[int, int], None]], Generator[Response, None, None]],
        make_room: Callable[[], bool],
    ) -> None:
        self.answer = answer
        self.stopped: Callable[[], bool] = lambda: False
        self.came: Callable[[], None] = lambda: None  # called after each piece
        self.progress: Callable[[int, int], None] = lambda done, total: None
        self._start = start
        self._make_room = make_room
        self._responses: Generator[Response, None, None] | None = None

    def __next__(self) -> str:
        if self.answer.reason:
            raise StopIteration
        if self.stopped():
            self.close()
            raise StopIteration
        try:
            response = self._first() if self._responses is None else next(self._responses)
        except _StoppedError:
            self.close()
            raise StopIteration from None
        self.answer.last = response
        self.answer.said.append(response.token)
        self.answer.text += response.text
        if response.finish_reason is not None:
            self.answer.reason = response.finish_reason
            self._end()
        else:
            self.came()
        return response.text

    def _first(self) -> Response:
        try:
            self._responses = self._start(self._report)
            return next(self._responses)
        except MemoryBudgetError:
            if not self._make_room():
                raise
            self._responses = self._start(self._report)
            return next(self._responses)

    def _report(self, done: int, total: int) -> None:
        self.progress(done, total)
        if self.stopped():
            raise _StoppedError

    def close(self) -> None:
        """End the answer where it is."""
        self.answer.reason = self.answer.reason or "interrupted"
        self._end()

    def _end(self) -> None:
        if self._responses is not None:
            self._responses.close()  # the caches then hold what was yielded, no more


@dataclass(frozen=True)
class DecodingOptions:
    """How answers are computed, as the flags say. Raises RequestError for what is out of range."""

    max_tokens: int = 1024
    sampling: Sampling = GREEDY
    draft: str = "none"  # or "ngram", "auto"
    kv_bits: int | None = None
    prefill_step_size: int = field(default_factory=prefill_step)
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        StopText(self.stop)
        if self.max_tokens < 1:
            raise RequestError(f"max-tokens must be at least 1, not {self.max_tokens}")
        prefill_step(self.prefill_step_size)


@dataclass(frozen=True)
class Exchange:
    question: str
    answer: Answer
    replaced: "Exchange | None" = None  # by /retry, /edit or /compare


class Session:
    """One conversation over one or several models that share their weights.

    Each model has caches of its own, and computes only what is new to it. Answers are numbered from
    0, both answers of a comparison alike; answer n draws with `seed + n`. So no two questions are
    answered by the same draws, and the same flags and input give the same conversation again.
    """

    def __init__(
        self, models: Mapping[str, Model], tokenizer: Tokenizer, options: DecodingOptions
    ) -> None:
        self.models = dict(models)
        self.tokenizer = tokenizer
        self.options = options
        self.name = new_name()  # of the conversation
        self.current = next(iter(self.models))
        self.system: str | None = None
        self.exchanges: list[Exchange] = []
        self.unanswered: str | None = None  # asked last, without an answer yet
        self.last: Answer | None = None  # for the figures
        self._recent = list(self.models)  # the model last switched away from comes first
        self._caches: dict[str, PromptCache] = {}
        self._room = int(available_bytes() * CACHE_SHARE)
        self._answers = 0
        self._cleared: tuple[str, str | None, list[Exchange], str | None] | None = None
        self._window_said = False

    @property
    def model(self) -> Model:
        return self.models[self.current]

    @property
    def other(self) -> str | None:
        """What to compare the current model with."""
        return next((name for name in self._recent if name != self.current), None)

    @property
    def question(self) -> str | None:
        """The last one."""
        if self.unanswered is not None:
            return self.unanswered
        return self.exchanges[-1].question if self.exchanges else None

    @property
    def before(self) -> int:
        """How many exchanges come before the last question."""
        return len(self.exchanges) - (self.unanswered is None and bool(self.exchanges))

    @property
    def tokens(self) -> int:
        """Of the whole conversation, as the template writes it."""
        if self.question is None:
            return 0
        return len(self.tokenizer.apply_chat_template(self.messages(), add_generation_prompt=False))

    def switch(self, name: str) -> None:
        """Go on with another model."""
        if name != self.current:
            self._recent.remove(self.current)
            self._recent.insert(0, self.current)
            self.current = name

    def set_system(self, text: str | None) -> None:
        """Another system text; None: the template's own. Raises where the template refuses it."""
        before, self.system = self.system, text
        try:
            self.prompt("?")
        except Exception:
            self.system = before
            raise

    def cache(self, name: str) -> PromptCache:
        """A model's caches, made when they are first asked for."""
        if name not in self._caches:
            most = self._most_bytes(self.models[name])
            self._caches[name] = PromptCache(self.models[name], self.options.kv_bits, most)
        return self._caches[name]

    def _most_bytes(self, model: Model) -> int | None:
        """Bytes that a model's caches may hold. None: no bound is needed.

        With a window they also keep marks, places to go back to, which become more from turn to
        turn. The check of a request's memory does not count them. So each model has a share of the
        free memory, and a bound where the marks could come to need more than that.
        """
        config, bits = model.config, self.options.kv_bits
        if config.sliding_window is None:
            return None
        positions = sum(other.config.num_positions for other in self.models.values())
        share = self._room * config.num_positions // positions
        window, step = config.sliding_window, self.options.prefill_step_size
        used = Workload(config, model.dtype.size, 2 * (window + step), 1, step, bits)
        whole = replace(config, sliding_window=None)
        marks = replace(used, config=whole, prompt=2 * window + REWORD)
        return None if used.cache_bytes + marks.cache_bytes <= share else share

    def forget_caches(self) -> None:
        """Compute everything anew with the next question."""
        self._caches.clear()

    def cached(self, name: str) -> tuple[int, int]:
        """Tokens and bytes in a model's caches."""
        cache = self._caches.get(name)
        return (len(cache.tokens), cache.nbytes) if cache else (0, 0)

    def messages(self, question: str | None = None, before: int | None = None) -> Messages:
        """The conversation, or its first `before` exchanges with `question` after them."""
        found: Messages = []
        if self.system is not None:
            found.append({"role": "system", "content": self.system})
        for exchange in self.exchanges[:before]:
            found.append({"role": "user", "content": exchange.question})
            found.append(_said(exchange.answer.text))
        question = self.unanswered if question is None and before is None else question
        if question is not None:
            found.append({"role": "user", "content": question})
        return found

    def prompt(self, question: str, before: int | None = None) -> list[int]:
        """Ids of the question after the first `before` exchanges (all of them by default)."""
        before = len(self.exchanges) if before is None else before
        return self.tokenizer.apply_chat_template(self.messages(question, before))

    def ask(
        self,
        question: str,
        names: Sequence[str] | None = None,
        before: int | None = None,
        temp: float | None = None,
    ) -> list[AnswerStream]:
        """An answer by each model in `names`, by default the current one; nothing is computed yet.

        Until `keep`, the question has no answer, or still has the one before. Raises RequestError
        for a conversation that the template refuses or that is longer than the model's positions.
        The streams raise MemoryBudgetError where their caches can't fit.
        """
        names = [self.current] if names is None else names
        before = len(self.exchanges) if before is None else before
        if before == len(self.exchanges):
            self.unanswered = question  # /retry and /edit find it, whatever comes
        ids = self.prompt(question, before)
        decoder = Decoder(self.options.prefill_step_size)
        answers = [Answer(name, prompt=ids, drawn=self._draws(temp)) for name in names]
        return [self._answer(answer, names, decoder) for answer in answers]

    def _answer(self, answer: Answer, names: Sequence[str], decoder: Decoder) -> AnswerStream:
        name, options, ids = answer.model, self.options, [*answer.prompt, *answer.said]
        model = self.models[name]
        positions = model.config.max_position_embeddings
        if len(ids) >= positions:
            raise RequestError(
                f"the conversation ({len(ids)} tokens) no longer fits the model's {positions}"
                " positions: /undo takes back an exchange, /save FILE keeps all, /clear begins anew"
            )
        drawn, count = cast(Drawn, answer.drawn), len(answer.said)
        rules = replace(drawn.sampling, min_tokens=max(0, drawn.sampling.min_tokens - count))

        def start(progress: Callable[[int, int], None]) -> Generator[Response, None, None]:
            self._answers = max(self._answers, drawn.number + 1)
            return stream_generate(
                model,
                self.tokenizer,
                ids,
                max_tokens=min(options.max_tokens, positions - len(ids)),
                sampler=drawn.after(count),
                adjust=rules.adjust(answer.prompt, self.tokenizer.eos_token_ids),
                stop=self._stop,
                speculation=self._speculation(model),
                prompt_cache=self.cache(name),
                prefill_step_size=options.prefill_step_size,
                progress=progress,
                decoder=decoder,
                joined=answer.begun != "",
                begun=count,
            )

        def make_room() -> bool:
            spare = [other for other in self._caches if other not in names]
            for other in spare:  # only time is lost: what they held is computed again
                del self._caches[other]
            return bool(spare)

        return AnswerStream(answer, start, make_room)

    @property
    def _stop(self) -> list[str]:
        return [*self.options.stop, *self.tokenizer.stop_strings]

    def _draws(self, temp: float | None) -> Drawn:
        """Each answer draws with a seed of its own, from that of the settings."""
        asked = self.options.sampling
        seed = None if asked.seed is None else (asked.seed + self._answers) % 2**64
        sampling = replace(asked, temp=asked.temp if temp is None else temp, seed=seed)
        return Drawn(self._answers, asked, sampling, sampling.sampler())

    def go_on(self) -> AnswerStream:
        """The last answer from where it was cut, as if it had not been; `keep` puts it in place.

        It draws as before unless the settings have been changed. Raises RequestError where there
        is no such answer, or no room.
        """
        if self.unanswered is not None or not self.exchanges:
            raise RequestError("there is no answer to go on with; /retry asks the last question")
        before, last = len(self.exchanges) - 1, self.exchanges[-1]
        cut = last.answer
        if cut.reason == "stop":
            raise RequestError("the answer is complete: ask on, or /retry 0.7 for another one")
        begun = cut.text if cut.drawn is None else cut.begun
        if begun:
            talk = [*self.messages(last.question, before), _said(begun)]
            prompt = self.tokenizer.apply_chat_template(talk, continue_final_message=True)
        else:
            prompt = self.prompt(last.question, before)
        drawn = cut.drawn
        if drawn is None or drawn.asked != self.options.sampling:
            drawn = self._draws(None)
        text = AnswerText(self.tokenizer, len(cut.said) + 1, self._stop, prompt if begun else ())
        whole = begun + "".join(text.add(token)[0] for token in cut.said)
        answer = Answer(
            self.current, whole, "", prompt, said=list(cut.said), begun=begun, drawn=drawn
        )
        decoder = Decoder(self.options.prefill_step_size)
        return self._answer(answer, [self.current], decoder)

    def _speculation(self, model: Model) -> Speculation | None:
        if self.options.draft == "none":
            return None
        shorter = stored_order(model) if self.options.draft == "auto" else None
        return speculation(model, [] if shorter is None else [shorter])

    def keep(self, question: str, answer: Answer, before: int | None = None) -> None:
        """Keep an answer, in place of what came after the first `before` exchanges."""
        before = len(self.exchanges) if before is None else before
        for exchange in self.exchanges[max(0, before - 1) :]:
            exchange.answer.prompt = []  # all prompts of a long chat would be its length squared
        replaced = self.exchanges[before] if before < len(self.exchanges) else None
        self.exchanges[before:] = [Exchange(question, answer, replaced)]
        self.unanswered = None
        self.last = answer

    def repeats(self, question: str, before: int) -> bool:
        """Whether asking again can only give the answer that is there."""
        if self.options.sampling.temp or before >= len(self.exchanges):
            return False
        answer = self.exchanges[before].answer
        same = answer.greedy and answer.model == self.current and answer.reason != "interrupted"
        return same and answer.prompt == self.prompt(question, before)

    def passes_window(self) -> bool:
        """Whether the conversation is longer than the window; says so only the first time."""
        window = self.model.config.sliding_window
        passed = window is not None and self.last is not None and self.last.tokens > window
        first, self._window_said = passed and not self._window_said, passed or self._window_said
        return first

    def undo(self) -> str | None:
        """Take back the last question, what took its place, or `clear`.

        Returns the question that is dropped, None where there was none.
        """
        dropped = self.question
        if self.unanswered is not None:
            self.unanswered = None
        elif self.exchanges:
            last = self.exchanges.pop()
            self.exchanges += [] if last.replaced is None else [last.replaced]
        elif self._cleared is not None:
            self.name, self.system, self.exchanges, self.unanswered = self._cleared
            self._cleared = None
        return dropped

    @property
    def can_restore(self) -> bool:
        """Whether `undo` brings back what `clear` took."""
        return self._cleared is not None and self.question is None

    def clear(self) -> None:
        """Begin a new conversation under the same system text."""
        if self.question is not None:
            self._cleared = (self.name, self.system, self.exchanges, self.unanswered)
            self.name = new_name()
        self.exchanges, self.unanswered, self._window_said = [], None, False

    def replace(self, messages: Messages) -> None:
        """Take a conversation in place of this one, as questions and answers in turn.

        Raises RequestError where the template refuses it; then nothing is changed.
        """
        messages = in_turns(messages) if messages else []
        system = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
        turns = messages if system is None else messages[1:]
        texts = [message["content"] for message in turns]
        if messages:
            self.tokenizer.apply_chat_template(messages)
        self.name, self.system = new_name(), system
        self.exchanges = [
            Exchange(question, Answer(text=answer))
            for question, answer in zip(texts[::2], texts[1::2], strict=False)
        ]
        self.unanswered = texts[-1] if len(texts) % 2 else None
        self._window_said = False


def _said(text: str) -> Message:
    return {"role": "assistant", "content": text}
