"""Results as others read them: a run's page, the index, and figures in documents.

The last tests are the check that README and results agree. Needs nothing but the bench itself.
"""

import html
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeCheckpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import blocks, figures, machine, markdown, pair, render, suite
from bench.__main__ import new_document
from bench.index import index
from bench.runs import Runs
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.memory import GB
from mlx_cerebrum.plan.layer_plan import LayerPlan
from mlx_cerebrum.plan.show import describe

ROOT = figures.ROOT
Results = dict[str, Any]

# Figures in prose that nobody measured, and where they come from.
ALLOWED = {
    "Python 3.11": "a version",
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
    "about 0.57 x the 7B's pace": "arithmetic: 32/56",
    "0.53 or 0.28 of their bytes": "arithmetic: 8.5 and 4.5 bits for 16",
    "8 GB Mac": "a Mac's memory",
    "more than ten times as fast": "two BLAS libraries, neither of them ours",
    "more than ten times slower": "two BLAS libraries, neither of them ours",
}


def spread(value: float) -> Results:
    return {"median": value, "low": value * 0.9, "high": value * 1.1, "rounds": 5}


def speed_results(a: str = "as it is", b: str = "interleave-30-10") -> Results:
    def side(pace: float) -> Results:
        return {
            "prefill": {n: spread(10 * pace) for n in ("128", "512")},
            "ttft": {n: spread(1 / pace) for n in ("128", "512")},
            "decode": spread(pace),
            "start": spread(1.5),
            "bytes_per_token": int(9e9 / pace),
            "reached": 9.0,
            "share": {"measured": 0.75, "published": None},
        }

    return {
        "names": [a, b],
        "lengths": [128, 512],
        "left_out": {},
        "tokens": 32,
        "prompt_tokens": 128,
        "bandwidth": {
            "chip": "AMD EPYC",
            "published": None,
            "measured": {"copy": 11.0, "matvec": 12.0},
        },
        "sides": {a: side(16.0), b: side(10.0)},
        "ratios": {
            "prefill": {n: spread(0.6) for n in ("128", "512")},
            "decode": spread(0.625),
            "start": spread(1.1),
        },
    }


def run_document(**suites: Results) -> Results:
    card = {"hidden_size": 576, "parameters": 134_515_008, "window": None, "q_bits": None}
    names = ("as it is", "interleave-30-10")
    sides = {
        key: {"name": name, "positions": 30, "executed_parameters": 134_515_008, "layer_map": [0]}
        for key, name in zip("ab", names, strict=True)
    }
    return {
        "schema": 1,
        "command": "python -m bench",
        "date": "2026-11-22",
        "machine": {
            "os": "Linux-6.1", "processor": "AMD EPYC", "cores": 2, "memory_bytes": 25_000_000_000,
            "backend": "cpu", "device": "cpu", "blas": "OpenBLAS", "load_average": 0.1,
            "python": "3.11.7", "mlx": "0.32.4", "mlx_lm": "0.32.2", "mlx_cerebrum": "0.1.0",
        },
        "model": {"model": "demo", "blocks": 30, "stored": {"bits": 4}, "loaded": "float32"}
        | card
        | sides,
        "seconds": dict.fromkeys(suites, 12.3),
        "suites": suites,
    }  # fmt: skip


def single(name: str, results: Results, **flags: Any) -> Results:
    """What one bench prints with --json."""
    card = run_document()["machine"]
    return {"bench": name, "machine": card, "settings": flags, "results": results}


def recipe_results(shift: float) -> Results:
    names = ("dense", "uniform", "plan", "mixed_4_6", "plan at 4.71")
    text = {"more_nats": 0.1, "standard_error": 0.0123, "tokens": 2048}
    return {
        name: {
            "bits_per_weight": 4.5 if "4.71" not in name else 4.71,
            "austen": text | {"perplexity": 49.3 + k + shift},
            "newton": text | {"perplexity": 27.1 + k + shift},
        }
        for k, name in enumerate(names)
    }


