"""The forward pass: start at forward.py."""

import importlib
from typing import Any

# Names of forward.py that programs import from here; it is loaded when one is asked for.
_NAMES = ("Model",)


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module("mlx_cerebrum.model.forward"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
