"""What every picture's axes share: colours, a grid, ticks that are plain numbers, a legend."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from bench.report import Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from bench.plots import Theme

MARKERS = "os^Dv"
LINES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1, 2)), (0, (1, 2)))


def colour(theme: "Theme", index: int) -> str:
    return theme.colours[index % len(theme.colours)]


def axes(figure: "Figure", theme: "Theme", *, x: str, y: str, title: str) -> "Axes":
    """Empty axes in the theme's colours, with a grid."""
    made = figure.add_subplot(facecolor=theme.paper)
    made.set_title(title, color=theme.ink, wrap=True)
    made.set_xlabel(x, color=theme.ink)
    made.set_ylabel(y, color=theme.ink)
    made.tick_params(colors=theme.ink, which="both", labelsize=9)
    made.tick_params(length=0, which="minor")
    made.grid(color=theme.faint, linewidth=0.7)
    for spine in made.spines.values():
        spine.set_color(theme.faint)
    return made


def number(value: float) -> str:
    """Three digits that matter, and never an exponent."""
    if not math.isfinite(value):
        return "-"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    text = f"{value:.{max(0, digits)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def count(value: float) -> str:
    """A number of tokens: 512, 2k for 2048."""
    return f"{value / 1024:g}k" if value >= 1024 and value % 1024 == 0 else f"{value:g}"


def whiskers(spreads: Sequence[Spread]) -> list[list[float]]:
    return [
        [max(0.0, s.median - s.low) for s in spreads],
        [max(0.0, s.high - s.median) for s in spreads],
    ]


def apart(values: Sequence[float], most: int) -> list[float]:
    """Those of the sorted values whose labels have room on a logarithmic axis."""
    least = math.log(values[-1] / values[0]) / most
    kept = [values[0]]
    for value in values[1:]:
        if math.log(value / kept[-1]) >= least:
            kept.append(value)
    return kept


def log_ticks(axis: "Axis", low: float, high: float) -> None:
    """Plain numbers on a logarithmic axis, few enough to read, and at least two."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    places: list[float] = []
    for steps in ((1,), (1, 3), (1, 2, 5), range(1, 10), [k / 10 for k in range(10, 100)]):
        places = [step * 10.0**k for k in decades for step in steps]
        places = [place for place in places if low <= place <= high]
        if len(places) >= 3:
            break
    ticks(axis, places, number)


def ticks(axis: "Axis", places: Sequence[float], text: Callable[[float], str] = count) -> None:
    axis.set_ticks(list(places), [text(place) for place in places])
    axis.set_ticks([], minor=True)


def legend(figure: "Figure", plot: "Axes", theme: "Theme") -> None:
    """Under the picture, where it hides nothing, in as many columns as fit."""
    handles, labels = plot.get_legend_handles_labels()
    if not handles:
        return
    fit = int(figure.get_size_inches()[0] * 72 / (max(map(len, labels)) * 5.5 + 40))
    figure.legend(
        handles,
        labels,
        loc="outside lower left",
        ncols=max(1, min(fit, len(labels))),
        labelcolor=theme.ink,
        fontsize=9,
    )


def nothing(plot: "Axes", theme: "Theme") -> "Axes":
    plot.set_xticks([])
    plot.set_yticks([])
    text = plot.text(0.5, 0.5, "nothing measured", transform=plot.transAxes, color=theme.ink)
    text.set(ha="center", va="center")
    return plot
