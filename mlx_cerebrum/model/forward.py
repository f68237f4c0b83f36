"""The whole forward pass: Mistral, with its blocks run in the order of a layer map.

Mistral 7B (Jiang et al. 2023, arXiv 2310.06825): RMSNorm before attention and MLP,
rotary positions, grouped-query attention over a sliding window, SwiGLU. Module names are
Hugging Face's, so a checkpoint's tensors load under the names they have on disk.

A *block* is one stored decoder layer, a *position* one step of the forward pass. The layer
map names the block of each position: 0..31 for the 7B; for the 12.25B the same 32 blocks in
56 positions. Every position has its own KV cache, also where two run the same block.

Several sequences, of any maps over the same blocks, take one step together in `together.py`.
`cpu.Linear`, `cpu.Embedding` and `cpu.Rotary` are MLX's own on a GPU, and another way on a CPU.
Shapes: B sequences, L new tokens, T visible keys, D = hidden_size, H heads of width `head_dim`.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_cerebrum import device
from mlx_cerebrum.model.attention import Scales, Spans, attend
from mlx_cerebrum.model.cache import Cache, Mask, WindowedKVCache, attention_mask
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.cpu import Embedding, Linear, Rotary
from mlx_cerebrum.model.entries import check_kv_bits


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    # One kernel for three on a GPU. On the CPU `mx.compile` would start a C++ compiler first.
    return _swiglu_in_one(gate, up) if device.on_gpu() else _swiglu(gate, up)


def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


_swiglu_in_one = mx.compile(_swiglu, shapeless=True)


class Attention(nn.Module):
    """Grouped-query attention. As loaded, `qkv_proj` stands for q_proj, k_proj and v_proj
    (loading.fuse_projections); MLP has `gate_up_proj` likewise."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, width = config.hidden_size, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.scale = width**-0.5
        self.q_proj = Linear(D, self.heads * width, bias=False)
        self.k_proj = Linear(D, self.kv_heads * width, bias=False)
        self.v_proj = Linear(D, self.kv_heads * width, bias=False)
        self.o_proj = Linear(self.heads * width, D, bias=False)
        self.rope = Rotary(width, config.rope_theta)

    def __call__(self, x: mx.array, mask: Mask, cache: Cache | Spans | None) -> mx.array:
        """`[B, L, D]` -> `[B, L, D]`; `mask` is None, "causal" or boolean `[L, T]`."""
        B, L, _ = x.shape
        offset = 0 if cache is None else cache.offset  # tokens before these: RoPE's position
        if "qkv_proj" in self:  # fused by the loader: one matmul for three, one rotation for two
            heads = self.qkv_proj(x).reshape(B, L, self.heads + 2 * self.kv_heads, -1)
            heads = heads.swapaxes(1, 2)  # [B, all heads, L, head_dim]; the values' are not rotated
            queries, keys = mx.split(self.rope(heads, offset, self.kv_heads), [self.heads], axis=1)
            values = heads[:, -self.kv_heads :]
        else:
            queries = self.q_proj(x).reshape(B, L, self.heads, -1).swapaxes(1, 2)
            keys = self.k_proj(x).reshape(B, L, self.kv_heads, -1).swapaxes(1, 2)
            values = self.v_proj(x).reshape(B, L, self.kv_heads, -1).swapaxes(1, 2)
            queries, keys = self.rope(queries, offset), self.rope(keys, offset)
        if isinstance(cache, Spans):  # several caches, each for some of the tokens
            out = cache.attend(queries, keys, values, self.scale)
        else:
            if cache is not None:
                keys, values = cache.update_and_fetch(keys, values)  # [B, kv heads, T, head_dim]
            out = attend(queries, keys, values, self.scale, mask)
        return self.o_proj(out.swapaxes(1, 2).reshape(B, L, -1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(D, inner, bias=False)
        self.up_proj = Linear(D, inner, bias=False)
        self.down_proj = Linear(inner, D, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """`[B, L, D]` -> `[B, L, D]`."""
        if "gate_up_proj" in self:  # fused by the loader: one matmul for two
            gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(swiglu(gate, up))


class SharedWeights(nn.Module):
    """A module whose weights may serve several models; then they can't be changed."""

    viewed = False

    def update(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse_if_viewed()
        return super().update(*args, **kwargs)

    def update_modules(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse_if_viewed()
        return super().update_modules(*args, **kwargs)

    def _refuse_if_viewed(self) -> None:
        if self.viewed:
            raise RuntimeError("these weights serve several views: change them before view()")


def _norm(config: ModelConfig) -> nn.RMSNorm:
    norm = nn.RMSNorm(config.hidden_size)
    norm.eps = config.rms_norm_eps  # given above, MLX refuses a zero, which transformers runs
    return norm


class TransformerBlock(SharedWeights):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = _norm(config)
        self.post_attention_layernorm = _norm(config)

    def __call__(
        self, x: mx.array, mask: Mask, cache: Cache | Spans | None, scales: Scales | None
    ) -> mx.array:
        """`[B, L, D]` -> `[B, L, D]`; `scales` weigh what attention and MLP add to the stream."""
        attention = self.self_attn(self.input_layernorm(x), mask, cache)
        h = x + (attention if scales is None else attention * scales[0])
        mlp = self.mlp(self.post_attention_layernorm(h))
        return h + (mlp if scales is None else mlp * scales[1])


class Stack(SharedWeights):
    """Everything under Hugging Face's `model.`: embedding, stored blocks, final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = [TransformerBlock(config) for _ in range(config.num_hidden_layers)]
        self.norm = _norm(config)


class Model(SharedWeights):
    """Token ids in, logits out. `config.layer_map` decides which block runs when."""

    elsewhere: Any = None  # runs steps whose blocks other machines hold too (`run_together`)

    def __init__(self, config: ModelConfig, model: Stack | None = None) -> None:
        super().__init__()
        self.config = config
        self.model = Stack(config) if model is None else model
        if model is None and not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(self, tokens: mx.array, cache: Sequence[Cache] | None = None) -> mx.array:
        """Token ids `[B, L]` -> logits `[B, L, V]`, appending to `cache` if there is one."""
        return self.logits(self.run(self.embed(tokens), cache))

    @property
    def dtype(self) -> mx.Dtype:
        """Of activations and cache entries; packed weights have another."""
        return self.model.norm.weight.dtype

    def embed(self, tokens: mx.array) -> mx.array:
        """Token ids `[B, L]` -> `[B, L, D]`, what the first position takes."""
        # A no-op but for 8-bit float scales, whose embedding comes out as bfloat16.
        return self.model.embed_tokens(tokens).astype(self.dtype)

    def run(
        self,
        h: mx.array,
        cache: Sequence[Cache] | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> mx.array:
        """`[B, L, D]` -> `[B, L, D]`: through the map's positions `start` to `stop`."""
        window, layer_map = self.config.sliding_window, self.config.layer_map
        L = h.shape[1]
        if cache is not None and len(cache) != len(layer_map):
            raise ValueError(f"{len(cache)} caches for {len(layer_map)} positions")
        # These positions have seen the same tokens (equal offsets), so one mask serves them all.
        mask = (
            attention_mask(L, 0, window)
            if cache is None
            else cache[start].make_mask(L, return_array=False, window_size=window)
        )
        for position in range(len(layer_map))[start:stop]:
            block, scales = self.model.layers[layer_map[position]], self.config.residual_scales
            own = None if cache is None else cache[position]
            h = block(h, mask, own, None if scales is None else scales[position])
        return h

    def logits(self, h: mx.array) -> mx.array:
        """What the last position gives, `[B, L, D]` -> `[B, L, V]`."""
        h = self.model.norm(h)
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(h)
        return self.lm_head(h)

    def make_cache(self, kv_bits: int | None = None) -> list[WindowedKVCache]:
        """An empty cache for every position, packed to `kv_bits` (8 or 4) where given.

        Raises RequestError for heads that can't be packed.
        """
        check_kv_bits(self.config, kv_bits)
        window = self.config.sliding_window
        return [WindowedKVCache(window, kv_bits=kv_bits) for _ in self.config.layer_map]

    def view(
        self,
        layer_map: tuple[int, ...],
        residual_scales: tuple[tuple[float, float], ...] | None = None,
    ) -> "Model":
        """Another model over the same weights: no copy, no memory.

        From then on the weights can't be changed: to quantize, cast or load them, in either model
        or a part of it, raises RuntimeError. Raises ConfigError for a map these blocks can't run.
        """
        other = Model(self.config.with_map(layer_map, residual_scales), self.model)
        if not self.config.tie_word_embeddings:
            other.lm_head = self.lm_head
        for shared in (self, other, self.model, *self.model.layers):
            shared.viewed = True
        return other