def peers_results() -> Results:
    ratios = {phase: spread(1.1) for phase in ("prefill", "decode")}
    engines: Results = {
        "mlx-cerebrum": {"token_bytes": 4_000_000},
        "mlx-lm": {"token_bytes": 5_000_000, "equal": True, "agreeing": 32},
        "llama.cpp Q8_0": {"token_bytes": 2_000_000, "equal": False, "agreeing": 9},
        "transformers": {"failure": "torch is not installed"},
    }
    for name in ("mlx-lm", "llama.cpp Q8_0"):
        engines[name] |= {"ratios": ratios, "compared": 32}
    start = {"ratios": {"mlx-cerebrum, mlx-lm's directory": spread(2.0)}}
    return {
        "sides": {
            "a": {"name": "as it is", "engines": engines, "start": start},
            "b": {"name": "b", "engines": engines, "start": {"failure": "no tokenizer"}},
        }
    }


def conversion_results() -> Results:
    cost = {"wall": 24.1, "cpu": 45.0, "peak_memory": 210_000_000, "written": 4e9, "result": 25e9}
    peers = ("mergekit", "mlx_lm.convert -q of that")
    return {
        "costs": {"ours: folded, 4-bit": cost | {"written": None}}
        | {name: cost | {"wall": 50.0, "peak_memory": 12_300_000_000} for name in peers},
        "ratios": {"ours / (mergekit + mlx_lm.convert)": 0.241},
        "cold": {"read": 15.0, "converted": 45.0, "ratio": 3.0},
    }


SUITES = {"speed": speed_results(), "peers": peers_results()}


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


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A checkout's documents and results."""
    results = tmp_path / "bench" / "results"
    suite.write(results / blocks.DEMO, run_document(**SUITES))
    for run, name, document in (
        (blocks.DEMO, "recipes", single("recipes", recipe_results(0), model="demo", plan=None)),
        (
            blocks.DEMO,
            "recipes-interleaved",
            single("recipes", recipe_results(9), model="demo", plan="demo-interleaved"),
        ),
        (blocks.FULL, "conversion", single("conversion", conversion_results())),
    ):
        (results / run).mkdir(exist_ok=True)
        (results / run / f"{name}.json").write_text(json.dumps(document))
    for name in figures.DOCUMENTS:
        (tmp_path / name).write_text("Text.\n")
    (tmp_path / figures.INDEX).write_text((ROOT / figures.INDEX).read_text())
    return tmp_path


def readme(project: Path, *names: str) -> str:
    """README.md of these blocks, filled in."""
    blocks_of = [f"<!-- figures: {name} -->\n<!-- end -->\n" for name in names]
    (project / "README.md").write_text("# Title\n\n" + "\n".join(blocks_of))
    figures.rewrite(project)
    return (project / "README.md").read_text()


# A run's page


def test_a_page_has_machine_models_and_suites() -> None:
    page = render.report(run_document(speed=speed_results()))
    assert "| processor " in page
    assert "AMD EPYC, 2 cores" in page
    assert "25 GB" in page
    assert render.CPU in page
    assert "## Speed" in page
    assert "copy 11.0, matvec 12.0 GB/s" in page
    assert "| decode, tokens/s " in page
    assert "<picture>" not in page  # none was drawn


def test_on_a_gpu_nothing_is_said_of_the_cpu() -> None:
    document = run_document()
    document["machine"] |= {"backend": "metal", "device": "Apple M2 Max"}
    assert "Metal." not in render.report(document)
    assert "0.32.4 on Apple M2 Max (metal; BLAS: OpenBLAS)" in render.report(document)


def test_a_page_with_its_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite.write(tmp_path / "run", run_document(speed=speed_results()))
    assert render.main([str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "README.md").read_text()
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 2
    assert all((tmp_path / "run" / name).is_file() for name in sources)
    assert all(alt for alt in re.findall(r'<img alt="([^"]*)"', page))
    assert without_pictures(page) == render.report(suite.read(tmp_path / "run"))
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "README.md")


def without_pictures(page: str) -> str:
    return re.sub(r"\n<img [^>]*>\n", "", page).rstrip() + "\n"


def test_without_matplotlib_there_are_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = render.report(run_document(speed=speed_results()), tmp_path)
    assert render.NO_PICTURES in page
    assert "| decode, tokens/s " in page


def test_a_suite_that_was_not_measured_says_why() -> None:
    page = render.report(run_document(quality={"not_measured": "no <tokenizer>"}))
    assert "Not measured: no &lt;tokenizer&gt;" in page


HOSTILE = "<img src=x onerror=alert(1)> | `a` [b](http://c.d) ![e](www.f.g)\n# h -->\n<!-- end -->"


