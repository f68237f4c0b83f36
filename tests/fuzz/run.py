"""The fuzzer: a worker process reads input after input, and its end is noticed from outside.

Each input depends on (reader, seed, index) alone, so any of them is made again by these. A fault
is whatever leaves a reader other than the project's own errors, more than SECONDS of CPU,
more than BYTES of memory, or the worker's death (a Rust abort, a hang).
"""

import argparse
import json
import os
import resource
import selectors
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import IO, Any, NamedTuple

SECONDS = 10.0
BYTES = 2 << 30
_SILENCE = 60.0  # seconds without a word from the worker: it hangs
_MOST_DEATHS = 50  # of one reader; each costs a new worker
_ROOT = Path(__file__).parents[2]


@dataclass
class Tally:
    """inputs: how many were read. refused: how many of them ended in an error of ours.
    faults: by where they came from, the indexes."""

    inputs: int = 0
    refused: int = 0
    faults: dict[str, list[int]] = field(default_factory=dict)

    def count(self, reader: str, index: int, refused: bool, fault: str | None) -> None:
        self.inputs += 1
        self.refused += refused
        if fault:
            self.faults.setdefault(fault, []).append(index)

    def __str__(self) -> str:
        count = sum(map(len, self.faults.values()))
        return f"{self.inputs} inputs ({self.refused} refused), {count} faults"


class Job(NamedTuple):
    """A reader, and the inputs to read: from `first` to before `stop`."""

    name: str
    first: int
    stop: int


# In the worker.


class _Folder:
    """A reader's valid files, in which one input at a time takes the place of some."""

    def __init__(self, name: str, root: Path) -> None:
        from .readers import CANARY, READERS

        self.name, self.path = name, root / name
        self.reader = (READERS | {"canary": CANARY})[name]
        self.path.mkdir()
        self.reader.prepare(self.path)
        self.valid = {file.name: file.read_bytes() for file in self.path.iterdir()}

    def made(self, seed: int, index: int) -> dict[str, bytes]:
        return self.reader.change(self.path, Random(f"{self.name}/{seed}/{index}"))

    def read(self, files: dict[str, bytes]) -> None:
        for name, data in files.items():
            (self.path / name).write_bytes(data)
        try:
            self.reader.read(self.path)
        finally:
            for name in {file.name for file in self.path.iterdir()} | set(files):
                if name not in self.valid:
                    (self.path / name).unlink(missing_ok=True)
                elif name in files:
                    (self.path / name).write_bytes(self.valid[name])


