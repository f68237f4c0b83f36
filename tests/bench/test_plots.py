"""Pictures of results: readable on light and dark pages, the same bytes each time."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import slow
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import plots
from bench.plots import DARK, PAPER, Picture, curves, drawn, intervals, number
from bench.report import Spread
from bench.speed import roofline

ROOT = Path(__file__).parents[2]


def about(value: float) -> Spread:
    return Spread(value, value * 0.9, value * 1.1)


def paces(name: str = "as it is", log_y: bool = False) -> Picture:
    series = {name: [(128.0, about(300)), (8192.0, about(90))], "b": [(512.0, about(50))]}
    return curves(series, "Pace <of> a & b", x="x", y="tokens/s", title="T", log_y=log_y)


PICTURES = {
    "curves": paces(),
    "curves-log": paces(log_y=True),
    "intervals": intervals([("q", 0.1, -0.1, 0.2), ("r", 1, 0.5, 2)], "", x="", title="T"),
    "roofline": roofline({"copy": 17.0}, {"a": (5e8, about(15)), "b": (8e8, about(9))}, ""),
    "no curve": curves({"a": []}, "", x="", y="", title="T"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_every_colour_has_one_for_the_dark(name: str, tmp_path: Path) -> None:
    path = plots.save(PICTURES[name], tmp_path, "p")
    assert path.stat().st_size < 60_000
    style, _, drawing = path.read_text(encoding="utf-8").partition("</style>")
    used = set(re.findall(r"(fill|stroke): (#[0-9a-f]{6})", drawing))
    assert len(used) > 3
    for what, colour in used:
        rule = f'[style*="{what}: {colour}"],[{what}="{colour}"]{{{what}: {DARK[colour]} !important'
        assert rule in style
    assert not set(DARK) & set(DARK.values())


@slow
def test_bytes_depend_on_the_results_alone(tmp_path: Path) -> None:
    """Not on the user's settings either, which are left as they were."""
    import matplotlib as mpl

    def saved(name: str = "as it is") -> bytes:
        return plots.save(paces(name), tmp_path, "p").read_bytes()

    first = saved()
    with mpl.rc_context({"font.size": 30, "svg.fonttype": "path"}):
        assert saved() == first
        assert mpl.rcParams["font.size"] == 30
    assert saved("other") != first
    assert b"<title>Pace &lt;of&gt; a &amp; b</title>" in first
    assert b"$x^2$ &lt;b&gt;" in saved("$x^2$ <b>")  # no formula, no markup


@slow
def test_no_window_toolkit_is_loaded() -> None:
    code = (
        "import sys, bench.plots; assert 'matplotlib' not in sys.modules;"
        "import pathlib, tempfile; sys.path[:0] = ['tests', 'tests/bench']; import test_plots as t;"
        "bench.plots.save(t.paces(), pathlib.Path(tempfile.mkdtemp()), 'p');"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def axes_of(name: str) -> Any:
    return drawn(PICTURES[name]).axes[0]


def test_an_interval_over_zero_is_hollow() -> None:
    points = [line for line in axes_of("intervals").get_lines() if len(line.get_xdata()) == 1]
    assert [line.get_markerfacecolor() == PAPER for line in points] == [True, False]


def test_the_roof_is_bandwidth_over_bytes() -> None:
    handles, labels = axes_of("roofline").get_legend_handles_labels()
    roof, *_ = handles[labels.index("copy: 17 GB/s")]
    assert all(x * y == pytest.approx(17) for x, y in roof.get_xydata())


@settings(deadline=None, max_examples=200)
@given(st.floats(1e-4, 1e12))
def test_numbers_are_plain_and_near(value: float) -> None:
    text = number(value)
    assert "e" not in text
    assert float(text.replace(",", "")) == pytest.approx(value, rel=0.006)


def test_numbers_as_shown() -> None:
    assert [number(v) for v in (0, 0.1 + 0.2, 9.999, 15.8, 1234.5, -0.05)] == [
        "0", "0.3", "10", "15.8", "1,234", "-0.05",
    ]  # fmt: skip
    assert [plots.tokens(v) for v in (128, 2048, 3000)] == ["128", "2k", "3000"]
