"""`mlx-cerebrum doctor --selftest`: every check, one after the other, and their page.

The page is written anew after each check: a machine that does not survive one has left what came
before it.
"""

import datetime
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mlx_cerebrum.doctor import page, report
from mlx_cerebrum.doctor.alone import in_process
from mlx_cerebrum.doctor.check import Check, Found, Settings
from mlx_cerebrum.doctor.checks import CHECKS
from mlx_cerebrum.machine.awake import awake
from mlx_cerebrum.text import one_line, tell
from mlx_cerebrum.weights.opening import ModelSpec, open_model

RESULTS = Path("bench") / "results"  # of a checkout


def default_folder(here: Path) -> Path:
    """`bench/results/<machine>-selftest` in a checkout, else `<machine>-selftest` here."""
    name = f"{page.machine_name()}-selftest"
    return here / RESULTS / name if (here / RESULTS).is_dir() else here / name


def selftest(
    model: str,
    quick: bool,
    directory: Path,
    checks: Sequence[Check] = CHECKS,
    carry_out: Callable[[Check, Settings], Found] = in_process,
    say: Callable[[str], None] = tell,
) -> page.Document:
    """Runs the checks and writes the page; returns the document.

    Raises a CerebrumError, before any check runs, where the model is not here or the folder holds
    something else.
    """
    page.check_folder(directory)
    for name in dict.fromkeys((Settings.small, model)):
        open_model(ModelSpec(name))
    facts = report.machine()
    named = model if not Path(model).expanduser().exists() else Path(model).name
    document = page.begun(
        facts.facts,
        facts.data,
        {"model": named, "quick": quick},
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        checks_in_all=len(checks),
    )
    began = time.perf_counter()
    with awake(), tempfile.TemporaryDirectory() as work:
        settings = Settings(model, quick, work)
        for number, check in enumerate(checks, 1):
            say(f"{number}/{len(checks)} {check.name}: {check.shows} ...")
            started = time.perf_counter()
            found = carry_out(check, settings)
            row = page.row(check, found, time.perf_counter() - started)
            document["checks"].append(row)
            document["seconds"] = round(time.perf_counter() - began, 1)
            page.write(directory, document)
            say("    " + one_line(f"{page.SAID[found.passed]}: {row['words']}", 300))
            if found.passed is False:
                say(f"    to do: {check.remedy}")
    return document
