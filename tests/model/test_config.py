"""config.json as transformers reads it: each key honoured, or refused by name in one line."""

import json
from typing import Any

import pytest
from tiny import tiny_config

from mlx_cerebrum.errors import ConfigError
from mlx_cerebrum.model.config import MOST, ModelConfig

LLAMA = {"model_type": "llama", "sliding_window": ...}
FULL, SLIDING = "full_attention", "sliding_attention"


def read(**changes: Any) -> ModelConfig:
    """A config of two blocks with these keys changed, as a file would give them; `...` for none."""
    raw = tiny_config(num_hidden_layers=2) | changes
    text = json.dumps({key: value for key, value in raw.items() if value is not ...})
    return ModelConfig.from_dict(json.loads(text))


def refused(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read(**changes)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 250
    return message


@pytest.mark.parametrize(
    ("changes", "theta"),
    [
        ({"rope_theta": ...}, 10000.0),
        ({"rope_theta": 7.0}, 7.0),
        ({"rope_theta": 7}, 7.0),
        ({"rope_scaling": {"type": "default", "rope_theta": 5.0}}, 5.0),
        ({"rope_scaling": {"rope_theta": 5.0}, "rope_theta": ...}, 5.0),
        ({"rope_scaling": {"type": "default"}, "rope_theta": 7.0}, 7.0),
        ({"rope_parameters": {"rope_theta": 6.0}, "rope_theta": 7.0}, 6.0),
        ({"rope_scaling": {"rope_theta": 5.0}, "rope_parameters": {"rope_theta": 6.0}}, 5.0),
        (
            {
                "rope_scaling": {"type": "default"},
                "rope_parameters": {"rope_theta": 6.0},
                "rope_theta": 7.0,
            },
            7.0,
        ),
        ({"rope_scaling": {}, "rope_parameters": {"rope_theta": 6.0}}, 6.0),
        ({"rope_scaling": None, "rope_parameters": {"rope_theta": 6.0}}, 6.0),
        (
            {
                "rope_scaling": {"rope_theta": 5.0},
                "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 6.0},
            },
            5.0,
        ),
        ({"rope_scaling": {"rope_type": "default", "type": "linear"}, "rope_theta": 7.0}, 7.0),
    ],
)
def test_rope_theta_is_taken_from_where_transformers_takes_it(
    changes: dict[str, Any], theta: float
) -> None:
    assert read(**changes).rope_theta == theta


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    "value",
    [
        *("plain", [1], 5),
        *({"type": "linear", "factor": 1.0}, {"rope_type": None}, {"type": "linear"}),
        {"rope_type": "dynamic", "type": "default", "factor": 2.0},
        *({FULL: {"rope_theta": 5.0}}, {SLIDING: None}, {"x": {}}),
        *({"rope_theta": None}, {"rope_theta": "5"}, {"rope_theta": 1e39}, {"rope_theta": 0}),
        *({"rope_theta": 1e-39}, {"rope_theta": True}, {"partial_rotary_factor": 0.5}),
    ],
)
def test_rope_that_is_not_plain_is_refused(key: str, value: Any) -> None:
    message = refused(**{key: value})
    assert key in message or "rope_theta" in message


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({}, 12),
        ({"sliding_window": ...}, 4096),
        ({"sliding_window": None}, None),
        ({"sliding_window": 10**12}, MOST),  # no sequence is longer
        ({"layer_types": [FULL, FULL]}, None),
        ({"layer_types": ["attention", FULL]}, None),
        ({"layer_types": [SLIDING, SLIDING]}, 12),
        ({"layer_types": [FULL, FULL], "sliding_window": None}, None),
        ({"layer_types": None}, 12),
        (LLAMA, None),
        (LLAMA | {"sliding_window": 12}, None),
        (LLAMA | {"layer_types": [FULL, FULL]}, None),
    ],
)
def test_window(changes: dict[str, Any], window: int | None) -> None:
    assert read(**changes).sliding_window == window


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_types": []},
        {"layer_types": [FULL]},
        {"layer_types": [SLIDING] * 3},
        {"layer_types": FULL},
        {"layer_types": [1, 2]},
        *({"layer_types": [kind] * 2} for kind in ("chunked_attention", "conv", "moe", "x" * 99)),
        {"layer_types": [FULL, SLIDING]},
        {"layer_types": [SLIDING] * 2, "sliding_window": None},
        LLAMA | {"layer_types": [SLIDING] * 2},
        LLAMA | {"layer_types": [SLIDING] * 2, "sliding_window": 12},
    ],
)
def test_layer_types_that_no_window_fits_are_refused(changes: dict[str, Any]) -> None:
    assert "layer_types" in refused(**changes)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        # Null and 0 mean "not causal" to transformers.
        ("is_causal", (False, None, 0, "no")),
        ("hidden_act", ("gelu", None, "SiLU", 1)),
        ("attention_bias", (True, 0, 1, "false")),
        ("mlp_bias", (True, 0)),
        ("partial_rotary_factor", (0.5, "1")),
        ("per_layer_config", ({"0": {"sliding_window": 2}}, [])),
        ("attribute_map", ({"num_key_value_heads": "kv"},)),
        ("attention_chunk_size", (4,)),
        ("transformers_weights", ("other.safetensors",)),
        ("configuration_files", (["config.4.0.0.json"],)),
        ("tie_word_embeddings", (None, 0, 1, "yes")),
        ("head_dim", (1, 3, 5, 0, -2, 16.0, True, "16", 2**31)),
        ("num_key_value_heads", (None, 3, 0, True, 2.0)),
        ("rms_norm_eps", (None, 1, -1e-5, 1e39, True, "x", float("nan"), float("inf"))),
        ("rope_theta", (None, 0, -5.0, 1e39, 10**40, True, float("nan"))),
        ("vocab_size", (None, 0, -1, 1.0, True, "260", 2**31, 10**4000)),
        ("hidden_size", (None, 64.0, 2**31, 10**4000)),
        ("max_position_embeddings", (None, 0, -1, 512.0, "x")),
        ("sliding_window", (0, -3, False, 4.0, "x", float("inf"))),
        ("num_hidden_layers", (0, 10_001, 10**4000, 2.0)),
        ("bos_token_id", ([1], True, 1.0, "<s>")),
        ("eos_token_id", (True, [2, 2.0], {"a": 1}, "x" * 5000)),
        ("format_version", (2, True, 1.0, "1")),
        ("residual_scales", ([[1e299, 1], [1, 1]], [[1, 1]], [[1, True]] * 2, [[1, 10**400]] * 2)),
        ("layer_map", ([0, True], [0, 1.0], [10**4000], [-1], [0] * 10_001)),
        ("model_type", ("qwen2", 5, {"a": 1}, "x" * 5000)),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(key: str, values: tuple[Any, ...]) -> None:
    for value in values:
        message = refused(**{key: value})
        assert (key if key != "model_type" else "not supported") in message


