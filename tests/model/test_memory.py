"""What a request takes besides the weights: predicted before, then read from MLX's counters.

Needs mlx, numpy and hypothesis only.
"""

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import resting
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.random_model import GEOMETRIES, RandomCheckpoint
from mlx_cerebrum import device
from mlx_cerebrum.decoding.decoder import generate_step
from mlx_cerebrum.model.cache import STEP, WindowedKVCache
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.memory import Workload, forward_bytes, keeps_scores
from mlx_cerebrum.weights.loading import load_model
from mlx_cerebrum.weights.opening import planned_config
from mlx_cerebrum.weights.storage import choose_storage

CHUNK = STEP - 6
GENERATED = 3
FULL = ModelConfig.from_dict(GEOMETRIES["cerebrum-7b"])


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As predicted for the CPU backend, wherever this runs."""
    monkeypatch.setattr(device, "backend", lambda: "cpu")


@pytest.fixture(scope="module")
def model() -> Model:
    raw = GEOMETRIES["small"] | {"num_hidden_layers": 8, "vocab_size": 512, "hidden_size": 128}
    raw |= {"intermediate_size": 256, "num_attention_heads": 4}
    checkpoint = RandomCheckpoint(Path("tiny"), raw)
    return load_model(checkpoint, checkpoint.config, choose_storage(checkpoint, None, "auto"))


@pytest.mark.parametrize(
    ("prompt", "window", "kv_bits"),
    [
        *((p, w, None) for p in (90, 2 * CHUNK + 30) for w in (None, 300)),
        *(
            pytest.param(p, w, None, marks=pytest.mark.long)
            for p in (CHUNK + 1, 3 * CHUNK)
            for w in (None, 300)
        ),
        *((2 * CHUNK + 30, w, bits) for w in (None, 300) for bits in (8, 4)),
    ],
)
@pytest.mark.one_in(8)
def test_a_request_is_predicted(
    model: Model, prompt: int, window: int | None, kv_bits: int | None
) -> None:
    config = planned_config(model.config, None, window or 0)
    model = model.view(config.layer_map)
    model.config = config
    ids = [1 + n % 500 for n in range(prompt)]
    request = Workload(config, model.dtype.size, prompt, GENERATED, CHUNK, kv_bits)

    def peak() -> int:
        cache = model.make_cache(kv_bits)
        mx.synchronize()
        before = resting()
        steps = generate_step(
            ids, model, max_tokens=GENERATED, cache=cache, prefill_step_size=CHUNK
        )
        assert len(list(steps)) == GENERATED
        assert sum(layer.nbytes for layer in cache) == request.cache_bytes
        return mx.get_peak_memory() - before

    # How many operations MLX has issued ahead is a matter of timing: the most of several.
    # A bound: a window may stop right before the chunk whose scores would fill their slices.
    most = 0
    for tried in range(16):
        most = max(most, peak())
        if device.on_gpu() or (tried > 2 and request.bytes < 1.15 * most):
            break
    if not device.on_gpu():  # there the queue of issued work is another
        assert 0.95 * most < request.bytes < 1.15 * most


@pytest.mark.usefixtures("cpu")
def test_packed_entries_take_their_share() -> None:
    """Bits, and a scale and a bias of 16 bits for each 64 values: 8.5 and 4.5 bits a value."""
    dense, eight, four = (
        Workload(FULL, 2, 4096, 64, 512, bits).cache_bytes for bits in (None, 8, 4)
    )
    assert eight * 16 == dense * 8.5
    assert four * 16 == dense * 4.5
    # A chunk unpacks one position's keys and values, 8 heads of 128.
    more = forward_bytes(FULL, 512, 4607, 2, 8) - forward_bytes(FULL, 512, 4607, 2)
    assert more == 2 * 8 * 128 * 4607 * 2


def rounds_of_drafts(
    window: int | None, prompt: int, generated: int, accept: Sequence[int], drafts: int
) -> int:
    """Most bytes of one position's cache in a request: rounds of `drafts`, `accept[i]` held."""
    cache = WindowedKVCache(window)

    def take(length: int) -> int:
        cache.update_and_fetch(mx.zeros((1, 1, length, 32)), mx.zeros((1, 1, length, 32)))
        mx.eval(cache.state[:2])
        return cache.nbytes

    filled = prompt - 1
    most = max([take(min(CHUNK, filled - i)) for i in range(0, filled, CHUNK)], default=0)
    left, number = generated, 0
    while left:
        guesses = min(drafts, left - 1)
        held = min(guesses, accept[number % len(accept)])
        most = max(most, take(1 + guesses))
        cache.trim(guesses - held)
        left, number = left - 1 - held, number + 1
    return most


