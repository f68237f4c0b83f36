"""A stand-in of the Hugging Face hub on loopback: one repository, and what goes wrong with one."""

import hashlib
import json
import re
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

REPO = "AetherResearch/Cerebrum-1.0-7b"
SHARDS = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
_PIECE = 1 << 16


@dataclass
class Faults:
    """What goes wrong; changed while the server runs."""

    no_ranges: bool = False
    cut_after: int | None = None  # bytes of a body, then the connection breaks
    cuts: int = 1_000_000  # how often
    pace: float | None = None  # bytes a second
    portal: bool = False  # every answer is a web page
    portal_for: str = ""  # only for this file
    status: dict[str, int] = field(default_factory=dict)  # file, or "api" -> what is answered
    flip: dict[str, int] = field(default_factory=dict)  # file -> how often a byte of it is wrong
    wait: str | dict[str, str] = ""  # Retry-After of such an answer, or other headers
    answers: int = 1_000_000  # how often a status is answered
    resets: int = 0  # how often a body of a weight file ends in a reset
    longer: int = 0  # bytes by which a body's Content-Length is too large
    token: str = ""  # the only one that is known; a request may have none
    gated: bool = False  # nothing without that
    stall: float = 0.0  # seconds of silence before each body of a weight file
    stalls: int = 1_000_000  # how often
    no_lfs: bool = False  # git keeps the weights, as it does small ones
    no_hashes: bool = False
    once: str = ""  # what the repository was called before


