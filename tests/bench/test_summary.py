"""The first page's picture is made of committed results, and says which."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import slow

from bench import summary
from bench.suite import FILE
from mlx_cerebrum.errors import RequestError

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "docs" / "summary.svg"


def words(svg: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]+)</text>", svg.read_text("utf-8"))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for run in (summary.FULL_SIZE, summary.DEMO):
        folder = tmp_path / "bench" / "results" / run
        folder.mkdir(parents=True)
        shutil.copy(ROOT / "bench" / "results" / run / FILE, folder)
    (tmp_path / "docs").mkdir()
    return tmp_path


def test_the_committed_one_is_that_of_the_results(project: Path) -> None:
    """Mend with: python -m bench render --figures"""
    assert words(summary.draw(project)) == words(COMMITTED)


def test_it_says_of_what_its_figures_are(project: Path) -> None:
    text = " ".join(words(COMMITTED))
    for said in ("random weights", "SmolLM2-135M", "AMD EPYC, 2 cores, cpu", "2026-11-23"):
        assert said in text
    readme = (ROOT / "README.md").read_text("utf-8")
    assert f'<img alt="{summary.ALT}" src="docs/summary.svg">' in readme


@slow
def test_its_figures_are_the_results(project: Path) -> None:
    path = project / "bench" / "results" / summary.DEMO / FILE
    document = json.loads(path.read_text())
    document["suites"]["speed"]["ratios"]["decode"]["median"] = 0.123
    path.write_text(json.dumps(document))
    before, after = words(COMMITTED), words(summary.draw(project))
    assert [new for old, new in zip(before, after, strict=True) if old != new] == ["0.123"]
    del document["suites"]["quality"]
    path.write_text(json.dumps(document))
    with pytest.raises(RequestError, match="the picture of the first page can't be read"):
        summary.picture(project)
