"""Answers held to a JSON schema, a regular expression, a grammar, or a few texts.

llguidance (https://github.com/guidance-ai/llguidance) says which tokens may come next: a mask over
the vocabulary, after each token. What a grammar forces it spells in the tokens that the tokenizer
itself would take, so that a model reads what it has learnt to write. It is imported when something
is first compiled.

A mask depends on the tokens before it and on nothing else. So an answer is the same alone, in
company, and with any guesses.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_cerebrum.decoding.decode import Sampler
from mlx_cerebrum.decoding.grammar_text import Ask, Written, first_line
from mlx_cerebrum.decoding.trial import LIMITS, found_wrong
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.tokenizer.detokenizer import SPACE_MARK
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.tokenizer.vocabulary import AddedToken

if TYPE_CHECKING:
    from llguidance import LLMatcher

Words = npt.NDArray[np.uint32]  # of a mask: token i is bit i % 32 of word i // 32

KEPT = 8  # compiled grammars; hostile ones come to 50 MB
LONGEST = 512  # bytes of a token: llguidance's trie holds no path of more than 1024


class Grammars:
    """Compiles what answers are held to, for one tokenizer; keeps the last few.

    vocabulary_size: the width of the model's logits.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary_size: int) -> None:
        self._tokenizer, self._size = tokenizer, vocabulary_size
        self._lock, self._making = threading.Lock(), threading.Lock()
        self._made: _Vocabulary | None = None
        self._kept: OrderedDict[Ask, Grammar] = OrderedDict()

    def compile(self, ask: Ask) -> "Grammar":
        """Slow where it is new, and safe in any thread. Raises RequestError, one line that names
        the place, for what is not valid, not supported, too large, or can't be fulfilled."""
        with self._lock:
            grammar = self._kept.pop(ask, None)
            if grammar is not None and not grammar.spent:
                self._kept[ask] = grammar
                return grammar
        with self._making:
            if self._made is None:
                self._made = _Vocabulary(self._tokenizer, self._size)
        grammar = Grammar(self._made, ask)
        with self._lock:
            self._kept[ask] = grammar
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return grammar


class Grammar:
    """What answers are held to, compiled. They share what is found out about it on the way."""

    def __init__(self, vocabulary: "_Vocabulary", ask: Ask) -> None:
        self.vocabulary, self.spent = vocabulary, False
        self._written = Written(ask)
        if ask.kind != "json_object" and (wrong := found_wrong(self._written)):
            raise RequestError(wrong)
        self._lock = threading.Lock()
        self._matcher = self.fresh()
        self._matcher.compute_bitmask()  # the first mask takes longest
        if self._matcher.is_error():
            raise RequestError(f"{ask.place}: {first_line(self._matcher.get_error())}")

    def fresh(self) -> "LLMatcher":
        """A matcher that shares nothing."""
        return self.vocabulary.matcher(self._written.text)

    def start(self) -> "Constraint":
        """For one answer, which has not begun."""
        with self._lock:
            return Constraint(self, self._matcher.deep_copy())