def test_numbers_at_the_edge_are_read() -> None:
    config = read(
        rms_norm_eps=0.0,
        rope_theta=1e38,
        max_position_embeddings=10**30,
        eos_token_id=[2, -1, 10**30],
        bos_token_id=-1,
        residual_scales=[[3e38, -3e38], [0, 1]],
    )
    assert (config.rms_norm_eps, config.rope_theta) == (0.0, 1e38)
    assert config.max_position_embeddings == MOST
    assert (config.eos_token_ids, config.bos_token_id) == ((2, 10**30), None)
    assert config.residual_scales == ((3e38, -3e38), (0.0, 1.0))


def test_heads_and_their_width() -> None:
    assert read(head_dim=None).head_dim == read(head_dim=...).head_dim == 16
    assert read(head_dim=2).head_dim == 2
    assert read(num_key_value_heads=..., num_attention_heads=16).num_key_value_heads == 8
    for absent in (None, ...):
        assert read(**LLAMA, num_key_value_heads=absent).num_key_value_heads == 4
    # Where the heads do not divide the hidden size Mistral rounds down, and Llama refuses.
    assert read(hidden_size=66, head_dim=None).head_dim == 16
    for width in (None, 16):
        assert "not a multiple" in refused(**LLAMA, hidden_size=66, head_dim=width)
    assert "head_dim must be even, not 17" in refused(hidden_size=68, head_dim=None)
    assert "head_dim must be even, not 0" in refused(hidden_size=3, head_dim=None)


def test_an_architecture_stands_for_a_missing_model_type() -> None:
    for absent in (None, ...):
        assert read(model_type=absent).model_type == "mistral"
        config = read(model_type=absent, architectures=["LlamaForCausalLM"])
        assert (config.model_type, config.sliding_window) == ("llama", None)
        message = refused(model_type=absent, architectures=["Qwen2_5_VLForConditionalGeneration"])
        assert "'Qwen2_5_VLForConditionalGeneration' is not supported" in message
        for odd in (None, [], [["MistralForCausalLM"]], "MistralForCausalLM", {"a": 1}):
            assert "missing" in refused(model_type=absent, architectures=odd)
    assert read(architectures=["LlamaForCausalLM"]).model_type == "mistral"
