"""The plan command: a layer plan as a person wants to see it, or as JSON."""

import argparse
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
from mlx_cerebrum.plan.printed import gb, span, spans, table
from mlx_cerebrum.plan.shares import BANDWIDTH, Sharing, parse_memory, share_out, shares_shown
from mlx_cerebrum.plan.sizes import GROUP, STORAGES, context, part_bytes
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
    p.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="share the plan out to N machines: what each holds and sends (default: not shown)",
    )
    p.add_argument(
        "--memory",
        metavar="GB,GB,...",
        help="with --ranks: memory of each machine in GB, 10^9 bytes; larger ones get more"
        " (default: unknown, all alike)",
    )
    p.add_argument(
        "--split",
        metavar="POSITION,...",
        help="with --ranks: positions to cut at, such as 20,36 (default: chosen by the plan and"
        " the memory)",
    )
    p.add_argument(
        "--bandwidth",
        type=float,
        metavar="GB/S",
        help="with --ranks: at which each machine reads its memory, for the projected pace"
        f" (default: {BANDWIDTH:g}, an M4 Pro)",
    )
    p.add_debug()
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.list == (args.plan is not None):
        parser().error("give either a plan or --list")
    for flag, needed in (
        ("config", "plan"),
        ("ranks", "plan"),
        ("memory", "ranks"),
        ("split", "ranks"),
        ("bandwidth", "ranks"),
    ):
        if getattr(args, flag) is not None and getattr(args, needed) is None:
            parser().error(f"--{flag} needs {'a plan' if needed == 'plan' else '--ranks N'}")
    return cli.run(lambda: _list(args.json) if args.list else _show(args), args.debug)


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


def _show(args: argparse.Namespace) -> int:
    plan, sharing = resolve(args.plan), _sharing(args)
    config = None
    if args.config is not None:
        inner = args.config / "config.json" if args.config.is_dir() else args.config
        config = ModelConfig.from_file(inner)
    facts = describe(plan, config, sharing)
    if args.json:
        say(json.dumps(facts))
    else:
        _render(facts)
    return 0


def _sharing(args: argparse.Namespace) -> Sharing | None:
    if args.ranks is None:
        return None
    memory = None if args.memory is None else parse_memory(args.memory, args.ranks)
    bandwidth = BANDWIDTH if args.bandwidth is None else args.bandwidth
    return Sharing(args.ranks, memory, args.split, bandwidth)


def describe(
    plan: LayerPlan, config: ModelConfig | None = None, sharing: Sharing | None = None
) -> dict[str, Any]:
    """What the command shows, as JSON values; sizes in bytes, None where the geometry is unknown.

    config: the source's geometry. Without one, Cerebrum-7B's for a plan that runs to its last
        block. Of a folded checkpoint the plan counts the stored blocks.
    sharing: machines to share the plan out to (`share_out`).
    Raises PlanError if the plan does not fit, or can't be shared out so.
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
    run = config.with_map(layer_map, scales) if config else None
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
        "sizes": sizes(run) if run else None,
        "sharing": share_out(layer_map, run, sharing) if sharing else None,
    }


def sizes(config: ModelConfig) -> dict[str, Any]:
    """Parameters and bytes, folded (each block stored once) and unrolled."""
    per_token = 2 * config.kv_values_per_token()
    return {
        "folded": _layout(config, config.num_hidden_layers),
        "unrolled": _layout(config, config.num_positions),
        "kv_bytes_per_token": per_token,
        "window": config.sliding_window,
        "context": context(config),
        "kv_bytes_at_context": per_token * context(config),
    }


def _layout(config: ModelConfig, layers: int) -> dict[str, int | None]:
    parameters = layers * config.block_parameters + config.other_parameters
    return {"parameters": parameters, **part_bytes(config, layers, rest=True)}


def _render(facts: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(markup=False, highlight=False, emoji=False, file=sys.stdout)
    shared = facts["sharing"]
    for shown in (
        *_map_shown(facts, console.options.ascii_only),
        *_sizes_shown(facts),
        *(shares_shown(shared, facts["sizes"]) if shared else ()),
    ):
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
    slices = table("slice", "layer_range", "positions", f"blocks 0-{facts['blocks'] - 1}")
    slices.columns[-1].justify = "left"
    full, empty = "#." if ascii_only else "█·"
    first = 0
    for index, (start, end) in enumerate(facts["slices"]):
        last = first + end - start - 1
        picture = Text(_picture(start, end, facts["blocks"], full, empty))
        slices.add_row(str(index), f"[{start}, {end}]", span(first, last), picture)
        first = last + 1
    yield slices
    for times, where in _by_runs(facts["runs_per_block"]):
        yield f"{times}: blocks {where}"
    if facts["only_unrolled"]:
        yield f"Scales: {facts['only_unrolled']}"
    elif facts["residual_scales"]:
        changed = [i for i, pair in enumerate(facts["residual_scales"]) if pair != (1.0, 1.0)]
        yield f"Residual scales: {len(changed)} positions ({spans(changed)})"


def _sizes_shown(facts: dict[str, Any]) -> Iterator["str | Table"]:
    size = facts["sizes"]
    if size is None:
        yield (
            f"Sizes need --config DIR: this plan ends at block {facts['blocks'] - 1}, and "
            f"Cerebrum-7B has {CEREBRUM_7B.num_hidden_layers} blocks."
        )
        return
    layouts = table("", "parameters", "bf16", "8-bit", "4-bit")
    layouts.title = f"Sizes at the geometry of {facts['geometry']}"
    layouts.columns[0].justify = "left"
    for layout in ("folded", "unrolled"):
        row = size[layout]
        layouts.add_row(layout, f"{row['parameters']:,}", *(gb(row[key]) for key in STORAGES))
    yield layouts
    place = "at the window" if size["window"] else "at the full context (no window)"
    yield (
        f"KV cache, bf16: {size['kv_bytes_per_token'] / 2**10:g} KiB a token, "
        f"{size['kv_bytes_at_context'] / 2**30:.3f} GiB {place} of {size['context']} tokens."
    )
    yield f"8-bit and 4-bit: groups of {GROUP}, embedding and head too. GB = 10^9 bytes."
    if size["unrolled"]["parameters"] == _CARD_PARAMETERS:
        yield 'The card\'s "12.25B" is its rounding, (56/32) x 7; executed: 12.48B.'


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
        found.append((words.get(times, f"run {times} times"), spans(which)))
    return found
