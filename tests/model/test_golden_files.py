"""The golden files themselves: they belong to these weights, and they can tell right from wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import tiny_config, tiny_prompt, tiny_weights, weights_sha256

GOLDEN = Path(__file__).parents[1] / "golden"
TINY: dict[str, Any] = json.loads((GOLDEN / "tiny.json").read_text(encoding="utf-8"))
DEMO: dict[str, Any] = json.loads((GOLDEN / "demo.json").read_text(encoding="utf-8"))
TOLERANCE = 1e-4
MUTANTS_FROM = "window - 1"


def test_the_weights_are_the_ones_the_oracle_saw() -> None:
    assert TINY["config"] == tiny_config()
    weights = tiny_weights(TINY["config"], TINY["seed"])
    assert weights_sha256(weights) == TINY["weights_sha256"]
    weights["model.norm.weight"][0] = np.nextafter(weights["model.norm.weight"][0], np.float32(9))
    assert weights_sha256(weights) != TINY["weights_sha256"]


@pytest.mark.parametrize("variant", TINY["variants"], ids=lambda v: v["name"])
def test_the_variants_weights_too(variant: dict[str, Any]) -> None:
    assert (
        weights_sha256(tiny_weights(variant["config"], TINY["seed"])) == (variant["weights_sha256"])
    )
    logits = load_file(GOLDEN / "tiny_variants.safetensors")[variant["name"]]
    assert logits.shape == (len(variant["prompt"]), variant["config"]["vocab_size"])
    assert np.isfinite(logits).all()


def test_prompts_avoid_control_tokens() -> None:
    assert min(tiny_prompt(tiny_config(), 5000, seed=1)) == 3
    assert max(tiny_prompt(tiny_config(), 5000, seed=1)) == 255


@pytest.mark.parametrize("model", ["32", "56"])
def test_greedy_output_is_varied_and_never_near_a_tie(model: str) -> None:
    arrays = load_file(GOLDEN / f"tiny_{model}.safetensors")
    cases = [case for case in TINY["cases"] if case["model"] == model]
    window = TINY["config"]["sliding_window"]
    lengths = [len(case["prompt"]) for case in cases]
    assert lengths == [1, window - 1, window, window + 1, 6 * window]
    for case in cases:
        tokens, logits = case["tokens"], arrays[case["logits"]]
        start = len(case["prompt"]) - 1
        assert len(tokens) == 64
        assert len(set(tokens)) >= 32
        assert not {0, 1, 2} & set(tokens)
        assert logits.dtype == np.float32
        assert logits.shape == (len(case["prompt"]) + 64, TINY["config"]["vocab_size"])
        assert logits[start:-1].argmax(-1).tolist() == tokens
        best = np.sort(logits[start:-1].astype(np.float64), axis=-1)
        np.testing.assert_allclose(best[:, -1] - best[:, -2], case["margins"], atol=1e-6)
        assert min(case["margins"]) > 10 * TOLERANCE


@pytest.mark.parametrize("model", ["32", "56"])
def test_mistakes_lie_far_above_the_tolerance_and_rounding_far_below(model: str) -> None:
    figures = TINY["figures"][model]
    assert figures["mean largest attention probability"] > 0.5
    assert figures["float32 against float64"] < TOLERANCE / 5
    names = list(figures)
    mutants = names[names.index(MUTANTS_FROM) :]
    assert len(mutants) == {"32": 8, "56": 10}[model]
    for name in mutants:
        assert figures[name] > 100 * TOLERANCE, name


def test_the_merge_runs_seven_overlapping_slices() -> None:
    slices = [range(first, first + 8) for first in (0, 4, 8, 12, 16, 20, 24)]
    assert TINY["layer_maps"]["56"] == [block for part in slices for block in part]
    assert TINY["layer_maps"]["32"] == list(range(32))


def test_demo_cases_are_complete() -> None:
    plans = [case["plan"] for case in DEMO["cases"]]
    assert plans.count("base") == 20
    assert plans.count("demo-interleaved") >= 4
    assert len(DEMO["plans"]["demo-interleaved"]) == 34
    assert {case["mode"] for case in DEMO["cases"]} == {"raw", "chat"}
    assert max(len(case["prompt_ids"]) for case in DEMO["cases"]) > 100
    for case in DEMO["cases"]:
        output, eos = case["output_ids"], DEMO["eos_token_id"]
        stopped = case["finish_reason"] == "stop"
        assert stopped == (output[-1] == eos)
        assert eos not in output[:-1]
        assert stopped or len(output) == DEMO["max_tokens"]
        assert len(case["margins"]) == len(output)
        assert min(case["margins"]) == case["min_margin"] > 1e-3


def test_demo_knows_the_capital_of_france() -> None:
    case = DEMO["cases"][0]
    assert case["prompt"] == "The capital of France is"
    assert case["text"].startswith(" Paris")


@pytest.mark.parametrize("document", [TINY, DEMO], ids=["tiny", "demo"])
def test_versions_are_recorded(document: dict[str, Any]) -> None:
    assert {"python", "numpy", "torch", "transformers"} <= set(document["versions"])


def test_the_files_stay_small() -> None:
    sizes = {p.name: p.stat().st_size for p in GOLDEN.iterdir() if p.is_file()}
    assert max(sizes.values()) < 1_000_000, sizes
    assert sum(sizes.values()) < 2_000_000, sizes
