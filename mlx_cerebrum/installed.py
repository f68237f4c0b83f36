"""How this copy was installed, and so which command mends it.

A hint is of use where it can be typed as it stands: `pip` reaches neither into an environment of
`uv tool` nor into one of pipx, and this package is on no index that a bare name would find.
"""

import importlib.util
import json
import platform
import re
import shlex
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

PACKAGE = "mlx-cerebrum"
_ROOT = Path(__file__).parents[1]
_OWN = ("mlx_cerebrum", "convert", "bench", "tests")
_EXTRA = "cpu"
_LEAST_MACOS = 14  # of MLX's wheels


def unfit() -> str | None:
    """Why MLX can't run here, whatever is installed, in one line; None where it can."""
    if sys.platform != "darwin":
        return None
    if platform.machine() != "arm64":  # also where Rosetta translates
        return (
            f"{sys.executable} is a Python for Intel Macs: MLX needs one for Apple silicon (arm64),"
            " on an M1 or later, such as Homebrew's in /opt/homebrew, uv's or python.org's"
        )
    version = platform.mac_ver()[0]
    if version.partition(".")[0].isdigit() and int(version.partition(".")[0]) < _LEAST_MACOS:
        return f"MLX needs macOS {_LEAST_MACOS} or later, and this is {version}: update macOS"
    return None


def remedy(error: ImportError) -> str | None:
    """One line for an import that failed because something is not installed; else None, for a
    fault of the program's own."""
    name = error.name or ""
    # The dynamic loader calls the module by its last name.
    if sys.platform == "linux" and Path(error.path or "").match("mlx/core.*"):
        what = "MLX has no backend here" if "libmlx" in str(error) else f"MLX fails ({error})"
        return (
            f"{what}: install the extra [cpu], or [cuda] for an NVIDIA GPU:"
            f" {install_command(_EXTRA, f'mlx[{_EXTRA}]')}"
        )
    if not name or name.split(".")[0] in _OWN:
        return None
    if (line := unfit()) is not None:
        return line
    if not isinstance(error, ModuleNotFoundError):
        return None
    missing = f"{name.split('.')[0]} is not installed in {sys.executable}"
    if (extra := _extra(name.split(".")[0])) is not None:
        return f"{missing}: {install_command(extra, name.split('.')[0])}"
    if not (_ROOT / "Makefile").exists():
        extra = _EXTRA if sys.platform == "linux" else None
        return f"{missing}: {install_command(extra, name.split('.')[0])}"
    activate = _ROOT / ".venv" / "bin" / "activate"
    if activate.exists() and Path(sys.prefix).resolve() != activate.parents[1].resolve():
        return f"{missing}; first: source {shlex.quote(str(activate))}"
    return f"{missing}; `make -C {shlex.quote(str(_ROOT))} demo` installs what is needed"


def install_command(extra: str | None, otherwise: str) -> str:
    """The command that installs this copy again, with an extra of it, the way it was.

    otherwise: what is installed where no installer has noted where this package came from.
    """
    wanted = PACKAGE if extra is None else f"{PACKAGE}[{extra}]"
    origin, editable = _origin()
    if origin is not None and editable:
        what = shlex.quote(origin if extra is None else f"{origin}[{extra}]")
    elif origin is not None:
        what = shlex.quote(f"{wanted} @ {origin}")
    else:
        what = shlex.quote(otherwise)
    if (Path(sys.prefix) / "uv-receipt.toml").exists():
        return f"uv tool install --force {'--editable ' if editable else ''}{what}"
    if (Path(sys.prefix) / "pipx_metadata.json").exists():
        return f"pipx install --force {'--editable ' if editable else ''}{what}"
    python = shlex.quote(sys.executable)
    pip = f"{python} -m pip install"
    if importlib.util.find_spec("pip") is None:  # an environment of `uv venv`
        pip = f"uv pip install --python {python}"
    return f"{pip} {'-e ' if editable else ''}{what}"


def _extra(module: str) -> str | None:
    """The first extra of this package that brings a module; None if the package itself does."""
    from importlib import metadata  # 0.05 s

    project = re.escape(module.replace("_", "-"))
    line = re.compile(rf"{project}(?![\w.-])(?:.*\bextra == ['\"]([\w-]+))?", re.IGNORECASE)
    try:
        wanted = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return None
    extras = [found[1] for one in wanted if (found := line.match(one))]
    return None if None in extras else next(iter(extras), None)


def program(name: str) -> str:
    """A command that a dependency brings, as it can be typed: `uv tool` and pipx put only this
    package's own on the path."""
    beside = Path(sys.executable).parent / name
    return name if shutil.which(name) or not beside.exists() else shlex.quote(str(beside))


def _origin() -> tuple[str | None, bool]:
    """Where the installer took this package from, and whether it runs from there: a folder where
    it does, else what stands behind the @ of a requirement. PEP 610 says how it is noted."""
    from importlib import metadata  # 0.05 s

    try:
        noted = json.loads(metadata.distribution(PACKAGE).read_text("direct_url.json") or "")
        url = noted["url"]
        if noted.get("dir_info", {}).get("editable"):
            return unquote(urlsplit(url).path), True
        if (vcs := noted.get("vcs_info")) is not None:
            return f"{vcs['vcs']}+{url}@{vcs['commit_id']}", False
        return url, False
    except (metadata.PackageNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None, False
