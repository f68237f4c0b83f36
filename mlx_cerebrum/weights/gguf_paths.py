"""Which GGUF files a path means: told by their first bytes, whatever they are called.

People have `X.GGUF`, Ollama's `sha256-...`, links into a cache, a folder with the one file they
fetched, and models split by llama.cpp into `X-00001-of-00003.gguf` and so on.
"""

import re
from pathlib import Path

from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.files.foreign import UNFINISHED, unfinished

MAGIC = b"GGUF"
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)
_SHOWN = 3


def gguf_at(path: Path) -> Path | None:
    """The GGUF file at `path`, or the only one in a folder without safetensors.

    Of a split model it is any part. None where there is none; CheckpointError where a folder holds
    several models.
    """
    if not path.is_dir():
        return path if path.suffix.lower() == ".gguf" or _begins(path) else None
    if next(path.glob("*.safetensors*"), None) is not None:
        return None
    models: dict[str, Path] = {}
    for file in sorted(path.iterdir()):
        named = file.suffix.lower() == ".gguf" and file.is_file()
        if (named or _begins(file)) and file.suffix not in UNFINISHED:
            part = _PART.fullmatch(file.name)
            models.setdefault(f"{part[1]}-of-{part[3]}" if part else file.name, file)
    if len(models) > 1:
        names = ", ".join(file.name for file in list(models.values())[:_SHOWN])
        more = f" and {len(models) - _SHOWN} more" if len(models) > _SHOWN else ""
        raise CheckpointError(f"{path} holds {len(models)} GGUF models: {names}{more}; name one")
    return next(iter(models.values()), None)


def part_paths(path: Path, count: int) -> list[Path]:
    """The files of a model split into `count`, of which `path` is one, in order.

    Raises CheckpointError naming those that are missing, or where `path` is not named as a part.
    """
    part = _PART.fullmatch(path.name)
    if part is None or int(part[3]) != count:
        raise CheckpointError(
            f"{path} is one part of {count}, but its name does not say so: name the parts"
            f" NAME-00001-of-{count:05d}.gguf and so on, or join them (llama-gguf-split --merge)"
        )
    paths = [
        path.with_name(f"{part[1]}-{k:05d}-of-{part[3]}{part[4]}") for k in range(1, count + 1)
    ]
    missing = [other for other in paths if not other.exists()]
    if missing:
        more = f" and {len(missing) - 1} other parts are" if len(missing) > 1 else " is"
        raise CheckpointError(
            f"{missing[0]}{more} missing; {path.name} is one part of {count}"
            f"{unfinished(missing[0])}"
        )
    return paths


def _begins(path: Path) -> bool:
    """Whether the file begins as a GGUF does: the magic, and a small number of either byte order
    (a text may begin with those letters)."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            head = file.read(8)
    except OSError:
        return False
    versions = (int.from_bytes(head[4:], order) for order in ("little", "big"))
    return head[:4] == MAGIC and any(0 < version < 256 for version in versions)
