"""The table of all runs in bench/results/, for its README.md."""

from bench.report import table
from bench.runs import Runs
from bench.suite import Results
from mlx_cerebrum.memory import GB

LENGTH = "512"  # the prompt that tables with room for one show
CLASSES = {"metal": "Apple silicon (Metal)", "cuda": "NVIDIA (CUDA)", "cpu": "CPU"}


def index(runs: Runs) -> str:
    """A row for each run of the speed suite; the GPUs without one ask for it."""
    header = [
        "processor",
        "memory",
        "system",
        "backend",
        "mlx",
        "date",
        "model",
        "side A",
        "side B",
    ]
    header += ["decode A", "decode B", "B / A", "prefill A", "prefill B", "B of ceiling", "run"]
    rows = []
    found = [(name, runs.document(name)) for name in runs.names()]
    for backend, label in CLASSES.items():
        of_class = [
            _index_row(name, document)
            for name, document in found
            if document["machine"]["backend"] == backend
        ]
        if not of_class and backend != "cpu":
            of_class = [[f"{label}: not measured yet, send yours", *[""] * (len(header) - 1)]]
        rows += sorted(of_class)
    unit = "Decode at short context and prefill of a prompt of 512, tokens/s; share of"
    return f"{table(header, rows)}\n\n{unit} the bandwidth measured on that machine."


def _index_row(name: str, document: Results) -> list[str]:
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
        return [*row, *["-"] * 6, _link(name)]
    sides = [speed["sides"][side] for side in speed["names"]]
    row += [f"{side['decode']['median']:.1f}" for side in sides]
    row.append(f"{speed['ratios']['decode']['median']:.2f}")
    row += [f"{side['prefill'][LENGTH]['median']:.0f}" for side in sides]
    return [*row, f"{sides[1]['share']['measured']:.0%}", _link(name)]


def _link(name: str) -> str:
    return f"[{name}]({name}/README.md)"


def chip(card: Results) -> str:
    """What computed: the GPU, or the processor and its cores."""
    return (
        f"{card['processor']}, {card['cores']} cores"
        if card["device"] == "cpu"
        else str(card["device"])
    )
