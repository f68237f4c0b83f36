"""Which of the two models predicts, writes and answers better, and by how much?

A self-merge runs more layers than its source, and more layers are no promise: nothing was
trained. So everything is measured side by side, over one copy of the weights:

- *Perplexity*, exp of the mean negative log-likelihood a token: how well English prose is
  predicted. Strided and sliding windows (bench/likelihood.py) of 512 and of 2048 tokens, and beyond
  the sliding window with it and without (bench/window_loss.py). Lower is better. Differences are
  in nats a token: 0.1 is 10% of perplexity. `--text-tokens` are run of each text, for each length.
- *KL and agreement*: how far B's next-token distribution is from A's, and how often both would
  write the same token. They say how different two models are, not which is better. The same for
  each model against itself in 8 and 4 bits (bench/quantized.py).
- *Repetition* of greedy continuations (bench/repetition.py). Lower is better.
- *Accuracy*: questions with known answers, through lm-evaluation-harness (bench/harness.py). The
  default is small arithmetic; `--tasks arc_challenge,gsm8k,minerva_math` are the model card's
  claims, and need the hub.

Both models see the same tokens and questions, so only their paired difference gets an interval:
95%, bootstrapped over blocks of 32 tokens, over passages, or over questions (bench/bootstrap.py).
The table names the better model only where that interval leaves 0 out, and for loops and answers a
sign test agrees (bench/verdict.py).
"""

from dataclasses import astuple
from itertools import product
from pathlib import Path
from typing import Any

from bench import quantized, repetition, verdict, window_loss
from bench.bootstrap import paired
from bench.likelihood import Comparison, compare, figures, keep, log_probs, windows
from bench.pair import Pair
from bench.perplexity import TEXTS, read, split
from bench.quality_report import plots, text
from bench.quantized import Reference
from bench.suite import Effort, Results
from mlx_cerebrum import device
from mlx_cerebrum.errors import CerebrumError, RequestError
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer

__all__ = ["measure", "plots", "text"]

CONTEXTS = (512, 2048)
Models = tuple[Model, Model]
Ids = list[int]
Known = dict[tuple[int, ...], Comparison]  # by the window's ids


def measure(pair: Pair, settings: Effort) -> Results:
    """Everything above. Raises RequestError for a model without a tokenizer, or without text."""
    tokenizer = pair.tokenizer()
    if tokenizer is None:
        raise RequestError("quality needs a trained model: this one has no tokenizer")
    start, texts = _texts(tokenizer, settings)
    quota, why_not = quantized.quota(pair, settings, len(texts), CONTEXTS[0])
    models = pair.models()
    results: Results = {
        "names": list(pair.names),
        "positions": [model.config.num_positions for model in models],
        "accuracy": _accuracy(pair, tokenizer, settings),
        "perplexity": [],
        "skipped": [],
    }
    known, references = _perplexity(models, start, texts, quota, settings, results)
    results["window"] = _window(models, start, texts, known, settings)
    settings.say(f"quality: greedy continuations of {repetition.TOKENS} tokens")
    results["repetition"] = repetition.measure(models, start, texts, tokenizer.eos_token_ids)
    noise = quantized.noise(models, references, settings)
    del models
    pair.release()  # quantized weights come in their place
    results["quantization"] = (
        quantized.measure(pair, references, settings) | {"noise": noise}
        if references
        else {"not_measured": why_not or "no text is long enough"}
    )
    results["verdict"] = verdict.rows(results)
    return results


def _texts(tokenizer: Tokenizer, settings: Effort) -> tuple[Ids, dict[str, Ids]]:
    """What every text begins with, and their ids by name. Raises RequestError for none."""
    start, texts = tokenizer.encode(""), {}
    for file in settings.texts or TEXTS:
        texts[file.stem] = split(tokenizer, read(file))[1]
    shortest = CONTEXTS[0]
    if settings.text_tokens < shortest or all(len(ids) < shortest for ids in texts.values()):
        raise RequestError(
            f"quality needs a text, and --text-tokens, of at least {shortest} tokens"
        )
    return start, texts


