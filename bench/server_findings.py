"""What a load of the server comes to: errors, waits, memory, what must hold; and in words."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from statistics import fmean, median
from typing import Any

import numpy as np

from bench.report import table
from bench.server_client import Count, Heard, Question
from bench.server_mix import POLITE

SLOPE = 1.0  # MB a minute at most, from minute 2
SETTLE = 1.0  # seconds until nothing is queued or decoded any more
SPARE_FILES = 4  # what a log, a resolver or the like may open meanwhile
_SIZES = {  # prompt tokens: from, below
    "all": (0, math.inf),
    "prompts under 64 tokens": (0, 64),
    "64 to 511": (64, 512),
    "512 and more": (512, math.inf),
}
_FIGURES = {
    "tokens of polite prompts / known from earlier ones / of answers": (
        "{tokens[prompt]} / {tokens[cached]} / {tokens[completion]}"
    ),
    "tokens of these answers a second / of all answers, by the server's count": (
        "{tokens_per_second:.1f} / {generated_per_second:.1f}"
    ),
    "answers of 429, after which a client waited": "{busy}",
    "questions asked alone, and then in company to the same text": "{fixed[same]}",
    "to another text": "{others}",
    "clients that hung up": "{left}",
    "statuses of malformed bodies": "{refusals}",
    "after all hung up at once, s: queued / being decoded": (
        "{settled[seconds]:.2f}: {settled[queued]:.0f} / {settled[active]:.0f}"
    ),
    "resident, MB: at the start / most / in the end": (
        "{mb[start]:.0f} / {mb[peak]:.0f} / {mb[end]:.0f}"
    ),
    "its slope from minute 2 on, MB a minute (within two standard errors)": "{grown}",
    "at rest without earlier prompts, MB: new / warmed up / in the end": (
        "{mb[new]:.0f} / {mb[before]:.0f} / {mb[after]:.0f}"
    ),
    "open files and connections: before / after": (
        "{handles[before][open_files]} / {handles[after][open_files]}"
    ),
    "threads: before / after": "{handles[before][threads]} / {handles[after][threads]}",
    "seconds to stop when asked to (exit code)": ("{stopped[seconds]:.1f} ({stopped[exit_code]})"),
}
_PASSED = {True: "yes", False: "NO", None: "can't be said"}
Samples = Sequence[tuple[float, int]]  # seconds, bytes
Seen = Sequence[tuple[Question, Heard]]


def summary(
    warm: Seen, seen: Seen, seconds: float, expected: dict[str, str], count: Count
) -> dict[str, Any]:
    """Of the load, but errors of the warm-up too. `expected`: texts of fixed questions alone."""
    errors: dict[str, Counter[str]] = defaultdict(Counter)  # by kind, by fault
    for asked, heard in [*warm, *seen]:
        for fault in set(heard.faults):
            errors[asked.kind][fault] += 1
    polite = [(asked, heard) for asked, heard in seen if asked.kind in POLITE]
    firsts = [(count(asked), heard.first - heard.sent) for asked, heard in polite if heard.first]
    gaps = [
        after - before
        for asked, heard in polite
        if not asked.pause  # a slow reader sees its own pauses
        for choice in heard.choices
        for before, after in zip(choice.times, choice.times[1:], strict=False)
    ]
    tokens = {
        key: sum(heard.tokens[key] for _, heard in polite)
        for key in ("prompt", "completion", "cached")
    }
    waited = {
        name: waits([wait for size, wait in firsts if low <= size < high])
        for name, (low, high) in _SIZES.items()
    }
    return {
        "requests": dict(Counter(asked.kind for asked, _ in seen).most_common()),
        "errors": errors,
        "tokens": tokens,
        "tokens_per_second": tokens["completion"] / seconds,
        "first": {name: one for name, one in waited.items() if one},
        "gap": waits(gaps),
        "left": Counter(
            "within" if heard.left else "after its end"
            for asked, heard in seen
            if asked.kind == "leaving"
        ),
        "refusals": Counter(
            str(heard.status) for asked, heard in seen if asked.kind == "malformed"
        ),
        "fixed": _fixed(seen, expected),
    }


def _fixed(seen: Seen, expected: dict[str, str]) -> dict[str, Any]:
    """How often the fixed questions' texts came again, and from which character on they did not."""
    same, differing = 0, defaultdict(list)
    for asked, heard in seen:
        if asked.name and not heard.faults:
            pairs = enumerate(zip_longest(heard.choices[0].text, expected[asked.name]))
            place = next((place for place, (a, b) in pairs if a != b), None)
            if place is None:
                same += 1
            else:
                differing[asked.name].append(place)
    return {"same": same, "differing": differing}


def waits(values: Iterable[float]) -> dict[str, float] | None:
    """Seconds: the median, the worst of 20, the worst; and how many there were; None for none."""
    ordered = sorted(values)
    if not ordered:
        return None
    return {
        "count": len(ordered),
        "median": median(ordered),
        "p95": ordered[int(0.95 * len(ordered))],
        "max": ordered[-1],
    }


