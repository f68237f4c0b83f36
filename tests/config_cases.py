"""Configs to read as transformers reads them: every key of Mistral's and Llama's config classes,
keys that finetunes carry from other models, legal and illegal values, alone and in pairs.

A case is a base config (`mistral` or `llama`) with keys set and dropped, and what is stored for a
tied model's head. Weights are made from the config's meaning (`weights`), so both sides make them.
"""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from tiny import Weights, tiny_config, tiny_prompt, tiny_weights

VOCABULARY = 32
TOKENS = 24  # more than the small windows
SEED = 5
PAIRS = 330

ABSENT = ...  # in the lists below: the key is dropped
FULL, SLIDING = "full_attention", "sliding_attention"
NAN, INFINITY = float("nan"), float("inf")

# What may stand in `rope_scaling` and in `rope_parameters`.
_ROPE: list[Any] = [
    *(None, {}, [], False, "default", 5),
    {"rope_theta": 50.0},
    {"rope_theta": 50},
    {"rope_type": "default"},
    {"rope_type": "default", "rope_theta": 50.0},
    {"type": "default", "rope_theta": 50.0},
    {"rope_type": "default", "type": "linear", "rope_theta": 50.0},
    {"rope_type": "default", "factor": 2.0},
    {"rope_theta": None},
    {"rope_theta": "50"},
    {"rope_theta": 0.0},
    {"rope_type": None, "rope_theta": 50.0},
    {"rope_type": "nonsense"},
    {"type": "linear", "factor": 1.0},
    {"rope_type": "linear", "factor": 2.0, "rope_theta": 50.0},
    {"type": "linear"},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 2.0},
    {
        "rope_type": "llama3",
        "rope_theta": 50.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    {FULL: {"rope_type": "default", "rope_theta": 50.0}},
    {SLIDING: {"rope_theta": 50.0}, FULL: None},
    {"partial_rotary_factor": 0.5},
    {"partial_rotary_factor": 1.0, "rope_theta": 50.0},
]

# The keys that decide the arithmetic: pairs are drawn from these.
ARITHMETIC: dict[str, list[Any]] = {
    "vocab_size": [40, None, 0, -1, 32.0, True, "32", ABSENT],
    "hidden_size": [48, 34, 30, None, 0, -32, 32.0, True, "32", ABSENT],
    "intermediate_size": [40, 1, None, 0, -1, 48.0, True, ABSENT],
    "num_hidden_layers": [1, 3, None, 0, -1, 2.0, True, "2", ABSENT],
    "num_attention_heads": [2, 8, 6, 3, 1, 5, None, 0, -4, 4.0, True, "4", ABSENT],
    "num_key_value_heads": [1, 4, 3, 8, None, 0, -2, 2.0, True, "2", ABSENT],
    "head_dim": [16, 4, 2, 12, 1, 3, 5, 7, 0, -8, None, 8.0, True, "8", ABSENT],
    "hidden_act": ["swish", "gelu", "relu", "SiLU", "nonsense", None, 5, ABSENT],
    "rms_norm_eps": [
        *(1e-6, 1e-3, 0.1, 0.0, 1, 0, -1e-6, 1e39, None, "1e-5", True, NAN, INFINITY, ABSENT)
    ],
    "rope_theta": [
        *(50.0, 50, 1.0, 0.5, 1e6, 1e38, 1e39, 10**20, 0, -5.0, None, "50", True, NAN, ABSENT)
    ],
    "rope_scaling": _ROPE,
    "rope_parameters": _ROPE,
    "partial_rotary_factor": [1.0, 1, 0.5, None, "x"],
    "sliding_window": [
        *(1, 2, 5, 23, 24, 25, 100, None, 0, -3, 6.0, True, False, "6"),
        *(10**12, 10**30, INFINITY, ABSENT),
    ],
    "layer_types": [
        *(None, [FULL] * 2, [SLIDING] * 2, ["attention"] * 2, [FULL, SLIDING], [], [FULL]),
        *([SLIDING] * 3, ["chunked_attention"] * 2, ["nonsense"] * 2, ["conv"] * 2, FULL, 5),
    ],
    "is_causal": [True, False, None, 0, 1],
    "tie_word_embeddings": [True, None, 0, 1, "true", ABSENT],
    "attention_bias": [False, True, None, 0, "x"],
    "mlp_bias": [False, True, None, 0],
    "attention_chunk_size": [None, 4],
    "per_layer_config": [None, {}, {"0": {"sliding_window": 2}}, {"1": {"head_dim": 4}}],
    "attribute_map": [{}, {"num_key_value_heads": "num_labels"}],
}

