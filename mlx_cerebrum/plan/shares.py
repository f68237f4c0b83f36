"""A plan shared out to several machines: what each holds, sends, and how fast it could be.

Pipeline: every machine runs a run of positions and hands the hidden state to the next one; the last
hands it back to machine 0, which has the embedding and the head. Tensor parallel: every machine
runs a part of each position, and twice a position all add up what they made.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mlx_cerebrum.errors import PlanError, shown
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.plan.printed import gb, span, spans, table
from mlx_cerebrum.plan.sizes import STORAGES, part_bytes, position_cache_bytes, stored_bytes

if TYPE_CHECKING:
    from rich.table import Table

BANDWIDTH = 273.0  # GB/s, an M4 Pro's by Apple's specifications
ANNOUNCEMENT = 1024  # bytes at most that tell the machines of a step
USABLE = 2 / 3  # of a Mac's memory: what Metal lets a model take, at least
_GB = 1e9
_LABELS = {"bf16": "bf16", "8bit": "8-bit", "4bit": "4-bit"}
_FENCE = 180e-6  # seconds that MLX's default fence makes the GPU wait for what the CPU received
_NUMBER = r"\s*[0-9]{1,6}(\.[0-9]{1,6})?\s*"
_MEMORY = re.compile(rf"{_NUMBER}(,{_NUMBER})*")


class Link(NamedTuple):
    """How machines are connected: seconds that a small message takes, by published figures."""

    name: str
    least: float
    most: float
    mesh: bool  # each is connected to each, not only to its neighbours in a ring


LINKS = (
    Link("Wi-Fi", 5e-3, 54e-3, mesh=False),
    Link("Thunderbolt, TCP", 0.3e-3, 0.9e-3, mesh=False),
    Link("Thunderbolt 5, RDMA (JACCL)", 25e-6, 25e-6, mesh=True),
)


class Sharing(NamedTuple):
    """How to share a plan out.

    memory: GB of each machine, machine 0 first. None: not known, all alike.
    split: positions to cut at, as `20,36`. None: chosen.
    bandwidth: GB/s at which each machine reads its memory, for the projection.
    """

    ranks: int
    memory: tuple[float, ...] | None = None
    split: str | None = None
    bandwidth: float = BANDWIDTH


def parse_memory(text: str, ranks: int) -> tuple[float, ...]:
    """GB of each machine, from `16,8`. Raises PlanError, one line, for anything else."""
    said = f"--memory {shown(text)}"
    if not _MEMORY.fullmatch(text):
        raise PlanError(f"{said} is not a list of GB such as 16,8")
    memory = tuple(float(size) for size in text.split(","))
    if len(memory) != ranks:
        raise PlanError(f"{said} is for --ranks {len(memory)}, not {ranks}: give GB for each")
    if 0 in memory:
        raise PlanError(f"{said}: machine {memory.index(0)} has no memory")
    return memory


def share_out(
    layer_map: Sequence[int], config: ModelConfig | None, sharing: Sharing
) -> dict[str, Any]:
    """What each machine has to do, as JSON values; sizes in bytes, None without a geometry.

    layer_map: a block for each position, as in `config` where that is known.
    Raises PlanError where the map can't be shared out so.
    """
    # Imported here because it brings numpy, which a plan of one machine does without: 0.1 s.
    from mlx_cerebrum.plan.cuts import check_machines, segments

    check_machines(len(layer_map), sharing.ranks)
    if not sharing.bandwidth > 0:
        raise PlanError(f"--bandwidth {sharing.bandwidth:g} must be above 0 GB/s")
    if config is None and sharing.memory is not None:
        raise PlanError("--memory needs --config DIR: without it no sizes are known")
    storage, cuts = _cut(layer_map, config, sharing)
    parts = segments(layer_map, cuts)
    ends = (0, *cuts, len(layer_map))
    machines = []
    for rank, part in enumerate(parts):
        blocks = sorted(set(part))
        memory = None if sharing.memory is None else sharing.memory[rank] * _GB
        machine: dict[str, Any] = {
            "rank": rank,
            "positions": [ends[rank], ends[rank + 1]],
            "blocks": blocks,
            "memory": memory,
        }
        machines.append(machine)
        if config is None:
            continue
        weights = part_bytes(config, len(blocks), rest=rank == 0)
        cache = len(part) * position_cache_bytes(config)
        needs = {name: size and _memory_for(size + cache) for name, size in weights.items()}
        hidden, last = 2 * config.hidden_size, rank == sharing.ranks - 1
        sent = [] if sharing.ranks == 1 else [hidden] if last else [ANNOUNCEMENT, hidden]
        machine |= {
            "weights": weights,
            "cache_at_context": cache,
            "memory_needed": needs,
            "sent_messages_per_token": len(sent),
            "sent_bytes_per_token": sum(sent),
        }
    held = Counter(block for machine in machines for block in machine["blocks"])
    return {
        "cuts": list(cuts),
        "cut_for": storage,
        "machines": machines,
        "held_by_several": sorted(block for block, count in held.items() if count > 1),
        "announcement_bytes": ANNOUNCEMENT,
        "hidden_state_bytes": 2 * config.hidden_size if config else None,
        "projection": _projection(config, sharing) if config and sharing.ranks > 1 else None,
    }


def _cut(
    layer_map: Sequence[int], config: ModelConfig | None, sharing: Sharing
) -> tuple[str | None, tuple[int, ...]]:
    """Where to cut, and for which storage that was chosen: of those that fit, the most bits."""
    from mlx_cerebrum.plan.cuts import choose_cuts, parse_split, segments

    if sharing.split is not None:
        return None, parse_split(sharing.split, len(layer_map), sharing.ranks)
    if config is None:
        return None, choose_cuts(layer_map, (1.0,) * sharing.ranks)
    position = position_cache_bytes(config)
    chosen: tuple[str | None, tuple[int, ...]] = None, ()
    memory = [USABLE * _GB * size for size in sharing.memory or (1.0,) * sharing.ranks]
    for storage in STORAGES:
        block, first = (part_bytes(config, *of)[storage] for of in ((1, False), (0, True)))
        if block is None or first is None:
            continue
        cuts = choose_cuts(layer_map, memory, block, position, first)
        chosen = storage, cuts
        loads = [
            len(set(part)) * block + len(part) * position + first * (rank == 0)
            for rank, part in enumerate(segments(layer_map, cuts))
        ]
        if sharing.memory is None or all(x <= y for x, y in zip(loads, memory, strict=True)):
            break
    return chosen


def _memory_for(size: int) -> int:
    """Bytes of memory that a Mac needs to hold so many."""
    return round(size / USABLE)


def _projection(config: ModelConfig, sharing: Sharing) -> dict[str, Any]:
    """Tokens/s at most by link: [least, most], as its messages are slow or quick.

    A decoded token reads each position's block once, and the head, at the memory's pace. Then come
    the messages that are waited for: in a pipeline the hidden state on its way round the machines;
    in tensor parallel two sums a position, which a ring passes on once for each other machine.
    """
    ranks, kv_heads = sharing.ranks, config.num_key_value_heads
    positions = config.num_positions
    head = config.vocab_size * config.hidden_size + config.hidden_size
    blocks, rest = (
        stored_bytes(config, parameters, norms * config.hidden_size)
        for parameters, norms in (
            (positions * config.block_parameters, 2 * positions),
            (head, 1),
        )
    )
    # Whole heads: the machine that has most of them sets the pace.
    share = -(-kv_heads // ranks) / kv_heads if ranks <= kv_heads else None

    def paces(link: Link | None, part: float, waits: int) -> dict[str, list[float] | None]:
        found: dict[str, list[float] | None] = {}
        for storage in STORAGES:
            block, other = blocks[storage], rest[storage]
            if block is None or other is None:
                found[storage] = None
                continue
            reading = (part * block + other) / (sharing.bandwidth * _GB)
            seconds = [reading]
            if link is not None:
                seconds = [reading + waits * (s + _FENCE) for s in (link.most, link.least)]
            found[storage] = [1 / s for s in seconds]
        return found

    return {
        "measured": False,
        "memory_bandwidth": sharing.bandwidth * _GB,
        "sums_per_token": 2 * positions,
        "one_machine": paces(None, 1.0, 0),
        "links": [
            {
                "name": link.name,
                "seconds_per_message": [link.least, link.most],
                "pipeline": paces(link, 1.0, ranks),
                "tensor_parallel": share
                and paces(link, share, 2 * positions * (1 if link.mesh else ranks - 1)),
            }
            for link in LINKS
        ],
    }


def shares_shown(facts: dict[str, Any], size: dict[str, Any] | None) -> Iterator["str | Table"]:
    """What `share_out` found, for a person; `size` is the command's own `sizes`."""
    machines, cuts = facts["machines"], ", ".join(map(str, facts["cuts"]))
    yield ""
    yield f"Shared out to {len(machines)} machines, cut at {cuts}:" if cuts else "On one machine:"
    held = table("rank", "positions", "blocks", "bf16", "8-bit", "4-bit", "cache", "sent")
    held = held if size else table("rank", "positions", "blocks")
    held.columns[2].no_wrap = False
    for machine in machines:
        first, end = machine["positions"]
        row = [str(machine["rank"]), span(first, end - 1), spans(machine["blocks"])]
        if size:
            row += [gb(machine["weights"][storage]) for storage in STORAGES]
            row += [gb(machine["cache_at_context"]), _kib(machine["sent_bytes_per_token"])]
        held.add_row(*row)
    yield held
    twice = facts["held_by_several"]
    if cuts:
        yield f"Held more than once: blocks {spans(twice)}." if twice else "No block is held twice."
    if size:
        where = "the window" if size["window"] else "the full context"
        yield (
            f"Rank 0 has the embedding and the head too. Cache: bf16, at {where} of "
            f"{size['context']} tokens."
        )
        yield from _sent_shown(facts)
        yield from _memory_shown(machines)
        if facts["projection"]:
            yield from _projection_shown(facts["projection"], len(machines))


