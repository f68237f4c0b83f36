"""Packed cache entries: the same attention as over dense ones of the same values."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config, tiny_prompt, tiny_weights

from mlx_cerebrum import device, load
from mlx_cerebrum.decoding.decoder import generate_step
from mlx_cerebrum.decoding.speculative import speculation
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model import attention
from mlx_cerebrum.model.attention import attend
from mlx_cerebrum.model.cache import REWIND, WindowedKVCache, causal_mask
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.entries import KV_BITS, Packed, check_kv_bits, kv_group, unpack
from mlx_cerebrum.model.forward import Model

MAP = (0, 1, 2, 1, 2, 3)
WINDOW = 12
PATHS = (0, REWIND)  # packed_rows(): none, and what it is on a GPU


@pytest.fixture(params=PATHS, ids=["unpacked", "as they are"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    rows: int = request.param
    monkeypatch.setattr(attention, "packed_rows", lambda: rows)
    return rows


def pack(entries: mx.array, bits: int) -> Packed:
    return Packed(*mx.quantize(entries, kv_group(entries.shape[-1]), bits))


def expected(queries: mx.array, keys: mx.array, values: mx.array, visible: Any) -> Any:
    """Attention as it is defined, a head at a time, in float64."""
    q, k, v = (np.array(array, dtype=np.float64) for array in (queries, keys, values))
    out = np.zeros_like(q)
    shared = q.shape[1] // k.shape[1]
    for batch in range(q.shape[0]):
        for head in range(q.shape[1]):
            own = batch, head // shared
            scores = q[batch, head] @ k[own].T / np.sqrt(q.shape[-1])
            scores = np.where(visible, scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[batch, head] = weights / weights.sum(axis=-1, keepdims=True) @ v[own]
    return out


@given(
    rows=st.sampled_from(PATHS),
    bits=st.sampled_from(KV_BITS),
    width=st.sampled_from([32, 64, 96, 128]),
    heads=st.sampled_from([(4, 4), (4, 2), (9, 3), (8, 1)]),
    L=st.sampled_from([1, 2, 5, 17, 70]),
    before=st.integers(0, 40),
    kind=st.sampled_from(["none", "causal", "window"]),
    batch=st.integers(1, 2),
)
@settings(deadline=None, max_examples=50)
def test_packed_is_dense_over_what_was_packed(
    rows: int,
    bits: int,
    width: int,
    heads: tuple[int, int],
    L: int,
    before: int,
    kind: str,
    batch: int,
) -> None:
    mx.random.seed(before)
    T = before + L
    queries = 2 * mx.random.normal((batch, heads[0], L, width))
    keys, values = (
        pack(mx.random.normal((batch, heads[1], T, width)), bits) for _ in ("keys", "values")
    )
    mask: Any = {"none": None, "causal": "causal", "window": causal_mask(L, before, 7)}[kind]
    visible = {"none": True, "causal": causal_mask(L, before, None)}.get(kind, mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "packed_rows", lambda: rows)
        found = attend(queries, keys, values, width**-0.5, mask)
    assert found.dtype == queries.dtype
    dense = unpack(keys, width), unpack(values, width)
    wanted = expected(queries, *dense, np.array(visible))
    np.testing.assert_allclose(np.array(found), wanted, rtol=0, atol=1e-5)


def test_sixteen_bits_stay_sixteen_bits(path: int) -> None:
    shape = (1, 2, 30, 64)
    for dtype, within in ((mx.float16, 4e-3), (mx.bfloat16, 3e-2)):
        queries = mx.random.normal((1, 4, 5, 64)).astype(dtype)
        keys, values = (pack(mx.random.normal(shape).astype(dtype), 8) for _ in range(2))
        found = attend(queries, keys, values, 0.125, "causal")
        assert found.dtype == dtype
        k, v = (unpack(entries, 64).astype(mx.float32) for entries in (keys, values))
        wanted = expected(queries.astype(mx.float32), k, v, np.array(causal_mask(5, 25, None)))
        np.testing.assert_allclose(np.array(found.astype(mx.float32)), wanted, atol=within)


def test_multiplied_as_they_are_nothing_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "packed_rows", lambda: REWIND)
    monkeypatch.setattr(mx, "dequantize", None)
    keys, values = (pack(mx.random.normal((1, 2, 30, 64)), 4) for _ in range(2))
    mx.eval(attend(mx.zeros((1, 4, REWIND, 64)), keys, values, 0.125, None))
    with pytest.raises(TypeError):
        attend(mx.zeros((1, 4, REWIND + 1, 64)), keys, values, 0.125, None)


@pytest.mark.parametrize(("length", "rows"), [(1, 1), (3, 3), (4, 16)])
def test_few_queries_multiply_values_a_head_at_a_time(
    length: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metal's vector kernel takes three rows; four heads of one kv head would be too many."""
    multiply: Any = mx.quantized_matmul
    shapes: list[tuple[int, ...]] = []
    products: list[mx.array] = []

    def noted(x: mx.array, *packed: mx.array, **named: Any) -> mx.array:
        shapes.append(x.shape)
        products.append(multiply(x, *packed, **named))
        return products[-1]

    monkeypatch.setattr(device, "backend", lambda: "metal")
    monkeypatch.setattr(mx, "quantized_matmul", noted)
    keys, values = (pack(mx.random.normal((1, 2, 30, 64)), 4) for _ in range(2))
    mx.eval(attend(mx.random.normal((1, 8, length, 64)), keys, values, 0.125, "causal"))
    assert shapes == [(1, 2, 4 * length, 64), (1, 2, 4 * length // rows, rows, 30)]
    weights = mx.softmax(products[0].reshape(1, 2, 4, length, 30), axis=-1, precise=True)
    if length == 1:  # nothing is hidden: the same bits as all at once
        named = {"transpose": False, "group_size": 64, "bits": 4}
        together = multiply(weights.reshape(1, 2, 4, 30), *values, **named)
        assert mx.array_equal(together, products[1].reshape(together.shape))


def test_drafts_take_metals_path_of_plain_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round has at most as many rows as a cache can take back tokens, and one."""
    monkeypatch.setattr(device, "backend", lambda: "metal")
    assert attention.packed_rows() == REWIND


def build(window: int | None = WINDOW, **changes: Any) -> Model:
    raw = tiny_config(head_dim=32, num_hidden_layers=4, sliding_window=window, **changes)
    model = Model(ModelConfig.from_dict(raw).with_map(MAP))
    weights = tiny_weights(raw, seed=11)
    model.load_weights([(name, mx.array(value)) for name, value in weights.items()])
    return model


def tokens(length: int) -> mx.array:
    return mx.array([tiny_prompt(tiny_config(), length, 5)])


def in_chunks(model: Model, ids: mx.array, chunk: int, cache: Sequence[Any]) -> mx.array:
    parts = [model(ids[:, i : i + chunk], cache) for i in range(0, ids.shape[1], chunk)]
    return mx.concatenate(parts, axis=1)


class Rounded(WindowedKVCache):
    """Dense entries of the values that packed ones stand for."""

    def __init__(self, window: int | None, to: int) -> None:
        super().__init__(window)
        self.to = to

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        width = keys.shape[-1]
        rounded = (unpack(pack(entries, self.to), width) for entries in (keys, values))
        return super().update_and_fetch(*rounded)


@pytest.mark.parametrize("bits", KV_BITS)
@pytest.mark.parametrize("window", [WINDOW, None])
@pytest.mark.parametrize("chunk", [1, 5, 50])
@pytest.mark.one_in(12)
def test_a_packed_cache_is_a_dense_one_of_rounded_entries(
    chunk: int, window: int | None, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the whole model, past the window and a compaction, to the last bit."""
    monkeypatch.setattr(attention, "packed_rows", lambda: 0)
    model, ids = build(window), tokens(300 if chunk == 50 else 6 * WINDOW)
    rounded = [Rounded(window, bits) for _ in MAP]
    found = in_chunks(model, ids, chunk, model.make_cache(bits))
    assert mx.array_equal(found, in_chunks(model, ids, chunk, rounded))
    assert not mx.array_equal(found, in_chunks(model, ids, chunk, model.make_cache()))


@pytest.mark.parametrize("bits", KV_BITS)
@pytest.mark.parametrize("window", [WINDOW, None])
@pytest.mark.parametrize("chunk", [1, 5, 50])
@pytest.mark.one_in(12)
def test_prefill_in_chunks_is_prefill_in_one_piece(
    chunk: int, window: int | None, bits: int, path: int
) -> None:
    """Up to what packing itself does: other sums round a value to the other side of a step."""
    model, ids = build(window), tokens(6 * WINDOW)
    whole = model(ids, model.make_cache(bits))
    chunked = in_chunks(model, ids, chunk, model.make_cache(bits))
    packing = mx.abs(model(ids) - whole)
    assert mx.abs(chunked - whole).max() <= packing.max()
    assert mx.abs(chunked - whole).mean() <= packing.mean()
    assert packing.max() < 0.4


@pytest.mark.parametrize("bits", KV_BITS)
@pytest.mark.one_in(8)
def test_rollback_is_exact_past_the_window(bits: int, path: int) -> None:
    """At every offset across several compactions, to the last bit."""
    model, ids = build(), tokens(3 * WINDOW)

    def caches() -> list[WindowedKVCache]:
        return [WindowedKVCache(WINDOW, rewind=6, step=8, kv_bits=bits) for _ in MAP]

    plain, cache = caches(), caches()
    for n in range(ids.shape[1] - 6):
        wanted = model(ids[:, n : n + 1], plain)
        model((ids[:, n : n + 6] + 7) % 200 + 5, cache)
        assert all(layer_cache.trim(6) == 6 for layer_cache in cache)
        assert mx.array_equal(model(ids[:, n : n + 1], cache), wanted)


@pytest.mark.parametrize("bits", KV_BITS)
def test_a_marked_point_comes_back(bits: int) -> None:
    model, ids = build(), tokens(5 * WINDOW)
    cache = [WindowedKVCache(WINDOW, rewind=2, step=4, kv_bits=bits) for _ in MAP]
    model(ids[:, :9], cache)
    for layer_cache in cache:
        layer_cache.mark()
    wanted = model(ids[:, 9:10], cache)
    in_chunks(model, ids[:, 10:], 1, cache)
    for layer_cache in cache:
        layer_cache.rewind_to(9)
    assert mx.array_equal(model(ids[:, 9:10], cache), wanted)


@pytest.mark.parametrize("bits", KV_BITS)
def test_a_saved_state_goes_on_alike(bits: int) -> None:
    model, ids = build(), tokens(3 * WINDOW)
    cache = model.make_cache(bits)
    model(ids[:, :-1], cache)
    other = [WindowedKVCache.from_state(layer_cache.state) for layer_cache in cache]
    assert mx.array_equal(model(ids[:, -1:], other), model(ids[:, -1:], cache))


@given(
    bits=st.sampled_from(KV_BITS),
    width=st.sampled_from([32, 64, 96, 128]),
    dtype=st.sampled_from([mx.float32, mx.bfloat16]),
    length=st.integers(1, 600),
)
@settings(deadline=None, max_examples=30)
def test_bytes_are_what_arithmetic_says(
    bits: int, width: int, dtype: mx.Dtype, length: int
) -> None:
    dense, packed = WindowedKVCache(), WindowedKVCache(kv_bits=bits)
    entries = mx.zeros((1, 2, length, width), dtype)
    for cache in (dense, packed):
        cache.update_and_fetch(entries, entries)
    group = 64 if width % 64 == 0 else 32
    value_bytes = bits / 8 + 2 * dtype.size / group
    assert packed.nbytes == dense.nbytes / dtype.size * value_bytes


def test_what_can_not_be_packed_is_refused_in_one_line() -> None:
    config = ModelConfig.from_dict(tiny_config())
    check_kv_bits(config, None)
    check_kv_bits(replace(config, head_dim=96), 4)
    for width, bits in ((16, 8), (80, 4), (64, 5), (64, 0)):
        with pytest.raises(RequestError) as caught:
            check_kv_bits(replace(config, head_dim=width), bits)
        assert "kv-bits" in str(caught.value)
        assert "\n" not in str(caught.value)


def last_logits(model: Model, ids: mx.array, chunk: int, bits: int) -> mx.array:
    cache = model.make_cache(bits)
    for start in range(0, ids.shape[1], chunk):
        h = model.run(model.embed(ids[:, start : start + chunk]), cache)
        mx.eval(h)
    return model.logits(h[:, -1:])[0, 0]


@pytest.mark.long
@pytest.mark.parametrize("bits", [4, 8])
def test_drafting_writes_what_plain_decoding_writes(
    bits: int, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to a token whose two best logits are closer than rows together are to rows alone."""
    model, tokenizer = load(demo, dtype="float32", window=24)
    model = model.view((*range(6), *range(24, 30)))  # 12 positions are enough to see it, and fast
    prompt = tokenizer.encode("The cat sat on the mat. The dog sat on the mat. The cat sat on")
    plain = list(generate_step(prompt, model, max_tokens=16, cache=model.make_cache(bits)))
    guesses = speculation(model)

    def always(seen: Sequence[int], most: int) -> tuple[str, str, int] | None:
        kind, count = guesses.drafters["ngram"].offer(seen, min(most, 2))
        return ("ngram", kind, count) if count else None

    monkeypatch.setattr(guesses, "choose", always)
    cache = model.make_cache(bits)
    drafted = list(generate_step(prompt, model, speculation=guesses, max_tokens=16, cache=cache))
    assert sum(drafts for _, drafts, _ in guesses.rounds) > 0
    apart = [n for n, pair in enumerate(zip(plain, drafted, strict=True)) if pair[0] != pair[1]]
    if apart:
        one, other = plain[apart[0]], drafted[apart[0]]
        ids = mx.array([[*prompt, *plain[: apart[0]]]])
        alone, together = (last_logits(model, ids, n, bits) for n in (1, ids.shape[1]))
        noise = mx.abs(alone - together).max()
        assert mx.abs(alone[one] - alone[other]) <= 2 * noise < 2
