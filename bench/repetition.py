"""Does a model repeat itself? Greedy continuations of passages, and what repeats in them.

A model whose next-token predictions are a little worse often shows it first in long greedy
answers: they fall into loops. Two figures for each continuation:

- *seq-rep-4*: the share of its 4-grams that it has had before, 1 - distinct / all (Welleck et al.
  2019, arXiv 1908.04319). Prose hardly repeats any; the text's own continuation stands beside.
- *loop*: whether it ends in one: its last three stretches of p tokens are the same, for some p
  up to a sixth of the tokens asked for, and those three make up at least 24 tokens (a shorter p
  must then repeat more often). A continuation that has ended by itself (EOS) is no loop.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from bench.bootstrap import interval, paired
from bench.likelihood import Ids
from bench.suite import Results
from mlx_cerebrum.decoding.decode import greedy
from mlx_cerebrum.decoding.decoder import Decoder
from mlx_cerebrum.decoding.generation import Generation
from mlx_cerebrum.decoding.sampling import Sampling
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer

PASSAGES = 16
LENGTH = 64  # tokens of a passage
TOKENS = 96  # new ones
LEAST = 24  # tokens of a loop


def passages(texts: Mapping[str, Ids], new: int = TOKENS) -> list[tuple[Ids, Ids]]:
    """PASSAGES stretches of LENGTH tokens spread over the texts, each with what follows it.

    Fewer where the texts are short: no two overlap, continuations included.
    """
    found = []
    for ids in texts.values():
        count = min(PASSAGES // len(texts), len(ids) // (LENGTH + new))
        for first in (k * (len(ids) // count) for k in range(count)):
            end = first + LENGTH
            found.append((ids[first:end], ids[end : end + new]))
    return found


def continuations(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Ids],
    most: int | list[int],
    draw: Sampling | None = None,
) -> list[Ids]:
    """Continuations by `most` tokens, many at once: greedy, or each drawn like `draw` with a seed
    of its own, counted from `draw`'s. None holds an end token."""
    draws = [draw and replace(draw, seed=(draw.seed or 0) + i) for i in range(len(prompts))]
    decoder, limits = Decoder(), [most] * len(prompts) if isinstance(most, int) else most
    writing = [
        Generation(model, list(ids), model.make_cache(), limit, own.sampler() if own else greedy)
        for ids, limit, own in zip(prompts, limits, draws, strict=True)
    ]
    found = {generation: list[int]() for generation in writing}
    for generation in writing:
        decoder.add(generation)
    while writing:
        for generation, tokens, _ in decoder.step():
            ends = [i for i, token in enumerate(tokens) if token in tokenizer.eos_token_ids]
            found[generation] += tokens[: ends[0]] if ends else tokens
            if ends or (tokens and not generation.left):
                decoder.leave(generation, keep=False)
                writing.remove(generation)
    return list(found.values())


def repeated(ids: Ids, n: int = 4) -> float:
    """seq-rep-n; 0 for fewer than n tokens."""
    grams = [tuple(ids[k : k + n]) for k in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def loops(ids: Ids, new: int = TOKENS) -> bool:
    """Whether a continuation of `new` tokens at most ends in a loop, as defined above."""
    for period in range(1, max(1, new // 6) + 1):
        tail = ids[-max(3 * period, LEAST) :]
        if len(tail) >= LEAST and tail[period:] == tail[:-period]:
            return len(ids) >= new
    return False


def measure(
    models: Sequence[Model], tokenizer: Tokenizer, start: Ids, texts: Mapping[str, Ids]
) -> Results | None:
    """Both models' figures over the passages, and B's minus A's. None for texts too short."""
    chosen = passages(texts)
    if not chosen:
        return None
    prompts = [start + passage for passage, _ in chosen]
    written = [continuations(model, tokenizer, prompts, TOKENS) for model in models]
    results: Results = {
        "passages": len(chosen),
        "passage_tokens": LENGTH,
        "new_tokens": TOKENS,
        "text": interval([repeated(rest) for _, rest in chosen]).value,
        "ended": [sum(len(ids) < TOKENS for ids in side) for side in written],
    }
    for name, figure in (("seq_rep_4", repeated), ("loops", loops)):
        a, b = ([float(figure(ids)) for ids in side] for side in written)
        results[name] = {
            "a": interval(a).as_json(),
            "b": interval(b).as_json(),
            "difference": paired(a, b).as_json(),
        }
    return results
