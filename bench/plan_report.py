"""What a sweep over layer plans found, in words, tables and maps; from the results alone."""

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from bench.plan_family import SQRT_HALF
from bench.plots import COLOURS, FAINT, PAPER, Picture, number
from bench.report import table
from bench.suite import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WORST = 10.0  # times the base's perplexity: where the colours of the map end
_CELL = 0.52  # inches across, at most
_READABLE = 0.42  # the least that has room for a figure
# A cell's place: its panel's row and column, then its own.
_PLACE = (("scales", "scale"), ("repeats", "repeats"), ("widths", "width"), ("starts", "start"))


def survivors(results: Results) -> dict[str, Results]:
    """Plans that lose least at their depth: none of as many positions or more does better."""
    best: list[Results] = []
    for plan in sorted(results["plans"], key=lambda p: (-p["positions"], p["more_nats"])):
        if not best or plan["more_nats"] < best[-1]["more_nats"]:
            best.append(plan)
    return {plan["name"]: plan for plan in reversed(best)}


def text(results: Results) -> list[str]:
    """Markdown: what was measured, the marked plans, and what the sweep says."""
    asked, run = results["positions_asked"], results["positions_run"]
    plans = {plan["name"]: plan for plan in results["plans"]}
    named: dict[str, str] = {}
    marked = [*results["card"], *results["other_ways"]]
    for name, label in zip(marked, _labels(results), strict=True):
        named.setdefault(name, label)  # the card's own rows may be of one block each
    rows = [results["base"], *(plans[name] for name in dict.fromkeys([*named, *results["given"]]))]
    said = [
        f"{len(plans)} plans over {results['blocks']} blocks, {results['tokens']} tokens of"
        f" {' and '.join(results['texts'])} in windows of {results['context']}: {asked} positions"
        f" asked for, {run} run ({1 - run / asked:.0%} shared), {results['seconds']:.0f} s.",
        _table(rows, named),
    ]
    if results["grid"] is None:
        return said
    return [
        *said,
        "\n".join(f"- {line}" for line in _findings(results)),
        "The plans that lose least at their depth (none of as many positions or more has a lower"
        " perplexity). `sA-wB-rC`: from block A on, C stretches of B blocks run twice each;"
        " `-xF`: their writes times F. They were picked on this text, which flatters them.",
        _table(survivors(results).values(), named),
    ]


def _labels(results: Results) -> tuple[str, ...]:
    """Of the card's plan, its scaled variant, and the other ways to run its blocks twice."""
    plan = "the 12.25B's plan" if results["blocks"] == 32 else "the 12.25B's formula"
    same = "the same blocks twice,"
    return plan, f"{plan}, scaled by sqrt(1/2)", f"{same} one by one", f"{same} as one stretch"


def _table(rows: Any, named: dict[str, str]) -> str:
    return table(
        ["plan", "positions", "perplexity", "nats above the base", "same best token", "KL"],
        [
            [
                f"{named[row['name']]} ({row['name']})" if row["name"] in named else row["name"],
                str(row["positions"]),
                _short(row["perplexity"]),
                f"{row['more_nats']:+.3f} (s.e. {row['standard_error']:.3f})",
                f"{row['agreement']:.1%}",
                f"{row['kl']:z.3f}",  # rounding may leave the base's own below 0
            ]
            for row in rows
        ],
    )


def _short(perplexity: float) -> str:
    """Three digits that matter."""
    if perplexity < 1000:
        return number(perplexity)
    return f"{perplexity / 1000:,.0f}k" if perplexity < 1e6 else "over 1M"


def _shown(scale: float) -> str:
    """A scale for a person."""
    return "sqrt(1/2)" if math.isclose(scale, SQRT_HALF) else f"{scale:g}"


