"""What `python -m bench.speculation` found, in words and tables; and what follows for Metal."""

from typing import Any

from bench.projection import BITS, parameters_read
from bench.random_model import GEOMETRIES
from bench.report import table
from mlx_cerebrum.decoding.policy import MOST_DRAFTS, Costs, best_drafts, speedup
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.weights.opening import planned_config

# A row more of a target pass, in decode steps, on a GPU that is bound by bandwidth: assumed.
METAL_ROWS = (0.02, 0.1)


def text(found: dict[str, Any]) -> list[str]:
    parts = []
    for name, model in found.items():
        parts += [_paces(name, model), _guesses(model), _histograms(model), _rows(model)]
    return [part for part in parts if part] + metal(found)


def _paces(name: str, model: dict[str, Any]) -> str:
    header = [f"{name}: over plain decoding", "quoting", "open", "all ten", "same tokens"]
    rows = [
        [
            side,
            *(_interval(one[kind]) for kind in ("quoting", "open", "all")),
            f"{one['equal']} of {one['compared']}",
        ]
        for side, one in model["sides"].items()
        if side != "plain"
    ]
    return (
        f"**{name}**, {model['positions']} positions. Decode pace over plain decoding's: the mean"
        " of each question's median over rounds in turns, with its bootstrap interval over the"
        f" questions.\n\n{table(header, rows)}"
    )


def _interval(one: dict[str, float]) -> str:
    return f"{one['mean']:.2f} ({one['low']:.2f}-{one['high']:.2f})"


def _guesses(model: dict[str, Any]) -> str:
    header = ["", "tokens a pass", "passes that guess", "guesses each", "agreement", "foretold"]
    rows = []
    for side, one in model["sides"].items():
        if one.get("agreement") is None:
            continue
        # auto's guesses come from several drafters, at several costs
        several = side == "auto" and len(model["draft_cost"]) > 1
        ahead = "" if several else f"{foretold(model, one):.2f}"
        rows.append(
            [
                side,
                f"{one['tokens_per_pass']:.2f}",
                f"{one['share_of_passes_that_guess']:.0%}",
                f"{one['mean_drafts']:.1f}",
                f"{one['agreement']:.0%}",
                ahead,
            ]
        )
    return table(header, rows) if rows else "No drafter was used: none was expected to pay."


def foretold(model: dict[str, Any], one: dict[str, Any]) -> float:
    """The cost model's speed-up of all passes: for the guesses made, with the rows' cost here."""
    drafts = max(1, round(one["mean_drafts"]))
    seen = {int(length): cost for length, cost in model["rows"].items() if int(length) > 1}
    near = min(seen, key=lambda length: abs(length - 1 - drafts))
    costs = Costs(one["draft_cost"], max(0.0, (seen[near] - 1) / (near - 1)))
    # Passes that guess yield g tokens each at cost c; plain ones 1 at 1.
    gain = speedup(one["agreement"], drafts, costs)
    cost = 1 + drafts * (costs.draft + costs.row)
    share = one["share_of_passes_that_guess"]
    return float((share * gain * cost + (1 - share)) / (share * cost + (1 - share)))


def _histograms(model: dict[str, Any]) -> str:
    lines = []
    for side, one in model["sides"].items():
        rows = one.get("held_by_drafts", {})
        shown = [
            f"{made}: {' '.join(map(str, held))}" for made, held in sorted(rows.items(), key=_n)
        ]
        if shown:
            lines.append(f"- {side}: {'; '.join(shown)}")
    if not lines:
        return ""
    return "Rounds by guesses made, then how many had 0, 1, 2, ... of them hold:\n\n" + "\n".join(
        lines
    )


def _n(item: tuple[str, Any]) -> int:
    return int(item[0])


def _rows(model: dict[str, Any]) -> str:
    shown = ", ".join(f"{length}: {cost:.2f}" for length, cost in model["rows"].items())
    return f"A target pass of L rows, over one of 1 row, here: {shown}."


def metal(found: dict[str, Any]) -> list[str]:
    """For which precisions the 12.25B reaches the 7B's pace, from bytes: a projection."""
    config = ModelConfig.from_dict(GEOMETRIES["cerebrum-7b"])
    names = ("cerebrum-7b", "cerebrum-12.25b")
    seven, twelve = (parameters_read(planned_config(config, name, None)) for name in names)
    needed = twelve / seven
    agreements = _agreements(found)
    header = [
        "target, drafter",
        "bytes drafted / read",
        *(f"agreement {a:.0%}" for a in agreements),
    ]
    header.append("agreement that reaches the 7B")
    rows = []
    for target, drafter, positions in (
        ("bf16", "bf16", seven),
        ("bf16", "4-bit", twelve),
        ("bf16", "4-bit", seven),
        ("8-bit", "4-bit", twelve),
        ("8-bit", "4-bit", seven),
        ("4-bit", "4-bit", seven),
    ):
        draft = positions * BITS[drafter] / (twelve * BITS[target])
        name = "7B" if positions == seven else "12.25B"
        cells = [_range(a, draft) for a in agreements]
        rows.append(
            [f"{target}, {name} {drafter}", f"{draft:.2f}", *cells, _reaches(draft, needed)]
        )
    return [
        "**A projection, not a measurement**: the 12.25B on a GPU bound by bandwidth, speed-up over"
        " its own plain decoding, for a row's cost of"
        f" {METAL_ROWS[1]:g} to {METAL_ROWS[0]:g} decode steps (assumed) and the best number of"
        f" guesses. The chip does not matter: bytes are read at one pace. {needed:.2f} is the 7B's"
        " own pace. Agreements are the demo model's above, and two more.",
        table(header, rows),
    ]


def _agreements(found: dict[str, Any]) -> list[float]:
    seen = {
        round(one["agreement"], 2)
        for model in found.values()
        for side, one in model["sides"].items()
        if side not in ("plain", "ngram", "auto") and one.get("agreement")
    }
    return sorted(seen | {0.8, 0.9})


def _range(agreement: float, draft: float) -> str:
    low, high = (
        best_drafts(agreement, Costs(draft, row), MOST_DRAFTS)[1] for row in reversed(METAL_ROWS)
    )
    return f"{low:.2f}-{high:.2f}"


def _reaches(draft: float, needed: float) -> str:
    shown = []
    for row in METAL_ROWS:
        enough = (
            a / 100
            for a in range(50, 100)
            if best_drafts(a / 100, Costs(draft, row), MOST_DRAFTS)[1] >= needed
        )
        least = next(enough, None)
        shown.append("none" if least is None else f"{least:.0%}")
    return f"{shown[0]} to {shown[1]}" if shown[0] != shown[1] else shown[0]
