"""The quality suite: its numbers against direct ones, and words that say what the numbers do.

Needs matplotlib for the pictures. The harness's answers are made up here; its own tests run it.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import MakeCheckpoint

from bench import bootstrap, harness, quality, quantized, repetition, verdict, window_loss
from bench.likelihood import Comparison, Values, compare, keep, kept, log_probs, losses, windows
from bench.pair import Pair, open_pair
from bench.plots import drawn
from bench.quality_report import _accuracy, _quantization
from bench.random_model import RandomCheckpoint
from bench.suite import Effort, escaped
from mlx_cerebrum import load
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


def test_losses_are_minus_the_log_softmax(model: Model, ids: list[int]) -> None:
    window = ids[:100]  # eight times the model's sliding window of 12
    rows = direct(model, window)
    expected = [-rows[k, token] for k, token in enumerate(window[1:])]
    assert losses(model, window) == pytest.approx(expected, abs=1e-4)
    chunked = np.concatenate([np.array(chunk) for chunk in log_probs(model, window[:-1], step=7)])
    assert chunked == pytest.approx(rows, abs=1e-4)


def test_divergence_and_agreement(model: Model, ids: list[int]) -> None:
    window = ids[:60]
    other = model.view(interleave(8, 4).layer_map(8))
    found = compare(log_probs(model, window[:-1]), log_probs(other, window[:-1]), window)
    p, q = direct(model, window), direct(other, window)
    assert found.kl == pytest.approx((np.exp(p) * (p - q)).sum(axis=-1), abs=1e-4)
    assert found.agrees.tolist() == (p.argmax(axis=-1) == q.argmax(axis=-1)).tolist()
    assert found.a == pytest.approx(losses(model, window), abs=1e-5)
    assert found.b == pytest.approx(losses(other, window), abs=1e-5)
    assert found.kl.mean() > 1e-3
    itself = compare(log_probs(model, window[:-1]), log_probs(model, window[:-1]), window)
    assert (itself.kl == 0).all()
    assert (itself.agrees == 1).all()


def test_log_probabilities_come_back_from_a_file(
    model: Model, ids: list[int], tmp_path: Path
) -> None:
    window = ids[:300]  # more than one chunk, on the CPU
    other = model.view(interleave(8, 4).layer_map(8))
    file = tmp_path / "a.f32"
    first = compare(
        keep(log_probs(model, window[:-1], step=100), file),
        log_probs(other, window[:-1], 100),
        window,
    )
    again = compare(kept(file, model.config.vocab_size), log_probs(other, window[:-1]), window)
    assert file.stat().st_size == 4 * 299 * model.config.vocab_size
    assert again.a == pytest.approx(first.a, abs=0)  # what was written
    assert again.kl == pytest.approx(first.kl, abs=1e-5)


def test_logits_that_are_no_numbers_are_refused() -> None:
    chunk = mx.full((2, 4), math.nan)
    with pytest.raises(CerebrumError, match="finite"):
        compare([chunk], [chunk], [1, 2, 3])


@pytest.mark.parametrize("start", [[], [1]])
def test_sliding_scores_each_token_once(start: list[int]) -> None:
    text = list(range(100, 200))
    chosen = windows(start, text, 16, 7)
    half = (16 - len(start)) // 2
    assert len(chosen) == 7
    assert all(window[: len(start)] == start for window in chosen)
    assert {len(window) for window in chosen} == {len(start) + 2 * half}
    scored = [token for window in chosen for token in window[-half:]]
    assert scored == text[half : 8 * half]
    # At least half a window of the text before each.
    assert all(window.index(window[-half]) - len(start) >= half for window in chosen)
    # Every second window is a strided one: together they are the text, without a gap.
    strided = [token for window in chosen[::2] for token in window[len(start) :]]
    assert strided == text[: 8 * half]
    assert windows(start, text[:15], 17, 7) == []
    with pytest.raises(RequestError):
        windows(start, text, len(start) + 1, 1)


def test_a_window_changes_the_loss_beyond_it_only(model: Model, ids: list[int]) -> None:
    assert model.config.sliding_window == 12
    chosen = window_loss.text_window(model, [1], ids)
    assert len(chosen) == 48 - 1  # four windows, BOS included, in whole halves
    open_model = window_loss.with_window(model, None)
    assert open_model.model is model.model
    assert model.config.sliding_window == 12
    bound, unbound = losses(model, chosen), losses(open_model, chosen)
    assert bound[:12] == pytest.approx(unbound[:12], abs=1e-5)  # tokens 1 to 12
    assert abs(bound[12:] - unbound[12:]).max() > 1e-3

    said: list[str] = []
    found = window_loss.measure({"a": model, "b": model}, chosen, {"a": bound}, said.append)
    assert len(said) == 3  # what is at hand is not measured again
    assert found["own"]
    assert [one["from"] for one in found["a"]] == list(range(0, 48, 6))
    assert found["a"] == found["b"]
    mean = np.mean((bound - unbound)[17:23])  # tokens 18 to 23
    assert found["a"][3]["difference"]["value"] == pytest.approx(mean, rel=1e-3, abs=1e-4)
    assert found["beyond"]["loss_a"] == pytest.approx(bound[11:].mean())
    with pytest.raises(RequestError, match="too little"):
        window_loss.text_window(model, [1], ids[:10])


def test_a_model_without_a_window_gets_one(checkpoint: MakeCheckpoint, ids: list[int]) -> None:
    model, _ = load(checkpoint("open", **OPEN, max_position_embeddings=4096), dtype="float32")
    chosen = window_loss.text_window(model, [], ids * 2)
    found = window_loss.measure({"a": model, "b": model}, chosen, {}, lambda line: None)
    assert (found["window"], found["own"]) == (512, False)
    assert "beyond" not in found  # not how the model runs
    inside, outside = found["a"][1]["difference"], found["a"][-1]["difference"]
    assert inside["value"] == 0
    assert outside["value"] != 0


def pair_of(path: Path, q_bits: int | None = None) -> Pair:
    spec = ModelSpec(path, q_bits=q_bits)
    return Pair.of(open_checkpoint(path), spec, plan_b=interleave(8, 4))


def test_more_bits_are_nearer(checkpoint: MakeCheckpoint, ids: list[int], tmp_path: Path) -> None:
    pair = pair_of(checkpoint(head_dim=64, intermediate_size=192))
    window = ids[:100]
    files = quantized.files(tmp_path, 0)
    for model, file in zip(pair.models(), files, strict=True):
        for _ in keep(log_probs(model, window[:-1]), file):
            pass
    pair.release()
    settings = Effort(work=tmp_path, say=lambda line: None)
    found = quantized.measure(pair, [quantized.Reference(window, files)], settings)
    kl = {(one["side"], one["bits"]): one["kl"]["value"] for one in found["rows"]}
    for side in "ab":
        assert 0 < kl[side, 8] < kl[side, 4] / 10
    assert not files[0].exists()


def packed_checkpoint(path: Path, packing: Packing, target: Path) -> Path:
    """`path` in `packing`, as a directory of its own."""
    source = quantized.Repacked(open_checkpoint(path), packing)
    modules = {name.rpartition(".")[0] for name in source.shapes}
    arrays = {
        f"{module}.{part}": array
        for module in modules
        for part, array in source.read(module).items()
    }
    target.mkdir()
    mx.save_safetensors(str(target / "model.safetensors"), arrays)
    config = json.loads((path / "config.json").read_text())
    config["quantization"] = packing.as_config()
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_bits_the_source_has_already_are_not_measured(
    checkpoint: MakeCheckpoint, ids: list[int], tmp_path: Path
) -> None:
    path = checkpoint(hidden_size=128, head_dim=64, intermediate_size=256)
    settings = Effort(work=tmp_path, say=lambda line: None)
    dense = open_checkpoint(path)
    assert quantized.settled(dense, Packing(8, 64)) == ""

    four = pair_of(packed_checkpoint(path, Packing(4, 64), tmp_path / "four"))
    why = "the source is 4-bit already; give the dense model"
    assert quantized.quota(four, settings, 2, 512) == (0, why)
    found = quantized.measure(four, [], settings)
    assert found["rows"] == [{"bits": bits, "not_measured": why} for bits in (8, 4)]

    six = pair_of(packed_checkpoint(path, Packing(6, 64), tmp_path / "six"))
    assert quantized.quota(six, settings, 2, 512) == (1, "")
    window = ids[:40]
    files = quantized.files(tmp_path, 0)
    for model, file in zip(six.models(), files, strict=True):
        for _ in keep(log_probs(model, window[:-1]), file):
            pass
    six.release()
    eight, *fours = quantized.measure(six, [quantized.Reference(window, files)], settings)["rows"]
    assert eight["not_measured"] == "the source is 6-bit already; give the dense model"
    assert [(one["bits"], one["side"]) for one in fours] == [(4, "a"), (4, "b")]

    for stored, asked, same in (
        (Packing(4, 32), Packing(4, 64), False),  # smaller groups are finer
        (Packing(4, 32), Packing(8, 64), False),
        (Packing(8, 64), Packing(4, 64), False),
        (Packing(4, 128), Packing(4, 64), True),
        (Packing(8, 64), Packing(8, 64), True),
    ):
        source = quantized.Repacked(dense, stored)
        assert bool(quantized.settled(source, asked)) == same


def test_the_demo_is_packed_more_finely(demo: Path) -> None:
    """4 bits in groups of 32, its embedding in 8: both bits are still measured."""
    source = open_checkpoint(demo)
    assert {quantized.settled(source, Packing(bits, 64)) for bits in (8, 4)} == {""}


def test_rounding_alone_has_a_row(
    checkpoint: MakeCheckpoint, ids: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU there is none: its products give the same bits in chunks of any length."""
    path, window = checkpoint(), ids[:200]
    files = quantized.files(tmp_path, 0)
    settings = Effort(work=tmp_path, say=lambda line: None)
    reference = quantized.Reference(window, files)
    steps: list[int] = []
    call = Model.__call__

    def counted(self: Model, tokens: mx.array, cache: Any) -> mx.array:
        steps.append(tokens.shape[1])
        return call(self, tokens, cache)

    rows = {}
    for dtype, chunks in (("bfloat16", [*6 * [32], 7] * 2), ("float32", [])):
        a, _ = load(path, dtype=dtype)
        models = a, a.view(interleave(8, 4).layer_map(8))
        for file in files:  # A's on both sides, so that B's row has something to find
            for _ in keep(log_probs(a, window[:-1]), file):
                pass
        with monkeypatch.context() as patch:
            patch.setattr(Model, "__call__", counted)
            assert quantized.noise(models, [], settings) == []
            rows[dtype] = quantized.noise(models, [reference], settings)
        assert steps == chunks
        steps.clear()
    assert rows["float32"] == []  # not worth a pass
    one, other = rows["bfloat16"]
    assert (one["side"], other["side"]) == ("a", "b")
    assert one["tokens"] == 199
    assert 0 <= one["kl"]["value"] < 1e-3 < other["kl"]["value"]
    assert one["agreement"]["value"] > 0.95
    rest = {"group": 64, "tokens": 199, "rows": [{"bits": 8, "not_measured": "so"}]}
    page = "\n".join(_quantization(rest | {"noise": rows["bfloat16"]}, {"a": "7B", "b": "12B"}))
    assert "| A: 7B, as loaded, by 32 " in page
    assert "what rounding to 16 bits does alone" in page
    assert "16 bits" not in "\n".join(_quantization(rest, {"a": "7B", "b": "12B"}))


