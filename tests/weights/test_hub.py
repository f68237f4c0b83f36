"""The hub, against local stand-ins: a cache on disk (offline) and a server on loopback."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import gguf_files
import pytest
from conftest import MakeCheckpoint, slow

from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.installed import program
from mlx_cerebrum.weights import hub

ROOT = Path(__file__).parents[2]
REPO = "owner/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def generate(env: dict[str, str], *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlx_cerebrum.generate", "--prompt", "Hi", "--raw", *flags]
    return subprocess.run(
        [*command, "--max-tokens", "3", "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("HF_")} | env,
    )


class StandIn(ThreadingHTTPServer):
    """As much of the hub's API as `snapshot_download` asks for, over one directory."""

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.directory = directory
        self.fetched: set[str] = set()


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        files = sorted(p.name for p in self.server.directory.iterdir())
        if path.startswith(f"/api/models/{REPO}/tree/"):
            entries = [
                {
                    "type": "file",
                    "path": f,
                    "size": (self.server.directory / f).stat().st_size,
                    "oid": COMMIT,
                }
                for f in files
            ]
            self.send(json.dumps(entries).encode(), body)
        elif path in (
            f"/api/models/{REPO}",
            *(f"/api/models/{REPO}/revision/{r}" for r in ("main", COMMIT)),
        ):
            info = {"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
            self.send(json.dumps(info).encode(), body)
        elif path.startswith(f"/{REPO}/resolve/") and path.rsplit("/", 1)[1] in files:
            name = path.rsplit("/", 1)[1]
            if body:
                self.server.fetched.add(name)
            self.send((self.server.directory / name).read_bytes(), body)
        else:
            self.send_response(404)
            known = path.startswith(f"/api/models/{REPO}/")
            self.send_header("X-Error-Code", "RevisionNotFound" if known else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def send(self, data: bytes, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def stand_in(checkpoint: MakeCheckpoint) -> Iterator[StandIn]:
    directory = checkpoint("repo", shards=2)
    for unwanted in ("pytorch_model.bin", "consolidated.safetensors", "training_args.bin", "x.py"):
        (directory / unwanted).write_bytes(b"unwanted")
    server = StandIn(directory)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@slow
def test_download_takes_only_what_is_needed_then_works_offline(
    stand_in: StandIn, tmp_path: Path
) -> None:
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{stand_in.server_port}", "HF_HOME": str(tmp_path)}
    done = generate(env, "--model", REPO)
    assert done.returncode == 0, done.stderr
    assert stand_in.fetched == {
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    again = generate(env | {"HF_HUB_OFFLINE": "1"}, "--model", REPO)
    assert again.returncode == 0, again.stderr
    answers = [json.loads(d.stdout)["token_ids"] for d in (done, again)]
    assert answers[0] == answers[1]
    assert json.loads(again.stdout)["model"] == REPO
    by_commit = generate(env | {"HF_HUB_OFFLINE": "1"}, "--model", REPO, "--revision", COMMIT)
    assert by_commit.returncode == 0, by_commit.stderr


@pytest.mark.parametrize("kind", ["quantized", "adapter"])
@slow
def test_what_can_not_run_is_refused_before_its_weights_are_fetched(
    stand_in: StandIn, tmp_path: Path, kind: str
) -> None:
    config = stand_in.directory / "config.json"
    if kind == "adapter":
        (stand_in.directory / "adapter_config.json").write_text("{}")
    else:
        said = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}
        config.write_text(json.dumps(json.loads(config.read_text()) | said))
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{stand_in.server_port}", "HF_HOME": str(tmp_path)}
    done = generate(env, "--model", REPO)
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]  # after the fetching's own
    assert line.startswith(f"error: {REPO}: it ")
    assert ("AWQ" if kind == "quantized" else "LoRA adapter") in line
    assert stand_in.fetched <= {"config.json", "adapter_config.json"}


@slow
def test_what_does_not_fit_is_refused_before_its_weights_are_fetched(
    stand_in: StandIn, tmp_path: Path
) -> None:
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{stand_in.server_port}", "HF_HOME": str(tmp_path)}
    done = generate(env, "--model", REPO, "--memory-limit", "0.0006")
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"error: loading {REPO} needs 0.7 MB and 0.6 MB are free; --q-bits 8 (")
    assert stand_in.fetched == {"config.json"}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--model", "owner/absent"), "is not on the hub"),
        (("--model", REPO, "--revision", "nowhere"), "no revision 'nowhere'"),
    ],
)
@slow
def test_what_the_hub_does_not_have(
    stand_in: StandIn, tmp_path: Path, flags: tuple[str, ...], says: str
) -> None:
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{stand_in.server_port}", "HF_HOME": str(tmp_path)}
    done = generate(env, *flags)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


@slow
def test_a_repository_of_gguf_files(stand_in: StandIn, tmp_path: Path) -> None:
    """The files there are, and how to get one; the one that was got is found in the cache."""
    for file in stand_in.directory.iterdir():
        file.unlink()
    for name in ("x-Q4_K_M.gguf", "x-Q8_0-00001-of-00002.gguf", "x-Q8_0-00002-of-00002.gguf"):
        gguf_files.write(stand_in.directory / name)
    (stand_in.directory / "README.md").write_text("GGUF files")
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{stand_in.server_port}", "HF_HOME": str(tmp_path)}
    done = generate(env, "--model", REPO)
    assert done.returncode == 2
    assert stand_in.fetched == {"README.md"}
    assert done.stderr.endswith(
        f"error: {REPO} has no safetensors but GGUF files (x-Q4_K_M.gguf,"
        f" x-Q8_0-00001-of-00002.gguf): fetch one with `{program('hf')} download {REPO}"
        " x-Q4_K_M.gguf` and name the file that it prints\n"
    )
    (snapshot,) = tmp_path.glob("hub/models--owner--tiny/snapshots/*")
    (snapshot / "x-Q4_K_M.gguf").symlink_to(stand_in.directory / "x-Q4_K_M.gguf")
    done = generate(env | {"HF_HUB_OFFLINE": "1"}, "--model", REPO)
    assert done.returncode == 0, done.stderr


@slow
def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = generate(env, "--model", REPO)
    assert done.returncode == 2
    assert "the model `demo`" in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_is_neither_path_nor_repository(tmp_path: Path) -> None:
    for name in ("nothing", "a/b/c", "../x/y", str(tmp_path / "nowhere")):
        with pytest.raises(CheckpointError, match="does not exist"):
            hub.resolve(name)
    assert hub.resolve(str(tmp_path)) == tmp_path
    with pytest.raises(CheckpointError, match="--revision"):
        hub.resolve(tmp_path, "main")
