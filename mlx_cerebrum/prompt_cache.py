"""Where Python programs import PromptCache from."""

from mlx_cerebrum.decoding.prompt_cache import PromptCache

__all__ = ["PromptCache"]
