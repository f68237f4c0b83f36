"""A job that is queued or runs: the text of each choice so far, and where its events go."""

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from mlx_cerebrum.decoding.logprobs import TokenLogprob
from mlx_cerebrum.decoding.sampling import Sampling
from mlx_cerebrum.decoding.text import AnswerText
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.server.jobs import Event, Job
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass
class Counts:
    """What has happened since the start; written by the engine's thread."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)


class Task:
    """A job in the engine. All but `cancel` is for the engine's thread only."""

    def __init__(
        self,
        job: Job,
        tokenizer: Tokenizer,
        deliver: Callable[[Event], None],
        forget: Callable[["Task"], None],
    ) -> None:
        self._tokenizer = tokenizer
        self.asked = time.monotonic()
        self.job, self.texts = job, self._texts(job)
        self.end_ids = tokenizer.eos_token_ids
        self.scores: Sequence[TokenLogprob] = ()  # of the prompt, once it has been read
        self.reasons: list[str] = []  # of the choices that are over
        self.cached_tokens = 0
        self.mark_bytes = 0  # that places to go back to may take
        self.cancelled = False
        self.overflows = False  # the batch had no place for it when it came
        self._deliver = deliver
        self._forget = forget

    def shorten(self, most: int) -> None:
        """Let the answer have so many tokens at most. Before it is started."""
        self.job = replace(self.job, max_tokens=most)
        self.texts = self._texts(self.job)

    def _texts(self, job: Job) -> list[AnswerText]:
        before = job.prompt if job.echo or job.continues else ()
        return [AnswerText(self._tokenizer, job.max_tokens, job.stop, before) for _ in range(job.n)]

    @property
    def finish_reason(self) -> str | None:
        """How the job ended, once all its choices have."""
        if len(self.reasons) < self.job.n:
            return None
        return "length" if "length" in self.reasons else "stop"

    def cancel(self) -> None:
        """Free its place within a token; no more events are handed over. From any thread."""
        self.cancelled = True
        self._forget(self)

    def deliver(self, event: Event) -> None:
        """Hand an event over. Where that raises, the receiver has gone away."""
        if self.cancelled:
            return
        try:
            self._deliver(event)
        except Exception:
            log.exception("an event could not be delivered; its job is dropped")
            self.cancelled = True

    def sampling(self, choice: int) -> Sampling:
        """How this choice is drawn."""
        sampling = self.job.sampling
        return replace(sampling, seed=choice_seed(sampling, choice))


def choice_seed(sampling: Sampling, choice: int) -> int | None:
    """The request's own seed for choice 0; for the others one made from it and their number."""
    if sampling.seed is None or choice == 0:
        return sampling.seed
    digest = hashlib.sha256(f"{sampling.seed}:{choice}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def said(error: Exception) -> str:
    """An error in one line that shows nothing of the machine; the log has the rest."""
    if isinstance(error, RequestError):  # it names what was asked, and nothing else
        return str(error)
    text = str(error).lower()
    if isinstance(error, MemoryError) or "alloc" in text or "memory" in text:
        return "the device ran out of memory; ask for fewer tokens, or try again later"
    return f"generating failed ({type(error).__name__}); the server's log says more"
