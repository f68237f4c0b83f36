"""What the second model costs in time: prefill, decode, first token, from one set of weights.

*Prefill* runs the whole prompt through the model at once, in large matrix products: bound by
arithmetic. *Decode* runs one token at a time and reads every weight it uses for it: bound by
memory bandwidth. So a side's pace times the bytes a token reads, over the bandwidth measured on
this machine, says how near decoding is to its ceiling. What is missing to 1 is work around the
weights: kernels to launch, attention, Python.

Folding saves memory, not bandwidth: a block that runs twice is read twice. So B is expected
to decode at bytes(A) / bytes(B) of A's pace, and the ratio measured stands beside it.

*First token* is what a person waits after the prompt is known; *process start* after pressing
return, with the files in the page cache.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import mlx.core as mx

from bench import bandwidth, process
from bench.engines import prompt_ids, timed
from bench.pair import Pair, Side
from bench.plots import Picture, curves, number
from bench.report import Spread, ratio, rounds, table
from bench.suite import Effort, Results
from mlx_cerebrum.decoding.decoder import generate_step
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.memory import GB

LENGTHS = (128, 512, 2048, 8192)
_PATIENCE = 6  # times effort.seconds: a longer round is not run
QUESTION = "The capital of France is"


def measure(pair: Pair, effort: Effort, lengths: Sequence[int] = LENGTHS) -> Results:
    """A prompt longer than the model has positions for, and one token, is cut to them."""
    # Whole processes first, while this one holds no weights beside them.
    start = _start(pair, effort)
    models = dict(zip(pair.names, pair.models(), strict=True))
    first = pair.models()[0]
    most = first.config.max_position_embeddings - 1
    lengths = sorted({min(length, most) for length in lengths})
    prompt = prompt_ids(pair.checkpoint(), max(lengths))

    seconds: dict[int, dict[str, list[float]]] = {}
    left_out: dict[str, float] = {}
    took, before = 0.0, 1
    for length in lengths:
        expected = took * (length / before) ** 2  # at most: attention grows with the square
        if expected > _PATIENCE * effort.seconds:
            left_out[str(length)] = expected
            continue
        effort.say(f"prefill of {length} tokens")
        sides = {name: partial(_first, model, prompt[:length]) for name, model in models.items()}
        warm = not seconds  # after the first length every kernel has run
        seconds[length] = rounds(sides, effort.rounds, seconds=effort.seconds, warm=warm)
        took, before = sum(side[-1] for side in seconds[length].values()), length

    effort.say(f"decoding {effort.tokens} tokens")
    short = prompt[: lengths[0]]
    decoders = {n: partial(_decode, m, short, effort.tokens) for n, m in models.items()}
    paces = rounds(decoders, effort.rounds, seconds=2 * effort.seconds)

    effort.say("memory bandwidth")
    ceiling = bandwidth.card(first.dtype)
    a, b = pair.names
    return {
        "names": [a, b],
        "lengths": list(seconds),
        "left_out": left_out,
        "tokens": effort.tokens,
        "prompt_tokens": len(short),
        "bandwidth": ceiling,
        "sides": {
            name: {
                "prefill": {str(n): _spread([n / s for s in t[name]]) for n, t in seconds.items()},
                "ttft": {str(n): _spread(t[name]) for n, t in seconds.items()},
                "decode": _spread(paces[name]),
                "start": _spread(start[name]) if start else None,
                **_ceiling(model, len(short) + effort.tokens // 2, paces[name], ceiling),
            }
            for name, model in models.items()
        },
        "ratios": {
            "prefill": {str(n): ratio(t[a], t[b]).as_json() for n, t in seconds.items()},
            "decode": ratio(paces[b], paces[a]).as_json(),
            "start": ratio(start[b], start[a]).as_json() if start else None,
        },
    }


def _first(model: Model, prompt: Sequence[int]) -> float:
    """Seconds until the first token after `prompt`."""
    run = timed(generate_step(prompt, model, max_tokens=1), len(prompt))
    mx.clear_cache()
    return run.first


def _decode(model: Model, prompt: Sequence[int], tokens: int) -> float:
    """Tokens a second after the first."""
    return timed(generate_step(prompt, model, max_tokens=tokens), len(prompt)).decode_tps


def _start(pair: Pair, effort: Effort) -> dict[str, list[float]] | None:
    """Seconds of whole processes that print one token; None for a model without text."""
    if pair.tokenizer() is None:
        return None
    effort.say("process start to first token")
    pair.release()

    def run(side: Side) -> float:
        asked = ["--prompt", QUESTION, "--raw", "--max-tokens", "1", "--quiet"]
        flags = pair.flags(side, effort.work)
        return process.seconds(["mlx_cerebrum.generate", *flags, *asked])

    sides = {side.name: partial(run, side) for side in pair.sides}
    return rounds(sides, effort.rounds, seconds=effort.seconds)


def _ceiling(model: Model, context: int, paces: list[float], ceiling: Results) -> Results:
    """Bytes a token reads, and the share of each bandwidth that the pace makes of it."""
    nbytes = bandwidth.token_bytes(model, context)
    reached = Spread.of(paces).median * nbytes / GB
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
    sides, ratios = [results["sides"][name] for name in (a, b)], results["ratios"]
    band = results["bandwidth"]

    def row(label: str, digits: int, found: list[Results], share: Results | None) -> list[str]:
        cells = [Spread.read(one).text(digits) for one in found]
        over = Spread.read(share).text(2) if share else ""
        return [label, *cells, over, str(found[0]["rounds"])]

    lengths = [str(n) for n in results["lengths"]]
    prefill = {n: [side["prefill"][n] for side in sides] for n in lengths}
    first = {n: [side["ttft"][n] for side in sides] for n in lengths}
    decode, start = ([side[what] for side in sides] for what in ("decode", "start"))
    rows = [
        *(row(f"prefill of {n}, tokens/s", 1, prefill[n], ratios["prefill"][n]) for n in lengths),
        *(row(f"first token after {n}, s", 2, first[n], None) for n in lengths),
        row("decode, tokens/s", 2, decode, ratios["decode"]),
    ]
    if ratios["start"]:
        rows.append(row("process start to first token, s", 2, start, ratios["start"]))
    roof = [
        ["read a token, GB", *(f"{side['bytes_per_token'] / GB:.3f}" for side in sides)],
        ["reached, GB/s", *(f"{side['reached']:.2f}" for side in sides)],
        ["share of the measured ceiling", *(f"{side['share']['measured']:.0%}" for side in sides)],
    ]
    if band["published"]:
        shares = [f"{side['share']['published']:.0%}" for side in sides]
        roof.append([f"share of the published {max(band['published']):g} GB/s", *shares])
    expected = sides[0]["bytes_per_token"] / sides[1]["bytes_per_token"]
    return [
        f"Both models over one copy of the weights. Median (lowest-highest) of rounds in turns;"
        f" decode: {results['tokens']} tokens after a prompt of {results['prompt_tokens']}.",
        table(["", a, b, f"{b} / {a}", "rounds"], rows),
        *(
            f"Left out: {n} tokens, by estimate {seconds:.0f} s a round of both sides (--seconds"
            f" {seconds / _PATIENCE:.0f} measures it)."
            for n, seconds in results["left_out"].items()
        ),
        table(["the roofline of decoding", a, b], roof),
        f"The measured ceiling is {max(band['measured'].values()):.1f} GB/s. From bytes alone {b}"
        f" should decode at {expected:.2f} of {a}'s pace; measured"
        f" {ratios['decode']['median']:.2f}.",
    ]


def plots(results: Results, machine: Results) -> dict[str, Picture]:
    a, b = results["names"]
    sides, band = results["sides"], results["bandwidth"]
    prefill = {
        name: [(float(n), Spread.read(found)) for n, found in sides[name]["prefill"].items()]
        for name in (a, b)
    }
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


def roofline(
    ceilings: Mapping[str, float], points: Mapping[str, tuple[float, Spread]], alt: str
) -> Picture:
    """Decode pace over bytes read a token, under the slanted lines bandwidth / bytes.

    `ceilings` in GB/s; `points` are (bytes a token, tokens/s). Nothing can be above a line that
    is true of its machine.
    """
    series = {
        f"{name}: {number(pace.median)} tokens/s": [(float(f"{size / GB:.3g}"), pace)]
        for name, (size, pace) in points.items()
    }
    places = [place for ((place, _),) in series.values()]
    for name, gbs in ceilings.items():
        roof = [(x, Spread.of([gbs / x])) for x in (min(places) / 2, max(places) * 2)]
        series[f"{name}: {number(gbs)} GB/s"] = roof
    title = "Decode under the bandwidth's roof"
    return curves(series, alt, x="GB read a token", y="tokens/s", title=title, log_y=True)
