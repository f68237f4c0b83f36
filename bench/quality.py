"""Which of the two models predicts, writes and answers better, and by how much?

A self-merge runs more layers than its source, and more layers are no promise: nothing was
trained. So everything is measured side by side, over one copy of the weights:

- *Perplexity*, exp of the mean negative log-likelihood a token: how well English prose is
  predicted. Strided and sliding windows (bench/likelihood.py) of 512 and of 2048 tokens. Lower is
  better. Differences are in nats a token: 0.1 is 10% of perplexity. `--text-tokens` are run of each
  text, for each length.
- *KL and agreement*: how far B's next-token distribution is from A's, and how often both would
  write the same token. They say how different two models are, not which is better. The same for
  each model against itself in 8 and 4 bits, every matrix in groups of 64.
- *The sliding window*: loss by distance from the text's start, with the window and without. Inside
  it both are the same model. Beyond it, one sees its last tokens only, the other keeps all of the
  text, at positions it may never have been trained on. A model that has none is given one of 512.
- *Repetition* of greedy continuations (bench/repetition.py). Lower is better.
- *Accuracy*: questions with known answers, through lm-evaluation-harness (bench/harness.py). The
  default is small arithmetic; `--tasks arc_challenge,gsm8k,minerva_math` are the model card's
  claims, and need the hub.

Both models see the same tokens and questions, so only their paired difference gets an interval:
95%, bootstrapped over blocks of 32 tokens, over passages, or over questions (bench/bootstrap.py).
"""

from copy import copy
from dataclasses import replace
from itertools import product
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from bench import repetition
from bench.bootstrap import TOKENS, Values, interval, paired
from bench.likelihood import TEXTS, Ids, compare, figures, log_probs, losses, text_ids, windows
from bench.pair import Pair
from bench.quality_report import plots, text
from bench.suite import Effort, Results
from mlx_cerebrum import device
from mlx_cerebrum.decoding.decode import prefill_step
from mlx_cerebrum.errors import CerebrumError, RequestError
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.memory import Workload, require
from mlx_cerebrum.model.tensors import matrix_shapes
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights.checkpoint import FLOATS
from mlx_cerebrum.weights.quantize import Packing, matrix_bytes
from mlx_cerebrum.weights.storage import DTYPES

__all__ = ["measure", "plots", "text"]

CONTEXTS = (512, 2048)
BITS, GROUP = (8, 4), 64
WINDOW = 512  # for a model that has none
SPAN = 4  # windows of text, where there is so much
Models = tuple[Model, Model]


