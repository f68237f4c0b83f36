"""The forward pass: start at forward.py."""

from mlx_cerebrum import lazily

__getattr__ = lazily("mlx_cerebrum.model.forward", "Model")
