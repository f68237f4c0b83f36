"""What Metal's kernels would copy before they compute, told from the layouts they are given.

The rules are those of MLX 0.32.2: rope.cpp and scaled_dot_product_attention.cpp in its
`mlx/backend/metal`. No graph shows these copies, since the kernels' own code makes them.
"""

from typing import Any

import mlx.core as mx
import pytest
from tiny import tiny_config

from mlx_cerebrum import device
from mlx_cerebrum.model.attention import Span, Spans
from mlx_cerebrum.model.cache import WindowedKVCache
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Attention, TransformerBlock
from mlx_cerebrum.weights.loading import fuse_projections


def strides(array: mx.array) -> tuple[int, ...]:
    """In values, of a float32 array."""
    mx.eval(array)
    buffer: Any = array
    seen = memoryview(buffer).strides
    assert seen is not None
    return tuple(stride // 4 for stride in seen)


def in_order(array: mx.array) -> bool:
    """Whether its values lie one after the other."""
    expected, found = 1, zip(array.shape[::-1], strides(array)[::-1], strict=True)
    for length, stride in found:
        if length > 1 and stride != expected:
            return False
        expected *= length
    return True


def rope_copies(x: mx.array) -> bool:
    """`x` is `[B, H, L, D]`; of one sequence any strides will do."""
    B, H, L, D = x.shape
    return not (B == 1 or in_order(x) or strides(x)[:3] == (L * H * D, D, H * D))


def attention_copies(queries: mx.array) -> bool:
    """`queries` are `[B, H, L, D]`."""
    B, H, L, D = queries.shape
    if L > 8:
        return strides(queries)[3] != 1
    return not (in_order(queries) or (B == 1 and strides(queries)[1:] == (D, H * D, 1)))


@pytest.fixture
def attention() -> Attention:
    """One whose projections are fused, 4 heads and 2 of keys and values."""
    block = TransformerBlock(ModelConfig.from_dict(tiny_config()))
    fuse_projections(block)
    return block.self_attn


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[bool]]:
    """As on Metal: whether each rotation, and each attention, would have copied."""
    found: dict[str, list[bool]] = {"rope": [], "attention": []}
    rope, attend = mx.fast.rope, mx.fast.scaled_dot_product_attention

    def noted_rope(x: mx.array, *rest: Any, **named: Any) -> mx.array:
        found["rope"].append(rope_copies(x))
        return rope(x, *rest, **named)

    def noted_attention(queries: mx.array, *rest: Any, **named: Any) -> mx.array:
        found["attention"].append(attention_copies(queries))
        return attend(queries, *rest, **named)

    monkeypatch.setattr(device, "backend", lambda: "metal")
    monkeypatch.setattr(mx.fast, "rope", noted_rope)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", noted_attention)
    return found


@pytest.mark.parametrize("length", [1, 3, 20])
def test_one_sequence_costs_no_copy(
    length: int, attention: Attention, copies: dict[str, list[bool]]
) -> None:
    cache = WindowedKVCache()
    for step in (length, length):
        attention(mx.random.normal((1, step, 64)), "causal" if step > 1 else None, cache)
    assert copies == {"rope": [False, False], "attention": [False, False]}


@pytest.mark.parametrize(("length", "copied"), [(1, True), (3, True), (20, False)])
def test_several_copy_their_queries_only(
    length: int, copied: bool, attention: Attention, copies: dict[str, list[bool]]
) -> None:
    attention(
        mx.random.normal((3, length, 64)), "causal" if length > 1 else None, WindowedKVCache()
    )
    assert copies == {"rope": [False], "attention": [copied]}


def test_sequences_with_caches_of_their_own(
    attention: Attention, copies: dict[str, list[bool]]
) -> None:
    """Two that are decoded, and a prompt of 12 tokens."""
    spans = [Span(1, n, WindowedKVCache(), "causal" if n > 1 else None) for n in (1, 1, 12)]
    attention(mx.random.normal((14, 1, 64)), None, Spans(mx.arange(14), spans))
    assert copies["rope"] == [False]
    assert copies["attention"] == [False, False, False]
