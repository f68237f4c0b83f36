"""Tiny Mistral and Llama models, the same bits on every machine: numpy only.

The golden files hold what Hugging Face transformers computes with these weights, not the
weights themselves; tests make the weights again and check their hash. So every value comes
from PCG64's raw 64-bit stream (which numpy guarantees never to change) by exact float32
steps: no `log`, no `exp`, nothing a C library may round differently.

The scales are chosen so that faults show and rounding does not:

- large q and k weights, so attention is peaked and a wrong position or mask moves it;
- residual writes small against the stream, so 56 positions do not amplify rounding;
- a stream small enough for `rms_norm_eps` to matter; norm weights that are not all ones;
- an untied head, so greedy output does not just repeat its input, and never ends early.
"""

import hashlib
import json
from typing import Any

import numpy as np
import numpy.typing as npt

Weights = dict[str, npt.NDArray[np.float32]]

# Standard deviations. A projection's is divided by sqrt(inputs): it is what comes out for
# a normalised input.
STREAM = 0.05  # the embedding, and so the residual stream at its start
QUERY_KEY = 1.7  # scores (before the softmax) then spread by about 1.7 ** 2
GATE_UP = 1.5
WRITE = 0.0075  # what o_proj and down_proj add to the stream
HEAD = 1.0
NORM = 0.2  # spread of the norm weights around 1

CONTROL_TOKENS = 3  # unknown, BOS and EOS: an untied head never ranks them first


def tiny_config(**changes: Any) -> dict[str, Any]:
    """A `config.json` for a small 32-block Mistral; `changes` replace or add keys."""
    config = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": 64,
        "num_hidden_layers": 32,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "vocab_size": 256,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": 12,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    return config | changes


def tiny_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape under its Hugging Face name, in the order they are drawn."""
    hidden, inner, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    q_rows = config["num_attention_heads"] * config["head_dim"]
    kv_rows = config["num_key_value_heads"] * config["head_dim"]
    block = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q_rows, hidden),
        "self_attn.k_proj.weight": (kv_rows, hidden),
        "self_attn.v_proj.weight": (kv_rows, hidden),
        "self_attn.o_proj.weight": (hidden, q_rows),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def tiny_weights(
    config: dict[str, Any], seed: int, stream: float = STREAM, write: float = WRITE
) -> Weights:
    """Float32 weights for `config`, uniform around 0 (norms: around 1).

    `stream` and `write` are STREAM and WRITE for another model than the 32 blocks'.
    """
    source = np.random.PCG64(seed)
    scale = {"embed_tokens": stream / STREAM, "o_proj": write / WRITE, "down_proj": write / WRITE}
    weights: Weights = {}
    for name, shape in tiny_shapes(config).items():
        # The top 24 bits fill a float32 exactly; centred, they are uniform in [-0.5, 0.5).
        raw = source.random_raw(int(np.prod(shape))) >> np.uint64(40)
        centred = (raw.astype(np.int64) - (1 << 23)).astype(np.float32) / np.float32(1 << 24)
        factor = scale.get(name.split(".")[-2], 1.0)
        spread = np.float32(_deviation(name, shape) * factor * 12**0.5)
        mean = np.float32(1 if name.endswith("norm.weight") else 0)
        weights[name] = (mean + centred * spread).reshape(shape)
    if "lm_head.weight" in weights:
        weights["lm_head.weight"][:CONTROL_TOKENS] = 0
    return weights


def _deviation(name: str, shape: tuple[int, ...]) -> float:
    kind = name.split(".")[-2]
    if kind == "embed_tokens":
        return STREAM
    if kind.endswith("norm"):
        return NORM
    gain = {
        "q_proj": QUERY_KEY,
        "k_proj": QUERY_KEY,
        "v_proj": 1.0,
        "gate_proj": GATE_UP,
        "up_proj": GATE_UP,
        "o_proj": WRITE,
        "down_proj": WRITE,
        "lm_head": HEAD,
    }[kind]
    return float(gain / shape[1] ** 0.5)


def tiny_prompt(config: dict[str, Any], length: int, seed: int) -> list[int]:
    """`length` token ids, none of them a control token."""
    raw = np.random.PCG64(seed).random_raw(length)
    ordinary = np.uint64(config["vocab_size"] - CONTROL_TOKENS)
    return [CONTROL_TOKENS + int(value % ordinary) for value in raw]


def weights_sha256(weights: Weights) -> str:
    """A hash of names, shapes and bytes (little-endian), independent of the dict's order."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(json.dumps([name, list(weights[name].shape)]).encode())
        digest.update(weights[name].astype("<f4").tobytes())
    return digest.hexdigest()
