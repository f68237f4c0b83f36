"""Every config of golden/configs.json: our logits are transformers', or both of us refuse it, or a
list here names what only one of us takes."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from config_cases import (
    ABSENT,
    FULL,
    INFINITY,
    NAN,
    SLIDING,
    Case,
    Floats,
    cases,
    config,
    last_logits,
    prompt,
    weights,
)
from conftest import slow
from safetensors.numpy import load_file, save_file

from mlx_cerebrum.errors import ConfigError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.weights.loading import load_model
from mlx_cerebrum.weights.opening import open_checkpoint
from mlx_cerebrum.weights.storage import choose_storage

GOLDEN = Path(__file__).parents[1] / "golden"
DOCUMENT = json.loads((GOLDEN / "configs.json").read_text(encoding="utf-8"))
LOGITS = load_file(GOLDEN / "configs.safetensors")["logits"]
# Of the largest logit. Float32 rounding is 7e-6 at most; two configs that mean different things
# are 3e-4 apart at least.
TOLERANCE, APART = 2e-5, 3e-4
# What a refusal may name instead of the key that was changed: what follows from it.
FOLLOWING = ("num_key_value_heads", "head_dim", "hidden_size", "architecture")
CHUNK = 10  # prompt tokens at once

_ROPE = [
    {"rope_theta": 0.0},  # NaN
    *(
        {"type": "linear", "factor": 1.0},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 50.0},
    ),
    *({"rope_type": kind, "factor": 2.0} for kind in ("dynamic", "yarn")),
    {
        "rope_type": "llama3",
        "rope_theta": 50.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    # transformers ignores these where RoPE is plain: the values were meant, so it must be wrong.
    {FULL: {"rope_type": "default", "rope_theta": 50.0}},
    {SLIDING: {"rope_theta": 50.0}, FULL: None},
    {"partial_rotary_factor": 0.5},
]
# What we refuse by name though transformers runs it. Nothing else may be refused.
WE_REFUSE: dict[str, list[Any]] = {
    # A size that is not given: transformers takes the 7B's.
    "vocab_size": [ABSENT],
    "hidden_size": [ABSENT],
    "intermediate_size": [ABSENT],
    "num_attention_heads": [ABSENT],
    "num_hidden_layers": [0, ABSENT],
    "max_position_embeddings": [0, -1, ABSENT],  # it does not look at them; requests are held to it
    # Its rotation makes a head of one value two wide; for Mistral, 0 is none.
    "head_dim": [1, 0],
    # Arithmetic that is not this engine's.
    "hidden_act": ["gelu", "relu"],
    "rope_scaling": _ROPE,
    "rope_parameters": [*_ROPE, {FULL: {"rope_theta": 5.0}}],
    "partial_rotary_factor": [0.5, "x"],
    "is_causal": [False, None, 0, 1],
    "layer_types": [[FULL, SLIDING], [SLIDING] * 2],  # the second only in Llama
    "sliding_window": [True],  # in Llama, whose attention has none
    "attention_bias": [True, 0, "x"],  # Mistral has none, whatever is said
    "mlp_bias": [True, 0],
    # Not a number, or not one that float32 can hold; or that no one means.
    "rms_norm_eps": [-1e-6, 1e39, NAN, INFINITY],
    "rope_theta": [1e39, 0, -5.0, True, NAN],
    # Renames keys, and is obeyed.
    "attribute_map": [{"num_key_value_heads": "num_labels"}],
    # Other models' arithmetic, which transformers' Mistral and Llama do not know: the weights were
    # made with it.
    "attention_chunk_size": [4],
    "mlp_layer_types": [["dense"] * 2, ["sparse"] * 2, ["x"]],
    "pruned_heads": [{"0": [1]}],
    "no_rope_layers": [[0, 0]],
    "use_bidirectional_attention": [True],
    "use_qk_norm": [True],
    "attention_sink": [True],
    "clip_qkv": [1.0],
    "attention_multiplier": [0.1],
    "query_pre_attn_scalar": [4],
    "attn_logit_softcapping": [5.0],
    "final_logit_softcapping": [5.0],
    "logit_scale": [0.5],
    "residual_multiplier": [0.5],
    "logits_scaling": [2.0],
    "embedding_multiplier": [2.0],
    "num_local_experts": [8],
}
# What we run though transformers refuses it.
WE_RUN: dict[str, list[Any]] = {
    "model_type": [None, ABSENT],  # where `architectures` says it
    # Too large for its integers; the meaning is plain.
    "rope_theta": [10**20],
    "sliding_window": [10**30],
    # It makes a mask for layers that slide where none does.
    "layer_types": [[FULL] * 2, ["attention"] * 2],
    # No bias, which null says too.
    "attention_bias": [None],
    "mlp_bias": [None],
    # What training, other tasks and generation's settings need. None of it is read here.
    "initializer_range": [1, 5.0, -0.1, None, "x"],
    "attention_dropout": [None, "x"],
    "pretraining_tp": ["x"],
    "use_cache": [None, 1],
    "pad_token_id": [50, "x"],
    "id2label": [{"a": "b"}],
    "num_labels": ["x"],
    "return_dict": [False, None],
    "output_hidden_states": ["x"],
    "dtype": ["nonsense"],
    "torch_dtype": ["nonsense"],  # the tensors have their own
}


def ours(case: Case, path: Path) -> Floats:
    """The last logits of the case's checkpoint, its prompt read in two pieces."""
    (path / "config.json").write_text(json.dumps(config(case)))
    meaning = vars(ModelConfig.from_file(path / "config.json"))
    save_file(weights(meaning, case["head"]), path / "model.safetensors")
    checkpoint = open_checkpoint(path)
    model = load_model(checkpoint, checkpoint.config, choose_storage(checkpoint, None, "float32"))
    ids, cache = mx.array([prompt()]), model.make_cache()
    model(ids[:, :CHUNK], cache)
    return last_logits(model(ids[:, CHUNK:], cache))


