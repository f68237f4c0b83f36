"""Conversations as files: the JSON list of messages that `generate --messages` reads."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.files import json_file
from mlx_cerebrum.files.replacing import replacing
from mlx_cerebrum.tokenizer.messages import Message, check_messages


def read_messages(path: Path) -> list[Message]:
    """The messages of a file. Raises RequestError where they are no conversation."""
    messages = json_file.read(path, RequestError)
    if not isinstance(messages, list):
        raise RequestError(f"{path} must hold a list of messages, not a {type(messages).__name__}")
    try:
        return check_messages(messages)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None


def write_messages(path: Path, messages: Sequence[Mapping[str, Any]]) -> None:
    """Write a conversation that only its user can read; an old file stays whole until it is done.

    Raises RequestError for a place that no file can be written to, CheckpointError where another
    run writes it, OSError where writing fails.
    """
    text = json.dumps([dict(message) for message in messages], indent=2, ensure_ascii=False) + "\n"
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Write what was said, as `write_messages` does; raises the same."""
    if not path.parent.is_dir():
        raise RequestError(f"{path.parent} is not a directory; make it first")
    if path.exists() and not path.is_file():  # nor replace a device, as root could
        raise RequestError(f"{path} is no file; give another name")
    path = Path(os.path.realpath(path))  # a link stays one
    # Short, since `path`'s own name may be as long as the file system allows.
    partial = path.with_name(f".conversation-{crc32(os.fsencode(path.name)):08x}")
    with replacing(path, partial, 0o600) as file:
        file.write(text.encode())
