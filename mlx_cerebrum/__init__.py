"""Cerebrum on Apple silicon: blocks stored once, run in any order.

The names below load on first use, so that planning never imports MLX and `python -m
mlx_cerebrum.generate` imports its module once.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_cerebrum.decoding.sampling import make_sampler
    from mlx_cerebrum.decoding.stream import generate, stream_generate
    from mlx_cerebrum.errors import CerebrumError
    from mlx_cerebrum.model.config import ModelConfig
    from mlx_cerebrum.plan.layer_plan import LayerPlan
    from mlx_cerebrum.weights.opening import load

__version__ = "0.1.0"

_HOMES = {
    "load": "mlx_cerebrum.weights.opening",
    "generate": "mlx_cerebrum.decoding.stream",
    "stream_generate": "mlx_cerebrum.decoding.stream",
    "make_sampler": "mlx_cerebrum.decoding.sampling",
    "LayerPlan": "mlx_cerebrum.plan.layer_plan",
    "ModelConfig": "mlx_cerebrum.model.config",
    "CerebrumError": "mlx_cerebrum.errors",
}

__all__ = [
    "CerebrumError",
    "LayerPlan",
    "ModelConfig",
    "__version__",
    "generate",
    "load",
    "make_sampler",
    "stream_generate",
]


class _Package(types.ModuleType):
    """Resolves the public names. `generate` is also a command's module, and importing that would
    otherwise put the module where the function is expected."""

    def __getattribute__(self, name: str) -> Any:
        if name in _HOMES:
            return getattr(importlib.import_module(_HOMES[name]), name)
        return super().__getattribute__(name)


sys.modules[__name__].__class__ = _Package
