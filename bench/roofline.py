"""The roofline of decoding: how far each pace is below what memory bandwidth allows."""

import itertools
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING

from bench.axes import LINES, MARKERS, axes, colour, legend, log_ticks, nothing, number, whiskers
from bench.report import Spread
from mlx_cerebrum.model.memory import GB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bench.plots import Theme


def roofline(
    figure: "Figure",
    theme: "Theme",
    ceilings: Mapping[str, float],
    points: Mapping[str, tuple[float, Spread]],
    *,
    title: str,
) -> "Axes":
    """Decode pace over bytes read a token, under the slanted lines bandwidth / bytes.

    `ceilings` in GB/s; `points` are (bytes a token, tokens/s). Nothing can be above a line that
    is true of its machine; how far a point is below the highest is drawn as a dotted line.
    """
    plot = axes(figure, theme, x="GB read a token", y="tokens/s", title=title)
    kept = {n: (size / GB, pace) for n, (size, pace) in points.items() if size > 0 and pace.low > 0}
    roofs = sorted(
        ((name, gbs) for name, gbs in ceilings.items() if gbs > 0), key=lambda roof: -roof[1]
    )
    if not kept or not roofs:
        return nothing(plot, theme)
    sizes = [size for size, _ in kept.values()]
    left, right = min(sizes) / 2.5, max(sizes) * 2.5
    top = max(roofs[0][1] / left, *(pace.high for _, pace in kept.values()))
    bottom = min(roofs[-1][1] / right, *(pace.low for _, pace in kept.values())) / 4
    for index, (name, gbs) in enumerate(roofs):
        plot.plot(
            [left, right],
            [gbs / left, gbs / right],
            color=theme.ink,
            linestyle=LINES[index % len(LINES)],
            linewidth=1.3,
            label=f"{name}: {number(gbs)} GB/s",
        )
    for index, (size, pace) in enumerate(kept.values()):
        hue = colour(theme, index)
        plot.plot([size] * 2, [pace.median, roofs[0][1] / size], ":", color=hue, linewidth=1.2)
        plot.errorbar(
            size,
            pace.median,
            yerr=whiskers([pace]),
            color=hue,
            marker=MARKERS[index % len(MARKERS)],
            markersize=8,
            markeredgecolor=theme.paper,
            capsize=4,
            linestyle="none",
        )
    plot.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top * 1.1))
    log_ticks(plot.xaxis, left, right)
    log_ticks(plot.yaxis, bottom, top)
    legend(figure, plot, theme)
    _name_points(figure, plot, theme, kept)
    return plot


def _name_points(
    figure: "Figure", plot: "Axes", theme: "Theme", points: Mapping[str, tuple[float, Spread]]
) -> None:
    """Each point's name and pace beside it, clear of lines, markers and other names."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # so that the texts' extents are known
    frame = plot.get_window_extent()
    lines = [line.get_transform().transform_path(line.get_path()) for line in plot.get_lines()]
    taken = []
    for size, pace in points.values():
        x, y = plot.transData.transform((size, pace.median))
        taken.append(Bbox([(x - 9, y - 9), (x + 9, y + 9)]))

    def clear(box: Bbox) -> bool:
        inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0
        crossed = any(line.intersects_bbox(box, filled=False) for line in lines)
        return inside and not crossed and not box.count_overlaps(taken)

    for index, (name, (size, pace)) in enumerate(points.items()):
        text = plot.annotate(
            f"{textwrap.shorten(name, 40)}\n{number(pace.median)} tokens/s",
            (size, pace.median),
            xytext=(0, 0),
            textcoords="offset points",
            color=colour(theme, index),
            fontsize=9,
            annotation_clip=False,
        )
        # Below and to the left there is nothing but the roof's shade; so that side first.
        for dy, dx in itertools.product((-8, -32, -56, 8), (-9, 9)):
            text.set_position((dx, dy))
            text.set(ha="right" if dx < 0 else "left", va="top" if dy < 0 else "bottom")
            if clear(text.get_window_extent()):
                break
        taken.append(text.get_window_extent())
