"""An answer on its way, which can be stopped between any two tokens."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from time import perf_counter

from mlx_cerebrum.decoding.stream import Response
from mlx_cerebrum.errors import MemoryBudgetError


@dataclass
class Answer:
    """What a model said, as far as it got."""

    model: str = ""  # "": from a file
    text: str = ""
    reason: str = ""  # "stop", "length" or "interrupted"; "" while it comes
    prompt: list[int] = field(default_factory=list)
    greedy: bool = False
    last: Response | None = None
    seconds: float = 0.0  # spent on the tokens after the first, other answers' time left out

    @property
    def pace(self) -> float:
        """Tokens a second after the first."""
        count = self.last.generation_tokens - 1 if self.last else 0
        return count / self.seconds if count > 0 and self.seconds > 0 else 0.0

    @property
    def tokens(self) -> int:
        """Of the prompt and the answer."""
        return self.last.prompt_tokens + self.last.generation_tokens if self.last else 0


class _StoppedError(Exception):
    """Raised between two chunks of a prompt."""


class Reply(Iterator[str]):
    """An answer on its way: its text, piece by piece.

    `stopped` is asked before every token and after every chunk of the prompt. Once it says yes
    the answer ends there: what was yielded stays in `answer`, and in the model's caches.
    `progress` gets how many of the prompt's tokens have been computed, and how many are to be.
    """

    def __init__(
        self,
        answer: Answer,
        start: Callable[[Callable[[int, int], None]], Generator[Response, None, None]],
        make_room: Callable[[], bool],
    ) -> None:
        self.answer = answer
        self.stopped: Callable[[], bool] = lambda: False
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
        started = perf_counter()
        try:
            response = self._first() if self._responses is None else next(self._responses)
        except _StoppedError:
            self.close()
            raise StopIteration from None
        if self.answer.last is not None:
            self.answer.seconds += perf_counter() - started
        self.answer.last = response
        self.answer.text += response.text
        if response.finish_reason is not None:
            self.answer.reason = response.finish_reason
            self._end()
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
