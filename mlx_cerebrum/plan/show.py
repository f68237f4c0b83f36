"""The plan command: a layer plan as a person wants to see it, or as JSON."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_cerebrum import cli
from mlx_cerebrum.errors import PlanError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.plan.layer_plan import LayerPlan, named_plans, resolve
from mlx_cerebrum.text import one_line, say

if TYPE_CHECKING:
    from rich.table import Table

# AetherResearch/Cerebrum-1.0-7b, from its config.json.
CEREBRUM_7B = ModelConfig(
    hidden_size=4096,
    num_hidden_layers=32,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    vocab_size=32000,
    rope_theta=10000.0,
    max_position_embeddings=32768,
    sliding_window=4096,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_ids=(2,),
)
_CARD_PARAMETERS = 12_476_420_096  # what the 12.25B's card rounds
_GROUP = 64  # weights that share a 16-bit scale and bias when quantized
_PICTURE = 32  # widest picture of the blocks, in characters


def parser() -> cli.ArgumentParser:
    p = cli.ArgumentParser(
        prog="python -m mlx_cerebrum.plan",
        description="Show a layer plan: its slices, which blocks repeat, and what it costs.",
    )
    p.add_argument("plan", nargs="?", metavar="NAME|FILE", help="a named plan, or YAML")
    p.add_argument(
        "--config",
        type=Path,
        metavar="DIR|FILE",
        help="the source's config.json or its directory (default: Cerebrum-7B's geometry, "
        "for plans over its 32 blocks)",
    )
    p.add_argument("--json", action="store_true", help="one JSON value, sizes in bytes")
    p.add_argument("--list", action="store_true", help="list the named plans")
    p.add_debug()
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.list == (args.plan is not None):
        parser().error("give either a plan or --list")
    if args.list and args.config:
        parser().error("--config needs a plan")
    return cli.run(
        lambda: _list(args.json) if args.list else _show(args.plan, args.config, args.json),
        args.debug,
    )


def _list(as_json: bool) -> int:
    found = [describe(LayerPlan.named(name)) for name in named_plans()]
    if as_json:
        keys = ("name", "source", "positions", "blocks")
        say(json.dumps([{key: entry[key] for key in keys} for entry in found]))
        return 0
    width = max(len(entry["name"]) for entry in found)
    for entry in found:
        count = f"{entry['positions']} positions over {entry['blocks']} blocks"
        say(f"{entry['name']:<{width}}  {count} of {entry['source']}")
    return 0


def _show(name: str, config_path: Path | None, as_json: bool) -> int:
    plan = resolve(name)
    config = None
    if config_path is not None:
        inner = config_path / "config.json" if config_path.is_dir() else config_path
        config = ModelConfig.from_file(inner)
    facts = describe(plan, config)
    if as_json:
        say(json.dumps(facts))
    else:
        _render(facts)
    return 0


def describe(plan: LayerPlan, config: ModelConfig | None = None) -> dict[str, Any]:
    """What the command shows, as JSON values; sizes in bytes, None where the geometry is unknown.

    config: the source's geometry. Without one, Cerebrum-7B's for a plan that runs to its last
        block. Of a folded checkpoint the plan counts the stored blocks.
    Raises PlanError if the plan does not fit.
    """
    geometry = "the given config"
    if config is None and plan.blocks_needed in (None, CEREBRUM_7B.num_hidden_layers):
        config, geometry = CEREBRUM_7B, "Cerebrum-1.0-7b"
    blocks = config.num_hidden_layers if config else (plan.blocks_needed or 0)
    layer_map = plan.layer_map(blocks)
    runs = Counter(layer_map)
    try:
        scales, only_unrolled = plan.residual_scales(blocks), None
    except PlanError as error:
        scales, only_unrolled = None, str(error)
    folded = config is not None and config.layer_map != tuple(range(blocks))
    return {
        "name": plan.name,
        "source": plan.source,
        "dtype": plan.dtype,
        "out_dtype": plan.out_dtype,
        "slices": [list(part.bounds(blocks)) for part in plan.slices],
        "blocks": blocks,
        "positions": len(layer_map),
        "layer_map": list(layer_map),
        "runs_per_block": [runs[block] for block in range(blocks)],
        "residual_scales": scales,
        "only_unrolled": only_unrolled,
        "replaces_map_of": config.num_positions if config and folded else None,
        "geometry": geometry if config else None,
        "sizes": sizes(config.with_map(layer_map, scales)) if config else None,
    }


def sizes(config: ModelConfig) -> dict[str, Any]:
    """Parameters and bytes, folded (each block stored once) and unrolled."""
    window = config.sliding_window
    per_token = 2 * config.kv_values_per_token()
    context = window or config.max_position_embeddings
    return {
        "folded": _layout(config, config.num_hidden_layers, config.stored_parameters),
        "unrolled": _layout(config, config.num_positions, config.executed_parameters),
        "kv_bytes_per_token": per_token,
        "window": window,
        "context": context,
        "kv_bytes_at_context": per_token * context,
    }


def _layout(config: ModelConfig, layers: int, parameters: int) -> dict[str, int | None]:
    """Bytes of one layout; the norms stay at 16 bits, all else is quantized as mlx-lm does it."""
    norms = (2 * layers + 1) * config.hidden_size
    heads = config.num_attention_heads * config.head_dim
    inputs = (config.hidden_size, heads, config.intermediate_size)
    sized: dict[str, int | None] = {"parameters": parameters, "bf16": 2 * parameters}
    for bits in (8, 4):
        # A scale and a bias of 16 bits for each group.
        packed = (parameters - norms) * (bits * _GROUP + 32) // (8 * _GROUP)
        fits = all(size % _GROUP == 0 for size in inputs)
        sized[f"{bits}bit"] = packed + 2 * norms if fits else None
    return sized


def _render(facts: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(markup=False, highlight=False, emoji=False, file=sys.stdout)
    for shown in (*_map_shown(facts, console.options.ascii_only), *_sizes_shown(facts)):
        if isinstance(shown, str):  # not wrapped, so that a line can be searched for
            console.print(one_line(shown), soft_wrap=True)
        else:
            console.print(shown)


def _map_shown(facts: dict[str, Any], ascii_only: bool) -> Iterator["str | Table"]:
    from rich.text import Text

    dtype = facts["out_dtype"] or facts["dtype"] or "the source's own dtype"
    over = f"{facts['positions']} positions over {facts['blocks']} blocks of {facts['source']}"
    yield f"{facts['name']}: {over}, {dtype}"
    if facts["replaces_map_of"]:
        yield (
            f"The checkpoint is folded: this plan replaces its {facts['replaces_map_of']} "
            "positions and counts its stored blocks."
        )
    table = _table("slice", "layer_range", "positions", f"blocks 0-{facts['blocks'] - 1}")
    table.columns[-1].justify = "left"
    full, empty = "#." if ascii_only else "█·"
    first = 0
    for index, (start, end) in enumerate(facts["slices"]):
        last = first + end - start - 1
        picture = Text(_picture(start, end, facts["blocks"], full, empty))
        table.add_row(str(index), f"[{start}, {end}]", _span(first, last), picture)
        first = last + 1
    yield table
    for times, where in _by_runs(facts["runs_per_block"]):
        yield f"{times}: blocks {where}"
    if facts["only_unrolled"]:
        yield f"Scales: {facts['only_unrolled']}"
    elif facts["residual_scales"]:
        changed = [i for i, pair in enumerate(facts["residual_scales"]) if pair != (1.0, 1.0)]
        yield f"Residual scales: {len(changed)} positions ({_spans(changed)})"


def _sizes_shown(facts: dict[str, Any]) -> Iterator["str | Table"]:
    size = facts["sizes"]
    if size is None:
        yield (
            f"Sizes need --config DIR: this plan ends at block {facts['blocks'] - 1}, and "
            f"Cerebrum-7B has {CEREBRUM_7B.num_hidden_layers} blocks."
        )
        return
    table = _table("", "parameters", "bf16", "8-bit", "4-bit")
    table.title = f"Sizes at the geometry of {facts['geometry']}"
    table.columns[0].justify = "left"
    for layout in ("folded", "unrolled"):
        row = size[layout]
        sizes = (_gb(row[key]) for key in ("bf16", "8bit", "4bit"))
        table.add_row(layout, f"{row['parameters']:,}", *sizes)
    yield table
    place = "at the window" if size["window"] else "at the full context (no window)"
    yield (
        f"KV cache, bf16: {size['kv_bytes_per_token'] / 2**10:g} KiB a token, "
        f"{size['kv_bytes_at_context'] / 2**30:.3f} GiB {place} of {size['context']} tokens."
    )
    yield f"8-bit and 4-bit: groups of {_GROUP}, embedding and head too. GB = 10^9 bytes."
    if size["unrolled"]["parameters"] == _CARD_PARAMETERS:
        yield 'The card\'s "12.25B" is its rounding, (56/32) x 7; executed: 12.48B.'


def _table(*headings: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True, overflow="crop")
    return table


def _picture(start: int, end: int, blocks: int, full: str, empty: str) -> str:
    """A bar of the blocks a slice runs, at most _PICTURE characters."""
    width = min(blocks, _PICTURE)
    cells = ((cell * blocks // width, (cell + 1) * blocks // width) for cell in range(width))
    return "".join(full if start < high and low < end else empty for low, high in cells)


def _by_runs(runs: list[int]) -> list[tuple[str, str]]:
    """(how often, which blocks) for each number of runs, the most frequent runs first."""
    words = {0: "never run", 1: "run once", 2: "run twice"}
    found = []
    for times in sorted(set(runs), reverse=True):
        which = [block for block, count in enumerate(runs) if count == times]
        found.append((words.get(times, f"run {times} times"), _spans(which)))
    return found


def _spans(numbers: list[int]) -> str:
    """Sorted numbers as `0-3, 7, 28-31`."""
    spans: list[tuple[int, int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1] = (spans[-1][0], number)
        else:
            spans.append((number, number))
    return ", ".join(_span(low, high) for low, high in spans)


def _span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}-{high}"


def _gb(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e9:.2f} GB"
