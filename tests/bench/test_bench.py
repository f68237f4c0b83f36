"""python -m bench: its pair of models, the roofline's arithmetic, rounds, and the runner."""

import json
import re
from collections import Counter
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import MakeCheckpoint, parameters, resting, slow
from tiny import tiny_config

from bench import bandwidth, full_size, pair, process, report, speculation, speed, suite
from bench.__main__ import main
from bench.random_model import RandomCheckpoint, write_random
from mlx_cerebrum.errors import PlanError, RequestError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.memory import Workload
from mlx_cerebrum.plan.layer_plan import LayerPlan
from mlx_cerebrum.weights.opening import ModelSpec, open_checkpoint


def quick(work: Path) -> suite.Effort:
    return suite.Effort(work, rounds=2, tokens=3, seconds=0.1, say=lambda line: None)


def random_tiny() -> pair.Pair:
    checkpoint = RandomCheckpoint(Path("tiny"), tiny_config(torch_dtype="bfloat16"))
    return pair.Pair.of(checkpoint, ModelSpec("tiny"))


@pytest.mark.parametrize(
    ("blocks", "name", "positions"),
    [(32, "interleave-32-8", 56), (30, "interleave-30-10", 50), (8, "interleave-8-2", 14)],
)
def test_the_formula_is_the_cards(blocks: int, name: str, positions: int) -> None:
    plan = pair.formula(blocks)
    assert (plan.name, len(plan.layer_map(blocks))) == (name, positions)
    if blocks == 32:
        assert plan.layer_map(32) == LayerPlan.named("cerebrum-12.25b").layer_map(32)


def test_any_number_of_blocks_has_a_formula() -> None:
    for blocks in range(3, 70):
        layers = pair.formula(blocks).layer_map(blocks)
        assert set(layers) == set(range(blocks))
        assert len(layers) > blocks


def test_defaults_follow_the_number_of_blocks(checkpoint: MakeCheckpoint) -> None:
    eight = pair.open_pair(str(checkpoint("eight")))
    assert eight.names == ("as it is", "interleave-8-2")
    both = pair.open_pair(str(checkpoint("both", num_hidden_layers=32)))
    assert both.names == ("cerebrum-7b", "cerebrum-12.25b")
    a, b = both.models()
    assert (a.config.num_positions, b.config.num_positions) == (32, 56)
    assert b.model is a.model  # one set of weights
    assert both.models()[0] is a
    both.release()
    assert both.models()[0] is not a


def test_plans_that_can_not_be_compared_are_refused(checkpoint: MakeCheckpoint) -> None:
    with pytest.raises(PlanError):
        pair.open_pair(str(checkpoint()), "cerebrum-7b")
    path = str(checkpoint("other", num_hidden_layers=32))
    with pytest.raises(RequestError, match="two different plans"):
        pair.open_pair(path, "cerebrum-12.25b", "cerebrum-12.25b")


def test_a_card_names_no_path(checkpoint: MakeCheckpoint) -> None:
    path = checkpoint("my-model")
    card = pair.open_pair(str(path)).card()
    assert card["model"] == "my-model"
    assert str(path.parent) not in json.dumps(card)
    assert card["b"]["executed_parameters"] > card["parameters"] == card["a"]["executed_parameters"]


def test_bytes_a_token_are_the_unrolled_models(checkpoint: MakeCheckpoint) -> None:
    """A block that runs twice is read twice; the embedding is a row, so it is left out."""
    a, b = pair.open_pair(str(checkpoint("m", sliding_window=12))).models()
    held = parameters(a)
    embedding = held["model.embed_tokens.weight"].nbytes
    assert bandwidth.token_bytes(a) == sum(w.nbytes for w in held.values()) - embedding
    assert bandwidth.token_bytes(b) == 4 * b.config.executed_parameters - embedding
    one = 4 * b.config.kv_values_per_token()
    assert bandwidth.token_bytes(b, 5) - bandwidth.token_bytes(b) == 5 * one
    assert bandwidth.token_bytes(b, 500) - bandwidth.token_bytes(b) == 12 * one  # the window


def test_chips_are_known_by_their_own_names() -> None:
    assert bandwidth.published("Apple M2 Max") == (400,)
    assert bandwidth.published("Apple M2") == (100,)
    assert bandwidth.published("Apple M4 Max") == (410, 546)
    assert bandwidth.published("NVIDIA H100 80GB HBM3") == (2039, 3352)
    assert bandwidth.published("AMD EPYC") is None
    assert bandwidth.published("Apple M99") is None


@pytest.mark.long
def test_bandwidth_is_measured() -> None:
    found = bandwidth.measured(mx.float32)
    assert set(found) == {"copy", "matvec"}
    assert all(0.01 < value < 10_000 for value in found.values())


