"""Which form of a model a machine gets: how many bits a weight, and whether it fits at all.

Decided from headers alone, before a weight is fetched.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from convert import fold
from convert.layout import Layout, Options, lay_out
from mlx_cerebrum import device
from mlx_cerebrum.errors import CheckpointError, MemoryBudgetError
from mlx_cerebrum.model.memory import HEADROOM, Workload, available_bytes, human
from mlx_cerebrum.plan.layer_plan import LayerPlan
from mlx_cerebrum.weights.checkpoint import Checkpoint
from mlx_cerebrum.weights.quantize import Packing

_TRIED = (8, 4)  # bits a weight that are chosen from; 16 is only made when asked for
_SHARE = 0.5  # of the memory that a model may take before fewer bits are chosen
_STEP, _SHORT = 512, 512  # tokens: of a prompt computed at once; of a conversation that must fit


@dataclass(frozen=True)
class Room:
    """What the machine has: bytes a model may take in memory, and bytes free on the disk."""

    memory: int
    disk: int


@dataclass(frozen=True)
class Variant:
    """One form of the model: what is written, and what it then takes."""

    bits: int
    options: Options
    layout: Layout

    @property
    def memory(self) -> int:
        """Bytes of weights and of a conversation as long as the window."""
        return self._with(self._window)

    @property
    def least_memory(self) -> int:
        """Bytes of weights and of a short conversation."""
        return self._with(min(_SHORT, self._window))

    @property
    def _window(self) -> int:
        config = self.layout.config
        return min(config.sliding_window or 4096, config.max_position_embeddings)

    def _with(self, tokens: int) -> int:
        item = 2 if device.on_gpu() else 4  # a CPU computes in float32
        return self.layout.nbytes + Workload(self.layout.config, item, tokens, 1, _STEP).bytes


def own_bits(checkpoint: Checkpoint) -> int:
    """Bits a weight that a checkpoint is stored in; 16 for one that is not quantized."""
    quantization = checkpoint.config.quantization or {}
    found = quantization.get("bits")
    return found if isinstance(found, int) else 16


def variant(checkpoint: Checkpoint, plan: LayerPlan | None, bits: int) -> Variant:
    """The model in `bits` a weight. Raises as `lay_out` does."""
    packed = bits < 16 and checkpoint.config.quantization is None
    options = Options(plan=plan, packing=Packing(bits, 64) if packed else None)
    none = fold.none(checkpoint.config)
    return Variant(bits, options, lay_out(checkpoint, options, none))


def choose(
    name: str,
    checkpoint: Checkpoint,
    plan: LayerPlan | None,
    bits: int | None,
    room: Room,
    besides: int,
) -> tuple[Variant, str]:
    """The form of the model called `name` to make, in `bits` if they are given, and why in words.

    besides: bytes of disk that are needed next to the result. Raises MemoryBudgetError or
    CheckpointError, naming what would fit, where it can't be kept or run here.
    """
    stored = own_bits(checkpoint)
    if stored < 16 and bits not in (None, stored):
        raise CheckpointError(f"{name} is stored in {stored} bits; drop --bits")
    tried: Sequence[int] = (stored,) if stored < 16 else _TRIED if bits is None else (bits,)
    *more, chosen = (variant(checkpoint, plan, each) for each in tried)
    why = "as asked" if bits is not None else "as it is stored" if stored < 16 else ""
    for each in more:
        if each.memory > _SHARE * room.memory:
            why = f"{each.bits} bits would take more than half of the memory"
        elif each.layout.nbytes + besides > room.disk:
            why = f"{each.bits} bits would take more disk than is free"
        else:
            chosen, why = each, "as good as 16 bits, and it leaves half of the memory free"
            break
    _refuse(name, checkpoint, plan, chosen, room, besides)
    return chosen, why


def _refuse(
    name: str,
    checkpoint: Checkpoint,
    plan: LayerPlan | None,
    each: Variant,
    room: Room,
    besides: int,
) -> None:
    """Raise unless the machine can keep and run this form."""

    def fits(other: Variant) -> bool:
        return (
            other.least_memory <= room.memory * HEADROOM
            and other.layout.nbytes + besides <= room.disk
        )

    if fits(each):
        return
    fewer = [b for b in _TRIED if b < each.bits] if own_bits(checkpoint) == 16 else []
    smaller = [other for b in fewer if fits(other := variant(checkpoint, plan, b))]
    if smaller:
        disk = smaller[0].layout.nbytes + besides
        what = (
            f"--bits {smaller[0].bits} would fit ({human(smaller[0].least_memory)} of memory,"
            f" {human(disk)} of disk)"
        )
    elif each.least_memory > room.memory * HEADROOM:
        what = "nothing larger than a model of about half that would;"
        what += " to try: mlx-cerebrum chat demo"
    else:
        what = "free some space, or keep models elsewhere: mlx-cerebrum --models DIR ..."
    if each.least_memory > room.memory * HEADROOM:
        raise MemoryBudgetError(
            f"{name} in {each.bits} bits needs {human(each.least_memory)} of memory"
            f" and {human(room.memory)} may be used; {what}"
        )
    raise CheckpointError(
        f"{name} in {each.bits} bits needs {human(each.layout.nbytes + besides)} of"
        f" disk while it is made, and {human(room.disk)} are free; {what}"
    )


def machine(disk: int) -> Room:
    """This machine, with `disk` bytes free where the model goes."""
    return Room(available_bytes(), disk)
