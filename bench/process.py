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
    """Wall time of `python -m ...`, from the start to the exit. Raises as `output` does."""
    started = time.perf_counter()
    output(arguments)
    return time.perf_counter() - started


def answer(arguments: Sequence[str]) -> Any:
    """What `python -m ...` printed as its last line, read as JSON. Raises as `output` does."""
    return json.loads(output(arguments).splitlines()[-1])


def output(arguments: Sequence[str]) -> str:
    """What `python -m ...` printed. Raises CerebrumError with the last line of what went wrong."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}  # nothing measured may ask the network
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        last = (done.stderr.strip() or "it printed nothing").splitlines()[-1]
        raise CerebrumError(f"python -m {arguments[0]}: {last.removeprefix('error: ')}")
    return done.stdout
