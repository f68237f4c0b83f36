"""One model on several machines, over `mx.distributed` as `mlx.launch` starts it.

Each machine is a *rank*. Rank 0, the lead, runs the whole program: it decides, draws, and talks to
people. The others follow. A step is data, so the lead announces it in bounded whole numbers, and
every machine runs its part of the blocks over its own caches:

- pipeline: each machine holds the blocks of some positions that follow each other, and hands the
  hidden states on; the last one gives them back to the lead.
- tensor parallel: each machine holds a share of every block's heads and MLP columns, and what
  these add to the stream is summed over all of them.

`links` sends and receives, `announcement` is the language, `share` what a machine holds, `agree`
what is compared before anything is loaded, `lead` and `follow` the two sides of a step.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path


def backend(environment: Mapping[str, str] = os.environ) -> str | None:
    """Which of MLX's backends a launcher has set up here; None where this machine works alone."""
    if "MLX_RANK" in environment:
        if "MLX_JACCL_COORDINATOR" in environment:
            return "jaccl"
        if "NCCL_HOST_IP" in environment:
            return "nccl" if environment.get("MLX_WORLD_SIZE", "1") != "1" else None
        return "ring" if len(hosts(environment)) > 1 else None
    sizes = (environment.get(name, "1") for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
    return "mpi" if any(size != "1" for size in sizes) else None


def hosts(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The addresses in the host file of MLX's ring, by rank; none where there is no such file.

    With one machine the launcher leaves the file empty, which MLX itself can't read.
    """
    try:
        found = json.loads(Path(environment.get("MLX_HOSTFILE", "")).read_text(encoding="utf-8"))
        return [str(each[0]) for each in found]
    except (OSError, ValueError, LookupError, TypeError):
        return []
