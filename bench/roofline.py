"""The roofline of decoding: how far each pace is below what memory bandwidth allows."""

from collections.abc import Mapping

from bench.plots import Picture, curves, number
from bench.report import Spread
from mlx_cerebrum.model.memory import GB


def roofline(
    ceilings: Mapping[str, float], points: Mapping[str, tuple[float, Spread]], alt: str
) -> Picture:
    """Decode pace over bytes read a token, under the slanted lines bandwidth / bytes.

    `ceilings` in GB/s; `points` are (bytes a token, tokens/s). Nothing can be above a line that
    is true of its machine.
    """
    series = {
        f"{name}: {number(pace.median)} tokens/s": [(float(f"{size / GB:.3g}"), pace)]
        for name, (size, pace) in points.items()
    }
    places = [place for ((place, _),) in series.values()]
    for name, gbs in ceilings.items():
        roof = [(x, Spread.of([gbs / x])) for x in (min(places) / 2, max(places) * 2)]
        series[f"{name}: {number(gbs)} GB/s"] = roof
    title = "Decode under the bandwidth's roof"
    return curves(series, alt, x="GB read a token", y="tokens/s", title=title, log_y=True)
