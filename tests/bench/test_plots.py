"""Pictures of results: readable in both themes, the same bytes each time. Needs matplotlib."""

import math
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import plots
from bench.axes import apart, count, number
from bench.plots import DARK, LIGHT, Picture, Theme, bars, curves, intervals, roofline
from bench.report import Spread

ROOT = Path(__file__).parents[2]


def about(value: float) -> Spread:
    return Spread(value, value * 0.9, value * 1.1)


def curves_picture(name: str = "as it is", log_y: bool = False) -> Picture:
    series = {name: [(128.0, about(300)), (8192.0, about(90))], "b": [(512.0, about(50))]}
    return Picture(
        lambda f, t: curves(f, t, series, x="tokens", y="tokens/s", title="T", log_y=log_y),
        "Pace <of> a & b",
    )


PICTURES: dict[str, Callable[[], Picture]] = {
    "curves": curves_picture,
    "curves-log": lambda: curves_picture(log_y=True),
    "bars": lambda: Picture(
        lambda f, t: bars(f, t, {"x": {"a": 1.0, "b": 2.0}, "y": {"b": 3.0}}, y="GB", title="T"),
        "Bars",
    ),
    "intervals": lambda: Picture(
        lambda f, t: intervals(f, t, [("q", 0.1, -0.1, 0.2), ("r", 1, 0.5, 2)], x="", title="T"),
        "Intervals",
    ),
    "roofline": lambda: Picture(
        lambda f, t: roofline(
            f, t, {"copy": 17.0}, {"a": (5e8, about(15)), "b": (8e8, about(9))}, title="T"
        ),
        "Roofline",
    ),
}
EMPTY = {
    "curves": Picture(lambda f, t: curves(f, t, {"a": []}, x="", y="", title="T"), ""),
    "bars": Picture(lambda f, t: bars(f, t, {}, y="", title="T"), ""),
    "intervals": Picture(lambda f, t: intervals(f, t, [], x="", title="T"), ""),
    "roofline": Picture(lambda f, t: roofline(f, t, {}, {}, title="T"), ""),
}


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def without_red_and_green(colour: str) -> tuple[float, ...]:
    """What a deuteranope sees, in linear light (Vienot, Brettel and Mollon 1999, severity 1)."""
    r, g, b = (((int(colour[i : i + 2], 16) / 255) + 0.055) / 1.055 for i in (1, 3, 5))
    r, g, b = r**2.4, g**2.4, b**2.4
    seen = 0.29275 * r + 0.70725 * g
    return seen, seen, -0.02234 * r + 0.02234 * g + b


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_colours_stand_out(theme: Theme) -> None:
    assert contrast(theme.ink, theme.paper) >= 4.5
    assert all(contrast(colour, theme.paper) >= 3 for colour in theme.colours)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)  # WCAG's own example


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_colours_differ_for_a_deuteranope(theme: Theme) -> None:
    for a, b in combinations(theme.colours[:3], 2):
        assert math.dist(without_red_and_green(a), without_red_and_green(b)) > 0.1, (a, b)


@pytest.mark.parametrize("name", PICTURES)
def test_drawing_warns_of_nothing(name: str, tmp_path: Path) -> None:
    path = plots.save(PICTURES[name](), tmp_path, name)
    assert list(tmp_path.iterdir()) == [path]
    assert path.name == f"{name}.svg"
    assert path.stat().st_size < 60_000


@pytest.mark.parametrize("name", PICTURES)
def test_every_colour_has_one_for_the_dark(name: str, tmp_path: Path) -> None:
    svg = plots.save(PICTURES[name](), tmp_path, name).read_text(encoding="utf-8")
    style, _, drawing = svg.partition("</style>")
    used = set(re.findall(r"(fill|stroke): (#[0-9a-f]{6})", drawing))
    assert used
    for what, colour in used:
        rule = re.search(
            rf'\[style\*="{what}: {colour}"\],\[{what}="{colour}"\]\{{{what}: (#\w+) !important',
            style,
        )
        assert rule, (what, colour)
        assert rule[1] in plots._colours(DARK)
    assert not set(plots._colours(LIGHT)) & set(plots._colours(DARK))


def test_bytes_depend_on_the_results_alone(tmp_path: Path) -> None:
    """Not on the user's settings either, which are left as they were."""
    import matplotlib as mpl

    def drawn(name: str = "as it is") -> bytes:
        return plots.save(curves_picture(name), tmp_path, "p").read_bytes()

    first = drawn()
    with mpl.rc_context({"font.size": 30, "svg.fonttype": "path"}):
        assert drawn() == first
        assert mpl.rcParams["font.size"] == 30
    assert drawn("other") != first
    svg = first.decode()
    assert "<title>Pace &lt;of&gt; a &amp; b</title>" in svg
    assert "<dc:date>" not in svg


