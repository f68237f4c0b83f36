"""bench.plans: every plan's figures are the model's own, each shared step is run once.

Pictures need matplotlib; everything else only what the package itself needs.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np
import pytest
from conftest import INTERLEAVED_8, MakeCheckpoint, plan_yaml, slow
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import plans, suite, trie
from bench.pair import open_pair
from bench.plan_family import SQRT_HALF, Cell, card, grid, other_ways
from bench.suite import Effort
from mlx_cerebrum import load
from mlx_cerebrum.errors import CerebrumError, PlanError
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.plan.layer_plan import LayerPlan

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 3

# --- the family ---


def layer_map(cell: Cell, blocks: int) -> tuple[int, ...]:
    return cell.plan(blocks).layer_map(blocks)


def test_the_family_holds_the_12_25b() -> None:
    own = LayerPlan.named("cerebrum-12.25b")
    assert card(32) == Cell(4, 4, 6)
    assert layer_map(card(32), 32) == own.layer_map(32)
    assert [part.layer_range for part in card(32).plan(32).slices] == [
        part.layer_range for part in own.slices
    ]
    demo = LayerPlan.named("demo-interleaved")
    assert layer_map(Cell(13, 4, 1), 30) == demo.layer_map(30)
    assert layer_map(Cell(1, 1, 2), 4) == (0, 1, 1, 2, 2, 3)
    ways = [layer_map(cell, 32) for cell in (card(32), *other_ways(card(32)))]
    assert len(set(ways)) == 3
    assert len({tuple(sorted(way)) for way in ways}) == 1


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_cell_runs_its_blocks_twice_both_times_scaled(data: st.DataObject) -> None:
    blocks = data.draw(st.integers(1, 40))
    width = data.draw(st.integers(1, blocks))
    repeats = data.draw(st.integers(1, blocks // width))
    start = data.draw(st.integers(0, blocks - width * repeats))
    factor = data.draw(st.sampled_from((1.0, SQRT_HALF, 0.5, 0.0, -1.5, 0.0001234)))
    cell = Cell(start, width, repeats, factor)
    assert Cell.named(cell.name) == cell
    plan = cell.plan(blocks)
    scales = plan.residual_scales(blocks) or [(1.0, 1.0)] * (blocks + width * repeats)
    steps = list(zip(plan.layer_map(blocks), scales, strict=True))
    twice = range(start, start + width * repeats)
    for block in range(blocks):
        runs = [pair for at, pair in steps if at == block]
        assert runs == ([(factor, factor)] * 2 if block in twice else [(1.0, 1.0)])


@pytest.mark.parametrize("name", ["s1-w1", "s1-w1-r1-x", "s1-w1-r1-xnan", "s1-w1-r1-x99", "s1-w-r"])
def test_other_names_are_no_cells(name: str) -> None:
    assert Cell.named(name) is None


def test_a_cell_past_the_model_is_refused() -> None:
    for cell in (Cell(3, 2, 1), Cell(0, 0, 1), Cell(-1, 1, 1)):
        with pytest.raises(PlanError):
            cell.plan(4)


@pytest.mark.parametrize("blocks", [3, 7, 8, 22, 30, 32, 80])
def test_the_grid_holds_the_card_s_plan(blocks: int) -> None:
    lists, own = grid(blocks), card(blocks)
    assert own.start in lists["starts"]
    assert own.width in lists["widths"]
    assert own.repeats in lists["repeats"]
    assert len(lists["starts"]) == pytest.approx(min(5, blocks), abs=2)


# --- the walk ---

PATHS = st.lists(
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from((1.0, 0.5)), st.just(1.0)), max_size=6),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=200)
@given(PATHS)
@slow
def test_each_step_of_the_trie_is_run_once(drawn: list[list[trie.Step]]) -> None:
    paths = [tuple(p) for p in drawn]
    runs: list[trie.Path] = []

    def run(index: int, seen: trie.Path, start: int, stop: int) -> trie.Path:
        assert seen == paths[index][:start]  # what it goes on from is its own prefix
        runs.extend(paths[index][: depth + 1] for depth in range(start, stop))
        return paths[index][:stop]

    start: trie.Path = ()
    assert sorted(trie.walk(paths, start, run)) == list(enumerate(paths))
    assert len(runs) == len(set(runs)) == trie.positions(paths)


def log_softmax(logits: mx.array) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    x = np.array(logits, dtype=np.float64)
    x = x.reshape(-1, x.shape[-1])
    x = x - x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"sliding_window": 7}])
@pytest.mark.parametrize("piece", [trie.PIECE_BYTES, 1])
@pytest.mark.one_in(8)
def test_scores_are_the_models_own(
    checkpoint: MakeCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    piece: int,
) -> None:
    monkeypatch.setattr(trie, "PIECE_BYTES", piece)  # 1: a window at a time
    monkeypatch.setattr(trie, "ROWS", 10)  # not a divisor of a window's 19
    model, tokenizer = load(checkpoint(**changes), dtype="float32")
    ids = tokenizer.encode(TEXT)
    windows = mx.array([ids[:20], ids[20:40], ids[40:60]], dtype=mx.int32)
    scaled = "{scale: [{filter: down_proj, value: 0.5}]}"
    by_file = LayerPlan.from_text(plan_yaml(INTERLEAVED_8, scaled))
    cells = [Cell(1, 2, 2), Cell(1, 2, 1, SQRT_HALF), Cell(1, 2, 1), Cell(0, 8, 1)]
    members = [*(cell.plan(8) for cell in cells), by_file]
    views = [model.view(plan.layer_map(8), plan.residual_scales(8)) for plan in members]
    base, *scores = trie.evaluate(model.view(tuple(range(8))), views, windows)
    expected = log_softmax(model(windows[:, :-1]))
    targets = np.array(windows[:, 1:]).reshape(-1)
    rows = np.arange(len(targets))
    assert base[0] == pytest.approx(-expected[rows, targets], abs=1e-5)
    assert base[3].all()
    assert np.abs(base[2]).max() < 1e-5
    for view, (own, loss, kl, agrees) in zip(views, scores, strict=True):
        found = log_softmax(view(windows[:, :-1]))
        assert (own == base[0]).all()
        assert loss == pytest.approx(-found[rows, targets], abs=1e-5)
        assert (agrees == (found.argmax(-1) == expected.argmax(-1))).all()
        assert kl == pytest.approx((np.exp(expected) * (expected - found)).sum(axis=-1), abs=1e-5)
    for score in (scores[0], scores[1], scores[4]):  # the plans do differ
        assert abs(score[1] - scores[2][1]).max() > 1e-3


class Head:
    """A model that is only its head, and that does nothing."""

    @staticmethod
    def logits(h: mx.array) -> mx.array:
        return h


def test_logits_that_are_no_numbers_count_as_worst() -> None:
    """As those of a 16-bit model whose stream has overflowed."""
    h = mx.array([[[0.0, 1.0, 2.0]]])
    score = trie.scorer(cast(Model, Head()), mx.array([[2]]), h)
    assert score(h * float("nan"))[1:3].tolist() == [[100.0], [100.0]]


def test_a_large_vocabulary_loses_no_digits() -> None:
    h = 30 + 3 * mx.random.normal((1, 20, 50_000), key=mx.random.key(1))
    score = trie.scorer(cast(Model, Head()), mx.zeros((1, 20), dtype=mx.int32), h)
    assert abs(score(h)[2]).max() < 1e-4
    other = h + mx.random.normal(h.shape, key=mx.random.key(2))
    p, q = log_softmax(h), log_softmax(other)
    assert score(other)[2] == pytest.approx((np.exp(p) * (p - q)).sum(axis=-1), abs=2e-4)


# --- the command ---


def run(arguments: Sequence[object]) -> int:
    return plans.main([*map(str, arguments), "--no-openblas"])


@pytest.fixture
def novel(tmp_path: Path) -> Path:
    path = tmp_path / "novel.txt"
    path.write_text(TEXT)
    return path


@slow
def test_a_sweep_end_to_end(
    checkpoint: MakeCheckpoint,
    novel: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    plan = tmp_path / "mine.yml"
    plan.write_text(plan_yaml("0-5,2-8"))
    words = ["--model", checkpoint(), "--sweep", "--text", novel, "--tokens", 60, "--context", 21]
    few = ["--starts", 1, 4, "--widths", 1, 2]
    assert run([*words, "--plan", plan, "--plan", "s1-w2-r1-x0.5", *few, "--out", out]) == 0
    printed = capsys.readouterr()
    assert "positions" in printed.err
    assert "the 12.25B's formula (s1-w1-r6)" in printed.out
    assert " of 13; by chance alone about 2.5% of them, 0.3, would be." in printed.out
    document = suite.read(out / suite.FILE)
    results = document["suites"]["plans"]
    assert results["tokens"] == 60
    assert results == json.loads(printed.out.splitlines()[-1])["suites"]["plans"]
    names = [found["name"] for found in results["plans"]]
    assert names[:3] == ["s1-w1-r6", "s1-w1-r6-x0.7071", "s1-w6-r1"]
    assert names[3:5] == ["mine", "s1-w2-r1-x0.5"]
    assert len(names) == len(set(names)) == 13
    made = {path.name for path in out.iterdir()}
    assert {"plans-perplexity.svg", "README.md"} <= made
    (out / suite.FILE).write_text(json.dumps(document | {"model": {"model": "another"}}))
    assert run([*words, "--out", out]) == 2  # what is there stays
    assert "name another" in capsys.readouterr().err


def test_plans_alone_draw_nothing(
    checkpoint: MakeCheckpoint, novel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", checkpoint(), "--text", novel, "--tokens", 20, "--context", 21, "--json"]
    assert run([*words, "--plan", "s0-w8-r1"]) == 0
    results = json.loads(capsys.readouterr().out)["suites"]["plans"]
    assert [plan["name"] for plan in results["plans"]][3:] == ["s0-w8-r1"]
    assert results["plans"][3]["positions"] == 16
    assert plans.plots(results, {}) == {}
    assert len(plans.text(results)) == 2


def test_yaml_is_printed_without_measuring(
    checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--model", checkpoint(), "--yaml", "s2-w2-r2-x0.7071"]) == 0
    printed = capsys.readouterr().out
    assert LayerPlan.from_text(printed).layer_map(8) == (0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--sweep"),
        (["--plan", "s7-w2-r1"], "needs 9 blocks"),
        (["--plan", "nothing-of-that-name"], "named plan"),
        (["--plan", "s1-w1-r1", "--plan", "s1-w1-r1"], "same name"),
        (["--plan", "s1-w1-r1", "--starts", "1"], "for --sweep"),
        (["--sweep", "--widths", "9"], "no plan of these lists"),
        (["--sweep", "--scales", "nan"], "scales"),
        (["--sweep", "--text", "missing.txt"], "missing.txt"),
        (["--sweep", "--context", "2"], "none to score"),
        (["--sweep", "--context", "100000"], "tokens"),
        (["--yaml", "best"], "s13-w4-r1"),
        (["--yaml", "s9-w9-r9"], "blocks"),
    ],
)
def test_bad_input_is_one_line(
    checkpoint: MakeCheckpoint,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    says: str,
) -> None:
    try:
        code = run(["--model", checkpoint(), *words])
    except SystemExit as stopped:  # argparse's own
        code = int(str(stopped.code))
    said = capsys.readouterr().err
    assert code == 2
    assert says in said
    assert said.count("\n") == 1


def test_a_model_without_a_tokenizer_is_refused(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    path = checkpoint()
    (path / "tokenizer.json").unlink()
    with pytest.raises(CerebrumError, match="tokenizer"):
        plans.measure(open_pair(str(path)), Effort(work=tmp_path))


def test_the_base_is_each_block_once_also_of_a_folded_model(
    checkpoint: MakeCheckpoint, novel: Path, tmp_path: Path
) -> None:
    wanted = Effort(work=tmp_path, texts=(novel,), text_tokens=20, say=lambda line: None)
    plain = plans.measure(open_pair(str(checkpoint())), wanted, context=21)
    folded = checkpoint("folded", model_type="cerebrum", layer_map=[0, 1, 0, 1, 2, 3, 4, 5, 6, 7])
    again = plans.measure(open_pair(str(folded)), wanted, context=21)
    assert again["base"] == plain["base"]
    assert again["base"]["positions"] == 8
