"""Writing safetensors as a stream: header first, then module by module, and a journal beside it.

Every shard's header is known before any value is, so bytes only ever go to the end of a file.
After each module the journal gets the SHA-256 of the file so far. A run that was killed leaves
both; the next one hashes what is there, believes it up to the last module whose hash agrees,
and goes on from that byte.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from convert.destination import Journal
from convert.integrity import PIECE, Bytes
from convert.layout import Output
from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.files import durable
from mlx_cerebrum.weights.safetensors_file import header_bytes

MAX_SHARD_BYTES = 5_000_000_000  # the hub's and mergekit's default
_QUEUED = 4  # pieces that may wait to be hashed
_FLUSH = 100_000_000  # bytes after which the disk is set to work, so that little is left at the end

Progress = Callable[[int, int, str], None]  # bytes done, of all, what is being done


class Writer:
    """Appends modules, in the order of `outputs`, to numbered shards of at most
    MAX_SHARD_BYTES."""

    def __init__(
        self,
        directory: Path,
        outputs: Sequence[Output],
        metadata: dict[str, str],
        journal: Journal,
    ) -> None:
        self.directory = directory
        self.shards = _shards(outputs, MAX_SHARD_BYTES)
        self.names = [
            f"model-{number:05d}-of-{len(self.shards):05d}.safetensors"
            for number in range(1, len(self.shards) + 1)
        ]
        self.hashes: dict[str, str] = {}  # of finished shards
        self.done = 0  # modules that are on disk
        self._metadata, self._journal = metadata, journal
        self._shard = 0
        self._left = 0  # modules of the open shard still to come
        self._written = 0  # bytes of the module being written
        self._digest = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1, "hash-output")
        self._waiting: deque[Future[None]] = deque()
        self._flusher = ThreadPoolExecutor(1, "flush-output")
        self._flushing: Future[None] | None = None
        self._unflushed = 0
        self._file: Any = None

    @property
    def weight_map(self) -> dict[str, str]:
        """Tensor name -> file name."""
        named = zip(self.names, self.shards, strict=True)
        return {
            spec.name: name for name, shard in named for output in shard for spec in output.specs
        }

    def resume(self, progress: Progress | None = None) -> None:
        """Find what an earlier run left whole: `done` modules. Cuts off the rest."""
        checked, total = 0, sum(output.nbytes for shard in self.shards for output in shard)
        for number, (name, shard) in enumerate(zip(self.names, self.shards, strict=True)):
            path = self.directory / name
            if not path.exists():
                break
            digest, good, end, whole = hashlib.sha256(), hashlib.sha256(), 0, 0
            with path.open("rb", buffering=0) as file:
                size = path.stat().st_size
                for output in shard:
                    stop = end + output.nbytes + (len(self._header(number)) if not whole else 0)
                    known = self._journal.entries.get(output.name)
                    if known is None or stop > size:
                        break
                    for start in range(end, stop, PIECE):
                        digest.update(file.read(min(PIECE, stop - start)))
                    if digest.hexdigest() != known:
                        break
                    good, end, whole = digest.copy(), stop, whole + 1
                    checked += output.nbytes
                    if progress is not None:
                        progress(checked, total, "(checking what is there)")
            self.done += whole
            if whole < len(shard):
                if whole:
                    os.truncate(path, end)
                    self._file = path.open("ab", buffering=0)
                    self._digest, self._shard, self._left = good, number, len(shard) - whole
                break
            self.hashes[name] = digest.hexdigest()
            self._shard = number + 1

    def put(self, data: Bytes) -> None:
        """The next bytes of the module that is due."""
        if self._file is None:
            self._start()
        self._append(data.data)
        self._written += data.nbytes

    def finish_module(self) -> None:
        """All bytes of the module that is due have been put."""
        shard = self.shards[self._shard]
        output = shard[len(shard) - self._left]
        if self._written != output.nbytes:
            raise CheckpointError(
                f"{output.name} came out as {self._written} bytes, not {output.nbytes}"
            )
        self._written = 0
        self._queue(lambda: self._journal.add(output.name, self._digest.hexdigest()))
        self.done += 1
        self._left -= 1
        if not self._left:
            self._finish_shard()

    def sync(self) -> None:
        """Return when all modules that are finished, and their journal, would survive a power
        cut."""
        while self._waiting:
            self._waiting.popleft().result()
        if self._file is not None:
            durable.sync(self._file.fileno())
        self._journal.sync()
        folder = os.open(self.directory, os.O_RDONLY)
        try:
            durable.sync(folder)  # the names of new files too
        finally:
            os.close(folder)

    def close(self) -> None:
        self._hasher.shutdown(cancel_futures=True)
        self._flusher.shutdown(cancel_futures=True)
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        self._file = (self.directory / self.names[self._shard]).open("wb", buffering=0)
        self._digest = hashlib.sha256()
        self._left = len(self.shards[self._shard])
        self._append(memoryview(self._header(self._shard)))

    def _finish_shard(self) -> None:
        while self._waiting:
            self._waiting.popleft().result()
        self.hashes[self.names[self._shard]] = self._digest.hexdigest()
        if self._flushing is not None:
            self._flushing.result()
            self._flushing = None
        durable.sync(self._file.fileno())
        self._file.close()
        self._file = None
        self._shard += 1

    def _append(self, data: memoryview) -> None:
        written = 0
        while written < len(data):  # a raw write may take less than it was given
            written += self._file.write(data[written:])
        self._queue(lambda: self._digest.update(data))
        self._unflushed += written
        if self._unflushed > _FLUSH and (self._flushing is None or self._flushing.done()):
            if self._flushing is not None:
                self._flushing.result()
            self._flushing = self._flusher.submit(os.fsync, self._file.fileno())
            self._unflushed = 0

    def _queue(self, work: Callable[[], None]) -> None:
        """Hashing goes on beside, in order; an error of it surfaces here."""
        while len(self._waiting) >= _QUEUED:
            self._waiting.popleft().result()
        self._waiting.append(self._hasher.submit(work))

    def _header(self, number: int) -> bytes:
        specs = (spec for output in self.shards[number] for spec in output.specs)
        return header_bytes({spec.name: (spec.dtype, spec.shape) for spec in specs}, self._metadata)


def _shards(outputs: Sequence[Output], limit: int) -> list[list[Output]]:
    """Modules in order, a new shard where one would pass `limit` bytes."""
    found: list[list[Output]] = [[]]
    size = 0
    for output in outputs:
        if found[-1] and size + output.nbytes > limit:
            found.append([])
            size = 0
        found[-1].append(output)
        size += output.nbytes
    return found
