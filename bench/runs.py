"""What lies in bench/results/: a directory for each run, a results.json in it.

Beside it may lie what single benches printed with `--json`, such as conversion.json.
"""

import json
from pathlib import Path

from bench import suite
from bench.markdown import safe
from bench.suite import Results
from mlx_cerebrum.errors import RequestError


class Runs:
    """Reads documents when they are asked for. Their strings are escaped for Markdown."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        """Of the runs that have a results.json."""
        return sorted(path.parent.name for path in self.folder.glob(f"*/{suite.FILE}"))

    def document(self, run: str) -> Results:
        """Raises RequestError where there is none, or another kind of file."""
        document: Results = safe(suite.read(self.folder / run))
        for key in ("machine", "model", "suites"):
            if not isinstance(document.get(key), dict):
                raise RequestError(f"{self.folder / run / suite.FILE} lacks its {key}")
        return document

    def suite(self, run: str, name: str) -> Results:
        """A suite's results. Raises RequestError where the run has none."""
        found = self.document(run)["suites"].get(name)
        if not isinstance(found, dict) or "not_measured" in found:
            raise RequestError(f"{self.folder / run / suite.FILE} has no results of suite {name}")
        return found

    def bench(self, run: str, file: str) -> Results:
        """The document that a single bench printed, saved as FILE.json.

        Raises RequestError where there is none.
        """
        path = self.folder / run / f"{file}.json"
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RequestError(f"{path} can't be read as results: {error}") from None
        keys = ("bench", "machine", "settings", "results")
        if not isinstance(document, dict) or not all(key in document for key in keys):
            raise RequestError(f"{path} is not what a bench prints with --json")
        found: Results = safe(document)
        return found