class Hub(ThreadingHTTPServer):
    """Serves `directory` as `repo`. `sent`: bytes of bodies by file; `asked`: ranges by file."""

    daemon_threads = True

    def __init__(self, directory: Path, repo: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.directory, self.repo = directory, repo
        self.faults = Faults()
        self.sent: Counter[str] = Counter()
        self.proxied = 0  # requests that came as to a proxy
        self.asked: list[tuple[str, str | None]] = []
        self.past: dict[str, Path] = {}  # earlier commits, and what they hold
        self._hashes: dict[tuple[Path, int, int], tuple[str, str]] = {}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, perhaps killed, is nothing to print."""

    def wrap(self, pem: Path) -> None:
        """Speak TLS from now on, with the key and certificate of one file."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)
        self.socket = context.wrap_socket(
            self.socket, server_side=True, do_handshake_on_connect=False
        )

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def commit(self) -> str:
        """Made of the names and contents: another file, another commit."""
        text = "".join(f"{f.name}{self.hashes(f)[0]}" for f in self.files(self.directory))
        return hashlib.sha1(text.encode()).hexdigest()

    def at(self, revision: str | None) -> Path | None:
        """What a branch or commit holds, if there is one."""
        now = {None: self.directory, "main": self.directory, self.commit: self.directory}
        return (now | self.past).get(revision)

    @staticmethod
    def files(directory: Path) -> list[Path]:
        return sorted(path for path in directory.iterdir() if path.is_file())

    def hashes(self, path: Path) -> tuple[str, str]:
        """SHA-256 and git's."""
        stat = path.stat()
        key = path, stat.st_size, stat.st_mtime_ns
        if key not in self._hashes:
            sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % stat.st_size)
            with path.open("rb") as file:
                while piece := file.read(1 << 22):
                    sha256.update(piece)
                    git.update(piece)
            self._hashes[key] = sha256.hexdigest(), git.hexdigest()
        return self._hashes[key]


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        # What lies in the server's own buffer was sent to nobody.
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
        super().setup()

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        with suppress(ConnectionError):
            self._answer()

    def _answer(self) -> None:
        hub, faults = self.server, self.server.faults
        path = unquote(self.path.partition("?")[0])
        if path.startswith("http://"):  # it is taken for a proxy
            hub.proxied += 1
            path = "/" + path.split("/", 3)[3]
        name = path.rpartition("/")[2] if "/resolve/" in path else "api"
        if faults.portal or name == faults.portal_for:
            self._whole(200, b"<!DOCTYPE html><html>Welcome to the hotel</html>", "text/html")
        elif refused := self._refused():
            self._whole(401, b"", error=refused)
        elif name in faults.status and faults.answers > 0:
            faults.answers -= 1
            code = {401: "GatedRepo", 403: "GatedRepo", 404: "RepoNotFound"}
            status = faults.status[name]
            self._whole(status, b"", error=code.get(status, ""))
        elif faults.once and faults.once in path:
            self.send_response(307)
            self.send_header("Location", self.path.replace(faults.once, hub.repo))
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif found := re.fullmatch(rf"/api/models/{hub.repo}(?:/revision/(.+))?", path):
            self._info(found[1])
        elif found := re.fullmatch(rf"/{hub.repo}/resolve/(\w+)/([^/]+)", path):
            self._file(found[1], found[2])
        else:
            self._whole(404, b"", error="RepoNotFound")

    def _refused(self) -> str:
        """Why this token, or none, is refused; as the hub words it."""
        faults, given = self.server.faults, self.headers.get("Authorization", "")
        if faults.token and given and given != f"Bearer {faults.token}":
            return "Invalid credentials in Authorization header"
        return "GatedRepo" if faults.gated and not given else ""

    def _info(self, revision: str | None) -> None:
        hub, faults = self.server, self.server.faults
        if (directory := hub.at(revision)) is None:
            self._whole(404, b"", error="RevisionNotFound")
            return
        siblings = []
        for file in hub.files(directory):
            sha256, git = hub.hashes(file)
            entry: dict[str, Any] = {"rfilename": file.name, "size": file.stat().st_size}
            if not faults.no_hashes:
                entry["blobId"] = git
            if file.suffix == ".safetensors" and "blobId" in entry and not faults.no_lfs:
                entry["lfs"] = {"sha256": sha256, "size": entry["size"], "pointerSize": 134}
            siblings.append(entry)
        commit = revision if revision in hub.past else hub.commit
        info = {"id": hub.repo, "sha": commit, "siblings": siblings}
        self._whole(200, json.dumps(info).encode(), "application/json")

    def _file(self, commit: str, name: str) -> None:
        hub, faults = self.server, self.server.faults
        directory, asked = hub.at(commit), self.headers.get("Range")
        hub.asked.append((name, asked))
        path = hub.directory if directory is None else directory / name
        if not path.is_file():
            self._whole(404, b"", error="EntryNotFound")
            return
        size = path.stat().st_size
        start, stop, status = 0, size, 200
        if asked and not faults.no_ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop, status = int(first), min(size, int(last or size) + 1), 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        weights = path.suffix == ".safetensors" and stop == size
        longer = faults.longer if weights else 0
        self.send_header("Content-Length", str(stop - start + longer))
        if longer:
            self.close_connection = True
        self.end_headers()
        if weights and faults.stalls > 0:
            faults.stalls -= 1
            time.sleep(faults.stall)
        if weights and faults.resets > 0:
            faults.resets -= 1
            self._body(path, start, start + (stop - start) // 2)
            # Closed so, it is a reset (RST) that goes out, not an end.
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.request.close()
            self.close_connection = True
            raise ConnectionResetError
        self._body(path, start, stop)

    def _body(self, path: Path, start: int, stop: int) -> None:
        hub, faults, name = self.server, self.server.faults, path.name
        end, whole = stop, stop == path.stat().st_size
        if faults.cut_after is not None and faults.cuts > 0 and stop - start > faults.cut_after:
            end, faults.cuts = start + faults.cut_after, faults.cuts - 1
        flipped = whole and faults.flip.get(name, 0) > 0
        with path.open("rb") as file:
            file.seek(start)
            while start < end:
                piece = bytearray(file.read(min(_PIECE, end - start)))
                if flipped and start + len(piece) >= stop:
                    piece[-1] ^= 1
                    faults.flip[name] -= 1
                self.wfile.write(piece)
                start += len(piece)
                hub.sent[name] += len(piece)
                if faults.pace:
                    time.sleep(len(piece) / faults.pace)
        if end < stop:
            self.close_connection = True
            self.connection.shutdown(2)

    def _whole(self, status: int, data: bytes, kind: str = "text/plain", error: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", kind)
        if error:
            self.send_header("X-Error-Message" if " " in error else "X-Error-Code", error)
        if status >= 400 and (wait := self.server.faults.wait):
            for header, value in ({"Retry-After": wait} if isinstance(wait, str) else wait).items():
                self.send_header(header, value)
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(directory: Path, repo: str) -> Iterator[Hub]:
    hub = Hub(directory, repo)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
