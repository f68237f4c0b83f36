"""A float64 Mistral in numpy, written apart from the engine, that can be made wrong on purpose.

Two uses, both while the golden files are made:

- right, it says how far transformers' float32 logits are from the exact ones: the room an
  honest float32 engine needs;
- wrong, it says how far each mistake moves the logits: the tolerance has to lie well below.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Fault:
    """What to get wrong. (A wrong window, eps or map needs none: pass a wrong config or map.)"""

    query_shift: int = 0  # queries are rotated this many positions too far
    decode_shift: int = 0  # every chunk after the first is placed this much too late
    interleaved: bool = False  # rotate pairs (0, 1), (2, 3), ...: llama.cpp's row order left in
    tiled_heads: bool = False  # query head h reads kv head h % kv_heads, not h // group
    shared_cache: tuple[int, int] | None = None  # these two positions use one cache,
    overwrite: bool = False  # the second writing over the first's entries, or else behind them


RIGHT = Fault()


class _Cache:
    """Rotated keys and values of one position, [T, kv_heads, head_dim] each."""

    def __init__(self, kv_heads: int, head_dim: int) -> None:
        self.keys = self.values = np.zeros((0, kv_heads, head_dim))

    def write(self, start: int, keys: Array, values: Array) -> None:
        self.keys = np.concatenate([self.keys[:start], keys])
        self.values = np.concatenate([self.values[:start], values])


def logits(
    config: dict[str, Any],
    weights: dict[str, npt.NDArray[np.float32]],
    layer_map: list[int],
    chunks: list[list[int]],
    fault: Fault = RIGHT,
) -> Array:
    """Logits [sum of chunk lengths, vocab] of `chunks` fed one after the other."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    caches = [_Cache(config["num_key_value_heads"], config["head_dim"]) for _ in layer_map]
    if fault.shared_cache is not None:
        first, second = fault.shared_cache
        caches[second] = caches[first]
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    rows, fed = [], 0
    for chunk in chunks:
        h = w["model.embed_tokens.weight"][chunk]  # [L, hidden]
        for cache, block in zip(caches, layer_map, strict=True):
            name = f"model.layers.{block}."
            x = _norm(h, w[name + "input_layernorm.weight"], config)
            h = h + _attention(x, w, name + "self_attn.", config, cache, fed, fault)
            x = _norm(h, w[name + "post_attention_layernorm.weight"], config)
            gate = x @ w[name + "mlp.gate_proj.weight"].T
            up = x @ w[name + "mlp.up_proj.weight"].T
            h = h + (gate / (1 + np.exp(-gate)) * up) @ w[name + "mlp.down_proj.weight"].T
        rows.append(_norm(h, w["model.norm.weight"], config) @ head.T)
        fed += len(chunk)
    return np.concatenate(rows)


def _norm(x: Array, weight: Array, config: dict[str, Any]) -> Array:
    return np.asarray(x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * weight)


def _attention(
    x: Array,
    w: dict[str, Array],
    name: str,
    config: dict[str, Any],
    cache: _Cache,
    fed: int,
    fault: Fault,
) -> Array:
    L, dim = len(x), config["head_dim"]
    queries, keys, values = (
        (x @ w[f"{name}{kind}_proj.weight"].T).reshape(L, -1, dim) for kind in "qkv"
    )
    start = fed if fault.overwrite else len(cache.keys)
    places = start + np.arange(L)
    angles = places + (fault.decode_shift if start else 0)
    queries = _rope(queries, angles + fault.query_shift, config, fault)
    cache.write(start, _rope(keys, angles, config, fault), values)

    q_heads, kv_heads = queries.shape[1], keys.shape[1]
    group = np.arange(q_heads) // (q_heads // kv_heads)
    reads = np.arange(q_heads) % kv_heads if fault.tiled_heads else group
    scores = np.einsum("lhd,thd->hlt", queries, cache.keys[:, reads]) / dim**0.5
    distance = places[:, None] - np.arange(len(cache.keys))  # [L, T]
    seen = distance >= 0
    if config["sliding_window"] is not None:
        seen &= distance < config["sliding_window"]
    scores = np.where(seen, scores, -np.inf)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    mixed = np.einsum("hlt,thd->lhd", scores, cache.values[:, reads])
    return np.asarray(mixed.reshape(L, -1) @ w[name + "o_proj.weight"].T)


def _rope(x: Array, angles: npt.NDArray[np.int64], config: dict[str, Any], fault: Fault) -> Array:
    half = x.shape[-1] // 2
    turn = angles[:, None, None] * config["rope_theta"] ** (-np.arange(half) / half)
    cos, sin = np.cos(turn), np.sin(turn)
    one = slice(0, None, 2) if fault.interleaved else slice(0, half)
    two = slice(1, None, 2) if fault.interleaved else slice(half, None)
    out = np.empty_like(x)
    out[..., one] = x[..., one] * cos - x[..., two] * sin
    out[..., two] = x[..., two] * cos + x[..., one] * sin
    return out
