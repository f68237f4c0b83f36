"""Attention over a prompt on the CPU, against the same in float64."""

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import resting, slow
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_cerebrum import device
from mlx_cerebrum.decoding.decoder import generate_step
from mlx_cerebrum.model import cpu
from mlx_cerebrum.model.attention import attend
from mlx_cerebrum.model.cache import Mask, causal_mask
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.cpu import (
    SLICE,
    attend_by_rows,
    attend_in_slices,
    by_rows,
    exp2,
    in_slices,
    scores_held,
)
from mlx_cerebrum.model.forward import Model


def test_powers_of_two() -> None:
    x = np.concatenate([np.linspace(-125, 0, 300_001), np.arange(-126, 1)]).astype(np.float32)
    found = np.array(exp2(mx.array(x)), dtype=np.float64)
    assert np.max(np.abs(found / np.exp2(x.astype(np.float64)) - 1)) < 2e-7
    assert exp2(mx.array([0.0])).item() == 1
    tiny = np.array(exp2(mx.linspace(-127.5, -125, 10_001)))
    assert np.all((tiny >= 0) & (tiny <= 2.0**-125))
    assert exp2(mx.array([-math.inf, -1e30, -127.0])).tolist() == [0, 0, 0]
    assert np.isnan(np.array(exp2(mx.array([math.nan]))))


