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

import os
import re
from collections.abc import Mapping
from pathlib import Path

from mlx_cerebrum.errors import RequestError, shown
from mlx_cerebrum.files import json_file

_ADDRESS = re.compile(r"[^:\s]+:[0-9]{1,5}", re.ASCII)
_FORM = '[["10.0.0.1:5000"], ["10.0.0.2:5000"]]'


_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # in MPI's environment


def by_launcher(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher has started this, on one machine or several."""
    return any(name in environment for name in ("MLX_RANK", *_SIZES))


def backend(environment: Mapping[str, str] = os.environ) -> str | None:
    """Which of MLX's backends a launcher has set up here; None where this machine works alone.

    Raises RequestError where what is set can't be used.
    """
    if "MLX_RANK" in environment:
        if "MLX_JACCL_COORDINATOR" in environment:
            return "jaccl"
        if "NCCL_HOST_IP" in environment:
            return "nccl" if environment.get("MLX_WORLD_SIZE", "1") != "1" else None
        return "ring" if len(hosts(environment)) > 1 else None
    sizes = (environment.get(name, "1") for name in _SIZES)
    return "mpi" if any(size != "1" for size in sizes) else None


def hosts(environment: Mapping[str, str] = os.environ) -> list[list[str]]:
    """The addresses in the host file of MLX's ring, by rank; none where the file is empty, as the
    launcher leaves it for one machine, and MLX itself can't read it.

    Raises RequestError for a file that holds anything else, and for an MLX_RANK that is not in it.
    """
    if not environment.get("MLX_HOSTFILE"):
        raise RequestError(
            "MLX_RANK is set, and MLX_HOSTFILE, the file with all machines' addresses, is not: see"
            " docs/several-machines.md"
        )
    path = Path(environment["MLX_HOSTFILE"])
    if _is_empty(path):
        return []
    lists: list[list[str]] = json_file.read(path, RequestError)
    if not (isinstance(lists, list) and lists and all(map(_are_addresses, lists))):
        raise RequestError(
            f"{path} is not what MLX_HOSTFILE names: a list of IPv4 addresses with ports for each"
            f" machine, such as {_FORM}"
        )
    if len({len(own) for own in lists}) > 1:
        raise RequestError(f"{path} gives some machines more addresses than others")
    every = [address for own in lists for address in own]
    if twice := next((each for each in every if every.count(each) > 1), None):
        raise RequestError(f"{path} gives {shown(twice)} to two machines")
    rank = environment["MLX_RANK"]
    if not (rank.isascii() and rank.isdigit() and int(rank[:9]) < len(lists)):
        raise RequestError(
            f"MLX_RANK is {shown(rank)}; {path} lists {len(lists)} machines, which count from 0"
        )
    return lists


def _is_empty(path: Path) -> bool:
    try:
        return path.stat().st_size < 99 and not path.read_bytes().strip()
    except OSError:
        return False  # whoever reads it says why


def _are_addresses(found: object) -> bool:
    if not isinstance(found, list) or not found:
        return False
    return all(isinstance(each, str) and _ADDRESS.fullmatch(each) for each in found)