def one_head(window: int | None) -> ModelConfig:
    raw = GEOMETRIES["small"] | {"num_hidden_layers": 1, "num_key_value_heads": 1}
    return ModelConfig.from_dict(raw | {"sliding_window": window})


@settings(deadline=None, max_examples=15)
@given(
    window=st.sampled_from([None, 40, 300]),
    prompt=st.integers(1, 600),
    generated=st.integers(1, 400),
    accept=st.lists(st.integers(0, 16), min_size=1, max_size=5),
    drafts=st.integers(1, 16),
)
def test_rounds_of_drafts_stay_within_the_prediction(
    window: int | None, prompt: int, generated: int, accept: list[int], drafts: int
) -> None:
    most = rounds_of_drafts(window, prompt, generated, accept, drafts)
    request = Workload(one_head(window), 4, prompt, generated, CHUNK, drafts=drafts)
    assert most <= request.cache_bytes


@pytest.mark.usefixtures("cpu")
def test_drafts_may_grow_a_cache_once_more() -> None:
    """510 entries fit two buffers of plain steps; 16 drafts grow the first some tokens early."""
    plain, drafting = (Workload(one_head(None), 4, 201, 310, CHUNK, drafts=n) for n in (0, 16))
    most = rounds_of_drafts(None, 201, 310, [0], 16)
    assert plain.cache_bytes < most <= drafting.cache_bytes
    # Where nothing grows after the prompt, drafts change nothing.
    plain, drafting = (Workload(FULL, 2, 100, 90, 512, drafts=n) for n in (0, 16))
    assert plain.cache_bytes == drafting.cache_bytes
    one, many = (Workload(FULL, 2, 9, 90, 512, drafts=n) for n in (0, 16))
    assert many.bytes - one.bytes >= 16 * FULL.vocab_size * 2  # each row has logits


def test_scores_of_a_chunk_are_counted_where_they_are_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device, "backend", lambda: "cpu")
    held = forward_bytes(FULL, 512, 4607, 2)
    monkeypatch.setattr(device, "backend", lambda: "metal")
    fused = forward_bytes(FULL, 512, 4607, 2)
    rotation = (2 * (32 + 8) + 4) * 128 * 512  # there it is no one kernel either
    assert held - fused == (32 * 512 * 4607 + rotation) * 2
    # One block's arrays for each token: six of the stream's width; q, k and v; q and k rotated;
    # q scaled and the heads' output twice; three of the MLP's width; and the mask.
    per_token = 6 * 4096 + (32 + 16) * 128 + 40 * 128 + 3 * 32 * 128 + 3 * 14336
    assert fused == 512 * per_token * 2 + 512 * 4607


@pytest.mark.parametrize(
    ("backend", "head_dim", "item_bytes", "held"),
    [
        ("metal", 96, 4, False),
        ("metal", 128, 4, False),
        ("metal", 32, 2, True),
        ("cuda", 128, 2, False),
        ("cuda", 128, 4, True),
    ],
)
def test_fused_attention_holds_no_scores(
    monkeypatch: pytest.MonkeyPatch, backend: str, head_dim: int, item_bytes: int, held: bool
) -> None:
    config = ModelConfig.from_dict(GEOMETRIES["cerebrum-7b"] | {"head_dim": head_dim})
    monkeypatch.setattr(device, "backend", lambda: "cpu")
    assert keeps_scores(config, item_bytes)
    monkeypatch.setattr(device, "backend", lambda: backend)
    assert keeps_scores(config, item_bytes) == held


@pytest.mark.usefixtures("cpu")
def test_a_window_bounds_what_a_request_takes() -> None:
    def needed(config: ModelConfig, prompt: int) -> int:
        return Workload(config, 2, prompt, 100, 512).bytes

    assert needed(FULL, 16_385) == needed(FULL, 32_769)
    full = planned_config(FULL, None, 0)
    assert needed(full, 32_769) > 1.9 * needed(full, 16_385)
    assert needed(FULL, 2000) == needed(full, 2000)


@pytest.mark.usefixtures("cpu")
def test_a_smaller_chunk_takes_less() -> None:
    for item_bytes, at_least in ((2, 1.5), (4, 1.2)):  # on the CPU float32's scores are in slices
        sizes = (FULL, item_bytes, 4097, 1)
        needs = [Workload(*sizes, chunk).bytes for chunk in (64, 256, 1024)]
        assert needs == sorted(needs)
        assert needs[0] < needs[2] / at_least
