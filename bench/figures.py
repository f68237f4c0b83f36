"""Figures in documents, taken from results, so that the two can't disagree.

Between `<!-- figures: RUN/NAME 1-3 5 -->` and `<!-- end -->` stand those paragraphs (without
numbers: all) of what the bench NAME says of a run in bench/results/: a suite of its results.json,
pictures last, or NAME.json, which a bench printed with `--json`. `index` is the table of all runs,
`selftests` that of what `mlx-cerebrum doctor --selftest` wrote there.
`python -m bench render --figures` writes them anew; a test fails where that was not done, and where
a figure that can only have been measured stands outside such a block.
"""

import difflib
import re
from collections.abc import Iterator
from pathlib import Path

from bench import suite
from bench.report import table
from bench.suite import Results, escaped, reading
from mlx_cerebrum.doctor import page
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.memory import GB

ROOT = Path(__file__).parent.parent
_PAGES = ("chat", "converting", "measurements", "plans", "speed")
DOCUMENTS = (  # may have blocks
    "README.md",
    *(f"docs/{name}.md" for name in _PAGES),
    "bench/README.md",
    "bench/results/README.md",
)

_OPEN = re.compile(r"^<!-- figures: .*$", re.M)
BLOCK = re.compile(r"^<!-- figures: (\S+)([\d -]*) -->\n(.*?)^<!-- end -->$", re.M | re.S)


def rewrite(root: Path = ROOT) -> list[str]:
    """Fill in the documents' blocks; returns the documents that changed."""
    changed = {name: wanted for name, text, wanted in _documents(root) if text != wanted}
    for name, wanted in changed.items():
        (root / name).write_text(wanted, encoding="utf-8")
    return list(changed)


def stale(root: Path = ROOT) -> str:
    """Where documents and results disagree, as a diff; empty where they don't."""
    lines: list[str] = []
    for name, text, wanted in _documents(root):
        pair = text.splitlines(), wanted.splitlines()
        lines += difflib.unified_diff(*pair, name, f"{name} as measured", lineterm="")
    return "\n".join(lines)


def _documents(root: Path) -> Iterator[tuple[str, str, str]]:
    """Each one's name, its text, and the text it should have."""
    for name in DOCUMENTS:
        text = (root / name).read_text(encoding="utf-8")
        yield name, text, filled(text, name, root)


def filled(text: str, document: str, root: Path) -> str:
    """The text with its blocks made from the results.

    Raises RequestError for a block without its end, its results or one of its paragraphs.
    """
    if len(_OPEN.findall(text)) != len(BLOCK.findall(text)):
        raise RequestError(f"{document}: a block of figures is not as it should be, or has no end")

    def make(match: re.Match[str]) -> str:
        what, numbers, _ = match.groups()
        with reading(f"{document}, figures {what}{numbers}"):
            if what in _TABLES:
                body = _TABLES[what](root / "bench" / "results")
            else:
                folder = "../" * (document.count("/")) + "bench/results"
                found = _said(root / "bench" / "results" / what, f"{folder}/{Path(what).parent}/")
                body = "\n\n".join(_chosen(found, numbers))
        return f"<!-- figures: {what}{numbers} -->\n\n{body}\n\n<!-- end -->"

    return BLOCK.sub(make, text)


def _said(path: Path, folder: str) -> list[str]:
    """The paragraphs of RUN/NAME; pictures are in `folder`."""
    single = path.with_name(f"{path.name}.json")
    if single.exists():
        found = escaped(suite.read(single, "bench", "results"))
        paragraphs = suite.module(found["bench"]).text(found["results"])
    else:
        found = escaped(suite.read(path.parent / suite.FILE, "suites", "machine"))
        results, module = found["suites"][path.name], suite.module(path.name)
        drawn = suite.pictures(module, results, found["machine"])
        paragraphs = module.text(results)
        paragraphs += [picture.markdown(name, folder) for name, picture in drawn.items()]
    return "\n\n".join(paragraphs).split("\n\n")


def _chosen(paragraphs: list[str], numbers: str) -> list[str]:
    if not numbers:
        return paragraphs
    ends = [tuple(map(int, one.split("-"))) for one in numbers.split()]
    return [paragraphs[k - 1] for end in ends for k in range(end[0], end[-1] + 1)]


def index(folder: Path) -> str:
    """A row for each run."""
    rows = []
    for path in sorted(folder.glob(f"*/{suite.FILE}")):
        document = escaped(suite.read(path, "machine", "model", "suites"))
        with reading(str(path)):
            rows.append(_row(document, path.parent.name))
    header = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[row.get(column, "-") for column in header] for row in rows]
    unit = "Decode at short context and prefill of a prompt of 512, tokens/s; share of"
    return f"{table(header, cells)}\n\n{unit} the bandwidth measured on that machine."


def _row(document: Results, run: str) -> dict[str, str]:
    card, model, speed = document["machine"], document["model"], document["suites"].get("speed", {})
    row = {
        "run": f"[{run}]({run}/README.md)",
        "processor": f"{card['processor']}, {card['cores']} cores",
        "memory": f"{card['memory_bytes'] / GB:.0f} GB",
        "system": card["os"],
        "device": card["device"],
        "mlx": card["mlx"],
        "date": document["date"],
        "model": model["model"],
        "side A": model["a"]["name"],
        "side B": model["b"]["name"],
    }
    if "sides" in speed:
        a, b = (speed["sides"][name] for name in speed["names"])
        row |= {
            "decode A": f"{a['decode']['median']:.1f}",
            "decode B": f"{b['decode']['median']:.1f}",
            "B / A": f"{speed['ratios']['decode']['median']:.2f}",
            "prefill A": "-",
            "prefill B": "-",
            "B of ceiling": f"{b['share']['measured']:.0%}",
        }
        if "512" in a["prefill"]:  # a slow machine leaves long prompts out
            row["prefill A"] = f"{a['prefill']['512']['median']:.0f}"
            row["prefill B"] = f"{b['prefill']['512']['median']:.0f}"
    return row


def selftests(folder: Path) -> str:
    """A row for each selftest."""
    rows = []
    for path in sorted(folder.glob(f"*/{page.FILE}")):
        with reading(str(path)):
            document = escaped(page.read(path.parent))
            machine, name = document["machine"], path.parent.name
            rows.append(
                [
                    f"[{name}]({name}/README.md)",
                    f"{machine['chip']}, {machine['cores']} cores",
                    f"{machine['memory_bytes'] / GB:.0f} GB",
                    machine["system"],
                    machine["backend"],
                    str(machine["packages"]["mlx"]),
                    document["date"],
                    document["settings"]["model"],
                    page.verdict(document),
                ]
            )
    head = ["selftest", "chip", "memory", "system", "device", "mlx", "date", "model", "checks"]
    return table(head, rows)


_TABLES = {"index": index, "selftests": selftests}
