"""`python -m convert`: a source checkpoint to a folded or unrolled MLX directory."""

import argparse
import json
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mlx_cerebrum import cli  # isort: skip  # first: it quiets a Ctrl-C from here on
from convert import fold
from convert.calibrate import calibrate, read_text
from convert.calibrated import Calibrator
from convert.destination import JOURNAL, check_free, partial_of
from convert.duration import predicted_seconds
from convert.gguf_export import KINDS, export
from convert.layout import DTYPES, LAYOUTS, Options
from convert.passages import LENGTH, METHODS, MOST, TOKENS, Calibration, shipped
from convert.pipeline import convert
from convert.recipe import MIXED, RECIPES, Sensitivity, choose
from convert.upload import check_uploadable, upload
from convert.verify import main as verify
from mlx_cerebrum.errors import ConfigError
from mlx_cerebrum.flags import add_plan_flag, add_revision_flag
from mlx_cerebrum.machine.awake import awake
from mlx_cerebrum.model.memory import human
from mlx_cerebrum.model.tensors import place
from mlx_cerebrum.plan.layer_plan import resolve
from mlx_cerebrum.progress import progress
from mlx_cerebrum.text import one_line, say, tell
from mlx_cerebrum.weights import hub
from mlx_cerebrum.weights.checkpoint import Checkpoint
from mlx_cerebrum.weights.opening import open_checkpoint, planned_config
from mlx_cerebrum.weights.quantize import AFFINE_BITS, AFFINE_GROUPS, DEFAULTS, Packing

_MACS = (8, 16, 18, 24, 32, 36, 48, 64, 96, 128)  # GB of unified memory
_CALIBRATING = ("calibrate", "calibrate_tokens")
_NEEDS_Q = ("q_bits", "q_group_size", "q_mode", "q_recipe", "q_budget", *_CALIBRATING)
_NOT_GGUF = ("quantize", "dtype", "dequantize", "mlx_lm_shim", "no_verify", "allow_nonfinite")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["verify"]:
        return verify(argv[1:])
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(args), args.debug)


@awake()
def _run(args: argparse.Namespace) -> int:
    try:
        destination: Path = args.mlx_path.expanduser()
    except RuntimeError as error:  # ~nosuchuser
        raise ConfigError(f"{args.mlx_path}: {error}") from None
    options, text = _reading(args, options_of(args))
    if not (destination / JOURNAL).exists():  # before a download
        check_free(destination, "directory" if args.gguf is None else "file")
    if args.upload_repo is not None:
        check_uploadable(args.upload_repo)
    checkpoint = open_checkpoint(hub.resolve(args.hf_path, args.revision, as_stored=True))
    if args.gguf is not None:
        with progress("writing", not (args.quiet or args.json)) as report:
            written = export(
                checkpoint,
                destination,
                options.plan,
                window=options.window,
                kind=args.gguf,
                progress=report,
            )
    else:
        written = _directory(args, checkpoint, options, text, destination)
    if args.upload_repo is not None:
        quiet = args.quiet or args.json
        written["url"] = upload(destination, args.upload_repo, quiet=quiet)
    written |= {"path": str(args.mlx_path), "peak_memory": _peak_memory()}
    if args.json:
        say(json.dumps(written, ensure_ascii=False))
    elif not args.quiet:
        _show(written)
        if args.quantize and args.q_mode in (None, "affine") and args.q_recipe not in METHODS:
            tell(
                "note: --q-recipe gptq lost less at the same size where that was measured, and dwq"
                " came nearer still to the dense model; they read a text first, which takes longer"
            )
    return 0


def _directory(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    options: Options,
    text: str | None,
    destination: Path,
) -> dict[str, Any]:
    """text: what a table of sensitivities is measured on, if one is."""
    local = args.hf_path == "demo" or Path(args.hf_path).expanduser().exists()
    shown = not (args.quiet or args.json)
    if text is not None:
        table = _measured(checkpoint, options, text, shown)
        options = replace(
            options, recipe=partial(choose, "plan", budget=args.q_budget, table=table)
        )
    with progress("", shown) as report:
        try:
            return convert(
                checkpoint,
                destination,
                options,
                source=checkpoint.path.resolve().name if local else args.hf_path,
                revision=None if local else checkpoint.path.name,  # a snapshot's name is its commit
                progress=report,
                calibrating=_say_time if shown else None,
            )
        except KeyboardInterrupt:
            if not args.quiet and partial_of(destination).exists():
                with suppress(OSError):  # the terminal is gone
                    tell("stopped: run the same command again to go on from here")
            raise


