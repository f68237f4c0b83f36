"""The family of plans that a sweep tries, and each of them as the YAML that other commands take.

A member runs `repeats` stretches of `width` blocks, one after the other from block `start`
on, twice in a row each; all other blocks once. With B blocks that makes B + width * repeats
positions:

- start 4, width 4, repeats 6 of 32 blocks is the 12.25B: 0-3, then 4-7 twice, 8-11 twice, ...,
  24-27 twice, then 28-31. The card writes the same order as rows of 8 that start every 4.
- start 13, width 4, repeats 1 of 30 blocks is 0-16, 13-29: one stretch run twice.
- start 13, width 1, repeats 4 runs the same blocks twice in another order: 13 13 14 14 ...

`scale` multiplies what a block that runs twice adds to the residual stream, attention and MLP,
in both of its runs, which is `o_proj` and `down_proj` scaled. mergekit's issue 198 (26 April
2024) settles on sqrt(1/2) for every duplicated layer: two writes that pointed in unrelated
directions would then add up to the length of one. (Its self-merges also weaken q_proj and k_proj
of the first copy, which this family leaves alone: it changes more than a write.)
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from bench.pair import formula
from bench.trie import Path, path
from mlx_cerebrum.errors import PlanError, RequestError
from mlx_cerebrum.plan.layer_plan import LayerPlan

SQRT_HALF = math.sqrt(0.5)
_COLUMNS = 5  # starts of the coarsest grid: fewer are no map
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

    def path(self, blocks: int) -> Path:
        """Its steps over `blocks` blocks. Raises PlanError where it needs more."""
        runs = list(self._runs(blocks))
        layer_map = [block for first, last, _ in runs for block in range(first, last)]
        scales = [(x, x) for first, last, x in runs for _ in range(first, last)]
        return path(layer_map, scales)

    def plan(self, blocks: int) -> LayerPlan:
        """The same as mergekit YAML. Raises PlanError where it needs more blocks."""
        slices: list[tuple[int, int, float]] = []
        for first, last, scale in self._runs(blocks):
            if slices and slices[-1][1:] == (first, scale):  # goes on where the last one ended
                first = slices.pop()[0]
            slices.append((first, last, scale))
        lines = [
            f"# Blocks {self.start} to {self.end - 1} of {blocks} run twice, in stretches of"
            f" {self.width}: {blocks + self.width * self.repeats} positions.",
            "merge_method: passthrough",
            "slices:",
        ]
        for first, last, scale in slices:
            lines += ["- sources:", "  - model: source", f"    layer_range: [{first}, {last}]"]
            if scale != 1:
                lines += ["    parameters:", "      scale:"]
                for name in ("o_proj", "down_proj"):
                    lines += [f"      - filter: {name}", f"        value: {scale!r}"]
                lines += ["      - value: 1.0"]
        return LayerPlan.from_text("\n".join(lines) + "\n", f"{self.name}.yml")

    def _runs(self, blocks: int) -> Iterator[tuple[int, int, float]]:
        """Half-open ranges of blocks in the order they run, each with its scale."""
        if not self.fits(blocks):
            raise PlanError(f"{self.name} needs {self.end} blocks; the model has {blocks}")
        if self.start:
            yield 0, self.start, 1.0
        for first in range(self.start, self.end, self.width):
            yield first, first + self.width, self.scale
            yield first, first + self.width, self.scale
        if self.end < blocks:
            yield self.end, blocks, 1.0


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


@dataclass(frozen=True)
class Grid:
    """The lists whose combinations are tried, as far as the blocks allow."""

    starts: tuple[int, ...]
    widths: tuple[int, ...]
    repeats: tuple[int, ...]
    scales: tuple[float, ...]

    def cells(self, blocks: int) -> list[Cell]:
        cells = (
            Cell(*each) for each in product(self.starts, self.widths, self.repeats, self.scales)
        )
        return [cell for cell in cells if cell.fits(blocks)]


def grids(
    blocks: int,
    starts: Sequence[int] = (),
    widths: Sequence[int] = (),
    repeats: Sequence[int] = (),
    scales: Sequence[float] = (),
) -> list[Grid]:
    """Grids from the finest to the coarsest; a list that is given stands, the others are chosen.

    All have the card's plan as a cell unless a list given leaves it out. Only the starts get
    sparser: what a few blocks more or less do shows well between them. Raises RequestError for
    lists that no plan of so many blocks fits.
    """
    own = card(blocks)
    spaced = [
        [start for start in range(blocks) if (start - own.start) % step == 0]
        for step in range(1, -(-blocks // _COLUMNS) + 1)
    ]
    found = [
        Grid(
            _ascending(each),
            _ascending(widths or [1, 2, own.width, 2 * own.width]),
            _ascending(repeats or [1, own.repeats]),
            tuple(dict.fromkeys(scales or [1.0, SQRT_HALF])),
        )
        for each in ([starts] if starts else spaced)
    ]
    found = [grid for grid in found if grid.cells(blocks)]
    if not found:
        raise RequestError(f"no plan of these lists fits a model of {blocks} blocks")
    return found


def _ascending(values: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(set(values)))
