"""Layer plans: mergekit YAML, formulas and named plans to a layer map."""

import importlib
from typing import Any

# Names of layer_plan.py that programs import from here; it is loaded when one is asked for.
_NAMES = ("LayerPlan", "interleave", "named_plans", "resolve")


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module("mlx_cerebrum.plan.layer_plan"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
