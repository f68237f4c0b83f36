"""A repository on the hub, looked at and read in ranges: nothing is fetched that is not asked for.

huggingface_hub finds the names, tokens, mirrors and its own HTTP client. What it downloads, it
starts again from nothing after a break; here a range is asked for, so that it need not.
"""

import hashlib
import re
import shutil
import struct
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.files import json_file
from mlx_cerebrum.weights import network
from mlx_cerebrum.weights.network import BusyError, explained
from mlx_cerebrum.weights.safetensors_file import TensorInfo, parse_header

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

_FIRST = 1 << 16  # bytes of a file that nearly always hold its whole header
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_MOST_SMALL = 1 << 26  # bytes of a file that is no weight file


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository: `hash` is its SHA-256 where the hub keeps it as a large file, git's
    SHA-1 of a small one, None where the hub says neither."""

    name: str
    nbytes: int
    hash: str | None

    def digest(self) -> "hashlib._Hash":
        """What all bytes of the file are given to, for its `hash` to come out."""
        if self.hash is None or len(self.hash) == 64:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.nbytes)  # as git begins

    def is_hash_of(self, data: bytes) -> bool:
        """Whether these are the bytes that the hub has; also where it says no hash."""
        digest = self.digest()
        digest.update(data)
        return self.hash in (None, digest.hexdigest())


@dataclass(frozen=True)
class Remote:
    """A repository at one commit: another commit's files never get in among its own."""

    repo: str
    commit: str
    files: dict[str, RemoteFile]

    @classmethod
    def look(cls, repo: str, revision: str | None = None) -> "Remote":
        """Ask the hub. Raises CheckpointError, one line, for what it does not have or give."""
        from huggingface_hub import HfApi

        with explained(repo, revision):
            info = HfApi().model_info(
                repo, revision=revision, files_metadata=True, timeout=network.TIMEOUT
            )
            return cls.of(repo, info)

    @classmethod
    def of(cls, repo: str, info: "ModelInfo") -> "Remote":
        """What the hub has answered. Raises CheckpointError where that names no commit."""
        files = {}
        for sibling in info.siblings or []:
            name, lfs = sibling.rfilename, sibling.lfs
            size = sibling.size if lfs is None else lfs.size
            if type(name) is str and "/" not in name and type(size) is int and size >= 0:
                found = sibling.blob_id if lfs is None else lfs.sha256
                files[name] = RemoteFile(name, size, found if is_hash(found) else None)
        if not is_hash(info.sha):  # it becomes part of paths
            raise CheckpointError(f"{repo}: the hub names no commit; is HF_ENDPOINT a mirror?")
        return cls(repo, str(info.sha), files)

    def cached(self, name: str) -> Path | None:
        """The file as the hub's cache has it, if it does."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repo, name, revision=self.commit)
        path = Path(found) if isinstance(found, str) else None
        return path if path and path.stat().st_size == self.files[name].nbytes else None

    def keep(self, name: str, path: Path) -> None:
        """Move a whole file into the hub's cache, where every tool that reads it finds it."""
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        file = self.files[name]
        where = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=self.repo, repo_type="model"))
        blob = where / "blobs" / str(file.hash or self.commit + name)
        link, ref = where / "snapshots" / self.commit / name, where / "refs" / "main"
        for made in (blob, link, ref):
            made.parent.mkdir(parents=True, exist_ok=True)
        if not blob.exists():
            shutil.move(path, blob)
        link.unlink(missing_ok=True)
        link.symlink_to(Path("../../blobs") / blob.name)
        if not ref.exists():
            ref.write_text(self.commit)

    def small(self, name: str, here: Path | None = None) -> bytes:
        """The whole of a small file, as the hub's hash says: from the network, if it is neither in
        the hub's cache nor at `here`. Raises CheckpointError."""
        file = self.files[name]
        if file.nbytes > _MOST_SMALL:
            raise CheckpointError(f"{self.repo}: {name} has {file.nbytes} bytes, too many")
        for path in (here, self.cached(name)):
            if path is not None and path.is_file() and path.stat().st_size == file.nbytes:
                data = path.read_bytes()
                if file.is_hash_of(data):
                    return data
        data = b"".join(self.stream(name))
        if not file.is_hash_of(data):
            raise CheckpointError(f"{self.repo}: {name} came damaged: its hash is not the hub's")
        return data

    def header(self, name: str) -> dict[str, TensorInfo]:
        """The tensors of a safetensors file, of which no more is read. Raises CheckpointError."""
        where, size = Path(self.repo) / name, self.files[name].nbytes
        data = self._first(name, _FIRST)
        if len(data) < 8:
            raise CheckpointError(f"{where} is truncated: {size} bytes, no header")
        (length,) = struct.unpack("<Q", data[:8])
        if length > min(size - 8, json_file.MAX_BYTES):
            raise CheckpointError(f"{where} is not safetensors: its header claims {length} bytes")
        if 8 + length > len(data):
            data = self._first(name, 8 + length)
        return parse_header(where, data[8 : 8 + length], size)[0]

    def _first(self, name: str, count: int) -> bytes:
        """The first `count` bytes of a file, or all of a smaller one."""
        found, count = b"", min(count, self.files[name].nbytes)
        with closing(self.stream(name, stop=count)) as pieces:
            for piece in pieces:
                found += piece
                if len(found) >= count:  # a server without ranges would go on
                    break
        return found[:count]

    def stream(
        self, name: str, start: int = 0, stop: int | None = None
    ) -> Generator[bytes, None, None]:
        """The bytes of a file from `start` on, as they come, to its end or to `stop`.

        What a server that knows no ranges sends before `start` is passed over. Raises
        UnreachableError where the connection breaks off, is silent for 30 s or the server is
        out of order, CheckpointError where the answer is not this file.
        """
        from huggingface_hub import get_session

        file = self.files[name]
        end = file.nbytes if stop is None else stop
        if start >= end:
            return
        url, headers = self._request(name)
        headers |= {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        with explained(self.repo, self.commit):
            asked = get_session().stream(
                "GET", url, headers=headers, follow_redirects=True, timeout=network.TIMEOUT
            )
            with asked as answer:
                skip = network.skipped(answer, f"{self.repo}/{name}", start, file.nbytes)
                at = start - skip
                for piece in answer.iter_raw():
                    new = piece[max(0, start - at) :]
                    at += len(piece)
                    if new:
                        yield new
                    if at >= end:
                        break
        if at < end:
            raise BusyError(f"{self.repo}/{name} broke off after {at} of {end} bytes")

    def _request(self, name: str) -> tuple[str, dict[str, str]]:
        """The address of a file, and what is sent with a request for it."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        return hf_hub_url(self.repo, name, revision=self.commit), dict(build_hf_headers())


def is_hash(text: object) -> bool:
    """Whether it is a SHA-1 or SHA-256 as the hub writes them."""
    return isinstance(text, str) and _HASH.fullmatch(text) is not None
