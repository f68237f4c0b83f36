"""A repository as the hub's cache on this machine has it, for where the hub can't be asked.

The cache names the blob that a snapshot's link leads to by its hash, so that even then each file
can be compared with what the hub once said of it.
"""

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.files import json_file
from mlx_cerebrum.text import tell
from mlx_cerebrum.weights.network import UnreachableError, patiently
from mlx_cerebrum.weights.remote import Remote, RemoteFile, is_hash
from mlx_cerebrum.weights.safetensors_checkpoint import INDEX

_OFFLINE = "HF_HUB_OFFLINE is set; unset it, and run the same command again"
_VOCABULARIES = ("tokenizer.json", "tokenizer.model")


class _LackError(Exception):
    """What of a model the cache does not have."""


@dataclass(frozen=True)
class CachedRemote(Remote):
    """All its files are here: nothing is fetched."""

    def _first(self, name: str, count: int) -> bytes:
        with self._path(name).open("rb") as file:
            return file.read(count)

    def stream(
        self, name: str, start: int = 0, stop: int | None = None
    ) -> Generator[bytes, None, None]:
        """Asked for where what lies there is not what the hub has."""
        raise CheckpointError(
            f"{self._path(name)} is damaged: its hash is not the hub's. Remove it, and run the"
            " same command again with the network, to fetch it anew"
        )
        yield b""  # a generator, as what it stands in for

    def _path(self, name: str) -> Path:
        return _folder(self.repo) / "snapshots" / self.commit / name


def look(repo: str, revision: str | None = None) -> Remote:
    """As `Remote.look`; where the hub can't be asked, what its cache has, if that is whole.

    Raises CheckpointError.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        try:
            return _find(repo, revision)
        except _LackError as lack:
            raise CheckpointError(f"{repo}: {lack}, and {_OFFLINE}") from None
    try:
        return patiently(lambda: Remote.look(repo, revision))
    except UnreachableError as error:
        try:
            found = _find(repo, revision)
        except _LackError:
            raise error from None
        tell(f"note: {error}; {repo} is taken as the hub's cache has it ({found.commit[:7]})")
        return found


def _find(repo: str, revision: str | None) -> Remote:
    """The repository in the cache. Raises _LackError for what it does not have."""
    where = _folder(repo)
    commit, ref = revision, where / "refs" / (revision or "main")
    if not is_hash(commit):
        try:
            commit = ref.read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            commit = None
    snapshot = where / "snapshots" / str(commit)
    if not is_hash(commit) or not snapshot.is_dir():
        named = "" if revision is None else f" at {revision!r}"
        raise _LackError(f"it is not in the hub's cache{named}")
    files = {}
    for path in sorted(snapshot.iterdir()):
        if path.is_file():  # not a link to a blob that is gone
            blob = path.resolve().name if path.is_symlink() else None
            size = path.stat().st_size
            files[path.name] = RemoteFile(path.name, size, blob if is_hash(blob) else None)
    found = CachedRemote(repo, str(commit), files)
    if (lack := _lack(found)) is not None:
        raise _LackError(f"{lack} is not in the hub's cache")
    return found


def _lack(found: CachedRemote) -> str | None:
    """The first thing that a model needs and that is not among its files."""
    if "config.json" not in found.files:
        return "its config.json"
    if not any(name in found.files for name in _VOCABULARIES):
        return "its tokenizer"
    wanted: list[str] = []
    if INDEX in found.files:
        index = json_file.read_object(found._path(INDEX), CheckpointError).get("weight_map")
        wanted = sorted({str(name) for name in index.values()}) if isinstance(index, dict) else []
    elif not any(name.endswith(".safetensors") for name in found.files):
        return "any safetensors file of it"
    return next((f"its {name:.80}" for name in wanted if name not in found.files), None)


def _folder(repo: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"))
