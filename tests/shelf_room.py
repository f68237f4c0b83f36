"""A hub with the 7B's stand-in, and a shelf of the test's own."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_checkpoint
from hub_stand_in import REPO, Hub, serving
from tiny import tiny_config, tiny_weights

from convert import arriving
from mlx_cerebrum.weights import fetching, network

OPENSSL = shutil.which("openssl") is not None


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 tiny blocks in three files, 2.5 MB."""
    dtype: Any = np.float16
    config = tiny_config(vocab_size=260, torch_dtype="float16")
    weights = {k: v.astype(dtype) for k, v in tiny_weights(config, seed=3).items()}
    directory = tmp_path_factory.mktemp("hub") / "repo"
    return write_checkpoint(directory, config, weights, shards=3)


def into_cache(hub: Hub, where: Path) -> Path:
    """Put the hub's repository into its cache's folder, as its own client does; the snapshot."""
    snapshot = where / "snapshots" / hub.commit
    for folder in (where / "blobs", snapshot, where / "refs"):
        folder.mkdir(parents=True)
    (where / "refs" / "main").write_text(hub.commit)
    for file in hub.files(hub.directory):
        if file.suffix != ".bin":
            sha256, git = hub.hashes(file)
            blob = where / "blobs" / (sha256 if file.suffix == ".safetensors" else git)
            shutil.copyfile(file, blob)
            (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


@pytest.fixture
def hub(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    copy = tmp_path / "repo"
    shutil.copytree(repository, copy)
    (copy / "pytorch_model.bin").write_bytes(b"never asked for")
    monkeypatch.setenv("MLX_CEREBRUM_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetching, "_WAITS", (0.01, 0.01, 0.01))
    monkeypatch.setattr(network, "_WAITS", (0.01, 0.01, 0.01))
    monkeypatch.setattr(arriving, "_LOOK", 0.02)
    with serving(copy, REPO) as hub:
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", hub.address + template
        )
        monkeypatch.setattr(
            "huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE",
            hub.address + template,
            raising=False,
        )
        yield hub
