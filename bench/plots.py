"""Pictures of results: SVGs with light and dark colours in one file, as the reader's page is.

matplotlib is imported where something is drawn, so that a run without it still gives tables,
and used without its global state: no window, no current figure, and a file's bytes depend on
the results alone.
"""

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.report import Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER, INK = "#fefefe", "#1f2328"
FAINT = "#d1d9e0"  # grid, frames, what only helps reading
# Of the first side, the second, then peers. Told apart by hue and by lightness, so also by readers
# who see no red or green.
COLOURS = ("#0b5fa5", "#c4500b", "#00806a", "#a0498a", "#6e7781")
# What stands for each on a dark page. None is a light one too.
DARK = {
    PAPER: "#0d1117",
    INK: "#e6edf3",
    FAINT: "#30363d",
    **dict(zip(COLOURS, ("#58a6ff", "#f0883e", "#3fc9a8", "#e29ac9", "#9198a1"), strict=True)),
}
_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": FAINT,
    "axes.facecolor": PAPER,
    "axes.labelcolor": INK,
    "axes.prop_cycle": f"cycler(color={list(COLOURS)}, marker={list('os^Dv')})",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "errorbar.capsize": 3,
    "figure.constrained_layout.h_pad": 0.1,  # inches
    "figure.constrained_layout.w_pad": 0.1,
    "figure.facecolor": PAPER,
    "grid.color": FAINT,
    "legend.frameon": False,
    "lines.markeredgecolor": PAPER,
    "svg.fonttype": "none",  # text stays text; any sans-serif a reader has is no wider
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Picture:
    """Something to draw, in inches, and what it shows for someone who can't see it."""

    draw: Callable[["Figure"], object]  # on an empty figure
    alt: str
    size: tuple[float, float] = (8.0, 4.5)
    of: str = ""  # whose figures these are, where it is not the run's model
    note: str = ""  # of what model, on what machine, when: stands above the picture

    def markdown(self, name: str, folder: str = "") -> str:
        """The picture as `save` wrote it to NAME.svg."""
        return f'<img alt="{self.alt}" src="{folder}{name}.svg">'


def save(picture: Picture, directory: Path, name: str) -> Path:
    """NAME.svg. Raises ImportError without matplotlib."""
    from matplotlib import style

    path, file = directory / f"{name}.svg", io.StringIO()
    metadata = {"Date": None, "Creator": None, "Title": picture.alt}
    # The user's own settings count for nothing.
    with style.context([_STYLE | {"svg.hashsalt": name}], after_reset=True):
        drawn(picture).savefig(file, format="svg", metadata=metadata)
    # Viewers that know no CSS show the light colours.
    rules = [
        f'[style*="{what}: {light}"],[{what}="{light}"]{{{what}: {dark} !important}}'
        for light, dark in DARK.items()
        for what in ("fill", "stroke")
    ]
    dark = f"@media (prefers-color-scheme: dark){{{''.join(rules)}}}</style>"
    path.write_text(file.getvalue().replace("</style>", dark, 1), "utf-8")
    return path


def drawn(picture: Picture) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(picture.size, layout="constrained")
    picture.draw(figure)
    if picture.note:
        figure.suptitle(picture.note, x=0.01, ha="left", fontsize="small")
    return figure


def curves(
    series: Mapping[str, Sequence[tuple[float, Spread]]],
    alt: str,
    *,
    x: str,
    y: str,
    title: str,
    log_x: bool = True,
    log_y: bool = False,
    of: str = "",
) -> Picture:
    """A line for each series through its medians, with a whisker from lowest to highest."""

    def draw(figure: "Figure") -> None:
        from matplotlib.ticker import LogLocator

        plot = figure.add_subplot(title=title, xlabel=x, ylabel=y)
        plot.grid()
        for name, points in series.items():
            places = [place for place, _ in points]
            middle = [s.median for _, s in points]
            reach = [[s.median - s.low for _, s in points], [s.high - s.median for _, s in points]]
            plot.errorbar(places, middle, yerr=reach, label=name)
        if log_x:
            places = sorted({place for points in series.values() for place, _ in points})
            plot.set_xscale("log")
            plot.set_xticks(places, [tokens(place) for place in places])
            plot.set_xticks([], minor=True)
        if log_y:
            plot.set_yscale("log")
            plot.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            plot.yaxis.set_major_formatter(number)
            plot.set_yticks([], minor=True)
        else:
            plot.set_ylim(bottom=min(0.0, plot.get_ylim()[0]))
            plot.yaxis.set_major_formatter(number)
        legend(figure, plot)

    return Picture(draw, alt, of=of)


def intervals(
    rows: Sequence[tuple[str, float, float, float]], alt: str, *, x: str, title: str
) -> Picture:
    """A row for each (label, value, low, high), around a line at 0.

    A hollow point's interval includes 0: no difference was shown.
    """

    def draw(figure: "Figure") -> None:
        plot = figure.add_subplot(title=title, xlabel=x)
        plot.grid(axis="x")
        plot.axvline(0, color=INK, linewidth=1)
        for place, (_, value, low, high) in enumerate(rows):
            shown = low > 0 or high < 0
            hue = COLOURS[0 if shown else -1]
            reach = [[value - low], [high - value]]
            point = plot.errorbar(value, place, xerr=reach, marker="o", color=hue)[0]
            point.set(markeredgecolor=hue, markerfacecolor=hue if shown else PAPER)
        plot.set_yticks(range(len(rows)), [textwrap.fill(label, 34) for label, *_ in rows])
        plot.set_ylim(len(rows) - 0.5, -0.5)
        plot.tick_params(axis="y", length=0)
        figure.supxlabel("hollow: the interval includes 0", fontsize="small", x=0.99, ha="right")

    return Picture(draw, alt, (8.0, 1.5 + 0.4 * len(rows)))


def number(value: float, place: float = 0) -> str:
    """Three digits that matter; at any place of an axis."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def tokens(value: float) -> str:
    """A number of tokens: 512, 2k for 2048."""
    return f"{value / 1024:g}k" if value >= 1024 and value % 1024 == 0 else f"{value:g}"


def legend(figure: "Figure", plot: "Axes") -> None:
    """Under the picture, where it hides nothing, in as many columns as fit."""
    handles, labels = plot.get_legend_handles_labels()
    fit = int(figure.get_size_inches()[0] * 14 / (max(map(len, labels), default=0) + 8))
    columns = max(1, min(fit, len(labels)))
    figure.legend(handles, labels, loc="outside lower left", ncols=columns)
