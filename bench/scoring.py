"""Likelihoods and answers of many prompts, each shared beginning computed once.

Token ids in; knows no tasks. A batch gives what one prompt at a time gives, up to rounding:
prompts of one batch are equally long, and what pads a shorter continuation comes after it,
where a causal model can't see it from.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import cast

import mlx.core as mx

from mlx_cerebrum.decoding.decode import greedy, prefill, prefill_step
from mlx_cerebrum.decoding.text import StopText
from mlx_cerebrum.model.cache import WindowedKVCache
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.memory import Workload, available_bytes
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer

BATCH = 32  # prompts at once, at most
SHARE = 4  # caches of a batch may take one part in this many of the memory that is free

Ids = list[int]
Count = Callable[[int], None]  # told how many more are done


class Answer:
    """What one prompt's continuation says so far."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.text = ""
        self._ends = tokenizer.eos_token_ids
        self._detokenizer = tokenizer.detokenizer()
        self._stop = StopText(stop)

    def add(self, token: int) -> bool:
        """Whether the answer goes on after `token`."""
        if token in self._ends:
            self.finish()
            return False
        text, stopped = self._stop.feed(self._detokenizer.add(token))
        self.text += text
        return not stopped

    def finish(self) -> None:
        """No further token comes: what was held back belongs to the answer."""
        text, stopped = self._stop.feed(self._detokenizer.finish())
        self.text += text if stopped else text + self._stop.held


