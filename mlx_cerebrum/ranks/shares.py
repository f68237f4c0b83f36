"""Who holds what: how a plan's positions are shared out to the machines."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.plan.cuts import segments_of_view
from mlx_cerebrum.ranks.announcement import View
from mlx_cerebrum.ranks.share import Share


@dataclass(frozen=True)
class Shares:
    """`blocks` that each machine holds, by rank: those of its positions in `layer_map`, cut at
    `cuts`. With `heads`, key/value heads of each machine, it holds a part of every block."""

    blocks: tuple[tuple[int, ...], ...]
    layer_map: tuple[int, ...]
    cuts: tuple[int, ...]
    heads: tuple[int, ...] = ()

    @property
    def tensor(self) -> bool:
        return bool(self.heads)

    def most(self, left: Sequence[int]) -> int:
        """Bytes that the caches of a whole model may take, where each machine has so many left for
        those of its own positions or heads."""
        ends = pairwise([0, *self.cuts, len(self.layer_map)])
        own = self.heads or [end - start for start, end in ends]
        return min(free * sum(own) // count for free, count in zip(left, own, strict=True))

    def cut(self, layer_map: tuple[int, ...]) -> tuple[int, ...]:
        """Where an order of the blocks is cut for these machines; nowhere with `tensor`.

        Raises RequestError where they can't run it in turn.
        """
        if self.tensor or layer_map == self.layer_map:
            return self.cuts
        found = segments_of_view(layer_map, [set(held) for held in self.blocks])
        if found is None or not all(found):
            raise RequestError(
                f"this order of {len(layer_map)} positions can't be run by the machines in turn, as"
                " the blocks are shared out: give another --split, or leave the order out"
            )
        cuts, at = [], 0
        for segment in found[:-1]:
            at += len(segment)
            cuts.append(at)
        return tuple(cuts)

    def local(self, view: View, rank: int) -> tuple[int, ...]:
        """The order in which a machine runs its own blocks, which it counts from 0.

        Raises ValueError for blocks that it does not hold.
        """
        first, end = self._range(view.cuts, len(view.layer_map), rank)
        held = self.blocks[rank]
        return tuple(held.index(block) for block in view.layer_map[first:end])

    def part(self, model: Model, view: View, rank: int) -> Share:
        """A machine's part of an order, over its loaded blocks.

        Raises ValueError for blocks that it does not hold, ConfigError for no positions.
        """
        first, end = self._range(view.cuts, len(view.layer_map), rank)
        scales = None if view.scales is None else view.scales[first:end]
        return Share(model.config.with_map(self.local(view, rank), scales), model.model)

    def _range(self, cuts: Sequence[int], positions: int, rank: int) -> tuple[int, int]:
        if self.tensor:
            return 0, positions
        return list(pairwise([0, *cuts, positions]))[rank]
