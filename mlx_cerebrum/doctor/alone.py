"""`python -m mlx_cerebrum.doctor.alone NAME SETTINGS FILE`: one check, in a process of its own.

Whatever MLX does in it, even an abort of the process, the other checks still run. It begins with
memory that nobody has used, too.
"""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from mlx_cerebrum.doctor import program
from mlx_cerebrum.doctor.check import Check, Found, Settings
from mlx_cerebrum.files.replacing import replacing

LIMIT = 1800.0  # seconds


def carry_out(check: Check, settings: Settings) -> Found:
    """A check that raises has failed, with its one line."""
    try:
        return check.run(settings)
    except Exception as error:
        said = program.last_line(str(error))
        kind = type(error).__name__
        return Found(False, f"{kind}: {said}" if said else kind)


def in_process(check: Check, settings: Settings, limit: float = LIMIT) -> Found:
    """The same in a new process; one that ends by itself, or does not end, has failed too."""
    answer = Path(settings.work) / f"{check.name}.json"
    words = [check.name, json.dumps(asdict(settings)), str(answer)]
    with subprocess.Popen(
        [sys.executable, "-P", "-m", __name__, *words],
        env=program.environment() | dict(check.variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            _, said = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return Found(False, f"it did not end within {limit:g} s")
        finally:
            process.kill()
    if not answer.exists():
        code = process.returncode
        how = f"signal {-code}" if code < 0 else f"code {code}"
        return Found(False, f"its process ended with {how}: {program.last_line(said)}")
    return Found(**json.loads(answer.read_text(encoding="utf-8")))


def main(argv: list[str]) -> None:
    from mlx_cerebrum.doctor.checks import BY_NAME

    name, settings, answer = argv
    found = carry_out(BY_NAME[name], Settings(**json.loads(settings)))
    with replacing(Path(answer), Path(f"{answer}.partial")) as file:
        file.write(json.dumps(asdict(found)).encode())


if __name__ == "__main__":
    main(sys.argv[1:])
