"""What the server uses of mlx-lm."""

from mlx_cerebrum.files.open_files import limit_kept

with limit_kept():
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.models.cache import (
        BatchRotatingKVCache,
        KVCache,
        RotatingKVCache,
        can_trim_prompt_cache,
        trim_prompt_cache,
    )

__all__ = [
    "BatchGenerator",
    "BatchRotatingKVCache",
    "KVCache",
    "RotatingKVCache",
    "can_trim_prompt_cache",
    "trim_prompt_cache",
]
