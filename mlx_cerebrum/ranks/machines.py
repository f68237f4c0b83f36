"""From a program's flags to a model on several machines: opened, agreed on, loaded."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import mlx.core as mx

import mlx_cerebrum
from mlx_cerebrum.errors import CerebrumError, MachineError, RequestError, shown
from mlx_cerebrum.machine.awake import awake
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.limits import cap, wire
from mlx_cerebrum.model.memory import HEADROOM, available_bytes
from mlx_cerebrum.model.tensors import module_shapes, place
from mlx_cerebrum.plan.cuts import choose_cuts, parse_split, segments
from mlx_cerebrum.plan.sizes import position_cache_bytes
from mlx_cerebrum.ranks.agree import agree, fits_everywhere, introduce, ready
from mlx_cerebrum.ranks.announcement import View
from mlx_cerebrum.ranks.follow import Follower
from mlx_cerebrum.ranks.lead import Lead, LeadModel
from mlx_cerebrum.ranks.links import LeadEndedError, Links
from mlx_cerebrum.ranks.share import Columns, ShareCheckpoint, only_blocks, sum_up
from mlx_cerebrum.ranks.shares import Shares
from mlx_cerebrum.ranks.watch import by_hand
from mlx_cerebrum.weights import hub
from mlx_cerebrum.weights.checkpoint import Checkpoint
from mlx_cerebrum.weights.identity import identity_of
from mlx_cerebrum.weights.loading import Progress, load_model
from mlx_cerebrum.weights.opening import ModelSpec, Opened, open_checkpoint, planned_config
from mlx_cerebrum.weights.storage import Storage, choose_storage, smaller_weights
from mlx_cerebrum.weights.views import orders

_AGREE = "give all machines the same flags"
_TOPICS = (
    *("version", "model weights", "model config", "layer plan", "window", "dtype"),
    *("quantization", "split"),
)
_REMEDIES = {
    "version": "install the same on all",
    "model weights": "give all of them the same model",
    "dtype": "give all of them the same --dtype",
    "quantization": "give all of them the same --dtype, and --q-bits where weights are packed",
}


@dataclass(frozen=True)
class SharedOpened(Opened):
    """A model of which this machine opened its share."""

    links: Links
    shares: Shares
    share: ShareCheckpoint

    @property
    def here(self) -> ModelConfig:
        own = View(0, self.config.layer_map, self.shares.cut(self.config.layer_map))
        return self.share.config.with_map(self.shares.local(own, self.links.rank))

    def smaller(self) -> list[tuple[str, Storage]]:
        return smaller_weights(self.share, self.spec.packing, self.spec.dtype)

    def load(self, progress: Progress | None = None) -> Model:
        """The whole model, once all machines have loaded their shares. Raises MachineError."""
        base = self._loaded(progress)
        left = self._ready(base.dtype)
        cap(self.shares.most(left))
        return LeadModel(Lead(self.links, self.shares, base), self.config)

    def follow(self) -> None:
        """Load, and run this machine's part of every step until the lead ends.

        Raises MachineError.
        """
        base = self._loaded(None)
        self._ready(self.storage.dtype)
        Follower(self.links, self.shares, base, self.storage.dtype).run()

    def _ready(self, dtype: mx.Dtype) -> list[int]:
        left = ready(self.links, dtype, available_bytes())
        if self.shares.tensor:
            self.links.has_words = False  # in sums they would be added up
        return left

    def _loaded(self, progress: Progress | None) -> Model:
        model = load_model(self.share, self.share.config, self.storage, progress)
        if self.share.config.blocks_only:
            only_blocks(model)
        if self.shares.tensor:
            sum_up(model, self.links.summed)
        wire(model)
        return model


@dataclass(frozen=True)
class Machines:
    """What the flags say of the machines that a launcher has set up.

    split: positions to cut at, or with `tensor_parallel` key/value heads of each machine.
    """

    links: Links
    split: str | None
    tensor_parallel: bool

    @property
    def follows(self) -> bool:
        """Whether this machine only serves machine 0."""
        return self.links.rank != 0

    @contextmanager
    def led(self) -> Iterator[None]:
        """Inside, this machine leads; `rest` on the way out."""
        try:
            yield
        finally:
            self.rest()

    def rest(self) -> None:
        """Leave nothing waiting in MLX, where the end of `limits` would wait for it."""
        if self.links.heart is not None:
            self.links.heart.stop()

    def follow(self, spec: ModelSpec, plans: Sequence[str] | None = None) -> int:
        """Serve machine 0 until it ends; the exit code. Raises as `open` does, and MachineError."""
        if not by_hand():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is machine 0's to hear
        try:
            with awake():
                self.open(spec, plans).follow()
        except LeadEndedError:
            pass  # before the work began
        except MachineError:
            raise
        except CerebrumError:
            self.links.failed()
            raise
        self.links.watch.close()
        return 0

    def open(self, spec: ModelSpec, plans: Sequence[str] | None = None) -> SharedOpened:
        """Open this machine's share, and compare all there is to compare with the others.

        plans: where several orders of the blocks are to answer, those asked for besides
        (`views.orders`). Raises a CerebrumError, one line, for whatever can't be honoured; what
        concerns all machines, on all of them.
        """
        links = self.links
        free = introduce(links, _free())
        checkpoint = open_checkpoint(hub.resolve(spec.name, spec.revision))
        config = planned_config(checkpoint.config, spec.plan, spec.window)
        wanted = {} if plans is None else orders(config, str(spec.name), plans)
        maps = [layer_map for layer_map, _ in wanted.values()]
        shares, columns = self._shared_out(checkpoint, config, maps, free)
        for order in (config.layer_map, *maps):
            shares.cut(order)
        blocks, lead = shares.blocks[links.rank], links.rank == 0
        own = None if columns is None else columns[links.rank]
        share = ShareCheckpoint(checkpoint, config, blocks, lead, own)
        storage = choose_storage(share, spec.packing, spec.dtype)
        opened = SharedOpened(spec, checkpoint, config, storage, links, shares, share)
        agree(links, self._topics(opened), {t: _REMEDIES.get(t, _AGREE) for t in _TOPICS})
        fits_everywhere(links, storage.nbytes + storage.transient, _free())
        return opened

    def _shared_out(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        maps: Sequence[tuple[int, ...]],
        free: Sequence[int],
    ) -> tuple[Shares, list[Columns] | None]:
        size = self.links.size
        if self.tensor_parallel:
            if self.split is None:
                columns = Columns.even(config, size)
            else:
                columns = Columns.all(config, _heads(self.split, size))
            every = tuple(range(config.num_hidden_layers))
            heads = tuple(part.heads[1] - part.heads[0] for part in columns)
            return Shares((every,) * size, config.layer_map, (), heads), columns
        layer_map = max([config.layer_map, *maps], key=len)
        if self.split is not None:
            cuts = parse_split(self.split, len(layer_map), size)
        else:
            sizes = {m: checkpoint.read_bytes(m) for m in module_shapes(checkpoint.config)}
            blocks = sum(size for module, size in sizes.items() if place(module) is not None)
            rest, cache = sum(sizes.values()) - blocks, position_cache_bytes(config)
            cuts = choose_cuts(layer_map, free, blocks / config.num_hidden_layers, cache, rest)
        held = tuple(tuple(sorted(set(part))) for part in segments(layer_map, cuts))
        return Shares(held, layer_map, cuts), None

    def _topics(self, opened: SharedOpened) -> dict[str, str]:
        """What must be the same on all machines, in short texts."""
        storage, packing = opened.storage, opened.spec.packing
        # How each matrix is packed differs between shares; what decides it does not.
        same = identity_of(opened.checkpoint, opened.config, replace(storage, packings={}), "")
        held = "all made dense" if storage.dequantize else f"packed as {packing or 'stored'}"
        shares = opened.shares
        what, numbers = (
            ("key/value heads", shares.heads) if shares.tensor else ("cuts", shares.cuts)
        )
        found = {**same, "version": mlx_cerebrum.__version__, "quantization": held}
        found["split"] = f"{what} {', '.join(map(str, numbers))}"
        return {topic: found[topic] for topic in _TOPICS}


def _free() -> int:
    return int(available_bytes() * HEADROOM)


def _heads(text: str, machines: int) -> list[int]:
    """How many key/value heads each machine is to run, as `3,1`. Raises RequestError."""
    words = text.split(",")
    if not all(word.strip().isascii() and word.strip().isdigit() for word in words):
        raise RequestError(f"--split {shown(text)} is not a list of key/value heads such as 3,1")
    if len(words) != machines:
        raise RequestError(
            f"--split {shown(text)} is for {len(words)} machines; there are {machines}"
        )
    return [int(word) for word in words]
