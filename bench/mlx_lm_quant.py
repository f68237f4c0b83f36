"""mlx-lm's own quantization on the text that `convert` reads, for bench.recipes.

    python -m bench.mlx_lm_quant gptq|dwq|dynamic_quant|awq DENSE_DIR OUT_DIR

What `mlx_lm.gptq` and its like do with a text that they download. Their sequences are consecutive
pieces of plain text, as there. The model is held in float32, in which inputs and slopes are added
up, and scales are written in bfloat16. Tables get 4 bits in groups of 64 as all else does, so that
sizes are equal; dynamic_quant gives a matrix 4 or 6, the most sensitive first, up to `--bits` a
weight in all. (Its own search for the threshold stops at a thousandth of the range of
sensitivities, and on a merge most lie below that: asked for 4.710 bits, it spent 4.505.)

mlx-lm's default for DWQ is 512 steps at a rate of 1e-6. On a text as short as this one's it would
change nothing: it gets as many steps as ours, at the one of three rates (2e-5, 1e-4, 3e-4) whose
loss fell furthest in the first steps on the demo model's merge.
"""

import argparse
import copy
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_cerebrum import cli, device

LENGTH = 512  # tokens a sequence
BATCH = 1  # sequences a step of DWQ: as ours
METHODS = ("gptq", "dwq", "dynamic_quant", "awq")
AWQ_TOKENS = 4096  # at most: its search tries sixty scales a layer on them


def main(argv: list[str] | None = None) -> int:
    p = cli.ArgumentParser(prog="bench.mlx_lm_quant", description="mlx-lm's own quantization.")
    p.add_argument("method", choices=METHODS, help="which")
    p.add_argument("dense", type=Path, metavar="DENSE_DIR", help="unrolled, not quantized")
    p.add_argument("out", type=Path, metavar="OUT_DIR", help="where to write")
    p.add_argument("--calibrate", type=Path, metavar="FILE", help="another text")
    tokens = f"of it; awq reads {AWQ_TOKENS} at most (default: 16384)"
    p.add_argument("--tokens", type=int, default=16384, metavar="N", help=tokens)
    p.add_argument("--bits", type=float, default=5.0, help="of dynamic_quant (default: 5.0)")
    p.add_argument("--rate", type=float, default=1e-4, help="of DWQ's steps (default: 1e-4)")
    p.add_debug()
    args = p.parse_args(argv)
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    from mlx_lm.utils import load, save

    shipped = files("convert") / "data" / "calibration.txt"
    text = (args.calibrate or shipped).read_text(encoding="utf-8")
    model, tokenizer, config = load(str(args.dense), lazy=True, return_config=True)
    model.set_dtype(mx.float32)
    ids = tokenizer.encode(text)
    model, config = globals()[f"_{args.method}"](model, config, ids, args)
    model.set_dtype(mx.bfloat16)
    save(args.out, str(args.dense), model, tokenizer, config)
    return 0


def _sequences(ids: list[int], tokens: int) -> mx.array:
    ids = ids[: tokens // LENGTH * LENGTH]
    return mx.array(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH)


def _gptq(model: Any, config: Any, ids: list[int], args: argparse.Namespace) -> tuple[Any, Any]:
    from mlx_lm.quant.gptq import gptq_quantize

    model, quantization = gptq_quantize(model, _sequences(ids, args.tokens), 4, 64, 4, 64)
    return model, config | {"quantization": quantization}


def _dwq(model: Any, config: Any, ids: list[int], args: argparse.Namespace) -> tuple[Any, Any]:
    from mlx.optimizers import Adam
    from mlx_lm.quant.dwq import dwq_quantize
    from mlx_lm.utils import quantize_model

    if not device.on_gpu():
        _unpack_first()
    student, config = quantize_model(copy.deepcopy(model), config, 64, 4)
    # A sequence's last token is only what its last but one is followed by.
    starts = range(0, len(ids) - LENGTH, LENGTH)
    pieces = [(ids[i : i + LENGTH + 1], 0) for i in starts]
    count = args.tokens // LENGTH
    dwq_quantize(
        student,
        lambda batch, number, split: model(batch),
        Adam(learning_rate=args.rate, bias_correction=True),
        pieces[:count],
        pieces[count : count + 1],
        batch_size=BATCH,
        max_seq_length=LENGTH + 1,
        seed=123,
        dtype=mx.float32,
        gradient_checkpoint=True,
    )
    return student, config


def _unpack_first() -> None:
    """The same products, of packed values made dense: MLX's own take a CPU about ten times as long
    for a sequence."""

    def product(module: Any, x: mx.array) -> mx.array:
        how = module.group_size, module.bits
        return x @ mx.dequantize(module.weight, module.scales, module.biases, *how).T

    nn.QuantizedLinear.__call__ = product  # type: ignore[method-assign]
    nn.QuantizedEmbedding.as_linear = product  # type: ignore[method-assign]


def _dynamic_quant(
    model: Any, config: Any, ids: list[int], args: argparse.Namespace
) -> tuple[Any, Any]:
    from mlx_lm.quant.dynamic_quant import estimate_sensitivities
    from mlx_lm.utils import quantize_model

    low, high = (4, 64), (6, 64)
    data = _sequences(ids, args.tokens)
    found = dict(estimate_sensitivities(model, data, *low, *high, gradient_checkpoint=True))
    modules = dict(model.named_modules())
    sizes = {path: modules[path].weight.size for path in found}
    left = (args.bits - low[0] - 32 / low[1]) * sum(sizes.values())  # for higher bits than 4
    favoured = set()
    for path in sorted(found, key=found.__getitem__, reverse=True):
        price = (high[0] - low[0]) * sizes[path]
        if price <= left:
            left -= price
            favoured.add(path)

    def chosen(path: str, module: Any) -> bool | dict[str, int]:
        if not hasattr(module, "to_quantized"):
            return False
        return {"bits": high[0], "group_size": high[1]} if path in favoured else True

    bits, group_size = low
    made, config = quantize_model(model, config, group_size, bits, quant_predicate=chosen)
    return made, config


def _awq(model: Any, config: Any, ids: list[int], args: argparse.Namespace) -> tuple[Any, Any]:
    from mlx_lm.quant.awq import AWQ_MODEL_CONFIGS, awq_quantize, update_config

    known = AWQ_MODEL_CONFIGS[config["model_type"]]
    data = _sequences(ids, min(args.tokens, AWQ_TOKENS))
    awq_quantize(model, data, known, 64, 4, 64, 4)
    return model, update_config(model, config)


if __name__ == "__main__":
    sys.exit(main())
