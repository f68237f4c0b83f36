"""Who may ask, and what every answer carries."""

import asyncio
import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_room import WAIT, FakeEngine, Running, chat, fake, serving, tokenizer_in
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.server import log, page_files
from mlx_cerebrum.server.__main__ import parser, settings_of
from mlx_cerebrum.server.listening import bind, url
from mlx_cerebrum.server.security import CONTENT_POLICY, Guard, Rules
from mlx_cerebrum.server.streaming import StreamResponse
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer

KEY = "a-key-of-ours"
RULES = Rules(public=lambda _: True)
PAGE = {"index.html": "<p>Hi", "app.js": "1", "sub/more.css": "p{}", "notes.py": "secret"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_in(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    (folder / "sub").mkdir()
    for name, text in PAGE.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer, page: Path) -> Iterator[Running]:
    engine = FakeEngine(tokenizer)
    with serving(
        engine,
        tokenizer,
        page=page,
        allowed_hosts={"Mac.local"},
        cors_origins={"https://example.org"},
    ) as running:
        yield running


@pytest.fixture(scope="module")
def locked(tokenizer: Tokenizer, page: Path) -> Iterator[Running]:
    with serving(FakeEngine(tokenizer), tokenizer, page=page, api_key=KEY) as running:
        yield running


def code(answer: Any) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def with_hosts(server: Running, *hosts: str) -> int:
    """The status of a request with exactly these Host headers."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT)
    connection.putrequest("GET", "/health", skip_host=True)
    for host in hosts:
        connection.putheader("Host", host)
    connection.endheaders()
    status = connection.getresponse().status
    connection.close()
    return status


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:9", "127.0.0.1", "127.0.0.1:80", "127.1.2.3", "[::1]:80", "mac.local"],
)
def test_hosts_that_are_ours(server: Running, host: str) -> None:
    assert with_hosts(server, host) == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "evil.example:8080",
        "10.0.0.1",
        "0.0.0.0",
        "127.0.0.1.evil.example",
        "user@localhost",
        "localhost:x",
        "[::1",
        "[::2]",
        "",
    ],
)
def test_hosts_that_are_not(server: Running, host: str) -> None:
    assert with_hosts(server, host) == 403


@pytest.mark.parametrize(
    ("host", "address", "status"),
    [
        ("10.0.0.5:8080", "10.0.0.5", 204),
        ("10.0.0.6:8080", "10.0.0.5", 403),
        ("evil.example", "10.0.0.5", 403),
        ("10.0.0.5:8080", "::ffff:10.0.0.5", 204),  # a socket for IPv6 that takes IPv4 too
        ("10.0.0.6:8080", "::ffff:10.0.0.5", 403),
        ("[fd00:0::A]:8080", "fd00::a", 204),
        ("[fd00::b]:8080", "fd00::a", 403),
    ],
)
def test_the_address_that_was_connected_to(host: str, address: str, status: int) -> None:
    """With --host 0.0.0.0 the machine has many; the one in use is known for each connection."""
    transport = httpx.ASGITransport(_connected(Guard(Response(status_code=204), RULES), address))

    async def get() -> int:
        async with httpx.AsyncClient(transport=transport, base_url="http://10.0.0.5") as client:
            return (await client.get("/", headers={"Host": host})).status_code

    assert asyncio.run(get()) == status


def _connected(app: ASGIApp, address: str) -> ASGIApp:
    async def there(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "server": (address, 8080)}, receive, send)

    return there


def test_http_1_0_without_a_host(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), WAIT) as client:
        client.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 403 ")


def test_no_host_or_two(server: Running) -> None:
    assert with_hosts(server) == 400
    assert with_hosts(server, "localhost", "localhost") == 400


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "http://evil.example",
        "http://localhost:1",
        "https://example.org.evil.example",
        "http://example.org",
        "https://127.0.0.1",
    ],
)
def test_foreign_origins(server: Running, origin: str) -> None:
    answer = server.client.post("/v1/chat/completions", json=chat(), headers={"Origin": origin})
    assert code(answer) == (403, "origin_not_allowed")
    assert "access-control-allow-origin" not in answer.headers
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    answer = server.client.options("/v1/chat/completions", headers=asked)
    assert answer.status_code == 403


def test_the_page_s_own_origin(server: Running) -> None:
    headers = {"Origin": server.url, "Sec-Fetch-Site": "same-origin"}
    answer = server.client.post("/v1/chat/completions", json=chat(), headers=headers)
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


def test_an_origin_that_was_allowed(server: Running) -> None:
    origin = {"Origin": "https://example.org", "Sec-Fetch-Site": "cross-site"}
    asked = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    answer = server.client.options("/v1/chat/completions", headers=origin | asked)
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-origin"] == "https://example.org"
    assert answer.headers["access-control-allow-headers"] == "authorization,content-type"
    assert "POST" in answer.headers["access-control-allow-methods"]
    asked["Access-Control-Request-Headers"] = "a/b"
    answer = server.client.options("/v1/chat/completions", headers=origin | asked)
    assert "access-control-allow-headers" not in answer.headers
    answer = server.client.post("/v1/chat/completions", json=chat(), headers=origin)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://example.org"
    assert answer.headers["vary"] == "Origin"


def test_cors_is_off_by_default(locked: Running) -> None:
    asked = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    answer = locked.client.options("/v1/chat/completions", headers=asked)
    assert code(answer) == (403, "origin_not_allowed")


def test_cross_site_requests_without_an_origin(server: Running) -> None:
    cross = {"Sec-Fetch-Site": "cross-site"}
    assert server.client.get("/", headers=cross).status_code == 200  # a link to the page
    assert code(server.client.get("/v1/models", headers=cross)) == (403, "origin_not_allowed")
    answer = server.client.post("/v1/chat/completions", json=chat(), headers=cross)
    assert code(answer) == (403, "origin_not_allowed")


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
)
def test_bodies_are_json_by_their_type(server: Running, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    data = json.dumps(chat())
    answer = server.client.post("/v1/chat/completions", content=data, headers=headers)
    assert code(answer) == (415, "unsupported_media_type")


def test_json_with_a_charset(server: Running) -> None:
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    data = json.dumps(chat())
    answer = server.client.post("/v1/chat/completions", content=data, headers=headers)
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "given", [None, "Bearer", "Bearer x", f"Basic {KEY}", KEY, f"Bearer {KEY}x", "Bearer \xe9"]
)
def test_wrong_keys(locked: Running, given: str | None) -> None:
    headers = {} if given is None else {b"Authorization": given.encode("latin-1")}
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
        answer = locked.client.get(path, headers=headers)
        assert code(answer) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"


def test_the_right_key(locked: Running) -> None:
    for given in (f"Bearer {KEY}", f"bearer {KEY}"):
        assert locked.client.get("/metrics", headers={"Authorization": given}).status_code == 200
    headers = {"Authorization": f"Bearer {KEY}"}
    assert locked.client.post("/v1/completions", json={"prompt": "a"}, headers=headers).is_success
    owner = fake(locked).jobs[-1].owner
    assert owner
    assert KEY not in owner


def test_what_needs_no_key(locked: Running) -> None:
    for path in ("/", "/app.js", "/health"):
        assert locked.client.get(path).status_code == 200


def test_no_owner_without_a_key(server: Running) -> None:
    assert server.client.post("/v1/completions", json={"prompt": "a"}).is_success
    assert fake(server).jobs[-1].owner == ""


def test_headers_of_every_answer(server: Running) -> None:
    answers = [
        server.client.get("/"),
        server.client.get("/nothing"),
        server.client.get("/health", headers={"Host": "evil.example"}),
        server.client.post("/v1/chat/completions", json=chat(stream=True)),
    ]
    for answer in answers:
        assert answer.headers["content-security-policy"] == CONTENT_POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cross-origin-opener-policy"] == "same-origin"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert "server" not in answer.headers
    assert "unsafe" not in CONTENT_POLICY


def test_the_page_s_files(server: Running) -> None:
    for path, kind in (
        ("/", "text/html"),
        ("/app.js", "text/javascript"),
        ("/sub/more.css", "text/css"),
    ):
        answer = server.client.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        assert answer.headers["cache-control"] == "no-cache"
        known = {"If-None-Match": answer.headers["etag"]}
        assert server.client.get(path, headers=known).status_code == 304
    for path in ("/notes.py", "/index.html", "/../app.py", "/sub/..%2fnotes.py", "/sub", "/docs"):
        assert server.client.get(path).status_code == 404


def test_the_package_s_page_is_served_whole() -> None:
    served = set(page_files.files().values())
    assert page_files.files()["/"] == page_files.FOLDER / "index.html"
    assert served == {file for file in page_files.FOLDER.rglob("*") if file.is_file()}


def test_no_answer_has_a_path_of_the_machine(server: Running, page: Path) -> None:
    answers = [
        server.client.get("/nothing"),
        server.client.put("/v1/models"),
        server.client.get("/v1/models/none"),
        server.client.get("/openapi.json"),
        server.client.post("/v1/chat/completions", json={}),
        server.client.post("/v1/chat/completions", content=b"{"),
        server.client.post("/v1/chat/completions", json=chat(model="x")),
        server.client.post("/v1/chat/completions", json=chat(max_tokens=10**9)),
        server.client.post("/v1/chat/completions", json={"messages": [chat()["messages"][0]] * 2}),
        server.client.post("/v1/completions", json={"prompt": [10**6]}),
        server.client.get("/metrics"),
    ]
    for answer in answers:
        for part in (str(page), str(Path(__file__).parents[2]), "site-packages", "Traceback"):
            assert part not in answer.text


def test_a_fault_of_the_server_tells_nothing(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("at /some/secret/path")

    said: list[str] = []  # not by capsys: what is written while it is being read is lost
    monkeypatch.setattr(log, "_write", said.append)
    monkeypatch.setattr(server.service, "_answer", broken)
    answer = server.client.post("/v1/chat/completions", json=chat())
    assert code(answer) == (500, "internal_error")
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in answer.json()["error"]["message"]
    until = time.monotonic() + WAIT
    while not any("ZeroDivisionError" in line for line in said):  # written after the answer
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_fault_within_a_stream_ends_it(
    server: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def broken(*_: Any) -> None:
        raise ZeroDivisionError("at /some/secret/path")

    monkeypatch.setattr(StreamResponse, "_write", broken)
    with pytest.raises(Exception, match=r"closed|incomplete"):
        server.client.post("/v1/chat/completions", json=chat(stream=True))
    assert server.client.get("/health").status_code == 200
    assert 'status="499"' not in server.client.get("/metrics").text  # the client did not go


def asked(*flags: str, environment: dict[str, str] | None = None) -> Any:
    return settings_of(parser().parse_args(flags), environment or {})


def test_keys_of_flag_and_environment() -> None:
    kept = {"MLX_CEREBRUM_API_KEY": "from-there"}
    assert asked().api_key is None
    assert asked(environment={"MLX_CEREBRUM_API_KEY": ""}).api_key is None
    assert asked(environment=kept).api_key == "from-there"
    assert asked("--api-key", "other", environment=kept).api_key == "other"
    for key in ("", "two words", "t\u00e9", "a\nb"):
        with pytest.raises(RequestError, match="API key"):
            asked("--api-key", key)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--allowed-host", "http://x"), "allowed-host"),
        (("--cors-origin", "*"), "cors-origin"),
        (("--cors-origin", "null"), "cors-origin"),
        (("--cors-origin", "https://example.org/"), "cors-origin"),
        (("--batch", "0"), "batch"),
        (("--queue", "-1"), "queue"),
        (("--cache-gb", "-1"), "cache-gb"),
        (("--max-body-mb", "0"), "max-body-mb"),
        (("--grace", "-1"), "grace"),
        (("--max-tokens", "0"), "max-tokens"),
        (("--prefill-step-size", "0"), "prefill-step-size"),
        (("--temp", "-1"), "temp"),
        (("--top-p", "0"), "top-p"),
        (("--presence-penalty", "3"), "presence-penalty"),
        (("--min-tokens", "1025"), "min-tokens"),
    ],
)
def test_flags_that_cannot_be_honoured(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        asked(*flags)


@pytest.mark.parametrize(
    "origin", ["https://example.org:8443", "app://obsidian.md", "chrome-extension://abcdefgh"]
)
def test_origins_that_may_be_allowed(origin: str) -> None:
    assert asked("--cors-origin", origin).cors_origins == {origin}


@pytest.mark.parametrize("origin", ["null", "file://"])
def test_pages_without_a_site_need_a_key(origin: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match=f"cors-origin {origin} .*--api-key"):
        asked("--cors-origin", origin)
    allowed = asked("--cors-origin", origin, "--api-key", KEY)
    assert allowed.cors_origins == {origin}
    engine = FakeEngine(tokenizer)
    with serving(engine, tokenizer, cors_origins={origin}, api_key=KEY) as server:
        answer = server.client.get("/v1/models", headers={"Origin": origin})
        assert answer.status_code == 401
        headers = {"Origin": origin, "Authorization": f"Bearer {KEY}"}
        answer = server.client.get("/v1/models", headers=headers)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == origin


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_others_need_a_key(host: str) -> None:
    with pytest.raises(RequestError, match="API key"):
        bind(host, 0, False)


def test_a_key_opens_every_address(tokenizer: Tokenizer) -> None:
    with bind("0.0.0.0", 0, True) as listening:
        assert url(listening).startswith("http://127.0.0.1:")


@pytest.mark.parametrize(
    ("host", "port"), [("", 0), ("no.such.name.invalid", 0), ("127.0.0.1", 70000), ("x" * 300, 0)]
)
def test_no_such_address(host: str, port: int) -> None:
    with pytest.raises(RequestError):
        bind(host, port, True)


def test_a_port_that_is_taken() -> None:
    with bind("127.0.0.1", 0, False) as first:
        port = first.getsockname()[1]
        with pytest.raises(RequestError, match=f"port {port}: Address already in use"):
            bind("127.0.0.1", port, False)