def test_strings_of_others_stay_text() -> None:
    document = run_document(speed=speed_results(HOSTILE, "b"))
    document["machine"] |= {"processor": HOSTILE, "os": HOSTILE, "mlx": HOSTILE}
    document["model"] |= {"model": HOSTILE, "stored": HOSTILE}
    document["model"]["a"]["name"] = HOSTILE
    document["command"] = HOSTILE
    document["date"] = HOSTILE
    page = render.report(document)
    prose = page.replace(markdown.code(HOSTILE), "")
    for bad in ("<img", "<!--", "-->", "](", "http://", "www.f", "\n# h"):
        assert bad not in prose, bad
    # The command is code, which nothing can end.
    assert page.count(markdown.code(HOSTILE)) == 1
    check_tables(page)


BLOCKS = ("```", "~~~", "# a heading", "$$x$$", "```\n|[a](b)", "`````` mermaid")


@pytest.mark.parametrize("name", BLOCKS)
def test_a_name_opens_no_block(name: str) -> None:
    """A fence would swallow the rest of the page, in a row, a paragraph or a title."""
    memory = memory_results(name)
    document = run_document(memory=memory, quality={"not_measured": name})
    document["model"]["model"] = document["model"]["a"]["name"] = name
    document["runs"] = {"memory": {"command": name, "date": name, "commit": name}}
    page = render.report(document)
    assert not re.search(r"^ {0,3}(?:```|~~~|\$\$)", page, re.M)
    assert [line for line in page.splitlines() if line.startswith("#")] == [
        f"# {markdown.escape(name)} against interleave-30-10",
        "## Memory",
        "## Quality",
    ]
    # Nothing but the code that we write ourselves, and each piece of it on a line.
    assert all(line.count("`") % 2 == 0 for line in page.splitlines())
    assert "$" not in page.replace(markdown.code(name), "")
    assert markdown.escape(name) in page
    check_tables(page)


def memory_results(name: str) -> Results:
    """The memory suite's, of one model by that name that was measured and one that was not."""
    return {
        "tolerance": 0.05,
        "hidden_size": 256,
        "window": 4096,
        "small_window": 256,
        "random": [{"name": name, "not_measured": name}],
        "model": [{"name": name, "not_measured": name}],
        "block_ratio": None,
        "expected_ratio": 32 / 56,
        "same_logits": None,
        "full_size": {"prompt": 8192, "chunk": 512, "positions": 32768, "rows": []},
    }


