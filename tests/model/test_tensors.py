"""The table of tensors is what the module tree holds."""

from math import prod

import pytest
from conftest import parameters
from tiny import tiny_config

from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.tensors import (
    BLOCK,
    MATRICES,
    NORMS,
    matrix_shapes,
    module_path,
    module_shapes,
    norm_paths,
    place,
)


@pytest.mark.parametrize("tied", [False, True])
def test_the_table_is_the_module_tree(tied: bool) -> None:
    config = ModelConfig.from_dict(
        tiny_config(num_hidden_layers=3, vocab_size=100, head_dim=6, tie_word_embeddings=tied)
    )
    shapes = module_shapes(config)
    held = {name: array.shape for name, array in parameters(Model(config)).items()}
    assert {f"{module}.weight": shape for module, shape in shapes.items()} == held
    assert matrix_shapes(config).keys() | set(norm_paths(config)) == shapes.keys()
    assert sum(map(prod, shapes.values())) == config.stored_parameters
    block = [shapes[module_path(1, kind)] for kind in BLOCK]
    assert sum(map(prod, block)) == config.block_parameters


def test_a_path_is_a_block_and_a_kind() -> None:
    assert sorted(BLOCK) == sorted((*MATRICES, *NORMS))
    assert place(module_path(12, "mlp.up_proj")) == (12, "mlp.up_proj")
    for outside in ("lm_head", "model.norm", "model.embed_tokens"):
        assert place(outside) is None
