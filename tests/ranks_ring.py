"""Several processes on this machine, started as `mlx.launch` starts them."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from mlx_cerebrum.plan.layer_plan import resolve

ROOT = Path(__file__).parents[1]
PROGRAM = Path(__file__).parent / "ranks_program.py"
SHORT, LONG = "cerebrum-7b", "cerebrum-12.25b"
MAPS = tuple(resolve(name).layer_map(32) for name in (SHORT, LONG))
# Heads that divide into four shares and can be packed, and an MLP of four groups.
SIZES = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 256,
}


@dataclass(frozen=True)
class Ended:
    """What a process printed, and how it ended."""

    code: int
    out: str
    err: str


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in held:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in held]


def host_file(path: Path, machines: int) -> Path:
    path.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(machines)]))
    return path


def start(
    words: Sequence[str],
    rank: int,
    hosts: Path,
    more: Mapping[str, str] | None = None,
    stdin: int = subprocess.DEVNULL,
) -> subprocess.Popen[str]:
    """One rank, its output on pipes."""
    given = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts), "PYTHONPATH": str(ROOT)}
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"} | given | dict(more or {})
    return subprocess.Popen(
        [sys.executable, *words],
        env=environment,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=hosts.parent,
    )


def end(process: subprocess.Popen[str], timeout: float = 60.0) -> Ended:
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        err += "\n(it did not end)"
    return Ended(process.returncode, out, err)


def run(words: Sequence[str], machines: int, folder: Path, timeout: float = 60.0) -> list[Ended]:
    """All ranks of one program, until they end."""
    hosts = host_file(folder / "hosts.json", machines)
    started = [start(words, rank, hosts) for rank in range(machines)]
    return [end(each, timeout) for each in started]
