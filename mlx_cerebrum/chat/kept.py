"""Conversations kept in files of their own, as the page exports and imports them.

A file holds one conversation as a tree of messages: other answers and other questions are
branches, and the `leaf` names the one that is shown. A message is named by what it says and where
it stands, so that writing what is there already changes nothing, and two chats that go on with
one conversation add branches to it instead of overwriting each other's.
"""

import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from mlx_cerebrum.errors import CheckpointError, RequestError
from mlx_cerebrum.files import json_file
from mlx_cerebrum.files.replacing import replacing
from mlx_cerebrum.shelf import places
from mlx_cerebrum.text import one_line
from mlx_cerebrum.tokenizer.conversation import read_messages
from mlx_cerebrum.tokenizer.fitting import in_turns
from mlx_cerebrum.tokenizer.messages import Message

FORMAT, VERSION = "mlx-cerebrum-conversations", 1
TITLE = 60  # characters
LISTED = 20  # conversations, the one changed last first
_PATIENCE = 2.0  # seconds for another chat to have written
_STATES = {"stop": "done", "length": "done", "interrupted": "stopped", "": "done"}
_ROLES = ("user", "assistant")

Node = dict[str, Any]


@dataclass
class Turn:
    """A question, or an answer with who gave it and why it ended: as `Answer.reason` has it."""

    role: str
    text: str
    model: str = ""
    reason: str = ""
    others: "list[list[Turn]]" = field(default_factory=list)  # what stood in its place, oldest last


@dataclass(frozen=True)
class Kept:
    """A conversation of a file, along its leaf."""

    name: str  # its id
    title: str
    updated: float  # seconds since 1970
    system: str
    turns: list[Turn]

    @property
    def messages(self) -> list[Message]:
        """As a list of messages, what `generate --messages` reads."""
        start = [{"role": "system", "content": self.system}] if self.system.strip() else []
        return [*start, *({"role": turn.role, "content": turn.text} for turn in self.turns)]


def folder() -> Path:
    """Where conversations are kept: beside the models, in this user's data.

    Raises RequestError for a user without a home, as in some containers.
    """
    own = {name: value for name, value in os.environ.items() if name != places.VARIABLE}
    try:
        return places.folder(own).with_name("conversations")
    except RuntimeError as error:
        raise RequestError(f"no conversation can be kept: {error}") from None


def new_name() -> str:
    """A name for a conversation: when it began, and a little chance."""
    return f"{datetime.now():%Y%m%d_%H%M%S_%f}_{secrets.token_hex(2)}"


def path_of(name: str) -> Path:
    return folder() / f"{name}.json"


def keep(name: str, system: str, turns: Sequence[Turn], passing: str | None = None) -> str | None:
    """Write a conversation, beside the branches that its file has already.

    passing: the id of a message to leave out, an answer written before it was whole. Returns the
    id of the last one. Raises OSError where the disk fails, CheckpointError where another chat
    keeps writing, RequestError for a file that is damaged: it stays as it is.
    """
    path = path_of(name)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            with replacing(path, _partial(path), 0o600) as file:
                before = _own(path, name) if path.exists() else {}
                text, leaf = _merged(before, name, system, turns, passing)
                file.write(text.encode(errors="replace"))  # a folder's name may be no text
            return leaf
        except CheckpointError:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.stem}.partial")


def remove(path: Path) -> None:
    """Remove a conversation, if it is there. Raises RequestError where that is not possible."""
    try:
        path.unlink(missing_ok=True)
        _partial(path).unlink(missing_ok=True)  # of a chat that was killed
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror or error}") from None


def _own(path: Path, name: str) -> dict[str, Any]:
    found = _read(path)
    if [one["id"] for one in found] != [name]:
        raise RequestError(f"{path} holds other conversations; move it away")
    return found[0]


def _merged(
    before: Mapping[str, Any], name: str, system: str, turns: Sequence[Turn], passing: str | None
) -> tuple[str, str | None]:
    now = int(time.time() * 1000)
    nodes = {node["id"]: node for node in before.get("nodes", ()) if node["id"] != passing}
    leaf = None
    for node in _nodes(name, None, turns):
        known = nodes.get(node["id"], {})
        # Later than its siblings even within a millisecond, so that their order is kept.
        nodes[node["id"]] = {"at": known.get("at", now + len(nodes)), **node}
    for turn in turns:
        leaf = _id(name, leaf, turn)
    first = next((turn.text for turn in turns if turn.role == "user"), "")
    models = [turn.model for turn in turns if turn.model]
    meta = {
        "id": name,
        "title": before.get("title") or one_line(first, TITLE),
        "named": before.get("named", False),
        "created": before.get("created", now),
        "updated": now,
        "system": system,
        "leaf": leaf,
        "comparing": False,
        "models": [models[-1] if models else None, None],
        "lanes": [None, None],
        "deleted": None,
        "nodes": sorted(nodes.values(), key=lambda node: node["at"]),
    }
    whole = {"format": FORMAT, "version": VERSION, "conversations": [meta]}
    return json.dumps(whole, ensure_ascii=False, indent=1) + "\n", leaf