def _place(error: BaseException) -> str:
    """The kind of an error, and the line of the project it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if Path(f.filename).parent.name not in ("fuzz", "site-packages")]
    ours = [f for f in ours if _ROOT in Path(f.filename).parents and ".venv" not in f.filename]
    at = f"{Path(ours[-1].filename).relative_to(_ROOT)}:{ours[-1].lineno}" if ours else "fuzz"
    return f"{type(error).__name__} at {at}"


def _one(folder: _Folder, files: dict[str, bytes]) -> tuple[bool, str | None]:
    """Whether an input was refused, and its fault."""
    from mlx_cerebrum.errors import CerebrumError
    from mlx_cerebrum.server.faults import ApiError

    refused, started = False, time.process_time()
    try:
        folder.read(files)
    except (CerebrumError, ApiError) as error:
        refused = True
        if len(str(error)) > 4096:
            return True, f"a message of {len(str(error))} characters"
    except OSError as error:  # a command line says it in one line
        refused = True
        if error.strerror is None:
            return True, _place(error)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # tokenizers' PanicException is no Exception
        return False, _place(error)
    spent = time.process_time() - started
    return refused, f"took {spent:.0f} s of CPU" if spent > SECONDS else None


def work(jobs: list[Job], seed: int, minutes: float) -> None:
    """Read inputs and say so, a line each, on standard output."""
    say = os.fdopen(os.dup(1), "w", buffering=1)
    with open(os.devnull, "r+b") as null:  # noqa: PTH123
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)  # sentencepiece's log, Rust's backtraces
    with tempfile.TemporaryDirectory() as root:
        folders = {name: _Folder(name, Path(root)) for name, _, _ in jobs}
        for folder in folders.values():
            folder.read({})  # what is valid is read, and everything is imported
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        until = time.monotonic() + 60 * minutes if minutes else float("inf")
        for name, first, stop in jobs:
            for index in range(first, stop):
                if time.monotonic() > until:
                    break
                refused, fault = _one(folders[name], folders[name].made(seed, index))
                line = {"reader": name, "index": index, "refused": refused, "fault": fault}
                say.write(json.dumps(line) + "\n")
        say.write("null\n")


# Around it.


def fuzz(
    counts: Mapping[str, int], seed: int, first: int = 0, minutes: float = 0
) -> dict[str, Tally]:
    """Read so many inputs of each reader, or as many of them as `minutes` hold."""
    tallies = {name: Tally() for name in counts}
    jobs = [Job(name, first, first + count) for name, count in counts.items()]
    until = time.monotonic() + 60 * minutes
    while jobs and (not minutes or time.monotonic() < until):
        ended = ""
        for said in _worker(jobs, seed, (until - time.monotonic()) / 60 if minutes else 0):
            if isinstance(said, str):
                ended = said
                continue
            while jobs[0].name != said["reader"]:
                jobs.pop(0)
            jobs[0] = jobs[0]._replace(first=said["index"] + 1)
            tallies[jobs[0].name].count(**said)
        if not ended:
            break
        name, index, stop = jobs[0]
        if index < stop:
            tallies[name].count(name, index, False, ended)
        if index + 1 < stop and len(tallies[name].faults.get(ended, ())) < _MOST_DEATHS:
            jobs[0] = Job(name, index + 1, stop)
        else:
            jobs.pop(0)
    return tallies


def _worker(jobs: list[Job], seed: int, minutes: float) -> Iterator[dict[str, Any] | str]:
    """What a worker says of each input, and at last how it ended, "" being well."""
    command = [sys.executable, "-m", "tests.fuzz", "--work", json.dumps(jobs)]
    command += ["--seed", str(seed), "--minutes", str(minutes)]
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=_ROOT)
    assert worker.stdout is not None
    text: bytes | None = b""
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(worker.stdout, selectors.EVENT_READ)
            for text in _spoken(worker.stdout, selector):
                if text not in (None, b"null"):
                    yield json.loads(text)
        ended = "hangs" if text is None else "" if text == b"null" else f"died: {worker.wait()}"
    finally:
        worker.kill()
        worker.wait()
        worker.stdout.close()
    yield ended


def _spoken(stdout: IO[bytes], selector: selectors.BaseSelector) -> Iterator[bytes | None]:
    """Whole lines; None for a silence."""
    held = b""
    while True:
        if not selector.select(_SILENCE):
            yield None
            return
        data = os.read(stdout.fileno(), 1 << 16)
        if not data:
            return
        *lines, held = (held + data).split(b"\n")
        yield from lines


def main(argv: list[str] | None = None) -> int:
    """Fuzz, print inputs and faults, and keep the inputs that are at fault as files."""
    p = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    p.add_argument("--reader", action="append", help="which to fuzz; all of them by default")
    p.add_argument("--minutes", type=float, default=0.0, help="for each reader; 0 counts instead")
    p.add_argument("--count", type=int, help="inputs for each reader (default: 1000)")
    p.add_argument("--seed", type=int, default=0, help="of the inputs (default: 0)")
    p.add_argument("--first", type=int, default=0, help="the first input's index (default: 0)")
    p.add_argument("--index", type=int, help="read this one input here, with its traceback")
    p.add_argument("--out", type=Path, help="folder for inputs at fault (default: a new one)")
    p.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    count = args.count or (10**9 if args.minutes else 1000)
    if args.work:
        work([Job(*job) for job in args.work], args.seed, args.minutes)
        return 0
    from .readers import READERS

    names = args.reader or list(READERS)
    if unknown := set(names) - set(READERS):
        p.error(f"no reader is named {unknown.pop()!r}; there are {', '.join(READERS)}")
    if args.index is not None:
        return _again(names[0], args.seed, args.index)
    out, faults = args.out, 0
    for name in names:
        tally = fuzz({name: count}, args.seed, args.first, args.minutes)[name]
        print(f"{name}: {tally}", flush=True)
        for fault, indexes in sorted(tally.faults.items(), key=lambda one: -len(one[1])):
            faults += len(indexes)
            out = out or Path(tempfile.mkdtemp(prefix="fuzz-"))
            kept = _kept(name, args.seed, indexes[0], out)
            print(f"  {len(indexes)} x {fault}: --index {indexes[0]}, {kept}", flush=True)
    return 1 if faults else 0


def _again(name: str, seed: int, index: int) -> int:
    with tempfile.TemporaryDirectory() as root:
        folder = _Folder(name, Path(root))
        files = folder.made(seed, index)
        for file, data in files.items():
            print(f"{file}: {data[:400]!r}")
        started = time.process_time()
        try:
            folder.read(files)
        finally:
            print(f"{time.process_time() - started:.2f} s of CPU")
    return 0


def _kept(name: str, seed: int, index: int, out: Path) -> Path:
    """The input's files, in a folder of their own."""
    kept = out / f"{name}-{seed}-{index}"
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as root:
        for file, data in _Folder(name, Path(root)).made(seed, index).items():
            (kept / file).write_bytes(data)
    return kept
