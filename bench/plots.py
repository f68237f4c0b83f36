"""Pictures of results: SVGs with light and dark colours in one file, as the reader's page is.

matplotlib is imported where something is drawn, so that a run without it still gives tables,
and used without its global state: no window, no current figure, and a file's bytes depend on
the results alone.
"""

import contextlib
import io
import logging
import math
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.axes import (
    LINES,
    MARKERS,
    apart,
    axes,
    colour,
    legend,
    log_ticks,
    nothing,
    number,
    ticks,
    whiskers,
)
from bench.report import Spread
from bench.roofline import roofline as roofline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """Colours of one version. Light and dark have no colour in common: one stands for the other."""

    paper: str
    ink: str
    faint: str  # grid, frames, what only helps reading
    colours: tuple[str, ...]  # of the first side, the second, then peers


Draw = Callable[[Any, Theme], object]  # draws on an empty matplotlib Figure; returns what it likes

# Told apart by hue and by lightness, so also by readers who see no red or green.
LIGHT = Theme(
    "#fefefe", "#1f2328", "#d1d9e0", ("#0b5fa5", "#c4500b", "#00806a", "#a0498a", "#6e7781")
)
DARK = Theme(
    "#0d1117", "#e6edf3", "#30363d", ("#58a6ff", "#f0883e", "#3fc9a8", "#e29ac9", "#9198a1")
)
_DPI = 110
_LABEL = 8.5  # points
_STYLE = {
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "figure.constrained_layout.h_pad": 0.1,  # inches
    "figure.constrained_layout.w_pad": 0.1,
    "font.size": 10,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "svg.fonttype": "none",  # text stays text; any sans-serif a reader has is no wider
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
}


@dataclass(frozen=True)
class Picture:
    """Something to draw, in inches, and what it shows for someone who can't see it."""

    draw: Draw
    alt: str
    size: tuple[float, float] = (8.0, 4.5)

    def markdown(self, name: str, folder: str = "") -> str:
        """The picture as `save` wrote it to NAME.svg."""
        return f'<img alt="{self.alt}" src="{folder}{name}.svg">'


def save(picture: Picture, directory: Path, name: str) -> Path:
    """NAME.svg. Raises ImportError without matplotlib."""
    path, file = directory / f"{name}.svg", io.StringIO()
    with _quiet(name):
        metadata = {"Date": None, "Creator": None, "Title": picture.alt}
        drawn(picture, LIGHT).savefig(file, format="svg", metadata=metadata)
    path.write_text(file.getvalue().replace("</style>", f"{_in_the_dark()}</style>", 1), "utf-8")
    return path


def _in_the_dark() -> str:
    """CSS that shows LIGHT's colours as DARK's. Viewers that know no CSS show the light ones."""
    pairs = zip(_colours(LIGHT), _colours(DARK), strict=True)
    rules = [
        f'[style*="{what}: {light}"],[{what}="{light}"]{{{what}: {dark} !important}}'
        for light, dark in pairs
        for what in ("fill", "stroke")
    ]
    return f"@media (prefers-color-scheme: dark){{{''.join(rules)}}}"


def _colours(theme: Theme) -> tuple[str, ...]:
    return theme.paper, theme.ink, theme.faint, *theme.colours


def drawn(picture: Picture, theme: Theme) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(picture.size, _DPI, facecolor=theme.paper, layout="constrained")
    picture.draw(figure, theme)
    return figure