def _findings(results: Results) -> list[str]:
    plans = {plan["name"]: plan for plan in results["plans"]}
    own = plans[results["card"][0]]
    others = [plan for name, plan in plans.items() if name not in results["card"]]
    no_longer = [plan for plan in others if plan["positions"] <= own["positions"]]
    better = sum(plan["more_nats"] < own["more_nats"] for plan in no_longer)
    surely = sum(plan["more_nats"] < -2 * plan["standard_error"] for plan in plans.values())
    lines = [
        f"Of {len(no_longer)} other plans with no more positions than {_labels(results)[0]},"
        f" {better} have a lower perplexity.",
        f"Below the base's perplexity by more than two standard errors: {surely} of {len(plans)};"
        f" by chance alone about 2.5% of them, {len(plans) / 40:.1f}, would be.",
    ]
    cells = [plan for plan in plans.values() if "start" in plan]
    at = {(c["start"], c["width"], c["repeats"], c["scale"]): c["more_nats"] for c in cells}
    for scale in dict.fromkeys(c["scale"] for c in cells if c["scale"] != 1):
        pairs = [(at[k], at[*k[:3], 1.0]) for k in at if k[3] == scale and (*k[:3], 1.0) in at]
        if pairs:
            lines.append(
                f"Writes of the blocks run twice times {_shown(scale)}: lower perplexity than"
                f" unscaled in {sum(a < b for a, b in pairs)} of {len(pairs)} plans."
            )
    ways: dict[tuple[int, int, float], list[tuple[int, float]]] = defaultdict(list)
    for (start, width, repeats, scale), more in at.items():
        ways[start, width * repeats, scale].append((width, more))
    several = [sorted(way) for way in ways.values() if len(way) > 1]
    if len(several) > 1:
        wide = sum(way[-1][1] < way[0][1] for way in several)
        lines.append(
            "The same blocks run twice in stretches of different widths: the widest has a lower"
            f" perplexity than the narrowest in {wide} of {len(several)} cases."
        )
    return lines


def plots(results: Results, machine: Results) -> dict[str, Picture]:
    """A map of perplexity over start and width; none without a sweep."""
    grid = results["grid"]
    if grid is None:
        return {}
    own, scaled = (p for n in results["card"] for p in results["plans"] if p["name"] == n)
    columns, rows = len(grid["repeats"]), len(grid["scales"])
    across = _cell_inches(grid) * len(grid["starts"])
    size = (1.9 + columns * (across + 0.35), 1.6 + rows * (0.42 * len(grid["widths"]) + 0.75))
    alt = (
        "Map of perplexity by the first block that runs twice and the width of the stretches, for"
        f" {len(results['plans'])} plans; {_labels(results)[0]}: {_short(own['perplexity'])}, with"
        f" writes scaled by sqrt(1/2) {_short(scaled['perplexity'])}, the base"
        f" {_short(results['base']['perplexity'])}."
    )
    draw = partial(_draw, results=results)
    return {"plans-perplexity": Picture(draw, alt, (max(7.0, size[0]), max(4.0, size[1])))}


