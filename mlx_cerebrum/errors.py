"""What goes wrong, in one line each: what, where, and what to do about it.

Every message is a single line a person can act on. Command lines print it after
`error: ` and exit with 2; `--debug` shows the traceback instead.
"""

from reprlib import Repr
from typing import Any

_MOST = 1000  # characters of a message: what a file calls its tensors can have millions


def cut(text: str) -> str:
    """Both ends of a text that is too long for a message."""
    return text if len(text) <= _MOST else f"{text[: _MOST * 3 // 4]} ... {text[-_MOST // 4 :]}"


class CerebrumError(Exception):
    """Base of every error a user can cause and mend."""

    exit_code = 2

    def __str__(self) -> str:
        return cut(super().__str__())


class PlanError(CerebrumError):
    """A layer plan that cannot be read, or that does not fit the model."""


class ConfigError(CerebrumError):
    """A config.json (or GGUF metadata) that this engine cannot honour."""


class CheckpointError(CerebrumError):
    """Weight files that are missing, damaged, misshapen or unsafe to read."""


class TokenizerError(CerebrumError):
    """Tokenizer files or chat templates that cannot be used."""


class RequestError(CerebrumError):
    """A generation request that cannot be honoured (empty, too long, out of range)."""


class MemoryBudgetError(CerebrumError):
    """More bytes needed than the device has."""


class MachineError(CerebrumError):
    """Another machine that is gone, does not answer, or is not set up as this one is."""

    exit_code = 1


_LINE = Repr()
_LINE.maxstring = _LINE.maxother = 60


def shown(value: Any) -> str:
    """A value from JSON as a message shows it: escaped, and cut to fit a line."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return _LINE.repr(value)
