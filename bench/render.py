"""The report of a run: a page of tables and pictures, made from its results.json alone.

python -m bench render DIR         a run's README.md and pictures, again
python -m bench render --index     the table of all runs, in bench/results/README.md
python -m bench render --figures   that, and the figures in README.md and bench/README.md
"""

import importlib
import re
from pathlib import Path
from typing import Any, cast

from bench import figures, plots, suite
from bench.markdown import code, escape, picture, private, safe
from bench.report import table
from bench.suite import Results, Suite
from mlx_cerebrum import cli
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.memory import GB
from mlx_cerebrum.text import one_line, say, tell

SCHEMA = 1
# In the order of the page. A document can name no other module.
SUITES = ("speed", "memory", "full_size", "context", "peers", "quality", "plans")
PAGE = "README.md"
CPU = (
    "**MLX's CPU backend: these times and ratios of times say nothing about Metal.**"
    " Bytes and ratios of bytes carry over."
)
NO_PICTURES = (
    "No pictures: matplotlib is not installed (`pip install matplotlib`, then"
    " `python -m bench render DIR`)."
)
# What plain data of another shape than expected makes of a suite's text and pictures.
_MISSHAPEN = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


def command_line() -> cli.ArgumentParser:
    p = cli.ArgumentParser(
        prog="python -m bench render", description="Draw the pages of results again."
    )
    p.add_argument("directory", nargs="*", type=Path, metavar="DIR", help="a run's directory")
    p.add_argument("--index", action="store_true", help="the table of all runs")
    p.add_argument(
        "--figures", action="store_true", help="the figures in README.md and bench/README.md too"
    )
    p.add_debug()
    return p


def main(argv: list[str] | None = None) -> int:
    p = command_line()
    args = p.parse_args(argv)
    if not (args.directory or args.index or args.figures):
        p.error("name a run's directory, or give --index or --figures")
    return cli.run(lambda: _run(args.directory, args.index, args.figures), args.debug)


def _run(directories: list[Path], index: bool, all_figures: bool) -> int:
    for directory in directories:
        document = suite.read(directory)
        try:
            report(document, directory)
        except RequestError as error:
            raise RequestError(f"{directory / suite.FILE}: {error}") from error
        say(str(directory / PAGE))
        for found in private(document):
            tell(f"before you send it: {suite.FILE} says {found!r}")
    if index or all_figures:
        for path in figures.rewrite(figures.ROOT, None if all_figures else figures.INDEX):
            say(str(path))
    return 0


def report(document: Results, directory: Path | None = None) -> str:
    """The Markdown page of a document; with its pictures into `directory`, if one is given.

    Raises RequestError, one line, for a document that is not as `python -m bench` writes them.
    """
    if document.get("schema") != SCHEMA:
        raise RequestError(f"its schema is {document.get('schema')!r}, not {SCHEMA}")
    suites = document["suites"]
    if not isinstance(suites, dict) or not all(isinstance(one, dict) for one in suites.values()):
        raise RequestError("its suites can't be read: they are no JSON objects")
    for name in suites:
        if name not in SUITES:
            raise RequestError(f"suite {name!r} is not one of {', '.join(SUITES)}")
    try:
        parts = [*_head(safe(document), str(document["command"])), *_took(document)]
    except _MISSHAPEN as error:
        raise _misshapen("its machine or model", error) from error
    for name in SUITES:
        if name in suites:
            parts += _section(document, name, directory)
    page = "\n\n".join(parts) + "\n"
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / PAGE).write_text(page, encoding="utf-8")
    return page


def _misshapen(what: str, error: BaseException) -> RequestError:
    said = one_line(str(error))[:80]
    return RequestError(f"{what} can't be read: {type(error).__name__}: {said}")


def _head(document: Results, command: str) -> list[str]:
    """Machine and models. `document` is escaped already; `command` is not."""
    card, model = document["machine"], document["model"]
    a, b = model["a"], model["b"]
    return [
        f"# {a['name']} against {b['name']}",
        f"{code(command)}, {document['date']}. Made from `{suite.FILE}` by"
        " `python -m bench render`.",
        _facts(_machine(card, _bandwidth(document))),
        *([CPU] if card["backend"] == "cpu" else []),
        f"Model: **{model['model']}**, {_stored(model)}. Both sides run over one copy of the"
        " weights.",
        table(
            ["", f"A: {a['name']}", f"B: {b['name']}"],
            [
                ["positions", str(a["positions"]), str(b["positions"])],
                [
                    "parameters a token runs",
                    *(f"{side['executed_parameters']:,}" for side in (a, b)),
                ],
            ],
        ),
    ]