def test_how_a_suite_was_measured_is_said() -> None:
    document = run_document(speed=speed_results(), memory={"not_measured": "-"})
    document["seconds"] = {"speed": 75.4, "memory": 12.3, "quality": 1.2}
    assert "Measuring took: speed 75 s, memory 12 s, quality 1 s.\n" in render.report(document)
    document["runs"] = {
        "speed": {
            "command": "python -m bench --suite speed",
            "date": "2026-11-23",
            "commit": "ab1",
        },
        "memory": {"command": HOSTILE, "date": HOSTILE, "commit": None},
    }
    lines = render.report(document).splitlines()
    start = lines.index("Measuring took:")
    hostile = f"{markdown.escape(HOSTILE)}, {markdown.code(HOSTILE)}"
    assert lines[start + 1 : start + 6] == [
        "",
        "- speed: 75 s, 2026-11-23, commit ab1, `python -m bench --suite speed`",
        f"- memory: 12 s, {hostile}",
        "- quality: 1 s",
        "",
    ]
    document["runs"]["speed"]["commit"] = HOSTILE
    page = render.report(document)
    assert f"commit {markdown.escape(HOSTILE)}" in page
    for bad in ("<img", "<!--", "-->", "](", "http://", "www.f", "\n# h"):
        assert bad not in page.replace(markdown.code(HOSTILE), "")


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=40))
def test_escaped_text_is_one_line_without_markup(text: str) -> None:
    shown = markdown.escape(text)
    assert len(shown.splitlines()) <= 1
    assert not set("<>|[]\\`~$") & set(shown)
    assert "#" not in re.sub(r"&#\d+;", "", shown)
    assert " ".join("".join(c if c.isprintable() else " " for c in text).split()) == html.unescape(
        shown
    )
    code = markdown.code(text)
    assert len(code.splitlines()) == 1
    assert code.count("`") == 2
    assert len(code) > 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 2}, "schema"),
        ({"suites": {"os": {}}}, "suite 'os' is not one of"),
        ({"suites": {"speed": {"names": ["a"]}}}, "suite speed can't be read"),
        ({"suites": {"speed": []}}, "suites can't be read"),
        ({"suites": 1}, "suites can't be read"),
        ({"suites": {"speed": speed_results() | {"bandwidth": None}}}, "suite speed can't be read"),
        ({"machine": {}}, "machine or model can't be read"),
        ({"machine": None}, "machine or model can't be read"),
        ({"runs": 1, "seconds": {"speed": 1}}, "machine or model can't be read"),
        ({"runs": {"speed": "x"}, "seconds": {"speed": 1}}, "machine or model can't be read"),
        ({"model": {"a": 1, "b": 2}}, "machine or model can't be read"),
    ],
)
def test_other_documents_are_refused_in_a_line(
    change: Results, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite.write(tmp_path, run_document() | change)
    assert render.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("text", ["", "[]", "{", '{"suites": 1}', "\xff", '{"suites": ["speed"]}'])
def test_other_files_are_refused_in_a_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / suite.FILE).write_bytes(text.encode("latin-1"))
    assert render.main([str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "README.md").exists()


def test_something_must_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        render.main([])
    assert "--index" in capsys.readouterr().err


# Privacy


def test_a_document_names_no_host_user_or_path(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.node", lambda: "janes-mac.local")
    monkeypatch.setattr("getpass.getuser", lambda: "jane")
    path = checkpoint("jane/model")
    document = new_document(
        ["python", "-m", "bench", "--model", str(path)], pair.open_pair(str(path))
    )
    assert document["machine"] == machine.card() | {
        "load_average": document["machine"]["load_average"]
    }
    assert markdown.private(document) == []
    for leak in (
        "/Users/someone/models/7b",
        "--model=/home/x/7b",
        "~/7b",
        "python -m bench --model ../../7b",
        "C:\\models",
        "by jane",
        "janes-mac",
    ):
        assert markdown.private({"suites": {"speed": [{"note": leak}]}}) == [leak]
        assert markdown.private({leak: 1}) == [leak]
    for fine in ("tokens/s", "ours / mlx-lm", "a/b", "janet", "AetherResearch/Cerebrum-1.0-7b"):
        assert markdown.private([fine]) == []


def test_render_warns_of_a_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite.write(tmp_path, run_document() | {"command": "python -m bench --model /Users/x/7b"})
    assert render.main([str(tmp_path)]) == 0
    assert "before you send it" in capsys.readouterr().err


# The index


def test_the_index_asks_for_what_is_missing(project: Path) -> None:
    text = index(Runs(project / "bench" / "results"))
    assert "Apple silicon (Metal): not measured yet, send yours" in text
    assert "NVIDIA (CUDA): not measured yet, send yours" in text
    check_tables(text)
    row = next(line for line in text.splitlines() if "AMD EPYC" in line)
    assert cells(row) == [
        "AMD EPYC, 2 cores", "25 GB", "Linux-6.1", "cpu", "0.32.4", "2026-11-22", "demo",
        "as it is", "interleave-30-10", "16.0", "10.0", "0.62", "160", "100", "75%",
        f"[{blocks.DEMO}]({blocks.DEMO}/README.md)",
    ]  # fmt: skip


def test_a_run_that_is_sent_takes_its_place(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mac = run_document()  # without the speed suite
    mac["machine"] |= {"backend": "metal", "device": "Apple M2 Max | x"}
    suite.write(project / "bench" / "results" / "m2-max-64gb", mac)
    monkeypatch.setattr(figures, "ROOT", project)
    assert render.main(["--index"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(project / figures.INDEX)]
    text = (project / figures.INDEX).read_text()
    assert "Metal): not measured yet" not in text
    assert "CUDA): not measured yet" in text
    assert "| Apple M2 Max &#124; x " in text
    assert "[m2-max-64gb](m2-max-64gb/README.md)" in text


def test_a_run_that_can_not_be_read_costs_its_row_only(project: Path) -> None:
    results = project / "bench" / "results"
    whole = index(Runs(results)).splitlines()
    lacking = speed_results()
    for side in lacking["sides"].values():
        del side["prefill"]["512"]
    odd = {
        "no-512": run_document(speed=lacking),
        "no-ratios": run_document(speed={"names": ["a", "b"], "sides": {}}),
        "no-machine": run_document() | {"machine": 1},
        "no-memory": run_document() | {"machine": {"backend": "metal"}},
        "one-side": run_document(speed=speed_results() | {"names": ["as it is"]}),
        "![x](http://a.b)": run_document() | {"model": {}},
    }
    for name, document in odd.items():
        suite.write(results / name.replace("/", ":"), document)
    (results / "no-json").mkdir()
    (results / "no-json" / suite.FILE).write_text("[" * 100_000)
    text = index(Runs(results))
    check_tables(text)
    unread = [cells(line) for line in text.splitlines() if "| can't be read " in line]
    assert sorted(row[0] for row in unread) == sorted(
        ["no-json", *(markdown.escape(name.replace("/", ":")) for name in odd)]
    )
    assert all(set(row[2:]) == {""} for row in unread)
    assert "](" not in text.replace(f"[{blocks.DEMO}]({blocks.DEMO}", "")
    kept = [line for line in map(cells, whole) if len(line) > 1]
    assert all(row in map(cells, text.splitlines()) for row in kept[2:])


def test_a_run_of_another_backend_is_listed(project: Path) -> None:
    other = run_document()
    other["machine"] |= {"backend": "vulkan", "device": "Some GPU"}
    suite.write(project / "bench" / "results" / "other", other)
    rows = [cells(line) for line in index(Runs(project / "bench" / "results")).splitlines()]
    (row,) = (row for row in rows if row[0] == "Some GPU")
    assert row[3] == "vulkan"
    assert row[-1] == "[other](other/README.md)"


@pytest.mark.parametrize("name", ["A", "a b", "a](b", "<b>", "-a", "a_b", "..a", "\u00e9", "a|b"])
def test_other_names_are_no_links(name: str, project: Path) -> None:
    suite.write(project / "bench" / "results" / name, run_document(**SUITES))
    rows = [cells(line) for line in index(Runs(project / "bench" / "results")).splitlines()]
    assert sorted(row[-1] for row in rows if row[0].startswith("AMD")) == sorted(
        [markdown.escape(name), f"[{blocks.DEMO}]({blocks.DEMO}/README.md)"]
    )


# Blocks of figures in documents


def test_blocks_are_filled_in_once(project: Path) -> None:
    names = ("speed", "roofline", "recipes", "conversion", "conversion-table", "peers-short")
    text = readme(project, *names)
    check_tables(text)
    for line in (
        "| decode, tokens/s ",
        "16.0 / 10.0 (0.62 (0.56-0.69))",
        "58.3 / 36.1",
        "uniform, 4.50 bits",
        "24 s and 0.2 GB",
        "100 s, 12 GB resident (mapped files too) and 25 GB of disk",
        f'src="bench/results/{blocks.DEMO}/speed-roofline.svg"',
    ):
        assert line in text
    rows = {row[0]: row[1:] for row in map(cells, text.splitlines())}
    assert rows["mlx-lm, as it is"] == [
        *["1.10 (0.99-1.21)"] * 2,
        "2.00 (1.80-2.20)",
        "1.25",
        "yes",
    ]
    assert rows["mlx-lm, b"][2:] == ["", "1.25", "yes"]
    assert rows["llama.cpp Q8_0, b"][2:] == ["", "0.50", "9 of 32"]
    assert rows["transformers, b"][0] == "not measured"
    assert figures.rewrite(project) == []
    assert figures.stale(project) == ""
    assert figures.typed(text) == []


def test_a_figure_that_was_changed_shows_in_a_diff(project: Path) -> None:
    text = readme(project, "conversion")
    (project / "README.md").write_text(text.replace("24 s", "12 s"))
    diff = figures.stale(project)
    assert re.search(r"^-From .* took 12 s", diff, re.M)
    assert re.search(r"^\+From .* took 24 s", diff, re.M)


def test_results_that_changed_show_too(project: Path) -> None:
    readme(project, "speed")
    results = speed_results()
    results["sides"]["as it is"]["decode"] = spread(17.0)
    suite.write(project / "bench" / "results" / blocks.DEMO, run_document(speed=results))
    assert "+| decode, tokens/s " in figures.stale(project)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- figures: nonsense -->\n<!-- end -->\n", "no figures are named 'nonsense'"),
        ("<!-- figures: speed -->\n", "no line <!-- end -->"),
        ("<!-- figures: speed -->\n<!-- figures: speed -->\n<!-- end -->\n", "no line"),
        ("<!-- figures: recipes -->\n<!-- end -->\n", "recipes.json can't be read"),
        ("<!-- figures: full_size -->\n<!-- end -->\n", "results.json can't be read"),
        ("<!-- figures: quality -->\n<!-- end -->\n", "no results of suite quality"),
    ],
)
def test_blocks_that_can_not_be_filled_in(project: Path, text: str, said: str) -> None:
    (project / "bench" / "results" / blocks.DEMO / "recipes.json").unlink()
    (project / "README.md").write_text(text)
    with pytest.raises(RequestError, match=re.escape(said)) as caught:
        figures.stale(project)
    assert str(caught.value).startswith("README.md")
    assert "\n" not in str(caught.value)


def test_results_without_a_key_are_named(project: Path) -> None:
    results = speed_results()
    del results["ratios"]["decode"]
    suite.write(project / "bench" / "results" / blocks.DEMO, run_document(speed=results))
    (project / "README.md").write_text("<!-- figures: speed -->\n<!-- end -->\n")
    with pytest.raises(RequestError, match=r"README.md, figures speed: .*KeyError: 'decode'"):
        figures.stale(project)


@pytest.mark.parametrize(
    "figure",
    [
        "It decodes 15.8 tokens/s.",
        "It decodes 16 tokens/s.",
        "at 250 tok/s",
        "took 24 s and",
        "took 90 seconds",
        "a ratio of 1.14",
        "| 1.14 (0.99-1.19) |",
        "perplexity 49.3 / 27.1",
        "held 12 GB",
        "| 4.08 GB |",
        "is 20% faster",
        "2 percent of it",
        "three times as long",
        "half of our time",
        "2 x as fast",
    ],
)
def test_figures_typed_by_hand_are_found(figure: str) -> None:
    assert figures.typed(f"Text.\n\n{figure}\n")[0][0] == 3
    assert figures.typed(f"<!-- figures: a -->\n{figure}\n<!-- end -->\n") == []
    assert figures.typed(f"```\n{figure}\n```\n") == []
    assert figures.typed(figure, [figure]) == []


@pytest.mark.parametrize(
    "text",
    [
        "Cerebrum-1.0-7b and its 12.25B, in 4 bits, with 32 blocks at 56 positions",
        "mlx 0.32.4, Apache-2.0, 2026-11-22, [a](https://a.b/1.5), `--seconds 2.5`",
        "Past 4096 tokens; six windows' length; half a row",
    ],
)
def test_other_numbers_are_not_figures(text: str) -> None:
    assert figures.typed(text) == []


# The project's own documents


@pytest.mark.parametrize("phrase", [p for p, why in ALLOWED.items() if why.startswith("sizes")])
def test_allowed_sizes_are_the_geometrys(phrase: str) -> None:
    layout, kind = ALLOWED[phrase].removeprefix("sizes: ").split(", ")
    found = describe(LayerPlan.named("cerebrum-12.25b"))["sizes"][layout][kind.replace("-", "")]
    digits = len(phrase.split()[0].partition(".")[2])
    assert phrase == f"{found / GB:.{digits}f} GB"


def test_documents_agree_with_the_results() -> None:
    """Mend with: python -m bench render --figures"""
    diff = figures.stale(ROOT)
    assert not diff, f"python -m bench render --figures mends this:\n{diff}"


@pytest.mark.parametrize("name", figures.GUARDED)
def test_documents_state_no_figure_by_hand(name: str) -> None:
    """A measured figure belongs into a block; one that is arithmetic into ALLOWED."""
    found = figures.typed((ROOT / name).read_text(encoding="utf-8"), list(ALLOWED))
    assert not found, "\n".join(f"{name}:{line}: {figure}" for line, figure in found)


def test_what_is_allowed_is_said_somewhere() -> None:
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in figures.GUARDED)
    assert [phrase for phrase in ALLOWED if phrase not in text] == []


RUNS = Runs(ROOT / "bench" / "results").names()


@pytest.mark.parametrize("run", RUNS)
def test_a_runs_page_is_made_from_its_results(run: str) -> None:
    """Mend with: python -m bench render bench/results/RUN"""
    directory = ROOT / "bench" / "results" / run
    document = suite.read(directory)
    page = (directory / "README.md").read_text(encoding="utf-8")
    assert without_pictures(page) == render.report(document)
    sources = re.findall(r'src="([^"]*)"', page)
    assert all((directory / name).is_file() for name in sources)
    for path in directory.rglob("*.json"):
        assert markdown.private(json.loads(path.read_text(encoding="utf-8"))) == [], path
