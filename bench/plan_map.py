"""Maps of a sweep over layer plans: a cell for each plan of the family; from the results alone."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from bench.plan_table import labels, short, shown
from bench.plots import COLOURS, FAINT, PAPER, Picture
from bench.suite import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WORST = 10.0  # times the base's perplexity: where the colours of the map end
_CELL = 0.52  # inches across, at most
_READABLE = 0.42  # the least that has room for a figure


def pictures(results: Results) -> dict[str, Picture]:
    """Maps of perplexity and agreement over start and width; none without a sweep."""
    grid = results["grid"]
    if grid is None:
        return {}
    base = results["base"]["perplexity"]
    own, scaled = (p for n in results["card"] for p in results["plans"] if p["name"] == n)
    columns, rows = len(grid["repeats"]), len(grid["scales"])
    across = _cell_inches(grid) * len(grid["starts"])
    size = (1.9 + columns * (across + 0.35), 1.6 + rows * (0.42 * len(grid["widths"]) + 0.75))
    size = (max(7.0, size[0]), max(4.0, size[1]))
    label = labels(results)[0]
    alt = (
        f"by the first block that runs twice and the width of the stretches, for"
        f" {len(results['plans'])} plans; {label}:"
    )
    return {
        "plans-perplexity": Picture(
            lambda figure: _draw(figure, results, "perplexity"),
            f"Map of perplexity {alt} {short(own['perplexity'])}, with writes scaled by sqrt(1/2)"
            f" {short(scaled['perplexity'])}, the base {short(base)}.",
            size,
        ),
        "plans-agreement": Picture(
            lambda figure: _draw(figure, results, "agreement"),
            f"Map of agreement with the base's best token {alt} {own['agreement']:.0%}, with writes"
            f" scaled by sqrt(1/2) {scaled['agreement']:.0%}.",
            size,
        ),
    }


def _draw(figure: "Figure", results: Results, what: str) -> None:
    """A panel for each number of repeats (across) and scale (down); bright is near the base."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, Normalize

    grid, base = results["grid"], results["base"]["perplexity"]
    values = [plan[what] for plan in results["plans"]]
    if what == "perplexity":
        low = min(base, *values)
        worst = max(low * 1.01, min(max(values), _WORST * base))
        colours = ScalarMappable(LogNorm(low, worst, clip=True), "viridis_r")
        text: Callable[[float], str] = short
        beyond = "max" if max(values) > worst else "neither"
    else:
        colours = ScalarMappable(Normalize(0, 1), "viridis")
        text = _percent
        beyond = "neither"
    panels = figure.subplots(
        len(grid["scales"]), len(grid["repeats"]), sharex=True, sharey=True, squeeze=False
    )
    for row, scale in zip(panels, grid["scales"], strict=True):
        for panel, repeats in zip(row, grid["repeats"], strict=True):
            plans = [p for p in results["plans"] if p.get("repeats") == repeats]
            plans = [p for p in plans if p["scale"] == scale]
            _panel(panel, grid, plans, lambda p: p[what], colours, text)
            stretches = "1 stretch" if repeats == 1 else f"{repeats} stretches"
            writes = "unscaled" if scale == 1 else f"scaled by {shown(scale)}"
            panel.set_title(f"{stretches} run twice, {writes}", fontsize=9.5)
    _mark(figure, results, panels)
    for panel in panels[-1]:
        panel.set_xlabel("first block that runs twice", fontsize=9.5)
    for panel in panels[:, 0]:
        panel.set_ylabel("blocks a stretch", fontsize=9.5)
    name = "perplexity" if what == "perplexity" else "same best token as the base"
    figure.suptitle(
        f"{name[0].upper()}{name[1:]}, {len(values)} plans over {results['blocks']} blocks",
        fontsize=12,
        fontweight="bold",
    )
    bar = figure.colorbar(colours, ax=panels, extend=beyond, pad=0.02, aspect=25)
    _label_bar(bar, base if what == "perplexity" else None)


def _cell_inches(grid: Results) -> float:
    """How wide a cell can be, for a picture of no more than some 12 inches."""
    return min(_CELL, 10.5 / len(grid["repeats"]) / len(grid["starts"]))


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"


def _panel(
    panel: "Axes",
    grid: Results,
    plans: Sequence[Results],
    value: Callable[[Results], float],
    colours: Any,
    text: Callable[[float], str],
) -> None:
    """One start-by-width map. What no model of this size can run stays hatched."""
    import numpy as np

    panel.patch.set(facecolor=PAPER, edgecolor=FAINT, hatch="////", linewidth=0)
    cells = np.full((len(grid["widths"]), len(grid["starts"])), np.nan)
    for plan in plans:
        if plan["start"] in grid["starts"] and plan["width"] in grid["widths"]:
            place = grid["widths"].index(plan["width"]), grid["starts"].index(plan["start"])
            cells[place] = value(plan)
    panel.pcolormesh(
        np.ma.masked_invalid(cells), cmap=colours.cmap, norm=colours.norm, edgecolor=PAPER
    )
    if _cell_inches(grid) >= _READABLE:
        for (y, x), cell in np.ndenumerate(cells):
            if np.isfinite(cell):
                red, green, blue, _ = colours.to_rgba(cell)
                light = 0.3 * red + 0.59 * green + 0.11 * blue > 0.5
                ink = "#000000" if light else "#ffffff"
                panel.text(
                    x + 0.5, y + 0.42, text(cell), color=ink, fontsize=7.5, ha="center", va="center"
                )
    for axis, values in ((panel.xaxis, grid["starts"]), (panel.yaxis, grid["widths"])):
        every = -(-len(values) // 16)
        axis.set_ticks([k + 0.5 for k in range(0, len(values), every)], values[::every])
    panel.tick_params(length=0, labelsize=8.5)
    for spine in panel.spines.values():
        spine.set(visible=True, color=FAINT)


def _mark(figure: "Figure", results: Results, panels: Any) -> None:
    """A marker of its own on the card's plan and on its scaled variant, where they are cells."""
    grid = results["grid"]
    for index, (name, label) in enumerate(zip(results["card"], labels(results), strict=False)):
        plan = next(p for p in results["plans"] if p["name"] == name)
        keys = ("scales", "scale"), ("repeats", "repeats"), ("widths", "width"), ("starts", "start")
        if any(plan[one] not in grid[several] for several, one in keys):
            continue
        row, column, y, x = (grid[several].index(plan[one]) for several, one in keys)
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
    figure.legend(
        loc="outside lower center",
        ncols=2,
        fontsize=9,
    )


def _label_bar(bar: Any, base: float | None) -> None:
    """The colour bar, with a line where the base stands."""
    bar.ax.tick_params(which="both", labelsize=8.5)
    bar.outline.set_edgecolor(FAINT)
    if base is not None:
        low, high = bar.mappable.norm.vmin, bar.mappable.norm.vmax
        round_ones = [step * 10.0**k for k in range(7) for step in (1, 1.5, 2, 3, 5, 7)]
        steps = [x for x in round_ones if low <= x <= high and abs(math.log(x / base)) > 0.1]
        bar.ax.set_yticks([base, *steps], [f"base {short(base)}", *map(short, steps)])
        bar.ax.set_yticks([], minor=True)
        bar.ax.axhline(base, color=COLOURS[1], linewidth=3)
    else:
        bar.ax.set_yticks([k / 5 for k in range(6)], [f"{20 * k}%" for k in range(6)])
