"""What each of several processes runs in tests/ranks/test_counts.py: it counts what it sends, and
what it holds once it has loaded.

`python ranks_counts.py CHECKPOINT PLAN OUT [--split N,N] [--tensor-parallel] [--dtype NAME]`, with
a launcher's environment. OUT.RANK takes what the process found, as JSON.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np

from mlx_cerebrum import cli
from mlx_cerebrum.decoding.decoder import generate_step
from mlx_cerebrum.ranks import backend
from mlx_cerebrum.ranks.announcement import Kind
from mlx_cerebrum.ranks.follow import Follower
from mlx_cerebrum.ranks.links import Links
from mlx_cerebrum.ranks.machines import Machines, SharedOpened
from mlx_cerebrum.weights.opening import ModelSpec

TOKENS = 6  # steps of one each
Found = dict[str, Any]


class CountedLinks(Links):
    """Counts the messages of steps that have tokens, their bytes, and sums."""

    messages = nbytes = sums = 0

    def begin(self) -> None:
        self.messages = self.nbytes = self.sums = 0

    def send(self, array: mx.array, to: int) -> None:
        said = np.array(array) if array.dtype == mx.int32 else None
        if said is None or (said[1] == Kind.STEP and said[3] > 0):
            self.messages += 1
            self.nbytes += array.nbytes
        super().send(array, to)

    def summed(self, x: mx.array) -> mx.array:
        self.sums += 1
        return super().summed(x)


def held(opened: SharedOpened) -> Found:
    """Bytes, and which blocks they are of, as soon as all is loaded."""
    mx.synchronize()
    return {
        "blocks": opened.share.blocks,
        "held": mx.get_active_memory(),
        "peak": mx.get_peak_memory(),
        "predicted": opened.storage.nbytes,
        "transient": opened.storage.transient,
    }


def main() -> int:
    p = argparse.ArgumentParser()
    p.add_argument("path", type=Path)
    p.add_argument("plan")
    p.add_argument("out", type=Path)
    p.add_argument("--split")
    p.add_argument("--tensor-parallel", action="store_true")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--patience", type=float, default=30.0)
    p.add_argument("--tokens", type=int, default=TOKENS)
    args = p.parse_args()
    launched = backend()
    assert launched is not None
    links = CountedLinks(launched, args.patience)
    machines = Machines(links, args.split, args.tensor_parallel)
    opened = machines.open(ModelSpec(args.path, plan=args.plan, dtype=args.dtype))
    found: Found = {}
    if machines.follows:
        run = Follower.run

        def ready(follower: Follower) -> None:
            found.update(held(opened))
            links.begin()
            run(follower)

        with mock.patch.object(Follower, "run", ready):
            opened.follow()
        links.watch.close()
    else:
        model = opened.load()
        found |= held(opened)
        links.begin()
        found["tokens"] = list(generate_step([3], model, max_tokens=args.tokens))
    found |= {"messages": links.messages, "bytes": links.nbytes, "sums": links.sums}
    args.out.with_suffix(f".{links.rank}").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
