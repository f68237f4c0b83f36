"""What the second model costs in time: prefill, decode, first token, from one set of weights.

Generating has two phases with different limits. *Prefill* runs the whole prompt through the
model at once, in large matrix products: bound by arithmetic. *Decode* runs one token at a
time and reads every weight it uses for it: bound by memory bandwidth. So for each side the
bytes a token reads are counted, and its pace times these bytes, over the bandwidth measured on
this machine, says how near decoding is to its ceiling. What is missing to 1 is work around the
weights: kernels to launch, attention, Python.

Folding saves memory, not bandwidth: a block that runs twice is read twice. So B is expected
to decode at bytes(A) / bytes(B) of A's pace, and the ratio measured stands beside it.

*Time to first token* is what a person waits after the prompt is known; *process start* is
what a person waits after pressing return, with the files in the page cache.

Both sides run over one copy of the weights, in turns; a ratio is taken round by round. Long
prompts get fewer rounds on a slow machine, or are left out; the tables say which.
"""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import mlx.core as mx

from bench import bandwidth, process
from bench.engines import prompt_ids
from bench.pair import Pair, Side
from bench.plots import Picture, curves
from bench.report import Spread, ratio, rounds, table
from bench.roofline import roofline
from bench.suite import Effort, Results
from mlx_cerebrum.decoding.decode import generate_step
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.memory import GB

LENGTHS = (128, 512, 2048, 8192)
_PATIENCE = 6  # times settings.seconds: a longer round is not run
QUESTION = "The capital of France is"


def measure(pair: Pair, settings: Effort, lengths: Sequence[int] = LENGTHS) -> Results:
    """A prompt longer than the model has positions for, and one token, is cut to them."""
    # Whole processes first, while this one holds no weights beside them.
    start = _start(pair, settings)
    models = dict(zip(pair.names, pair.models(), strict=True))
    most = next(iter(models.values())).config.max_position_embeddings
    lengths = list(dict.fromkeys(min(length, most - 1) for length in lengths))
    prompt = prompt_ids(pair.checkpoint(), max(lengths))

    seconds: dict[int, dict[str, list[float]]] = {}
    left_out: dict[str, float] = {}
    for length in lengths:
        expected = _expected(
            {n: sum(f[-1] for f in s.values()) for n, s in seconds.items()}, length
        )
        if expected > _PATIENCE * settings.seconds:
            left_out[str(length)] = expected
            continue
        settings.say(f"prefill of {length} tokens")
        sides = {name: partial(_first, model, prompt[:length]) for name, model in models.items()}
        warm = expected < settings.seconds / 2
        seconds[length] = rounds(sides, settings.rounds, seconds=settings.seconds, warm=warm)
    lengths = list(seconds)

    settings.say(f"decoding {settings.tokens} tokens")
    short = prompt[: lengths[0]]
    decoders = {n: partial(_decode, m, short, settings.tokens) for n, m in models.items()}
    paces = rounds(decoders, settings.rounds, seconds=2 * settings.seconds)

    settings.say("memory bandwidth")
    ceiling = bandwidth.card(next(iter(models.values())).dtype)
    context = lengths[0] + settings.tokens // 2
    a, b = pair.names
    return {
        "names": [a, b],
        "lengths": lengths,
        "left_out": left_out,
        "tokens": settings.tokens,
        "prompt_tokens": lengths[0],
        "bandwidth": ceiling,
        "sides": {
            name: {
                "prefill": {str(n): _spread([n / s for s in seconds[n][name]]) for n in lengths},
                "ttft": {str(n): _spread(seconds[n][name]) for n in lengths},
                "decode": _spread(paces[name]),
                "start": _spread(start[name]) if start else None,
                **_ceiling(model, context, Spread.of(paces[name]).median, ceiling),
            }
            for name, model in models.items()
        },
        "ratios": {
            "prefill": {str(n): ratio(seconds[n][a], seconds[n][b]).as_json() for n in lengths},
            "decode": ratio(paces[b], paces[a]).as_json(),
            "start": ratio(start[b], start[a]).as_json() if start else None,
        },
    }


def _expected(took: Mapping[int, float], length: int) -> float:
    """Seconds that `length` tokens should take after what shorter prompts took.

    Matrix products grow with the length, attention with its square.
    """
    if len(took) < 2:
        return 0.0
    (n, first), (m, second) = list(took.items())[-2:]
    square = max(0.0, (second / m - first / n) / (m - n))
    return length * (second / m + square * (length - m))


def _first(model: Model, prompt: Sequence[int]) -> float:
    """Seconds until the first token after `prompt`."""
    started = time.perf_counter()
    next(generate_step(prompt, model, max_tokens=1))
    took = time.perf_counter() - started
    mx.clear_cache()
    return took


def _decode(model: Model, prompt: Sequence[int], tokens: int) -> float:
    """Tokens a second after the first."""
    steps = generate_step(prompt, model, max_tokens=tokens)
    next(steps)
    started = time.perf_counter()
    for _ in steps:
        pass
    return (tokens - 1) / (time.perf_counter() - started)


