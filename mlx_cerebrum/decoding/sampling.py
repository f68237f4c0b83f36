"""How the next token is chosen: its logits changed as asked, then the likeliest, or a draw."""

import math
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_cerebrum.decoding.decode import Sampler, greedy
from mlx_cerebrum.decoding.filters import in_float32, keep_min_p, keep_top_k, keep_top_p
from mlx_cerebrum.errors import RequestError, shown


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    temp: 0 takes the likeliest, whatever the next four say; else the log-probabilities that the
        filters leave are divided by it.
    top_p: keep the smallest set of tokens that holds at least this probability; 1 keeps all.
    min_p: keep tokens with at least this share of the likeliest token's probability; 0 keeps all.
    seed: the same seed gives the same draws; None gives new ones each time.
    top_k: keep this many of the likeliest tokens; None and 0 keep all.

    The filters act before the temperature, in the order top-p, min-p, top-k, as mlx-lm's do.
    Before that the logits are changed, also at temp 0, in this order (vLLM's and mlx-lm's):

    logit_bias: pairs of a token and what is added to its logit, from -100 to 100.
    repetition_penalty: what a logit above 0 is divided by, and one below 0 multiplied with, where
        the token is among the last `repetition_context` of prompt and answer, however often
        (Keskar et al. 2019, arXiv 1909.05858); 1 changes nothing.
    frequency_penalty, presence_penalty: what is subtracted for each time that a token is in the
        answer so far, and once if it is there at all; from -2 to 2. The whole answer counts, and
        none of the prompt, as OpenAI and vLLM have it; in mlx-lm it is the last 20 tokens of both.
    min_tokens: no end token is chosen before the answer has this many tokens; a stop string still
        ends it.
    ignore_eos: no end token is ever chosen (as llama.cpp has it; vLLM chooses it and goes on).

    Log-probabilities that are reported are those before all of this, as OpenAI's are.
    Raises RequestError for values out of range.
    """

    temp: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    top_k: int | None = None
    repetition_penalty: float = 1.0
    repetition_context: int = 20
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.temp < math.inf:
            raise RequestError(f"temp must be 0 (greedy) or above, not {self.temp}")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise RequestError(f"seed must be from 0 to 2^64 - 1, not {shown(self.seed)}")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top-p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.min_p < 1:
            raise RequestError(f"min-p must be from 0 to below 1, not {self.min_p}")
        if self.top_k is not None and self.top_k < 0:
            raise RequestError(f"top-k must be at least 0 (all), not {shown(self.top_k)}")
        if not 0 < self.repetition_penalty < math.inf:
            raise RequestError(f"repetition-penalty must be above 0, not {self.repetition_penalty}")
        if self.repetition_context < 1:  # 0 is all tokens in mlx-lm, and none in llama.cpp
            context = shown(self.repetition_context)
            raise RequestError(f"repetition-context must be at least 1, not {context}")
        for name in ("frequency", "presence"):
            if not -2 <= (penalty := getattr(self, f"{name}_penalty")) <= 2:
                raise RequestError(f"{name}-penalty must be from -2 to 2, not {penalty}")
        for token, bias in self.logit_bias:
            if not 0 <= token < 2**31:
                raise RequestError(f"logit-bias must name a token id, not {shown(token)}")
            if not -100 <= bias <= 100:
                raise RequestError(f"logit-bias must be from -100 to 100, not {bias}")
        if len(dict(self.logit_bias)) < len(self.logit_bias):
            raise RequestError("logit-bias names a token twice")
        if self.min_tokens < 0:
            raise RequestError(f"min-tokens must be at least 0, not {shown(self.min_tokens)}")

    def check_used(self) -> None:
        """Raise RequestError for a setting that would change nothing."""
        drawn = self.top_p, self.min_p, self.top_k or 0, self.seed
        if self.temp == 0 and drawn != (1, 0, 0, None):
            raise RequestError(
                "top-p, min-p, top-k and seed change nothing at temp 0; set --temp above 0"
            )
        if self.repetition_penalty == 1 and self.repetition_context != GREEDY.repetition_context:
            raise RequestError("repetition-context changes nothing without --repetition-penalty")
        if self.ignore_eos and self.min_tokens:
            raise RequestError("min-tokens changes nothing with --ignore-eos; leave one out")

    def check_vocabulary(self, size: int) -> None:
        """Raise RequestError where `logit_bias` names a token that a model of `size` has not."""
        for token, _ in self.logit_bias:
            if token >= size:
                raise RequestError(f"logit-bias: token id {shown(token)} is not below {size}")

    def sampler(self) -> Sampler:
        """What draws the tokens of one answer.

        It has a random key of its own, from which each token of the answer gets one. So a seed
        gives the same draws whatever else runs, however often one place of the answer is drawn.
        """
        return greedy if self.temp == 0 else _Draws(self)

    def adjust(self, prompt: Sequence[int], end_ids: Collection[int]) -> "Adjust | None":
        """What changes the logits of an answer to `prompt`, which `end_ids` would end.

        None where nothing is asked that would change one.
        """
        ends = self.min_tokens or self.ignore_eos
        penalties = self.frequency_penalty or self.presence_penalty
        if self.logit_bias or self.repetition_penalty != 1 or penalties or (ends and end_ids):
            return Adjust(self, len(prompt), end_ids)
        return None


GREEDY = Sampling()


class Adjust:
    """Changes the logits of one answer before its tokens are chosen, as a `Sampling` says.

    What a row gets depends on the tokens before it, and not on the rows it is computed with. The
    newest tokens stay on the device, where they may still be being computed.
    """

    def __init__(self, sampling: Sampling, begin: int, end_ids: Collection[int]) -> None:
        self._sampling, self._end_ids = sampling, end_ids
        self._begin = begin  # the answer's place after the prompt
        self.endless = sampling.ignore_eos or sampling.min_tokens > 0  # rules end tokens out
        ids, biases = zip(*sampling.logit_bias, strict=True) if sampling.logit_bias else ((), ())
        self._largest = max(ids, default=0)
        self._biased = mx.array(ids, dtype=mx.int32)
        self._biases = mx.array(biases, dtype=mx.float32)

    def __call__(
        self, logits: mx.array, seen: Sequence[int], inputs: mx.array, number: int
    ) -> mx.array:
        """Float32 logits `[L, V]`, changed, of the answer's tokens `number`, `number + 1`, ...

        seen: all tokens of prompt and answer before `inputs`.
        inputs: `[L]`, the tokens that gave these logits; row i comes after the first i + 1 of them.
        """
        sampling, (rows, vocabulary) = self._sampling, logits.shape
        logits = logits.astype(mx.float32)
        if sampling.logit_bias:
            if self._largest >= vocabulary:  # it would be written to memory that is another's
                sampling.check_vocabulary(vocabulary)
            logits = logits.at[:, self._biased].add(self._biases)
        if sampling.repetition_penalty != 1:
            penalty = in_float32(sampling.repetition_penalty)
            near = counts(vocabulary, seen, inputs, last=sampling.repetition_context) > 0
            repeated = mx.where(logits > 0, logits / penalty, logits * penalty)
            logits = mx.where(near, repeated, logits)
        if sampling.frequency_penalty or sampling.presence_penalty:
            times = counts(vocabulary, seen, inputs, first=self._begin)
            logits = logits - sampling.frequency_penalty * times
            logits = logits - sampling.presence_penalty * (times > 0)
        endless = rows if sampling.ignore_eos else min(sampling.min_tokens - number, rows)
        if endless > 0:  # the first so many rows; a checkpoint may name ends that it does not have
            ends = mx.array([token for token in self._end_ids if token < vocabulary], mx.int32)
            logits[:endless, ends] = -mx.inf
        return logits


def counts(
    vocabulary: int,
    seen: Sequence[int],
    inputs: mx.array,
    first: int = 0,
    last: int | None = None,
) -> mx.array:
    """How often each token comes before each row: `[L, V]`, float32.

    Before row i come `seen` and `inputs[: i + 1]`, of which those count that are at `first` or
    later, and among the `last` ones.
    """
    rows, read = inputs.size, len(seen)
    last = read + rows if last is None else min(last, read + rows)
    start = min(max(first, read + 1 - last), read)  # what is before counts for no row
    known = mx.array(list(seen[start:]), dtype=mx.int32)
    tokens = mx.concatenate([known, inputs.astype(mx.int32)])
    place = mx.arange(start, read + rows)
    row = mx.arange(rows)[:, None]
    newest = read + row
    counted = (place >= first) & (place > newest - last) & (place <= newest)
    return mx.zeros((rows, vocabulary)).at[row, tokens].add(counted)


class _Draws:
    """Draws from the tempered, filtered distribution: a Sampler."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self._rest = mx.random.key(seed)
        self._keys: list[mx.array] = []  # of each token's draw

    def __call__(self, logits: mx.array, number: int) -> mx.array:
        sampling = self._sampling
        # Log-probabilities, but for a number that is a row's: the likeliest token's is 0, so that
        # no temperature makes it infinite.
        logprobs = logits.astype(mx.float32)
        logprobs = logprobs - logprobs.max(axis=-1, keepdims=True)
        if sampling.top_p < 1:
            logprobs = keep_top_p(logprobs, sampling.top_p)
        if sampling.min_p > 0:
            logprobs = keep_min_p(logprobs, sampling.min_p)
        if sampling.top_k:
            logprobs = keep_top_k(logprobs, sampling.top_k)
        # Not mx.random.categorical: it looks one number up in the sums of the probabilities, where
        # a small change to a token moves all that come after it. With noise of its own for each
        # token (Gumbel's), two like distributions mostly draw alike: drafts hold more often.
        rows, vocabulary = logits.shape
        noise = [mx.random.gumbel((vocabulary,), key=self._key(number + r)) for r in range(rows)]
        return mx.argmax(logprobs / in_float32(sampling.temp) + mx.stack(noise), axis=-1)

    def _key(self, number: int) -> mx.array:
        while len(self._keys) <= number:
            self._rest, draw = mx.random.split(self._rest)
            self._keys.append(draw)
        return self._keys[number]


def make_sampler(
    temp: float = 0.0, top_p: float = 1.0, min_p: float = 0.0, seed: int | None = None
) -> Sampler:
    """`Sampling(...).sampler()`, for programs. Raises RequestError for values out of range, and
    for settings that would change nothing."""
    sampling = Sampling(temp, top_p, min_p, seed)
    sampling.check_used()
    return sampling.sampler()