# Keys of the classes that say nothing about logits, and keys of other models.
OTHERS: dict[str, list[Any]] = {
    "model_type": [None, ABSENT, "nonsense", 5],
    "architectures": [None, [], ["LlamaForCausalLM"], ["MistralForCausalLM"], "x", ABSENT],
    "max_position_embeddings": [8, 1, 0, -1, 10**30, None, 64.0, True, "64", ABSENT],
    "initializer_range": [0.0, 1, 5.0, -0.1, None, "x", ABSENT],
    "use_cache": [True, False, None, 1],
    "pad_token_id": [0, 31, -1, 50, None, "x"],
    "bos_token_id": [0, -1, 1000, None, [1], True, 1.0, "x", ABSENT],
    "eos_token_id": [[2, 3], [], -1, [2, -1], 1000, None, True, [2.0], "x", ABSENT],
    "attention_dropout": [0.5, 0, None, "x", ABSENT],
    "pretraining_tp": [1, 2, None, "x"],
    "torch_dtype": ["float16", "bfloat16", "float64", "int8", "nonsense", None, 5, ABSENT],
    "dtype": ["float32", "nonsense", None, 5],
    "output_hidden_states": [True, None, "x"],
    "output_attentions": [True],
    "return_dict": [True, False, None],
    "chunk_size_feed_forward": [0, 4, None],
    "is_encoder_decoder": [False, True, None],
    "id2label": [None, {"0": "a"}, {"a": "b"}],
    "label2id": [None, {"a": 0}, 5],
    "problem_type": [None, "regression", "x"],
    "num_labels": [2, "x"],
    "transformers_version": ["4.34.0", None, 5],
    "name_or_path": ["x", 5],
    "attn_implementation": ["sdpa", "flash_attention_2"],
    "default_theta": [50.0],
    "transformers_weights": [None, "other.safetensors"],
    "configuration_files": [["config.4.0.0.json"]],
    "text_config": [None, {"hidden_size": 8}],
    "mlp_layer_types": [None, ["dense"] * 2, ["sparse"] * 2, ["x"]],
    "pruned_heads": [{}, {"0": [1]}],
    "is_decoder": [True],
    "add_cross_attention": [True],
    "use_sliding_window": [False],
    "max_window_layers": [1],
    "no_rope_layers": [None, [0, 0]],
    "use_bidirectional_attention": [False, True],
    "use_qk_norm": [False, True],
    "clip_qkv": [None, 1.0],
    "attention_sink": [False, True],
    "attention_multiplier": [None, 0.1],
    "query_pre_attn_scalar": [None, 4],
    "attn_logit_softcapping": [None, 5.0],
    "final_logit_softcapping": [None, 5.0],
    "logit_scale": [None, 1.0, 0.5],
    "logits_scaling": [1, 2.0],
    "embedding_multiplier": [1.0, 2.0],
    "residual_multiplier": [1.0, 0.5],
    "num_local_experts": [0, 8],
}

Floats = npt.NDArray[np.float32]
Case = dict[str, Any]  # base, set, drop, head


def case(base: str, changes: dict[str, Any], head: str | None = None) -> Case:
    """`head`: what a checkpoint called tied stores all the same, `own`, `same` or nothing."""
    kept = {key: value for key, value in changes.items() if value is not ABSENT}
    dropped = [key for key, value in changes.items() if value is ABSENT]
    return {"base": base, "set": kept, "drop": dropped, "head": head}


