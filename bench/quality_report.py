"""The quality suite's tables and pictures, from its results alone."""

import math
from typing import Any

from bench import verdict
from bench.bootstrap import Interval
from bench.plots import Picture, curves, intervals
from bench.report import Spread, table
from bench.suite import Results

NATS = "nats a token"


def text(results: Results) -> list[str]:
    """The verdict first, then what it rests on."""
    names = dict(zip("ab", results["names"], strict=True))
    # From the figures, not results["verdict"]: a page drawn again follows the rule as it is now.
    parts = verdict.text(verdict.rows(results), results["names"], results["positions"])
    parts += _apart(results) + _repetition(results["repetition"])
    parts += _accuracy(results["accuracy"], names)
    parts += _quantization(results["quantization"], names)
    return parts + _window(results["window"], names)


def _apart(results: Results) -> list[str]:
    rows = []
    for one in results["perplexity"]:
        found = one["strided"]
        rows.append(
            [
                f"{one['text']}, {one['context']}",
                str(found["tokens"]),
                str(one["sliding"]["tokens"]),
                _interval(found["kl"]),
                _percent(found["agreement"]),
            ]
        )
    skipped = ", ".join(results["skipped"])
    header = ["text, window", "strided tokens", "sliding tokens", "KL(A to B), nats", "same token"]
    return [
        "Strided windows do not overlap and score every token, the first ones with hardly any"
        " context: biased upwards. Sliding windows advance by half and score their second half:"
        " less biased, at twice the cost."
        + (
            f" Not measured: {skipped} (longer than the text, its --text-tokens or the model's"
            " positions; and on a CPU only one text is read at length)."
            if skipped
            else ""
        ),
        "How far apart the two are, whichever is better: KL divergence of B's next-token"
        " distribution from A's, and how often both have the same most likely token (strided).",
        table(header, rows),
    ]


def _repetition(found: Results | None) -> list[str]:
    if found is None:
        return ["Repetition: not measured, the texts are too short."]
    a, b = found["ended"]
    return [
        f"Repetition: greedy continuations of {found['passages']} passages of"
        f" {found['passage_tokens']} tokens, {found['new_tokens']} new tokens each. The text's own"
        f" continuations repeat {100 * found['text']:.1f}% of their 4-grams. Ended by themselves:"
        f" {a} of A's, {b} of B's."
    ]


def _accuracy(found: Results, names: dict[str, str]) -> list[str]:
    if "not_measured" in found:
        return [f"Accuracy: not measured. {found['not_measured']}"]
    rows = [
        [
            f"{one['task']}, {one['metric']}",
            str(one["questions"]),
            *(f"{100 * one[side]:.1f}%" for side in "ab"),
            str(one["only_a"]),
            str(one["only_b"]),
        ]
        for one in found["tasks"]
    ]
    missing = [
        f"{one['task']}: not measured. {one['not_measured']}" for one in found.get("missing", [])
    ]
    header = ["task", "questions", f"A: {names['a']}", f"B: {names['b']}", "only A", "only B"]
    return [
        "Accuracy, zero-shot in the model's own chat template. What counts are the questions"
        " that only one of the two gets right (or more right):",
        table(header, rows),
        *missing,
    ]


def _quantization(found: Results, names: dict[str, str]) -> list[str]:
    if "not_measured" in found:
        return [f"Quantization: not measured. {found['not_measured']}"]
    noise = found.get("noise", [])
    rows = [_cells(one, names, f"as loaded, by {one['step']}") for one in noise]
    missing = []
    for one in found["rows"]:
        if "not_measured" in one:
            missing.append(f"{one['bits']} bits: not measured. {one['not_measured']}")
        else:
            rows.append(_cells(one, names, f"{one['bits']} bits"))
    header = ["", "perplexity as loaded", "quantized", NATS, "KL from as loaded", "same token"]
    lead = (
        f"Quantized in groups of {found['group']}, embedding and head too, against the weights as"
        f" loaded, on {found['tokens']} tokens (strided). Where the checkpoint is packed already,"
        " the reference is its exact dequantized form."
        + (
            " The first rows are the weights as loaded against themselves, read in chunks of"
            f" {noise[0]['step']} tokens: what rounding to 16 bits does alone."
            if noise
            else ""
        )
    )
    return [lead, *([table(header, rows)] if rows else []), *missing]


