"""Finding the blocks a merged checkpoint stores several times.

A few bytes of every tensor, read first, say which layers look alike; so what is written is
known before the one pass over the data. That pass hashes the tensors of the layers that look
alike, and their hashes decide. Layers that differ in a single bit are stored both.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.tensors import BLOCK, module_path
from mlx_cerebrum.plan.layer_plan import LayerPlan, named_plans
from mlx_cerebrum.weights.checkpoint import Checkpoint

_SAMPLES, _SAMPLE_BYTES = 16, 256

Digests = Mapping[str, bytes]  # module path -> a hash of its arrays


@dataclass(frozen=True)
class Folding:
    """Which stored layers are the same block.

    block_of: stored layer -> block, numbered as they first appear.
    near: layers that share some matrices with an earlier layer -> it, and what differs. Of a
        prediction, only that they may.
    """

    block_of: tuple[int, ...]
    near: dict[int, tuple[int, tuple[str, ...]]] = field(default_factory=dict)

    @property
    def repeats(self) -> bool:
        return len(set(self.block_of)) < len(self.block_of)

    def suspects(self) -> set[int]:
        """The layers that are taken for the same, or nearly the same, as another."""
        same = {i for i, block in enumerate(self.block_of) if self.block_of.count(block) > 1}
        return same | set(self.near) | {other for other, _ in self.near.values()}


def none(config: ModelConfig) -> Folding:
    """Every stored layer is a block of its own."""
    return Folding(tuple(range(config.num_hidden_layers)))


def predict(checkpoint: Checkpoint) -> Folding:
    """The folding as samples of the layers' bytes suggest it."""
    found: dict[str, bytes] = {}
    for layer in range(checkpoint.config.num_hidden_layers):
        for kind in BLOCK:
            module = module_path(layer, kind)
            found[module] = _sample(checkpoint, module)
    return group(checkpoint.config.num_hidden_layers, found)


def group(layers: int, digests: Digests, within: Folding | None = None) -> Folding:
    """The folding in which layers are one block where `within` has them as one (without it, all)
    and no digest tells them apart."""
    keys: list[tuple[object, ...]] = []
    block_of: list[int] = []
    blocks: dict[tuple[object, ...], int] = {}
    near: dict[int, tuple[int, tuple[str, ...]]] = {}
    for layer in range(layers):
        names = [module_path(layer, kind) for kind in BLOCK]
        known = all(name in digests for name in names)
        own = tuple(digests[name] for name in names) if known else (None,) * len(BLOCK)
        key = (within.block_of[layer] if within else 0, *own)
        if key not in blocks:
            blocks[key] = len(blocks)
            if known and (like := _nearest(keys, own)) is not None:
                near[layer] = like
        keys.append(own)
        block_of.append(blocks[key])
    return Folding(tuple(block_of), near)


def _nearest(
    earlier: list[tuple[object, ...]], own: tuple[object, ...]
) -> tuple[int, tuple[str, ...]] | None:
    """The earlier layer that shares most with `own`, if it shares a matrix: norms may well
    be equal (all ones) in layers that have nothing to do with each other."""
    best: tuple[int, tuple[str, ...]] | None = None
    for layer, other in enumerate(earlier):
        pairs = zip(BLOCK, own, other, strict=True)
        differ = tuple(kind for kind, a, b in pairs if a != b)
        shares = any(kind not in differ for kind in BLOCK if kind.endswith("proj"))
        if shares and (best is None or len(differ) < len(best[1])):
            best = layer, differ
    return best


def describe(layer_map: tuple[int, ...], blocks: int) -> tuple[str, str]:
    """The plan that a recovered layer map is: what to call it, and its YAML.

    A named plan where one gives this map, else the map's runs of consecutive blocks.
    """
    for name in named_plans():
        plan = LayerPlan.named(name)
        if (plan.blocks_needed or 0) > blocks or any(part.scales for part in plan.slices):
            continue
        if plan.layer_map(blocks) == layer_map:
            return name, plan.text
    runs: list[list[int]] = []
    for block in layer_map:
        if runs and runs[-1][1] == block:
            runs[-1][1] = block + 1
        else:
            runs.append([block, block + 1])
    lines = ["merge_method: passthrough", "slices:"]
    for start, stop in runs:
        lines += ["- sources:", f"  - layer_range: [{start}, {stop}]", "    model: source"]
    return ", ".join(f"{a}-{b}" for a, b in runs), "\n".join(lines) + "\n"


def notes(folding: Folding) -> list[str]:
    """What a person should know: what was recovered, and what was nearly the same."""
    found = []
    if folding.repeats:
        blocks = len(set(folding.block_of))
        name, _ = describe(folding.block_of, blocks)
        found.append(f"{len(folding.block_of)} layers were {blocks} different blocks: plan {name}")
    if folding.near:
        layer, (other, differ) = next(iter(folding.near.items()))
        many = f"{len(folding.near)} layers share" if len(folding.near) > 1 else "1 layer shares"
        found.append(
            f"{many} some matrices with an earlier one, not all: not folded;"
            f" layer {layer} is layer {other} but for {', '.join(differ)}"
            + (", ..." if len(folding.near) > 1 else "")
        )
    return found


def _sample(checkpoint: Checkpoint, module: str) -> bytes:
    digest = hashlib.sha256()
    for part, extent in checkpoint.extents(module).items():
        name = f"{module}.{part}"
        digest.update(f"{part} {checkpoint.dtypes[name]} {checkpoint.shapes[name]}".encode())
        for piece in extent.samples(_SAMPLES, _SAMPLE_BYTES):
            digest.update(piece)
    return digest.digest()
