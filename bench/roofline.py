"""The roofline of decoding: how far each pace is below what memory bandwidth allows."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from bench.plots import INK, LINES, Picture, colour, legend, log_scale, marker, number, whiskers
from bench.report import Spread
from mlx_cerebrum.model.memory import GB

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def roofline(
    ceilings: Mapping[str, float], points: Mapping[str, tuple[float, Spread]], alt: str
) -> Picture:
    """Decode pace over bytes read a token, under the slanted lines bandwidth / bytes.

    `ceilings` in GB/s; `points` are (bytes a token, tokens/s). Nothing can be above a line that
    is true of its machine; how far a point is below the highest is drawn as a dotted line.
    """
    roofs = sorted(ceilings.items(), key=lambda roof: -roof[1])
    sizes = [size / GB for size, _ in points.values()]
    left, right = min(sizes) / 2.5, max(sizes) * 2.5

    def draw(figure: "Figure") -> None:
        plot = figure.add_subplot(
            title="Decode under the bandwidth's roof", xlabel="GB read a token", ylabel="tokens/s"
        )
        plot.grid()
        for index, (name, gbs) in enumerate(roofs):
            plot.plot(
                [left, right],
                [gbs / left, gbs / right],
                color=INK,
                linestyle=LINES[index % len(LINES)],
                linewidth=1.3,
                label=f"{name}: {number(gbs)} GB/s",
            )
        for index, (name, (_, pace)) in enumerate(points.items()):
            size, hue = sizes[index], colour(index)
            plot.plot([size] * 2, [pace.median, roofs[0][1] / size], ":", color=hue, linewidth=1.2)
            plot.errorbar(
                size,
                pace.median,
                yerr=whiskers([pace]),
                color=hue,
                marker=marker(index),
                markersize=8,
                linestyle="none",
                label=f"{name}: {number(pace.median)} tokens/s",
            )
        log_scale(plot, "x")
        log_scale(plot, "y")
        plot.set_xlim(left, right)
        legend(figure, plot)

    return Picture(draw, alt)
