"""The questions of the tasks beside this file, in memory: no cache, no current directory."""

import json
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "data"


def arithmetic(**_: Any) -> Any:
    """The data set as lm-evaluation-harness wants it; it passes the task's metadata."""
    from datasets import Dataset, DatasetDict

    lines = (DATA / "arithmetic.jsonl").read_text(encoding="utf-8").splitlines()
    return DatasetDict({"test": Dataset.from_list([json.loads(line) for line in lines])})
