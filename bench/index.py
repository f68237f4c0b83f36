"""The table of all runs in bench/results/, for its README.md."""

import re
from collections import defaultdict

from bench.markdown import escape
from bench.report import table
from bench.runs import Runs
from bench.suite import Results
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.memory import GB

LENGTH = "512"  # the prompt that tables with room for one show
CLASSES = {"metal": "Apple silicon (Metal)", "cuda": "NVIDIA (CUDA)", "cpu": "CPU"}
_HEADER = (
    *("processor", "memory", "system", "backend", "mlx", "date", "model", "side A", "side B"),
    *("decode A", "decode B", "B / A", "prefill A", "prefill B", "B of ceiling", "run"),
)
_LINKED = re.compile(r"[a-z0-9][a-z0-9.-]*")  # names of directories that are a link as they are
# What a document of another shape than expected raises.
_MISSHAPEN = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    RequestError,
    TypeError,
    ValueError,
)


def index(runs: Runs) -> str:
    """A row for each run, by backend; the GPUs without one ask for it.

    A run that can't be read costs nothing but its own row, which says so.
    """
    by_class: dict[str, list[list[str]]] = defaultdict(list)
    for name in runs.names():
        backend, row = _index_row(runs, name)
        by_class[backend].append(row)
    rows = []
    for backend, label in CLASSES.items():
        of_class = by_class.pop(backend, [])
        if not of_class and backend != "cpu":
            of_class = [_short(f"{label}: not measured yet, send yours")]
        rows += sorted(of_class)
    for _, others in sorted(by_class.items()):
        rows += sorted(others)
    unit = "Decode at short context and prefill of a prompt of 512, tokens/s; share of"
    return f"{table(_HEADER, rows)}\n\n{unit} the bandwidth measured on that machine."


def _index_row(runs: Runs, name: str) -> tuple[str, list[str]]:
    """The run's backend, and its row."""
    try:
        document = runs.document(name)
        return str(document["machine"]["backend"]), [*_cells(document), _link(name)]
    except _MISSHAPEN:
        return "", _short(escape(name), "can't be read")


def _short(*cells: str) -> list[str]:
    return [*cells, *[""] * (len(_HEADER) - len(cells))]


def _cells(document: Results) -> list[str]:
    card, model = document["machine"], document["model"]
    row = [
        chip(card),
        f"{card['memory_bytes'] / GB:.0f} GB",
        str(card["os"]),
        str(card["backend"]),
        str(card["mlx"]),
        str(document["date"]),
        str(model["model"]),
        *(str(model[side]["name"]) for side in "ab"),
    ]
    speed = document["suites"].get("speed", {})
    if "sides" not in speed:
        return [*row, *["-"] * 6]
    sides = [speed["sides"][side] for side in speed["names"]]
    row += [f"{side['decode']['median']:.1f}" for side in sides]
    row.append(f"{speed['ratios']['decode']['median']:.2f}")
    row += [f"{side['prefill'][LENGTH]['median']:.0f}" for side in sides]
    row.append(f"{sides[1]['share']['measured']:.0%}")
    if len(row) != len(_HEADER) - 1:
        raise ValueError(f"{len(sides)} sides")
    return row


def _link(name: str) -> str:
    return f"[{name}]({name}/README.md)" if _LINKED.fullmatch(name) else escape(name)


def chip(card: Results) -> str:
    """What computed: the GPU, or the processor and its cores."""
    return (
        f"{card['processor']}, {card['cores']} cores"
        if card["device"] == "cpu"
        else str(card["device"])
    )
