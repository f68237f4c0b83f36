"""How much a model's output suffers from quantizing each of its matrices: a small table.

Figures are Kullback-Leibler divergences in nats a token (see `convert.calibrate`), of one matrix
quantized alone. `Sensitivity.shipped()` is the package's own, measured on a small trained model;
`convert.calibrate.calibrate` measures another.

What carries a table over to another model:

- A matrix's effect does not depend on its size: rounding errors of a wider matrix average out
  over as many more terms as it has, so the noise of its output, relative to the signal, stays.
- Blocks are matched by relative depth (the middle of block `i` of `n` lies at `(i + 1/2) / n`),
  between two of the table's blocks by their geometric mean: the figures span decades.
- A block that runs `r` times where the table's ran once counts `r ** run_exponent` times as much.
- A tied embedding serves as lookup and as head, so it counts as both together.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from mlx_cerebrum.errors import ConfigError
from mlx_cerebrum.model.config import ModelConfig, read_json
from mlx_cerebrum.model.tensors import EMBEDDING, HEAD, MATRICES, module_path, place
from mlx_cerebrum.weights.quantize import Packing

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
        low = min(max(math.floor(depth), 0), self.num_blocks - 1)
        high = min(low + 1, self.num_blocks - 1)
        share = min(max(depth - low, 0.0), 1.0)
        near, far = (self._once(i, kind) for i in (low, high))
        return float(math.exp((1 - share) * near + share * far) * runs**self.run_exponent)

    @property
    def num_blocks(self) -> int:
        return len(self.blocks[MATRICES[0]])

    def _once(self, block: int, kind: str) -> float:
        """Log of the figure as if the block had run once."""
        runs = max(self.layer_map.count(block), 1)
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
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ConfigError(f"{where} is not a sensitivity table: {error!r}") from None
        figures = [*table.outer.values(), *(x for row in table.blocks.values() for x in row)]
        if any(not math.isfinite(x) or x < 0 for x in [*figures, table.run_exponent]):
            raise ConfigError(f"{where}: figures must be finite and not negative")
        lengths = {len(row) for row in table.blocks.values()}
        if len(lengths) > 1 or not table.num_blocks:
            raise ConfigError(f"{where}: every kind needs one figure for each block")
        if any(not 0 <= block < table.num_blocks for block in table.layer_map):
            raise ConfigError(f"{where}: layer_map names blocks that have no figures")
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
        path.write_text(rows + "\n", encoding="utf-8")
