"""Results as others read them: a run's page, the table of all runs, and figures in documents.

The last tests are the check that documents and results agree.
"""

import html
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import MakeCheckpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import figures, pair, render, suite
from bench.random_model import GEOMETRIES
from bench.report import CPU
from bench.suite import Results
from convert.calibrated import calibration_bytes
from convert.distilled import distilling_bytes
from convert.passages import TOKENS
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.memory import GB
from mlx_cerebrum.plan.layer_plan import LayerPlan
from mlx_cerebrum.plan.show import describe

ROOT = figures.ROOT
RUNS = sorted(file.parent for file in (ROOT / "bench" / "results").glob(f"*/{suite.FILE}"))
DEMO = "linux-epyc-2-demo"

GUARDED = (*figures.DOCUMENTS, "CHANGELOG.md")  # may have no measured figure outside a block
# What is no prose: code, comments, where links point to.
_ASIDE = re.compile(r"^```.*?^```|`[^`\n]*`|<!--.*?-->|\]\([^)]*\)", re.M | re.S)
_UNITS = r"tokens/s|tok/s|tokens a second|[kMGT]i?B(?:/s)?|m?s|seconds?|minutes?|percent|x|times"
_FIGURE = re.compile(
    rf"(?<![\w.])(?<![A-Za-z]-)\d[\d,]*(?:\.\d+)?(?: ?%| ?(?:{_UNITS})(?![\w-]))"
    r"|(?<![\w.])(?<![A-Za-z]-)\d+\.\d+(?!\w|\.\d|-[A-Za-z])"  # a decimal, but no version or name
)
# Figures in prose that nobody measured, and where they come from.
ALLOWED = {
    "Python 3.11": "a version",
    "needs 26.2": "a version",
    "capability 7.5": "a version",
    "14.5 GB": "sizes: folded, bf16",
    "14.48 GB": "sizes: folded, bf16",
    "7.7 GB": "sizes: folded, 8-bit",
    "4.1 GB": "sizes: folded, 4-bit",
    "25.0 GB": "sizes: unrolled, bf16",
    "25 GB": "sizes: unrolled, bf16",
    "13.3 GB": "sizes: unrolled, 8-bit",
    "7.0 GB": "sizes: unrolled, 4-bit",
    "1.1 GB of cache": "arithmetic: 224 KiB for each of 4096 tokens, what can be rewound, a chunk",
    **{f"| {size} GB": "a Mac's memory" for size in (8, 16, 24)},
    "| 32 GB and more": "a Mac's memory",
    "at least 4 GB": "advice",
    "0.53 or 0.28 of their bytes": "arithmetic: 8.5 and 4.5 bits for 16",
    "8 GB Mac": "a Mac's memory",
    "16 GB Mac": "a Mac's memory",
    "5.0 GB of memory": "calibration: gptq",
    "9.9 GB of memory": "calibration: dwq",
}


def document(*suites: str) -> Results:
    """The demo model's run, of these suites."""
    found = suite.read(ROOT / "bench" / "results" / DEMO / suite.FILE)
    return found | {key: {n: found[key][n] for n in suites} for key in ("suites", "seconds")}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def check_tables(text: str) -> None:
    """As many cells in each row as in the header, and a rule that is one to every reader."""
    tables = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert tables
    for found in tables:
        header, rule, *rows = map(cells, found.splitlines())
        assert all(re.fullmatch(r":?-+:?", cell) for cell in rule), found
        assert {len(row) for row in (rule, *rows)} == {len(header)}, found


def without_pictures(page: str) -> str:
    return re.sub(r"\n<img [^>]*>\n", "", page).rstrip() + "\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A checkout's documents and results."""
    results = tmp_path / "bench" / "results"
    suite.write(results / DEMO, document("speed"))
    kept = (ROOT / "bench" / "results" / DEMO / "recipes.json").read_text()
    (results / DEMO / "recipes.json").write_text(kept)
    for name in figures.DOCUMENTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("Text.\n")
    return tmp_path


def filled(project: Path, *blocks: str) -> str:
    """README.md of these blocks, filled in."""
    text = "\n".join(f"<!-- figures: {block} -->\n<!-- end -->\n" for block in blocks)
    (project / "README.md").write_text(f"# Title\n\n{text}")
    figures.rewrite(project)
    return (project / "README.md").read_text()


