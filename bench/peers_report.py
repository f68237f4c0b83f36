"""The peers' results as tables, sentences and pictures."""

from collections.abc import Iterator

from bench import step_profile
from bench.plots import Picture, bars
from bench.report import Spread, table
from bench.suite import Results
from mlx_cerebrum.model.memory import GB

OURS = "mlx-cerebrum"
_MATRICES = ("qkv", "o", "gate_up", "down", "mlp", "head")  # mlp: both, in older runs
PHASES = {"prefill": "Prefill", "decode": "Decode"}


def text(results: Results) -> list[str]:
    parts = [
        f"The same {results['prompt_tokens']} prompt tokens for every engine,"
        f" {results['tokens']} generated; median (lowest-highest) of the rounds. Ratios are ours"
        " over theirs, round by round: above 1 ours is faster."
    ]
    for side in results["sides"].values():
        parts += _side(side, results["float32"])
        parts.append(f"Where our time goes, each kind of operation alone, {side['name']}:")
        parts += step_profile.text_short(side["profile"])
    return [*parts, _settings(results)]


def measured(side: Results) -> dict[str, Results]:
    return {name: row for name, row in side["engines"].items() if "failure" not in row}


def _side(side: Results, float32: bool) -> list[str]:
    found = measured(side)
    how = (
        "all engines loaded, in turns"
        if side["together"]
        else "one engine after another, since they do not fit in memory together: not in turns"
    )
    paces = [
        [name, *_pace(row, "prefill"), *_pace(row, "decode"), _same(row)]
        for name, row in found.items()
    ]
    header = ["engine", "prefill, tokens/s", "ours/its", "decode, tokens/s", "ours/its"]
    costs = [
        [
            name,
            Spread(**row["first"]).text(2),
            f"{row['weights'] / GB:.3f}",
            f"{row['token_bytes'] / GB:.3f}",
            f"{row['gb_s']:.2f}",
            f"{row['gflop_s']:.1f}",
        ]
        for name, row in found.items()
    ]
    costs_header = ["first token, s", "weights, GB", "read a token, GB"]
    parts = [
        f"**{side['name']}**; rounds: {side['rounds']}; {how}.",
        table([*header, "same tokens"], paces),
        table(["engine", *costs_header, "decode, GB/s", "prefill, GFLOP/s"], costs),
        *_start(side["start"]),
    ]
    notes = [*_missing(side), *_differing(found, float32), *reasons(side)]
    return [*parts, "\n".join(f"- {note}" for note in notes)] if notes else parts


def _pace(row: Results, phase: str) -> list[str]:
    share = row.get("ratios", {}).get(phase)
    return [Spread(**row[phase]).text(), Spread(**share).text(2) if share else ""]


def _same(row: Results) -> str:
    if "equal" not in row:
        return ""
    return "yes" if row["equal"] else f"NO, {row['agreeing']} of {row['compared']}"


def _start(start: Results) -> list[str]:
    if "failure" in start:
        return [f"Process start to first token: not measured ({start['failure']})."]
    rows = [
        [name, Spread(**took).text(2), Spread(**start["ratios"][name]).text(2)]
        if name in start["ratios"]
        else [name, Spread(**took).text(2), ""]
        for name, took in start["seconds"].items()
    ]
    header = [f"process start to first token (rounds: {start['rounds']})", "s", "mlx-lm's/its"]
    return [table(header, rows)]


def _missing(side: Results) -> Iterator[str]:
    for name, row in side["engines"].items():
        if "failure" in row:
            yield f"{name}: not measured: {row['failure']}"


def _differing(found: dict[str, Results], float32: bool) -> Iterator[str]:
    for name, row in found.items():
        if row["same_weights"] is not None:
            equal = "equal ours bit for bit" if row["same_weights"] else "are NOT equal to ours"
            yield f"{name}: its weights {equal}."
        if row.get("equal", True):
            continue
        if not row["exact"]:
            yield f"{name}: quantized weights of its own, other arithmetic; tokens may differ."
        elif float32:
            yield f"{name}: says other tokens than ours on the same weights; this is a finding."
        else:
            yield f"{name}: other tokens than ours; rounding to 16 bits can turn near ties."


def reasons(side: Results) -> Iterator[str]:
    """Where the other reads other bytes than ours, and what was measured of every ratio below 1."""
    found = measured(side)
    ours, told = found[OURS], set()
    for name, row in found.items():
        share = row["token_bytes"] / ours["token_bytes"]
        if not 0.9 <= share <= 1.1:
            yield (
                f"{name} reads {row['token_bytes'] / GB:.3f} GB a token, ours"
                f" {ours['token_bytes'] / GB:.3f}: from bytes alone ours would decode at"
                f" {share:.2f} of its pace."
            )
        for phase, label in PHASES.items():
            ratio = row.get("ratios", {}).get(phase)
            if ratio is None or ratio["median"] >= 1:
                continue
            noise = f" (up to {ratio['high']:.2f}: the rounds disagree)" * (ratio["high"] >= 1)
            rate, unit = ("gb_s", "GB/s") if phase == "decode" else ("gflop_s", "GFLOP/s")
            where = "" if phase in told else _beside(side["profile"][phase], unit)
            told.add(phase)
            yield (
                f"{label} is {ratio['median']:.2f} of {name}'s{noise}: over the whole of it ours"
                f" reaches {ours[rate]:.1f} {unit}, it {row[rate]:.1f}.{where}"
            )


def _beside(profiled: Results, unit: str) -> str:
    """What our matrix products reach by themselves, and what the rest of the time goes to."""
    kinds, total = profiled["kinds"], profiled["total"]
    products = [kinds[kind] for kind in _MATRICES if kind in kinds]
    seconds = sum(kind["seconds"] for kind in products)
    work = sum(kind["seconds"] * kind["rate"] for kind in products)
    others = sorted(
        ((kind["seconds"], name) for name, kind in kinds.items() if name not in _MATRICES),
        reverse=True,
    )
    beside = ", ".join(f"{name} {taken / total:.0%}" for taken, name in others[:3])
    return (
        f" Our matrix products alone reach {work / seconds:.1f} {unit} and are"
        f" {seconds / total:.0%} of our time; beside them: {beside}."
    )


def _settings(results: Results) -> str:
    """Versions and settings, with the side where the sides' differ."""
    sides = results["sides"].values()
    lines: dict[str, list[str]] = {}
    for side in sides:
        for name, row in measured(side).items():
            lines.setdefault(f"- {name}: {row['version']}; {row['settings']}", []).append(
                side["name"]
            )
    said = [
        line if len(names) == len(sides) else f"{line} ({', '.join(names)})"
        for line, names in lines.items()
    ]
    return "Versions and settings:\n\n" + "\n".join(said)


def plots(results: Results, machine: Results) -> dict[str, Picture]:
    return {f"peers-{phase}": _picture(results, phase) for phase in PHASES}


def _picture(results: Results, phase: str) -> Picture:
    groups: dict[str, dict[str, float]] = {}
    for side in results["sides"].values():
        for name, row in measured(side).items():
            groups.setdefault(name, {})[side["name"]] = row[phase]["median"]
    names = " and ".join(side["name"] for side in results["sides"].values())

    return bars(
        groups,
        f"{PHASES[phase]} pace of {', '.join(groups)}, each running {names}.",
        y="tokens/s",
        title=f"{PHASES[phase]} by engine",
    )
