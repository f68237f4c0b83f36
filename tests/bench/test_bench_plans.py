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
from conftest import INTERLEAVED_8, MakeCheckpoint, plan_yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import plans, suite, trie
from bench.pair import open_pair
from bench.plan_family import SQRT_HALF, Cell, Grid, card, grids, other_ways
from bench.plan_map import pictures
from bench.plan_table import paragraphs, survivors
from bench.suite import Effort
from mlx_cerebrum import load
from mlx_cerebrum.errors import PlanError, RequestError
from mlx_cerebrum.model.cache import Mask
from mlx_cerebrum.model.forward import Model, TransformerBlock
from mlx_cerebrum.plan.layer_plan import LayerPlan

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 3

# --- the family ---


def test_the_family_holds_the_12_25b() -> None:
    own = LayerPlan.named("cerebrum-12.25b")
    assert card(32) == Cell(4, 4, 6)
    assert card(32).plan(32).layer_map(32) == own.layer_map(32)
    assert [part.layer_range for part in card(32).plan(32).slices] == [
        part.layer_range for part in own.slices
    ]
    demo = LayerPlan.named("demo-interleaved")
    assert Cell(13, 4, 1).plan(30).layer_map(30) == demo.layer_map(30)
    assert [step[0] for step in Cell(1, 1, 2).path(4)] == [0, 1, 1, 2, 2, 3]


def test_both_runs_of_a_block_are_scaled() -> None:
    found = Cell(1, 2, 1, SQRT_HALF).path(4)
    x = SQRT_HALF
    assert found == (
        (0, 1.0, 1.0),
        (1, x, x),
        (2, x, x),
        (1, x, x),
        (2, x, x),
        (3, 1.0, 1.0),
    )


def test_the_cards_blocks_run_twice_in_three_ways() -> None:
    own = card(32)
    ways = [cell.path(32) for cell in (own, *other_ways(own))]
    assert len(set(ways)) == 3
    assert len({tuple(sorted(way)) for way in ways}) == 1


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_cell_is_its_yaml(data: st.DataObject) -> None:
    blocks = data.draw(st.integers(1, 40))
    width = data.draw(st.integers(1, blocks))
    repeats = data.draw(st.integers(1, blocks // width))
    start = data.draw(st.integers(0, blocks - width * repeats))
    factor = data.draw(st.sampled_from((1.0, SQRT_HALF, 0.5, 0.0, -1.5, 0.0001234)))
    cell = Cell(start, width, repeats, factor)
    assert Cell.named(cell.name) == cell
    again = LayerPlan.from_text(cell.plan(blocks).text)
    steps = cell.path(blocks)
    assert again.layer_map(blocks) == tuple(step[0] for step in steps)
    assert again.residual_scales(blocks) == (
        None if factor == 1 else tuple((a, m) for _, a, m in steps)
    )
    twice = range(start, start + width * repeats)
    for block in range(blocks):
        runs = [step for step in steps if step[0] == block]
        assert runs == [(block, factor, factor)] * 2 if block in twice else [(block, 1.0, 1.0)]


@pytest.mark.parametrize("name", ["s1-w1", "s1-w1-r1-x", "s1-w1-r1-xnan", "s1-w1-r1-x99", "s1-w-r"])
def test_other_names_are_no_cells(name: str) -> None:
    assert Cell.named(name) is None


def test_a_cell_past_the_model_is_refused() -> None:
    for cell in (Cell(3, 2, 1), Cell(0, 0, 1), Cell(-1, 1, 1)):
        with pytest.raises(PlanError):
            cell.path(4)


@pytest.mark.parametrize("blocks", [3, 7, 8, 22, 30, 32, 80])
def test_default_grids_hold_the_cards_plan_and_get_coarser(blocks: int) -> None:
    found = [grid.cells(blocks) for grid in grids(blocks)]
    assert all(card(blocks) in cells and card(blocks, SQRT_HALF) in cells for cells in found)
    assert {cell.start for cell in found[0]} >= set(range(blocks))
    assert len(found[-1]) < len(found[0]) or blocks <= 5
    assert len({cell.start for cell in found[-1]}) == pytest.approx(min(5, blocks), abs=2)


def test_lists_by_filestand() -> None:
    (grid,) = grids(30, starts=[13, 2, 13], widths=[4], repeats=[1, 30], scales=[0.5])
    assert grid == Grid((2, 13), (4,), (1, 30), (0.5,))
    assert grid.cells(30) == [Cell(2, 4, 1, 0.5), Cell(13, 4, 1, 0.5)]
    with pytest.raises(RequestError, match="no plan"):
        grids(30, starts=[30])


# --- the walk ---

PATHS = st.lists(
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from((1.0, 0.5)), st.just(1.0)), max_size=6),
    max_size=12,
)


@settings(deadline=None, max_examples=200)
@given(PATHS)
def test_each_step_of_the_trie_is_run_once(drawn: list[list[trie.Step]]) -> None:
    paths = [tuple(p) for p in drawn]
    prefixes = {p[:depth] for p in paths for depth in range(1, len(p) + 1)}
    assert trie.positions(paths) == len(prefixes)
    kept: dict[int, trie.Path] = {0: ()}
    done = []
    for leg in trie.schedule(paths):
        steps = paths[leg.plan]
        assert kept[leg.start] == steps[: leg.start]  # what it goes on from is its own prefix
        kept = {depth: p for depth, p in kept.items() if depth <= leg.start}
        kept |= {depth: steps[:depth] for depth in leg.keep}
        done.append(leg.plan)
    assert sorted(done) == list(range(len(paths)))


