"""`mlx-cerebrum COMMAND ...`: one name for the command lines of this package and of `convert`.

The same as `python -m mlx_cerebrum.COMMAND`, but a stray `convert.py` in the current folder
can't get in its way, and a model that is not here yet is fetched first.
"""

import argparse
import importlib
import os
import sys
from difflib import get_close_matches
from typing import Any

from mlx_cerebrum import __version__, cli
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.shelf.entries import entries
from mlx_cerebrum.shelf.places import BITS, HUB_ID, SHORT, VARIABLE, short_name, split
from mlx_cerebrum.text import say, tell

# Modules by name, imported when asked for: the runtime itself never depends on `convert`.
COMMANDS = {
    "chat": ("mlx_cerebrum.chat.__main__", "talk at the terminal"),
    "generate": ("mlx_cerebrum.generate", "answer one prompt"),
    "serve": ("mlx_cerebrum.server.__main__", "serve OpenAI's API and a chat page"),
    "pull": ("convert.pull", "fetch a model and keep it on the shelf"),
    "list": ("mlx_cerebrum.shelf.listing", "list the models that are here"),
    "show": ("mlx_cerebrum.shelf.showing", "show what a model is, and what it is made of"),
    "rm": ("mlx_cerebrum.shelf.removing", "remove a model"),
    "verify": ("convert.verify", "check every byte of a model"),
    "plan": ("mlx_cerebrum.plan.show", "show a layer plan and what it costs"),
    "convert": ("convert.__main__", "write a checkpoint laid out by a plan"),
    "service": ("mlx_cerebrum.service.__main__", "let the server start by itself at login"),
    "doctor": ("mlx_cerebrum.doctor.__main__", "say what this machine can run, and how fast"),
}
_TALKING = ("chat", "generate", "serve")  # they need a model
# What the same thing is called elsewhere.
_OTHERS = {
    **dict.fromkeys(("run", "talk", "start", "repl"), "chat"),
    **dict.fromkeys(("ls", "ps", "models"), "list"),
    **dict.fromkeys(("download", "fetch", "get", "install", "add"), "pull"),
    **dict.fromkeys(("remove", "delete", "del", "uninstall"), "rm"),
    **dict.fromkeys(("server", "web", "api", "up"), "serve"),
    **dict.fromkeys(("info", "inspect"), "show"),
    **dict.fromkeys(("ask", "complete", "prompt"), "generate"),
    **dict.fromkeys(("quantize", "merge", "create"), "convert"),
    **dict.fromkeys(("demo",), "chat demo"),
    **dict.fromkeys(("push", "upload"), "convert --upload-repo"),
    **dict.fromkeys(("check", "test"), "verify"),
    **dict.fromkeys(("daemon", "autostart", "launchd", "systemd"), "service"),
    **dict.fromkeys(("diagnose", "env", "bench", "benchmark", "status"), "doctor"),
}


def main(argv: list[str] | None = None) -> int:
    arguments = _with_folder(sys.argv[1:] if argv is None else argv)
    if arguments[:1] and arguments[0] in COMMANDS:
        command, rest = arguments[0], arguments[1:]
        with cli.spelled(_spellings(command)):
            return _start(command, rest)
    return cli.run(lambda: _help(arguments))


def _start(command: str, rest: list[str]) -> int:
    module = importlib.import_module(COMMANDS[command][0])
    if command in _TALKING:
        args = module.parser().parse_args(rest)
        code = cli.run(lambda: _make_ready(command, args, rest), args.debug)
        if code != 0:
            return code
    done: int = module.main(rest)
    return done


def _with_folder(arguments: list[str]) -> list[str]:
    """Take off `--models DIR`, which stands before the command."""
    if arguments[:1] == ["--models"] and len(arguments) > 1:
        os.environ[VARIABLE] = arguments[1]
        return arguments[2:]
    if arguments[:1] and arguments[0].startswith("--models="):
        os.environ[VARIABLE] = arguments[0].removeprefix("--models=")
        return arguments[1:]
    return arguments


def _spellings(command: str) -> dict[str, str]:
    """How what the modules call `python -m ...` is typed here."""
    found = {"python -m convert verify": "mlx-cerebrum verify"} if command == "verify" else {}
    for name, (module, _) in COMMANDS.items():
        found[f"python -m {module.removesuffix('.__main__').removesuffix('.show')}"] = (
            f"mlx-cerebrum {name}"
        )
    return found


