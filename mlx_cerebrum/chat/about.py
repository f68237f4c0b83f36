"""What the model is that is talked with, in a few words."""

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from mlx_cerebrum.chat.screen import Rows
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.weights.opening import Opened
from mlx_cerebrum.weights.storage import Storage, dtype_name


def about(opened: Opened, models: Mapping[str, Model]) -> Rows:
    """Its name, the orders it answers in, the bits of its weights, and its window."""
    config, name = opened.config, str(opened.spec.name)
    orders = [f"{name} ({model.config.num_positions} positions)" for name, model in models.items()]
    window = f"window {config.sliding_window} tokens" if config.sliding_window else "no window"
    return (
        ("model", Path(name).name if Path(name).exists() else name),
        ("orders", f"{', '.join(orders)} over {config.num_hidden_layers} blocks"),
        ("weights", bits(opened.storage, next(iter(models.values())).dtype)),
        ("window", window),
    )


def bits(storage: Storage, dtype: mx.Dtype) -> str:
    """How the weights are held, and what is computed in: `bfloat16`, `4 and 8 bits in float16`."""
    packed = sorted({packing.bits for packing in storage.packings.values() if packing is not None})
    if not packed or storage.dequantize:
        return dtype_name(dtype)
    return f"{' and '.join(map(str, packed))} bits in {dtype_name(dtype)}"