def _draw(figure: "Figure", results: Results) -> None:
    """A panel for each number of repeats (across) and scale (down); bright is near the base."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    grid, base = results["grid"], results["base"]["perplexity"]
    values = [plan["perplexity"] for plan in results["plans"]]
    low = min(base, *values)
    worst = max(low * 1.01, min(max(values), _WORST * base))
    colours = ScalarMappable(LogNorm(low, worst, clip=True), "viridis_r")
    panels = figure.subplots(
        len(grid["scales"]), len(grid["repeats"]), sharex=True, sharey=True, squeeze=False
    )
    for row, scale in zip(panels, grid["scales"], strict=True):
        for panel, repeats in zip(row, grid["repeats"], strict=True):
            plans = [p for p in results["plans"] if p.get("repeats") == repeats]
            _panel(panel, grid, [p for p in plans if p["scale"] == scale], colours)
            stretches = "1 stretch" if repeats == 1 else f"{repeats} stretches"
            writes = "unscaled" if scale == 1 else f"scaled by {_shown(scale)}"
            panel.set_title(f"{stretches} run twice, {writes}", fontsize=9.5)
    _mark(figure, results, panels)
    for panel in panels[-1]:
        panel.set_xlabel("first block that runs twice", fontsize=9.5)
    for panel in panels[:, 0]:
        panel.set_ylabel("blocks a stretch", fontsize=9.5)
    title = f"Perplexity, {len(values)} plans over {results['blocks']} blocks"
    figure.suptitle(title, fontsize=12, fontweight="bold")
    beyond = "max" if max(values) > worst else "neither"
    bar = figure.colorbar(colours, ax=panels, extend=beyond, pad=0.02, aspect=25)
    bar.ax.tick_params(which="both", labelsize=8.5)
    bar.outline.set_edgecolor(FAINT)
    round_ones = [step * 10.0**k for k in range(7) for step in (1, 1.5, 2, 3, 5, 7)]
    steps = [x for x in round_ones if low <= x <= worst and abs(math.log(x / base)) > 0.1]
    bar.ax.set_yticks([base, *steps], [f"base {_short(base)}", *map(_short, steps)])
    bar.ax.set_yticks([], minor=True)
    bar.ax.axhline(base, color=COLOURS[1], linewidth=3)


def _cell_inches(grid: Results) -> float:
    """How wide a cell can be, for a picture of no more than some 12 inches."""
    return min(_CELL, 10.5 / len(grid["repeats"]) / len(grid["starts"]))


def _panel(panel: "Axes", grid: Results, plans: Sequence[Results], colours: Any) -> None:
    """One start-by-width map. What no model of this size can run stays hatched."""
    import numpy as np

    panel.patch.set(facecolor=PAPER, edgecolor=FAINT, hatch="////", linewidth=0)
    at = {(plan["width"], plan["start"]): plan["perplexity"] for plan in plans}
    cells = np.array([[at.get((w, s), np.nan) for s in grid["starts"]] for w in grid["widths"]])
    panel.pcolormesh(
        np.ma.masked_invalid(cells), cmap=colours.cmap, norm=colours.norm, edgecolor=PAPER
    )
    if _cell_inches(grid) >= _READABLE:
        for (y, x), cell in np.ndenumerate(cells):
            if np.isfinite(cell):
                red, green, blue, _ = colours.to_rgba(cell)
                light = 0.3 * red + 0.59 * green + 0.11 * blue > 0.5
                ink = "#000000" if light else "#ffffff"
                middle: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7.5}
                panel.text(x + 0.5, y + 0.42, _short(cell), color=ink, **middle)
    for axis, values in ((panel.xaxis, grid["starts"]), (panel.yaxis, grid["widths"])):
        every = -(-len(values) // 16)
        axis.set_ticks([k + 0.5 for k in range(0, len(values), every)], values[::every])
    panel.tick_params(length=0, labelsize=8.5)
    for spine in panel.spines.values():
        spine.set(visible=True, color=FAINT)


def _mark(figure: "Figure", results: Results, panels: Any) -> None:
    """A marker of its own on the card's plan and on its scaled variant, where they are cells."""
    grid = results["grid"]
    for index, (name, label) in enumerate(zip(results["card"], _labels(results), strict=False)):
        plan = next(p for p in results["plans"] if p["name"] == name)
        if any(plan[one] not in grid[several] for several, one in _PLACE):
            continue
        row, column, y, x = (grid[several].index(plan[one]) for several, one in _PLACE)
        panels[row][column].plot(
            *((x + 0.82, y + 0.76) if _cell_inches(grid) >= _READABLE else (x + 0.5, y + 0.5)),
            marker="*D"[index],
            markersize=(11, 6.5)[index],
            color=COLOURS[1],
            markeredgecolor="#ffffff",
            markeredgewidth=0.8,
            linestyle="none",
            label=label,
            clip_on=False,
        )
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