@contextlib.contextmanager
def _quiet(salt: str) -> Iterator[None]:
    """matplotlib at its own defaults, whatever the user's are, and no word about its fonts."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)  # "building the font cache", at the first import
    try:
        from matplotlib import style

        with (
            style.context([_STYLE | {"svg.hashsalt": salt}], after_reset=True),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", "Glyph .* missing from")  # shown as a box
            yield
    finally:
        logger.setLevel(level)


def curves(
    figure: "Figure",
    theme: Theme,
    series: Mapping[str, Sequence[tuple[float, Spread]]],
    *,
    x: str,
    y: str,
    title: str,
    log_x: bool = True,
    log_y: bool = False,
) -> "Axes":
    """A line for each series through its medians, with a whisker from lowest to highest.

    What a logarithmic axis can't show (zero and below) is left out.
    """
    plot = axes(figure, theme, x=x, y=y, title=title)
    at: set[float] = set()
    for index, (name, points) in enumerate(series.items()):
        kept = [
            (where, spread)
            for where, spread in points
            if math.isfinite(spread.median)
            and (where > 0 or not log_x)
            and (spread.low > 0 or not log_y)
        ]
        if not kept:
            continue
        at |= {where for where, _ in kept}
        plot.errorbar(
            [where for where, _ in kept],
            [spread.median for _, spread in kept],
            yerr=whiskers([spread for _, spread in kept]),
            color=colour(theme, index),
            marker=MARKERS[index % len(MARKERS)],
            linestyle=LINES[index // len(theme.colours) % len(LINES)],
            markeredgecolor=theme.paper,
            elinewidth=1.2,
            capsize=3,
            label=name,
        )
    if not at:
        return nothing(plot, theme)
    if log_x:
        plot.set_xscale("log")
        ticks(plot.xaxis, apart(sorted(at), 14))
    if log_y:
        plot.set_yscale("log")
        log_ticks(plot.yaxis, *plot.get_ylim())
    else:
        plot.set_ylim(bottom=min(0.0, plot.get_ylim()[0]))
        plot.yaxis.set_major_formatter(lambda value, _: number(value))
    plot.margins(x=0.04)
    legend(figure, plot, theme)
    return plot


def bars(
    figure: "Figure",
    theme: Theme,
    groups: Mapping[str, Mapping[str, float]],
    *,
    y: str,
    title: str,
) -> "Axes":
    """Groups of bars, each with its value on it; a series that a group lacks leaves a gap."""
    plot = axes(figure, theme, x="", y=y, title=title)
    plot.grid(visible=False, axis="x")
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    if not names:
        return nothing(plot, theme)
    width = 0.8 / len(names)
    room = figure.get_size_inches()[0] * 72 / (len(groups) * len(names)) * 0.7  # points a bar
    for index, name in enumerate(names):
        found = [(k, group[name]) for k, group in enumerate(groups.values()) if name in group]
        drawn_bars = plot.bar(
            [k + (index - (len(names) - 1) / 2) * width for k, _ in found],
            [value for _, value in found],
            width * 0.92,
            color=colour(theme, index),
            label=name,
        )
        labels = [number(value) for _, value in found]
        upright = room < max(map(len, labels)) * _LABEL * 0.62
        plot.bar_label(
            drawn_bars,
            labels,
            padding=2,
            color=theme.ink,
            fontsize=_LABEL,
            rotation=90 if upright else 0,
        )
    characters = max(8, int(figure.get_size_inches()[0] * 10 / len(groups)))
    plot.set_xticks(range(len(groups)), [textwrap.fill(name, characters) for name in groups])
    plot.tick_params(axis="x", length=0)
    plot.yaxis.set_major_formatter(lambda value, _: number(value))
    plot.margins(y=0.14)
    if len(names) > 1:
        legend(figure, plot, theme)
    return plot


def intervals(
    figure: "Figure",
    theme: Theme,
    rows: Sequence[tuple[str, float, float, float]],
    *,
    x: str,
    title: str,
) -> "Axes":
    """A row for each (label, value, low, high), around a line at 0.

    A hollow point's interval includes 0: no difference was shown.
    """
    plot = axes(figure, theme, x=x, y="", title=title)
    plot.grid(visible=False, axis="y")
    if not rows:
        return nothing(plot, theme)
    plot.axvline(0, color=theme.ink, linewidth=1)
    for place, (_, value, low, high) in enumerate(rows):
        shown = low > 0 or high < 0
        hue = colour(theme, 0) if shown else colour(theme, len(theme.colours) - 1)
        plot.plot([low, high], [place, place], color=hue, solid_capstyle="round")
        plot.plot(value, place, "o", color=hue, markerfacecolor=hue if shown else theme.paper)
    plot.set_yticks(range(len(rows)), [textwrap.fill(label, 34) for label, *_ in rows])
    plot.set_ylim(len(rows) - 0.5, -0.5)
    plot.tick_params(axis="y", length=0)
    if any(low <= 0 <= high for _, _, low, high in rows):
        figure.supxlabel(
            "hollow: the interval includes 0", color=theme.ink, fontsize=_LABEL, x=0.99, ha="right"
        )
    return plot