def config(case: Case) -> dict[str, Any]:
    """The case's config.json."""
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "head_dim": 8,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "sliding_window": 6,
    }
    raw = tiny_config(**small)
    if case["base"] == "llama":
        raw |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        del raw["sliding_window"]
    raw |= case["set"]
    return {key: value for key, value in raw.items() if key not in case["drop"]}


def weights(meaning: dict[str, Any], head: str | None) -> Weights:
    """The weights of a config that means `meaning` (Hugging Face's keys): a small stream, so that
    the epsilon shows; blocks that write much, so that each position and mask does."""
    made = tiny_weights(meaning | {"tie_word_embeddings": False}, SEED, stream=0.02, write=0.05)
    if meaning["tie_word_embeddings"]:
        own = made.pop("lm_head.weight")
        if head is not None:
            table = made["model.embed_tokens.weight"]
            made["lm_head.weight"] = own if head == "own" else table.copy()
    return made


def prompt() -> list[int]:
    return tiny_prompt({"vocab_size": VOCABULARY}, TOKENS, SEED)


def cases() -> list[Case]:
    """All of them, the same ones every time, none twice."""
    return list({repr(one): one for one in (*_alone(), *_together(), *_pairs())}.values())


def _alone() -> Iterator[Case]:
    for base in ("mistral", "llama"):
        yield case(base, {})
        for key, values in (ARITHMETIC | OTHERS).items():
            for value in values:
                yield case(base, {key: value})


def _together() -> Iterator[Case]:
    """Keys that mean something only together."""
    yield from (case(base, {"tie_word_embeddings": True}, head) for base, head in _HEADS)
    thetas = [None, {"rope_theta": 50.0}, {"type": "default"}, {"rope_type": "yarn", "factor": 2.0}]
    for base in ("mistral", "llama"):
        for scaling in thetas:
            for parameters in ({"rope_theta": 500.0}, {"rope_type": "default"}, *thetas[3:]):
                for theta in (5000.0, ABSENT):
                    both = {"rope_scaling": scaling, "rope_parameters": parameters}
                    yield case(base, both | {"rope_theta": theta})
        for kinds in ([FULL] * 2, [SLIDING] * 2, ["attention"] * 2, [FULL, SLIDING]):
            for window in (None, 3, 100, ABSENT):
                yield case(base, {"layer_types": kinds, "sliding_window": window})
            yield case(base, {"layer_types": kinds, "rope_parameters": {FULL: {"rope_theta": 5.0}}})
        for heads, kv_heads, hidden in ((4, 2, 48), (6, 2, 48), (6, 3, 50), (8, 8, 64), (3, 1, 36)):
            for width in (None, 10, ABSENT):
                sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
                yield case(base, sizes | {"hidden_size": hidden, "head_dim": width})
        for model_type in (None, ABSENT):
            for listed in (["LlamaForCausalLM"], ["MistralForCausalLM"], ["Qwen2ForCausalLM"], []):
                yield case(base, {"model_type": model_type, "architectures": listed})


_HEADS = [(base, head) for base in ("mistral", "llama") for head in ("own", "same")]


def _pairs() -> Iterator[Case]:
    """Two keys at once, mostly of values that stand in the first half of their lists."""
    # Only `random()`, which gives the same numbers in every version of Python.
    draw = random.Random(SEED).random
    keys = list(ARITHMETIC)
    for _ in range(PAIRS):
        base = ("mistral", "llama")[int(draw() * 2)]
        first = int(draw() * len(keys))
        second = (first + 1 + int(draw() * (len(keys) - 1))) % len(keys)
        changes = {}
        for key in (keys[first], keys[second]):
            values = ARITHMETIC[key]
            part = len(values) if draw() < 0.3 else (len(values) + 1) // 2
            changes[key] = values[int(draw() * part)]
        yield case(base, changes)


def last_logits(logits: Any) -> Floats:
    """`[1, L, V]` -> the last position's first VOCABULARY."""
    return np.asarray(logits, np.float32)[0, -1, :VOCABULARY]
