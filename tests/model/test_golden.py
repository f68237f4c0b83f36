"""The engine against Hugging Face transformers (float32, eager): `golden/README.md`.

And against itself with a fault put in: each must move some logit far past the tolerance, or
the comparison proves nothing.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from conftest import slow
from safetensors.numpy import load_file
from tiny import tiny_weights, weights_sha256

from mlx_cerebrum import LayerPlan, device, load, stream_generate
from mlx_cerebrum.decoding.decoder import generate_step
from mlx_cerebrum.model.cache import WindowedKVCache
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights.loading import fuse_projections

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 1e-4  # absolute, on every logit
TINY = json.loads((GOLDEN / "tiny.json").read_text())
DEMO = json.loads((GOLDEN / "demo.json").read_text())
CASES = [(f"{c['model']} positions, prompt of {len(c['prompt'])}", c) for c in TINY["cases"]]
LONGEST = TINY["cases"][-1]  # 56 positions, six windows, then 64 greedy tokens

Logits = npt.NDArray[np.float32]


@cache
def arrays(name: str) -> dict[str, Logits]:
    return dict(load_file(GOLDEN / f"tiny_{name}.safetensors"))


def golden_logits(case: dict[str, Any]) -> Logits:
    return arrays(case["model"])[case["logits"]]


def build(
    raw: dict[str, Any], layer_map: list[int], scales: Any = None, fused: bool = True
) -> Model:
    pairs = None if scales is None else tuple((a, m) for a, m in scales)
    model = Model(ModelConfig.from_dict(raw).with_map(tuple(layer_map), pairs))
    weights = tiny_weights(raw, TINY["seed"])
    model.load_weights([(name, mx.array(value)) for name, value in weights.items()])
    for block in model.model.layers if fused else []:
        fuse_projections(block)
    return model


def tiny(case: dict[str, Any], fused: bool = True) -> Model:
    return build(TINY["config"], TINY["layer_maps"][case["model"]], fused=fused)


def run(model: Model, ids: list[int], chunk: int = 10**6, caches: Any = None) -> Logits:
    """Logits `[L, V]` of `ids` fed in chunks."""
    caches = model.make_cache() if caches is None else caches
    tokens = mx.array([ids])
    parts = [model(tokens[:, i : i + chunk], caches) for i in range(0, len(ids), chunk)]
    return np.array(mx.concatenate(parts, axis=1)[0])


def off(ours: Logits, theirs: Logits) -> float:
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max())


def test_weights_are_the_ones_the_values_were_made_with() -> None:
    assert weights_sha256(tiny_weights(TINY["config"], TINY["seed"])) == TINY["weights_sha256"]


@pytest.mark.parametrize("chunk", [10**6, 7])
@pytest.mark.parametrize("case", [c for _, c in CASES], ids=[name for name, _ in CASES])
@pytest.mark.one_in(8)
def test_logits_at_every_position(case: dict[str, Any], chunk: int) -> None:
    sequence = case["prompt"] + case["tokens"]
    theirs = golden_logits(case)
    ours = run(tiny(case), sequence[: len(theirs)], chunk)
    assert off(ours, theirs) < TOLERANCE


@pytest.mark.parametrize("case", [c for _, c in CASES], ids=[name for name, _ in CASES])
@pytest.mark.one_in(12)
def test_greedy_tokens(case: dict[str, Any]) -> None:
    assert len(set(case["tokens"])) >= 32
    assert min(case["margins"]) > 10 * TOLERANCE
    ours = list(generate_step(case["prompt"], tiny(case), max_tokens=len(case["tokens"])))
    assert ours == case["tokens"]


@pytest.mark.parametrize("variant", TINY["variants"], ids=lambda v: v["name"])
def test_variants(variant: dict[str, Any]) -> None:
    """No window, tied head, llama, wide heads, residual scales."""
    raw = variant["config"]
    assert weights_sha256(tiny_weights(raw, TINY["seed"])) == variant["weights_sha256"]
    model = build(raw, variant["layer_map"], variant["residual_scales"])
    theirs = arrays("variants")[variant["name"]]
    assert off(run(model, variant["prompt"]), theirs) < TOLERANCE
    assert off(run(model, variant["prompt"], chunk=5), theirs) < TOLERANCE


# Faults. Each is put into the engine, and the longest case run on it.


def windowed(change: int) -> Callable[[Model], Any]:
    def fault(model: Model) -> None:
        window = model.config.sliding_window
        assert window is not None
        model.config = replace(model.config, sliding_window=window + change)

    return fault


def swapped(model: Model) -> None:
    order = list(model.config.layer_map)
    order[20], order[21] = order[21], order[20]
    model.config = model.config.with_map(tuple(order))


def rope_fault(shift: Callable[[Model, mx.array, int], int]) -> Callable[[Model], Any]:
    def fault(model: Model) -> None:
        for block in model.model.layers:
            right = block.self_attn.rope

            def wrong(x: mx.array, offset: int, right: Any = right) -> mx.array:
                turned: mx.array = right(x, offset=offset + shift(model, x, offset))
                return turned

            setattr(block.self_attn, "rope", wrong)  # noqa: B010  # typed as an nn.RoPE

    return fault


def shared_cache(model: Model) -> list[WindowedKVCache]:
    """Positions 8 and 4 of the 12.25B both run block 4."""
    caches = model.make_cache()
    assert model.config.layer_map[4] == model.config.layer_map[8] == 4
    caches[8] = caches[4]
    return caches


SOON = 8  # greedy tokens after which every fault below shows
FAULTS: dict[str, Callable[[Model], Any]] = {
    "window one short": windowed(-1),
    "window one long": windowed(+1),
    "two map entries swapped": swapped,
    "queries one RoPE position late": rope_fault(
        lambda model, x, _: x.shape[1] == model.config.num_attention_heads
    ),
    "decoded tokens one RoPE position late": rope_fault(lambda _, __, offset: int(offset > 0)),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
@slow
def test_faults_are_seen(fault: Callable[[Model], Any]) -> None:
    model = tiny(LONGEST, fused=False)  # so that queries can be turned without their keys
    fault(model)
    prompt = len(LONGEST["prompt"])
    sequence = (LONGEST["prompt"] + LONGEST["tokens"])[: prompt + SOON]
    caches = model.make_cache()
    ours = [run(model, sequence[:prompt], caches=caches), run(model, sequence[prompt:], 1, caches)]
    assert off(np.concatenate(ours), golden_logits(LONGEST)[: len(sequence)]) > 100 * TOLERANCE


def test_a_cache_shared_by_two_positions_is_seen() -> None:
    model = tiny(LONGEST)
    ids = LONGEST["prompt"][:8]  # within the window: the mask still fits
    caches = shared_cache(model)
    rows = []
    for token in ids:
        rows.append(np.array(model(mx.array([[token]]), caches)[0]))
    assert off(np.concatenate(rows), golden_logits(LONGEST)[:8]) > 100 * TOLERANCE


# The trained demo model: its file's weights in float32, and real text.


@pytest.fixture(scope="module")
def trained(demo: Path) -> dict[str, tuple[Model, Tokenizer]]:
    # On the CPU `auto` is dense float32; a GPU multiplies the packed integers, in float32 here.
    model, tokenizer = load(demo, dtype="float32" if device.on_gpu() else "auto")
    plan = LayerPlan.named("demo-interleaved")
    merged = model.view(plan.layer_map(model.config.num_hidden_layers))
    return {"base": (model, tokenizer), "demo-interleaved": (merged, tokenizer)}


# Of each plan and kind of prompt the first; the others take minutes.
SEEN: Counter[tuple[str, str]] = Counter()
DEMO_CASES = []
for _case in DEMO["cases"]:
    SEEN[_case["plan"], _case["mode"]] += 1
    _more = SEEN[_case["plan"], _case["mode"]] > 1
    _id = f"{_case['plan']}: {_case['prompt'][:24]!r}"
    DEMO_CASES.append(pytest.param(_case, id=_id, marks=[pytest.mark.long] if _more else []))


@pytest.mark.parametrize("case", DEMO_CASES)
@pytest.mark.one_in(8)
def test_demo_model_says_what_transformers_says(
    trained: dict[str, tuple[Model, Tokenizer]], case: dict[str, Any]
) -> None:
    model, tokenizer = trained[case["plan"]]
    if case["mode"] == "raw":
        ids = tokenizer.encode(case["prompt"])
    else:
        ids = tokenizer.apply_chat_template(case["messages"])
    assert ids == case["prompt_ids"]
    responses = list(stream_generate(model, tokenizer, ids, max_tokens=DEMO["max_tokens"]))
    assert [r.token for r in responses] == case["output_ids"]
    assert "".join(r.text for r in responses) == case["text"]
    assert responses[-1].finish_reason == case["finish_reason"]


def test_demo_logits(trained: dict[str, tuple[Model, Tokenizer]]) -> None:
    case = DEMO["cases"][0]
    model, _ = trained["base"]
    ours = run(model, case["prompt_ids"] + case["output_ids"]).astype(np.float64)
    for row in case["logits"]:
        mine = ours[row["position"]]
        assert np.abs(mine[:32] - row["first32"]).max() < 1e-3
        assert int(mine.argmax()) == row["argmax"]
        assert abs(mine.max() - row["max"]) < 1e-3
        assert abs(np.logaddexp.reduce(mine) - row["logsumexp"]) < 1e-3


@slow
def test_paris(trained: dict[str, tuple[Model, Tokenizer]]) -> None:
    assert DEMO["cases"][0]["text"].startswith(" Paris")
    assert len([c for c in DEMO["cases"] if c["plan"] == "base"]) == 20
