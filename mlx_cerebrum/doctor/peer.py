"""mlx-lm's Llama over the very arrays that one of our models runs."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.tensors import FUSED, NORMS, PARTS, matrix_shapes


def as_mlx_lm(model: Model) -> nn.Module:
    """A layer for each position, its matrices slices of ours: no bytes besides.

    Without a window, which mlx-lm does not know for it. Imports mlx-lm, and transformers with it.
    """
    from mlx_lm.models.llama import Model as Llama
    from mlx_lm.models.llama import ModelArgs

    config = model.config
    arguments = ModelArgs(
        model_type="llama",
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_positions,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        rope_theta=config.rope_theta,
        tie_word_embeddings=config.tie_word_embeddings,
    )
    peer: Any = Llama(arguments)
    rows = {path.rpartition(".")[2]: shape[0] for path, shape in matrix_shapes(config).items()}
    for layer, block in zip(peer.model.layers, config.layer_map, strict=True):
        own = model.model.layers[block]
        for parent in ("self_attn", "mlp"):
            _share(layer[parent], own[parent], rows)
        for norm in NORMS:
            layer[norm].weight = own[norm].weight
    peer.model.norm.weight = model.model.norm.weight
    peer.model.embed_tokens = _as_nn(model.model.embed_tokens)
    if not config.tie_word_embeddings:
        peer.lm_head = _as_nn(model.lm_head)
    return peer  # type: ignore[no-any-return]


def _share(theirs: Any, ours: nn.Module, rows: dict[str, int]) -> None:
    for name in [name for name, child in ours.items() if _is_matrix(child)]:
        start = 0
        for part in FUSED.get(name, (name,)):
            count = rows[part] if name in FUSED else None
            theirs[part] = _as_nn(ours[name], start, None if count is None else start + count)
            start += count or 0


def _is_matrix(child: Any) -> bool:
    return isinstance(child, nn.Module) and "weight" in child


def _as_nn(matrix: nn.Module, start: int = 0, end: int | None = None) -> nn.Module:
    """MLX's own module with these rows of a matrix."""
    packed = "scales" in matrix
    module: Any
    if isinstance(matrix, nn.Embedding | nn.QuantizedEmbedding):
        module = nn.Embedding(1, 64)
    else:
        module = nn.Linear(64, 1, bias=False)
    if packed:
        own: Any = matrix
        module = module.to_quantized(64, 4)
        module.group_size, module.bits, module.mode = own.group_size, own.bits, own.mode
    for part in PARTS:
        module.pop(part, None)
        if part in matrix:
            whole: mx.array = matrix[part]
            module[part] = whole if end is None else whole[start:end]
    return module  # type: ignore[no-any-return]
