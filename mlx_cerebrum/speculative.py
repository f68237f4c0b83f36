"""Where Python programs import speculation from."""

from mlx_cerebrum.decoding.speculative import Speculation, speculation

__all__ = ["Speculation", "speculation"]