# A run's page


def test_a_page_with_its_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite.write(tmp_path, document("speed"))
    assert render.main([str(tmp_path)]) == 0
    page = (tmp_path / "README.md").read_text()
    for line in ("AMD EPYC |", "25276510208 |", "## Speed", "| decode, tokens/s ", CPU):
        assert line in page
    sources = re.findall(r'<img alt="[^"]+" src="([^"]*)"', page)
    assert len(sources) == 2
    assert all((tmp_path / name).is_file() for name in sources)
    assert without_pictures(page) == render.report(document("speed"))
    assert capsys.readouterr().out.strip() == str(tmp_path / "README.md")
    check_tables(page)


def test_on_a_gpu_nothing_is_said_of_the_cpu() -> None:
    found = document()
    found["machine"] |= {"backend": "metal", "device": "Apple M2 Max"}
    assert " Apple M2 Max |" in render.report(found)
    assert CPU not in render.report(found)


def test_without_matplotlib_there_are_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = render.report(document("speed"), tmp_path)
    assert render.NO_PICTURES in page
    assert "| decode, tokens/s " in page


HOSTILE = '"<img src=x onerror=alert(1)> | `a` [b](c)\n# d -->\n<!-- end --> ~~~ $e$'


def test_strings_of_others_stay_text(tmp_path: Path) -> None:
    text = json.dumps(document("speed")).replace("as it is", json.dumps(HOSTILE)[1:-1])
    found = json.loads(text)
    found["suites"]["quality"] = {"not_measured": HOSTILE}
    for part, keys in (("machine", ("processor", "os", "mlx")), ("model", ("model", "stored"))):
        found[part] |= dict.fromkeys(keys, HOSTILE)
    found["runs"]["speed"] = dict.fromkeys(("command", "date", "commit"), HOSTILE)
    page = render.report(found, tmp_path)
    check_tables(page)
    for bad in ("<img src", "<!--", "-->", "](", "\n# d", "`a`", "~~~", "$e"):
        assert bad not in page, bad
    assert page.count(suite.escaped(HOSTILE)) > 10
    assert len(re.findall(r'<img alt="[^"]*" src="[\w.-]*">', page)) == page.count("<img") == 2


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=40))
def test_escaped_text_is_one_line_without_markup(text: str) -> None:
    shown = suite.escaped({text: [text]})
    assert list(shown) == next(iter(shown.values()))
    (line,) = shown
    assert len(line.splitlines()) <= 1
    assert not set('<>|[]\\`~$"') & set(line)
    assert "#" not in re.sub(r"&#\d+;", "", line)
    assert " ".join(text.split()) == html.unescape(line)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 2}, "schema"),
        ({"suites": {"speed": {"names": ["a"]}}}, "suite speed can't be read"),
        ({"suites": {"speed": []}}, "suite speed can't be read"),
        ({"suites": 1}, "suite speed can't be read"),
        ({"machine": None}, "machine or model of the results can't be read"),
        ({"model": {"a": 1, "b": 2}}, "machine or model of the results can't be read"),
    ],
)
def test_other_documents_are_refused_in_a_line(
    change: Results, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite.write(tmp_path, document("speed") | change)
    assert render.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("text", ["", "[]", "{", '{"suites": 1}', "\xff", "[" * 100_000])
def test_other_files_are_refused_in_a_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / suite.FILE).write_bytes(text.encode("latin-1"))
    assert render.main([str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "README.md").exists()


# Privacy


def test_a_document_names_no_host_user_or_path(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.node", lambda: "janes-mac.local")
    monkeypatch.setattr("getpass.getuser", lambda: "jane")
    path = str(checkpoint("jane/model"))
    words = ["python", "-m", "bench", "--model", path]
    assert suite.private(suite.begun(words, pair.open_pair(path), None)) == []
    for leak in (
        "/Users/someone/models/7b",
        "--model=/home/x/7b",
        "~/7b",
        "python -m bench --model ../../7b",
        "C:\\models",
        "by jane",
        "janes-mac",
    ):
        assert suite.private({"suites": {"speed": [{"note": leak}]}}) == [leak]
        assert suite.private({leak: 1}) == [leak]
    for fine in ("tokens/s", "ours / mlx-lm", "a/b", "janet", "AetherResearch/Cerebrum-1.0-7b"):
        assert suite.private([fine]) == []


def test_render_warns_of_a_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite.write(tmp_path, document() | {"command": "python -m bench --model /Users/x/7b"})
    assert render.main([str(tmp_path)]) == 0
    assert "before you send it" in capsys.readouterr().err


# Blocks of figures in documents


def test_a_run_that_is_sent_gets_its_row(project: Path) -> None:
    mac = document()  # without the speed suite
    mac["machine"] |= {"backend": "metal", "device": "Apple M2 Max | x"}
    suite.write(project / "bench" / "results" / "m2-max-64gb", mac)
    text = filled(project, "index")
    check_tables(text)
    header, here, sent = (
        cells(line) for line in text.splitlines() if re.match(r"\| (\[|run)", line)
    )
    assert dict(zip(header, here, strict=True)) == {
        "run": f"[{DEMO}]({DEMO}/README.md)", "processor": "AMD EPYC, 2 cores", "memory": "25 GB",
        "system": mac["machine"]["os"], "device": "cpu", "mlx": "0.32.4", "date": "2026-11-23",
        "model": "demo", "side A": "as it is", "side B": "interleave-30-10", "decode A": "17.8",
        "decode B": "11.2", "B / A": "0.63", "prefill A": "262", "prefill B": "174",
        "B of ceiling": "47%",
    }  # fmt: skip
    assert sent[0] == "[m2-max-64gb](m2-max-64gb/README.md)"
    assert "Apple M2 Max &#124; x" in sent
    assert sent[-1] == "-"
    slow = document("speed")
    for side in slow["suites"]["speed"]["sides"].values():
        del side["prefill"]["512"]
    suite.write(project / "bench" / "results" / DEMO, slow)
    assert "17.8 |     11.2 |  0.63 |         - |" in filled(project, "index")


def test_blocks_are_paragraphs_of_what_a_bench_says(project: Path) -> None:
    text = filled(project, f"{DEMO}/speed 2 4-5 7", f"{DEMO}/recipes")
    check_tables(text)
    for line in ("| decode, tokens/s ", "| the roofline of decoding ", "| mixed_4_6 "):
        assert line in text
    assert "Both models over one copy" not in text  # the first
    assert text.count("<img") == 1
    assert f'src="bench/results/{DEMO}/speed-roofline.svg"' in text
    assert figures.rewrite(project) == []
    assert figures.stale(project) == ""
    assert typed(text) == []


def test_figures_and_results_that_changed_show_in_a_diff(project: Path) -> None:
    text = filled(project, f"{DEMO}/speed")
    (project / "README.md").write_text(text.replace("17.84", "18.84"))
    diff = figures.stale(project)
    assert re.search(r"^-.*18\.84", diff, re.M)
    assert re.search(r"^\+.*17\.84", diff, re.M)
    results = document("speed")
    results["suites"]["speed"]["sides"]["as it is"]["decode"]["median"] = 19.84
    suite.write(project / "bench" / "results" / DEMO, results)
    assert re.search(r"^\+.*19\.84", figures.stale(project), re.M)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"<!-- figures: {DEMO}/speed -->\n", "has no end"),
        (f"<!-- figures: {DEMO}/speed two -->\n<!-- end -->\n", "not as it should be"),
        (f"<!-- figures: {DEMO}/speed 9 -->\n<!-- end -->\n", "IndexError"),
        (f"<!-- figures: {DEMO}/quality -->\n<!-- end -->\n", "KeyError: 'quality'"),
        ("<!-- figures: other/speed -->\n<!-- end -->\n", "No such file"),
    ],
)
def test_blocks_that_can_not_be_filled_in(project: Path, text: str, said: str) -> None:
    (project / "README.md").write_text(text)
    with pytest.raises(RequestError, match=re.escape(said)) as caught:
        figures.stale(project)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "figure",
    [
        "It decodes 15.8 tokens/s.",
        "at 250 tok/s",
        "took 90 seconds",
        "| 1.14 (0.99-1.19) |",
        "perplexity 49.3 / 27.1",
        "| 4.08 GB |",
        "is 20% faster",
        "2 percent of it",
        "2 x as fast",
    ],
)
def test_figures_typed_by_hand_are_found(figure: str) -> None:
    assert typed(f"Text.\n\n{figure}\n")[0][0] == 3
    assert typed(f"<!-- figures: a -->\n{figure}\n<!-- end -->\n") == []
    assert typed(f"```\n{figure}\n```\n") == []
    assert typed(figure, [figure]) == []


