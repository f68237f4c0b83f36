"""A hub repository that is to be converted: its state, small files and headers, but no weights."""

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.files import json_file
from mlx_cerebrum.shelf.entries import STATE
from mlx_cerebrum.text import tell
from mlx_cerebrum.tokenizer.files import FILES
from mlx_cerebrum.weights import cached
from mlx_cerebrum.weights.hub import only_gguf
from mlx_cerebrum.weights.network import UnreachableError, patiently
from mlx_cerebrum.weights.remote import Remote
from mlx_cerebrum.weights.safetensors_checkpoint import INDEX, SafetensorsCheckpoint

_WEIGHTS = ".safetensors"


def begun_with(work: Path) -> dict[str, Any]:
    """What a stopped run wrote of itself; empty where there is none."""
    with suppress(CheckpointError):
        return json_file.read_object(work / STATE, CheckpointError)
    return {}


def look(name: str, repo: str, revision: str | None, begun: dict[str, Any]) -> Remote:
    """The repository, as it was when a stopped run, which made `name` of it, began with it.

    Raises CheckpointError where that is not to be had any more.
    """
    remote = cached.look(repo, revision)
    known, commit = begun.get("files"), begun.get("commit")
    if not isinstance(known, dict) or not isinstance(commit, str) or commit == remote.commit:
        return remote
    now = {file.name: file.hash for file in remote.files.values()}
    changed = [n for n in known if n in (*FILES, INDEX, "config.json") or n.endswith(_WEIGHTS)]
    changed = [name for name in changed if now.get(name) != known[name]]
    if not changed:
        return remote
    some = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
    anew = f"to begin anew: mlx-cerebrum rm {name}, then pull it again"
    try:
        before = cached.look(repo, commit)
    except UnreachableError:
        raise
    except CheckpointError:
        raise CheckpointError(
            f"{repo} has changed on the hub since this began ({some}), and what it was is"
            f" gone; {anew}"
        ) from None
    tell(
        f"note: {repo} has changed on the hub since this began ({some}); this goes on with"
        f" what it was, {commit[:7]}; {anew}"
    )
    return before


def headers(remote: Remote, work: Path) -> SafetensorsCheckpoint:
    """The checkpoint as its small files and the headers of the others say.

    Raises CheckpointError or ConfigError for one that can't be converted.
    """
    directory = work / remote.repo.partition("/")[2]
    directory.mkdir(parents=True, exist_ok=True)
    if "config.json" not in remote.files:
        raise CheckpointError(_no_model(remote.repo, list(remote.files)))
    for name in ("config.json", "adapter_config.json", INDEX, "README.md", *FILES):
        if name in remote.files:
            data = patiently(partial(remote.small, name, directory / name))
            (directory / name).write_bytes(data)
        else:  # of an earlier commit
            (directory / name).unlink(missing_ok=True)
    if (directory / INDEX).exists():
        weight_map = json_file.read_object(directory / INDEX, CheckpointError).get("weight_map")
        named = weight_map.values() if isinstance(weight_map, dict) else ()
        names = {name for name in named if isinstance(name, str)}
    else:
        names = {name for name in remote.files if name.endswith(_WEIGHTS)}
        names = {"model.safetensors"} & names or names
    if not names:
        raise CheckpointError(_no_model(remote.repo, list(remote.files)))
    if missing := [n for n in names if n not in remote.files or not n.endswith(_WEIGHTS)]:
        raise CheckpointError(
            f"{remote.repo}: {INDEX} lists {missing[0]!s:.80}, which is not there"
        )
    asked = not isinstance(remote, cached.CachedRemote)
    if asked and (unknown := [name for name in names if remote.files[name].hash is None]):
        raise CheckpointError(f"{remote.repo}: the hub says no hash of {unknown[0]}, to compare it")
    found = {name: patiently(partial(remote.header, name)) for name in sorted(names)}
    checkpoint = SafetensorsCheckpoint.of_headers(directory, found)
    checkpoint.check()
    return checkpoint


def _no_model(repo: str, names: list[str]) -> str:
    if found := sorted(name for name in names if name.endswith(".gguf")):
        return f"{repo} {only_gguf(repo, found)}"
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        return f"{repo} has only pickled weights, which can run code; take one with safetensors"
    return f"{repo} is not a model: it has no config.json or no safetensors"
