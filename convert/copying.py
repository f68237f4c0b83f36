"""Where no tensor changes the output is the source's files themselves, copied by the system."""

import ctypes
import errno
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

from convert.destination import Partial
from convert.engine import Checks, run
from convert.integrity import HashedFile
from convert.layout import Output
from convert.source import Source, check_stamps
from convert.writer import Progress
from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.weights.safetensors_checkpoint import SafetensorsCheckpoint
from mlx_cerebrum.weights.safetensors_file import read_header

_COPY = 64_000_000  # bytes the kernel is asked to copy at a time


def is_copy(source: Source, outputs: Sequence[Output]) -> bool:
    """Whether `outputs` are the source's tensors as they are, and its files hold nothing else."""
    checkpoint = source.checkpoint
    if not isinstance(checkpoint, SafetensorsCheckpoint):
        return False
    names = [spec.name for output in outputs for spec in output.specs]
    held = [name for path in source.paths for name in read_header(path)]
    return sorted(names) == sorted(held) and all(
        output.name == output.source
        and all(spec.shape == checkpoint.shapes[spec.name] for spec in output.specs)
        and output.transform.keeps(
            (checkpoint.dtypes[spec.name] for spec in output.specs), output.scale
        )
        for output in outputs
    )


class Copies:
    """The files of a copied output; `hashes` is empty where the source was not verified."""

    def __init__(self, source: Source, directory: Path) -> None:
        self.targets = {
            path: directory / f"model-{number:05d}-of-{len(source.paths):05d}.safetensors"
            for number, path in enumerate(source.paths, start=1)
        }
        self.hashes: dict[str, str] = {}
        self.resumed = 0  # modules that an earlier run had copied

    @property
    def weight_map(self) -> dict[str, str]:
        """Tensor name -> file name."""
        return {name: t.name for path, t in self.targets.items() for name in read_header(path)}

    def write(
        self, source: Source, partial: Partial, checks: Checks, progress: Progress | None
    ) -> dict[str, str]:
        """Copy what is not there yet while the source is read and checked beside.

        Returns the source's hashes. Copies of an earlier run are compared with them.
        """
        kept = {
            path
            for path, target in self.targets.items()
            if target.exists() and partial.journal.entries.get(target.name) == "copied"
        }
        stopped = Event()

        def go_on(_: int) -> None:
            if stopped.is_set():
                raise InterruptedError

        def copy(paths: set[Path]) -> None:
            for path in sorted(paths):
                try:
                    copy_file(path, self.targets[path], go_on)
                except FileNotFoundError:
                    gone = f"{path} is gone while it was copied; start again"
                    raise CheckpointError(gone) from None
                partial.journal.add(self.targets[path].name, "copied")

        with ThreadPoolExecutor(1, "copy") as copier:
            copying = copier.submit(copy, set(self.targets) - kept)

            def watch(done: int, total: int, item: str = "") -> None:
                if copying.done():
                    copying.result()  # a full disk is told at once
                if progress is not None:
                    progress(done, total, item)

            try:
                run(source, [], None, checks, watch)
                hashes = source.finish()
                copying.result()
            except BaseException:
                stopped.set()
                raise
        # Damaged, or there is no hash to compare it with.
        odd = {p for p in kept if HashedFile(self.targets[p]).finish() != hashes.get(p.name)}
        copy(odd)
        check_stamps(source.stats)  # what was copied is what was read
        names = (name for path in kept - odd for name in read_header(path))
        self.resumed = len({name.rpartition(".")[0] for name in names})
        self.hashes = {
            self.targets[path].name: hashes[path.name] for path in source.paths if hashes
        }
        return hashes


def copy_file(source: Path, target: Path, progress: Callable[[int], None] | None = None) -> None:
    """Copy a file the cheapest way there is: a clone that shares its blocks (APFS, and on Linux
    btrfs and XFS through copy_file_range), else inside the kernel, else through a buffer.

    progress: called with the bytes copied since the last call.
    """
    target.unlink(missing_ok=True)
    size = source.stat().st_size
    if sys.platform == "darwin" and _clone(source, target):
        if progress is not None:
            progress(size)
        return
    with source.open("rb", buffering=0) as read, target.open("wb", buffering=0) as write:
        kernel = hasattr(os, "copy_file_range")
        while True:
            try:
                if kernel:
                    count = os.copy_file_range(read.fileno(), write.fileno(), _COPY)
                else:
                    count = write.write(read.read(_COPY // 8)) or 0
            except OSError as error:
                if not kernel or error.errno == errno.ENOSPC:
                    raise
                kernel = False  # across file systems, or one that can't
                continue
            if not count:
                break
            if progress is not None:
                progress(count)
        os.fsync(write.fileno())
    if target.stat().st_size != size:
        raise CheckpointError(f"{source} changed while it was copied; start again")


def _clone(source: Path, target: Path) -> bool:
    """macOS: `clonefile(2)`, which copies nothing until one of the two is changed."""
    clonefile = ctypes.CDLL(None, use_errno=True).clonefile
    return int(clonefile(os.fsencode(source), os.fsencode(target), 0)) == 0