def test_bandwidth_counts_every_byte_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel takes a second here: what is left is the bytes."""
    monkeypatch.setattr(bandwidth, "times_of", lambda make: [1.0])
    monkeypatch.setattr(bandwidth, "_COPY_BYTES", 8192 * 4 * 100)
    found = bandwidth.measured(mx.float32)
    assert found == {"copy": 2 * 8192 * 400 / 1e9, "matvec": 8192 * 400 / 1e9}


def test_rounds_take_turns_and_end_in_time() -> None:
    order: list[str] = []
    sides = {name: partial(order.append, name) for name in "ab"}
    report.rounds(sides, 2)
    assert "".join(order) == "ab" + "ab" + "ba"
    order.clear()
    found = report.rounds(sides, 5, seconds=-1, warm=False)
    assert order == ["a", "b"]  # one round is always run
    assert {name: len(values) for name, values in found.items()} == {"a": 1, "b": 1}


def test_ratios_are_b_over_a(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B takes twice A's time everywhere, so it has half its pace.

    Four times the length takes up to 16 times as long: 1.5 s, then 24 s, and so 384 s.
    """
    pairs = pair.open_pair(str(checkpoint()))

    def twice(model: Model, *_: object) -> float:
        return 2.0 if model is pairs.models()[1] else 1.0

    def first(model: Model, prompt: list[int]) -> float:
        return twice(model) * 0.5 * (len(prompt) / 8) ** 2

    ceiling = {"chip": "x", "published": None, "measured": {"copy": 1.0, "matvec": 2.0}}
    monkeypatch.setattr(bandwidth, "card", lambda dtype: ceiling)
    monkeypatch.setattr(speed, "_first", first)
    monkeypatch.setattr(speed, "_decode", lambda *call: 1 / twice(*call))
    monkeypatch.setattr(process, "seconds", lambda words: 2.0 if "--plan" in words else 1.0)
    effort = suite.Effort(tmp_path, tokens=3, seconds=5.0, say=lambda line: None)
    found = speed.measure(pairs, effort, (8, 32, 128))
    assert (found["lengths"], found["left_out"]) == ([8, 32], {"128": 384.0})
    assert found["ratios"]["prefill"]["32"]["median"] == 0.5
    assert found["ratios"]["decode"]["median"] == 0.5
    assert found["ratios"]["start"]["median"] == 2.0