def test_packed_weights_are_the_packing_s_own(checkpoint: MakeCheckpoint) -> None:
    path = checkpoint()
    pair, packing = pair_of(path), Packing(4, 64)
    a, b = quantized.load(pair, packing)
    assert a.model is b.model
    assert (a.config.num_positions, b.config.num_positions) == (8, 12)
    tokens = mx.array([[5, 6, 7]])
    packed, _ = load(path, q_bits=4, dtype="float32")
    assert np.array(a(tokens)) == pytest.approx(np.array(packed(tokens)), abs=1e-4)
    # Of a source that is packed already, its values are packed anew.
    source = quantized.Repacked(open_checkpoint(path), Packing(8, 64))
    twice = quantized.Repacked(source, packing)
    assert twice.read("model.norm").keys() == {"weight"}
    module = "model.layers.0.self_attn.q_proj"
    own = Packing(8, 64).dequantize(source.read(module), mx.float32)
    for part, array in packing.quantize(own).items():
        assert mx.array_equal(array, twice.read(module)[part])


def test_quota_is_refused_where_it_can_t_be_kept(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint()
    pair = pair_of(path)
    settings = Effort(work=tmp_path, text_tokens=8192)
    assert quantized.quota(pair, settings, 2, 512) == (4, "")
    assert quantized.quota(pair_of(path, q_bits=4), settings, 2, 512)[0] == 0
    usage: Callable[[Path], Any] = lambda path: type("Usage", (), {"free": 5_000_000})  # noqa: E731
    monkeypatch.setattr("shutil.disk_usage", usage)
    count, why = quantized.quota(pair, settings, 2, 512)
    assert count == 0
    assert "8.5 MB" in why


def test_continuations_of_a_batch_are_those_of_each(model: Model, ids: list[int]) -> None:
    prompts = [ids[k : k + 10] for k in (0, 50, 100)]
    batch = repetition.continuations(model, prompts, 20, ())
    assert batch == [repetition.continuations(model, [p], 20, ())[0] for p in prompts]
    assert {len(ids) for ids in batch} == {20}
    end = batch[1][5]
    cut = repetition.continuations(model, prompts, 20, {end})
    for ended, whole in zip(cut, batch, strict=True):
        assert ended == whole[: whole.index(end)] if end in whole else whole


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


def row(kind: str, low: float, high: float, measure: str = "m", blocks: int = 20) -> verdict.Row:
    difference = {"value": (low + high) / 2, "low": low, "high": high}
    found = difference | {"blocks": blocks, "nonzero": blocks}
    return verdict.row(kind, measure, 1.0, 2.0, found)


def test_better_is_what_the_interval_says() -> None:
    assert row("perplexity", 0.1, 0.2)["better"] == "a"
    assert row("perplexity", -0.2, -0.1)["better"] == "b"
    assert row("accuracy", 0.1, 0.2)["better"] == "b"
    assert row("repetition", 0.1, 0.2)["better"] == "a"
    assert row("accuracy", -0.1, 0.2)["better"] == "none"
    assert row("accuracy", 0.1, 0.2, blocks=7)["better"] == "few"


def answers(only_a: int, only_b: int, questions: int = 60) -> dict[str, Any]:
    """A task's row of results; the rest of the questions are both's."""
    a = [1.0] * only_a + [0.0] * only_b + [1.0] * (questions - only_a - only_b)
    b = [0.0] * only_a + [1.0] * only_b + [1.0] * (questions - only_a - only_b)
    return quality._answers("sums", "acc", a, b)


def results_of(**parts: Any) -> dict[str, Any]:
    empty: dict[str, Any] = {"perplexity": [], "window": {}, "repetition": None, "accuracy": {}}
    return empty | parts


@pytest.mark.parametrize(
    ("few", "many", "shown"),
    [(1, 7, False), (2, 9, False), (3, 11, False), (0, 6, True), (3, 12, True)],
)
def test_a_sign_test_has_to_agree(few: int, many: int, shown: bool) -> None:
    for only, better in (((few, many), "b"), ((many, few), "a")):
        one = answers(*only)
        assert bootstrap.Interval.from_json(one["difference"]).sign != 0  # too narrow
        (found,) = verdict.rows(results_of(accuracy={"tasks": [one]}))
        assert found["better"] == (better if shown else "none")
        # The same items as loops, where fewer are better, and nobody counted them.
        loops = {"a": {"value": 0.5}, "b": {"value": 0.5}, "difference": one["difference"]}
        (found,) = verdict.rows(results_of(repetition={"loops": loops}))
        assert found["better"] == ({"a": "b", "b": "a"}[better] if shown else "none")
        # A share of 4-grams is no such outcome.
        (found,) = verdict.rows(results_of(repetition={"seq_rep_4": loops}))
        assert found["better"] == {"a": "b", "b": "a"}[better]


def test_one_perplexity_of_each_text_counts() -> None:
    worse = {"loss_a": 1.0, "loss_b": 2.0, "difference": paired_json(0.5)}
    both = {"strided": worse, "sliding": worse}
    contexts = (("x", 512), ("y", 512), ("x", 2048))
    perplexity = [{"text": text, "context": context} | both for text, context in contexts]
    window = {"text": "x", "beyond": worse}
    found = verdict.rows(results_of(perplexity=perplexity, window=window))
    assert [one["measure"] for one in found if one["counts"]] == [
        "perplexity, y, sliding 512",
        "perplexity, x, sliding 2048",
    ]
    page, said, trust = verdict.text(found, ("7B", "12B"), (32, 56))
    assert said.endswith(
        "perplexity (both rows). More layers (56 positions against 32) were"
        " better on 0 of 2 rows and worse on 2."
    )
    marked = [line.split("|")[-2].strip() for line in page.splitlines()[2:]]
    assert marked == ["(A)", "(A)", "(A)", "A", "(A)", "A", "(A)"]
    assert "in parentheses don't count" in trust
    assert "With 2 intervals of 95%" in trust
    assert "parentheses" not in verdict.text(found[3:4], ("7B", "12B"), (32, 56))[2]


def paired_json(value: float) -> dict[str, float]:
    return bootstrap.paired([0.0] * 20, [value] * 20).as_json()


def test_the_sentence_takes_no_side() -> None:
    names, more = ("7B", "12B"), (32, 56)
    worse = [row("perplexity", 0.1, 0.2, f"text {k}") for k in range(3)]
    better = [row("accuracy", 0.1, 0.2, "gsm8k")]
    none = [row("repetition", -0.1, 0.2, "loops")]
    few = [row("accuracy", 0.1, 0.2, "arc", blocks=2)]
    said = verdict.sentence([*worse, *better, *none, *few], names, more)
    assert said == (
        "On these texts and questions B (12B) is worse than A (7B) at perplexity (all 3 rows);"
        " better at gsm8k; no difference was shown for loops; there was too little to say anything"
        " of arc. More layers (56 positions against 32) were better on 1 of 6 rows and worse on 3."
    )
    assert verdict.sentence(better, names, more) == (
        "On these texts and questions B (12B) is better than A (7B) at gsm8k."
        " More layers (56 positions against 32) were better on 1 of 1 rows and worse on 0."
    )
    assert "A (7B) and B (12B) was shown for loops" in verdict.sentence(none, names, more)
    assert "no difference that" in verdict.sentence(none, names, more)
    # The same figures with the deeper model as A: the layers get the credit and the blame.
    swapped = verdict.sentence([*worse, *better], names, (56, 32))
    assert swapped.endswith("were better on 3 of 4 rows and worse on 1.")
    assert "More layers" not in verdict.sentence(worse, names, (32, 32))
    assert "Nothing was measured" in verdict.sentence([], names, more)


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
def test_the_suite(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "prose.txt").write_bytes(TEXT.read_bytes()[:700])
    (tmp_path / "short.txt").write_text("Too short.")
    texts = (tmp_path / "prose.txt", tmp_path / "short.txt")
    settings = Effort(tmp_path / "work", texts=texts, text_tokens=256, say=lambda line: None)
    pair = pair_of(checkpoint())
    a, b = pair.models()
    results = json.loads(json.dumps(quality.measure(pair, settings), allow_nan=False))
    assert pair._loaded is None
    assert list((tmp_path / "work").iterdir()) == []

    assert results["skipped"] == ["short at 64", "short at 128"]
    short, long = results["perplexity"]
    assert (short["windows"], long["windows"]) == (3, 1)
    # BOS, then 62 tokens of the text: 124 strided in two windows, 93 sliding in three.
    assert (short["strided"]["tokens"], short["sliding"]["tokens"]) == (124, 93)
    tokenizer = pair.tokenizer()
    assert tokenizer is not None
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

    kinds = [one["kind"] for one in results["verdict"]]
    assert kinds == 5 * ["perplexity"] + 2 * ["repetition"] + ["accuracy"]
    page = "\n".join(quality.text(escaped(results)))
    # A file written by an older rule follows this one.
    older = [{**one, "better": "b"} for one in results["verdict"]]
    assert quality.text(escaped(results | {"verdict": older})) == quality.text(escaped(results))
    assert results["quantization"]["noise"] == []
    assert "| perplexity, prose, sliding 64" in page
    assert "More layers (12 positions against 8)" in page
    assert "short at 64" in page
    pictures = quality.plots(results, {})
    assert list(pictures) == ["quality-perplexity", "quality-answers", "quality-window"]
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
    tokenizer = pair.tokenizer()
    assert tokenizer is not None
    settings = Effort(tmp_path, say=lambda line: None)

    def accuracy(*tasks: str) -> dict[str, Any]:
        return quality._accuracy(pair, tokenizer, replace(settings, tasks=tasks))

    found = accuracy("bad", "good", "late", "good", "fine")
    assert [one["task"] for one in found["tasks"]] == ["good", "fine"]
    assert [(one["task"], one["not_measured"]) for one in found["missing"]] == [
        ("bad", "no task 'bad'"),
        ("late", "no task 'late'"),
    ]
    assert asked == [(t,) for t in ("bad", "good", "good", "late", "late", "fine", "fine")]
    page = "\n".join(_accuracy(found, {"a": "7B", "b": "12B"}))
    assert "| good, acc" in page
    assert "bad: not measured. no task 'bad'" in page
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
    assert "leave out --q-bits" in page
    assert "Beyond the sliding window: not measured." in page
    assert "Repetition: not measured" in page
    assert list(quality.plots(results, {})) == ["quality-perplexity"]
    with pytest.raises(RequestError, match="at least 64 tokens"):
        quality.measure(pair, replace(settings, text_tokens=63))


def test_random_weights_are_refused(tmp_path: Path) -> None:
    pair = Pair.of(RandomCheckpoint(Path("random")), ModelSpec("random"))
    with pytest.raises(RequestError, match="trained model"):
        quality.measure(pair, Effort(tmp_path))


def test_the_demo_s_two_sides(demo: Path, ids: list[int]) -> None:
    """On a trained model the direction is known: the interleave predicts worse."""
    pair = open_pair(str(demo))
    tokenizer = pair.tokenizer()
    assert tokenizer is not None
    window = tokenizer.encode(TEXT.read_text())[:65]
    a, b = (log_probs(model, window[:-1]) for model in pair.models())
    found = compare(a, b, window)
    assert isinstance(found, Comparison)
    assert found.b.mean() > found.a.mean() + 0.3
    assert found.a.mean() < 5.5
