"""The family of plans that a sweep tries, and each of them as the YAML that other commands take.

A member runs `repeats` stretches of `width` blocks, one after the other from block `start`
on, twice in a row each; all other blocks once. With B blocks that makes B + width * repeats
positions:

- start 4, width 4, repeats 6 of 32 blocks is the 12.25B: 0-3, then 4-7 twice, 8-11 twice, ...,
  24-27 twice, then 28-31. The card writes the same order as rows of 8 that start every 4.
- start 13, width 4, repeats 1 of 30 blocks is 0-16, 13-29: one stretch run twice. In width 1,
  repeats 4 the same blocks run twice in another order: 13 13 14 14 ...

`scale` multiplies what a block that runs twice adds to the residual stream, attention and MLP,
in both of its runs, which is `o_proj` and `down_proj` scaled. mergekit's issue 198 (26 April
2024) settles on sqrt(1/2) for every duplicated layer: two writes that pointed in unrelated
directions would then add up to the length of one.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.pair import formula
from mlx_cerebrum.errors import PlanError
from mlx_cerebrum.plan.layer_plan import LayerPlan

SQRT_HALF = math.sqrt(0.5)
_COLUMNS = 5  # starts of a map, unless others are asked for
_NAME = re.compile(r"s(\d{1,4})-w(\d{1,4})-r(\d{1,4})(?:-x(.+))?")


def scale(text: str) -> float:
    """A scale as a person writes it, to 4 digits; 0.7071 is sqrt(1/2). Raises ValueError."""
    value = float(text)
    if not abs(value) <= 10:  # NaN neither
        raise ValueError(f"a scale of {text} is not between -10 and 10")
    shown = f"{value:.4g}"
    return SQRT_HALF if shown == f"{SQRT_HALF:.4g}" else float(shown)


@dataclass(frozen=True)
class Cell:
    """One member of the family: a cell of the map."""

    start: int
    width: int
    repeats: int
    scale: float = 1.0

    @property
    def name(self) -> str:
        name = f"s{self.start}-w{self.width}-r{self.repeats}"
        return name if self.scale == 1 else f"{name}-x{self.scale:.4g}"

    @classmethod
    def named(cls, name: str) -> "Cell | None":
        """The cell of that name, or None."""
        found = _NAME.fullmatch(name)
        if found is None:
            return None
        start, width, repeats, factor = found.groups()
        try:
            return cls(int(start), int(width), int(repeats), scale(factor or "1"))
        except ValueError:
            return None

    @property
    def end(self) -> int:
        """The first block after those that run twice."""
        return self.start + self.width * self.repeats

    def fits(self, blocks: int) -> bool:
        return self.start >= 0 and self.width > 0 and self.repeats > 0 and self.end <= blocks

    def plan(self, blocks: int) -> LayerPlan:
        """As mergekit YAML. Raises PlanError where it needs more blocks."""
        if not self.fits(blocks):
            raise PlanError(f"{self.name} needs {self.end} blocks; the model has {blocks}")
        runs = [(0, self.start, 1.0)]
        for first in range(self.start, self.end, self.width):
            runs += 2 * [(first, first + self.width, self.scale)]
        lines = [
            f"# Blocks {self.start} to {self.end - 1} of {blocks} run twice, in stretches of"
            f" {self.width}: {blocks + self.width * self.repeats} positions.",
            "merge_method: passthrough",
            "slices:",
        ]
        for first, last, factor in _joined([*runs, (self.end, blocks, 1.0)]):
            lines += ["- sources:", "  - model: source", f"    layer_range: [{first}, {last}]"]
            if factor != 1:
                lines += ["    parameters:", "      scale:"]
                for name in ("o_proj", "down_proj"):
                    lines += [f"      - filter: {name}", f"        value: {factor!r}"]
                lines += ["      - value: 1.0"]
        return LayerPlan.from_text("\n".join(lines) + "\n", f"{self.name}.yml")


def _joined(runs: Sequence[tuple[int, int, float]]) -> list[tuple[int, int, float]]:
    """Ranges of blocks with their scales, where one goes on as the last ended made one."""
    found: list[tuple[int, int, float]] = []
    for first, last, factor in runs:
        if found and found[-1][1:] == (first, factor):
            first = found.pop()[0]
        if first < last:
            found.append((first, last, factor))
    return found


def card(blocks: int, scale: float = 1.0) -> Cell:
    """The model card's plan for so many blocks: of 32, the 12.25B itself.

    Raises RequestError where there is none.
    """
    row = formula(blocks).slices[0].layer_range
    assert row is not None  # the formula names ranges
    half = row[1] // 2
    return Cell(half, half, blocks // half - 2, scale)


def other_ways(cell: Cell) -> tuple[Cell, Cell]:
    """The same blocks run twice, each on its own, and all of them as one stretch."""
    blocks = cell.width * cell.repeats
    return replace(cell, width=1, repeats=blocks), replace(cell, width=blocks, repeats=1)


def grid(blocks: int) -> dict[str, list[Any]]:
    """The lists whose combinations a sweep tries; the card's plan is one of them.

    Only the starts are sparse: what a few blocks more or less do shows well between them.
    """
    own, step = card(blocks), -(-blocks // _COLUMNS)
    return {
        "starts": list(range(own.start % step, blocks, step)),
        "widths": sorted({1, 2, own.width, 2 * own.width}),
        "repeats": sorted({1, own.repeats}),
        "scales": [1.0, SQRT_HALF],
    }