def _reading(args: argparse.Namespace, options: Options) -> tuple[Options, str | None]:
    """The options with what --calibrate gives, and the text that a table is to be measured on.

    Bits of recipes that look at activations are `plan`'s, which loses least, unless all matrices
    are to have --q-bits. Raises ConfigError and RequestError for what can't be used: before a
    download.
    """
    looks, table, text = args.q_recipe in METHODS, None, None
    if args.calibrate is not None:
        try:
            path: Path = args.calibrate.expanduser()
        except RuntimeError as error:  # ~nosuchuser
            raise ConfigError(f"{args.calibrate}: {error}") from None
        if path.suffix != ".json":
            text = read_text(path)
        elif looks and args.q_bits is not None:
            raise ConfigError("a table of sensitivities is of no use where all get --q-bits")
        else:  # what `python -m convert.calibrate --out` wrote
            table = Sensitivity.load(path)
    if table is not None or (looks and args.q_bits is None):
        options = replace(
            options, recipe=partial(choose, "plan", budget=args.q_budget, table=table)
        )
    if not looks:
        return options, text
    tokens = TOKENS if args.calibrate_tokens is None else args.calibrate_tokens
    reads = Calibration(args.q_recipe, shipped() if text is None else text, tokens)
    return replace(options, calibration=reads), None


def _say_time(calibrator: Calibrator, resumes: bool) -> None:
    config, tokens = calibrator.layout.config, calibrator.tokens.size
    if tokens < calibrator.inputs:
        tell(
            f"warning: {tokens:,} tokens are fewer than a matrix has inputs, {calibrator.inputs:,}:"
            " fitted to these alone, it may answer worse than rounded. Give more text, or more"
            " --calibrate-tokens"
        )
    if resumes:
        when = "going on where it was stopped"
    else:
        method, blocks = calibrator.calibration.method, len(set(calibrator.layout.order))
        seconds = predicted_seconds(method, config, tokens, blocks, calibrator.dtype)
        minutes = max(1, round(seconds / 60))
        lasts = f"{minutes} min" if minutes < 90 else f"{minutes / 60:.0f} hours"
        when = f"about {lasts} on this machine"
    tell(
        f"calibrating on {tokens:,} tokens in {config.num_positions} positions, with up to"
        f" {human(calibrator.memory_bytes)} of memory: {when}"
    )


def _measured(checkpoint: Checkpoint, options: Options, text: str, shown: bool) -> Sensitivity:
    if fold.predict(checkpoint).repeats:
        raise ConfigError(
            f"{checkpoint.path} repeats its layers: convert it folded, then calibrate"
        )
    config = planned_config(checkpoint.config, options.plan, options.window)
    with progress("calibrating", shown, "matrices") as report:
        return calibrate(checkpoint, config, text, progress=report)


def _show(written: dict[str, Any]) -> None:
    """The table that closes a conversion."""
    for note in written["notes"]:
        tell(f"note: {note}")
    rows = list(_lines(written))
    width = max(len(label) for label, _ in rows)
    for label, text in rows:
        say(f"{label:<{width}}  {one_line(text)}")


