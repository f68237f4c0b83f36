"""Cerebrum on Apple silicon: blocks stored once, run in any order.

The names below load on first use, so that planning never imports MLX and `python -m
mlx_cerebrum.generate` imports its module once.
"""

import importlib
import sys
import types
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "load": "mlx_cerebrum.load",
    "generate": "mlx_cerebrum.stream",
    "stream_generate": "mlx_cerebrum.stream",
    "make_sampler": "mlx_cerebrum.sampling",
    "LayerPlan": "mlx_cerebrum.plan",
    "ModelConfig": "mlx_cerebrum.config",
    "CerebrumError": "mlx_cerebrum.errors",
}

__all__ = ["__version__", *_HOMES]


class _Package(types.ModuleType):
    """Resolves the public names; `load` and `generate` are also modules' names, and importing
    a module would otherwise put it where the function is expected."""

    def __getattribute__(self, name: str) -> Any:
        if name in _HOMES:
            return getattr(importlib.import_module(_HOMES[name]), name)
        return super().__getattribute__(name)


sys.modules[__name__].__class__ = _Package
