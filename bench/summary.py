"""The first page's picture: pace, memory and quality of the two models, from committed runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench import plots, suite
from bench.plots import COLOURS, Picture, number
from bench.suite import Results, reading
from mlx_cerebrum.model.memory import GB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
FULL_SIZE, DEMO = "linux-epyc-2-7b", "linux-epyc-2-demo"  # runs
WHERE = Path("docs"), "summary"
ALT = (
    "Pace, memory and quality of the 7B and the 12.25B: the 12.25B decodes at about half of the"
    " 7B's pace and takes, folded, the 7B's memory; interleaving made the small model worse."
)

Row = tuple[str, float, float]  # a label, and a value of each side


def draw(root: Path = ROOT) -> Path:
    """Draw it from the results that lie in `root`. Raises RequestError for others than a bench's,
    ImportError without matplotlib."""
    folder, name = WHERE
    return plots.save(picture(root), root / folder, name)


def picture(root: Path = ROOT) -> Picture:
    """Three panels, each with the model, machine and date of its figures."""
    results = root / "bench" / "results"
    with reading("the picture of the first page"):
        full = suite.read(results / FULL_SIZE / suite.FILE, "machine", "runs", "suites")
        demo = suite.read(results / DEMO / suite.FILE, "machine", "runs", "suites")
        paces, held, right = pace(full, demo), memory(demo), quality(demo)
        random = "random weights of the 7B's shape"
        origins = [
            f"{_of(random, full, 'full_size')}\nand {_of('SmolLM2-135M', demo, 'speed')}",
            f"bytes predicted for {random};\nwithin 5% of those measured",
            f"{_of('SmolLM2-135M, interleaved as the 12.25B is', demo, 'quality')}",
        ]

    def drawing(figure: "Figure") -> None:
        first, second, third = figure.subplots(3, 1, height_ratios=(2, 3, 2))
        sides = ("7B, or a model as it is", "12.25B, or interleaved so")
        title = "Decode pace, the first's = 1: random weights, and SmolLM2-135M"
        _bars(first, paces, sides, title, origins[0])
        forms = ("folded: as much as the 7B", "unrolled, as other tools load it")
        title = "Memory of the 12.25B after 8,192 tokens, GB"
        _bars(second, held, forms, title, origins[1], COLOURS[2:])
        _bars(third, right, sides, "Sums that come out right, %: SmolLM2-135M", origins[2])

    return Picture(drawing, ALT, (8.0, 8.5))


def pace(full: Results, demo: Results) -> list[Row]:
    """Decoding, relative to the first model."""
    sides, ratios = full["suites"]["full_size"]["sides"], demo["suites"]["speed"]["ratios"]
    a, b = (side["decode"]["median"] for side in sides.values())
    return [("the 7B's shape", 1.0, b / a), ("SmolLM2-135M", 1.0, ratios["decode"]["median"])]


def memory(demo: Results) -> list[Row]:
    """Weights, keys and values, and what is computed with: of each width, folded and unrolled."""
    peaks = {
        (row["bits"], row["form"]): row["peak"] / GB
        for row in demo["suites"]["memory"]["full_size"]["rows"]
    }
    labels = {None: "16 bits", 8: "8 bits", 4: "4 bits"}
    return [
        (label, peaks[bits, "folded"], peaks[bits, "unrolled"]) for bits, label in labels.items()
    ]


def quality(demo: Results) -> list[Row]:
    """Right answers, percent."""
    names = {"cerebrum_arithmetic": "written", "cerebrum_arithmetic_choice": "chosen of four"}
    tasks = demo["suites"]["quality"]["accuracy"]["tasks"]
    return [
        (f"{names[t['task']]}, {t['questions']}", 100 * t["a"], 100 * t["b"])
        for t in tasks
        if t["task"] in names
    ]


def _of(model: str, document: Results, name: str) -> str:
    return suite.origin(model, document["machine"], document["runs"][name]["date"])


def _bars(
    plot: "Axes",
    rows: Sequence[Row],
    sides: tuple[str, str],
    title: str,
    origin: str,
    colours: Sequence[str] = COLOURS,
) -> None:
    """A pair of bars for each row, with their values."""
    plot.set_title(title)
    plot.set_xlabel(origin, fontsize="small", loc="left")
    for at, side in enumerate(sides):
        values = [(row[1], row[2])[at] for row in rows]
        places = [place + 0.4 * (at - 0.5) for place in range(len(rows))]
        bars = plot.barh(places, values, 0.36, color=colours[at], label=side)
        plot.bar_label(bars, [number(value) for value in values], padding=4)
    plot.set_yticks(range(len(rows)), [label for label, *_ in rows])
    plot.invert_yaxis()
    plot.margins(x=0.12)
    plot.set_xticks([])
    plot.tick_params(axis="y", length=0)
    plot.spines["bottom"].set_visible(False)
    plot.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small")
