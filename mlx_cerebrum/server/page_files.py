"""The chat page's files, as they are in the package."""

from collections.abc import Awaitable, Callable, Mapping
from hashlib import sha256
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parent / "page"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/vnd.microsoft.icon",
    ".webmanifest": "application/manifest+json",
    ".woff2": "font/woff2",
    ".txt": "text/plain; charset=utf-8",
}


def files(folder: Path = FOLDER) -> Mapping[str, Path]:
    """The paths to serve, and the file of each. Only what is there now, of known types."""
    found = {
        f"/{file.relative_to(folder).as_posix()}": file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.suffix in _TYPES
    }
    if "/index.html" in found:
        found["/"] = found.pop("/index.html")
    return found


def routes(found: Mapping[str, Path]) -> list[Route]:
    return [Route(path, _serve(file), methods=["GET"]) for path, file in found.items()]


def _serve(file: Path) -> Callable[[Request], Awaitable[Response]]:
    """One file, read when the server starts: a changed one is served after the next start."""
    data = file.read_bytes()
    headers = {
        "Content-Type": _TYPES[file.suffix],
        "Cache-Control": "no-cache",
        "ETag": f'"{sha256(data).hexdigest()[:16]}"',
    }

    async def endpoint(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(data, headers=headers)

    return endpoint
