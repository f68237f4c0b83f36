"""The report of a run: a page of tables and pictures, made from its results.json alone.

python -m bench render DIR         a run's README.md and pictures, again
python -m bench render --figures   the table of all runs, the figures in documents, and the picture
                                   of the first page
"""

import json
from dataclasses import replace
from pathlib import Path

from bench import figures, plots, suite, summary
from bench.report import machine_text, table
from bench.suite import Results, escaped, reading
from mlx_cerebrum import cli
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.text import say, tell

SCHEMA = 1
# In the order of the page. A document can name no other module.
SUITES = ("speed", "memory", "full_size", "context", "peers", "quality", "plans")
PAGE = "README.md"
NO_PICTURES = "No pictures: `pip install matplotlib`, then `python -m bench render DIR`."


def command_line() -> cli.ArgumentParser:
    p = cli.ArgumentParser(
        prog="python -m bench render", description="Draw the pages of results again."
    )
    p.add_argument("directory", nargs="*", type=Path, metavar="DIR", help="a run's directory")
    documents = ", ".join(figures.DOCUMENTS)
    p.add_argument("--figures", action="store_true", help=f"the figures in {documents}")
    p.add_debug()
    return p


def main(argv: list[str] | None = None) -> int:
    p = command_line()
    args = p.parse_args(argv)
    if not (args.directory or args.figures):
        p.error("name a run's directory, or give --figures")
    return cli.run(lambda: _run(args.directory, args.figures), args.debug)


def _run(directories: list[Path], documents: bool) -> int:
    for directory in directories:
        document = suite.read(directory / suite.FILE, "schema", "machine", "model", "suites")
        report(document, directory)
        say(str(directory / PAGE))
        for found in suite.private(document):
            tell(f"before you send it: {suite.FILE} says {found!r}")
    if documents:
        for name in figures.rewrite():
            say(name)
        say(str(summary.draw().relative_to(summary.ROOT)))
    return 0


def publish(document: Results, directory: Path | None, only_json: bool) -> None:
    """Write what was measured, and its page, into the directory; and print both."""
    if directory is not None:
        suite.write(directory, document)
    page = report(document, directory)
    if not only_json:
        say(page)
    say(json.dumps(document, ensure_ascii=False))


def report(document: Results, directory: Path | None = None) -> str:
    """The Markdown page of a document; with its pictures into `directory`, if one is given.

    Raises RequestError, one line, for a document that is not as `python -m bench` writes them.
    """
    if document["schema"] != SCHEMA:
        raise RequestError(f"the schema of the results is {document['schema']!r}, not {SCHEMA}")
    document = escaped(document)
    with reading("machine or model of the results"):
        parts = _head(document)
    for name in SUITES:
        with reading(f"suite {name}"):
            if name in document["suites"]:
                parts += _section(name, document, directory)
    page = "\n\n".join(parts) + "\n"
    if directory is not None:
        (directory / PAGE).write_text(page, encoding="utf-8")
    return page


def _head(document: Results) -> list[str]:
    """Machine and models, and which command measured what, when, of which commit."""
    card, model = document["machine"], document["model"]
    a, b = model["a"], model["b"]
    stored = model["stored"]
    if isinstance(stored, dict):
        stored = f"{stored['bits']}-bit" if "bits" in stored else "packed in several bit widths"
    packed = f", packed to {model['q_bits']} bits while loading" if model["q_bits"] else ""
    window = f"window of {model['window']} tokens" if model["window"] else "full attention"
    took = [
        [name, f"{seconds:.0f} s", run["date"], run["commit"] or "", f"`{run['command']}`"]
        for name, seconds in document["seconds"].items()
        for run in (document["runs"][name],)
    ]
    return [
        f"# {a['name']} against {b['name']}",
        f"Made from `{suite.FILE}` by `python -m bench render`.",
        machine_text(card),
        f"Model: **{model['model']}**, {model['blocks']} blocks, {model['parameters']:,} parameters"
        f" stored as {stored}, loaded as {model['loaded']}{packed}; {window}. Both sides run over"
        " one copy of the weights.",
        table(
            ["", f"A: {a['name']}", f"B: {b['name']}"],
            [
                ["positions", *(str(side["positions"]) for side in (a, b))],
                ["parameters a token runs", *(f"{s['executed_parameters']:,}" for s in (a, b))],
            ],
        ),
        table(["suite", "measuring took", "on", "commit", "command"], took),
    ]


def _section(name: str, document: Results, directory: Path | None) -> list[str]:
    title, results = f"## {name.replace('_', ' ').capitalize()}", document["suites"][name]
    if "not_measured" in results:
        return [title, f"Not measured: {results['not_measured']}"]
    module = suite.module(name)
    drawn = suite.pictures(module, results, document["machine"])
    pictures = _pictures(drawn, directory, document, name) if directory else []
    return [title, module.__doc__.splitlines()[0], *module.text(results), *pictures]


def _pictures(
    drawn: dict[str, plots.Picture], directory: Path, document: Results, section: str
) -> list[str]:
    directory.mkdir(parents=True, exist_ok=True)
    model, date = document["model"]["model"], document["runs"][section]["date"]
    try:
        for name, one in drawn.items():
            note = suite.origin(one.of or f"model {model}", document["machine"], date)
            plots.save(replace(one, note=note), directory, name)
    except ImportError:
        return [NO_PICTURES]
    return [one.markdown(name) for name, one in drawn.items()]
