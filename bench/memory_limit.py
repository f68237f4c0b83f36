"""Whether it runs where memory is short: an 8 GB Mac by arithmetic, a real limit by trying.

macOS lets the GPU of an 8 GB Apple silicon Mac have two thirds of it: Metal's
`recommendedMaxWorkingSetSize` there is 5.73 GB (5726.63 MB in ggml's own logs of an Apple M1;
21845 MB of 32 GB in llama.cpp's pull request 2011 is the same share). `available_bytes` refuses
against that number; `sudo sysctl iogpu.wired_limit_mb` raises it. The arithmetic is done by the
functions that requests are refused with, for Metal: no attention scores are held there.

`--model DIR --limit-gb N` runs `python -m mlx_cerebrum.generate` in a process that can't have
more: a memory cgroup where one can be made (it holds what is resident, file pages too, and kills
beyond it), else `ulimit -v` (address space, which is more than what is resident; it makes an
allocation fail). Linux only. Flags after `--` are passed on.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

from bench.random_model import GEOMETRIES, RandomCheckpoint
from bench.report import table
from mlx_cerebrum import cli, device
from mlx_cerebrum.errors import CerebrumError
from mlx_cerebrum.model.limits import PROC, cgroups, sizes
from mlx_cerebrum.model.memory import GB, Workload
from mlx_cerebrum.plan.layer_plan import resolve
from mlx_cerebrum.text import say
from mlx_cerebrum.weights.opening import ModelSpec, Opened

PLAN = "cerebrum-12.25b"
MAC_8GB = 8 * 2**30 * 2 // 3  # bytes
CONTEXTS = (512, 2048, 4096)
_ANSWER = 64  # tokens of a context that are generated
_CHUNK = 512  # Metal's prefill step
# What the process does before it becomes the command: a limit it can't leave any more.
_ENTER = {"cgroup": 'echo $$ > "$0" && exec "$@"', "ulimit": 'ulimit -v "$0" && exec "$@"'}
_POLL = 0.02  # seconds between looks at the peak


@dataclass(frozen=True)
class Outcome:
    """How a process fared under a limit. Sizes in bytes."""

    kind: str  # "cgroup" or "ulimit"
    limit: int
    code: int  # exit code; -9 where it was killed
    peak: int  # most that was resident
    seconds: float
    tokens: int  # generated
    said: str  # the last line of standard error

    @property
    def finished(self) -> bool:
        return self.code == 0


@contextlib.contextmanager
def cgroup(limit: int) -> Iterator[Path | None]:
    """A new control group below this process's that can hold `limit` bytes, without swap.

    None where none can be made; it is gone afterwards.
    """
    for parent in cgroups():
        folder = parent / f"mlx-cerebrum-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:  # not allowed, or no folder of a group
            continue
        try:
            if _set_limit(folder, limit):
                yield folder
                return
        finally:
            _remove(folder)
    yield None


def _set_limit(folder: Path, limit: int) -> bool:
    """Whether the group has the memory controller, and took the limit."""
    for name, swap, nothing in (
        ("memory.max", "memory.swap.max", 0),
        ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", limit),
    ):
        if (folder / name).exists():
            try:
                (folder / name).write_text(str(limit))
            except OSError:
                return False
            with contextlib.suppress(OSError):  # the kernel may not count swap
                if (folder / swap).exists():
                    (folder / swap).write_text(str(nothing))
            return True
    return False


def _remove(folder: Path) -> None:
    for _ in range(50):  # a group is busy for a moment after its last process has ended
        with contextlib.suppress(OSError):
            folder.rmdir()
            return
        time.sleep(_POLL)


def run(arguments: Sequence[str], limit: int, kind: str | None = None) -> Outcome:
    """`python -m ARGUMENTS` within `limit` bytes: by `kind`, else by a cgroup where that can be.

    Raises CerebrumError where the kind asked for is not to be had.
    """
    if not (PROC / "self/status").exists():
        raise CerebrumError("limits are set and read as Linux does; run it there")
    with contextlib.ExitStack() as stack:
        folder = None if kind == "ulimit" else stack.enter_context(cgroup(limit))
        if folder is None and kind == "cgroup":
            raise CerebrumError("no memory cgroup can be made here; be root, or take ulimit")
        if folder is None:
            kind, limited = "ulimit", str(limit // 1024)
        else:
            kind, limited = "cgroup", str(folder / "cgroup.procs")
        command = ["/bin/sh", "-c", _ENTER[kind], limited, sys.executable, "-m", *arguments]
        return _watch(command, kind, limit)


def _watch(command: list[str], kind: str, limit: int) -> Outcome:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        started, peak = time.perf_counter(), 0
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
        try:
            while process.poll() is None:
                peak = max(peak, sizes(PROC / f"{process.pid}/status").get("VmHWM", 0))
                time.sleep(_POLL)
        finally:
            process.kill()  # nothing where it has ended
            process.wait()
        seconds = time.perf_counter() - started
        out.seek(0)
        err.seek(0)
        answers, said = out.read().splitlines(), err.read().strip().splitlines()
    answer = json.loads(answers[-1]) if process.returncode == 0 and answers else {}
    tokens = int(answer.get("generation_tokens", 0))
    last = said[-1] if said else ""
    return Outcome(kind, limit, process.returncode, peak, seconds, tokens, last)


def arithmetic() -> list[str]:
    """The 12.25B folded in 4 bits, at several contexts, against an 8 GB Mac: Markdown lines."""
    raw = GEOMETRIES["cerebrum-7b"]
    checkpoint = RandomCheckpoint(Path("folded"), raw)
    spec = ModelSpec(checkpoint.path, plan=PLAN, q_bits=4, dtype="bfloat16")
    opened = Opened.of(checkpoint, spec)
    config, weights = opened.config, opened.storage.nbytes
    rows = []
    for context in CONTEXTS:
        for bits in (None, 8, 4):
            request = Workload(config, 2, context - _ANSWER, _ANSWER, _CHUNK, bits)
            with mock.patch.object(device, "backend", return_value="metal"):
                caches, computing = request.cache_bytes, request.bytes - request.cache_bytes
            total = weights + caches + computing
            rows.append(
                [
                    str(context),
                    "16" if bits is None else str(bits),
                    *(f"{size / GB:.2f}" for size in (weights, caches, computing, total)),
                    f"{total / MAC_8GB:.0%}",
                ]
            )
    blocks, positions = config.num_hidden_layers, len(resolve(PLAN).layer_map(32))
    head = ["context", "KV bits", "weights", "KV", "computing", "total, GB", "of what Metal gives"]
    return [
        f"The 12.25B in 4-bit groups of 64, folded ({positions} positions over {blocks} blocks), on"
        f" a Mac of 8 GB: Metal gives {MAC_8GB / GB:.2f} GB of it. KV with room to grow; computing"
        " is what the costliest forward pass takes beyond that.",
        table(head, rows),
    ]


def text(outcome: Outcome) -> str:
    how = "finished" if outcome.finished else f"ended with {outcome.code} ({outcome.said})"
    return (
        f"{outcome.kind} of {outcome.limit / GB:.2f} GB: {how}, {outcome.tokens} tokens in"
        f" {outcome.seconds:.1f} s, peak resident {outcome.peak / GB:.2f} GB"
    )


def parser() -> cli.ArgumentParser:
    p = cli.ArgumentParser(
        prog="bench.memory_limit",
        description="The 12.25B on an 8 GB Mac, by arithmetic; or a model under a real limit.",
    )
    p.add_argument("--model", metavar="DIR", help="what to run (default: nothing, arithmetic only)")
    p.add_argument("--limit-gb", type=float, default=5.3, metavar="GB", help="(default: 5.3)")
    p.add_argument("--kind", choices=tuple(_ENTER), help="(default: cgroup, where one can be made)")
    p.add_argument("--prompt", default="Hello", metavar="TEXT", help="continued (default: Hello)")
    p.add_argument("--max-tokens", type=int, default=4, metavar="N", help="(default: 4)")
    p.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    p.add_argument("flags", nargs="*", metavar="FLAG", help="of mlx_cerebrum.generate, after --")
    p.add_debug()
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    if args.model is None:
        say("\n\n".join(arithmetic()))
        return 0
    arguments = ["mlx_cerebrum.generate", "--model", args.model, "--raw", "--prompt", args.prompt]
    arguments += ["--max-tokens", str(args.max_tokens), "--json", *args.flags]
    outcome = run(arguments, int(args.limit_gb * GB), args.kind)
    say(json.dumps(asdict(outcome)) if args.json else text(outcome))
    return 0 if outcome.finished else 1


if __name__ == "__main__":
    sys.exit(main())
