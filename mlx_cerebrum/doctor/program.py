"""This package's commands, run as a user runs them, for the checks of whole programs."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import mlx_cerebrum
from mlx_cerebrum.errors import CerebrumError
from mlx_cerebrum.text import one_line

ROOT = Path(mlx_cerebrum.__file__).parents[1]
PATIENCE = 300.0  # seconds that one command may take

# MLX takes the default device from no variable: a program of one line sets it.
_ON_CPU = "import mlx.core as mx; mx.set_default_device(mx.cpu)"
_MAIN = "import sys; from mlx_cerebrum.__main__ import main; sys.exit(main(sys.argv[1:]))"


def words(command: Sequence[str], on_cpu: bool = False) -> list[str]:
    """`mlx-cerebrum COMMAND ...` as a process of this Python, on the default device or the CPU."""
    # -P: nothing in the current folder is taken for a module.
    return [sys.executable, "-P", "-c", f"{_ON_CPU}; {_MAIN}" if on_cpu else _MAIN, *command]


def environment() -> dict[str, str]:
    """Where the package is found though it is not installed, and the network is not asked."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    found = os.environ | own
    found.pop("MLX_CEREBRUM_API_KEY", None)  # the user's is not for what only runs here
    return found


def run(command: Sequence[str], on_cpu: bool = False) -> str:
    """What a command prints. Raises CerebrumError with the last line it says where it fails."""
    done = subprocess.run(
        words(command, on_cpu),
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    if done.returncode:
        said = last_line(done.stderr) or last_line(done.stdout) or "it printed nothing"
        raise CerebrumError(f"mlx-cerebrum {command[0]} ended with code {done.returncode}: {said}")
    return done.stdout


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return one_line(lines[-1], 300).removeprefix("error: ") if lines else ""
