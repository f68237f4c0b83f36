"""What a check of the selftest is, and what it finds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Settings:
    """model: its name, for the checks of memory and pace. quick: less of everything. work: a folder
    for files that nobody needs afterwards. small: the model that is computed on the CPU too."""

    model: str
    quick: bool
    work: str
    small: str = "demo"


@dataclass(frozen=True)
class Found:
    """passed: None where it can't be shown on this machine. words: what was found, in a line.

    table: its first row is the heading. data: the same for programs, as JSON has it.
    """

    passed: bool | None
    words: str
    table: Sequence[Sequence[str]] = ()
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """shows: what is true where it passes. bound: up to where it does. remedy: what to do where it
    does not. variables: of the environment that its process needs from the start."""

    name: str
    shows: str
    bound: str
    remedy: str
    run: Callable[[Settings], Found]
    variables: Mapping[str, str] = field(default_factory=dict)
