"""Processes of their own: for times from pressing return."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence

from mlx_cerebrum.errors import CerebrumError


def seconds(arguments: Sequence[str]) -> float:
    """Wall time of `python -m ...`, from the start to the exit.

    Raises CerebrumError with the last line of what went wrong.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}  # nothing measured may ask the network
    command, started = [sys.executable, "-m", *arguments], time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    took = time.perf_counter() - started
    if done.returncode != 0:
        last = (done.stderr.strip() or "it printed nothing").splitlines()[-1]
        raise CerebrumError(f"python -m {arguments[0]}: {last.removeprefix('error: ')}")
    return took
