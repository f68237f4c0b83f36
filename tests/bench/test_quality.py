"""The quality suite: its numbers against direct ones, and words that say what the numbers do.

Needs matplotlib for the pictures. The harness's answers are made up here; its own tests run it.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import MakeCheckpoint

from bench import bootstrap, harness, likelihood, quality, repetition
from bench.bootstrap import Interval, Values
from bench.likelihood import compare, log_probs, losses
from bench.pair import Pair, open_pair
from bench.plots import drawn
from bench.quality_report import Row, rows, verdict
from bench.random_model import RandomCheckpoint
from bench.suite import Effort, escaped
from mlx_cerebrum import load
from mlx_cerebrum.decoding.decoder import generate_step
from mlx_cerebrum.decoding.sampling import Sampling
from mlx_cerebrum.errors import CerebrumError, RequestError
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.plan.layer_plan import interleave
from mlx_cerebrum.weights.opening import ModelSpec, open_checkpoint
from mlx_cerebrum.weights.quantize import Packing

TEXT = Path(__file__).parents[2] / "bench" / "data" / "austen.txt"
OPEN = {"sliding_window": None, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}


@pytest.fixture
def model(checkpoint: MakeCheckpoint) -> Model:
    return load(checkpoint(), dtype="float32")[0]


@pytest.fixture
def ids() -> list[int]:
    return [3 + byte for byte in TEXT.read_bytes()[:600]]


def direct(model: Model, window: list[int]) -> Values:
    """Log-probabilities of every next token, in one piece and in float64."""
    logits = np.array(model(mx.array(window[:-1])[None])[0], dtype=np.float64)
    rows: Values = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return rows


def test_losses_are_minus_the_log_softmax(
    model: Model, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    window = ids[:100]  # eight times the model's sliding window of 12
    rows = direct(model, window)
    expected = [-rows[k, token] for k, token in enumerate(window[1:])]
    assert losses(model, window) == pytest.approx(expected, abs=1e-4)
    monkeypatch.setattr(likelihood, "prefill_step", lambda: 7)
    assert losses(model, window) == pytest.approx(expected, abs=1e-4)
    chunked = np.concatenate([np.array(chunk) for chunk in log_probs(model, window[:-1])])
    assert chunked == pytest.approx(rows, abs=1e-4)


def test_divergence_and_agreement(model: Model, ids: list[int]) -> None:
    window = ids[:60]
    other = model.view(interleave(8, 4).layer_map(8))
    a, b, kl, agrees = compare(log_probs(model, window[:-1]), log_probs(other, window[:-1]), window)
    p, q = direct(model, window), direct(other, window)
    assert kl == pytest.approx((np.exp(p) * (p - q)).sum(axis=-1), abs=1e-4)
    assert agrees.tolist() == (p.argmax(axis=-1) == q.argmax(axis=-1)).tolist()
    assert a == pytest.approx(losses(model, window), abs=1e-5)
    assert b == pytest.approx(losses(other, window), abs=1e-5)
    assert kl.mean() > 1e-3
    itself = compare(log_probs(model, window[:-1]), log_probs(model, window[:-1]), window)
    assert (itself[2] == 0).all()
    assert (itself[3] == 1).all()


def test_logits_that_are_no_numbers_are_refused() -> None:
    chunk = mx.full((2, 4), math.nan)
    with pytest.raises(CerebrumError, match="finite"):
        compare([chunk], [chunk], [1, 2, 3])


def test_a_window_changes_the_loss_beyond_it_only(model: Model, ids: list[int]) -> None:
    assert model.config.sliding_window == 12
    free = quality.with_window(model, None)
    assert free.model is model.model
    assert model.config.sliding_window == 12
    found = quality.beyond((model, model), [1], ids)
    assert (found["own"], found["tokens"]) == (True, 47)  # four windows, BOS included, in halves
    chosen = [1, *ids[:46]]
    bound, unbound = losses(model, chosen), losses(free, chosen)
    assert bound[:12] == pytest.approx(unbound[:12], abs=1e-5)  # tokens 1 to 12
    assert abs(bound[12:] - unbound[12:]).max() > 1e-3
    assert [one["from"] for one in found["a"]] == list(range(0, 48, 6))
    assert found["a"] == found["b"]
    mean = np.mean((bound - unbound)[17:23])  # tokens 18 to 23
    assert found["a"][3]["difference"]["value"] == pytest.approx(mean, rel=1e-3, abs=1e-4)
    with pytest.raises(RequestError, match="too little"):
        quality.beyond((model, model), [1], ids[:10])


@pytest.mark.long
def test_a_model_without_a_window_gets_one(checkpoint: MakeCheckpoint, ids: list[int]) -> None:
    model, _ = load(checkpoint("open", **OPEN, max_position_embeddings=4096), dtype="float32")
    found = quality.beyond((model, model), [], ids * 2)
    assert (found["window"], found["own"]) == (512, False)
    inside, outside = found["a"][1]["difference"], found["a"][-1]["difference"]
    assert inside["value"] == 0
    assert outside["value"] != 0


def pair_of(path: Path, q_bits: int | None = None) -> Pair:
    spec = ModelSpec(path, q_bits=q_bits)
    return Pair.of(open_checkpoint(path), spec, plan_b=interleave(8, 4))


def test_more_bits_are_nearer(checkpoint: MakeCheckpoint, ids: list[int], tmp_path: Path) -> None:
    path = checkpoint(head_dim=64, intermediate_size=192)
    effort = Effort(tmp_path, say=lambda line: None)
    found = quality.quantization(pair_of(path), [ids[:100]], effort)
    assert found["tokens"] == 99
    kl = {(one["side"], one["bits"]): one["kl"]["value"] for one in found["rows"]}
    for side in "ab":
        assert 0 < kl[side, 8] < kl[side, 4] / 10
    packed = quality.quantization(pair_of(path, q_bits=4), [], effort)
    assert "--q-bits" in packed["not_measured"]


def test_packed_weights_are_the_packing_s_own(checkpoint: MakeCheckpoint) -> None:
    path = checkpoint()
    pair = pair_of(path)
    a, b = quality.repacked_models(pair, Packing(4, 64))
    assert a.model is b.model
    assert (a.config.num_positions, b.config.num_positions) == (8, 12)
    tokens = mx.array([[5, 6, 7]])
    packed, _ = load(path, q_bits=4, dtype="float32")
    assert np.array(a(tokens)) == pytest.approx(np.array(packed(tokens)), abs=1e-4)
    assert abs(np.array(a(tokens) - pair.models()[0](tokens))).max() > 1e-2  # as it was


def test_continuations_of_many_are_those_of_each(checkpoint: MakeCheckpoint) -> None:
    model, tokenizer = load(checkpoint(), dtype="float32")
    prompts = [[*TEXT.read_bytes()[k : k + n]] for k, n in ((5, 10), (50, 30), (100, 3))]
    found = repetition.continuations(model, tokenizer, prompts, [20, 7, 20])
    for prompt, written, most in zip(prompts, found, (20, 7, 20), strict=True):
        assert written == list(generate_step(prompt, model, max_tokens=most))
    end = found[0][5]
    tokenizer.eos_token_ids = frozenset({end})
    for ended, whole in zip(
        repetition.continuations(model, tokenizer, prompts, 20), found, strict=True
    ):
        assert end not in ended
        assert whole[: len(ended)] == ended[: len(whole)]


def test_drawn_continuations_have_seeds_of_their_own(checkpoint: MakeCheckpoint) -> None:
    model, tokenizer = load(checkpoint(), dtype="float32")
    tokenizer.eos_token_ids = frozenset()
    prompt = [*TEXT.read_bytes()[5:15]]
    draw = Sampling(temp=1.0, seed=3)
    found = repetition.continuations(model, tokenizer, [prompt] * 2, 20, draw)
    for seed, written in zip((3, 4), found, strict=True):
        own = Sampling(temp=1.0, seed=seed).sampler()
        assert written == list(generate_step(prompt, model, max_tokens=20, sampler=own))
    assert found[0] != found[1]


def test_what_repeats() -> None:
    assert repetition.repeated([1, 2, 3, 4, 5, 6]) == 0
    assert repetition.repeated([1, 2, 3]) == 0
    assert repetition.repeated([7] * 8) == pytest.approx(4 / 5)
    assert repetition.repeated([1, 2, 3, 4] * 2) == pytest.approx(1 / 5)


def test_what_a_loop_is() -> None:
    text = list(range(1000))
    for period in (1, 5, 21):
        loop = text[500 : 500 + period] * 99
        tail = max(24, 3 * period)
        assert repetition.loops(text[: 128 - tail] + loop[:tail], 128)
        assert not repetition.loops(text[: 128 - tail + 1] + loop[: tail - 1], 128)
    assert not repetition.loops(text[:20] + (text[500:522] * 9)[:108], 128)  # a period of 22
    assert not repetition.loops([7] * 100, 128)  # ended by itself


def test_passages_do_not_overlap() -> None:
    found = repetition.passages({"x": list(range(3000)), "y": list(range(10_000, 10_400))}, 128)
    assert len(found) == 8 + 2
    tokens = [token for passage, rest in found for token in passage + rest]
    assert len(tokens) == len(set(tokens)) == 10 * 192
    assert repetition.passages({"x": [1] * 100}) == []


def row(kind: str, low: float, high: float, blocks: int = 20, **more: Any) -> Row:
    return Row(kind, "m", 1.0, 2.0, Interval((low + high) / 2, low, high, blocks, blocks), **more)


def test_better_is_what_the_interval_says() -> None:
    assert row("perplexity", 0.1, 0.2).better == "a"
    assert row("perplexity", -0.2, -0.1).better == "b"
    assert row("accuracy", 0.1, 0.2).better == "b"
    assert row("repetition", 0.1, 0.2).better == "a"
    assert row("accuracy", -0.1, 0.2).better == "none"
    assert row("accuracy", 0.1, 0.2, blocks=7).better == "few"
    table, said, trust = verdict(
        [row("accuracy", 0.1, 0.2), row("perplexity", 0.1, 0.2, counts=False)],
        ("7B", "12B"),
        (8, 9),
    )
    assert [line.split("|")[-2].strip() for line in table.splitlines()[2:]] == ["B", "(A)"]
    assert "Of the 1 rows that count, A (7B, 8 positions) is better on 0 and B (12B" in said
    assert "With 1 intervals of 95%" in trust


def answers(only_a: int, only_b: int, questions: int = 60) -> dict[str, Any]:
    """A task's row of results; the rest of the questions are both's."""
    a = [1.0] * only_a + [0.0] * only_b + [1.0] * (questions - only_a - only_b)
    b = [0.0] * only_a + [1.0] * only_b + [1.0] * (questions - only_a - only_b)
    return quality._answers("sums", "acc", a, b)


def results_of(**parts: Any) -> dict[str, Any]:
    return {"perplexity": [], "repetition": None, "accuracy": {}} | parts


@pytest.mark.parametrize(
    ("few", "many", "shown"),
    [(1, 7, False), (2, 9, False), (3, 11, False), (0, 6, True), (3, 12, True)],
)
def test_a_sign_test_has_to_agree(few: int, many: int, shown: bool) -> None:
    for only, better in (((few, many), "b"), ((many, few), "a")):
        one = answers(*only)
        assert Interval.from_json(one["difference"]).sign != 0  # too narrow
        (found,) = rows(results_of(accuracy={"tasks": [one]}))
        assert found.better == (better if shown else "none")
        # The same items as loops, where fewer are better, and nobody counted them.
        loops = {"a": {"value": 0.5}, "b": {"value": 0.5}, "difference": one["difference"]}
        (found,) = rows(results_of(repetition={"loops": loops}))
        assert found.better == ({"a": "b", "b": "a"}[better] if shown else "none")
        # A share of 4-grams is no such outcome.
        (found,) = rows(results_of(repetition={"seq_rep_4": loops}))
        assert found.better == {"a": "b", "b": "a"}[better]


def test_one_perplexity_of_each_text_counts() -> None:
    more = bootstrap.paired([0.0] * 20, [0.5] * 20).as_json()
    worse = {"loss_a": 1.0, "loss_b": 2.0, "difference": more}
    both = {"strided": worse, "sliding": worse}
    contexts = (("x", 512), ("y", 512), ("x", 2048))
    perplexity = [{"text": text, "context": context} | both for text, context in contexts]
    found = rows(results_of(perplexity=perplexity))
    assert [one.measure for one in found if one.counts] == [
        "perplexity, y, sliding 512",
        "perplexity, x, sliding 2048",
    ]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole suite in seconds."""
    monkeypatch.setattr(quality, "CONTEXTS", (64, 128))
    monkeypatch.setattr(repetition, "LENGTH", 8)
    monkeypatch.setattr(bootstrap, "RESAMPLES", 200)
    monkeypatch.setattr(harness, "installed", lambda: True)

    def answers(model: Model, *_: Any) -> harness.Scores:
        right = 2 if model.config.num_positions == 8 else 3
        return {"sums": {"acc": [float(k % right == 0) for k in range(30)]}}

    monkeypatch.setattr(harness, "evaluate", answers)


