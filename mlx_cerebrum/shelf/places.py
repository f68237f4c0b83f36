"""Where models are kept, and how a name becomes a folder there.

A model is called NAME, or NAME:8bit where it is there in several widths; NAME is a short name or
a hub id. Its folder is an ordinary checkpoint, `NAME-8bit`, the `/` of a hub id written `--`.
"""

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from mlx_cerebrum.errors import CheckpointError

VARIABLE = "MLX_CEREBRUM_MODELS"
BITS = (16, 8, 4)  # 16: as stored
SEVEN_B = "AetherResearch/Cerebrum-1.0-7b"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_VARIANT = re.compile(r"(.+?):(\d+)(?:-?bits?)?", re.ASCII)
_ADDRESS = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?:models/)?", re.ASCII)
_OTHER_BITS = re.compile(r"(.+?)[:@_-](?:q|Q|int|INT)?(4|8|16)(?:-?bits?|_[\w]+)?", re.ASCII)
_FOLDER = re.compile(r"(.+)-(\d+)bit", re.ASCII)


@dataclass(frozen=True)
class Recipe:
    """What a short name is made of."""

    repo: str  # on the hub
    plan: str  # a named plan


# Both are the 7B's blocks: who has one of them needs no download for the other.
SHORT = {
    "cerebrum-12.25b": Recipe(SEVEN_B, "cerebrum-12.25b"),
    "cerebrum-7b": Recipe(SEVEN_B, "cerebrum-7b"),
}
# Hub ids that a short name is made for: the merge is never fetched, it is the 7B's blocks.
_ALIASES = {SEVEN_B: "cerebrum-7b", "Joseph717171/Cerebrum-1.0-12.25B": "cerebrum-12.25b"}
_BY_LOWER = {name.lower(): name for name in SHORT}
_BY_LOWER |= {repo.lower(): name for repo, name in _ALIASES.items()}


def folder(environment: Mapping[str, str] = os.environ, platform: str = sys.platform) -> Path:
    """The folder that models are kept in; it need not exist.

    $MLX_CEREBRUM_MODELS, else `~/Library/Application Support/mlx-cerebrum/models` on macOS and
    `mlx-cerebrum/models` under $XDG_DATA_HOME, by default `~/.local/share`, elsewhere. Raises
    CheckpointError for a folder of a user that is none.
    """
    if given := environment.get(VARIABLE):
        try:
            return Path(given).expanduser().absolute()
        except RuntimeError as error:  # ~nosuchuser
            raise CheckpointError(f"{VARIABLE}={given}: {error}") from None
    home = Path(environment.get("HOME") or Path.home())
    if platform == "darwin":
        base = home / "Library" / "Application Support"
    else:
        base = Path(environment.get("XDG_DATA_HOME") or home / ".local" / "share")
    return base / "mlx-cerebrum" / "models"


def split(name: str) -> tuple[str, int | None]:
    """A name without its width, and the width in bits a weight: `x:8bit`, `x:8` -> `x`, 8."""
    found = _VARIANT.fullmatch(name)
    return (name, None) if found is None else (found[1], int(found[2]))


def short_name(name: str) -> str | None:
    """The short name that this is, in whatever case, or that this hub id is kept under."""
    return _BY_LOWER.get(name.lower())


def meant(name: str) -> str | None:
    """The model that may be meant by a name that is none: an address of the hub, another spelling,
    bits as other tools write them. None where nothing is near, or it is that name already."""
    base, bits = _ADDRESS.sub("", name.strip()).rstrip("/"), ""
    base = "/".join(base.split("/")[:2])
    if (found := _OTHER_BITS.fullmatch(base)) is not None:
        base, bits = found[1], f":{found[2]}bit"
    plain = re.sub(r"[^a-z0-9]", "", base.lower()).removeprefix("cerebrum").removeprefix("10")
    if HUB_ID.fullmatch(base):
        near = base
    elif plain in ("", "1225b", "1225", "12b", "12", "122b") and base:
        near = "cerebrum-12.25b"
    elif plain in ("7b", "7"):
        near = "cerebrum-7b"
    else:
        near = next(iter(get_close_matches(base.lower(), [*SHORT, "demo"], 1, 0.75)), "")
    return near + bits if near and near + bits != name else None


def folder_name(name: str, bits: int | None = None) -> str:
    """The folder of a model: `owner/name`, 4 -> `owner--name-4bit`."""
    return name.replace("/", "--") + ("" if bits is None else f"-{bits}bit")


def name_of(folder: str) -> tuple[str, int | None]:
    """The name and width that a folder stands for; a folder of another form is its own name."""
    found = _FOLDER.fullmatch(folder)
    if found is None:
        return folder, None
    return found[1].replace("--", "/", 1), int(found[2])