def changes(case: Case) -> dict[str, Any]:
    return {**case["set"], **dict.fromkeys(case["drop"], ABSENT)}


def listed(case: Case, table: dict[str, list[Any]]) -> list[tuple[str, str]]:
    """The keys of a case, with their values as text, that a list has."""
    return [
        (key, repr(value))
        for key, value in changes(case).items()
        if repr(value) in map(repr, table.get(key, []))
    ]


def test_the_cases_are_the_generators() -> None:
    outcomes = ("refused", "row", "cached")
    stored = [{k: v for k, v in case.items() if k not in outcomes} for case in DOCUMENT["cases"]]
    assert repr(stored) == repr(cases())
    assert len(stored) > 1000
    assert len(LOGITS) > 700


def test_the_goldens_tell_right_from_wrong() -> None:
    """Any two of them are the same, or far apart: no mistake hides in the tolerance."""
    rows = LOGITS[np.isfinite(LOGITS).all(-1)]
    for index, row in enumerate(rows):
        distance = np.abs(rows[index + 1 :] - row).max(-1, initial=0) / np.abs(row).max(
            initial=1e-9
        )
        assert not ((distance > TOLERANCE / 10) & (distance < APART)).any()


@pytest.mark.parametrize("every", [13, pytest.param(1, marks=pytest.mark.long)])
@slow
def test_each_config_is_run_as_transformers_runs_it_or_refused_by_name(
    tmp_path: Path, every: int
) -> None:
    wrong: list[str] = []
    refusals: set[tuple[str, str]] = set()
    runs: set[tuple[str, str]] = set()
    for case in DOCUMENT["cases"][::every]:
        golden = LOGITS[case["row"]] if "row" in case else None
        try:
            found = ours(case, tmp_path)
        except ConfigError as error:
            message = str(error).removeprefix(f"{tmp_path / 'config.json'}: ")
            known = [one for one in listed(case, WE_REFUSE) if one[0] in message]
            refusals |= set(known) if golden is not None else set()
            if golden is not None and not known:
                wrong.append(f"refused: {changes(case)}: {message}")
            names = (*changes(case), *FOLLOWING)
            if "\n" in message or not any(name in message for name in names):
                wrong.append(f"names no key of {changes(case)}: {message}")
            continue
        if golden is None:
            known = listed(case, WE_RUN)
            runs |= set(known)
            wrong += [] if known else [f"runs: {changes(case)}, {case['refused']}"]
        elif not np.abs(found - golden).max() <= TOLERANCE * np.abs(golden).max():
            wrong.append(f"{case['base']} {changes(case)} {case['head']}: other logits")
    assert not wrong
    if every > 1:
        return
    # And the lists have nothing that is taken by now.
    tables = ((WE_REFUSE, refusals), (WE_RUN, runs))
    for table, seen in tables:
        assert {(key, repr(v)) for key, values in table.items() for v in values} == seen
