"""Pictures of results, in a light and a dark version, as PNG and SVG."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Theme:
    """Colours of one version."""

    paper: str
    ink: str
    faint: str  # grid, frames, what only helps reading
    colours: tuple[str, ...]  # of the first side, the second, then peers


Draw = Callable[[Any, Theme], None]  # draws on an empty matplotlib Figure


@dataclass(frozen=True)
class Picture:
    """Something to draw, in inches, and what it shows for someone who can't see it."""

    draw: Draw
    alt: str
    size: tuple[float, float] = (8.0, 4.5)
