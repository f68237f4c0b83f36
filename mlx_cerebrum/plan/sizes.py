"""What weights and caches take, in bytes, by a model's geometry alone."""

from mlx_cerebrum.model.config import ModelConfig

GROUP = 64  # weights that share a 16-bit scale and bias when quantized
STORAGES = {"bf16": 16, "8bit": 8, "4bit": 4}  # bits a weight, most first


def stored_bytes(config: ModelConfig, parameters: int, norms: int) -> dict[str, int | None]:
    """Bytes of so many parameters in each of STORAGES; None where rows have no whole groups.

    norms: how many of the parameters are in norms. They stay at 16 bits, all else is quantized as
        mlx-lm does it.
    """
    heads = config.num_attention_heads * config.head_dim
    inputs = (config.hidden_size, heads, config.intermediate_size)
    fits = all(size % GROUP == 0 for size in inputs)
    sized: dict[str, int | None] = {}
    for name, bits in STORAGES.items():
        # A scale and a bias of 16 bits for each group.
        packed = (parameters - norms) * (bits * GROUP + 32) // (8 * GROUP) + 2 * norms
        sized[name] = 2 * parameters if bits == 16 else packed if fits else None
    return sized


def part_bytes(config: ModelConfig, layers: int, rest: bool) -> dict[str, int | None]:
    """Bytes of so many blocks, with `rest` also of the embedding, the head and the last norm."""
    parameters = layers * config.block_parameters + rest * config.other_parameters
    return stored_bytes(config, parameters, (2 * layers + rest) * config.hidden_size)


def context(config: ModelConfig) -> int:
    """Tokens whose entries the caches hold at most: the window, or all that the model takes."""
    return config.sliding_window or config.max_position_embeddings


def position_cache_bytes(config: ModelConfig) -> int:
    """Bytes of one position's cache in 16 bits, when it holds `context` tokens."""
    return 2 * config.kv_values_per_token() // config.num_positions * context(config)
