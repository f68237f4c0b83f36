"""What the sliding window costs: loss by distance from the text's start, with it and without.

Inside the window both are the same model. Beyond it, a model with a window sees its last tokens
only (each layer's own; what came before reaches it through the layers below), while one without
keeps all of the text at the price of an ever larger cache, at positions it may never have been
trained on. One pass each over one text says which predicts better, and where.

Both forms are views of the same weights. A model without a window is given one of 512 for this.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from bench import bootstrap
from bench.likelihood import Values, losses, windows
from mlx_cerebrum.decoding.decode import prefill_step
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.memory import Workload, require

WINDOW = 512  # for a model that has none
SPAN = 4  # windows of text, where there is so much
BINS = 2  # a window


def with_window(model: Model, window: int | None) -> Model:
    """A view of the same weights whose every position sees `window` tokens, None: all."""
    view = model.view(model.config.layer_map, model.config.residual_scales)
    view.config = replace(view.config, sliding_window=window)
    return view


def text_window(model: Model, start: Sequence[int], ids: Sequence[int]) -> list[int]:
    """The beginning of a text, SPAN windows long or as far as text and model reach.

    Raises RequestError for a text that ends within the window.
    """
    window = model.config.sliding_window or WINDOW
    reach = min(SPAN * window, model.config.max_position_embeddings, len(start) + len(ids))
    if reach < 1.5 * window:
        raise RequestError(
            f"a text of {reach} tokens says too little about what lies beyond a window of {window}"
        )
    return windows(start, ids, reach, 1)[0]


def measure(
    models: Mapping[str, Model],
    chosen: Sequence[int],
    known: Mapping[str, Values],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Loss by distance of models "a" and "b". `known`: losses on `chosen` that are at hand.

    Raises MemoryBudgetError where the cache without a window doesn't fit.
    """
    own = models["a"].config.sliding_window
    window = own or WINDOW
    results: dict[str, Any] = {"window": window, "own": own is not None, "tokens": len(chosen)}
    past: dict[str, Values] = {}
    for name, model in models.items():
        open_model, bound = with_window(model, None), with_window(model, window)
        request = Workload(open_model.config, model.dtype.size, len(chosen), 1, prefill_step())
        require(request.cache_bytes, f"a cache for {len(chosen)} tokens", "give a shorter text")
        found = {}
        for form, view, as_is in (("with", bound, own), ("without", open_model, own is None)):
            if as_is and name in known:
                found[form] = known[name]
            else:
                say(f"quality: {len(chosen)} tokens of {name.upper()} {form} a window of {window}")
                found[form] = losses(view, chosen)
        results[name] = _bins(found["with"], found["without"], window)
        past[name] = found["with"][window - 1 :]
    if own:
        results["beyond"] = {
            "loss_a": float(past["a"].mean()),
            "loss_b": float(past["b"].mean()),
            "difference": bootstrap.paired(past["a"], past["b"], block=bootstrap.TOKENS).as_json(),
        }
    return results


def _bins(bound: Values, unbound: Values, window: int) -> list[dict[str, Any]]:
    """By half windows. Value k is the loss of token k + 1; it belongs to the window's k + 1."""
    step = window // BINS
    rows = []
    for first in range(0, len(bound), step):
        part = slice(max(0, first - 1), first + step - 1)
        if first and len(bound[part]) < step // 2:
            break
        block = bootstrap.TOKENS
        rows.append(
            {
                "from": first,
                "to": min(first + step, len(bound) + 1),
                "with": bootstrap.interval(bound[part], block=block).as_json(),
                "without": bootstrap.interval(unbound[part], block=block).as_json(),
                "difference": bootstrap.paired(unbound[part], bound[part], block=block).as_json(),
            }
        )
    return rows