def _start(pair: Pair, settings: Effort) -> dict[str, list[float]] | None:
    """Seconds of whole processes that print one token; None for a model without text."""
    if pair.tokenizer() is None:
        return None
    settings.say("process start to first token")
    pair.release()

    def run(side: Side) -> float:
        asked = ["--prompt", QUESTION, "--raw", "--max-tokens", "1", "--quiet"]
        flags = pair.flags(side, settings.work)
        return process.seconds(["mlx_cerebrum.generate", *flags, *asked])

    sides = {side.name: partial(run, side) for side in pair.sides}
    return rounds(sides, settings.rounds, seconds=settings.seconds)


def _ceiling(model: Model, context: int, pace: float, ceiling: dict[str, Any]) -> Results:
    """Bytes a token reads, and the share of each bandwidth that the pace makes of it."""
    nbytes = bandwidth.token_bytes(model, context)
    reached = pace * nbytes / GB
    published = ceiling["published"]
    return {
        "bytes_per_token": nbytes,
        "reached": reached,
        "share": {
            "measured": reached / max(ceiling["measured"].values()),
            # Of two figures for one chip's name, the larger: no more than this is claimed.
            "published": reached / max(published) if published else None,
        },
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return Spread.of(values).as_json() | {"rounds": len(values)}


def text(results: Results) -> list[str]:
    a, b = results["names"]
    sides, ratios = results["sides"], results["ratios"]

    def row(label: str, digits: int, find: Any, share: dict[str, float] | None) -> list[str]:
        cells = [Spread.read(find(sides[name])).text(digits) for name in (a, b)]
        return [label, *cells, Spread.read(share).text(2) if share else "", _rounds(find(sides[a]))]

    rows = []
    for n in map(str, results["lengths"]):
        find = partial(lambda side, n: side["prefill"][n], n=n)
        rows.append(row(f"prefill of {n}, tokens/s", 1, find, ratios["prefill"][n]))
    for n in map(str, results["lengths"]):
        find = partial(lambda side, n: side["ttft"][n], n=n)
        rows.append(row(f"first token after {n}, s", 2, find, None))
    rows.append(row("decode, tokens/s", 2, lambda side: side["decode"], ratios["decode"]))
    if ratios["start"]:
        start = row("process start to first token, s", 2, lambda s: s["start"], ratios["start"])
        rows.append(start)
    return [
        f"Both models over one copy of the weights. Median (lowest-highest) of rounds in turns;"
        f" decode: {results['tokens']} tokens after a prompt of {results['prompt_tokens']}.",
        table(["", a, b, f"{b} / {a}", "rounds"], rows),
        *_left_out(results["left_out"]),
        _roofline_text(results),
    ]


def _left_out(found: dict[str, float]) -> list[str]:
    return [
        f"Left out: {n} tokens, which would take both sides some {expected:.0f} s a round"
        f" (--seconds {expected / _PATIENCE:.0f} measures it)."
        for n, expected in found.items()
    ]


def _rounds(found: dict[str, float]) -> str:
    return str(found["rounds"])


def _roofline_text(results: Results) -> str:
    a, b = results["names"]
    sides = results["sides"]
    measured = results["bandwidth"]["measured"]
    rows = [
        ["read a token, GB", *(f"{sides[n]['bytes_per_token'] / GB:.3f}" for n in (a, b))],
        ["reached, GB/s", *(f"{sides[n]['reached']:.2f}" for n in (a, b))],
        ["share of the measured ceiling", *(_share(sides[n], "measured") for n in (a, b))],
    ]
    published = results["bandwidth"]["published"]
    if published:
        rows.append(["share of the published", *(_share(sides[n], "published") for n in (a, b))])
    expected = sides[a]["bytes_per_token"] / sides[b]["bytes_per_token"]
    figure = f" Published: {' or '.join(f'{f:g}' for f in published)} GB/s." if published else ""
    return (
        table(["the roofline of decoding", a, b], rows)
        + f"\n\nMeasured here: a matrix-vector product reads {measured['matvec']:.1f} GB/s, a copy"
        f" moves {measured['copy']:.1f} GB/s; the ceiling is the larger.{figure} From bytes alone"
        f" {b} should decode at {expected:.2f} of {a}'s pace;"
        f" measured {results['ratios']['decode']['median']:.2f}."
    )


def _share(side: Results, which: str) -> str:
    return f"{side['share'][which]:.0%}"


def plots(results: Results, machine: Results) -> dict[str, Picture]:
    a, b = results["names"]
    sides = results["sides"]
    prefill = {
        name: [(float(n), Spread.read(sides[name]["prefill"][n])) for n in sides[name]["prefill"]]
        for name in (a, b)
    }
    band = results["bandwidth"]
    ceilings = {f"measured {kind}": value for kind, value in band["measured"].items()}
    if band["published"]:
        ceilings[f"{band['chip']}, published"] = max(band["published"])
    points = {
        name: (sides[name]["bytes_per_token"], Spread.read(sides[name]["decode"]))
        for name in (a, b)
    }
    return {
        "speed-prefill": curves(
            prefill,
            f"Prefill pace of {a} and {b} over the prompt's length.",
            x="prompt tokens",
            y="tokens/s",
            title="Prefill: prompt tokens read a second",
        ),
        "speed-roofline": roofline(
            ceilings,
            points,
            f"Decode pace of {a} and {b} against bytes read a token, under the bandwidth's limit.",
        ),
    }