def _make_ready(command: str, args: argparse.Namespace, rest: list[str]) -> int:
    """See to it that there is a model: the one named, fetched if need be, else the last used.

    `rest` gets the name where it has none. Raises RequestError where nobody can be asked.
    """
    from mlx_cerebrum.flags import asked_model  # it brings MLX, which `list` does without

    asked = asked_model(args)
    if asked is None:
        asked = _last_used() or _asked(command)
        rest += ["--model", asked]
    if not _is_to_fetch(asked, args):
        return 0
    if not (args.yes or _at_terminal()):
        raise RequestError(
            f"{asked} is not here yet; fetch it first: mlx-cerebrum pull {asked}, or add --yes"
        )
    pull: Any = importlib.import_module("convert.pull")
    more = ["--yes"] if args.yes else []
    if args.yes and getattr(args, "quiet", False):
        more.append("--quiet")
    code: int = pull.main([asked, *more])
    return code


def _is_to_fetch(name: str, args: argparse.Namespace) -> bool:
    """Whether it is the name of a model that belongs on the shelf and is not there.

    A hub id is only fetched to the shelf where nothing else is asked of it; without a terminal
    it comes from the hub's cache, as ever.
    """
    from mlx_cerebrum.weights.hub import is_here

    if is_here(name):
        return False
    base, bits = split(name)
    if short_name(base) in SHORT and not HUB_ID.fullmatch(name):
        if bits not in (None, *BITS):
            raise RequestError(f"a model is kept in 4, 8 or 16 bits a weight, not {bits}")
        return True
    plain = args.revision is None and args.q_bits is None
    asked = plain and (args.yes or _at_terminal())
    return name == "demo" or (asked and HUB_ID.fullmatch(name) is not None)


def _last_used() -> str | None:
    found = entries()
    if found:
        tell(f"{found[0].called}, the last one used (mlx-cerebrum list shows them all)")
    return found[0].called if found else None


def _asked(command: str) -> str:
    """Ask once. Raises RequestError without a terminal, and for an answer that is none."""
    choices = [*SHORT, "demo"]
    if not _at_terminal():
        raise RequestError(f"which model? mlx-cerebrum {command} NAME: {', '.join(choices)}, ...")
    tell("Which model?")
    for number, choice in enumerate(choices, 1):
        tell(f"  {number}  {choice}")
    said = cli.ask("Its number, or a name of the hub, owner/name [1]: ") or "1"
    if said.isdigit() and 1 <= int(said) <= len(choices):
        return choices[int(said) - 1]
    return said


def _at_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def _help(arguments: list[str]) -> int:
    if len(arguments) > 1 and arguments[0] in ("help", "--help", "-h") and arguments[1] in COMMANDS:
        return main([arguments[1], "--help"])
    if arguments[:1] in (["--version"], ["-V"], ["version"], ["-v"]):
        say(f"mlx-cerebrum {__version__}")
        return 0
    if arguments[:1] in ([], ["-h"], ["--help"], ["help"]):
        say(
            "usage: mlx-cerebrum [--models DIR] COMMAND [options]   (COMMAND --help says more)\n\n"
            "to begin: mlx-cerebrum chat cerebrum-12.25b\n"
        )
        say("\n".join(f"  {name:<10}{what}" for name, (_, what) in COMMANDS.items()))
        say(f"\n  --models DIR   where models are (default: ${VARIABLE}, else this user's data)")
        return 0
    known, typed = ", ".join(COMMANDS), arguments[0]
    if typed == "--models":
        raise RequestError("--models wants a folder: mlx-cerebrum --models DIR COMMAND ...")
    if typed.startswith("-") and (command := next((a for a in arguments if a in COMMANDS), None)):
        raise RequestError(f"{typed} stands after the command: mlx-cerebrum {command} ... {typed}")
    near = get_close_matches(typed.lower(), COMMANDS, 1)
    meant = _OTHERS.get(typed.lower()) or (near[0] if near else None)
    hint = f"did you mean `mlx-cerebrum {meant}`? " if meant else ""
    raise RequestError(f"{typed!r} is not a command; {hint}there are {known}")


if __name__ == "__main__":
    sys.exit(main())