def exact(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Mask
) -> tuple[np.ndarray, float]:
    """Attention in float64, a loop for each head; and the largest score."""
    queries, keys, values = (np.array(a, dtype=np.float64) for a in (q, k, v))
    (B, H, L, _), (_, kv_heads, T, D) = queries.shape, keys.shape
    visible = np.ones((L, T), dtype=bool)
    if mask is not None:
        visible = np.array(causal_mask(L, T - L, None) if isinstance(mask, str) else mask)
    out, largest = np.zeros((B, H, L, D)), 0.0
    for head in range(H):
        group = head // (H // kv_heads)
        scores = queries[:, head] @ keys[:, group].swapaxes(-1, -2) * scale
        largest = max(largest, np.abs(scores).max())
        scores = np.where(visible, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out[:, head] = weights / weights.sum(axis=-1, keepdims=True) @ values[:, group]
    return out, largest


@settings(max_examples=80, deadline=None)
@given(st.data())
@slow
def test_slices_are_the_same_attention(data: st.DataObject) -> None:
    draw = data.draw
    kv_heads = draw(st.integers(1, 3))
    H, D = kv_heads * draw(st.integers(1, 4)), draw(st.sampled_from([8, 32]))
    L, before = draw(st.integers(1, 70)), draw(st.integers(0, 90))
    B, size = draw(st.integers(1, 2)), draw(st.sampled_from([1, 200, 3000, 1 << 17]))
    kind = draw(st.sampled_from(["none", "causal", "window"]))
    mask: Mask = {"none": None, "causal": "causal"}.get(kind)
    if kind == "window":
        mask = causal_mask(L, before, draw(st.integers(1, L + before)))
    spread = draw(st.sampled_from([0.1, 1.0, 30.0]))  # up to scores of some thousands
    mx.random.seed(draw(st.integers(0, 1000)))
    T = before + L
    queries = mx.random.normal((B, H, L, D)) * spread
    keys, values = (mx.random.normal((B, kv_heads, T, D)) * a for a in (spread, 1.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "SLICE", size)
        patch.setattr(cpu, "_ROWS", draw(st.integers(1, 5)))
        found = np.array(attend_in_slices(queries, keys, values, D**-0.5, mask), np.float64)
    wanted, largest = exact(queries, keys, values, D**-0.5, mask)
    # A score of float32 is known to some of its own last places, and so is its exponential.
    bound = (1e-6 + 4 * 2.0**-24 * largest) * np.abs(np.array(values)).max()
    assert found.shape == wanted.shape
    assert np.max(np.abs(found - wanted)) <= bound


@pytest.mark.parametrize("length", [1, 3, 7])
@pytest.mark.parametrize("kind", ["none", "causal", "window", "rows"])
def test_heads_that_share_keys_are_rows_of_one_product(length: int, kind: str) -> None:
    """On entries that are part of a buffer, as caches give them."""
    mx.random.seed(length)
    queries = mx.random.normal((2, 6, length, 8))
    keys, values = (mx.random.normal((2, 2, 30, 8))[..., 3:23, :] for _ in range(2))
    before = 20 - length
    near = causal_mask(length, before, 5)
    masks: dict[str, Mask] = {"none": None, "causal": "causal", "window": near}
    mask = masks.get(kind, near)
    wanted, _ = exact(queries, keys, values, 0.3, mask)
    if kind == "rows":  # each sequence has its own
        mask = mx.broadcast_to(near, (2, 1, length, 20))
    found = attend_by_rows(queries, keys, values, 0.3, mask)
    assert np.max(np.abs(np.array(found) - wanted)) < 1e-6


@pytest.mark.skipif(not device.on_linux_cpu(), reason="Linux's CPU only")
def test_rows_are_taken_where_they_pay() -> None:
    assert by_rows(1, 3, 400)
    assert not by_rows(1, 3, 401)  # 1203 scores; a head's alone are few enough
    assert not by_rows(1, 3, 1200)
    assert by_rows(1, 3, 1201)
    assert by_rows(7, 4, 4096)
    assert not by_rows(8, 4, 4096)


def test_what_is_hidden_has_no_part_in_it() -> None:
    """Not even as the smallest weight there is, of the largest value."""
    keys, queries = mx.random.normal((1, 1, 600, 8)), mx.random.normal((1, 2, 600, 8))
    values = mx.where(mx.arange(600)[:, None] < 300, 1.0, 3e38) * mx.ones((1, 1, 600, 8))
    found = attend_in_slices(queries, keys, values, 1.0, "causal")[:, :, :300]
    assert mx.allclose(found, mx.ones_like(found), rtol=0, atol=1e-5)


@pytest.mark.skipif(not device.on_linux_cpu(), reason="Linux's CPU only")
def test_slices_are_taken_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_slices(256, 256, mx.float32, "causal")
    assert in_slices(256, 256, mx.float32, causal_mask(256, 0, 12))
    assert not in_slices(255, 256, mx.float32, "causal")
    assert not in_slices(1, 4096, mx.float32, None)
    assert not in_slices(1, 1 << 17, mx.float32, None)
    assert not in_slices(256, 256, mx.bfloat16, "causal")
    assert not in_slices(256, 256, mx.float32, mx.ones((2, 1, 256, 256), dtype=mx.bool_))
    taken = []

    def noted(queries: mx.array, *rest: Any) -> mx.array:
        taken.append(queries.shape)
        return queries

    monkeypatch.setattr("mlx_cerebrum.model.attention.attend_in_slices", noted)
    for length in (256, 1):
        entries = mx.zeros((1, 1, 512, 8))
        attend(mx.zeros((1, 2, length, 8)), entries, entries, 1.0, "causal")
    assert taken == [(1, 2, 256, 8)]


@pytest.mark.skipif(not device.on_linux_cpu(), reason="Linux's CPU only")
@slow
def test_a_model_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past its window, in chunks of several lengths: slices or not, the same tokens and logits."""
    raw = {"model_type": "mistral", "hidden_size": 64, "intermediate_size": 96, "vocab_size": 97}
    raw |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
    raw |= {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 40}
    raw |= {"max_position_embeddings": 4096, "tie_word_embeddings": False}
    mx.random.seed(3)
    model = Model(ModelConfig.from_dict(raw))
    prompt = [(7 * n * n + 3) % 97 for n in range(200)]
    found, tokens = [], []
    for least in (1 << 30, 1):
        monkeypatch.setattr(cpu, "LEAST", least)
        monkeypatch.setattr(cpu, "_FEWEST", 1)
        monkeypatch.setattr(cpu, "SLICE", 500)
        monkeypatch.setattr(cpu, "_ROWS", 2)
        found.append(model(mx.array([prompt])))
        for step in (200, 64, 33):
            tokens.append(list(generate_step(prompt, model, max_tokens=24, prefill_step_size=step)))
    assert mx.allclose(found[0], found[1], rtol=0, atol=1e-5)
    assert all(one == tokens[0] for one in tokens)


@pytest.mark.skipif(not device.on_linux_cpu(), reason="Linux's CPU only")
@pytest.mark.parametrize("heads", [2, 4, 9])
@pytest.mark.parametrize(
    ("length", "keys"), [(256, 300), (250, 750), (256, 2048), (512, 3000), (200, 8000)]
)
@pytest.mark.one_in(16)
def test_memory_of_slices_is_predicted(heads: int, length: int, keys: int) -> None:
    queries = mx.random.normal((1, heads, length, 64))

    def peak(keys: int) -> float:
        entries = mx.random.normal((1, 1, keys, 64))
        mx.eval(queries, entries)
        mx.synchronize()
        before = resting()
        mx.eval(attend_in_slices(queries, entries, entries, 0.1, "causal"))
        return (mx.get_peak_memory() - before) / 4 - 3 * queries.size  # scaled, stacked, joined

    fullest = SLICE // length  # one slice for each head
    most = max(peak(n) for n in (keys, min(keys, fullest), min(keys, 2 * fullest)) for _ in "abc")
    assert scores_held(length, keys, heads) == pytest.approx(most, rel=0.2)
