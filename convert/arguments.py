"""The flags of `python -m convert`, and the options they mean."""

import argparse
from functools import partial
from pathlib import Path

from convert.layout import DTYPES, LAYOUTS, Options
from convert.recipe import MIXED, RECIPES, choose
from mlx_cerebrum import cli
from mlx_cerebrum.errors import ConfigError
from mlx_cerebrum.flags import add_plan_flag, add_revision_flag
from mlx_cerebrum.plan.layer_plan import resolve
from mlx_cerebrum.weights import hub
from mlx_cerebrum.weights.quantize import AFFINE_BITS, AFFINE_GROUPS, DEFAULTS, Packing

GGUF_KINDS = ("F32", "F16", "BF16", "Q8_0")  # convert.gguf_export's, which needs its package
_NEEDS_Q = ("q_bits", "q_group_size", "q_mode", "q_recipe", "q_budget", "calibrate")
_NOT_GGUF = ("quantize", "dtype", "dequantize", "mlx_lm_shim", "no_verify", "allow_nonfinite")


def parser() -> cli.ArgumentParser:
    p = cli.ArgumentParser(
        prog="python -m convert",
        description="Write a checkpoint's blocks in the order of a plan: folded (each stored once,"
        " for mlx_cerebrum) or unrolled (as mergekit would, for any tool). A stopped conversion"
        " goes on where it was when the same command is run again.",
        epilog="`python -m convert verify DIR` checks every byte of a directory or file.",
    )
    p.add_argument(
        "--hf-path",
        metavar="DIR|FILE.gguf|HUBID|demo",
        default=hub.DEFAULT_REPO,
        help=f"the source (default: {hub.DEFAULT_REPO})",
    )
    p.add_argument(
        "--mlx-path", type=Path, required=True, metavar="PATH", help="output, must not exist yet"
    )
    add_revision_flag(p)
    add_plan_flag(p, "the source's own order")
    p.add_argument("--layout", choices=LAYOUTS, help="how to store it (default: folded)")
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
    p.add_argument(
        "--window",
        type=int,
        metavar="TOKENS",
        help="sliding window to record, in tokens, 0 for none (default: the source's)",
    )
    _add_quantization(p.add_argument_group("quantization"))
    _add_other_tools(p.add_argument_group("other tools"))
    p.add_argument(
        "--no-verify",
        action="store_true",
        help="neither hash the source nor look for NaN and infinities (recorded in the output)",
    )
    p.add_argument(
        "--allow-nonfinite", action="store_true", help="note NaN and infinities, don't refuse them"
    )
    p.add_argument("--quiet", action="store_true", help="print nothing but errors")
    p.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    p.add_debug()
    return p


def _add_quantization(group: argparse._ArgumentGroup) -> None:
    group.add_argument("-q", "--quantize", action="store_true", help="pack weights into fewer bits")
    group.add_argument("--q-bits", type=int, choices=AFFINE_BITS, help="bits a weight (default: 4)")
    group.add_argument(
        "--q-group-size", type=int, choices=AFFINE_GROUPS, help="weights per group (default: 64)"
    )
    group.add_argument(
        "--q-mode",
        choices=tuple(DEFAULTS),
        help="integers with a scale and a bias, or a float format, whose bits and group size are"
        " fixed (default: affine)",
    )
    group.add_argument(
        "--q-recipe",
        choices=RECIPES,
        help="which matrices get how many bits: all --q-bits; mlx-lm's mixtures; or `plan`, by how"
        " often a block runs and how sensitive it is (default: uniform)",
    )
    group.add_argument(
        "--q-budget",
        type=float,
        metavar="BITS",
        help="bits a weight in all for the recipe plan (default: what uniform takes; 4.5 for 4-bit"
        " groups of 64)",
    )
    group.add_argument(
        "--calibrate",
        type=Path,
        metavar="TEXTFILE|TABLE.json",
        help="measure this model's sensitivities on a text, with the whole model in memory, or"
        " take a table measured before (default: the table of a small model)",
    )


def _add_other_tools(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--mlx-lm-shim",
        action="store_true",
        help="add a model file, so that stock mlx-lm runs a folded directory"
        " (with --trust-remote-code)",
    )
    group.add_argument(
        "--gguf",
        choices=GGUF_KINDS,
        help="write one unrolled file for llama.cpp instead; --mlx-path names a .gguf",
    )
    group.add_argument(
        "--upload-repo", metavar="HUBID", help="upload the finished directory to the hub"
    )


def options(args: argparse.Namespace) -> Options:
    """What the flags mean. Raises ConfigError for ones that don't go together."""
    if args.gguf is not None:
        _refuse(args, _NOT_GGUF, "can't be combined with --gguf, whose kind decides")
        if args.layout == "folded":
            raise ConfigError("--layout folded: GGUF has no repeated layers; drop it")
    if not args.quantize:
        _refuse(args, _NEEDS_Q, "only means something with -q")
    recipe = args.q_recipe or "uniform"
    for name in ("q_budget", "calibrate"):
        if recipe != "plan":
            _refuse(args, (name,), "is for --q-recipe plan")
    if recipe in MIXED:
        _refuse(args, ("q_bits",), f"can't be combined with {recipe}, which has its own")
    if args.q_budget is not None:
        _refuse(args, ("q_bits",), "can't be combined with --q-budget, which says how many")
    if args.no_verify:
        _refuse(args, ("allow_nonfinite",), "notes what --no-verify does not look for")
    mode = args.q_mode or "affine"
    bits, group_size = DEFAULTS[mode]
    packing = Packing(args.q_bits or bits, args.q_group_size or group_size, mode)
    return Options(
        plan=None if args.plan is None else resolve(args.plan),
        layout=args.layout or "folded",
        dtype=args.dtype,
        packing=packing if args.quantize else None,
        recipe=partial(choose, recipe, budget=args.q_budget),
        dequantize=args.dequantize,
        window=args.window,
        verify=not args.no_verify,
        allow_nonfinite=args.allow_nonfinite,
        shim=args.mlx_lm_shim,
    )


def _refuse(args: argparse.Namespace, names: tuple[str, ...], why: str) -> None:
    for name in names:
        if getattr(args, name) not in (None, False):
            flag = "-q" if name == "quantize" else f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} {why}")
