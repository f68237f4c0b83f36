"""What the model is that is talked with, in a few words."""

from collections.abc import Mapping
from pathlib import Path

from mlx_cerebrum.chat.screen import Rows
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.weights.opening import Opened
from mlx_cerebrum.weights.storage import Storage


def about(opened: Opened, models: Mapping[str, Model]) -> Rows:
    """Its name, the orders it answers in, the bits of its weights, and its window."""
    config, name = opened.config, str(opened.spec.name)
    orders = [f"{name} ({model.config.num_positions} positions)" for name, model in models.items()]
    window = f"window {config.sliding_window} tokens" if config.sliding_window else "no window"
    return (
        ("model", Path(name).name if Path(name).exists() else name),
        ("orders", f"{', '.join(orders)} over {config.num_hidden_layers} blocks"),
        ("weights", bits(opened.storage)),
        ("window", window),
    )


def bits(storage: Storage) -> str:
    """How the weights are held: `4 bits`, `4 and 8 bits`, `bfloat16`; the packed ones' bits."""
    packed = sorted({packing.bits for packing in storage.packings.values() if packing is not None})
    if not packed or storage.dequantize:
        return str(storage.dtype).removeprefix("mlx.core.")
    return f"{' and '.join(map(str, packed))} bits"