def _cells(one: Results, names: dict[str, str], form: str) -> list[str]:
    return [
        f"{one['side'].upper()}: {names[one['side']]}, {form}",
        f"{math.exp(one['loss_a']):.2f}",
        f"{math.exp(one['loss_b']):.2f}",
        _interval(one["difference"], sign=True),
        _interval(one["kl"], 4),
        _percent(one["agreement"]),
    ]


def _window(found: Results, names: dict[str, str]) -> list[str]:
    if "not_measured" in found:
        return [f"Beyond the sliding window: not measured. {found['not_measured']}"]
    window = found["window"]
    own = (
        "the model's own"
        if found["own"]
        else "given to it for this: the model has none, and says little about one trained with it"
    )
    rows = []
    for pair in zip(found["a"], found["b"], strict=True):
        row = [f"{pair[0]['from']} to {pair[0]['to'] - 1}"]
        for one in pair:
            row += [f"{one[form]['value']:.3f}" for form in ("with", "without")]
            row.append(_interval(one["difference"], sign=True))
        rows.append(row)
    columns = [f"{side}, {form}" for side in "AB" for form in ("with", "without", "difference")]
    return [
        f"Beyond the sliding window: {found['tokens']} tokens of {found['text']} in one pass, with"
        f" a window of {window} tokens ({own}) and without. Loss in {NATS}, with the 95% interval"
        f" of the difference; up to token {window} both are the same."
        f" A is {names['a']}, B is {names['b']}.",
        table(["tokens", *columns], rows),
    ]


def plots(results: Results, machine: Results) -> dict[str, Picture]:
    """Differences in nats, differences in points, and loss by distance."""
    a, b = results["names"]
    drawn = {}
    for name, kinds, unit, scale in (
        ("quality-perplexity", ("perplexity",), f"{NATS}; left is better for {b}", 1.0),
        ("quality-answers", ("accuracy", "repetition"), "percentage points", 100.0),
    ):
        rows = [one for one in verdict.rows(results) if one["kind"] in kinds]
        if rows:
            drawn[name] = _differences(rows, a, b, unit, scale)
    if "not_measured" not in results["window"]:
        drawn["quality-window"] = _by_distance(results["window"], {"a": a, "b": b})
    return drawn


def _differences(rows: list[Any], a: str, b: str, unit: str, scale: float) -> Picture:
    shown = []
    for one in rows:
        found = Interval.from_json(one["difference"])
        value, low, high = (scale * x for x in (found.value, found.low, found.high))
        shown.append((_label(one), value, low, high))
    title = f"{b} minus {a}"

    each = "; ".join(f"{label} {value:+.2f}" for label, value, _, _ in shown)
    alt = f"{title} in {unit.partition(';')[0]}, with 95% intervals: {each}."
    return intervals(shown, alt, x=unit, title=title)


def _label(one: Any) -> str:
    """The measure, and which way is better where a picture mixes both."""
    if one["kind"] == "perplexity":
        return str(one["measure"]).removeprefix("perplexity, ")
    side = "right" if verdict.MORE_IS_BETTER[one["kind"]] else "left"
    return f"{one['measure']} ({side} is better)"


def _by_distance(found: Results, names: dict[str, str]) -> Picture:
    series = {}
    for side, name in names.items():
        for form in ("with", "without"):
            points = []
            for one in found[side]:
                x = Interval.from_json(one[form])
                middle = (one["from"] + one["to"]) / 2
                points.append((middle, Spread(x.value, x.low, x.high)))
            series[f"{name}, {form} window"] = points
    window = found["window"]

    past = " ".join(
        f"Past {window} tokens the window changes {name}'s loss by"
        f" {_past(found[side], window):+.3f} {NATS}."
        for side, name in names.items()
    )
    alt = f"Loss by token position with a window of {window} tokens and without. {past}"
    return curves(
        series,
        alt,
        x="token of the text",
        y=NATS,
        title="Loss by distance from the start",
        log_x=False,
        line=window,
    )


def _past(bins: list[Any], window: int) -> float:
    """The mean difference over the tokens past the window."""
    past = [one for one in bins if one["from"] >= window]
    tokens = sum(one["to"] - one["from"] for one in past)
    return float(sum((o["to"] - o["from"]) * o["difference"]["value"] for o in past) / tokens)


def _interval(found: Results, digits: int = 3, sign: bool = False) -> str:
    return Interval.from_json(found).text(digits, sign)


def _percent(found: Results) -> str:
    return Interval.from_json(found).text(1, scale=100) + " %"