def _took(document: Results) -> list[str]:
    """How long each suite measured, and which command, when, of which commit of this project.

    `document` is not escaped yet: a command is code, where entities mean nothing.
    """
    runs = document.get("runs", {})
    found = {}
    for name, seconds in document.get("seconds", {}).items():
        said = [f"{seconds:.0f} s"]
        if name in runs:
            run = runs[name]
            said.append(escape(str(run["date"])))
            if run.get("commit") is not None:
                said.append(f"commit {escape(str(run['commit']))}")
            said.append(code(str(run["command"])))
        found[escape(name)] = said
    if not found:
        return []
    if not runs:
        return [
            f"Measuring took: {', '.join(f'{name} {said[0]}' for name, said in found.items())}."
        ]
    lines = [f"- {name}: {', '.join(said)}" for name, said in found.items()]
    return ["Measuring took:", "\n".join(lines)]


def _facts(rows: list[list[str]]) -> str:
    """A table of names and values, both on the left."""
    cells = [["machine", ""], ["", ""], *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(2)]
    cells[1] = ["-" * width for width in widths]
    return "\n".join(f"| {k.ljust(widths[0])} | {v.ljust(widths[1])} |" for k, v in cells)


def _bandwidth(document: Results) -> Results | None:
    found = document["machine"].get("bandwidth")
    found = found or document["suites"].get("speed", {}).get("bandwidth")
    return cast(Results | None, found)


def _machine(card: Results, bandwidth: Results | None) -> list[list[str]]:
    rows = [
        ["processor", f"{card['processor']}, {card['cores']} cores"],
        ["memory", f"{card['memory_bytes'] / GB:.0f} GB"],
        ["system", str(card["os"])],
        ["mlx", f"{card['mlx']} on {card['device']} ({card['backend']}; BLAS: {card['blas']})"],
        [
            "versions",
            f"mlx-cerebrum {card['mlx_cerebrum']}, mlx-lm {card['mlx_lm'] or 'not installed'},"
            f" Python {card['python']}",
        ],
        ["load average", str(card["load_average"])],
    ]
    if bandwidth:
        measured = ", ".join(f"{k} {value:.1f}" for k, value in bandwidth["measured"].items())
        published = " or ".join(f"{value:g}" for value in bandwidth["published"] or ())
        rows.append(["bandwidth, measured", f"{measured} GB/s"])
        rows.append(["bandwidth, published", f"{published} GB/s" if published else "not known"])
    return rows


def _stored(model: Results) -> str:
    stored = model["stored"]
    if isinstance(stored, dict):
        stored = f"{stored['bits']}-bit" if stored.get("bits") else "packed in several bit widths"
    packed = f", packed to {model['q_bits']} bits while loading" if model.get("q_bits") else ""
    window = model["window"]
    return (
        f"{model['blocks']} blocks, {model['parameters']:,} parameters stored as {stored},"
        f" loaded as {model['loaded']}{packed};"
        f" {f'window of {window} tokens' if window else 'full attention'}"
    )


def _section(document: Results, name: str, directory: Path | None) -> list[str]:
    results = document["suites"][name]
    title = f"## {name.replace('_', ' ').capitalize()}"
    if "not_measured" in results:
        return [title, f"Not measured: {escape(str(results['not_measured']))}"]
    module: Any = importlib.import_module(f"bench.{name}")
    question = str(module.__doc__).splitlines()[0]
    found = cast(Suite, module)
    try:
        paragraphs = found.text(safe(results))
        drawn = found.plots(results, document["machine"])
        pictures = [] if directory is None else _pictures(drawn, directory)
    except _MISSHAPEN as error:
        raise _misshapen(f"suite {name}", error) from error
    return [title, question, *paragraphs, *pictures]


def _pictures(drawn: dict[str, plots.Picture], directory: Path) -> list[str]:
    directory.mkdir(parents=True, exist_ok=True)
    for name, one in drawn.items():
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
            raise ValueError(f"a picture named {name!r}")
        try:
            plots.save(one, directory, name)
        except ImportError:
            return [NO_PICTURES]
    return [picture(name, one.alt) for name, one in drawn.items()]
