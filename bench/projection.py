"""What other machines should make of a model, from bytes and published bandwidths alone.

Nothing here is measured. Decoding reads `bytes` for each token, so no machine decodes faster
than bandwidth / bytes (the roof). What engines reach of it on Apple's GPUs is known from
others' tables: mlx-lm decodes Mistral-7B in 4 bits at 120.5 tokens/s on an M2 Ultra, 60% of its
roof (mlx-lm's own benchmark table). The second figure here is that 60%, for want of a
measurement of ours.
"""

from bench.bandwidth import PUBLISHED
from bench.report import table
from bench.suite import Results
from mlx_cerebrum.config import ModelConfig
from mlx_cerebrum.memory import GB

TYPICAL = 0.6  # of the roof
# bits a weight: bf16, and affine groups of 64 with 16-bit scale and bias
BITS = {"bf16": 16.0, "8-bit": 8.5, "4-bit": 4.5}
CHIPS = tuple(chip for chip in PUBLISHED if chip.startswith("Apple"))


def project(configs: dict[str, ModelConfig]) -> Results:
    """Of each model and precision: bytes a token, and the roof in tokens/s of each chip."""
    found: Results = {"typical": TYPICAL, "models": {}}
    for name, config in configs.items():
        for kind, bits in BITS.items():
            # The embedding is a row, not a matrix, to a token; a tied one is read as the head.
            read = config.num_positions * config.block_parameters
            read += config.vocab_size * config.hidden_size + config.hidden_size
            nbytes = int(read * bits / 8)
            roofs = {chip: [value * GB / nbytes for value in PUBLISHED[chip]] for chip in CHIPS}
            stored = int(config.stored_parameters * bits / 8)
            found["models"][f"{name}, {kind}"] = {
                "bytes_per_token": nbytes,
                "stored": stored,
                "roof": roofs,
            }
    return found


def text(found: Results) -> list[str]:
    models = found["models"]
    header = ["chip", "GB/s", *models]
    rows = []
    for chip in CHIPS:
        gbs = "/".join(f"{value:g}" for value in PUBLISHED[chip])
        rows.append(
            [chip, gbs, *(_cell(models[m]["roof"][chip], found["typical"]) for m in models)]
        )
    read = ", ".join(f"{name} {one['bytes_per_token'] / GB:.2f} GB" for name, one in models.items())
    return [
        "**A projection, not a measurement**: decode tokens/s at short context, the roof"
        f" (published bandwidth / bytes read a token) and, in brackets, {found['typical']:.0%} of"
        f" it, which is what mlx-lm is known to reach. Of two GPUs by one name the larger. Read a"
        f" token: {read}.",
        table(header, rows),
    ]


def _cell(roofs: list[float], typical: float) -> str:
    roof = max(roofs)
    return f"{_pace(roof)} ({_pace(roof * typical)})"


def _pace(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"