def _lines(written: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Label and text of each row."""
    yield "written", str(written["path"])
    yield "layout", _layout(written)
    yield "size", f"{human(written['bytes'])}, {written['bits_per_weight']:.2f} bits a weight"
    yield from _bits(written.get("bits", {}))
    hashes = written["sha256"]
    for name, digest in ({"": hashes} if isinstance(hashes, str) else hashes).items():
        yield "sha256", f"{digest[:16]}... {name}".strip()
    if not hashes:
        yield "sha256", "none: not verified"
    if "seconds" in written:
        text = f"{written['seconds']:.1f} s, {human(written['peak_memory'])} of memory"
        if resumed := written["resumed_modules"]:
            text += f"; {resumed} modules were there already"
        yield "took", text
    if "cache_bytes" in written:
        needed = written["bytes"] + written["cache_bytes"]
        mac = _smallest_mac(needed)
        fits = "no Mac up to 128 GB" if mac is None else f"Macs with {mac} GB and more"
        cache = f"{human(written['cache_bytes'])} of cache at {written['cache_tokens']} tokens"
        yield "runs in", f"{human(needed)}, with {cache}: {fits}"
    if "url" in written:
        yield "uploaded", written["url"]


def _layout(written: dict[str, Any]) -> str:
    positions = written["positions"]
    if "layout" not in written:
        return f"GGUF, {positions} layers"
    layers = written["layers"]
    if layers == positions:
        return f"{written['layout']}, {layers} layers"
    return f"{written['layout']}, {layers} blocks in {positions} positions"


def _bits(bits: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Where widths are mixed: each kind of matrix, its bits layer by layer as digits."""
    kinds: dict[str, dict[int, int]] = {}
    for name, count in bits.items():
        layer, kind = place(name) or (0, name)
        kinds.setdefault(kind, {})[layer] = count
    if len(set(bits.values())) > 1:
        for kind, found in kinds.items():
            digits = "".join(str(count) for _, count in sorted(found.items()))
            yield f"bits of {kind.rpartition('.')[2]}", digits


def _smallest_mac(needed: int) -> int | None:
    """The least memory, in GB, of a Mac whose GPU may take `needed` bytes by default.

    Metal's recommended working set is two thirds of the memory up to 32 GB, three quarters of
    more (`sysctl iogpu.wired_limit_mb` raises it).
    """
    fits = (mac for mac in _MACS if needed <= mac * 2**30 * (2 / 3 if mac <= 32 else 3 / 4))
    return next(fits, None)


def _peak_memory() -> int:
    """The most this process held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


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
    p.add_json()
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
        choices=(*RECIPES, *METHODS),
        help="which matrices get how many bits: all --q-bits; mlx-lm's mixtures; `plan`, by"
        " how often a block runs and how sensitive it is; `gptq`, as `plan` (all --q-bits where"
        " that is given) and packed by what a text puts through each matrix; or `dwq`, as `gptq`,"
        " whose scales then learn to say what the dense model says (default: plan; uniform where"
        " --q-bits or --q-mode is given)",
    )
    group.add_argument(
        "--q-budget",
        type=float,
        metavar="BITS",
        help="bits a weight of what is written, for plan, gptq and dwq (default: what uniform"
        " takes, blocks stored once; 4.5 for 4-bit groups of 64)",
    )
    group.add_argument(
        "--calibrate",
        type=Path,
        metavar="TEXTFILE|TABLE.json",
        help="plan: measure this model's sensitivities on a text, with the whole model in memory,"
        " or take a table measured before (default: the table of a small model); gptq, dwq: the"
        " text to read (default: one that comes along)",
    )
    group.add_argument(
        "--calibrate-tokens",
        type=int,
        metavar="N",
        help=f"of the text, for gptq and dwq, {LENGTH} to {MOST} (default: {TOKENS})",
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
        choices=tuple(KINDS),
        help="write one unrolled file for llama.cpp instead; --mlx-path names a .gguf",
    )
    group.add_argument(
        "--upload-repo", metavar="HUBID", help="upload the finished directory to the hub"
    )


def options_of(args: argparse.Namespace) -> Options:
    """What the flags mean. Raises ConfigError for ones that don't go together."""
    if args.gguf is not None:
        _refuse(args, _NOT_GGUF, "can't be combined with --gguf, whose kind decides")
        _refuse(args, ("upload_repo",), "is for directories, and --gguf writes a file")
        if args.layout == "folded":
            raise ConfigError("--layout folded: GGUF has no repeated layers; drop it")
    if not args.quantize:
        _refuse(args, _NEEDS_Q, "only means something with -q")
    alone = args.q_bits is None and args.q_mode is None
    recipe = args.q_recipe or ("plan" if args.quantize and alone else "uniform")
    methods = " or ".join(METHODS)
    if recipe not in METHODS:
        _refuse(args, ("calibrate_tokens",), f"is for --q-recipe {methods}")
    elif (args.q_mode or "affine") != "affine":
        raise ConfigError(f"--q-recipe {recipe} is for --q-mode affine, not for {args.q_mode}")
    if recipe not in ("plan", *METHODS):
        _refuse(args, ("q_budget", "calibrate"), f"is for --q-recipe plan, {methods}")
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
        recipe=partial(choose, recipe if recipe in RECIPES else "uniform", budget=args.q_budget),
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


if __name__ == "__main__":
    sys.exit(main())
