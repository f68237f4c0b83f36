"""A long text, told token by token on this backend, is what the CPU computes in one piece.

The text is written as `generate` writes: with caches that the window moves through, and on a GPU
with weights packed as they are stored. Then the CPU reads all of it at once, without a cache and
with the same weights unpacked, and says after each token which should have come. By induction it
would have written the same text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import mlx.core as mx
import numpy as np

from mlx_cerebrum import device
from mlx_cerebrum.decoding.decode import Sampler, greedy
from mlx_cerebrum.decoding.decoder import generate_step
from mlx_cerebrum.decoding.policy import Policy
from mlx_cerebrum.decoding.speculative import speculation
from mlx_cerebrum.doctor.check import Found, Settings
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.weights.opening import ModelSpec, open_model

WINDOW = 256  # tokens
TIE = 1e-3  # between two logits that rounding may swap: they agree to about 1e-4
_TOKENS, _QUICK_TOKENS = 1000, 400
_GUESSED, _QUICK_GUESSED = 200, 80
_DRAFTS = 4  # of a round
_LIST = "One day, two days, three days, four days, one day, two days, three"
_PROMPT = "Once upon a time, in a small house by the sea, there lived"
_ROWS = 128  # of logits at a time


def choose(logits: mx.array, number: int = 0) -> mx.array:
    """The most likely token, and every other time the second: a text of more different ones."""
    best = mx.argmax(logits, axis=-1)
    if number % 2 == 0:
        return best
    return mx.argmax(mx.where(mx.arange(logits.shape[-1]) == best[:, None], -mx.inf, logits), -1)


def long_text(settings: Settings) -> Found:
    """1000 tokens of the demo model in float32 past a window of 256 (quick: 400)."""
    spec = ModelSpec(settings.small, window=WINDOW)
    with mx.stream(mx.cpu):
        opened = open_model(spec)  # `auto`: float32, unpacked
        prompt, reference = opened.tokenizer.encode(_PROMPT), opened.load()
    model = open_model(replace(spec, dtype="float32")).load() if device.on_gpu() else reference
    count = _QUICK_TOKENS if settings.quick else _TOKENS
    told = list(generate_step(prompt, model, max_tokens=count, sampler=choose))
    with mx.stream(mx.cpu):
        wrong, ties = compare(reference, prompt, told)
    different = len(set(told))
    words = f"{count - len(wrong)} of {count} tokens the same, {different} different ones"
    if wrong:
        words += f"; the first that is not: number {wrong[0]}"
    if ties:
        words += f"; {ties} were ties"
    data = {"tokens": count, "wrong": len(wrong), "ties": ties, "different": different}
    return Found(not wrong, words, data=data)


class _Turns(Policy):
    """Guesses in every round, by each drafter in turn, whether it pays or not."""

    turn = 0

    def choose(
        self, offers: Mapping[str, tuple[str, int]], row: float | None = None
    ) -> tuple[str, int] | None:
        if not offers:  # the last token is near
            return None
        name = sorted(offers, reverse=True)[self.turn % len(offers)]
        self.turn += 1
        return name, min(_DRAFTS, offers[name][1])


def guessing(settings: Settings) -> Found:
    """A greedy text with guesses, from its own words and by a model of fewer blocks."""
    with mx.stream(mx.cpu):
        opened = open_model(ModelSpec(settings.small))
        prompt, reference = opened.tokenizer.encode(_LIST), opened.load()
    model = reference
    if device.on_gpu():
        model = open_model(ModelSpec(settings.small, dtype="float32")).load()
    layers = model.config.layer_map
    third = len(layers) // 3
    draft = model.view((*layers[:third], *layers[2 * third :]))
    count = _QUICK_GUESSED if settings.quick else _GUESSED
    how = speculation(model, [draft])
    how.policy = _Turns(how.policy.draft)
    told = list(generate_step(prompt, model, max_tokens=count, speculation=how))
    with mx.stream(mx.cpu):
        wrong, ties = compare(reference, prompt, told, greedy)
    guesses = how.summary()["drafted_and_held"]
    words = f"{count - len(wrong)} of {count} tokens the same"
    words += "".join(f"; {held} of {made} guesses by {n}" for n, (made, held) in guesses.items())
    words += f"; {ties} were ties" if ties else ""
    data = {"tokens": count, "wrong": len(wrong), "ties": ties, "guesses": guesses}
    return Found(not wrong and len(guesses) == 2, words, data=data)


def compare(
    model: Model, prompt: Sequence[int], told: Sequence[int], choose: Sampler = choose
) -> tuple[list[int], int]:
    """Which tokens of the text `told` after `prompt` are not those that `choose` takes in one
    piece, and how many are only by a tie."""
    tokens = [*prompt, *told]
    hidden = model.run(model.embed(mx.array([tokens[:-1]])))[:, len(prompt) - 1 :]
    wrong, ties = [], 0
    for start in range(0, len(told), _ROWS):
        rows = model.logits(hidden[:, start : start + _ROWS])[0]
        logits = np.array(rows.astype(mx.float32))
        for number, row in enumerate(logits, start):
            wanted = cast(int, choose(mx.array(row[None]), number).item())
            if told[number] != wanted:
                tie = abs(row[wanted] - row[told[number]]) < TIE
                ties += int(tie)
                wrong += [] if tie else [number]
    return wrong, ties
