"""`mlx-cerebrum rm NAME`: take models off the shelf, whole ones and half-made ones."""

import argparse
import shutil
import sys
from pathlib import Path

from mlx_cerebrum import cli, installed
from mlx_cerebrum.errors import CheckpointError, RequestError
from mlx_cerebrum.shelf.entries import Entry, Unfinished, entries, require, unfinished
from mlx_cerebrum.shelf.listing import cached_models, size_text
from mlx_cerebrum.shelf.lock import alone
from mlx_cerebrum.shelf.places import folder, folder_name, short_name, split
from mlx_cerebrum.text import one_line, say


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    for name in args.name:
        here, begun = _meant(name)
        if not here and not begun:
            if any(name.lower() == cached.lower() for cached, _ in cached_models()):
                hf = installed.program("hf")
                raise RequestError(f"{name} is the hub's cache's: remove it with `{hf} cache rm`")
            require(name)  # says what there is
        if len(here) > 1:
            several = ", ".join(entry.called for entry in here)
            raise RequestError(f"{name} is here more than once; say which: {several}")
        for each in begun:
            _drop(each)
        for entry in here:
            freed, size = entry.own_nbytes, entry.nbytes
            _remove(entry.path)
            kept = "; its weights stay, another model has them" if freed < size else ""
            say(f"{one_line(entry.called)} is removed: {size_text(freed)}{kept}")
    return 0


def _meant(name: str) -> tuple[list[Entry], list[Unfinished]]:
    """The models, and the unfinished ones, of this name."""
    asked, bits = split(name)
    asked = (short_name(asked) or asked).lower()
    here = [e for e in entries() if asked in (e.name.lower(), e.path.name.lower())]
    begun = [u for u in unfinished() if u.name.lower() == asked]
    return [e for e in here if bits in (None, e.bits)], [u for u in begun if bits in (None, u.bits)]


def _drop(begun: Unfinished) -> None:
    """Remove what a stopped run left. Raises CheckpointError while it runs."""
    with alone(begun.path.name, None):
        for half in folder().glob(f".{folder_name(begun.name)}-*bit.partial"):
            shutil.rmtree(half)
        shutil.rmtree(begun.path)
    say(f"{one_line(begun.name)}: what was fetched of it is removed")


def _remove(path: Path) -> None:
    """At once gone from the shelf, whatever becomes of the rest."""
    gone = path.with_name(f".{path.name}.gone")
    try:
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone)
    except OSError as error:
        raise CheckpointError(f"{path} can't be removed: {error.strerror}") from None


def parser() -> cli.ArgumentParser:
    p = cli.ArgumentParser(
        prog="mlx-cerebrum rm",
        description="Remove models from the shelf. What another model shares with one stays.",
    )
    p.add_argument("name", metavar="NAME[:BITS]", nargs="+", help="as `mlx-cerebrum list` has it")
    p.add_debug()
    return p


if __name__ == "__main__":
    sys.exit(main())
