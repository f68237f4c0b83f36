"""Models that draft: what they share with the one they draft for, and what they refuse."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from tiny import tiny_config

from mlx_cerebrum.decoding import draft_models
from mlx_cerebrum.decoding.draft_models import draft_model, packed_copy, stored_order
from mlx_cerebrum.decoding.policy import bytes_read
from mlx_cerebrum.errors import CerebrumError, MemoryBudgetError
from mlx_cerebrum.model import memory
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.weights.loading import fuse_projections
from mlx_cerebrum.weights.quantize import Packing

MAP = (0, 1, 2, 1, 2, 3, 2, 3)


@pytest.fixture
def model() -> Model:
    config = ModelConfig.from_dict(tiny_config(num_hidden_layers=4))
    model = Model(config.with_map(MAP, None))
    for block in model.model.layers:
        fuse_projections(block)
    mx.eval(model.parameters())
    return model


def test_a_packed_copy_reads_fewer_bytes_and_leaves_the_model_alone(model: Model) -> None:
    before = dict(tree_flatten(model.parameters()))
    packed = packed_copy(model, Packing(4, 64))
    assert bytes_read(packed) < 0.25 * bytes_read(model)
    assert packed.config == model.config
    assert isinstance(packed.model.layers[0].self_attn.qkv_proj, nn.QuantizedLinear)
    norm = packed.model.layers[0].input_layernorm.weight
    assert norm is model.model.layers[0].input_layernorm.weight  # shared
    after = dict(tree_flatten(model.parameters()))
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    tokens, eight = mx.array([[1, 2, 3]]), packed_copy(model, Packing(8, 64))
    assert mx.allclose(eight(tokens), model(tokens), atol=0.1)


def test_what_is_packed_already_is_packed_anew_only_to_fewer_bits(model: Model) -> None:
    eight = packed_copy(model, Packing(8, 64))
    four = packed_copy(eight, Packing(4, 64))
    assert four.model.layers[0].mlp.down_proj.bits == 4
    assert packed_copy(four, Packing(8, 64)).model.layers[0].mlp.down_proj.bits == 4


def test_a_copy_that_does_not_fit_is_refused(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    with pytest.raises(MemoryBudgetError, match="4-bit copy of the blocks to draft with") as error:
        draft_model(model, bits=4)
    assert "\n" not in str(error.value)


def test_the_stored_order_drafts_where_that_should_pay(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorter = stored_order(model)
    assert shorter is not None
    assert shorter.config.layer_map == (0, 1, 2, 3)
    assert shorter.model is model.model
    assert stored_order(model.view((0, 1, 2, 3))) is None  # it is the stored order
    assert stored_order(model.view((0, 1, 2, 1))) is None  # 3 is not in it
    assert stored_order(model.view((0, 1, 2, 3, 3))) is None  # saves too little
    monkeypatch.setattr(draft_models, "MODEL_PRIOR", 0.1)
    assert stored_order(model) is None


def test_a_plan_for_other_blocks_is_refused(model: Model) -> None:
    with pytest.raises(CerebrumError):
        draft_model(model, plan="cerebrum-7b")