def log_softmax(logits: mx.array) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    x = np.array(logits, dtype=np.float64)
    x = x.reshape(-1, x.shape[-1])
    x = x - x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"sliding_window": 7}])
@pytest.mark.parametrize("piece", [trie.PIECE_BYTES, 1])
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
    members: list[LayerPlan | Cell] = [*cells, by_file]
    paths = [plans._steps(member, 8) for member in members]
    base, scores = trie.evaluate(model, windows, trie.path(range(8)), paths)
    expected = log_softmax(model(windows[:, :-1]))
    targets = np.array(windows[:, 1:]).reshape(-1)
    rows = np.arange(len(targets))
    assert base.losses == pytest.approx(-expected[rows, targets], abs=1e-5)
    assert base.agrees.all()
    assert np.abs(base.divergence).max() < 1e-5
    for member, score in zip(members, scores, strict=True):
        plan = member.plan(8) if isinstance(member, Cell) else member
        view = model.view(plan.layer_map(8), plan.residual_scales(8))
        found = log_softmax(view(windows[:, :-1]))
        assert score.losses == pytest.approx(-found[rows, targets], abs=1e-5)
        assert (score.agrees == (found.argmax(-1) == expected.argmax(-1))).all()
        kl = (np.exp(expected) * (expected - found)).sum(axis=-1)
        assert score.divergence == pytest.approx(kl, abs=1e-5)
    for score in (scores[0], scores[1], scores[4]):  # the plans do differ
        assert abs(score.losses - scores[2].losses).max() > 1e-3


def test_hidden_states_are_bit_for_bit_the_forward_pass(checkpoint: MakeCheckpoint) -> None:
    model, _ = load(checkpoint(), dtype="float32")
    tokens = mx.array([[1, 5, 9, 200, 31, 7], [1, 8, 8, 3, 90, 41]])
    cells = [Cell(s, w, r, x) for s in (0, 3) for w in (1, 2) for r in (1, 2) for x in (1.0, 0.6)]
    found = dict(trie.walk(model, tokens, [cell.path(8) for cell in cells]))
    for index, cell in enumerate(cells):
        plan = cell.plan(8)
        view = model.view(plan.layer_map(8), plan.residual_scales(8))
        logits = trie.logits(model, found[index])
        assert mx.array_equal(logits, view(tokens)).item()


def test_a_step_in_common_is_computed_once(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load(checkpoint(), dtype="float32")
    runs = 0
    block = type(model.model.layers[0])
    forward = block.__call__

    def counted(
        self: TransformerBlock, x: mx.array, mask: Mask, cache: None, scales: tuple[float, float]
    ) -> mx.array:
        nonlocal runs
        runs += 1
        return forward(self, x, mask, cache, scales)

    monkeypatch.setattr(block, "__call__", counted)
    paths = [Cell(s, 1, r).path(8) for s in range(7) for r in (1, 2) if s + r <= 8]
    list(trie.walk(model, mx.array([[1, 5, 9]]), paths))
    assert runs == trie.positions(paths) < 0.6 * sum(map(len, paths))


class Head:
    """A model that is only its head, and that does nothing."""

    class config:  # noqa: N801
        tie_word_embeddings = False

    class model:  # noqa: N801
        @staticmethod
        def norm(h: mx.array) -> mx.array:
            return h

    @staticmethod
    def lm_head(h: mx.array) -> mx.array:
        return h


def test_logits_that_are_no_numbers_count_as_worst() -> None:
    """As those of a 16-bit model whose stream has overflowed."""
    h = mx.array([[[0.0, 1.0, 2.0]]])
    score = trie.Base(cast(Model, Head()), mx.array([[2]]), h).score(h * float("nan"))
    assert (score.losses.item(), score.divergence.item()) == (100.0, 100.0)


def test_a_large_vocabulary_loses_no_digits() -> None:
    h = 30 + 3 * mx.random.normal((1, 20, 50_000), key=mx.random.key(1))
    targets = mx.zeros((1, 20), dtype=mx.int32)
    base = trie.Base(cast(Model, Head()), targets, h)
    assert abs(base.score(h).divergence).max() < 1e-4
    other = h + mx.random.normal(h.shape, key=mx.random.key(2))
    p, q = log_softmax(h), log_softmax(other)
    kl = (np.exp(p) * (p - q)).sum(axis=-1)
    assert base.score(other).divergence == pytest.approx(kl, abs=2e-4)


# --- the command ---


def run(arguments: Sequence[object]) -> int:
    return plans.main([*map(str, arguments), "--no-openblas"])


@pytest.fixture
def novel(tmp_path: Path) -> Path:
    path = tmp_path / "novel.txt"
    path.write_text(TEXT)
    return path


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
    assert {"plans-perplexity.svg", "plans-agreement.svg", "README.md"} <= made
    for name in survivors(results):
        if name != "mine":
            again = LayerPlan.from_file(out / "plans" / f"{name}.yml")
            assert len(again.layer_map(8)) == next(
                p["positions"] for p in results["plans"] if p["name"] == name
            )
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
    assert pictures(results) == {}
    assert len(paragraphs(results)) == 2


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
        (["--sweep", "--context", "2"], "--context"),
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
    with pytest.raises(RequestError, match="tokenizer"):
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


def test_windows_are_those_of_perplexity(checkpoint: MakeCheckpoint, novel: Path) -> None:
    from bench.perplexity import token_losses

    model, tokenizer = load(checkpoint(), dtype="float32")
    windows = plans.read_windows(tokenizer, [novel], 45, 16)
    assert windows.shape == (3, 16)
    base, _ = trie.evaluate(model, windows, trie.path(range(8)), [])
    assert base.losses == pytest.approx(token_losses(model, tokenizer, TEXT, 45, 16), abs=1e-5)
