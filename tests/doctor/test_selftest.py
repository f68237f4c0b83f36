"""The selftest's run and its page: what fails is said and ends nothing, and nobody is named."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import suite
from mlx_cerebrum.__main__ import main
from mlx_cerebrum.doctor import alone, page, selftest
from mlx_cerebrum.doctor.check import Check, Found, Settings
from mlx_cerebrum.doctor.checks import BY_NAME, CHECKS
from mlx_cerebrum.errors import CerebrumError, RequestError


def check(name: str, found: Found | Exception, bound: str = "none") -> Check:
    def run(settings: Settings) -> Found:
        if isinstance(found, Exception):
            raise found
        return found

    return Check(name, f"that {name} is right", bound, f"mend {name}", run)


GOOD = check("good", Found(True, "3 of 3", [["a", "b"], ["1", "2 | 3"]], {"n": 3}))
BAD = check("bad", Found(False, "1 of 3"))
ABSENT = check("absent", Found(None, "no GPU"))
RAISES = check("raises", ValueError("no\nsuch file: /Users/jane/models/7b/config.json, at 5 GB/s"))


def ran(directory: Path, *checks: Check, model: str = "demo", **more: Any) -> page.Document:
    more = {"say": lambda line: None} | more
    return selftest.selftest(model, True, directory, checks, alone.carry_out, **more)


@pytest.fixture(autouse=True)
def demo_is_here(monkeypatch: pytest.MonkeyPatch, demo: Path, tmp_path: Path) -> None:
    monkeypatch.setenv("MLX_CEREBRUM_MODELS", str(tmp_path / "models"))


def test_all_that_passes_passes(tmp_path: Path) -> None:
    document = ran(tmp_path / "out", GOOD, ABSENT)
    assert page.passed(document)
    assert page.verdict(document) == "1 passed, 0 failed, 1 can't be shown here"
    assert page.read(tmp_path / "out") == json.loads(json.dumps(document))
    text = (tmp_path / "out" / page.PAGE).read_text()
    assert text == page.markdown(page.read(tmp_path / "out"))
    assert "| good | passed | that good is right | 3 of 3 | none | mend good | 0 |" in text
    assert "| absent | not here |" in text
    assert "2 &#124; 3" in text


def test_what_fails_or_raises_is_a_line_and_not_the_end(tmp_path: Path) -> None:
    said: list[str] = []
    document = ran(tmp_path / "out", BAD, RAISES, GOOD, say=said.append)
    assert not page.passed(document)
    assert page.verdict(document) == "1 passed, 2 failed"
    (row,) = [r for r in document["checks"] if r["name"] == "raises"]
    assert row["words"] == "ValueError: such file: config.json, at 5 GB/s"
    text = (tmp_path / "out" / page.PAGE).read_text()
    assert "| bad | FAILED | that bad is right | 1 of 3 | none | mend bad | 0 |" in text
    assert "    to do: mend bad" in said
    assert "jane" not in text + json.dumps(document)


def test_the_page_is_there_before_the_last_check(tmp_path: Path) -> None:
    def stopped(settings: Settings) -> Found:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ran(tmp_path / "out", GOOD, Check("stopped", "", "", "", stopped))
    document = page.read(tmp_path / "out")
    assert page.verdict(document) == "1 passed, 0 failed, 1 not run"
    assert not page.passed(document)


def test_a_model_by_its_path_is_named_without_it(tmp_path: Path, demo: Path) -> None:
    document = ran(tmp_path / "out", GOOD, model=str(demo))
    assert document["settings"]["model"] == demo.name
    assert suite.private(document) == []


def test_refused_before_a_check_runs(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(RequestError, match="in use"):
        ran(tmp_path, GOOD)
    with pytest.raises(RequestError, match="is a file"):
        ran(tmp_path / "README.md", GOOD)
    with pytest.raises(CerebrumError, match="nothing/of-that-kind"):
        ran(tmp_path / "out", GOOD, model="./nothing/of-that-kind")
    assert (tmp_path / "README.md").read_text() == "mine"
    ran(tmp_path / "out", GOOD)
    ran(tmp_path / "out", BAD)  # its own may be written over


def test_documents_of_others_are_refused(tmp_path: Path) -> None:
    (tmp_path / page.FILE).write_text('{"schema": 2}')
    with pytest.raises(RequestError, match="schema 1"):
        page.read(tmp_path)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/tmp/x/model.safetensors: damaged", "model.safetensors: damaged"),
        (f"{Path.home()}/models/a b", "a b"),
        ("'~/models/7b' and (/var/x)", "'7b' and (x)"),
        ("3.1 tokens/s, 40 GB/s, ours / mlx-lm", "3.1 tokens/s, 40 GB/s, ours / mlx-lm"),
        ("owner/name 50%/s", "owner/name 50%/s"),
    ],
)
def test_paths_are_cut(text: str, left: str) -> None:
    assert page.impersonal(text) == left


def test_where_the_page_goes(tmp_path: Path) -> None:
    name = f"{page.machine_name()}-selftest"
    assert selftest.default_folder(tmp_path) == tmp_path / name
    (tmp_path / "bench" / "results").mkdir(parents=True)
    assert selftest.default_folder(tmp_path) == tmp_path / "bench" / "results" / name


@pytest.mark.parametrize(
    ("processor", "name"),
    [
        ("Apple M2 Pro", "apple-m2-pro"),
        ("Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz", "intel-core-i7-9750h"),
        ("AMD EPYC", "amd-epyc"),
    ],
)
def test_a_machines_name(monkeypatch: pytest.MonkeyPatch, processor: str, name: str) -> None:
    monkeypatch.setattr(page, "processor", lambda: processor)
    monkeypatch.setattr(page, "memory_bytes", lambda: 16 << 30)
    assert page.machine_name() == f"{name}-16gb"


def test_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = selftest.selftest

    def give(*checks: Check) -> None:
        def few(model: str, quick: bool, out: Path) -> page.Document:
            return whole(model, quick, out, checks, alone.carry_out)

        monkeypatch.setattr(selftest, "selftest", few)

    out = str(tmp_path / "out")
    give(GOOD)
    assert main(["doctor", "--selftest", "--quick", "--out", out]) == 0
    said = capsys.readouterr()
    assert said.out == f"1 passed, 0 failed: {out}/README.md\n"
    assert said.err.startswith("1/1 good: that good is right ...\n    passed: 3 of 3\n")
    give(GOOD, BAD)
    assert main(["doctor", "--selftest", "--out", out, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["checks"][1]["passed"] is False
    assert main(["doctor", "--quick"]) == 2
    assert capsys.readouterr().err == "error: --quick is for --selftest\n"


def test_every_check_says_what_it_is() -> None:
    assert len(BY_NAME) == len(CHECKS)
    for one in CHECKS:
        assert one.shows
        assert one.bound
        assert one.remedy
        assert not one.remedy.endswith(".")  # the page's


# ---- A process for each


def settings(tmp_path: Path) -> Settings:
    return Settings("demo", True, str(tmp_path))


def test_a_check_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    found = alone.in_process(BY_NAME["limits"], settings(tmp_path))
    assert found.passed, found.words
    assert found.data["left"] == []


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("kill -9 $$", "its process ended with signal 9: "),
        ("echo terminating: no memory >&2; exit 6", "ended with code 6: terminating: no memory"),
        ("exec sleep 60", "did not end within"),
    ],
)
def test_a_process_that_dies_or_hangs_has_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, said: str
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    found = alone.in_process(GOOD, settings(tmp_path), limit=0.3 if "sleep" in script else 30)
    assert found.passed is False
    assert said in found.words
