"""An answer's text as its tokens come, and when it ends."""

from collections.abc import Sequence

from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer


class StopText:
    """Finds stop strings in a stream, holding back any tail that could still become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        if "" in stop:
            raise RequestError("a stop string is empty; it would stop everything")
        self.stop = tuple(stop)
        self.held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """`(text that is final, whether a stop string was reached)`."""
        self.held += text
        found = [at for s in self.stop if (at := self.held.find(s)) >= 0]
        if found:
            final, self.held = self.held[: min(found)], ""
            return final, True
        keep = max((self._overlap(s) for s in self.stop), default=0)
        cut = len(self.held) - keep
        final, self.held = self.held[:cut], self.held[cut:]
        return final, False

    def _overlap(self, stop: str) -> int:
        """How many characters at the end of what is held begin `stop`."""
        longest = min(len(stop) - 1, len(self.held))
        return next((n for n in range(longest, 0, -1) if self.held.endswith(stop[:n])), 0)


class AnswerText:
    """The text of one answer: it ends with an end token, a stop string or the last token allowed.

    Neither the end token nor the stop string is in it. Where it is to be read right after the text
    of the tokens `before`, it keeps the space that a text does not begin with. Raises RequestError
    for an empty stop.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_tokens: int,
        stop: Sequence[str] = (),
        before: Sequence[int] = (),
    ) -> None:
        self._left = max_tokens
        self._ends = tokenizer.eos_token_ids
        self._detokenizer = tokenizer.detokenizer()
        for token in before:
            self._detokenizer.add(token)
        self._stops = StopText(stop)

    def add(self, token: int, complete: bool = False) -> tuple[str, str | None]:
        """`(text that is final, finish reason if this token is the last)`: "stop" or "length".

        complete: the answer is, though no end token says so.
        """
        self._left -= 1
        end = self.is_end(token)
        ended = end or complete
        last = ended or not self._left
        new = "" if end else self._detokenizer.add(token)
        text, stopped = self._stops.feed(new + self._detokenizer.finish() if last else new)
        if last and not stopped:
            text += self._stops.held
        return text, "stop" if ended or stopped else "length" if last else None

    def is_end(self, token: int) -> bool:
        """Whether it is an end token: it ends the answer, and is not in the text."""
        return token in self._ends
