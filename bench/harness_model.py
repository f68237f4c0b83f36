"""A model of ours as lm-evaluation-harness sees one: text in, likelihoods and answers out.

The harness passes prompts as text. A control token of the template is one private character
there (plane 16 of Unicode), so that a question that spells `<s>` stays a question; text that
holds such a character itself is refused. Three differences from the harness's own `hf` model:

- A prompt that ends in a word ("AI:") leaves the space after it to the model, so a choice is
  scored with one.
- What ends an answer in a chat ends it here: with the built-in template, "\\nUser:" too.
- A BOS is never scored, nor put before a text twice.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.scoring import Ids, Scorer
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.tokenizer.template import check_messages
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.tokenizer.vocabulary import AddedToken

MAX_GEN_TOKS = 256  # where a task sets none: the harness's own default
SECONDS = 15.0  # between two lines of progress
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_MARK = re.compile("([\U00100000-\U0010ffff])")

Say = Callable[[str], None]


class Adapter:
    """What the harness asks of a model. `cerebrum_lm` makes it one of the harness's classes."""

    def __init__(self, model: Model, tokenizer: Tokenizer, say: Say = print) -> None:
        super().__init__()  # of the harness's class, when there is one
        self._model, self._tokenizer, self._say = model, tokenizer, say
        self._max_length = model.config.max_position_embeddings
        self._marks: dict[str, AddedToken] = {}  # a private character -> its control token
        self._open: set[str] = set()  # rendered prompts after which the model writes a space

    # The prompt as text.

    @property
    def tokenizer_name(self) -> str:
        return "mlx-cerebrum"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template's source, for the harness's records."""
        return self._tokenizer.format.source

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text. Without a generation prompt its last message goes on."""
        messages = check_messages(chat_history)
        for message in messages:
            _refuse_marks(message["content"])
        segments = self._tokenizer.render(messages, add_generation_prompt)
        text = "".join(map(self._spell, segments))
        if add_generation_prompt:
            if not text[-1:].isspace() and text[-1:] not in self._marks:
                self._open.add(text)
            return text
        begun = messages[-1]["content"].strip()
        before, found, _ = text.rpartition(begun)
        if not found:
            raise RequestError("the chat template does not show the beginning of an answer")
        return before + begun

    def _spell(self, segment: str | AddedToken) -> str:
        if isinstance(segment, str):
            return segment
        for mark, token in self._marks.items():
            if token == segment:
                return mark
        mark = chr(0x100000 + len(self._marks))
        self._marks[mark] = segment
        return mark

    def encode(self, text: str, add_bos: bool | None = None) -> Ids:
        """Ids of a rendered prompt or plain text. At most one BOS: none where the text has it."""
        parts = filter(None, _MARK.split(text))
        return self._tokenizer.encode_segments((self._marks.get(p, p) for p in parts), add_bos)

    def encode_pair(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        """Ids of both, split where the tokens of the whole are; spaces go to the continuation."""
        _refuse_marks(continuation)
        if context in self._open and not continuation[:1].isspace():
            continuation = f" {continuation}"
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        prefix = self._prefix()
        if not stripped:
            ids = self.encode(continuation, add_bos=False)
            return (ids[:1], ids[1:]) if ids[:1] == prefix else (prefix, ids)
        before = self.encode(stripped)
        return before, self.encode(stripped + continuation)[len(before) :]

    def _prefix(self) -> Ids:
        """What comes before a text that has nothing before it."""
        bos = self._tokenizer.bos_token_id
        found = sorted(self._tokenizer.eos_token_ids) if bos is None else [bos]
        if not found:
            raise RequestError("the tokenizer has neither BOS nor EOS: no text can be scored")
        return found[:1]

    # The requests: objects of the harness; `args` holds what is asked.

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        pairs = [self.encode_pair(*request.args[:2]) for request in requests]
        return self._score(pairs, "choices scored")

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Of whole texts, in windows of the model's positions; each token is scored once."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows: list[list[tuple[Ids, Ids]]] = []
        for request in requests:
            ids = self.encode(request.args[0], add_bos=False)
            found = get_rolling_token_windows(ids, self._prefix()[0], self._max_length, 1)
            windows.append([make_disjoint_window(window) for window in found])
        scores = iter(self._score([pair for text in windows for pair in text], "windows scored"))
        return [sum(next(scores)[0] for _ in text) for text in windows]

    def _score(self, pairs: list[tuple[Ids, Ids]], what: str) -> list[tuple[float, bool]]:
        kept = []
        for context, continuation in pairs:
            room = self._max_length + 1 - len(continuation)
            if room < 1:
                raise RequestError(
                    f"a text to score has {len(continuation)} tokens,"
                    f" more than the model's {self._max_length} positions"
                )
            kept.append((context[-room:], continuation))
        self._tell_cut([context for context, _ in pairs], [context for context, _ in kept])
        progress = _Progress(what, len(kept), self._say)
        return Scorer(self._model, progress.add).score(kept)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy answers. Raises RequestError for a task that wants samples or beams."""
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(_settings(request.args[1]), []).append(index)
        progress = _Progress("questions answered", len(requests), self._say)
        scorer = Scorer(self._model, progress.add)
        texts: dict[int, str] = {}
        for (max_tokens, stop), indices in groups.items():
            room = self._max_length - max_tokens
            if room < 1:
                raise RequestError(
                    f"a task asks for {max_tokens} tokens, the model has {self._max_length}"
                    " positions for prompt and answer"
                )
            whole = [self.encode(requests[i].args[0]) or self._prefix() for i in indices]
            prompts = [ids[-room:] for ids in whole]
            self._tell_cut(whole, prompts)
            stops = (*stop, *self._tokenizer.stop_strings)
            answers = scorer.generate(prompts, self._tokenizer, stops, max_tokens)
            texts |= zip(indices, answers, strict=True)
        return [texts[i] for i in range(len(requests))]

    def _tell_cut(self, before: Sequence[Ids], after: Sequence[Ids]) -> None:
        cut = sum(len(a) > len(b) for a, b in zip(before, after, strict=True))
        if cut:
            self._say(
                f"{cut} of {len(before)} prompts are longer than the model's"
                f" {self._max_length} positions: their beginnings are left out"
            )


def cerebrum_lm(model: Model, tokenizer: Tokenizer, say: Say = print) -> Any:
    """An `lm_eval.api.model.LM` for the harness's own functions. Imports the harness."""
    from lm_eval.api.model import LM

    return type("CerebrumLM", (Adapter, LM), {})(model, tokenizer, say)


def _settings(arguments: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Most tokens to generate, and stop strings, of a generation request."""
    sampled = arguments.get("do_sample", float(arguments.get("temperature") or 0) > 0)
    if sampled or arguments.get("num_beams", 1) != 1:
        raise RequestError("a task asks for samples or beams; answers here are greedy only")
    lengths = [arguments[name] for name in _LENGTHS if arguments.get(name) is not None]
    stop = arguments.get("until") or ()
    stop = (stop,) if isinstance(stop, str) else tuple(filter(None, stop))
    return int(lengths[0] if lengths else MAX_GEN_TOKS), stop


def _refuse_marks(text: str) -> None:
    if found := _MARK.search(text):
        raise RequestError(f"a question holds U+{ord(found[0]):X}, which stands for a token here")


class _Progress:
    """A line every now and then."""

    def __init__(self, what: str, total: int, say: Say) -> None:
        self._what, self._total, self._say = what, total, say
        self._done, self._told = 0, time.monotonic()

    def add(self, count: int) -> None:
        self._done += count
        if time.monotonic() - self._told > SECONDS:
            self._told = time.monotonic()
            self._say(f"{self._done} of {self._total} {self._what}")
