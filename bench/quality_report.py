"""The quality suite's verdict, tables and pictures, from its results alone.

A row of the verdict says "better" only where all of the 95% interval of the difference lies on one
side of 0 and enough of the tokens or questions differ; for loops and answers a sign test has to
agree (bench/bootstrap.py). Nothing else is weighed. Of the perplexities of one text one counts, as
they score the same tokens: sliding windows of the longest context, the least biased.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bench.bootstrap import DIFFERENT, FEWEST, UNLIKELY, Interval, sign_test
from bench.plots import Picture, intervals
from bench.report import table
from bench.suite import Results

NATS = "nats a token"
MORE_IS_BETTER = {"perplexity": False, "repetition": False, "accuracy": True}
VERDICTS = {"a": "A", "b": "B", "none": "no difference shown", "few": "too few to say"}


@dataclass(frozen=True)
class Row:
    """One measure of both sides. `difference` is B - A, in nats (perplexity) or as a share.

    only: items that only A, and only B, did better on; None for what is no count of items.
    counts: whether the sentence takes the row in.
    """

    kind: str
    measure: str
    a: float
    b: float
    difference: Interval
    only: tuple[int, int] | None = None
    counts: bool = True

    @property
    def better(self) -> str:
        """A key of VERDICTS."""
        sign = self.difference.sign
        if sign and (self.only is None or sign_test(*self.only) < UNLIKELY):
            return "b" if (sign > 0) == MORE_IS_BETTER[self.kind] else "a"
        return "none" if self.difference.enough else "few"

    def cells(self) -> list[str]:
        said = VERDICTS[self.better]
        said = said if self.counts else f"({said})"
        if self.kind == "perplexity":
            difference = f"{self.difference.text(3, sign=True)} {NATS}"
            return [self.measure, f"{self.a:.2f}", f"{self.b:.2f}", difference, said]
        difference = f"{self.difference.text(1, sign=True, scale=100)} points"
        return [self.measure, f"{self.a:.1%}", f"{self.b:.1%}", difference, said]


def rows(results: Results) -> list[Row]:
    """In the order of the tables."""
    found = []
    longest: dict[str, int] = {}
    for one in results["perplexity"]:
        longest[one["text"]] = max(one["context"], longest.get(one["text"], 0))
    for one in results["perplexity"]:
        for way in ("strided", "sliding"):
            label = f"perplexity, {one['text']}, {way} {one['context']}"
            a, b = (math.exp(one[way][f"loss_{side}"]) for side in "ab")
            more = Interval.from_json(one[way]["difference"])
            counts = way == "sliding" and one["context"] == longest[one["text"]]
            found.append(Row("perplexity", label, a, b, more, counts=counts))
    for key, label in (("seq_rep_4", "repeated 4-grams"), ("loops", "ends in a loop")):
        if one := (results["repetition"] or {}).get(key):
            more = Interval.from_json(one["difference"])
            a, b = (one[side]["value"] for side in "ab")
            only = _only(more) if key == "loops" else None
            found.append(Row("repetition", label, a, b, more, only))
    for one in results["accuracy"].get("tasks", []):
        label, more = f"{one['task']}, {one['metric']}", Interval.from_json(one["difference"])
        only = one["only_a"], one["only_b"]
        found.append(Row("accuracy", label, one["a"], one["b"], more, only))
    return found


def _only(difference: Interval) -> tuple[int, int]:
    """Of outcomes that are 0 or 1, an item a block: how many only A has, and only B."""
    more = round(difference.value * difference.blocks)  # of B's
    return int(difference.nonzero - more) // 2, int(difference.nonzero + more) // 2


def verdict(found: Sequence[Row], names: Sequence[str], positions: Sequence[int]) -> list[str]:
    """The table, its sum, and how far to trust it."""
    header = ["measure", f"A: {names[0]}", f"B: {names[1]}", "B - A (95% interval)", "better"]
    counted = [row.better for row in found if row.counts]
    better = " and ".join(
        f"{side.upper()} ({name}, {runs} positions) is better on {counted.count(side)}"
        for side, name, runs in zip("ab", names, positions, strict=True)
    )
    said = (
        f"Of the {len(counted)} rows that count, {better}; the others show no difference, or are"
        " of too little text."
    )
    trust = (
        "Lower is better for perplexity and repetition, higher for accuracy. A model is called"
        " better where the whole interval is on its side of 0 and at least"
        f" {DIFFERENT} blocks of tokens, passages or questions tell the two apart; for loops and"
        f" answers the exact sign test on those that do has to give p < {UNLIKELY} too, since the"
        f" interval alone is too narrow there. An interval from fewer than {FEWEST} blocks is not"
        " read. Rows in parentheses don't count: of one text only the sliding windows of the"
        " longest context do, as the others score the same tokens."
        f" With {len(counted)} intervals of 95%, about {len(counted) / 20:.1f} would exclude 0 by"
        " chance if there were no difference at all."
    )
    return [table(header, [row.cells() for row in found]), said, trust]


def text(results: Results) -> list[str]:
    """The verdict first, then what it rests on."""
    names = results["names"]
    parts = verdict(rows(results), names, results["positions"]) + _apart(results)
    for title, part, said in (
        ("Repetition", results["repetition"], _repetition),
        ("Accuracy", results["accuracy"], _accuracy),
        ("Quantization", results["quantization"], _quantization),
        ("Beyond the sliding window", results["window"], _window),
    ):
        if part is None or "not_measured" in part:
            why = part["not_measured"] if part else "The texts are too short."
            parts.append(f"{title}: not measured. {why}")
        else:
            parts += said(part, names)
    return parts


def _apart(results: Results) -> list[str]:
    header = ["text, window", "strided tokens", "sliding tokens", "KL(A to B), nats", "same token"]
    found = [
        [
            f"{one['text']}, {one['context']}",
            str(one["strided"]["tokens"]),
            str(one["sliding"]["tokens"]),
            _interval(one["strided"]["kl"]),
            _percent(one["strided"]["agreement"]),
        ]
        for one in results["perplexity"]
    ]
    return [
        "Strided windows do not overlap and score every token, the first ones with hardly any"
        " context: biased upwards. Sliding windows advance by half and score their second half:"
        " less biased, at twice the cost. Not measured:"
        f" {', '.join(results['skipped']) or 'nothing'} (longer than the text, its --text-tokens"
        " or the model's positions; and on a CPU only one text is read at length).",
        "How far apart the two are, whichever is better: KL divergence of B's next-token"
        " distribution from A's, and how often both have the same most likely token (strided).",
        table(header, found),
    ]


def _repetition(found: Results, names: Sequence[str]) -> list[str]:
    a, b = found["ended"]
    return [
        f"Repetition: greedy continuations of {found['passages']} passages of"
        f" {found['passage_tokens']} tokens, {found['new_tokens']} new tokens each. The text's own"
        f" continuations repeat {100 * found['text']:.1f}% of their 4-grams. Ended by themselves:"
        f" {a} of A's, {b} of B's."
    ]


def _accuracy(found: Results, names: Sequence[str]) -> list[str]:
    keys = "questions", "only_a", "only_b"
    tasks = found["tasks"]
    cells = [[f"{one['task']}, {one['metric']}", *(str(one[k]) for k in keys)] for one in tasks]
    return [
        "Accuracy, zero-shot in the model's own chat template. What counts are the questions"
        " that only one of the two gets right (or more right):",
        table(["task", "questions", "only A", "only B"], cells),
        *(f"{one['task']}: not measured. {one['not_measured']}" for one in found["missing"]),
    ]


def _quantization(found: Results, names: Sequence[str]) -> list[str]:
    header = ["", "perplexity as loaded", "quantized", NATS, "KL from as loaded", "same token"]
    measured = [one for one in found["rows"] if "not_measured" not in one]
    cells = [
        [
            f"{one['side'].upper()}: {names['ab'.index(one['side'])]}, {one['bits']} bits",
            f"{math.exp(one['loss_a']):.2f}",
            f"{math.exp(one['loss_b']):.2f}",
            _interval(one["difference"], sign=True),
            _interval(one["kl"], 4),
            _percent(one["agreement"]),
        ]
        for one in measured
    ]
    return [
        f"Quantized in groups of {found['group']}, embedding and head too, against the weights as"
        f" loaded, on {found['tokens']} tokens (strided). Where the checkpoint is packed already,"
        " the reference is its exact dequantized form.",
        *([table(header, cells)] if cells else []),
        *(
            f"{one['bits']} bits: not measured. {one['not_measured']}"
            for one in found["rows"]
            if one not in measured
        ),
    ]


def _window(found: Results, names: Sequence[str]) -> list[str]:
    own = "the model's own" if found["own"] else "given to it for this: the model has none"
    cells = []
    for a, b in zip(found["a"], found["b"], strict=True):
        cells.append([f"{a['from']} to {a['to'] - 1}"])
        for one in (a, b):
            cells[-1] += [f"{one[form]['value']:.3f}" for form in ("with", "without")]
            cells[-1].append(_interval(one["difference"], sign=True))
    columns = [f"{side}, {form}" for side in "AB" for form in ("with", "without", "difference")]
    return [
        f"Beyond the sliding window: {found['tokens']} tokens of {found['text']} in one pass, with"
        f" a window of {found['window']} tokens ({own}) and without. Loss in {NATS}, with the 95%"
        f" interval of the difference; up to token {found['window']} both are the same."
        f" A is {names[0]}, B is {names[1]}.",
        table(["tokens", *columns], cells),
    ]


def plots(results: Results, machine: Results) -> dict[str, Picture]:
    """Differences in nats, and in points."""
    a, b = results["names"]
    drawn = {}
    for name, kinds, unit, scale in (
        ("quality-perplexity", ("perplexity",), f"{NATS}; left is better for {b}", 1.0),
        ("quality-answers", ("accuracy", "repetition"), "percentage points", 100.0),
    ):
        if chosen := [row for row in rows(results) if row.kind in kinds]:
            drawn[name] = _differences(chosen, f"{b} minus {a}", unit, scale)
    return drawn


def _differences(found: list[Row], title: str, unit: str, scale: float) -> Picture:
    shown = []
    for row in found:
        side = "right" if MORE_IS_BETTER[row.kind] else "left"
        label = f"{row.measure} ({side} is better)"
        if row.kind == "perplexity":
            label = row.measure.removeprefix("perplexity, ")
        more = row.difference
        shown.append((label, scale * more.value, scale * more.low, scale * more.high))

    each = "; ".join(f"{label} {value:+.2f}" for label, value, _, _ in shown)
    alt = f"{title} in {unit.partition(';')[0]}, with 95% intervals: {each}."
    return intervals(shown, alt, x=unit, title=title)


def _interval(found: Results, digits: int = 3, sign: bool = False) -> str:
    return Interval.from_json(found).text(digits, sign)


def _percent(found: Results) -> str:
    return Interval.from_json(found).text(1, scale=100) + " %"