@pytest.mark.usefixtures("small")
@pytest.mark.long
def test_the_suite(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_bytes(TEXT.read_bytes()[:700])
    (tmp_path / "short.txt").write_text("Too short.")
    texts = (tmp_path / "prose.txt", tmp_path / "short.txt")
    settings = Effort(tmp_path, texts=texts, text_tokens=256, say=lambda line: None)
    pair = pair_of(checkpoint())
    a, b = pair.models()
    results = json.loads(json.dumps(quality.measure(pair, settings), allow_nan=False))
    assert results["skipped"] == ["short at 64", "short at 128"]
    short, long = results["perplexity"]
    assert (short["windows"], long["windows"]) == (3, 1)
    # BOS, then 62 tokens of the text: 124 strided in two windows, 93 sliding in three.
    assert (short["strided"]["tokens"], short["sliding"]["tokens"]) == (124, 93)
    tokenizer = pair.opened.tokenizer
    ids = tokenizer.encode(TEXT.read_text()[:700])
    assert ids[0] == 1
    first = losses(a, ids[:63])
    second = losses(a, [1, *ids[63:125]])
    assert short["strided"]["loss_a"] == pytest.approx(np.concatenate([first, second]).mean(), 1e-3)
    parts = [losses(b, [1, *ids[k : k + 62]])[31:] for k in (1, 32, 63)]
    assert short["sliding"]["loss_b"] == pytest.approx(np.concatenate(parts).mean(), 1e-3)
    assert results["accuracy"]["tasks"][0]["only_a"] == 10
    assert results["window"]["own"]
    assert results["repetition"]["passages"] == 6

    page = "\n".join(quality.text(escaped(results)))
    assert "| perplexity, prose, sliding 64" in page
    assert "short at 64" in page
    pictures = quality.plots(results, {})
    assert list(pictures) == ["quality-perplexity", "quality-answers"]
    for picture in pictures.values():
        assert drawn(picture).axes


@pytest.mark.usefixtures("small")
def test_one_failing_task_costs_the_others_nothing(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def answers(model: Model, _: Any, tasks: tuple[str, ...], *__: Any) -> harness.Scores:
        asked.append(tasks)
        if "bad" in tasks or ("late" in tasks and model.config.num_positions > 8):
            raise RequestError(f"no task {tasks[0]!r}")
        return {task: {"acc": [1.0, 0.0]} for task in tasks or ("own",)}

    monkeypatch.setattr(harness, "evaluate", answers)
    pair = pair_of(checkpoint())
    tokenizer = pair.opened.tokenizer
    settings = Effort(tmp_path, say=lambda line: None)

    def accuracy(*tasks: str) -> dict[str, Any]:
        return quality._accuracy(pair, tokenizer, replace(settings, tasks=tasks))

    found = accuracy("bad", "good", "late", "good", "fine")
    assert [one["task"] for one in found["tasks"]] == ["good", "fine"]
    assert [one["not_measured"] for one in found["missing"]] == ["no task 'bad'", "no task 'late'"]
    assert asked == [(t,) for t in ("bad", "good", "good", "late", "late", "fine", "fine")]
    assert accuracy("bad") == {"not_measured": "no task 'bad'"}
    assert accuracy()["tasks"][0]["task"] == "own"  # none named: the harness's choice, at once


@pytest.mark.usefixtures("small")
def test_what_can_t_be_measured_is_said(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prose.txt").write_bytes(TEXT.read_bytes()[:100])
    texts = (tmp_path / "prose.txt",)
    monkeypatch.setattr(harness, "installed", lambda: False)
    pair = pair_of(checkpoint(sliding_window=200), q_bits=8)
    settings = Effort(tmp_path, texts=texts, text_tokens=64, say=lambda line: None)
    results = quality.measure(pair, settings)
    page = "\n".join(quality.text(escaped(results)))
    assert escaped(harness.INSTALL) in page
    assert "without --q-bits" in page
    assert "Beyond the sliding window: not measured." in page
    assert "Repetition: not measured" in page
    assert list(quality.plots(results, {})) == ["quality-perplexity"]
    with pytest.raises(RequestError, match="at least 64 tokens"):
        quality.measure(pair, replace(settings, text_tokens=63))


def test_random_weights_are_refused(tmp_path: Path) -> None:
    pair = Pair.of(RandomCheckpoint(Path("random")), ModelSpec("random"))
    with pytest.raises(CerebrumError, match="tokenizer"):
        quality.measure(pair, Effort(tmp_path))


@pytest.mark.long
def test_the_demo_s_two_sides(demo: Path, ids: list[int]) -> None:
    """On a trained model the direction is known: the interleave predicts worse."""
    pair = open_pair(str(demo))
    tokenizer = pair.opened.tokenizer
    window = tokenizer.encode(TEXT.read_text())[:65]
    first, second = (log_probs(model, window[:-1]) for model in pair.models())
    a, b, _, _ = compare(first, second, window)
    assert b.mean() > a.mean() + 0.3
    assert a.mean() < 5.5
