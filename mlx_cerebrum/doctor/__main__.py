"""`mlx-cerebrum doctor`: what this machine can do, and what to change."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from mlx_cerebrum import cli, installed
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.text import one_line, say, tell

UNFIT = 1  # nothing can run here as it is, or a check of the selftest has failed
_MOST_SECONDS = 600.0


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    for flag in ("quick", "model", "out"):
        if getattr(args, flag) and not args.selftest:
            raise RequestError(f"--{flag} is for --selftest")
    if not 0 <= args.seconds <= _MOST_SECONDS:
        raise RequestError(f"seconds must be from 0 to {_MOST_SECONDS:g}, not {args.seconds:g}")
    try:
        import mlx.core  # noqa: F401
    except ImportError:
        remedy = installed.install_command("cpu", "mlx[cpu]")
        anew = f"{remedy}, or [cuda]" if sys.platform == "linux" else "install mlx anew"
        stop = installed.unfit() or f"MLX can't be loaded here: {anew}"
        return _show(args, [], {}, [stop], [])
    if args.selftest:
        return _selftest(args)
    from mlx_cerebrum.doctor import pace
    from mlx_cerebrum.doctor.report import report

    if args.seconds and not args.json:
        tell(f"timing the machine for {args.seconds:g} s ...")
    try:
        found = report(pace.measure(args.seconds) if args.seconds else None)
    except RuntimeError as error:  # MLX's: a driver that is missing, a device that is gone
        said = one_line(str(error).replace(str(Path.home()), "~"), 200)
        return _show(
            args, [], {}, [f"MLX fails here ({said}): install it, or its driver, anew"], []
        )
    return _show(args, found.facts, found.data, found.stops, found.advice)


def _selftest(args: argparse.Namespace) -> int:
    from mlx_cerebrum.doctor import page, selftest

    directory = selftest.default_folder(Path()) if args.out is None else args.out.expanduser()
    document = selftest.selftest(args.model or "demo", args.quick, directory)
    if args.json:
        say(json.dumps(document, ensure_ascii=False))
    else:
        say(f"{page.verdict(document)}: {directory / page.PAGE}")
    return 0 if page.passed(document) else UNFIT


def _show(
    args: argparse.Namespace,
    facts: list[tuple[str, str]],
    data: dict[str, Any],
    stops: list[str],
    advice: list[str],
) -> int:
    if args.json:
        say(json.dumps({"usable": not stops, **data, "stops": stops, "advice": advice}))
        return UNFIT if stops else 0
    width = max((len(label) for label, _ in facts), default=0)
    for label, words in facts:
        say(f"{label:<{width}}  {one_line(words, 300)}")
    for line in stops:
        say(f"to do: {line}")
    for line in advice:
        say(f"could be better: {line}")
    say("models can't run here yet" if stops else "models can run here")
    return UNFIT if stops else 0


def parser() -> cli.ArgumentParser:
    p = cli.ArgumentParser(
        prog="mlx-cerebrum doctor",
        description="Say what this machine is, what it can run and how fast, and what to change."
        " The text names nobody and no folder of yours: put it into a bug report as it is."
        " Exit code 1: nothing can run here, or a check of the selftest failed.",
    )
    p.add_argument(
        "--seconds",
        type=float,
        default=10.0,
        metavar="S",
        help="time a model for about so long, 0 not at all (default: 10)",
    )
    test = p.add_argument_group("selftest")
    test.add_argument(
        "--selftest",
        action="store_true",
        help="prove that all of it is right and fast here, and write a page fit to be sent: some"
        " minutes",
    )
    test.add_argument(
        "--quick", action="store_true", help="less of every check: two or three minutes"
    )
    test.add_argument(
        "--model",
        metavar="NAME",
        help="for the checks of memory, server and pace; what is right is shown with the demo"
        " model (default: demo)",
    )
    test.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where page and JSON go (default: bench/results/MACHINE-selftest in a checkout, else"
        " MACHINE-selftest here)",
    )
    p.add_json()
    p.add_debug()
    return p


if __name__ == "__main__":
    sys.exit(main())
