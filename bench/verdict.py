"""Which model is better at what: a row for each measure, and the sentence they add up to.

A row says "better" only where all of the 95% interval of the difference lies on one side of 0 and
enough of the tokens or questions differ; for loops and answers a sign test has to agree
(bench/bootstrap.py). Nothing else is weighed, in either direction: the sentence is made from the
rows. Of the perplexities of one text it takes one, as they score the same tokens: sliding windows
of the longest context, the least biased.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bench.bootstrap import DIFFERENT, FEWEST, UNLIKELY, Interval, sign_test
from bench.report import table

Row = dict[str, Any]
MORE_IS_BETTER = {"perplexity": False, "repetition": False, "accuracy": True}


def row(
    kind: str,
    measure: str,
    a: float,
    b: float,
    difference: Mapping[str, Any],
    *,
    only: tuple[int, int] | None = None,
    counts: bool = True,
) -> Row:
    """`difference` is B - A with its interval, in nats a token (perplexity) or as a share.

    only: items that only A, and only B, did better on; None for what is no count of items.
    counts: whether the sentence takes the row in.
    """
    found = Interval.from_json(dict(difference))
    better = "none" if found.enough else "few"
    if found.sign and (only is None or sign_test(*only) < UNLIKELY):
        better = "b" if (found.sign > 0) == MORE_IS_BETTER[kind] else "a"
    return {
        "kind": kind,
        "measure": measure,
        "a": a,
        "b": b,
        "difference": dict(difference),
        "better": better,
        "counts": counts,
    }


def rows(results: Mapping[str, Any]) -> list[Row]:
    """Of the quality suite's results, in the order of its tables."""
    found = []
    longest = {one["text"]: one["context"] for one in sorted(results["perplexity"], key=_context)}
    for one in results["perplexity"]:
        for way in ("strided", "sliding"):
            label = f"perplexity, {one['text']}, {way} {one['context']}"
            counts = way == "sliding" and one["context"] == longest[one["text"]]
            found.append(_perplexity(label, one[way], counts))
    beyond = results["window"].get("beyond")
    if beyond:
        label = f"perplexity, {results['window']['text']}, past the window"
        found.append(_perplexity(label, beyond, counts=False))
    repetition = results["repetition"]
    for key, label in (("seq_rep_4", "repeated 4-grams"), ("loops", "ends in a loop")):
        if repetition and key in repetition:
            one = repetition[key]
            a, b = (one[side]["value"] for side in "ab")
            only = _only(one["difference"]) if key == "loops" else None
            found.append(row("repetition", label, a, b, one["difference"], only=only))
    for one in results["accuracy"].get("tasks", []):
        label = f"{one['task']}, {one['metric']}"
        only = one["only_a"], one["only_b"]
        found.append(row("accuracy", label, one["a"], one["b"], one["difference"], only=only))
    return found


def _context(one: Mapping[str, Any]) -> int:
    return int(one["context"])


def _only(difference: Mapping[str, Any]) -> tuple[int, int]:
    """Of outcomes that are 0 or 1, an item a block: how many only A has, and only B."""
    found = Interval.from_json(dict(difference))
    more = round(found.value * found.blocks)  # of B's
    return (found.nonzero - more) // 2, (found.nonzero + more) // 2


def _perplexity(label: str, found: Mapping[str, Any], counts: bool) -> Row:
    a, b = (math.exp(found[f"loss_{side}"]) for side in "ab")
    return row("perplexity", label, a, b, found["difference"], counts=counts)


def text(found: Sequence[Row], names: Sequence[str], positions: Sequence[int]) -> list[str]:
    """The table, the sentence, and how far to trust them."""
    a, b = names
    says = {"a": "A", "b": "B", "none": "no difference shown", "few": "too few to say"}
    cells = []
    for one in found:
        shown = Interval.from_json(one["difference"])
        if one["kind"] == "perplexity":
            sides = [f"{one[side]:.2f}" for side in "ab"]
            difference = f"{shown.text(3, sign=True)} nats a token"
        else:
            sides = [f"{100 * one[side]:.1f}%" for side in "ab"]
            difference = f"{shown.text(1, sign=True, scale=100)} points"
        better = says[one["better"]]
        better = better if one["counts"] else f"({better})"
        cells.append([one["measure"], *sides, difference, better])
    header = ["measure", f"A: {a}", f"B: {b}", "B - A (95% interval)", "better"]
    return [table(header, cells), sentence(found, names, positions), trust(found)]


def sentence(found: Sequence[Row], names: Sequence[str], positions: Sequence[int]) -> str:
    """Who is better at what, in words; of the rows that count."""
    found = [one for one in found if one["counts"]]
    a, b = (f"{side} ({name})" for side, name in zip("AB", names, strict=True))
    parts = []
    if worse := _list(found, "a"):
        parts.append(f"{b} is worse than {a} at {worse}")
    if better := _list(found, "b"):
        parts.append(f"better at {better}" if parts else f"{b} is better than {a} at {better}")
    if none := _list(found, "none"):
        parts.append(
            f"no difference was shown for {none}"
            if parts
            else f"no difference between {a} and {b} was shown for {none}"
        )
    if few := _list(found, "few"):
        parts.append(f"there was too little to say anything of {few}")
    if not parts:
        return "Nothing was measured that could tell them apart."
    return f"On these texts and questions {'; '.join(parts)}. {_layers(found, positions)}".rstrip()


def _layers(found: Sequence[Row], positions: Sequence[int]) -> str:
    """What more positions bought, where one of the two runs more."""
    if positions[0] == positions[1]:
        return ""
    more, less = ("b", "a") if positions[1] > positions[0] else ("a", "b")
    won, lost = (sum(one["better"] == side for one in found) for side in (more, less))
    figures = f"{max(positions)} positions against {min(positions)}"
    if won or lost:
        rows = f"better on {won} of {len(found)} rows and worse on {lost}"
        return f"More layers ({figures}) were {rows}."
    return f"More layers ({figures}) made no difference that these rows could show."


def trust(found: Sequence[Row]) -> str:
    counted = sum(one["counts"] for one in found)
    parts = [
        "Lower is better for perplexity and repetition, higher for accuracy.",
        "A model is called better where the whole interval is on its side of 0 and at least"
        f" {DIFFERENT} blocks of tokens, passages or questions tell the two apart; for loops and"
        f" answers the exact sign test on those that do has to give p < {UNLIKELY} too, since the"
        " interval alone is too narrow there.",
        f"An interval from fewer than {FEWEST} blocks is not read.",
    ]
    if counted < len(found):
        parts.append(
            "Rows in parentheses don't count, here or in the sentence: of one text only the"
            " sliding windows of the longest context do, as the others score the same tokens."
        )
    parts.append(
        f"With {counted} intervals of 95%, about {counted / 20:.1f} would exclude 0 by chance if"
        " there were no difference at all."
    )
    return " ".join(parts)


def _list(found: Sequence[Row], better: str) -> str:
    """The measures with that verdict; a kind that agrees with itself in a word or two."""
    names = []
    for kind in dict.fromkeys(one["kind"] for one in found):
        own = [one for one in found if one["kind"] == kind]
        such = [one["measure"] for one in own if one["better"] == better]
        if len(such) == len(own) > 1:
            names.append(f"{kind} ({'both' if len(own) == 2 else f'all {len(own)}'} rows)")
        elif kind == "perplexity" and len(such) > 2:
            names.append(f"{kind} ({len(such)} of {len(own)} rows)")
        else:
            names += such
    return ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + "".join(names[-1:])
