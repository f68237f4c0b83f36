"""`mlx-cerebrum show NAME`: one model of the shelf, and what it was made of."""

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

from mlx_cerebrum import cli
from mlx_cerebrum.shelf.entries import entries, require
from mlx_cerebrum.shelf.listing import ago, facts, size_text
from mlx_cerebrum.text import one_line, say


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    entry = require(args.name)
    known = facts(entry)
    if args.json:
        say(json.dumps(known))
        return 0
    rows = list(_rows(known))
    width = max(len(label) for label, _ in rows)
    for label, text in rows:
        say(f"{label:<{width}}  {one_line(text, 200)}")
    others = [e.called for e in entries() if e.name == entry.name and e.bits != entry.bits]
    if others:
        say(f"also here: {', '.join(others)}")
    return 0


def _rows(known: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "name", known["name"]
    yield "folder", known["path"]
    if "damaged" in known:
        yield "damaged", "its config.json can't be read"
        return
    if "gguf" in known:
        yield "size", f"{size_text(known['bytes'])}, a GGUF file"
        yield "last used", ago(known["last_used"])
        return
    shared = known["bytes_shared"]
    more = f", {size_text(shared)} of it shared with another model" if shared else ""
    yield "size", f"{size_text(known['bytes'])}, {known['bits']} bits a weight{more}"
    blocks, positions = known["blocks"], known["positions"]
    yield "layers", f"{blocks} blocks in {positions} positions"
    window = f"{known['window']} tokens" if known["window"] else "none"
    yield "window", f"{window}; conversations up to {known['context']} tokens"
    if known["source"]:
        yield "made of", f"{known['source']}, revision {known['revision'] or 'unknown'}"
        yield "made by", str(known["made_by"])
    yield "last used", ago(known["last_used"])


def parser() -> cli.ArgumentParser:
    p = cli.ArgumentParser(
        prog="mlx-cerebrum show", description="Show what a model of the shelf is and is made of."
    )
    p.add_argument("name", metavar="NAME[:BITS]", help="as `mlx-cerebrum list` has it")
    p.add_json()
    p.add_debug()
    return p


if __name__ == "__main__":
    sys.exit(main())
