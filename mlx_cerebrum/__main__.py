"""`mlx-cerebrum COMMAND ...`: one name for the command lines of this package and of `convert`.

The same as `python -m mlx_cerebrum.COMMAND`, but a stray `convert.py` in the current folder
can't get in its way.
"""

import importlib
import sys

from mlx_cerebrum import __version__, cli
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.text import say

# Modules by name, imported when asked for: the runtime itself never depends on `convert`.
COMMANDS = {
    "chat": ("mlx_cerebrum.chat.__main__", "talk at the terminal"),
    "generate": ("mlx_cerebrum.generate", "answer one prompt"),
    "plan": ("mlx_cerebrum.plan.show", "show a layer plan and what it costs"),
    "serve": ("mlx_cerebrum.server.__main__", "serve OpenAI's API and a chat page"),
    "convert": ("convert.__main__", "write a checkpoint laid out by a plan"),
}


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] and arguments[0] in COMMANDS:
        code: int = importlib.import_module(COMMANDS[arguments[0]][0]).main(arguments[1:])
        return code
    return cli.run(lambda: _help(arguments))


def _help(arguments: list[str]) -> int:
    if arguments[:1] == ["--version"]:
        say(f"mlx-cerebrum {__version__}")
        return 0
    if arguments[:1] in ([], ["-h"], ["--help"]):
        say("usage: mlx-cerebrum COMMAND [options]   (COMMAND --help says more)\n")
        say("\n".join(f"  {name:<10}{what}" for name, (_, what) in COMMANDS.items()))
        return 0
    known = ", ".join(COMMANDS)
    raise RequestError(f"{arguments[0]!r} is not a command; there are {known}")


if __name__ == "__main__":
    sys.exit(main())