def _nodes(name: str, parent: str | None, turns: Sequence[Turn]) -> Iterable[Node]:
    """The messages of a path and of the branches off it, each after the one it follows."""
    for turn in turns:
        for branch in reversed(turn.others):
            yield from _nodes(name, parent, branch)
        node = {"id": _id(name, parent, turn), "parent": parent, "role": turn.role}
        node |= {"content": turn.text, "state": _STATES.get(turn.reason, "partial")}
        node |= {"finish": turn.reason} if turn.reason in ("stop", "length") else {}
        yield node | ({"model": turn.model} if turn.model else {})
        parent = node["id"]


def _id(name: str, parent: str | None, turn: Turn) -> str:
    what = json.dumps([name, parent, turn.role, turn.text, turn.model])
    return hashlib.sha256(what.encode()).hexdigest()[:24]


def read(path: Path) -> list[Kept]:
    """The conversations of a file, this program's or the page's. Raises RequestError, one line."""
    return [_kept(one, path) for one in _read(path)]


def conversations(path: Path) -> list[Kept]:
    """Those of a file that somebody names: also a plain list of messages. Raises RequestError."""
    if isinstance(json_file.read(path, RequestError), dict):
        return read(path)
    messages = in_turns(read_messages(path))
    system = "".join(m["content"] for m in messages if m["role"] == "system")
    turns = [Turn(m["role"], m["content"]) for m in messages if m["role"] != "system"]
    return [Kept("", path.stem, 0.0, system, turns)]


def _read(path: Path) -> list[dict[str, Any]]:
    """As it is in the file, checked."""
    value = json_file.read(path, RequestError)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise RequestError(f"{path} holds no conversations of this program or its page")
    if value.get("version") != VERSION:
        raise RequestError(f"{path} was written by another version of this program")
    found = value.get("conversations")
    if not isinstance(found, list) or not found or not all(map(_is_sound, found)):
        raise RequestError(f"{path} is damaged: its conversations are none")
    return found


def _is_sound(one: Any) -> bool:
    if not isinstance(one, dict) or not isinstance(one.get("id"), str):
        return False
    nodes = one.get("nodes")
    return isinstance(nodes, list) and all(
        isinstance(node, dict)
        and isinstance(node.get("id"), str)
        and (node.get("parent") is None or isinstance(node["parent"], str))
        and node.get("role") in _ROLES
        and isinstance(node.get("content"), str)
        and isinstance(node.get("at"), int | float)
        for node in nodes
    )


def _kept(one: Mapping[str, Any], path: Path) -> Kept:
    nodes = {node["id"]: node for node in one["nodes"]}
    leaf = one.get("leaf")
    if not isinstance(leaf, str) or leaf not in nodes:
        leaf = max(nodes, key=lambda name: nodes[name]["at"], default=None)
    turns: list[Turn] = []
    while leaf in nodes:
        node = nodes.pop(leaf)  # so that a circle ends, too
        turns.append(Turn(node["role"], node["content"], _word(node, "model"), _reason(node)))
        leaf = node.get("parent")
    updated = one.get("updated")
    seconds = updated / 1000 if isinstance(updated, int | float) and 0 < updated < 1e14 else 0.0
    title = one_line(_word(one, "title"), TITLE) or path.stem
    return Kept(one["id"], title, seconds, _word(one, "system"), turns[::-1])


def _word(of: Mapping[str, Any], key: str) -> str:
    value = of.get(key)
    return value if isinstance(value, str) else ""


def _reason(node: Node) -> str:
    if node["role"] == "user":
        return ""
    if node.get("state") in ("stopped", "partial", "failed"):
        return "interrupted"
    finish = _word(node, "finish")
    return finish if finish in ("stop", "length") else ""


def newest(words: str = "", most: int = LISTED) -> list[tuple[Path, Kept]]:
    """What is kept, the one changed last first; of files that can be read.

    words: only what has all of them in its title or its text, in whatever case.
    """
    dated = []
    for path in folder().glob("*.json"):
        try:
            dated.append((path.stat().st_mtime, path))
        except OSError:
            continue  # gone meanwhile
    found: list[tuple[Path, Kept]] = []
    wanted = words.casefold().split()
    for _, path in sorted(dated, reverse=True):
        if len(found) >= most:
            break
        try:
            (one, *_) = read(path)
        except RequestError:
            continue
        text = "\n".join([one.title, *(turn.text for turn in one.turns)]).casefold()
        if all(word in text for word in wanted):
            found.append((path, one))
    return found