def measure(pair: Pair, effort: Effort) -> Results:
    """Everything above. Raises a CerebrumError for a model without a tokenizer, or text."""
    tokenizer = pair.opened.tokenizer
    start: Ids = []
    texts: dict[str, Ids] = {}
    for file in effort.texts or TEXTS:
        start, texts[file.stem] = text_ids(tokenizer, file)
    shortest = CONTEXTS[0]
    longest = max(texts, key=lambda name: len(texts[name]))
    if min(effort.text_tokens, len(texts[longest])) < shortest:
        raise RequestError(
            f"quality needs a text, and --text-tokens, of at least {shortest} tokens"
        )
    models = pair.models()
    results: Results = {
        "names": list(pair.names),
        "positions": [model.config.num_positions for model in models],
        "accuracy": _accuracy(pair, tokenizer, effort),
        "perplexity": [],
        "skipped": [],
    }
    for context, name in product(CONTEXTS, texts):
        # An odd number: the last one is strided too.
        count = (effort.text_tokens // context - 1) // 2 * 2 + 1
        chosen = windows(start, texts[name], context, max(0, count))
        too_long = context > models[0].config.max_position_embeddings
        quick = context == shortest or name == longest or device.on_gpu()
        if too_long or not chosen or not quick:
            results["skipped"].append(f"{name} at {context}")
            continue
        effort.say(f"quality: {name}, {len(chosen)} windows of {context} tokens")
        found = [_compared(*models, each) for each in chosen]
        half = (len(chosen[0]) - len(start)) // 2
        results["perplexity"].append(
            {
                "text": name,
                "context": context,
                "windows": len(chosen),
                "strided": figures(found[::2]),
                "sliding": figures([each[:, -half:] for each in found]),
            }
        )
    effort.say("quality: beyond the window")
    try:
        results["window"] = {"text": longest} | beyond(models, start, texts[longest])
    except CerebrumError as error:  # what can't be measured costs the rest nothing
        results["window"] = {"not_measured": str(error)}
    effort.say(f"quality: greedy continuations of {repetition.TOKENS} tokens")
    results["repetition"] = repetition.measure(models, tokenizer, start, texts)
    count = max(1, effort.text_tokens // 4 // shortest)  # of each: they are read by four models
    some = [w for ids in texts.values() for w in windows(start, ids, shortest, 2 * count - 1)[::2]]
    results["quantization"] = quantization(pair, some, effort)
    return results


def _compared(a: Model, b: Model, window: Ids) -> Values:
    return compare(log_probs(a, window[:-1]), log_probs(b, window[:-1]), window)


def with_window(model: Model, window: int | None) -> Model:
    """A view of the same weights whose every position sees `window` tokens, None: all."""
    view = model.view(model.config.layer_map, model.config.residual_scales)
    view.config = replace(view.config, sliding_window=window)
    return view


def beyond(models: Models, start: Ids, ids: Ids) -> Results:
    """Loss by distance from the text's start, in steps of half a window, of both models.

    Raises RequestError for a text that ends within the window, MemoryBudgetError where the cache
    without a window doesn't fit.
    """
    own = models[0].config.sliding_window
    window = own or WINDOW
    reach = min(SPAN * window, models[0].config.max_position_embeddings, len(start) + len(ids))
    if reach < 1.5 * window:
        raise RequestError(
            f"a text of {reach} tokens says too little about what lies beyond a window of {window}"
        )
    (chosen,) = windows(start, ids, reach, 1)
    results: Results = {"window": window, "own": own is not None, "tokens": len(chosen)}
    for side, model in zip("ab", models, strict=True):
        bound, free = with_window(model, window), with_window(model, None)
        request = Workload(free.config, model.dtype.size, len(chosen), 1, prefill_step())
        require(request.cache_bytes, f"a cache for {len(chosen)} tokens", "give a shorter text")
        results[side] = _bins(losses(bound, chosen), losses(free, chosen), window // 2)
    return results


def _bins(bound: Values, free: Values, step: int) -> list[Results]:
    """Value k is the loss of token k + 1."""
    rows = []
    for first in range(0, len(bound), step):
        part = slice(max(0, first - 1), first + step - 1)
        if first and len(bound[part]) < step // 2:
            break
        rows.append(
            {
                "from": first,
                "to": min(first + step, len(bound) + 1),
                "with": interval(bound[part], block=TOKENS).as_json(),
                "without": interval(free[part], block=TOKENS).as_json(),
                "difference": paired(free[part], bound[part], block=TOKENS).as_json(),
            }
        )
    return rows


def quantization(pair: Pair, chosen: list[Ids], effort: Effort) -> Results:
    """Each side in 8 and 4 bits against itself as loaded; or why that would say nothing."""
    storage = pair.storage()
    if pair.packing or (any(storage.packings.values()) and not storage.dequantize):
        return {"not_measured": "the weights are packed; give the dense model, without --q-bits"}
    rows: list[Results] = []
    for bits in BITS:
        effort.say(f"quality: {bits}-bit weights on {len(chosen)} windows")
        try:
            packed = repacked_models(pair, Packing(bits, GROUP))
        except CerebrumError as error:
            rows.append({"bits": bits, "not_measured": str(error)})
            continue
        for side, model, other in zip("ab", pair.models(), packed, strict=True):
            found = figures([_compared(model, other, each) for each in chosen])
            rows.append({"bits": bits, "side": side} | found)
    return {"group": GROUP, "tokens": sum(len(each) - 1 for each in chosen), "rows": rows}


def repacked_models(pair: Pair, packing: Packing) -> Models:
    """Both sides over a copy of the weights in fewer bits. Raises MemoryBudgetError."""
    a, b = pair.models()
    held = packing if device.on_gpu() else None
    shapes = matrix_shapes(a.config).values()
    nbytes = sum(matrix_bytes(shape, held, a.dtype.size) for shape in shapes)
    require(nbytes, f"a copy of the weights in {packing}", "free some memory")
    first: Model = _repacked(a, packing, DTYPES[FLOATS[pair.checkpoint().weight_dtype]])
    mx.eval(first.parameters())
    return first, first.view(b.config.layer_map, b.config.residual_scales)


def _repacked(module: Any, packing: Packing, dtype: mx.Dtype) -> Any:
    """A copy of a module tree, its matrices packed with scales of `dtype`, and all else shared.

    Where products of packed matrices are slow (the CPU backend: 30 times) they are made dense
    again: the same numbers.
    """
    if isinstance(module, list):
        return [_repacked(child, packing, dtype) for child in module]
    if not isinstance(module, nn.Module):
        return module
    if isinstance(module, (nn.Linear, nn.Embedding)):
        if not packing.fits(module.weight.shape[-1]):
            return module
        if device.on_gpu():
            return module.to_quantized(packing.group_size, packing.bits)
        dense, packed = copy(module), packing.quantize(module.weight.astype(dtype))
        dense.weight = packing.dequantize(packed, module.weight.dtype)
        return dense
    copied = copy(module)
    for name, child in module.items():
        copied[name] = _repacked(child, packing, dtype)
    return copied


def _accuracy(pair: Pair, tokenizer: Tokenizer, effort: Effort) -> Results:
    from bench import harness

    if not harness.installed():
        return {"not_measured": f"lm-evaluation-harness is not installed: {harness.INSTALL}"}
    tasks, missing = [], []
    for task in dict.fromkeys(effort.tasks) or ("",):  # "": the harness picks
        asked = (task,) if task else (), effort.task_dir, effort.limit, effort.say
        found = []
        try:
            for name, model in zip(pair.names, pair.models(), strict=True):
                effort.say(f"quality: questions {f'of {task} ' if task else ''}to {name}")
                found.append(harness.evaluate(model, tokenizer, *asked))
        except CerebrumError as error:  # a task that can't be had costs the others nothing
            missing.append({"task": task, "not_measured": str(error)})
            continue
        a, b = found
        tasks += [_answers(name, m, a[name][m], b[name][m]) for name in a for m in a[name]]
    if not tasks:
        return {"not_measured": "; ".join(one["not_measured"] for one in missing)}
    return {"tasks": tasks, "missing": missing}


def _answers(task: str, metric: str, a: list[float], b: list[float]) -> Results:
    """One metric of one task: means, and the questions only one of the two did better on."""
    return {
        "task": task,
        "metric": metric,
        "questions": len(a),
        "a": sum(a) / len(a),
        "b": sum(b) / len(b),
        "only_a": sum(x > y for x, y in zip(a, b, strict=True)),
        "only_b": sum(y > x for x, y in zip(a, b, strict=True)),
        "difference": paired(a, b).as_json(),
    }
