"""Golden values of tiny random models: `tiny.json` and three safetensors files."""

from pathlib import Path
from typing import Any

import mutants
import numpy as np
import oracle
from mutants import Fault
from safetensors.numpy import save_file
from tiny import Weights, tiny_config, tiny_prompt, tiny_weights, weights_sha256

SEED = 27
MAX_TOKENS = 64
WINDOW = 12
# Prompt length -> seed: the first tried with which no greedy step is close to a tie.
PROMPT_SEEDS = {1: 1, WINDOW - 1: 13, WINDOW: 0, WINDOW + 1: 14, 6 * WINDOW: 73}
VARIANT_LENGTH = 2 * WINDOW  # long enough to tell a window from none

IDENTITY = list(range(32))
MERGE = [block for first in range(0, 25, 4) for block in range(first, first + 8)]
MAPS = {"32": IDENTITY, "56": MERGE}


def _variants() -> dict[str, dict[str, Any]]:
    """Name -> config, layer map and residual scales of each one-prompt model."""
    half = 0.5**0.5
    twice = {block for block in MERGE if MERGE.count(block) > 1}
    both = [(half, half) if block in twice else (1.0, 1.0) for block in MERGE]
    second = [(half, 0.5) if block in MERGE[:i] else (1.0, 1.0) for i, block in enumerate(MERGE)]
    llama = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_key_value_heads": 4,
        "rope_theta": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "sliding_window": None,
    }
    changes: dict[str, dict[str, Any]] = {
        "no_window": {"sliding_window": None},
        "tied": {"tie_word_embeddings": True},
        "wide_heads": {"head_dim": 32},
        "llama": llama,
        "llama_tied": llama | {"tie_word_embeddings": True},
    }
    plain: dict[str, dict[str, Any]] = {}
    for name, change in changes.items():
        config = {k: v for k, v in tiny_config(**change).items() if (k, v) != ("rope_theta", None)}
        plain[name] = {"config": config, "layer_map": IDENTITY, "residual_scales": None}
    scaled = {
        name: {"config": tiny_config(), "layer_map": MERGE, "residual_scales": scales}
        for name, scales in (("scaled", both), ("scaled_uneven", second))
    }
    return plain | scaled


def make(folder: Path) -> dict[str, dict[str, float]]:
    """Write the files; return the measured figures by model."""
    config = tiny_config(sliding_window=WINDOW)
    weights = tiny_weights(config, SEED)
    cases: list[dict[str, Any]] = []
    figures: dict[str, dict[str, float]] = {}
    for name, layer_map in MAPS.items():
        model = oracle.build(config, weights, layer_map)
        arrays: dict[str, oracle.Floats] = {}
        cached, sequences = [], []
        for length, seed in PROMPT_SEEDS.items():
            prompt = tiny_prompt(config, length, seed)
            tokens, logits, gap = oracle.checked_greedy(model, prompt, MAX_TOKENS)
            arrays[f"prompt_{length}"] = logits
            cached.append(gap)
            sequences.append(prompt + tokens)
            cases.append(
                {
                    "model": name,
                    "logits": f"prompt_{length}",
                    "prompt": prompt,
                    "tokens": tokens,
                    "margins": oracle.margins(logits, length),
                }
            )
        save_file(arrays, folder / f"tiny_{name}.safetensors")
        mine = cases[-len(PROMPT_SEEDS) :]
        peaks = oracle.peakedness(model, sequences[-1], WINDOW)
        exact = [mutants.logits(config, weights, layer_map, [ids]) for ids in sequences]
        figures[name] = {
            "mean largest attention probability": float(np.mean(peaks)),
            "the same, least peaked position": min(peaks),
            "distinct tokens of 64, fewest": min(len(set(c["tokens"])) for c in mine),
            "smallest greedy margin": min(min(c["margins"]) for c in mine),
            "float32 against float64": max(
                float(np.abs(a - e).max()) for a, e in zip(arrays.values(), exact, strict=True)
            ),
            "cached against uncached": max(cached),
        } | _mutants(config, weights, layer_map, mine[-1], exact[-1])

    arrays, variants = {}, []
    for name, variant in _variants().items():
        config, scales = variant["config"], variant["residual_scales"]
        weights = tiny_weights(config, SEED)
        model = oracle.build(config, weights, variant["layer_map"], scales)
        prompt = tiny_prompt(config, VARIANT_LENGTH, SEED)
        arrays[name] = oracle.sequence_logits(model, prompt)
        sha256 = weights_sha256(weights)
        variants.append({"name": name, "prompt": prompt, "weights_sha256": sha256} | variant)
    save_file(arrays, folder / "tiny_variants.safetensors")

    config = tiny_config(sliding_window=WINDOW)
    document = {
        "versions": oracle.versions(),
        "seed": SEED,
        "config": config,
        "weights_sha256": weights_sha256(tiny_weights(config, SEED)),
        "layer_maps": MAPS,
        "figures": oracle.rounded(figures),
        "cases": cases,
        "variants": variants,
    }
    oracle.write_json(folder / "tiny.json", document)
    return figures


def _mutants(
    config: dict[str, Any],
    weights: Weights,
    layer_map: list[int],
    case: dict[str, Any],
    exact: mutants.Array,
) -> dict[str, float]:
    """How far each mistake moves some logit of `case`, whose right logits are `exact`."""
    prompt, tokens = case["prompt"], case["tokens"]
    whole = [prompt + tokens]
    stepwise = [prompt, *([t] for t in tokens[:8])]

    def moved(
        chunks: list[list[int]],
        fault: Fault = mutants.RIGHT,
        layers: list[int] = layer_map,
        **changes: Any,
    ) -> float:
        wrong = mutants.logits(config | changes, weights, layers, chunks, fault)
        return float(np.abs(wrong - exact[: len(wrong)]).max())

    def swapped(i: int) -> list[int]:
        return [*layer_map[:i], layer_map[i + 1], layer_map[i], *layer_map[i + 2 :]]

    pairs = [
        (first, second)
        for second, block in enumerate(layer_map)
        for first in range(second)
        if layer_map[first] == block
    ]
    effects = {
        "window - 1": moved(whole, sliding_window=WINDOW - 1),
        "window + 1": moved(whole, sliding_window=WINDOW + 1),
        "queries one RoPE position late": moved(whole, Fault(query_shift=1)),
        "decoded tokens one RoPE position late": moved(stepwise, Fault(decode_shift=1)),
        "RoPE over neighbouring rows": moved(whole, Fault(interleaved=True)),
        "kv heads dealt out in turn": moved(whole, Fault(tiled_heads=True)),
        "rms_norm_eps 1e-6 for 1e-5": moved(whole, rms_norm_eps=1e-6),
        "two neighbouring map entries swapped, weakest": min(
            moved([prompt], layers=swapped(i)) for i in range(len(layer_map) - 1)
        ),
    }
    for how, overwrite in (("appended", False), ("overwritten", True)):
        if pairs:
            effects[f"one cache for two positions of a block, {how}, weakest"] = min(
                moved(stepwise, Fault(shared_cache=pair, overwrite=overwrite)) for pair in pairs
            )
    return effects
