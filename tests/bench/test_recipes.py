"""What each side of bench.recipes is made with."""

from argparse import Namespace
from pathlib import Path

import pytest

from bench import process, recipes
from bench.process import Cost
from bench.recipes import BASE, MIXED, UNIFORM, BitsOf, once, score, sides, wanted
from bench.suite import Results
from convert.passages import METHODS
from convert.recipe import RECIPES
from mlx_cerebrum.errors import RequestError


def every(tmp_path: Path) -> dict[str, list[str]]:
    return sides(Namespace(plan="plan.yml", calibrate=None, calibrate_tokens=64), tmp_path)


def test_only_a_budget_is_of_another_side(tmp_path: Path) -> None:
    """Sides and recipes share names."""
    found = every(tmp_path)
    for name, flags in found.items():
        of_others = [i for i, flag in enumerate(flags) if isinstance(flag, BitsOf)]
        assert [flags[i - 1] for i in of_others] in ([], ["--q-budget"], ["--bits"])
        before = [*found][: [*found].index(name)]
        assert {flags[i] for i in of_others} <= {*before}
        if "--q-recipe" in flags:
            recipe = flags[flags.index("--q-recipe") + 1]
            assert recipe in (*RECIPES, *METHODS)
            assert not isinstance(recipe, BitsOf)


def test_some_sides_only(tmp_path: Path) -> None:
    found = wanted(every(tmp_path), ["gptq", "plan"])
    assert [*found] == ["dense", UNIFORM, "plan", "gptq"]
    for names, word in ((["gtpq"], "is none of"), ([f"plan, bits of {MIXED}"], "so give it too")):
        with pytest.raises(RequestError, match=word):
            wanted(every(tmp_path), names)


def test_a_side_that_is_kept_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def converted(args: Namespace, path: Path, flags: list[str]) -> Cost:
        path.mkdir()  # refused where one is
        if "broken" in flags:
            raise RequestError("broken")
        made.append(flags)
        return Cost(60.0 * len(made), 2**30)

    monkeypatch.setattr(recipes, "_converted", converted)
    args = Namespace(model="demo", plan=None, calibrate=None, calibrate_tokens=64)
    path, first = tmp_path / "uniform", {"seconds": 60.0, "peak_memory": 2**30}
    assert once(args, path, ["-q"]) == once(args, path, ["-q"]) == first
    with pytest.raises(RequestError):
        once(args, path, ["broken"])
    assert once(args, path, ["-q"]) == {"seconds": 120.0, "peak_memory": 2**30}  # the first is gone
    args.plan = "demo-interleaved"
    once(args, path, ["-q"])
    assert made == [["-q"]] * 3


def test_what_is_packed_in_the_bases_order_is_laid_out_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = Namespace(model="demo", plan=None, calibrate=None, calibrate_tokens=64)
    assert BASE not in sides(args, tmp_path)
    args.plan = "demo-interleaved"
    flags = sides(args, tmp_path)[BASE]
    assert flags[-2:] == ["--calibrate-tokens", "128"]
    done: list[object] = []

    def converted(args: Namespace, path: Path, flags: list[str]) -> Cost:
        done.append((args.plan, path))
        return Cost(60.0, 2**30)

    monkeypatch.setattr(recipes, "_converted", converted)
    monkeypatch.setattr(process, "cost", done.append)
    once(args, path := tmp_path / BASE, flags)
    before = tmp_path / f"{BASE}, before"
    words = ["convert", "--hf-path", str(before), "--mlx-path", str(path)]
    assert done == [(None, before), [*words, "--plan", "demo-interleaved"]]


def test_a_side_that_is_kept_is_scored_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = Namespace(model="demo", plan=None, calibrate=None, calibrate_tokens=64)
    vars(args).update(text=[Path("austen.txt")], tokens=128, context=64)
    loaded: list[str] = []

    def loading(path: Path) -> tuple[str, None]:
        loaded.append(path.name)
        return path.name, None

    monkeypatch.setattr(recipes, "_converted", lambda *_: Cost(60.0, 2**30))
    monkeypatch.setattr(recipes, "load", loading)
    monkeypatch.setattr(recipes, "_windows", lambda *_: [("austen", [])])
    monkeypatch.setattr(recipes, "_compared", lambda model, _: {"kl": len(loaded)})

    def scored(*names: str) -> list[int]:
        made: Results = {name: once(args, tmp_path / name, []) for name in names}
        score(args, tmp_path, made)
        return [made[name]["texts"]["austen"]["kl"] for name in names[1:]]

    assert scored("dense", "uniform") == [2]
    assert scored("dense", "uniform", "plan") == [2, 4]
    assert capsys.readouterr().err.endswith("scoring 1 of 1: plan\n")
    assert scored("dense", "uniform", "plan") == [2, 4]
    assert capsys.readouterr().err == ""
    assert loaded == ["dense", "uniform", "dense", "plan"]
    args.tokens = 256
    assert scored("dense", "plan") == [6]
    args.calibrate_tokens = 32  # made anew
    assert scored("dense", "plan") == [8]
