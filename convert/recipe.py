"""How many bits each matrix gets: one number for all, mlx-lm's mixtures, or what the plan asks.

A bit is worth more where a matrix is sensitive and where it is small; in a self-merge also where
its block runs more than once, since the block is stored once and its error made every time. The
recipe `plan` spends a budget by that. Bits per weight means what mlx-lm means: all bytes stored
(packed integers, their scales and biases, dense tensors) times 8 over all parameters.

Sensitivities are a table measured on one model, the package's own on a small trained one. What
carries it over to another model:

- A matrix's effect does not depend on its size: rounding errors of a wider matrix average out
  over as many more terms as it has, so the noise of its output, relative to the signal, stays.
- Blocks are matched by relative depth (the middle of block `i` of `n` lies at `(i + 1/2) / n`),
  between two of the table's blocks by their geometric mean: the figures span decades.
- A block that runs `r` times where the table's ran once counts `r ** run_exponent` times as much.
- A tied embedding serves as lookup and as head, so it counts as both together.
"""

import heapq
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from mlx_cerebrum.errors import ConfigError
from mlx_cerebrum.files.replacing import replacing
from mlx_cerebrum.model.config import ModelConfig, read_json
from mlx_cerebrum.model.tensors import (
    EMBEDDING,
    HEAD,
    MATRICES,
    matrix_shapes,
    module_path,
    place,
)
from mlx_cerebrum.weights.quantize import AFFINE_BITS, Packing

# mlx-lm's mixtures: bits for most matrices, bits for the favoured ones.
MIXED = {"mixed_2_6": (2, 6), "mixed_3_4": (3, 4), "mixed_3_6": (3, 6), "mixed_4_6": (4, 6)}
RECIPES = ("uniform", *MIXED, "plan")
# Running twice multiplied a matrix's figure by 2.2 (log2: 1.15; the median of the 28 in blocks 13
# to 16 of the demo model, in its own order and in `demo-interleaved`; 1.9 to 2.5 for four in five).
RUN_EXPONENT = 1.15
_LEAST = 1e-9  # below what 1000 tokens in float32 can tell from nothing


