"""`mlx-cerebrum list`: which models are here, and what is still being made."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from mlx_cerebrum import cli
from mlx_cerebrum.errors import CerebrumError
from mlx_cerebrum.shelf.entries import Entry, Unfinished, entries, unfinished
from mlx_cerebrum.shelf.places import folder
from mlx_cerebrum.text import one_line, say

_UNITS = ((60, "s"), (60, "min"), (24, "h"), (7, "days"), (52, "weeks"))
_HEADINGS = ("name", "size", "bits", "window", "made of", "last used")


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    here, coming, cached = entries(), unfinished(), cached_models()
    if args.json:
        found: dict[str, Any] = {
            "folder": str(folder()),
            "models": [facts(entry) for entry in here],
            "unfinished": [{"name": u.name, "bits": u.bits, "path": str(u.path)} for u in coming],
            "hub_cache": [{"name": name, "bytes": size} for name, size in cached],
        }
        say(json.dumps(found))
        return 0
    if here:
        _table([_HEADINGS, *(_row(entry) for entry in here)])
    else:
        say("no models yet; the first: mlx-cerebrum pull cerebrum-12.25b")
    for each in coming:
        say(_unfinished(each))
    if cached:
        say("in the hub's cache, under the name they have there:")
        _table([(f"  {one_line(name)}", size_text(size)) for name, size in cached])
    return 0


def facts(entry: Entry) -> dict[str, Any]:
    """What is known of a model without reading its weights; sizes in bytes, windows in tokens."""
    if not entry.bits:
        known = {"name": entry.called, "path": str(entry.path), "bytes": entry.nbytes}
        return known | {"gguf": True, "last_used": entry.used}
    with suppress(CerebrumError):
        config, made = entry.config, entry.provenance
        layers, order = config.get("num_hidden_layers"), config.get("layer_map")
        return {
            "name": entry.called,
            "path": str(entry.path),
            "bytes": entry.nbytes,
            "bytes_shared": entry.nbytes - entry.own_nbytes,
            "bits": entry.bits,
            "blocks": layers,
            "positions": len(order) if isinstance(order, list) else layers,
            "window": config.get("sliding_window"),
            "context": config.get("max_position_embeddings"),
            "source": made.get("source"),
            "revision": made.get("revision"),
            "made_by": made.get("tool"),
            "last_used": entry.used,
        }
    return {"name": entry.called, "path": str(entry.path), "damaged": True}


def cached_models() -> list[tuple[str, int]]:
    """Models in the hub's cache that have weights: id and bytes, by name."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    with suppress(CacheNotFound, OSError):
        return sorted(
            (repo.repo_id, repo.size_on_disk)
            for repo in scan_cache_dir(constants.HF_HUB_CACHE).repos
            if repo.repo_type == "model"
            and any(
                file.file_name.endswith((".safetensors", ".gguf"))
                for revision in repo.revisions
                for file in revision.files
            )
        )
    return []


def size_text(nbytes: int) -> str:
    """Bytes for a person: 4.07 GB, 12.3 MB (10^9 and 10^6)."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


def ago(then: float) -> str:
    """A time of the past in words; one in the future, by a wrong clock, is now."""
    left = time.time() - then
    if left < 1:
        return "now"
    for size, unit in _UNITS:
        if left < size:
            return f"{left:.0f} {unit} ago"
        left /= size
    return f"{left:.0f} years ago"


def _row(entry: Entry) -> tuple[str, ...]:
    known = facts(entry)
    if "damaged" in known:
        return one_line(entry.called), "?", "?", "?", "its config.json can't be read", "?"
    if "gguf" in known:
        size = size_text(known["bytes"])
        return one_line(entry.called), size, "-", "-", "a GGUF file", ago(entry.used)
    made, revision = known["source"] or "-", known["revision"]
    shared = " shared" if known["bytes_shared"] else ""
    return (
        one_line(entry.called),
        size_text(known["bytes"]) + shared,
        str(entry.bits),
        one_line(str(known["window"] or "none"), 12),
        one_line(f"{made}@{str(revision)[:7]}" if revision else str(made), 60),
        ago(entry.used),
    )


def _unfinished(each: Unfinished) -> str:
    total = each.state.get("bytes")
    come = sum(f.stat().st_size for f in each.path.glob("*/*.safetensors*") if f.is_file())
    of = f", {size_text(come)} of its source lies here" if isinstance(total, int) and come else ""
    return (
        f"{one_line(each.name)}:{each.bits}bit is unfinished{of}; to go on:"
        f" mlx-cerebrum pull {one_line(each.name)}, to drop it: mlx-cerebrum rm"
        f" {one_line(each.name)}"
    )


def _table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        say("  ".join(cells).rstrip())


def parser() -> cli.ArgumentParser:
    p = cli.ArgumentParser(
        prog="mlx-cerebrum list",
        description="List the models that are here: on the shelf, and in the hub's cache.",
    )
    p.add_json()
    p.add_debug()
    return p


if __name__ == "__main__":
    sys.exit(main())
