"""What a sweep over layer plans found, in words and tables; from the results alone."""

import math
from collections import defaultdict
from collections.abc import Sequence

from bench.plan_family import SQRT_HALF
from bench.plots import number
from bench.report import table
from bench.suite import Results


def survivors(results: Results) -> dict[str, Results]:
    """Plans that lose least at their depth: none of as many positions or more does better."""
    best: list[Results] = []
    for plan in sorted(results["plans"], key=lambda p: (-p["positions"], p["more_nats"])):
        if not best or plan["more_nats"] < best[-1]["more_nats"]:
            best.append(plan)
    return {plan["name"]: plan for plan in reversed(best)}


def paragraphs(results: Results) -> list[str]:
    """Markdown: what was measured, the marked plans, and what the sweep says."""
    asked, run = results["positions_asked"], results["positions_run"]
    plans = {plan["name"]: plan for plan in results["plans"]}
    named: dict[str, str] = {}
    for name, label in zip(
        [*results["card"], *results["other_ways"]], labels(results), strict=True
    ):
        named.setdefault(name, label)  # the card's own rows may be of one block each
    rows = [results["base"], *(plans[name] for name in dict.fromkeys([*named, *results["given"]]))]
    said = [
        f"{len(plans)} plans over {results['blocks']} blocks, {results['tokens']} tokens of"
        f" {' and '.join(results['texts'])} in windows of {results['context']}: {asked} positions"
        f" asked for, {run} run ({1 - run / asked:.0%} shared), {results['seconds']:.0f} s.",
        _table([(_named(row["name"], named), row) for row in rows]),
    ]
    if results["grid"] is None:
        return said
    front = survivors(results)
    return [
        *said,
        "\n".join(f"- {line}" for line in _findings(results)),
        "The plans that lose least at their depth (none of as many positions or more has a lower"
        " perplexity). `sA-wB-rC`: from block A on, C stretches of B blocks run twice each;"
        " `-xF`: their writes times F. They were picked on this text, which flatters them.",
        _table([(_named(name, named), plan) for name, plan in front.items()]),
    ]


def labels(results: Results) -> tuple[str, ...]:
    """Of the card's plan, its scaled variant, and the other ways to run its blocks twice."""
    plan = "the 12.25B's plan" if results["blocks"] == 32 else "the 12.25B's formula"
    same = "the same blocks twice,"
    return plan, f"{plan}, scaled by sqrt(1/2)", f"{same} one by one", f"{same} as one stretch"


def _named(name: str, known: dict[str, str]) -> str:
    return f"{known[name]} ({name})" if name in known else name


def _table(rows: Sequence[tuple[str, Results]]) -> str:
    header = ["plan", "positions", "perplexity", "nats above the base", "same best token", "KL"]
    return table(
        header,
        [
            [
                label,
                str(row["positions"]),
                short(row["perplexity"]),
                f"{row['more_nats']:+.3f} (s.e. {row['standard_error']:.3f})",
                f"{row['agreement']:.1%}",
                f"{row['kl']:z.3f}",  # rounding may leave the base's own below 0
            ]
            for label, row in rows
        ],
    )


def short(perplexity: float) -> str:
    """Three digits that matter."""
    if perplexity < 1000:
        return number(perplexity)
    return f"{perplexity / 1000:,.0f}k" if perplexity < 1e6 else "over 1M"


def _findings(results: Results) -> list[str]:
    plans = {plan["name"]: plan for plan in results["plans"]}
    own, scaled = (plans[name] for name in results["card"])
    label = labels(results)[0]
    others = [plan for plan in plans.values() if plan not in (own, scaled)]
    no_longer = [plan for plan in others if plan["positions"] <= own["positions"]]
    better = sum(plan["more_nats"] < own["more_nats"] for plan in no_longer)
    surely = sum(plan["more_nats"] < -2 * plan["standard_error"] for plan in plans.values())
    lines = [
        f"Of {len(no_longer)} other plans with no more positions than {label}, {better} have a"
        " lower perplexity.",
        f"Below the base's perplexity by more than two standard errors: {surely} of {len(plans)};"
        f" by chance alone about 2.5% of them, {len(plans) / 40:.1f}, would be.",
    ]
    cells = [plan for plan in plans.values() if "start" in plan]
    lines += _scaling(cells)
    ways: dict[tuple[int, int, float], list[Results]] = defaultdict(list)
    for cell in cells:
        ways[cell["start"], cell["width"] * cell["repeats"], cell["scale"]].append(cell)
    several = [sorted(way, key=lambda c: c["width"]) for way in ways.values() if len(way) > 1]
    if len(several) > 1:
        wide = sum(way[-1]["more_nats"] < way[0]["more_nats"] for way in several)
        lines.append(
            "The same blocks run twice in stretches of different widths: the widest has a lower"
            f" perplexity than the narrowest in {wide} of {len(several)} cases."
        )
    return lines


def _scaling(cells: Sequence[Results]) -> list[str]:
    """For each scale, how many plans it helps."""
    at = {(c["start"], c["width"], c["repeats"], c["scale"]): c["more_nats"] for c in cells}
    lines = []
    for scale in dict.fromkeys(c["scale"] for c in cells if c["scale"] != 1):
        pairs = [(at[k], at[*k[:3], 1.0]) for k in at if k[3] == scale and (*k[:3], 1.0) in at]
        if pairs:
            helped = sum(with_scale < without for with_scale, without in pairs)
            lines.append(
                f"Writes of the blocks run twice times {shown(scale)}: lower perplexity than"
                f" unscaled in {helped} of {len(pairs)} plans."
            )
    return lines


def shown(scale: float) -> str:
    """A scale for a person."""
    return "sqrt(1/2)" if math.isclose(scale, SQRT_HALF) else f"{scale:g}"
