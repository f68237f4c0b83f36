"""What closes a conversion: the table a person reads."""

import io
import sys
from typing import Any

from mlx_cerebrum.model.memory import human
from mlx_cerebrum.text import one_line, say, tell

_MACS = (8, 16, 18, 24, 32, 36, 48, 64, 96, 128)  # GB of unified memory


def smallest_mac(needed: int) -> int | None:
    """The least memory, in GB, of a Mac whose GPU may take `needed` bytes by default.

    Metal's recommended working set is two thirds of the memory up to 32 GB, three quarters of
    more (`sysctl iogpu.wired_limit_mb` raises it).
    """
    fits = (mac for mac in _MACS if needed <= mac * 2**30 * (2 / 3 if mac <= 32 else 3 / 4))
    return next(fits, None)


def show(written: dict[str, Any]) -> None:
    """Print the summary that a conversion returns, with `path` and `peak_memory` added."""
    from rich.console import Console
    from rich.table import Table

    for note in written["notes"]:
        tell(f"note: {note}")
    table = Table(show_header=False, box=None, pad_edge=False)
    for label, text in lines(written):
        table.add_row(label, one_line(text))
    # Not a terminal: no line may be cut or wrapped.
    width = None if sys.stdout.isatty() else 10_000
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, markup=False, highlight=False, emoji=False)
    console.print(table)
    say("\n".join(line.rstrip() for line in buffer.getvalue().splitlines()))


def lines(written: dict[str, Any]) -> list[tuple[str, str]]:
    """Label and text of each row."""
    found = [("written", str(written["path"])), ("layout", _layout(written))]
    found.append(
        ("size", f"{human(written['bytes'])}, {written['bits_per_weight']:.2f} bits a weight")
    )
    found += _bits(written.get("bits", {}))
    hashes = written["sha256"]
    if isinstance(hashes, str):  # of one file
        hashes = {"": hashes}
    found += [("sha256", f"{digest[:16]}... {name}".strip()) for name, digest in hashes.items()]
    if not hashes:
        found.append(("sha256", "none: not verified"))
    if "seconds" in written:
        found.append(("took", _took(written)))
    if "cache_bytes" in written:
        needed = written["bytes"] + written["cache_bytes"]
        mac = smallest_mac(needed)
        fits = "no Mac up to 128 GB" if mac is None else f"Macs with {mac} GB and more"
        cache = f"{human(written['cache_bytes'])} of cache at {written['cache_tokens']} tokens"
        found.append(("runs in", f"{human(needed)}, with {cache}: {fits}"))
    if "url" in written:
        found.append(("uploaded", written["url"]))
    return found


def _layout(written: dict[str, Any]) -> str:
    positions = written["positions"]
    if "layout" not in written:
        return f"GGUF, {positions} layers"
    layers = written["layers"]
    if layers == positions:
        return f"{written['layout']}, {layers} layers"
    return f"{written['layout']}, {layers} blocks in {positions} positions"


def _bits(bits: dict[str, int]) -> list[tuple[str, str]]:
    """Where widths are mixed: each kind of matrix, its bits layer by layer as digits."""
    if len(set(bits.values())) < 2:
        return []
    kinds: dict[str, dict[int, int]] = {}
    for name, count in bits.items():
        inside = name.startswith("model.layers.")
        layer, kind = (int(name.split(".")[2]), name.split(".", 3)[3]) if inside else (0, name)
        kinds.setdefault(kind, {})[layer] = count
    return [
        (f"bits of {kind.rpartition('.')[2]}", "".join(str(n) for _, n in sorted(found.items())))
        for kind, found in kinds.items()
    ]


def _took(written: dict[str, Any]) -> str:
    text = f"{written['seconds']:.1f} s, {human(written['peak_memory'])} of memory"
    if written.get("resumed_modules"):
        text += f"; {written['resumed_modules']} modules were there already"
    return text