@pytest.mark.parametrize(
    "text",
    [
        "Cerebrum-1.0-7b and its 12.25B, in 4 bits, with 32 blocks at 56 positions",
        "mlx 0.32.4, Apache-2.0, 2026-11-22, [a](https://a.b/1.5), `--seconds 2.5`",
    ],
)
def test_other_numbers_are_not_figures(text: str) -> None:
    assert typed(text) == []


# The project's own documents


def typed(text: str, allowed: Sequence[str] = ()) -> list[tuple[int, str]]:
    """Figures with their line numbers that stand outside the blocks and look measured.

    Left out are the `allowed` phrases, and code.
    """

    def blank(match: re.Match[str]) -> str:
        return "\n" * match[0].count("\n")

    text = _ASIDE.sub(blank, figures.BLOCK.sub(blank, text))
    for phrase in sorted(allowed, key=len, reverse=True):
        text = re.sub(rf"(?<![\w.]){re.escape(phrase)}(?![\w]|\.\d)", "", text)
    return [
        (number, match[0])
        for number, line in enumerate(text.splitlines(), 1)
        for match in _FIGURE.finditer(line)
    ]


@pytest.mark.parametrize("phrase", [p for p, why in ALLOWED.items() if why.startswith("sizes")])
def test_allowed_sizes_are_the_geometrys(phrase: str) -> None:
    layout, kind = ALLOWED[phrase].removeprefix("sizes: ").split(", ")
    found = describe(LayerPlan.named("cerebrum-12.25b"))["sizes"][layout][kind.replace("-", "")]
    digits = len(phrase.split()[0].partition(".")[2])
    assert phrase == f"{found / GB:.{digits}f} GB"


