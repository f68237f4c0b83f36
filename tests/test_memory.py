"""What a request takes besides the weights: predicted before, then read from MLX's counters.

Needs mlx and numpy only.
"""

from pathlib import Path

import mlx.core as mx
import pytest

from bench.random_model import GEOMETRIES, RandomCheckpoint
from mlx_cerebrum import memory
from mlx_cerebrum.cache import STEP
from mlx_cerebrum.config import ModelConfig
from mlx_cerebrum.decode import generate_step
from mlx_cerebrum.load import choose_storage, load_model, planned_config
from mlx_cerebrum.memory import forward_bytes, keeps_scores, kv_bytes, request_bytes
from mlx_cerebrum.model import Model

CHUNK = STEP - 6
GENERATED = 3
FULL = ModelConfig.from_dict(GEOMETRIES["cerebrum-7b"])


@pytest.fixture(scope="module")
def model() -> Model:
    raw = GEOMETRIES["small"] | {"num_hidden_layers": 8, "vocab_size": 512, "hidden_size": 128}
    raw |= {"intermediate_size": 256, "num_attention_heads": 4}
    checkpoint = RandomCheckpoint(Path("tiny"), raw)
    return load_model(checkpoint, checkpoint.config, choose_storage(checkpoint, None, "auto"))


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("prompt", [90, CHUNK + 1, 2 * CHUNK + 30, 3 * CHUNK])
def test_a_request_is_predicted(model: Model, prompt: int, window: int | None) -> None:
    config = planned_config(model.config, None, window or 0)
    model = model.view(config.layer_map)
    model.config = config
    ids = [1 + n % 500 for n in range(prompt)]
    request = (config, prompt, GENERATED, model.model.norm.weight.dtype.size, CHUNK)

    def peak() -> int:
        cache = model.make_cache()
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        steps = generate_step(
            ids, model, max_tokens=GENERATED, cache=cache, prefill_step_size=CHUNK
        )
        assert len(list(steps)) == GENERATED
        assert sum(layer.nbytes for layer in cache) == kv_bytes(*request)
        return mx.get_peak_memory() - before

    # The most of several: how many operations MLX has issued ahead is a matter of timing.
    most = max(peak() for _ in range(6))
    if not memory.on_gpu():  # there the queue of issued work is another
        assert request_bytes(*request) == pytest.approx(most, rel=0.1)


def test_scores_of_a_chunk_are_counted_where_they_are_held() -> None:
    held, fused = (forward_bytes(FULL, 512, 4607, 2, scores) for scores in (True, False))
    assert held - fused == 32 * 512 * 4607 * 2
    # One block's arrays for each token: six of the stream's width; q, k and v; q and k rotated;
    # q scaled and the heads' output twice; three of the MLP's width; and the mask.
    per_token = 6 * 4096 + (32 + 16) * 128 + 40 * 128 + 3 * 32 * 128 + 3 * 14336
    assert fused == 512 * per_token * 2 + 512 * 4607


@pytest.mark.parametrize(
    ("metal", "head_dim", "item_bytes", "held"),
    [(True, 128, 4, False), (True, 32, 2, True), (False, 128, 2, False), (False, 128, 4, True)],
)
def test_fused_attention_holds_no_scores(
    monkeypatch: pytest.MonkeyPatch, metal: bool, head_dim: int, item_bytes: int, held: bool
) -> None:
    config = ModelConfig.from_dict(GEOMETRIES["cerebrum-7b"] | {"head_dim": head_dim})
    monkeypatch.setattr(memory, "on_gpu", lambda: False)
    assert keeps_scores(config, item_bytes)
    monkeypatch.setattr(memory, "on_gpu", lambda: True)
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
    assert keeps_scores(config, item_bytes) == held


def test_a_window_bounds_what_a_request_takes() -> None:
    def needed(config: ModelConfig, prompt: int) -> int:
        return request_bytes(config, prompt, 100, 2, 512, scores=True)

    assert needed(FULL, 16_385) == needed(FULL, 32_769)
    full = planned_config(FULL, None, 0)
    assert needed(full, 32_769) > 1.9 * needed(full, 16_385)
    assert needed(FULL, 2000) == needed(full, 2000)


def test_a_smaller_chunk_takes_less() -> None:
    needs = [request_bytes(FULL, 4097, 1, 4, chunk, scores=True) for chunk in (64, 256, 1024)]
    assert needs == sorted(needs)
    assert needs[0] < needs[2] / 1.5
