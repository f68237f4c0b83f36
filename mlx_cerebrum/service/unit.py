"""What the service runs: decided, and checked, before anything is written."""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_cerebrum.errors import CheckpointError, MemoryBudgetError, RequestError
from mlx_cerebrum.files.replacing import replacing
from mlx_cerebrum.flags import asked_model, memory_limit, model_spec
from mlx_cerebrum.machine.facts import memory_bytes
from mlx_cerebrum.model.memory import human
from mlx_cerebrum.server.__main__ import KEY_VARIABLE, settings_of
from mlx_cerebrum.server.__main__ import parser as server_parser
from mlx_cerebrum.server.listening import bind
from mlx_cerebrum.shelf.entries import entries
from mlx_cerebrum.shelf.places import HUB_ID, VARIABLE, folder
from mlx_cerebrum.text import one_line
from mlx_cerebrum.weights.hub import is_here
from mlx_cerebrum.weights.opening import open_model
from mlx_cerebrum.weights.views import orders

_PATHS = ("--model", "--plan", "--template")  # flags whose value may be a path
_OF_NOBODY = ("--open",)  # a service has no screen
# What decides where models and packages are found, and how fast the CPU multiplies.
_KEPT = (
    VARIABLE,
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "XDG_DATA_HOME",
    "PYTHONPATH",
    "LD_PRELOAD",
)


@dataclass(frozen=True)
class Unit:
    """words: the command, its program first and with its whole path. log: where its output goes."""

    words: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path


@dataclass(frozen=True)
class State:
    """What the system says of the service."""

    installed: bool
    pid: int | None = None  # while it runs
    note: str = ""  # how it ended, where it does not


def unit(words: Sequence[str], log: Path, environment: Mapping[str, str] = os.environ) -> Unit:
    """The service that `mlx-cerebrum serve WORDS` would be.

    Raises a CerebrumError, one line, for whatever `serve` would refuse, and for a model that would
    have to be fetched first.
    """
    parser = server_parser()
    args = parser.parse_args(list(words))
    settings = settings_of(args, environment)
    if not 0 < args.port < 65536:
        raise RequestError(f"a service needs a port of its own, from 1 to 65535, not {args.port}")
    bind(args.host, 0, settings.api_key is not None).close()
    named = _named(args)
    if args.name is None and args.model is None:
        words = [*words, "--model", named]
        args = parser.parse_args(list(words))
    memory_limit(args)
    opened = open_model(model_spec(args))
    orders(opened.config, str(opened.spec.name), args.plan)
    settings.defaults.sampling.check_vocabulary(opened.config.vocab_size)
    if opened.storage.nbytes > memory_bytes():
        raise MemoryBudgetError(
            f"{named} needs {human(opened.storage.nbytes)}, and the machine has"
            f" {human(memory_bytes())}; take a smaller model, or --q-bits 4"
        )
    kept = {name: value for name in _KEPT if (value := environment.get(name))}
    if VARIABLE in kept:  # it may be relative to where the command was typed
        kept[VARIABLE] = str(folder(environment))
    if settings.api_key is not None:
        kept[KEY_VARIABLE] = settings.api_key
    program = (sys.executable, "-P", "-m", "mlx_cerebrum.server")  # -P: not the folder it runs in
    return Unit((*program, *_fixed(words, parser)), kept, log)


def _named(args: argparse.Namespace) -> str:
    """The model's name. Raises CheckpointError for one of the hub's that is not here."""
    name = asked_model(args)
    if name is None:
        found = entries()
        if not found:
            raise CheckpointError("which model? name one: mlx-cerebrum service install NAME")
        return found[0].called
    if HUB_ID.fullmatch(name) and not is_here(name, args.revision):
        raise CheckpointError(f"{name} is not here yet; fetch it first: mlx-cerebrum pull {name}")
    return name


def _fixed(words: Sequence[str], parser: argparse.ArgumentParser) -> Iterator[str]:
    """The words with whole paths, and without the key, which other users could read there."""
    known = parser._option_string_actions
    left = iter(words)
    for word in left:
        flag, equals, value = word.partition("=")
        if flag not in known:
            yield _whole(word)
            continue
        takes = known[flag].nargs != 0
        if takes and not equals:
            value = next(left, "")
        if flag in (*_OF_NOBODY, "--api-key"):
            continue
        yield flag
        if takes:
            yield _whole(value) if flag in _PATHS else value


def _whole(value: str) -> str:
    path = Path(value).expanduser()
    return str(path.absolute()) if path.exists() else value


def write_private(file: Path, data: bytes) -> None:
    """Write it whole or not at all, for this user's eyes only."""
    with replacing(file, file.with_name(f".{file.name}.partial"), 0o600) as written:
        written.write(data)


def rotate(log: Path, most: int = 10_000_000) -> None:
    """Let a log of more than `most` bytes begin anew; the old one is kept beside it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists() and log.stat().st_size > most:
        log.replace(log.with_name(f"{log.name}.1"))


def tool(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a tool of the system's; its output is kept. Raises RequestError where it is missing."""
    try:
        return subprocess.run(
            words, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL
        )
    except OSError as error:
        raise RequestError(f"{words[0]} can't be run: {error.strerror}") from None


def must(*words: str) -> None:
    """The same. Also raises RequestError where it fails."""
    done = tool(*words)
    if done.returncode != 0:
        said = one_line(done.stderr or done.stdout, 200) or f"exit code {done.returncode}"
        raise RequestError(f"{' '.join(words[:3])} failed: {said}")
