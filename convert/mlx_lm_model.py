# Copyright the mlx-cerebrum authors. SPDX-License-Identifier: Apache-2.0
"""mlx-lm's `model_file` for a folded checkpoint: blocks stored once, run in `layer_map`'s order.

config.json names this file; mlx-lm runs it when told to (`--trust-remote-code`). It needs
mlx-lm 0.32 or newer and nothing else. The blocks are mlx-lm's own Llama blocks, the caches its
own rotating ones; new here are the order, the residual scales and the sliding window.

A block is one stored layer, a position one step of the forward pass. Weights belong to blocks
(`model.layers`), caches to positions: two positions that run one block have a cache each.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache


@dataclass
class ModelArgs:
    blocks: llama.ModelArgs  # the geometry, as mlx-lm's Llama reads it
    layer_map: list[int]  # which block runs at each position
    residual_scales: list[Any]  # per position: [attention, mlp], or None for unscaled
    sliding_window: int | None  # tokens a query sees, its own included; None: all

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "ModelArgs":
        layer_map = config["layer_map"]
        return cls(
            blocks=llama.ModelArgs.from_dict(config),
            layer_map=layer_map,
            residual_scales=config.get("residual_scales") or [None] * len(layer_map),
            sliding_window=config["sliding_window"],
        )


class Stack(nn.Module):
    """Embedding, stored blocks and final norm, under the names the checkpoint has."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        blocks = args.blocks
        self.embed_tokens = nn.Embedding(blocks.vocab_size, blocks.hidden_size)
        self.layers = [llama.TransformerBlock(blocks) for _ in range(blocks.num_hidden_layers)]
        self.norm = nn.RMSNorm(blocks.hidden_size, eps=blocks.rms_norm_eps)


class Model(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.model_type = args.blocks.model_type
        self.model = Stack(args)
        if not args.blocks.tie_word_embeddings:
            self.lm_head = nn.Linear(args.blocks.hidden_size, args.blocks.vocab_size, bias=False)

    def __call__(
        self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        """Token ids `[B, L]` -> logits `[B, L, V]`."""
        h = self.model.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        # A no-op but for embeddings with 8-bit float scales, which come out as bfloat16.
        h = h.astype(self.model.norm.weight.dtype)
        layers, scales = self.layers, self.args.residual_scales
        caches = [None] * len(layers) if cache is None else cache
        # Every position has seen the same tokens, so the first one's mask serves them all.
        mask = create_attention_mask(h, caches[0], window_size=self.args.sliding_window)
        for block, layer_cache, scale in zip(layers, caches, scales, strict=True):
            if scale is None:
                h = block(h, mask, layer_cache)
            else:  # the same block, written out: each of its two residual writes is weighed
                h = h + block.self_attn(block.input_layernorm(h), mask, layer_cache) * scale[0]
                h = h + block.mlp(block.post_attention_layernorm(h)) * scale[1]
        h = self.model.norm(h)
        tied = self.args.blocks.tie_word_embeddings
        logits: mx.array = self.model.embed_tokens.as_linear(h) if tied else self.lm_head(h)
        return logits

    @property
    def layers(self) -> list[nn.Module]:
        """The block of each position: mlx-lm takes the length for the number of caches.

        A property, so that walking the parameters meets each block once, under `model`.
        """
        return [self.model.layers[block] for block in self.args.layer_map]

    def make_cache(self) -> list[Any]:
        """An empty cache for every position."""
        window = self.args.sliding_window
        return [
            KVCache() if window is None else RotatingKVCache(max_size=window, keep=0)
            for _ in self.args.layer_map
        ]