@slow
def test_speed_of_two_sides(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.bandwidth._COPY_BYTES", 16_000_000)
    pairs = pair.open_pair(str(checkpoint()))
    found = speed.measure(pairs, quick(tmp_path), (8, 16, 100_000))
    assert found == json.loads(json.dumps(found))
    # The model has 512 positions; where that takes long it is left out, and said so.
    assert sorted([*found["lengths"], *map(int, found["left_out"])]) == [8, 16, 511]
    side = found["sides"]["interleave-8-2"]
    assert side["prefill"]["8"]["median"] == pytest.approx(8 / side["ttft"]["8"]["median"], 0.6)
    best = max(found["bandwidth"]["measured"].values())
    assert side["share"] == {"measured": pytest.approx(side["reached"] / best), "published": None}
    assert side["start"]["median"] > 0.1
    assert set(speed.plots(found, {})) == {"speed-prefill", "speed-roofline"}
    text = "\n".join(speed.text(found))
    assert "| interleave-8-2 / as it is |" in text
    assert "| prefill of 8, tokens/s " in text
    assert "share of the published" not in text
    # On a chip whose bandwidth is published, of a model without text.
    found["bandwidth"]["published"], found["left_out"] = [100], {"8192": 600.0}
    for each in found["sides"].values():
        each["share"]["published"], each["start"] = 0.4, None
    found["ratios"]["start"] = None
    text = "\n".join(speed.text(found))
    assert re.search(r"share of the published 100 GB/s \|\s+40% \|", text)
    assert "process start" not in text
    assert "8192 tokens, by estimate 600 s" in text


@slow
def test_full_size_counts_bytes(tmp_path: Path) -> None:
    tiny = random_tiny()
    resting()
    found = full_size.measure(tiny, quick(tmp_path))
    assert found == json.loads(json.dumps(found))
    big, small = found["sides"]["cerebrum-12.25b"], found["sides"]["cerebrum-7b"]
    assert big["kv"] / small["kv"] == 56 / 32
    config = tiny.b.config
    assert (
        big["kv_predicted"] == Workload(config, tiny.storage().dtype.size, 32, 4, 256).cache_bytes
    )
    norms = 4 * (2 * 32 + 1) * 64
    assert found["weights"]["loaded"] == pytest.approx(found["weights"]["predicted"] + norms, 0.02)
    assert "A projection, not a measurement" in "\n".join(full_size.text(found))


def test_random_weights_are_the_same_twice_and_all_different(tmp_path: Path) -> None:
    checkpoint = RandomCheckpoint(Path("x"), tiny_config())
    checkpoint.check()
    first, other = (f"model.layers.0.self_attn.{kind}_proj" for kind in "qo")
    a, b = checkpoint.read(first)["weight"], checkpoint.read(other)["weight"]
    assert mx.array_equal(a, checkpoint.read(first)["weight"])
    assert not mx.array_equal(a, b)
    assert a.dtype == mx.bfloat16
    assert float(mx.std(a.astype(mx.float32))) == pytest.approx(64**-0.5, rel=0.05)
    # Written: a merge's layers of one block are alike.
    nbytes = write_random(tmp_path / "merge", tiny_config(), layers=(0, 1, 0))
    merge = open_checkpoint(tmp_path / "merge")
    assert nbytes == 2 * merge.config.stored_parameters
    assert mx.array_equal(merge.read(first.replace(".0.", ".2."))["weight"], a)
    assert not mx.array_equal(merge.read(first.replace(".0.", ".1."))["weight"], a)


def test_guesses_are_counted_to_their_first_miss() -> None:
    passes = Counter({("4-bit", 2, 2): 3, ("4-bit", 2, 0): 1, ("plain", 0, 0): 4})
    assert speculation._guesses(passes) == {
        "tokens_per_pass": 14 / 8,
        "share_of_passes_that_guess": 0.5,
        "agreement": 6 / 7,
        "mean_drafts": 2,
    }


def test_projections_follow_from_bytes() -> None:
    raw = tiny_config(
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=32000,
    )
    config = ModelConfig.from_dict(raw)
    plan = LayerPlan.named("cerebrum-12.25b").layer_map(32)
    found = bandwidth.projected({"7B": config, "12.25B": config.with_map(plan)})
    models = found["models"]
    assert models["7B, bf16"]["bytes_per_token"] == pytest.approx(14.22e9, rel=1e-3)
    assert models["12.25B, bf16"]["bytes_per_token"] == pytest.approx(24.69e9, rel=1e-3)
    assert models["12.25B, 4-bit"]["bytes_per_token"] == pytest.approx(6.94e9, rel=1e-3)
    assert models["7B, bf16"]["roof"]["Apple M2 Ultra"][0] == pytest.approx(56, rel=0.01)
    # mlx-lm's own figure lies between those of llama.cpp: 120.5 tokens/s on an M2 Ultra.
    roof = models["7B, 4-bit"]["roof"]["Apple M2 Ultra"][0]
    assert bandwidth.KNOWN[0] < 120.5 / roof < bandwidth.KNOWN[1]


def test_results_of_two_machines_do_not_mix(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Of one they do, whatever else it runs."""
    this, out = pair.open_pair(str(checkpoint())), tmp_path / "out"
    document = suite.begun(["bench"], this, out)
    suite.record(document, "speed", {"x": 1}, 0.5)
    document["machine"]["load_average"] = 9.0
    suite.write(out, document)
    assert suite.begun(["bench"], this, out)["suites"] == {"speed": {"x": 1}}
    for key in ("machine", "model"):
        suite.write(out, document | {key: document[key] | {"new": 1}})
        with pytest.raises(RequestError, match=f"another {key}"):
            suite.begun(["bench"], this, out)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").touch()
    with pytest.raises(RequestError, match="in use"):
        suite.begun(["bench"], this, tmp_path / "used")


@pytest.mark.parametrize(
    "flags",
    [
        ["--suite", "speeed"],
        ["--rounds", "0"],
        ["--seconds=0"],
        ["--suite=quality", "--limit=0"],
        ["--tokens", "1"],
        ["--random-7b", "--suite", "quality"],
        ["--random-7b", "--model", "other"],
        ["--model", "no-such-directory"],
        ["--plan-b", "no-such-plan"],
    ],
)
def test_bad_flags_end_in_one_line(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*flags, "--no-openblas"]) == 2
    found = capsys.readouterr()
    assert found.err.startswith("error: ")
    assert found.err.count("\n") == 1
    assert found.out == ""


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("/Users/ada/models/cerebrum", "cerebrum"),
        ("--model=/Users/ada/models/cerebrum", "--model=cerebrum"),
        ("~/models/x", "x"),
        ("../../secret/x", "x"),
        ("speed,memory", "speed,memory"),
        ("bench/results/mine", "bench/results/mine"),
        ("AetherResearch/Cerebrum-1.0-7b", "AetherResearch/Cerebrum-1.0-7b"),
    ],
)
def test_results_hold_no_folder_of_the_machine(word: str, shown: str) -> None:
    assert report.public(word) == shown


def test_a_tables_rule_is_markdown() -> None:
    assert report.table(["", "x"], [["a", "1"]]).splitlines()[1] == "| -- | -: |"