def test_allowed_memory_is_what_a_calibration_asks_for() -> None:
    """Of the 12.25B, from 32,768 tokens, in 16 bits."""
    order = tuple(LayerPlan.named("cerebrum-12.25b").layer_map(32))
    config = replace(ModelConfig.from_dict(dict(GEOMETRIES["cerebrum-7b"])), layer_map=order)
    groups = config.stored_parameters // 64
    needed = {
        "gptq": calibration_bytes(config, TOKENS, 2),
        "dwq": distilling_bytes(config, TOKENS, 2, groups * (64 * 4 + 32) // 8, groups),
    }
    for phrase, why in ALLOWED.items():
        if why.startswith("calibration"):
            assert phrase.startswith(f"{needed[why.removeprefix('calibration: ')] / GB:.1f} GB")


def test_documents_agree_with_the_results() -> None:
    diff = figures.stale()
    assert not diff, (
        "python -m bench render --figures mends this, unless the paragraphs that a block names"
        f" by their numbers have moved:\n{diff}"
    )


@pytest.mark.parametrize("name", GUARDED)
def test_documents_state_no_figure_by_hand(name: str) -> None:
    """A measured figure belongs into a block; one that is arithmetic into ALLOWED."""
    found = typed((ROOT / name).read_text(encoding="utf-8"), list(ALLOWED))
    assert not found, "\n".join(f"{name}:{line}: {figure}" for line, figure in found)


def test_what_is_allowed_is_said_somewhere() -> None:
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in GUARDED)
    assert [phrase for phrase in ALLOWED if phrase not in text] == []


@pytest.mark.parametrize("directory", RUNS, ids=lambda run: run.name)
def test_a_runs_page_is_made_from_its_results(directory: Path) -> None:
    """Mend with: python -m bench render bench/results/RUN"""
    page = (directory / "README.md").read_text(encoding="utf-8")
    assert without_pictures(page) == render.report(suite.read(directory / suite.FILE))
    assert all((directory / name).is_file() for name in re.findall(r'src="([^"]*)"', page))
    for path in directory.rglob("*.json"):
        assert suite.private(suite.read(path)) == [], path
