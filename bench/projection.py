"""What other machines should make of a model, from bytes and published bandwidths alone.

Nothing here is measured. Decoding reads `bytes` for each token, so no machine decodes faster
than bandwidth / bytes (the roof). What engines reach of it on Apple's GPUs with a 7B in 4 bits
others have published: llama.cpp (its table of Llama-2-7B Q4_0 on Apple silicon) from 45% on an M2
Ultra (94 tokens/s) to 84% on an M2 (21.9), mlx-lm 60% on an M2 Ultra (120.5; its benchmark table).
The larger the chip, the smaller the share.
"""

from bench.bandwidth import PUBLISHED
from bench.report import table
from bench.suite import Results
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.memory import GB

KNOWN = (0.45, 0.84)  # of the roof, least and most
# bits a weight: bf16, and affine groups of 64 with 16-bit scale and bias
BITS = {"bf16": 16.0, "8-bit": 8.5, "4-bit": 4.5}
CHIPS = tuple(chip for chip in PUBLISHED if chip.startswith("Apple"))


def project(configs: dict[str, ModelConfig]) -> Results:
    """Of each model and precision: bytes a token, and the roof in tokens/s of each chip."""
    models: Results = {}
    for name, config in configs.items():
        for kind, bits in BITS.items():
            nbytes = int(parameters_read(config) * bits / 8)
            roofs = {chip: [gbs * GB / nbytes for gbs in PUBLISHED[chip]] for chip in CHIPS}
            models[f"{name}, {kind}"] = {"bytes_per_token": nbytes, "roof": roofs}
    return {"known": list(KNOWN), "models": models}


def parameters_read(config: ModelConfig) -> int:
    """Parameters that decoding a token reads: every position's block, the last norm, the head."""
    # The embedding is a row, not a matrix, to a token; a tied one is read as the head.
    read = config.num_positions * config.block_parameters
    return read + config.vocab_size * config.hidden_size + config.hidden_size


def text(found: Results) -> list[str]:
    models, (least, most) = found["models"], found["known"]

    def cell(roof: float) -> str:
        paces = (f"{v:.1f}" if v < 10 else f"{v:.0f}" for v in (roof, roof * least, roof * most))
        return "{} ({}-{})".format(*paces)

    rows = [
        [chip, "/".join(f"{gbs:g}" for gbs in PUBLISHED[chip])]
        + [cell(max(model["roof"][chip])) for model in models.values()]
        for chip in CHIPS
    ]
    read = ", ".join(f"{name} {one['bytes_per_token'] / GB:.2f} GB" for name, one in models.items())
    return [
        "**A projection, not a measurement**: decode tokens/s at short context, the roof"
        " (published bandwidth / bytes read a token) and, in brackets,"
        f" {least:.0%} to {most:.0%} of it, as engines are known to reach,"
        " large chips less. Of two GPUs by one name the larger. Read a token:"
        f" {read}.",
        table(["chip", "GB/s", *models], rows),
    ]
