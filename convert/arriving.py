"""A source that comes from the hub file by file: each is fetched, read once, and removed.

A thread fetches while the conversion reads what is whole. Where the disk has room for two, the
next file comes meanwhile; where it has not, the thread waits until the one before is removed.
"""

import errno
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Condition, Event, Thread

from convert.integrity import HashedFile, ReadError
from convert.source import Source, Stamp, Stamps
from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.installed import program
from mlx_cerebrum.weights.checkpoint import Checkpoint
from mlx_cerebrum.weights.fetching import StoppedError, fetch, there
from mlx_cerebrum.weights.remote import Remote

_SLACK = 100_000_000  # bytes of disk that are left alone, where a second file would come
_LOOK = 1.0  # seconds between looks at the disk


class Arrivals:
    """Fetches the files of one checkpoint into `directory`, one after the other.

    left: bytes that the conversion is still to write.
    keep: what becomes of a file that has been read; without it, it is removed.
    came: called with a file's name and how many bytes of it are there.
    """

    def __init__(
        self,
        remote: Remote,
        directory: Path,
        left: Callable[[], int],
        came: Callable[[str, int], None],
        keep: Callable[[str, Path], None] | None = None,
    ) -> None:
        self.remote, self.directory = remote, directory
        self._left, self._came, self._keep = left, came, keep
        self._here: set[str] = set()  # whole, and not left yet
        self._error: BaseException | None = None
        self._changed = Condition()
        self._stop = Event()
        self._thread: Thread | None = None

    def start(self, names: Sequence[str]) -> None:
        """Begin to fetch these files, in this order; others that lie there were left behind."""
        for file in self.directory.glob("*.safetensors*"):
            if file.suffix == ".safetensors" and file.name not in names:
                self.leave(file.name)
            elif file.suffix == ".part" and file.stem not in names:
                file.unlink()
        self._thread = Thread(target=self._run, args=(list(names),), daemon=True)
        self._thread.start()

    def has(self, name: str) -> bool:
        with self._changed:
            return name in self._here

    def wait(self, name: str) -> None:
        """Return when a file is whole. Raises ReadError where it can't be had."""
        with self._changed:
            while name not in self._here:
                if self._error is not None:
                    raise ReadError(str(self._error)) from self._error
                self._changed.wait(_LOOK)

    def leave(self, name: str) -> None:
        """A file has been read and is not needed again."""
        path = self.directory / name
        if self._keep is not None and name in self.remote.files and not path.is_symlink():
            self._keep(name, path)
        path.unlink(missing_ok=True)
        with self._changed:
            self._here.discard(name)
            self._changed.notify_all()

    def close(self) -> None:
        """Stop fetching; what has come stays. It is not waited for longer than a moment."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(0.5)

    def _run(self, names: list[str]) -> None:
        try:
            for name in names:
                target = self.directory / name
                self._make_room(name, target)
                if target.is_symlink() and not target.exists():  # what it led to is gone
                    target.unlink()
                if not there(target) and (cached := self.remote.cached(name)):
                    target.symlink_to(cached)  # read where it is; only the link is removed
                fetch(self.remote, name, target, partial(self._came, name), self._stop)
                with self._changed:
                    self._here.add(name)
                    self._changed.notify_all()
        except StoppedError:
            pass
        except BaseException as error:
            with self._changed:
                self._error = _named(error, self.directory)
                self._changed.notify_all()

    def _make_room(self, name: str, target: Path) -> None:
        """Wait until no other file is there, or the disk has room for this one besides."""
        with self._changed:
            while self._here:
                missing = self.remote.files[name].nbytes - there(target)
                free = shutil.disk_usage(self.directory).free
                if len(self._here) == 1 and missing + self._left() + _SLACK < free:
                    return
                if self._stop.is_set():
                    raise StoppedError
                self._changed.wait(_LOOK)


class ArrivingSource(Source):
    """The pieces of a checkpoint that `arrivals` brings; their hashes are checked as they come."""

    def __init__(
        self, checkpoint: Checkpoint, arrivals: Arrivals, hasher: ThreadPoolExecutor
    ) -> None:
        self._arrivals = arrivals
        super().__init__(checkpoint, False, hasher)
        for module in self.modules:
            if len({extent.path for extent in checkpoint.extents(module).values()}) > 1:
                raise CheckpointError(
                    f"{checkpoint.path.name}: {module} lies in two files, which can't be read one"
                    f" at a time: fetch it whole (`{program('hf')} download`), and convert that"
                )
        self._last = {self._file(module): module for module in self.modules}

    def expect(self, modules: Sequence[str]) -> None:
        """These are to be read, and no others: their files are fetched."""
        self._arrivals.start(list(dict.fromkeys(self._file(module) for module in modules)))

    def has(self, module: str) -> bool:
        return self._arrivals.has(self._file(module))

    def leave(self, module: str, sync: Callable[[], None]) -> None:
        name = self._file(module)
        if self._last[name] == module:
            sync()  # only then is its source not needed any more
            self._files.pop(self.checkpoint.path / name).close()
            self._arrivals.leave(name)

    def open(self, path: Path) -> HashedFile:
        if path not in self._files:
            self._arrivals.wait(path.name)
        return super().open(path)

    def finish(self) -> dict[str, str]:
        files = (self._arrivals.remote.files[path.name] for path in self.paths)
        return {file.name: file.hash for file in files if file.hash is not None}

    def _stamps(self) -> Stamps:
        files = self._arrivals.remote.files
        names = dict.fromkeys(map(self._file, self.modules))
        return {
            self.checkpoint.path / name: Stamp(
                str(files[name].hash), 0, 0, files[name].nbytes, 0, 0
            )
            for name in names
        }

    def _file(self, module: str) -> str:
        return self.checkpoint.extents(module)["weight"].path.name


def _named(error: BaseException, directory: Path) -> BaseException:
    """What the system says of a file, and what to do."""
    if not isinstance(error, OSError):
        return error
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "make room, and run" if full else "run"
    return CheckpointError(
        f"{directory}: {error.strerror or error}; {remedy} the same command again to go on"
    )