@dataclass(frozen=True)
class Sensitivity:
    """One table. `blocks`: kind -> a figure for each stored block; `outer`: the two tables.

    packing: what each matrix was put through when it was measured.
    layer_map: the order the blocks ran in.
    """

    packing: Packing
    layer_map: tuple[int, ...]
    outer: Mapping[str, float]
    blocks: Mapping[str, tuple[float, ...]]
    run_exponent: float = RUN_EXPONENT
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        measured: Mapping[str, float],
        config: ModelConfig,
        packing: Packing,
        provenance: Mapping[str, Any] | None = None,
    ) -> "Sensitivity":
        """From figures by module path; a block that never runs has none and counts nothing."""
        blocks = range(config.num_hidden_layers)
        return cls(
            packing,
            config.layer_map,
            {name: max(measured[name], 0.0) for name in (EMBEDDING, HEAD)},
            {
                kind: tuple(max(measured.get(module_path(i, kind), 0.0), 0.0) for i in blocks)
                for kind in MATRICES
            },
            provenance=provenance or {},
        )

    def at(self, module: str, config: ModelConfig) -> float:
        """The figure for a matrix of `config`'s model, carried over where that is another."""
        if (inside := place(module)) is None:
            both = module == EMBEDDING and config.tie_word_embeddings
            return self.outer[module] + (self.outer[HEAD] if both else 0)
        block, kind = inside
        runs = config.layer_map.count(block)
        if not runs:
            return 0.0
        depth = (block + 0.5) / config.num_hidden_layers * self.num_blocks - 0.5
        ran = sorted(set(self.layer_map))  # others were not measured
        low = max((i for i in ran if i <= depth), default=ran[0])
        high = min((i for i in ran if i >= depth), default=ran[-1])
        share = (depth - low) / (high - low) if high > low else 0.0
        near, far = (self._once(i, kind) for i in (low, high))
        return float(math.exp((1 - share) * near + share * far) * runs**self.run_exponent)

    @property
    def num_blocks(self) -> int:
        return len(self.blocks[MATRICES[0]])

    def _once(self, block: int, kind: str) -> float:
        """Log of the figure as if the block had run once."""
        runs = self.layer_map.count(block)
        return math.log(max(self.blocks[kind][block], _LEAST) / runs**self.run_exponent)

    @classmethod
    def shipped(cls) -> "Sensitivity":
        """The table that comes with the package."""
        path = files("convert") / "data" / "sensitivity.json"
        return cls.from_dict(json.loads(path.read_text(encoding="utf-8")), "sensitivity.json")

    @classmethod
    def load(cls, path: Path) -> "Sensitivity":
        """A table that `save` wrote. Raises ConfigError, one line, for anything else."""
        return cls.from_dict(read_json(path), str(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str) -> "Sensitivity":
        """Raises ConfigError naming what is wrong."""
        try:
            table = cls(
                Packing(raw["bits"], raw["group_size"]),
                tuple(int(block) for block in raw["layer_map"]),
                {name: float(raw["outer"][name]) for name in (EMBEDDING, HEAD)},
                {kind: tuple(float(x) for x in raw["blocks"][kind]) for kind in MATRICES},
                float(raw["run_exponent"]),
                dict(raw["provenance"]),
            )
        except KeyError as error:
            raise ConfigError(f"{where} is not a sensitivity table: no {error}") from None
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ConfigError(f"{where} is not a sensitivity table: {error!r}") from None
        figures = [*table.outer.values(), *(x for row in table.blocks.values() for x in row)]
        if any(not math.isfinite(x) or x < 0 for x in [*figures, table.run_exponent]):
            raise ConfigError(f"{where}: figures must be finite and not negative")
        lengths = {len(row) for row in table.blocks.values()}
        if len(lengths) > 1 or not table.num_blocks:
            raise ConfigError(f"{where}: every kind needs one figure for each block")
        blocks = range(table.num_blocks)
        if not table.layer_map or not set(table.layer_map) <= set(blocks):
            raise ConfigError(f"{where}: layer_map names no block, or one that has no figures")
        return table

    def as_dict(self) -> dict[str, Any]:
        return {
            "unit": "nats a token: KL divergence from the dense model, one matrix quantized alone",
            "bits": self.packing.bits,
            "group_size": self.packing.group_size,
            "layer_map": list(self.layer_map),
            "run_exponent": self.run_exponent,
            "outer": {name: float(f"{x:.4g}") for name, x in self.outer.items()},
            "blocks": {k: [float(f"{x:.4g}") for x in row] for k, row in self.blocks.items()},
            "provenance": dict(self.provenance),
        }

    def save(self, path: Path) -> None:
        text = json.dumps(self.as_dict(), indent=1)
        rows = re.sub(r"\[[^][]*\]", lambda row: re.sub(r"\s+", " ", row[0]), text)
        with replacing(path, path.with_name(f".{path.name}.partial")) as file:
            file.write(f"{rows}\n".encode())


def choose(
    recipe: str,
    config: ModelConfig,
    base: Packing,
    budget: float | None = None,
    table: Sensitivity | None = None,
    *,
    unrolled: bool = False,
    dense_bits: int = 16,
) -> dict[str, Packing]:
    """A packing for every matrix of `config`'s stored blocks, by module path.

    Matrices whose rows don't divide into groups are left out: they stay dense. `base` is what
    `uniform` gives to all; the other recipes take its group size.

    budget: bits per weight for `plan` (default: what `uniform` would take).
    table: sensitivities for `plan` (default: the ones that come with the package).
    unrolled: each block will be stored as often as it runs; a budget that is given counts it so.
        Without one both layouts get the same packings, and so the same answers.
    dense_bits: of scales, biases and what stays dense.

    Raises ConfigError for an unknown recipe, a budget that can't be kept or has no use, and a
    recipe of several bit widths in a format that has one.
    """
    if recipe not in RECIPES:
        raise ConfigError(f"recipe {recipe!r} is not one of {', '.join(RECIPES)}")
    if recipe != "plan" and (budget is not None or table is not None):
        raise ConfigError(f"a budget or a calibration is for the recipe plan, not {recipe}")
    if recipe != "uniform" and base.mode != "affine":
        raise ConfigError(f"recipe {recipe} mixes bit widths, and {base.mode} has only one")
    shapes = matrix_shapes(config)
    fitting = {name: base for name, (_, columns) in shapes.items() if base.fits(columns)}
    if recipe == "uniform" or not fitting:
        return fitting
    if recipe in MIXED:
        low, high = (Packing(bits, base.group_size) for bits in MIXED[recipe])
        blocks = config.num_hidden_layers
        return {name: high if _favoured(name, blocks) else low for name in fitting}
    size = _Size(config, unrolled and budget is not None, dense_bits)
    if budget is not None and not 0 < budget < 64:
        raise ConfigError(f"a budget of {budget} bits per weight makes no sense; 4.5 would")
    allowed = size.bits(fitting) if budget is None else int(budget * size.parameters)
    found = table or Sensitivity.shipped()
    return _allocate(fitting, allowed, {name: found.at(name, config) for name in fitting}, size)


def _favoured(name: str, blocks: int) -> bool:
    """Whether mlx-lm's mixtures give a matrix their higher bits (its convert.py, after llama.cpp).

    In the first and last eighth of the blocks and every third between, v_proj and down_proj;
    and the head. Blocks are the stored ones, whatever order and how often they run: a folded
    12.25B gets the mixture of the 7B it is made of.
    """
    if (inside := place(name)) is None:
        return name == HEAD
    block, kind = inside
    if not kind.endswith(("v_proj", "down_proj")):
        return False
    eighth = blocks // 8
    return block < eighth or block >= 7 * blocks // 8 or (block - eighth) % 3 == 2


class _Size:
    """What a set of packings takes on disk."""

    def __init__(self, config: ModelConfig, unrolled: bool, dense_bits: int) -> None:
        self.dense_bits = dense_bits
        self.weights: dict[str, int] = {}  # stored, of each matrix
        for name, (rows, columns) in matrix_shapes(config).items():
            inside = place(name)
            copies = config.layer_map.count(inside[0]) if unrolled and inside else 1
            self.weights[name] = rows * columns * copies
        self.parameters = config.executed_parameters if unrolled else config.stored_parameters

    def of(self, name: str, packing: Packing) -> int:
        """Bits of one matrix."""
        scales = 2 * self.dense_bits if packing.mode == "affine" else 8
        return self.weights[name] * packing.bits + self.weights[name] // packing.group_size * scales

    def bits(self, packings: Mapping[str, Packing]) -> int:
        """Bits of everything."""
        packed = sum(self.weights[name] for name in packings)
        dense = (self.parameters - packed) * self.dense_bits
        return dense + sum(self.of(name, packing) for name, packing in packings.items())


def _allocate(
    fitting: Mapping[str, Packing],
    allowed: int,
    sensitivity: Mapping[str, float],
    size: _Size,
) -> dict[str, Packing]:
    """The least loss within `allowed` bits.

    Losses of single matrices add up while they are small, and each goes with the square of the
    rounding error. That is convex in the bits, so buying the cheapest steps first is optimal but
    for the last one that does not fit. Among a block's matrices that is little; the two tables
    are large, so all their levels are tried.
    """
    group = next(iter(fitting.values())).group_size
    packings = [Packing(bits, group) for bits in AFFINE_BITS]
    tables = [name for name in fitting if place(name) is None]
    inner = [name for name in fitting if name not in tables]
    least = dict.fromkeys(fitting, packings[0])
    if size.bits(least) > allowed:
        raise ConfigError(
            f"a budget of {allowed / size.parameters:.3f} bits per weight can't be kept: with"
            f" {packings[0]} everywhere this model takes {size.bits(least) / size.parameters:.3f}"
        )

    def cost(chosen: Mapping[str, Packing]) -> tuple[float, int]:
        """Predicted loss; of equals, the one that leaves least of the budget unused."""
        loss = sum(sensitivity[name] * _error(p.bits) for name, p in chosen.items())
        return loss, -size.bits(chosen)

    found = []
    for levels in itertools.product(packings, repeat=len(tables)):
        start = least | dict(zip(tables, levels, strict=True))
        left = allowed - size.bits(start)
        if left >= 0:
            found.append(_spend(start, _units(inner), left, sensitivity, size))
    return min(found, key=cost)


def _spend(
    chosen: dict[str, Packing],
    units: list[tuple[str, ...]],
    left: int,
    sensitivity: Mapping[str, float],
    size: _Size,
) -> dict[str, Packing]:
    """Raise `chosen`: keep buying the step that spares most loss per bit, while one fits."""

    def step(number: int, level: int) -> tuple[float, int, int, int]:
        """Loss spared per bit (negative, for the heap), bits to pay, and the step itself."""
        low, high = AFFINE_BITS[level : level + 2]
        weights = sum(size.weights[name] for name in units[number])
        spared = sum(sensitivity[name] for name in units[number])
        spared *= _error(low) - _error(high)
        price = weights * (high - low)
        return -spared / max(price, 1), number, level, price  # free: a block that is never written

    heap = [step(number, 0) for number in range(len(units))]
    heapq.heapify(heap)
    while heap:
        _, number, level, price = heapq.heappop(heap)
        if price > left:  # this one has all it can get; a smaller one may still fit
            continue
        left -= price
        higher = replace(chosen[units[number][0]], bits=AFFINE_BITS[level + 1])
        chosen |= dict.fromkeys(units[number], higher)
        if level + 2 < len(AFFINE_BITS):
            heapq.heappush(heap, step(number, level + 1))
    return chosen


def _error(bits: int) -> float:
    """The square of rounding's largest error, as a share of a group's range."""
    return 1.0 / float(2**bits - 1) ** 2


def _units(names: Iterable[str]) -> list[tuple[str, ...]]:
    """What gets bits together: gate and up, which are alike in size and sensitivity.

    Packed alike, the loader joins them into one matmul. On the demo model that costs 1 to 2 % of
    the predicted loss; joining q, k and v likewise would cost 10 to 15 %: v is the most sensitive.
    """
    units: dict[str, list[str]] = {}
    for name in names:
        unit = name.replace("gate_proj", "gate_up_proj").replace(".up_proj", ".gate_up_proj")
        units.setdefault(unit, []).append(name)
    return [tuple(unit) for unit in units.values()]
