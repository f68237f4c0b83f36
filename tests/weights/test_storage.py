"""In which order weights are read. What they are held as: test_load.py, test_memory_limits.py."""

import pytest
from tiny import tiny_config

from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.tensors import module_shapes
from mlx_cerebrum.weights.storage import reading_order


@pytest.mark.parametrize("tied", [False, True])
def test_everything_is_read_once_the_largest_first(tied: bool) -> None:
    sizes = {"num_hidden_layers": 2, "vocab_size": 100, "intermediate_size": 256}
    raw = tiny_config(**sizes, tie_word_embeddings=tied)
    config = ModelConfig.from_dict(raw)
    order = reading_order(config)
    read = [module for part in order for modules in part.values() for module in modules]
    assert sorted(read) == sorted(module_shapes(config))
    tables = ["model.embed_tokens"] if tied else ["lm_head", "model.embed_tokens"]
    assert read[: len(tables)] == tables
    assert read[-1] == "model.norm"
    block = order[len(tables) + 1]
    assert list(block) == [
        "model.layers.1.mlp.gate_up_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.1.self_attn.qkv_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.input_layernorm",
        "model.layers.1.post_attention_layernorm",
    ]
    assert block["model.layers.1.self_attn.qkv_proj"] == [
        f"model.layers.1.self_attn.{name}_proj" for name in "qkv"
    ]