def test_names_are_text(tmp_path: Path) -> None:
    """No formulas, no markup, and no warning of letters that the font lacks."""
    svg = plots.save(curves_picture("$x^2$ <b> \u6a21\u578b"), tmp_path, "p")
    text = svg.read_text(encoding="utf-8")
    assert "$x^2$ &lt;b&gt; \u6a21\u578b" in text


def test_no_window_toolkit_is_loaded() -> None:
    code = (
        "import sys, bench.plots; assert 'matplotlib' not in sys.modules;"
        "import pathlib, tempfile; sys.path[:0] = ['tests', 'tests/bench']; import test_plots as t;"
        "bench.plots.save(t.curves_picture(), pathlib.Path(tempfile.mkdtemp()), 'p');"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr


def axes_of(picture: Picture) -> Any:
    with plots._quiet("p"):
        return plots.drawn(picture, LIGHT).axes[0]


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_measured_is_said(name: str) -> None:
    assert [text.get_text() for text in axes_of(EMPTY[name]).texts] == ["nothing measured"]


def test_a_log_axis_leaves_out_what_it_can_not_show() -> None:
    points = [(0.0, about(5)), (128.0, Spread(1.0, 0.0, 2.0)), (512.0, about(7))]
    points.append((1024.0, about(math.nan)))
    picture = Picture(
        lambda f, t: curves(f, t, {"a": points}, x="", y="", title="", log_y=True), ""
    )
    (line, *_) = axes_of(picture).get_lines()
    assert list(line.get_xdata()) == [512.0]


def test_a_missing_bar_leaves_a_gap() -> None:
    bars_drawn = axes_of(PICTURES["bars"]()).patches
    assert sorted(round(bar.get_x() + bar.get_width() / 2, 3) for bar in bars_drawn) == [
        -0.2,
        0.2,
        1.2,
    ]


def test_an_interval_over_zero_is_hollow() -> None:
    lines = axes_of(PICTURES["intervals"]()).get_lines()
    points = [line for line in lines if len(line.get_xdata()) == 1]
    assert [line.get_markerfacecolor() == LIGHT.paper for line in points] == [True, False]


def test_the_roof_is_bandwidth_over_bytes() -> None:
    plot = axes_of(PICTURES["roofline"]())
    roof = next(line for line in plot.get_lines() if line.get_label() == "copy: 17 GB/s")
    assert all(x * y == pytest.approx(17) for x, y in roof.get_xydata())


@pytest.mark.parametrize(
    ("reached", "second"), [(0.03, 1.75), (0.6, 1.0), (0.97, 1.05), (0.97, 1.75)]
)
def test_names_of_points_do_not_overlap(reached: float, second: float) -> None:
    sizes = {"cerebrum-7b": 4e9, "cerebrum-12.25b": 4e9 * second, "mlx-lm": 4e9 * second}
    points = {name: (size, about(350e9 * reached / size)) for name, size in sizes.items()}
    ceilings = {"copy": 330.0, "matvec": 350.0, "published": 400.0}
    plot = axes_of(Picture(lambda f, t: roofline(f, t, ceilings, points, title="T"), ""))
    plot.figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in plot.texts]
    frame = plot.figure.bbox
    assert len(boxes) == 3
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert all(box.x0 > 0 and box.x1 < frame.width and box.y0 > 0 for box in boxes)


@settings(deadline=None, max_examples=200)
@given(st.floats(1e-6, 1e12))
def test_numbers_are_plain_and_near(value: float) -> None:
    text = number(value)
    assert "e" not in text
    assert float(text.replace(",", "")) == pytest.approx(value, rel=0.006)


def test_numbers_as_shown() -> None:
    assert [number(v) for v in (0, 0.1 + 0.2, 9.999, 15.8, 1234.5, -0.05, math.inf)] == [
        "0", "0.3", "10", "15.8", "1,234", "-0.05", "-",
    ]  # fmt: skip
    assert [count(v) for v in (128, 2048, 3000)] == ["128", "2k", "3000"]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(1, 1e6), min_size=1, max_size=200, unique=True))
def test_ticks_have_room(values: list[float]) -> None:
    kept = apart(sorted(values), 14)
    assert kept[0] == min(values)
    assert 1 <= len(kept) <= 15
