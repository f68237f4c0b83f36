"""`python -m convert`: a source checkpoint to a folded or unrolled MLX directory."""

import argparse
import sys
import time
from pathlib import Path

from convert.pipeline import DTYPES, LAYOUTS, convert
from mlx_cerebrum import cli, hub
from mlx_cerebrum.checkpoint import open_checkpoint
from mlx_cerebrum.errors import ConfigError
from mlx_cerebrum.memory import human
from mlx_cerebrum.plan import resolve
from mlx_cerebrum.progress import progress
from mlx_cerebrum.quantize import AFFINE_BITS, AFFINE_GROUPS, Packing


def parser() -> cli.ArgumentParser:
    p = cli.ArgumentParser(
        prog="python -m convert",
        description="Write a checkpoint's blocks in the order of a plan: folded (each stored once,"
        " for mlx_cerebrum) or unrolled (as mergekit would, for any tool).",
    )
    p.add_argument(
        "--hf-path",
        metavar="DIR|FILE.gguf|HUBID|demo",
        default=hub.DEFAULT_REPO,
        help=f"the source (default: {hub.DEFAULT_REPO})",
    )
    p.add_argument("--mlx-path", type=Path, required=True, metavar="DIR", help="must not exist yet")
    p.add_argument("--revision", help="hub branch, tag or commit (default: main)")
    p.add_argument(
        "--plan",
        metavar="NAME|FILE",
        help="layer plan: a named one or mergekit YAML (default: the source's own order)",
    )
    p.add_argument(
        "--layout", choices=LAYOUTS, default="folded", help="how to store it (default: folded)"
    )
    p.add_argument(
        "--dtype",
        choices=DTYPES,
        help="cast to (default: as stored; unrolled: the plan's dtype, as mergekit does)",
    )
    p.add_argument(
        "--dequantize",
        action="store_true",
        help="make a quantized source dense (float32, or --dtype)",
    )
    p.add_argument("-q", "--quantize", action="store_true", help="pack weights into fewer bits")
    p.add_argument("--q-bits", type=int, choices=AFFINE_BITS, help="bits a weight (default: 4)")
    p.add_argument(
        "--q-group-size", type=int, choices=AFFINE_GROUPS, help="weights per group (default: 64)"
    )
    p.add_argument(
        "--window",
        type=int,
        metavar="TOKENS",
        help="sliding window to record, in tokens, 0 for none (default: the source's)",
    )
    p.add_argument("--quiet", action="store_true", help="print nothing but errors")
    p.add_debug()
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    packing = _packing(args)
    plan = None if args.plan is None else resolve(args.plan)
    checkpoint = open_checkpoint(hub.resolve(args.hf_path, args.revision))
    local = args.hf_path == "demo" or Path(args.hf_path).expanduser().exists()
    started = time.perf_counter()
    with progress("writing", not args.quiet) as report:
        written = convert(
            checkpoint,
            args.mlx_path.expanduser(),
            plan,
            layout=args.layout,
            dtype=args.dtype,
            packing=packing,
            dequantize=args.dequantize,
            window=args.window,
            source=checkpoint.path.name if local else args.hf_path,
            revision=None if local else checkpoint.path.name,  # a snapshot's name is its commit
            progress=report,
        )
    if not args.quiet:
        for note in written["notes"]:
            print(f"note: {note}", file=sys.stderr)
        took = time.perf_counter() - started
        print(
            f"{args.mlx_path}: {args.layout}, {written['positions']} positions over"
            f" {written['layers']} stored layers, {human(written['bytes'])},"
            f" {written['bits_per_weight']:.2f} bits a weight, {took:.1f} s"
        )
    return 0


def _packing(args: argparse.Namespace) -> Packing | None:
    if args.quantize:
        return Packing(args.q_bits or 4, args.q_group_size or 64)
    if args.q_bits is not None or args.q_group_size is not None:
        raise ConfigError("--q-bits and --q-group-size only mean something with -q")
    return None


if __name__ == "__main__":
    sys.exit(main())
