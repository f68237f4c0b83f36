"""Processes of their own: for times from pressing return, and bytes that nothing else blurs."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from mlx_cerebrum.errors import CerebrumError


def seconds(arguments: Sequence[str]) -> float:
    """Wall time of `python -m ...`, from the start to the exit."""
    started = time.perf_counter()
    _run(arguments)
    return time.perf_counter() - started


def answer(arguments: Sequence[str]) -> Any:
    """What `python -m ...` printed as its last line, read as JSON."""
    lines = _run(arguments).strip().splitlines()
    return json.loads(lines[-1]) if lines else None


def _run(arguments: Sequence[str]) -> str:
    """Standard output. Raises CerebrumError with the last line of what went wrong."""
    # Nothing measured may ask the network anything.
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise CerebrumError(f"python -m {arguments[0]}: {last.removeprefix('error: ')}")
    return done.stdout
