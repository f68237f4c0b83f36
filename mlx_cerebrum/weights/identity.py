"""What decides a run's numbers, in a few short texts: two runs whose texts are equal may share
what one of them computed, and machines whose texts are equal may work on one model together."""

import json
from hashlib import sha256

from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.weights.checkpoint import Checkpoint
from mlx_cerebrum.weights.storage import Storage, dtype_name

Identity = dict[str, str]  # as `identity_of` makes it

# Of every stored array this many pieces of this many bytes go into the weights' fingerprint.
SAMPLES, SAMPLE_BYTES = 4, 256


def identity_of(
    checkpoint: Checkpoint, config: ModelConfig, storage: Storage, template: str
) -> Identity:
    """What a cache entry depends on: short texts, by names that a person knows.

    `template` is the source of the chat template in use. The weights'
    fingerprint is of names, shapes, dtypes, sizes and SAMPLES evenly spread pieces of every stored
    array, wherever the files lie: it tells models apart, but is no security check.
    """
    packings = {str(p) for p in storage.packings.values() if p is not None}
    held = ", ".join(sorted(packings)) or "none"
    each = sorted((module, str(p)) for module, p in storage.packings.items())
    quantization = f"{held}{', made dense' if packings and storage.dequantize else ''}"
    scales = config.residual_scales
    geometry = (
        config.hidden_size,
        config.num_hidden_layers,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.rms_norm_eps,
        config.vocab_size,
        config.rope_theta,
        config.tie_word_embeddings,
    )
    return {
        "model weights": _fingerprint(checkpoint),
        "model config": _short(geometry),
        "layer plan": f"{config.num_positions} positions {_short([config.layer_map, scales])}",
        "quantization": f"{quantization} {_short(each)}" if packings else quantization,
        "dtype": dtype_name(storage.dtype),
        "window": str(config.sliding_window or "none"),
        "chat template": _short(template),
    }


def _short(value: object) -> str:
    return sha256(json.dumps(value).encode()).hexdigest()[:16]


def _fingerprint(checkpoint: Checkpoint) -> str:
    shapes = checkpoint.shapes.items()
    digest = sha256(json.dumps(sorted((n, s, checkpoint.dtypes[n]) for n, s in shapes)).encode())
    extents = {
        (module, part): extent
        for module in {name.rpartition(".")[0] for name in checkpoint.shapes}
        for part, extent in checkpoint.extents(module).items()
    }
    for name, extent in sorted(extents.items()):
        digest.update(json.dumps([name, extent.nbytes]).encode())
        for piece in extent.samples(SAMPLES, SAMPLE_BYTES):
            digest.update(piece)
    return digest.hexdigest()[:16]
