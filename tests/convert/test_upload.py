"""Uploading, against a loopback stand-in for the hub's API; never a real network."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeCheckpoint
from huggingface_hub import ModelCard, constants

from convert.__main__ import main as convert
from convert.upload import check_uploadable, upload
from mlx_cerebrum import __version__
from mlx_cerebrum.errors import CerebrumError, CheckpointError, ConfigError

# huggingface_hub's own, in the way it uploads without hf_xet.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TOKEN = "hf_standin"
REPO = "someone/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class StandIn(ThreadingHTTPServer):
    """As much of the hub as uploading asks for, in memory."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, Any] = {}
        self.stored: dict[str, bytes] = {}  # large files, by SHA-256
        self.summaries: list[str] = []
        self.paths: list[str] = []
        self.role = "write"
        self.member = "write"
        self.everything_regular = False
        self.refuse: dict[str, int] = {}  # a pattern of "METHOD path" -> the status it gets

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self.route("GET")

    def do_POST(self) -> None:
        self.route("POST")

    def do_PUT(self) -> None:
        self.route("PUT")

    def route(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        what = f"{method} {self.path.partition('?')[0]}"
        self.server.paths.append(what)
        for pattern, status in self.server.refuse.items():
            if re.search(pattern, what):
                return self.send(status, {"error": "no"})
        if not what.startswith("PUT /store/") and (
            self.headers.get("Authorization") != f"Bearer {TOKEN}"
        ):
            return self.send(401, {"error": "Invalid user token"})
        routes: dict[str, Callable[..., None]] = {
            "GET /api/whoami-v2": self.whoami,
            "POST /api/repos/create": self.create,
            "POST /api/validate-yaml": self.validate,
            "GET /api/models/([^/]+/[^/]+)(?:/revision/main)?": self.info,
            "POST /api/models/(.+)/preupload/main": self.preupload,
            "POST /(.+)\\.git/info/lfs/objects/batch": self.batch,
            "PUT /store/(.+)": self.store,
            "POST /api/models/(.+)/commit/main": self.commit,
        }
        for pattern, answer in routes.items():
            if found := re.fullmatch(pattern, what):
                return answer(body, *found.groups())
        return self.send(404, {"error": what})

    def send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for key, text in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(key, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def whoami(self, _: bytes) -> None:
        org = {"name": "team", "roleInOrg": self.server.member}
        auth = {"accessToken": {"role": self.server.role}}
        self.send(200, {"type": "user", "name": "someone", "orgs": [org], "auth": auth})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}"
        existed = repo in self.server.repos
        self.server.repos.setdefault(repo, {})
        if not existed:
            self.server.private[repo] = asked.get("visibility", asked.get("private"))
        self.send(409 if existed else 200, {"url": f"{self.server.address}/{repo}"})

    def validate(self, body: bytes) -> None:
        ModelCard(json.loads(body)["content"])
        self.send(200, {"errors": [], "warnings": []})

    def info(self, _: bytes, repo: str) -> None:
        if repo not in self.server.repos:
            return self.send(404, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})
        siblings = [{"rfilename": name} for name in self.server.repos[repo]]
        return self.send(200, {"id": repo, "sha": COMMIT, "siblings": siblings})

    def preupload(self, body: bytes, repo: str) -> None:
        assert repo in self.server.repos

        def mode(path: str) -> str:
            large = path.endswith(".safetensors") and not self.server.everything_regular
            return "lfs" if large else "regular"

        paths = [entry["path"] for entry in json.loads(body)["files"]]
        files = [{"path": p, "uploadMode": mode(p), "shouldIgnore": False} for p in paths]
        self.send(200, {"files": files})

    def batch(self, body: bytes, _: str) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            if wanted["oid"] not in self.server.stored:
                href = f"{self.server.address}/store/{wanted['oid']}"
                wanted["actions"] = {"upload": {"href": href}}
            objects.append(wanted)
        self.send(200, {"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.stored[oid] = body
        self.send(200, {})

    def commit(self, body: bytes, repo: str) -> None:
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                self.server.summaries.append(value["summary"])
            elif item["key"] == "file":
                self.server.repos[repo][value["path"]] = base64.b64decode(value["content"])
            else:
                assert item["key"] == "lfsFile"
                self.server.repos[repo][value["path"]] = self.server.stored[value["oid"]]
        url = f"{self.server.address}/{repo}/commit/{COMMIT}"
        self.send(200, {"commitUrl": url, "commitOid": COMMIT, "pullRequestUrl": None})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def directory(checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A converted directory, with things in it that are not its own."""
    out = tmp_path / "out"
    assert convert(["--hf-path", str(checkpoint()), "--mlx-path", str(out), "--quiet"]) == 0
    (out / ".cache").mkdir()
    (out / ".cache" / "note").write_text("x")
    (out / ".DS_Store").write_text("x")
    (out / "sub").mkdir()
    (out / "sub" / "config.json").write_text("not this one")
    (out / "[a]*.txt").write_text("a name that looks like a pattern")
    return out


def own(directory: Path) -> dict[str, bytes]:
    files = (f for f in directory.iterdir() if f.is_file() and not f.name.startswith("."))
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.parametrize("xet", [False, True])
def test_upload(hub: StandIn, directory: Path, monkeypatch: pytest.MonkeyPatch, xet: bool) -> None:
    if xet:  # huggingface_hub's other way of uploading; the stand-in has no store for it
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False, raising=False)
        hub.everything_regular = True
    before = own(directory)
    check_uploadable(REPO)
    assert hub.repos == {}  # asking makes nothing
    assert upload(directory, REPO, quiet=True) == f"{hub.address}/{REPO}"
    assert hub.repos == {REPO: before}
    assert hub.summaries == [f"Upload with mlx-cerebrum {__version__}"]
    assert hub.private == {REPO: None}
    assert own(directory) == before
    assert sorted(p.name for p in directory.iterdir() if p.is_dir()) == [".cache", "sub"]
    assert sorted(p.name for p in (directory / ".cache").iterdir()) == ["note"]


def test_a_private_repository_and_an_organization(hub: StandIn, directory: Path) -> None:
    check_uploadable("team/tiny")
    upload(directory, "team/tiny", private=True, quiet=True)
    assert hub.private["team/tiny"] in (True, "private")
    assert hub.repos["team/tiny"] == own(directory)


def test_what_a_broken_upload_left_is_not_sent_again(hub: StandIn, directory: Path) -> None:
    hub.refuse["POST .*/commit/"] = 413
    with pytest.raises(CheckpointError, match=r"answered 413.*is whole, .*hf upload"):
        upload(directory, REPO, quiet=True)
    sent = [path for path in hub.paths if path.startswith("PUT")]
    assert len(sent) == 1
    hub.refuse.clear()
    upload(directory, REPO, quiet=True)
    assert [path for path in hub.paths if path.startswith("PUT")] == sent
    assert hub.repos[REPO] == own(directory)


def test_a_repository_with_weights_is_left_alone(hub: StandIn) -> None:
    hub.repos[REPO] = {"README.md": b""}
    check_uploadable(REPO)
    hub.repos[REPO]["model-00001-of-00007.safetensors"] = b"old"
    with pytest.raises(CheckpointError, match=r"holds model-00001-of-00007\.safetensors already"):
        check_uploadable(REPO)


@pytest.mark.parametrize(
    "repo",
    ["", "tiny", "a/b/c", "a b/c", "../x", "someone/", "/x", "-a/b", "a/b\nc", "someone/a--b",
     "someone/x.git", "someone/" + "x" * 100],
)  # fmt: skip
def test_ids_that_are_none(hub: StandIn, repo: str) -> None:
    with pytest.raises(ConfigError, match="a hub id is like owner/name") as caught:
        check_uploadable(repo)
    assert "\n" not in str(caught.value)
    assert not any(path.startswith("POST") for path in hub.paths)


def refusal(action: Callable[[], Any]) -> str:
    with pytest.raises(CerebrumError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text
    assert TOKEN not in text
    return text


def test_no_token(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login`, or set HF_TOKEN" in refusal(lambda: check_uploadable(REPO))
    assert hub.paths == []


def test_a_token_that_is_refused(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "the hub refused the token" in refusal(lambda: check_uploadable(REPO))


def test_a_token_that_can_only_read(hub: StandIn) -> None:
    hub.role = "read"
    assert "the token can only read" in refusal(lambda: check_uploadable(REPO))


def test_someone_elses_repository(hub: StandIn) -> None:
    assert "name a repository like someone/tiny" in refusal(lambda: check_uploadable("other/tiny"))
    hub.member = "read"
    assert "someone's, who can't write to team/tiny" in refusal(
        lambda: check_uploadable("team/tiny")
    )


def test_a_fine_grained_token_without_write_access(hub: StandIn, directory: Path) -> None:
    hub.role = "fineGrained"
    check_uploadable(REPO)
    hub.refuse["POST /api/repos/create"] = 403
    said = refusal(lambda: upload(directory, REPO, quiet=True))
    assert "the token may not write there" in said
    assert f"hf upload {REPO} {directory}" in said


def test_a_large_file_that_is_refused(hub: StandIn, directory: Path) -> None:
    hub.refuse["PUT /store/"] = 403
    assert "may not write there" in refusal(lambda: upload(directory, REPO, quiet=True))
    assert hub.repos == {REPO: {}}


def test_a_hub_that_cannot_be_reached(
    hub: StandIn, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "can't be reached" in refusal(lambda: check_uploadable(REPO))
    assert "is whole, upload it" in refusal(lambda: upload(directory, REPO, quiet=True))


def test_a_hub_that_answers_nonsense(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.refuse["GET /api/whoami-v2"] = 500
    assert "the hub answered 500" in refusal(lambda: check_uploadable(REPO))


def test_only_a_directory_is_uploaded(hub: StandIn, tmp_path: Path) -> None:
    assert "is not a directory" in refusal(lambda: upload(tmp_path / "none", REPO))
    assert hub.paths == []
