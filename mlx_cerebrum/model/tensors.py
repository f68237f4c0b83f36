"""Which tensors a model has, by Hugging Face's names: the one table of them.

A module's path is `model.layers.4.mlp.up_proj`; inside its block it is a kind, `mlp.up_proj`. Its
tensor is `weight` behind that, and `scales` and `biases` beside it where it is packed.
"""

from mlx_cerebrum.model.config import ModelConfig

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"
# The two kinds that write into the residual stream.
ATTENTION_OUT, MLP_OUT = "self_attn.o_proj", "mlp.down_proj"
MATRICES = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", ATTENTION_OUT),
    *("mlp.gate_proj", "mlp.up_proj", MLP_OUT),
)
NORMS = ("input_layernorm", "post_attention_layernorm")
# Every kind of a block, in the order of the forward pass.
BLOCK = (NORMS[0], *MATRICES[:4], NORMS[1], *MATRICES[4:])
# Matrices over the same input, which the loader stacks row by row into one.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
PARTS = ("weight", "scales", "biases")  # of a matrix


def module_path(block: int, kind: str) -> str:
    """Where this block's module of a kind is."""
    return f"model.layers.{block}.{kind}"


def place(module: str) -> tuple[int, str] | None:
    """Which block a module is in, and its kind; None outside the blocks."""
    if not module.startswith("model.layers."):
        return None
    _, _, block, kind = module.split(".", 3)
    return int(block), kind


def module_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every module of the stored model, in the order of the forward pass: path -> the shape of
    its weight, `[out, in]` of a matrix and `[D]` of an RMSNorm."""
    D, inner = config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    attention, mlp = ((q, D), (kv, D), (kv, D), (D, q)), ((inner, D), (inner, D), (D, inner))
    block: dict[str, tuple[int, ...]] = dict(
        zip(BLOCK, ((D,), *attention, (D,), *mlp), strict=True)
    )
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(config.num_hidden_layers):
        shapes |= {module_path(i, kind): shape for kind, shape in block.items()}
    if config.blocks_only:
        return shapes
    shapes = {EMBEDDING: (config.vocab_size, D), **shapes, FINAL_NORM: (D,)}
    return shapes if config.tie_word_embeddings else shapes | {HEAD: (config.vocab_size, D)}


def matrix_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Those of the matrices."""
    found = module_shapes(config).items()
    return {module: (shape[0], shape[1]) for module, shape in found if len(shape) == 2}


def norm_paths(config: ModelConfig) -> list[str]:
    """The modules that are RMSNorms."""
    return [module for module, shape in module_shapes(config).items() if len(shape) == 1]
