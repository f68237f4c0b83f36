"""Processes of their own: for times from pressing return, and the memory of one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from tempfile import TemporaryFile
from typing import NamedTuple

from mlx_cerebrum.errors import CerebrumError


class Cost(NamedTuple):
    """What a process took: wall time, and the most bytes it held; Linux says no less than what the
    one that started it held then."""

    seconds: float
    peak_memory: int


def seconds(arguments: Sequence[str]) -> float:
    """Wall time of `python -m ...`, from the start to the exit (see `cost`)."""
    return cost(arguments).seconds


def cost(arguments: Sequence[str]) -> Cost:
    """Of `python -m ...`, from the start to the exit.

    Raises CerebrumError with the last line of what went wrong.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}  # nothing measured may ask the network
    command, started = [sys.executable, "-m", *arguments], time.perf_counter()
    with TemporaryFile() as out, TemporaryFile() as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        took = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if (code := process.returncode) != 0:
            err.seek(0)
            said = err.read().decode(errors="replace").strip() or "it printed nothing"
            last = said.splitlines()[-1].removeprefix("error: ")
            if code < 0:  # then the last line is no reason
                last = f"ended by {signal.strsignal(-code)}; its last line: {last}"
            raise CerebrumError(f"python -m {arguments[0]}: {last}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Cost(took, usage.ru_maxrss * unit)
