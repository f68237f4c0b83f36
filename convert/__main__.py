"""`python -m convert`: a source checkpoint to a folded or unrolled MLX directory."""

import argparse
import json
import resource
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mlx_cerebrum import cli  # isort: skip  # first: it quiets a Ctrl-C from here on
from convert import arguments, fold
from convert.destination import check_free, partial_of
from convert.layout import Options
from convert.pipeline import convert
from convert.recipe import choose
from convert.sensitivity import Sensitivity
from convert.writer import JOURNAL
from mlx_cerebrum.errors import ConfigError
from mlx_cerebrum.progress import progress
from mlx_cerebrum.text import say, tell
from mlx_cerebrum.weights import hub
from mlx_cerebrum.weights.checkpoint import Checkpoint
from mlx_cerebrum.weights.opening import open_checkpoint, planned_config


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["verify"]:
        from convert.verify import main as verify

        return verify(argv[1:])
    args = arguments.parser().parse_args(argv)
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    try:
        destination: Path = args.mlx_path.expanduser()
    except RuntimeError as error:  # ~nosuchuser
        raise ConfigError(f"{args.mlx_path}: {error}") from None
    options = arguments.options(args)
    if not (destination / JOURNAL).exists():  # before a download
        check_free(destination)
    if args.upload_repo is not None:
        from convert.upload import check

        check(args.upload_repo)
    checkpoint = open_checkpoint(hub.resolve(args.hf_path, args.revision))
    if args.gguf is not None:
        written = _gguf(args, checkpoint, options, destination)
    else:
        written = _directory(args, checkpoint, options, destination)
    if args.upload_repo is not None:
        from convert.upload import upload

        quiet = args.quiet or args.json
        written["url"] = upload(destination, args.upload_repo, quiet=quiet)
    written |= {"path": str(args.mlx_path), "peak_memory": _peak_memory()}
    if args.json:
        say(json.dumps(written, ensure_ascii=False))
    elif not args.quiet:
        from convert.report import show

        show(written)
    return 0


def _directory(
    args: argparse.Namespace, checkpoint: Checkpoint, options: Options, destination: Path
) -> dict[str, Any]:
    local = args.hf_path == "demo" or Path(args.hf_path).expanduser().exists()
    shown = not (args.quiet or args.json)
    if args.calibrate is not None:
        table = _calibrated(args, checkpoint, options, shown)
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
            )
        except KeyboardInterrupt:
            if not args.quiet and partial_of(destination).exists():
                with suppress(OSError):  # the terminal is gone
                    tell("stopped: run the same command again to go on from here")
            raise


def _calibrated(
    args: argparse.Namespace, checkpoint: Checkpoint, options: Options, shown: bool
) -> Sensitivity:
    from convert.calibrate import calibrate

    if args.calibrate.suffix == ".json":  # what `python -m convert.calibrate --out` wrote
        return Sensitivity.load(args.calibrate.expanduser())
    if fold.predict(checkpoint).repeats:
        raise ConfigError(
            f"{checkpoint.path} repeats its layers: convert it folded, then calibrate"
        )
    try:
        text = args.calibrate.expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{args.calibrate} is not UTF-8 text") from None
    config = planned_config(checkpoint.config, options.plan, options.window)
    with progress("calibrating", shown, "matrices") as report:
        return calibrate(checkpoint, config, text, progress=report)


def _gguf(
    args: argparse.Namespace, checkpoint: Checkpoint, options: Options, destination: Path
) -> dict[str, Any]:
    from convert.gguf_export import export

    config = planned_config(checkpoint.config, None, options.window)
    if options.plan is not None:
        config = config.with_map(options.plan.layer_map(config.num_hidden_layers))
    with progress("writing", not (args.quiet or args.json)) as report:
        return export(
            checkpoint, config, options.plan, destination, kind=args.gguf, progress=report
        )


def _peak_memory() -> int:
    """The most this process held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


if __name__ == "__main__":
    sys.exit(main())
