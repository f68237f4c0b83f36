"""Text and conversations to ids and back."""

from mlx_cerebrum import lazily

__getattr__ = lazily("mlx_cerebrum.tokenizer.tokenizer", "Tokenizer")