class Scorer:
    """`score` and `generate` over one model."""

    def __init__(self, model: Model, count: Count = lambda _: None) -> None:
        self._model = model
        self._count = count
        self._held: Ids = []  # the tokens the cache has seen
        self._cache = model.make_cache()

    def score(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[tuple[float, bool]]:
        """Of each (context, continuation): the continuation's log-likelihood in nats, and
        whether greedy decoding writes it. A context has at least one token."""
        found: dict[int, tuple[float, bool]] = {}
        for batch in self._batches([context for context, _ in pairs], 1):
            found |= zip(batch, self._score([pairs[i] for i in batch]), strict=True)
            self._count(len(batch))
        return [found[i] for i in range(len(pairs))]

    def _score(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[tuple[float, bool]]:
        contexts = [list(ids) for ids in dict.fromkeys(tuple(context) for context, _ in pairs)]
        rows = mx.array([contexts.index(context) for context, _ in pairs])
        cache = [_rows(c, rows) for c in self._begin(contexts)]
        lengths = [len(continuation) for _, continuation in pairs]
        longest = max(lengths)
        padded = [continuation + [0] * (longest - len(continuation)) for _, continuation in pairs]
        wanted = mx.array(padded, dtype=mx.int32)  # [B, L]
        last = mx.array([context[-1:] for context, _ in pairs], dtype=mx.int32)
        inputs = mx.concatenate([last, wanted[:, :-1]], axis=1)  # what comes before each
        chances: list[list[float]] = [[] for _ in pairs]
        hits: list[list[bool]] = [[] for _ in pairs]
        for piece in _pieces(longest, len(pairs)):
            target = wanted[:, piece]
            logits = self._model(inputs[:, piece], cache).astype(mx.float32)  # [B, L, V]
            chosen = mx.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
            chance = chosen - mx.logsumexp(logits, axis=-1)
            hit = mx.argmax(logits, axis=-1) == target
            for row, more in zip(chances, cast(list[list[float]], chance.tolist()), strict=True):
                row += more
            for flags, new in zip(hits, cast(list[list[bool]], hit.tolist()), strict=True):
                flags += new
            mx.clear_cache()
        return [
            (math.fsum(chance[:length]), all(hit[:length]))
            for chance, hit, length in zip(chances, hits, lengths, strict=True)
        ]

    def generate(
        self, prompts: Sequence[Ids], tokenizer: Tokenizer, stop: Sequence[str], max_tokens: int
    ) -> list[str]:
        """Each prompt's greedy continuation: up to an end token or a `stop` string, neither of
        which is part of it, or `max_tokens`. A prompt has at least one token."""
        texts: dict[int, str] = {}
        for batch in self._batches(prompts, max_tokens):
            answers = [Answer(tokenizer, stop) for _ in batch]
            self._generate([prompts[i] for i in batch], answers, max_tokens)
            texts |= {i: answer.text for i, answer in zip(batch, answers, strict=True)}
            self._count(len(batch))
        return [texts[i] for i in range(len(prompts))]

    def _generate(self, prompts: Sequence[Ids], answers: list[Answer], max_tokens: int) -> None:
        cache = self._begin(prompts)
        tokens = mx.array([prompt[-1] for prompt in prompts], dtype=mx.int32)  # [B]
        for _ in range(max_tokens):
            tokens = greedy(self._model(tokens[:, None], cache)[:, -1])
            written = zip(answers, cast(list[int], tokens.tolist()), strict=True)
            on = [row for row, (answer, token) in enumerate(written) if answer.add(token)]
            if not on:
                return
            if len(on) < len(answers):  # the others cost nothing from here
                answers = [answers[row] for row in on]
                rows = mx.array(on)
                tokens, cache = tokens[rows], [_rows(c, rows) for c in cache]
        for answer in answers:
            answer.finish()

    def _begin(self, prompts: Sequence[Ids]) -> list[WindowedKVCache]:
        """Caches, a row a prompt, that have seen all but its last token; equal lengths only."""
        # In sorted order the first and the last differ earliest.
        first, last = min(prompts), max(prompts)
        shared = first[: min(_common(first, last), len(first) - 1)]
        cache = self._after(shared, len(prompts))
        rest = mx.array([prompt[len(shared) : -1] for prompt in prompts], dtype=mx.int32)
        for piece in _pieces(rest.shape[1], len(prompts)):
            self._model(rest[:, piece], cache)
            mx.eval([c.state for c in cache])
            mx.clear_cache()
        return cache

    def _after(self, ids: Ids, count: int) -> list[WindowedKVCache]:
        """Caches of `count` rows that have all seen `ids`.

        What `ids` shares with the tokens asked for last is not computed again.
        """
        if not ids:
            return self._model.make_cache()
        common = _common(self._held, ids)
        back = len(self._held) - common
        if any(back > c.rewindable() for c in self._cache):  # past the window those are gone
            self._cache, common, back = self._model.make_cache(), 0, 0
        for c in self._cache:
            c.trim(back)
        self._held = list(ids)
        if ids[common:]:
            prefill(self._model, mx.array(ids[common:], dtype=mx.int32), self._cache)
        rows = mx.zeros(count, dtype=mx.int32)
        return [_rows(c, rows) for c in self._cache]

    def _batches(self, prompts: Sequence[Ids], generated: int) -> Iterator[list[int]]:
        """Indices of equally long prompts, as many as fit in memory, at most BATCH."""
        item_bytes = self._model.dtype.size
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i]))
        for length, group in groupby(order, key=lambda i: len(prompts[i])):
            request = Workload(self._model.config, item_bytes, length, generated, prefill_step())
            size = max(1, min(BATCH, available_bytes() // SHARE // max(1, request.cache_bytes)))
            indices = list(group)
            for start in range(0, len(indices), size):
                yield indices[start : start + size]


def _common(a: Ids, b: Ids) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _pieces(length: int, rows: int) -> Iterator[slice]:
    """`length` tokens of `rows` prompts in chunks as large as one prompt's."""
    step = max(1, prefill_step() // rows)
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _rows(cache: WindowedKVCache, rows: mx.array) -> WindowedKVCache:
    """A copy that holds the given rows of the batch, in that order."""
    keys, values, *numbers = cache.state
    if keys is None or values is None:
        return cache  # empty: it takes any number of rows
    offset, start, window, rewind, step, kv_bits = numbers
    state = (keys[rows], values[rows], offset, start, window, rewind, step, kv_bits)
    return WindowedKVCache.from_state(state)
