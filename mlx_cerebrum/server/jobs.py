"""What the web side asks of the engine (jobs), and what comes back (events): plain data.

HTTP is not known here. The package's docstring tells a request's way.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from mlx_cerebrum.decoding.constraint import Grammar
from mlx_cerebrum.decoding.logprobs import TokenLogprob
from mlx_cerebrum.decoding.sampling import GREEDY, Sampling
from mlx_cerebrum.errors import CerebrumError

NO_TOKEN = -1


class BusyError(CerebrumError):
    """The queue is full; try again later."""


class ClosedError(CerebrumError):
    """The engine takes no more jobs: it is shutting down, or has stopped on an error."""


@dataclass(frozen=True)
class Job:
    """A prompt that one model is to answer with `n` choices."""

    model: str  # a view's name
    prompt: tuple[int, ...]
    max_tokens: int  # 0 only with `echo`
    sampling: Sampling = GREEDY  # choice i draws with a seed made from this one's and i
    n: int = 1
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None  # alternatives a token; None: no log-probabilities at all
    owner: str = ""  # whose prompts: caches are never shared between owners
    echo: bool = False  # text and log-probabilities are to follow those of the prompt
    continues: bool = False  # its text goes on right where the prompt's ends
    grammar: Grammar | None = None  # that every choice keeps to
    fewer: bool = False  # where there is no memory for `max_tokens`, fewer will do

    @property
    def scored(self) -> int | None:
        """Alternatives to each of the prompt's tokens; None: they get no log-probabilities."""
        return self.top_logprobs if self.echo else None


@dataclass(frozen=True)
class Reading:
    """So many of the prompt's tokens have been computed (cached ones count)."""

    done: int
    total: int


@dataclass(frozen=True)
class Loading:
    """The model is on its way: bytes that are ready, and bytes in all."""

    done: int
    total: int


@dataclass(frozen=True)
class Piece:
    """A generated token of one choice, and the text that is final now that it is known."""

    choice: int
    token: int  # NO_TOKEN where none was to be generated
    text: str
    finish_reason: str | None  # "stop" or "length" on a choice's last
    cached_tokens: int  # of the prompt, that were kept of earlier ones
    logprob: TokenLogprob | None = None  # None for a token that ends it unshown
    # On a choice's first, where they were asked for: of the prompt's tokens from the second on.
    scores: Sequence[TokenLogprob] = ()


@dataclass(frozen=True)
class Failed:
    """The job is over without an answer; `message` is one line without paths."""

    message: str
    asked: bool = False  # for what was asked: the same again would fail too
    unavailable: bool = False  # the model can't be had now


Event = Loading | Reading | Piece | Failed


@dataclass(frozen=True)
class Stats:
    """What /metrics says, counted since the start."""

    queued: int  # jobs waiting now
    active: int  # sequences in batches now
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    finished: Mapping[str, int]  # jobs by how they ended: stop, length, cancelled, failed
    cache_bytes: int  # of prompts that are kept
    kv_bytes: int  # of the batches
    weights_bytes: int = 0
    loaded: int = 0  # checkpoints now
    at_rest: int = 0  # checkpoints now
    loads: int = 0  # checkpoints loaded since the start
    rests: int = 0  # checkpoints put to rest since the start
    short_of_memory: bool = False  # the machine
    reliefs: int = 0  # times that kept prompts were given up for it


class Engine(Protocol):
    """One thread that owns the models. Every method may be called from any thread."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def submit(
        self, job: Job, deliver: Callable[[Event], None], *, follows: bool = False
    ) -> Callable[[], None]:
        """Queue a job. `deliver` gets its events in order, on the engine's thread: it must not
        block. The last is each choice's Piece with a finish reason, or one Failed.

        Returns what cancels the job: its place is free within a token, and nothing more is
        delivered. It may be called from any thread at any time.

        Raises RequestError for a job that can never run, BusyError where the queue is full and
        the job `follows` none of the same request, ClosedError where no more jobs are taken.
        """

    @property
    def closed(self) -> bool:
        """Whether `submit` would raise ClosedError."""

    def stats(self) -> Stats: ...

    def close(self, grace: float) -> None:
        """Take no more jobs, let running ones go on for `grace` seconds, then fail the rest."""
