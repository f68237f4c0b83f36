"""Does a model repeat itself? Greedy continuations of passages, and what repeats in them.

A model whose next-token predictions are a little worse often shows it first in long greedy
answers: they fall into loops. Two figures for each continuation:

- *seq-rep-4*: the share of its 4-grams that it has had before, 1 - distinct / all (Welleck et al.
  2019, arXiv 1908.04319). Prose hardly repeats any; the text's own continuation stands beside.
- *loop*: whether it ends in one: its last three stretches of p tokens are the same, for some p
  up to a sixth of the tokens asked for, and those three make up at least 24 tokens (a shorter p
  must then repeat more often). A continuation that has ended by itself (EOS) is no loop.

All passages are equally long and run as one batch.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import mlx.core as mx

from bench import bootstrap
from mlx_cerebrum.decoding.decode import greedy
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.memory import Workload, require

PASSAGES = 16
LENGTH = 64  # tokens of a passage
TOKENS = 96  # new ones
LEAST = 24  # tokens of a loop

Ids = list[int]


def passages(texts: Mapping[str, Ids], new: int = TOKENS) -> list[tuple[Ids, Ids]]:
    """PASSAGES stretches of LENGTH tokens spread over the texts, each with what follows it.

    Fewer where the texts are short: no two overlap, continuations included.
    """
    found = []
    for ids in texts.values():
        count = min(PASSAGES // len(texts), len(ids) // (LENGTH + new))
        for k in range(count):
            first = k * (len(ids) // count)
            end = first + LENGTH
            found.append((ids[first:end], ids[end : end + new]))
    return found


def continuations(
    model: Model, prompts: Sequence[Ids], new: int, ends: Collection[int]
) -> list[Ids]:
    """Greedy continuations of equally long prompts, in one batch; none holds an end token.

    Raises MemoryBudgetError where the batch's cache does not fit.
    """
    length = len(prompts[0])
    request = Workload(model.config, model.dtype.size, length, new, length)
    needed = len(prompts) * request.cache_bytes
    require(needed, f"continuing {len(prompts)} passages at once", "free some memory")
    tokens, cache = mx.array(list(prompts), dtype=mx.int32), model.make_cache()  # [B, L]
    if length > 1:
        model(tokens[:, :-1], cache)
        mx.eval([c.state for c in cache])
    written: list[Ids] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    following = tokens[:, -1]
    for _ in range(new):
        following = greedy(model(following[:, None], cache)[:, -1])
        for row, token in enumerate(cast(list[int], following.tolist())):
            if row in going and token not in ends:
                written[row].append(token)
            else:
                going.discard(row)
        if not going:
            break
    mx.clear_cache()
    return written


def repeated(ids: Sequence[int], n: int = 4) -> float:
    """seq-rep-n; 0 for fewer than n tokens."""
    grams = [tuple(ids[k : k + n]) for k in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def loops(ids: Sequence[int], new: int = TOKENS) -> bool:
    """Whether a continuation of `new` tokens at most ends in a loop, as defined above."""
    if len(ids) < new:
        return False
    for period in range(1, max(1, new // 6) + 1):
        tail = ids[-max(3 * period, LEAST) :]
        if len(tail) >= LEAST and all(x == y for x, y in zip(tail, tail[period:], strict=False)):
            return True
    return False


def measure(
    models: Sequence[Model],
    start: Ids,
    texts: Mapping[str, Ids],
    ends: Collection[int],
    new: int = TOKENS,
) -> dict[str, Any] | None:
    """Both models' figures over the passages, and B's minus A's. None for texts too short."""
    chosen = passages(texts, new)
    if not chosen:
        return None
    prompts = [start + passage for passage, _ in chosen]
    written = [continuations(model, prompts, new, ends) for model in models]
    results: dict[str, Any] = {
        "passages": len(chosen),
        "passage_tokens": LENGTH,
        "new_tokens": new,
        "text": bootstrap.interval([repeated(rest) for _, rest in chosen]).value,
        "ended": [sum(len(ids) < new for ids in side) for side in written],
    }
    for name, figure in (("seq_rep_4", repeated), ("loops", lambda ids: float(loops(ids, new)))):
        a, b = ([figure(ids) for ids in side] for side in written)
        results[name] = {
            "a": bootstrap.interval(a).as_json(),
            "b": bootstrap.interval(b).as_json(),
            "difference": bootstrap.paired(a, b).as_json(),
        }
    return results
