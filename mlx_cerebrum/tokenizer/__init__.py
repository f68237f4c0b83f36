"""Text and conversations to ids and back."""

import importlib
from typing import Any

# Names of tokenizer.py that programs import from here; it is loaded when one is asked for.
_NAMES = ("Tokenizer",)


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module("mlx_cerebrum.tokenizer.tokenizer"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