def memory(samples: Samples, end: float) -> dict[str, Any]:
    """Of a server's resident memory, and how it grew from minute 2 to the `end` of a load.

    Megabytes a minute, by least squares, within two standard errors; None for a short load. Of the
    means of half minutes: answers come and go, single samples would flatter the error.
    """
    sizes = [size for _, size in samples]
    halves: dict[int, list[int]] = defaultdict(list)
    for seconds, size in samples:
        if 120 <= seconds < end // 30 * 30:
            halves[int(seconds // 30)].append(size)
    slope: dict[str, Any] = {"slope": None, "slope_range": None}
    if len(halves) >= 12:
        minutes, means = np.array([(half / 2, fmean(held)) for half, held in halves.items()]).T
        (found, _), covariance = np.polyfit(minutes, means / 1e6, 1, cov=True)
        error = 2 * math.sqrt(covariance[0, 0])
        slope = {"slope": float(found), "slope_range": [found - error, found + error]}
    return {"start": sizes[0], "peak": max(sizes), "end": sizes[-1], **slope}


def criteria(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What must hold; `passed` is None where it could not be seen."""
    errors, settled, handled, held = (
        found[key] for key in ("errors", "settled", "handles", "memory")
    )
    asked = sum(found["requests"].get(kind, 0) for kind in POLITE)
    minutes, steady, kept = found["seconds"] / 60, None, None
    if held["slope_range"] is not None:
        low, high = held["slope_range"]
        steady = True if high < SLOPE else False if low >= SLOPE else None
    if minutes >= 3:  # else what a server takes once would be a leak
        kept = (held["at_rest"]["after"] - held["at_rest"]["before"]) / 1e6 / minutes < SLOPE
    checks = {
        "polite clients saw no error": not any(errors.get(kind) for kind in POLITE) and asked > 0,
        "clients that left saw no error before": not errors.get("leaving"),
        "malformed bodies were refused, each with its error": not errors.get("malformed"),
        f"memory grew by less than {SLOPE:g} MB a minute": steady,
        f"at rest it held less than {SLOPE:g} MB more for a minute of load": kept,
        "nothing queued or decoded a second after all had left": (
            settled["seconds"] <= SETTLE and not settled["queued"] and not settled["active"]
        ),
        "no connection was left open": (
            handled["after"]["open_files"] <= handled["before"]["open_files"] + SPARE_FILES
        ),
        "it stopped when asked to": found["stopped"]["exit_code"] == 0,
    }
    return [{"name": name, "passed": passed} for name, passed in checks.items()]


def text(found: dict[str, Any]) -> list[str]:
    must = [[one["name"], _PASSED[one["passed"]]] for one in found["criteria"]]
    requests = [
        [kind, str(number), str(sum(found["errors"].get(kind, {}).values()))]
        for kind, number in found["requests"].items()
    ]
    waited = {f"first text, {name}": one for name, one in found["first"].items()}
    waited |= {"between two pieces of text": found["gap"]} if found["gap"] else {}
    rows = [
        [
            name,
            str(one["count"]),
            *(f"{one[key]:.2f}" for key in ("median", "p95", "max")),
            f"{one['max'] / one['median']:.1f}",
        ]
        for name, one in waited.items()
    ]
    header = ["seconds", "number", "median", "19 of 20 within", "longest", "longest / median"]
    faults = [
        f"- {kind}, {times} x: {fault}"
        for kind, faults in found["errors"].items()
        for fault, times in faults.items()
    ]
    parts = [
        f"{sum(found['requests'].values())} requests to {' and '.join(found['models'])} in"
        f" {found['seconds'] / 60:.1f} minutes, until the last had its answer.",
        table(["must hold", ""], must),
        table(["requests", "number", "errors"], requests),
        table(header, rows),
        table(["of the load", ""], _figures(found)),
        "\n".join(faults[:20]),
    ]
    return [part for part in parts if part]


def _figures(found: dict[str, Any]) -> list[list[str]]:
    def counts(times: dict[str, int]) -> str:
        return ", ".join(f"{number} x {what}" for what, number in times.items()) or "none"

    held, grown = found["memory"], "too short a run"
    if held["slope_range"] is not None:
        grown = "{:+.2f} ({:+.1f} to {:+.1f})".format(held["slope"], *held["slope_range"])
    sizes = {key: held[key] for key in ("start", "peak", "end")} | held["at_rest"]
    others = [
        f"{len(places)} x {name}, from character {min(places)} on"
        for name, places in found["fixed"]["differing"].items()
    ]
    values = found | {
        "others": "; ".join(others) or "none",
        "left": counts(found["left"]),
        "refusals": counts(found["refusals"]),
        "mb": {key: size / 1e6 for key, size in sizes.items()},
        "grown": grown,
    }
    return [[name, form.format(**values)] for name, form in _FIGURES.items()]