def _sent_shown(facts: dict[str, Any]) -> Iterator[str]:
    count = sum(machine["sent_messages_per_token"] for machine in facts["machines"])
    if count:
        yield (
            f"Sent for a token: {count} messages. Each rank but the last sends an announcement of "
            f"{_kib(facts['announcement_bytes'])} at most and the hidden state of "
            f"{_kib(facts['hidden_state_bytes'])}; the last sends that back to rank 0."
        )


def _memory_shown(machines: list[dict[str, Any]]) -> Iterator[str]:
    if machines[0]["memory"] is None:
        return
    yield "Weights and cache, in two thirds of a Mac's memory (Metal allows that, or more):"
    for storage in STORAGES:
        if machines[0]["weights"][storage] is None:
            continue
        lacking = [
            f"rank {machine['rank']} needs {gb(machine['memory_needed'][storage])} and has "
            f"{machine['memory'] / _GB:g}"
            for machine in machines
            if machine["memory_needed"][storage] > machine["memory"]
        ]
        yield f"{_LABELS[storage]}: {'; '.join(lacking) or 'every rank fits'}"


def _projection_shown(facts: dict[str, Any], ranks: int) -> Iterator["str | Table"]:
    kept = ("bf16", "4bit")
    paces = table("link, a message", "", *(_LABELS[storage] for storage in kept))
    paces.title = "A projection, not a measurement: decoded tokens/s at most"
    paces.columns[0].justify = paces.columns[1].justify = "left"
    paces.add_row("one machine", "", *(_range(facts["one_machine"][s]) for s in kept))
    for link in facts["links"]:
        slow, quick = (1e3 * seconds for seconds in reversed(link["seconds_per_message"]))
        name = f"{link['name']}, {quick:g}{'' if slow == quick else f'-{slow:g}'} ms"
        piped, tensor = link["pipeline"], link["tensor_parallel"]
        paces.add_row(name, "pipeline", *(_range(piped[s]) for s in kept))
        if tensor:
            paces.add_row("", "tensor", *(_range(tensor[s]) for s in kept))
    yield paces
    yield (
        f"Memory read at {facts['memory_bandwidth'] / _GB:g} GB/s (--bandwidth), a message as fast "
        f"as published and {1e3 * _FENCE:g} ms for MLX's fence."
    )
    yield f"A pipeline waits for {ranks} messages a token."
    if facts["links"][0]["tensor_parallel"]:
        yield (
            "Tensor parallel reads less on each machine and waits for "
            f"{facts['sums_per_token']} sums a token."
        )
    else:
        yield f"No tensor parallel: the model has fewer key/value heads than {ranks}."


def _range(paces: list[float] | None) -> str:
    if paces is None:
        return "-"
    digits = 1 if paces[0] >= 1 else 2
    return "-".join(dict.fromkeys(f"{pace:.{digits}f}" for pace in paces))


def _kib(count: int) -> str:
    return f"{count / 2**10:g} KiB"
