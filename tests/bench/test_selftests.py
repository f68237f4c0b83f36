"""Selftests that others read: their pages, and the table of them."""

from pathlib import Path

import pytest

from bench import figures, suite
from mlx_cerebrum.doctor import page, report
from mlx_cerebrum.doctor.check import Check, Found, Settings

SENT = sorted((figures.ROOT / "bench" / "results").glob(f"*/{page.FILE}"))


@pytest.mark.parametrize("path", SENT, ids=lambda path: path.parent.name)
def test_a_page_is_made_from_its_document(path: Path) -> None:
    document = page.read(path.parent)
    assert (path.parent / page.PAGE).read_text(encoding="utf-8") == page.markdown(document)
    assert suite.private(document) == []
    assert document["checks_in_all"] == len(document["checks"])


def test_each_gets_its_row(tmp_path: Path) -> None:
    def run(settings: Settings) -> Found:
        return Found(False, "x")

    found = report.machine()
    data = found.data | {"chip": "Apple M2 | Max", "system": "macOS 26.2"}
    settings = {"model": "demo", "quick": True}
    document = page.begun(found.facts, data, settings, date="2026-11-30", checks_in_all=2)
    document["checks"].append(page.row(Check("a", "b", "c", "d", run), Found(False, "x"), 1.0))
    page.write(tmp_path / "m2", document)
    head, _, row = figures.selftests(tmp_path).splitlines()
    assert head.startswith("| selftest ")
    assert "| [m2](m2/README.md) | Apple M2 &#124; Max, " in row
    assert row.endswith("| 2026-11-30 |  demo | 0 passed, 1 failed, 1 not run |")
    (tmp_path / "empty").mkdir()
    assert figures.selftests(tmp_path / "empty").count("\n") == 1
