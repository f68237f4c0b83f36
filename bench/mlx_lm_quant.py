"""mlx-lm's own GPTQ on the text that `convert` reads, for bench.recipes.

    python -m bench.mlx_lm_gptq DENSE_DIR OUT_DIR

`mlx_lm.gptq` is the same function on a text that it downloads, with embeddings in 6 bits; here
they get 4, so that sizes are equal. Its sequences are consecutive pieces of plain text, as there.
The model is held in float32, in which inputs are added up, and scales are written in bfloat16.
"""

import argparse
import sys
from importlib.resources import files
from pathlib import Path

import mlx.core as mx

from mlx_cerebrum import cli

LENGTH = 512  # tokens a sequence


def main(argv: list[str] | None = None) -> int:
    p = cli.ArgumentParser(prog="bench.mlx_lm_gptq", description="mlx-lm's GPTQ on convert's text.")
    p.add_argument("dense", type=Path, metavar="DENSE_DIR", help="unrolled, not quantized")
    p.add_argument("out", type=Path, metavar="OUT_DIR", help="where to write")
    p.add_argument("--calibrate", type=Path, metavar="FILE", help="another text")
    p.add_argument("--tokens", type=int, default=16384, metavar="N", help="of it (default: 16384)")
    p.add_debug()
    args = p.parse_args(argv)
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    from mlx_lm.quant.gptq import gptq_quantize
    from mlx_lm.utils import load, save

    shipped = files("convert") / "data" / "calibration.txt"
    text = (args.calibrate or shipped).read_text(encoding="utf-8")
    model, tokenizer, config = load(str(args.dense), lazy=True, return_config=True)
    model.set_dtype(mx.float32)
    ids = tokenizer.encode(text)[: args.tokens // LENGTH * LENGTH]
    data = mx.array(ids).reshape(-1, LENGTH)
    model, config["quantization"] = gptq_quantize(model, data, 4, 64, 4, 64)
    model.set_dtype(mx.bfloat16)
    save(args.out, str(args.dense), model, tokenizer, config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
