"""`--upload-repo`: a finished directory to the Hugging Face hub.

`upload_folder` is taken rather than `upload_large_folder`: it leaves nothing in the directory,
today's huggingface_hub uploads in batches and goes on after a break through it, and what older
ones have uploaded of a broken attempt is not sent again.
"""

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from convert.card import REPO_ID
from mlx_cerebrum import __version__
from mlx_cerebrum.errors import CerebrumError, CheckpointError, ConfigError
from mlx_cerebrum.installed import program
from mlx_cerebrum.text import one_line

_READ_ONLY = "read"  # what the hub calls the role of such tokens and members


def check_uploadable(repo_id: str) -> None:
    """Ask the hub whether `upload` to `repo_id` can succeed, so that hours are not lost on it.

    Raises ConfigError for an id that is none, CheckpointError where there is no token, it may
    not write there, the repository holds weights already, or the hub can't be reached. A
    fine-grained token's scopes are only known to the hub: it may still refuse the upload.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    if not REPO_ID.fullmatch(repo_id):
        raise _not_an_id(repo_id)
    if get_token() is None:
        raise CheckpointError(f"uploading to {repo_id} needs a token: {_log_in()}")
    with _explained(repo_id):
        api = HfApi()
        _require_writable(repo_id, api.whoami())
        try:
            siblings = api.model_info(repo_id).siblings or []
        except RepositoryNotFoundError:
            return  # it is made when the time comes
        except HFValidationError:  # too long, `--`, a name that ends in .git
            raise _not_an_id(repo_id) from None
        weights = sorted(s.rfilename for s in siblings if s.rfilename.endswith(".safetensors"))
    if weights:
        # Shards under other names would stay, and mlx-lm would load them with the new ones.
        raise CheckpointError(
            f"{repo_id} holds {weights[0]} already; name a new repository, or delete its weights"
            " first"
        )


def upload(directory: Path, repo_id: str, *, private: bool = False, quiet: bool = False) -> str:
    """Upload the files of `directory` to the hub's model repository, made if need be.

    private: make a new repository private (one that exists stays as it is).
    quiet: no progress bars.
    Only its own files: no subdirectories, nothing hidden. Returns the repository's address.
    Raises CheckpointError; the directory is then still whole and can be uploaded again.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory")
    files = [f.name for f in directory.iterdir() if f.is_file() and not f.name.startswith(".")]
    if quiet:
        disable_progress_bars()
    again = f"; {directory} is whole, upload it with: {program('hf')} upload {repo_id} {directory}"
    with _explained(repo_id, again):
        api = HfApi()
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            allow_patterns=[glob.escape(name) for name in sorted(files)],
            commit_message=f"Upload with mlx-cerebrum {__version__}",
        )
    return str(url)


def _log_in() -> str:
    return f"log in with `{program('hf')} auth login`, or set HF_TOKEN"


def _not_an_id(repo_id: str) -> ConfigError:
    return ConfigError(f"{one_line(repo_id)!r} can't be uploaded to: a hub id is like owner/name")


def _require_writable(repo_id: str, who: dict[str, Any]) -> None:
    """Raise CheckpointError unless the token's owner may write under the id's owner."""
    token = who.get("auth", {}).get("accessToken", {})
    if token.get("role") == _READ_ONLY:
        raise CheckpointError(
            f"the token can only read, and uploading to {repo_id} writes: make one with write"
            " access in the hub's settings"
        )
    owner = repo_id.partition("/")[0].lower()
    roles = {str(org.get("name")).lower(): org.get("roleInOrg") for org in who.get("orgs", ())}
    roles[str(who.get("name")).lower()] = "owner"
    if owner not in roles or roles[owner] == _READ_ONLY:
        raise CheckpointError(
            f"the token is {who.get('name')}'s, who can't write to {repo_id}: name a repository"
            f" like {who.get('name')}/{repo_id.partition('/')[2]}"
        )


@contextmanager
def _explained(repo_id: str, more: str = "") -> Iterator[None]:
    """Make whatever the hub's client raises one line.

    Which exceptions a lost connection gives depends on the client's version (requests, httpx,
    the uploader's own), so all of them are taken; `--debug` shows where they came from.
    """
    try:
        yield
    except CerebrumError:
        raise
    except Exception as error:
        raise CheckpointError(one_line(_explain(error, repo_id)) + more) from error


def _explain(error: BaseException, repo_id: str) -> str:
    chain = [error]  # an upload's thread wraps what the hub answered
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    answers = [getattr(cause, "response", None) for cause in chain]
    status = next((answer.status_code for answer in answers if answer is not None), None)
    cause = str(chain[-1]) or type(chain[-1]).__name__
    if status == 401:
        return f"{repo_id}: the hub refused the token; {_log_in()}"
    if status == 403:
        return f"{repo_id}: the token may not write there; make one with write access to it"
    if status == 404:
        return f"{repo_id} is not on the hub, or the token may not see it"
    if status is not None:
        return f"{repo_id}: the hub answered {status} ({cause})"
    return f"{repo_id}: the hub can't be reached, or broke off ({cause})"