def _perplexity(
    models: Models,
    start: Ids,
    texts: dict[str, Ids],
    quota: int,
    settings: Effort,
    results: Results,
) -> tuple[Known, list[Reference]]:
    """Both models on windows of every length; the first `quota` strided ones of each text are
    what quantized weights will be compared on."""
    known: Known = {}
    references: list[Reference] = []
    longest = _longest(texts)
    for context, name in product(CONTEXTS, texts):
        # An odd number: the last one is strided too.
        count = (settings.text_tokens // context - 1) // 2 * 2 + 1
        chosen = windows(start, texts[name], context, max(0, count))
        too_long = context > models[0].config.max_position_embeddings
        quick = context == CONTEXTS[0] or name == longest or device.on_gpu()
        if too_long or not chosen or not quick:
            results["skipped"].append(f"{name} at {context}")
            continue
        settings.say(f"quality: {name}, {len(chosen)} windows of {context} tokens")
        found = []
        for k, window in enumerate(chosen):
            files = None
            if context == CONTEXTS[0] and k % 2 == 0 and k < 2 * quota:
                files = quantized.files(settings.work, len(references))
                references.append(Reference(window, files))
            found.append(_compare(models, window, files))
        known[tuple(chosen[0])] = found[0]
        half = (len(chosen[0]) - len(start)) // 2
        row = {"text": name, "context": context, "windows": len(chosen)}
        results["perplexity"].append(row | _ways(found, half))
    return known, references


def _longest(texts: dict[str, Ids]) -> str:
    return max(texts, key=lambda name: len(texts[name]))


def _compare(models: Models, window: Ids, files: tuple[Path, Path] | None) -> Comparison:
    """A and B on one window; their log-probabilities go into `files`, if there are any."""
    a, b = (log_probs(model, window[:-1]) for model in models)
    if files is not None:
        a, b = keep(a, files[0]), keep(b, files[1])
    return compare(a, b, window)


def _ways(found: list[Comparison], half: int) -> Results:
    """Strided: all of every second window. Sliding: of each window its last `half` tokens."""
    last = [Comparison(*(values[-half:] for values in astuple(each))) for each in found]
    return {"strided": figures(found[::2]), "sliding": figures(last)}


def _window(
    models: Models, start: Ids, texts: dict[str, Ids], known: Known, settings: Effort
) -> Results:
    """The longest text, on and on."""
    name = _longest(texts)
    try:
        chosen = window_loss.text_window(models[0], start, texts[name])
        same = known.get(tuple(chosen))
        losses = {"a": same.a, "b": same.b} if same else {}
        sides = dict(zip("ab", models, strict=True))
        found = window_loss.measure(sides, chosen, losses, settings.say)
    except CerebrumError as error:
        return {"text": name, "not_measured": str(error)}
    return {"text": name} | found


def _accuracy(pair: Pair, tokenizer: Tokenizer, settings: Effort) -> Results:
    from bench import harness

    if not harness.installed():
        return {"not_measured": f"lm-evaluation-harness is not installed: {harness.INSTALL}"}
    a: harness.Scores = {}
    b: harness.Scores = {}
    missing = []
    for task in dict.fromkeys(settings.tasks) or ("",):  # "": the harness picks
        asked = (task,) if task else (), settings.task_dir, settings.limit, settings.say
        found = []
        try:
            for name, model in zip(pair.names, pair.models(), strict=True):
                settings.say(f"quality: questions {f'of {task} ' if task else ''}to {name}")
                found.append(harness.evaluate(model, tokenizer, *asked))
        except CerebrumError as error:  # a task that can't be had costs the others nothing
            missing.append({"task": task, "not_measured": str(error)})
            continue
        a, b = a | found[0], b | found[1]
    if not a:
        return {"not_measured": "; ".join(one["not_measured"] for one in missing)}
    tasks = [_answers(task, m, a[task][m], b[task][m]) for task in a for m in a[task]]
    return {"tasks": tasks, "missing": missing}


def _answers(task: str, metric: str, a: list[float], b: list[float]) -> dict[str, Any]:
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