class Constraint:
    """What one answer is held to, and how far it has come.

    failure: what ended it before the answer was complete; set, never raised, as other answers
        share its steps. Then no mask means anything.
    """

    def __init__(self, grammar: Grammar, matcher: "LLMatcher") -> None:
        self._grammar, self._matcher = grammar, matcher
        self._vocabulary = grammar.vocabulary
        self._tokens: list[int] = []
        self._alone = False  # whether its matcher shares nothing
        self._ended = False  # by an end token
        self._forced: list[int] | None = None
        self.failure: RequestError | None = None

    @property
    def read(self) -> int:
        """Tokens of the answer that it knows."""
        return len(self._tokens)

    @property
    def finished(self) -> bool:
        """Whether nothing but an end token may come."""
        return self.failure is None and (self._ended or self._matcher.is_stopped())

    @property
    def over(self) -> bool:
        """Whether nothing may come at all: it failed, or it is finished and the model has no end
        token."""
        return self.failure is not None or (self.finished and not self._vocabulary.ends)

    def accept(self, tokens: Sequence[int]) -> None:
        """The answer has these tokens more."""
        for token in tokens:
            self._tokens.append(token)
            self._forced = None
            if self.failure is not None or self._ended:
                continue
            if token in self._vocabulary.ends:
                self._ended = True
            elif not self._matcher.consume_token(token) and not self._goes_on_alone():
                self._fail(self._matcher.get_error())

    def forced(self, most: int) -> list[int]:
        """The only tokens that can come next, `most` of them; few grammars force many."""
        if self._forced is None:
            self._forced = [] if self.closed else self._matcher.compute_ff_tokens()
        return self._forced[:most]

    def cut(self, guesses: Sequence[int]) -> list[int]:
        """Guesses up to the first that may not come, or ends the answer."""
        if self.closed:
            return []
        ends = self._vocabulary.ends
        count = next((i for i, guess in enumerate(guesses) if guess in ends), len(guesses))
        return list(guesses[: self._matcher.validate_tokens(list(guesses[:count]))])

    def masks(self, guesses: Sequence[int] = ()) -> Words:
        """Which tokens may come next, and after each guess: `[1 + guesses, words]`.

        What comes after a guess that may not come is not looked at: there all may.
        """
        if self._ended:
            return np.repeat(self._vocabulary.end_mask[None], 1 + len(guesses), axis=0)
        rows = np.full((1 + len(guesses), self._vocabulary.words), 0xFFFFFFFF, np.uint32)
        if self.failure is None and (error := self._fill(rows, guesses)):
            if self._goes_on_alone():
                error = self._fill(rows, guesses)
            if error:
                self._fail(error)
        return rows

    def _fill(self, rows: Words, guesses: Sequence[int]) -> str:
        """Write the masks; what went wrong, if anything."""
        matcher = self._matcher.deep_copy() if guesses else self._matcher
        vocabulary = self._vocabulary
        for number, (row, guess) in enumerate(zip(rows, [*guesses, -1], strict=True), start=1):
            row[:] = np.frombuffer(matcher.compute_bitmask(), np.uint32)[: vocabulary.words]
            row &= vocabulary.mask
            if matcher.is_error():
                return matcher.get_error()
            if not matcher.is_stopped():
                if (row & vocabulary.end_mask).any() and not matcher.is_accepting():
                    row &= ~vocabulary.end_mask  # a Lark grammar may name any token
                if not row.any():
                    return "no token of the vocabulary can go on with it"
            allowed = guess >= 0 and row[guess // 32] >> (guess % 32) & 1
            if allowed and guess in vocabulary.ends:
                rows[number:] = vocabulary.end_mask
            if not allowed or guess in vocabulary.ends:
                return ""
            if not matcher.consume_token(guess):
                return matcher.get_error()
        return ""

    def apply(self, logits: mx.array, guesses: Sequence[int]) -> mx.array:
        """Logits `[1 + guesses, V]` with -inf for the tokens that may not come."""
        masks = mx.array(self.masks(guesses))
        bits = (masks[:, :, None] >> mx.arange(32, dtype=mx.uint32)) & 1
        allowed = bits.reshape(len(guesses) + 1, -1)[:, : logits.shape[-1]].astype(mx.bool_)
        return mx.where(allowed, logits, mx.array(-mx.inf, logits.dtype))

    def guiding(self, sampler: Sampler) -> Sampler:
        """`sampler` for a draft: each of its tokens may come after those before it."""
        drawn: list[int] = []

        def draw(logits: mx.array, number: int) -> mx.array:
            rows = mx.broadcast_to(logits, (len(drawn) + 1, logits.shape[-1]))
            token = sampler(self.apply(rows, drawn)[-1:], number)
            drawn.extend(cast(list[int], token.tolist()))
            return token

        return draw

    @property
    def closed(self) -> bool:
        """Whether there is nothing to guess. A model without an end token is to stop right where
        the answer is complete: there a guess would be one too many."""
        return self.failure is not None or self.finished or not self._vocabulary.ends

    def _goes_on_alone(self) -> bool:
        """Try again with a matcher of its own: what an answer may take of a grammar's limits, all
        that share it take together."""
        self._grammar.spent = True
        if self._alone:
            return False
        self._alone, self._matcher = True, self._grammar.fresh()
        return self._matcher.consume_tokens(self._tokens)

    def _fail(self, error: str) -> None:
        self._grammar.spent = True
        self.failure = RequestError(
            f"the answer can't be held to what was asked: {first_line(error)}"
        )


class _Vocabulary:
    """A tokenizer's tokens as llguidance wants them, and masks of those that may ever come."""

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        from llguidance import LLParserLimits, LLTokenizer

        spelling = _Spelling(tokenizer, size)
        self.ends = frozenset(end for end in tokenizer.eos_token_ids if end < size)
        ends = sorted(self.ends) or None  # without any it adds a token past the last
        self._tokenizer = LLTokenizer(spelling, eos_token=ends)  # type: ignore[arg-type]
        spelling.greedy = self._tokenizer.greedy_tokenize
        self._limits = LLParserLimits(**LIMITS)  # type: ignore[arg-type]
        self.words = -(-size // 32)
        usable = [
            token
            for token, text in enumerate(spelling.tokens[:size])
            if text and token not in spelling.closed
        ]
        self.end_mask = self._mask_of(self.ends)
        self.mask = self._mask_of(usable) | self.end_mask

    def _mask_of(self, tokens: Any) -> Words:
        bits = np.zeros(self.words * 32, np.uint8)
        bits[list(tokens)] = 1
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def matcher(self, text: str) -> "LLMatcher":
        """Not checked: it may be in error."""
        from llguidance import LLMatcher

        return LLMatcher(self._tokenizer, text, log_level=0, limits=self._limits)


class _Spelling:
    """What llguidance asks of a tokenizer: the bytes of its tokens, and how it cuts up a text."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self._tokenizer = tokenizer
        ids = range(max(size, tokenizer.vocab_size))
        self.eos_token_id = min((e for e in tokenizer.eos_token_ids if e < size), default=None)
        self.closed = tokenizer.control_ids | tokenizer.eos_token_ids
        self.special_token_ids = [token for token in ids if token in self.closed]
        self.tokens = [self._spelled(token) for token in ids]
        self.greedy = lambda text: list[int]()

    def _spelled(self, token: int) -> bytes:
        if token in self.closed:
            return (self._tokenizer.content(token) or "").encode()[:LONGEST]
        piece = self._tokenizer.piece(token)
        if isinstance(piece, str):
            piece = piece.replace(SPACE_MARK, " ").encode()
        return piece if len(piece) <= LONGEST else b""

    def __call__(self, text: str) -> list[int]:
        """The tokenizer's own ids of a text that goes on with another, or the longest that fit."""
        wanted = text.encode()
        for anchor in ("", "\n"):  # what takes the space that goes before a text
            ids = self._tokenizer.encode_segments([AddedToken(0, ""), anchor + text], False)[1:]
            for start in range(4):
                if b"".join(self.tokens[token] for token in ids[start:]) == wanted:
                    return ids[start:]
        return self.greedy(text)
