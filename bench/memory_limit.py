"""Whether it runs where memory is short: an 8 GB Mac by arithmetic, a real limit by trying.

macOS lets the GPU of an 8 GB Apple silicon Mac have two thirds of it: Metal's
`recommendedMaxWorkingSetSize` there is 5.73 GB (5726.63 MB in ggml's own logs of an Apple M1;
21845 MB of 32 GB in llama.cpp's pull request 2011 is the same share). `available_bytes` refuses
against that number; `sudo sysctl iogpu.wired_limit_mb` raises it.

`--model DIR --limit-gb N` runs `python -m mlx_cerebrum.generate` in a process that can't have
more: a memory cgroup where one can be made (it holds what is resident, file pages too, and kills
beyond it), else `ulimit -v` (address space, which is more than what is resident; it makes an
allocation fail). Linux only. Flags after `--` are passed on, such as `-- --prompt TEXT`.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen, TimeoutExpired

from bench.memory import full_size, on_metal
from bench.report import columns
from mlx_cerebrum import cli
from mlx_cerebrum.errors import CerebrumError
from mlx_cerebrum.model.limits import PROC, cgroups, sizes
from mlx_cerebrum.model.memory import GB, Workload
from mlx_cerebrum.text import say

MAC_8GB = 8 * 2**30 * 2 // 3  # bytes
CONTEXTS = (512, 2048, 4096)
_ANSWER = 64  # tokens of a context that are generated
_CHUNK = 512  # Metal's prefill step
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


@contextlib.contextmanager
def cgroup(limit: int) -> Iterator[Path | None]:
    """A new control group below this process's that can hold `limit` bytes, without swap.

    None where none can be made; it is gone afterwards.
    """
    folder = next(filter(None, (_made(parent, limit) for parent in cgroups())), None)
    try:
        yield folder
    finally:
        if folder is not None:
            _remove(folder)


def _made(parent: Path, limit: int) -> Path | None:
    folder = parent / f"mlx-cerebrum-{os.getpid()}"
    try:
        folder.mkdir()
        first = (folder / "memory.limit_in_bytes").exists()  # cgroups' first version
        (folder / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(limit))
    except OSError:  # not allowed, or it has no memory controller
        with contextlib.suppress(OSError):
            folder.rmdir()
        return None
    swap = ("memory.memsw.limit_in_bytes", limit) if first else ("memory.swap.max", 0)
    with contextlib.suppress(OSError):  # the kernel may not count swap
        (folder / swap[0]).write_text(str(swap[1]))
    return folder


def _remove(folder: Path) -> None:
    for _ in range(50):  # a group is busy for a moment after its last process has ended
        with contextlib.suppress(OSError):
            return folder.rmdir()
        time.sleep(_POLL)


def run(arguments: Sequence[str], limit: int, kind: str | None = None) -> Outcome:
    """`python -m ARGUMENTS` within `limit` bytes: by `kind`, else by a cgroup where that can be.

    Raises CerebrumError where the kind asked for is not to be had.
    """
    if sys.platform != "linux":
        raise CerebrumError("limits are set and read as Linux does; run it there")
    with contextlib.ExitStack() as stack:
        folder = None if kind == "ulimit" else stack.enter_context(cgroup(limit))
        if folder is None and kind == "cgroup":
            raise CerebrumError("no memory cgroup can be made here; be root, or take ulimit")
        enter, limited = 'ulimit -v "$0"', str(limit // 1024)
        if folder is not None:
            enter, limited = 'echo $$ > "$0"', str(folder / "cgroup.procs")
        # The shell becomes the command, which never held anything outside the limit.
        shell = ["/bin/sh", "-c", f'{enter} && exec "$@"', limited]
        command = [*shell, sys.executable, "-m", *arguments]
        started, peak = time.perf_counter(), 0
        process = stack.enter_context(Popen(command, stdout=PIPE, stderr=PIPE, text=True))
        stack.callback(process.kill)  # nothing where it has ended
        while True:
            with contextlib.suppress(TimeoutExpired):
                out, err = process.communicate(timeout=_POLL)
                break
            peak = max(peak, sizes(PROC / f"{process.pid}/status").get("VmHWM", 0))
        seconds = time.perf_counter() - started
    answer = json.loads(out.splitlines()[-1]) if process.returncode == 0 and out else {}
    tokens, said = answer.get("generation_tokens", 0), err.strip().rpartition("\n")[2]
    kind = "ulimit" if folder is None else "cgroup"
    return Outcome(kind, limit, process.returncode, peak, seconds, tokens, said)


def arithmetic() -> list[str]:
    """The 12.25B folded in 4 bits, at several contexts, against an 8 GB Mac: Markdown lines."""
    opened = full_size("folded", 4)
    config, weights = opened.config, opened.storage.nbytes
    requests = [
        Workload(config, 2, context - _ANSWER, _ANSWER, _CHUNK, bits)
        for context in CONTEXTS
        for bits in (None, 8, 4)
    ]

    def gb(size: float) -> str:
        return f"{size / GB:.2f}"

    return [
        f"The 12.25B in 4-bit groups of 64, folded ({config.num_positions} positions over"
        f" {config.num_hidden_layers} blocks), on a Mac of 8 GB: Metal gives {gb(MAC_8GB)} GB. KV"
        " with room to grow; computing is what the costliest forward pass takes beyond that.",
        columns(
            requests,
            ("context", lambda one: str(one.prompt + one.generated)),
            ("KV bits", lambda one: str(one.kv_bits or 16)),
            ("weights", lambda one: gb(weights)),
            ("KV", lambda one: gb(one.cache_bytes)),
            ("computing", lambda one: gb(on_metal(one) - one.cache_bytes)),
            ("total, GB", lambda one: gb(weights + on_metal(one))),
            ("of what Metal gives", lambda one: f"{(weights + on_metal(one)) / MAC_8GB:.0%}"),
        ),
    ]


def main(argv: list[str] | None = None) -> int:
    p = cli.ArgumentParser(
        prog="bench.memory_limit",
        description="The 12.25B on an 8 GB Mac, by arithmetic; or a model under a real limit.",
    )
    p.add_argument("--model", metavar="DIR", help="what to run (default: nothing, arithmetic only)")
    p.add_argument("--limit-gb", type=float, default=5.3, metavar="GB", help="(default: 5.3)")
    p.add_argument(
        "--kind", choices=("cgroup", "ulimit"), help="(default: cgroup, where one can be made)"
    )
    p.add_argument("flags", nargs="*", metavar="FLAG", help="of mlx_cerebrum.generate, after --")
    p.add_debug()
    args = p.parse_args(argv)
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    if args.model is None:
        say("\n\n".join(arithmetic()))
        return 0
    asked = ["--raw", "--prompt", "Hello", "--max-tokens", "4", "--json", *args.flags]
    words = ["mlx_cerebrum.generate", "--model", args.model, *asked]
    found = run(words, int(args.limit_gb * GB), args.kind)
    how = "finished" if found.code == 0 else f"ended with {found.code} ({found.said})"
    say(
        f"{found.kind} of {found.limit / GB:.2f} GB: {how}, {found.tokens} tokens in"
        f" {found.seconds:.1f} s, peak resident {found.peak / GB:.2f} GB"
    )
    return 0 if found.code == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
