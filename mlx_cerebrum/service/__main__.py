"""`mlx-cerebrum service install|remove|status`: the server, started at login."""

import argparse
import http.client
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_cerebrum import cli
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.server.__main__ import parser as server_parser
from mlx_cerebrum.service.launchd import Launchd
from mlx_cerebrum.service.systemd import Systemd
from mlx_cerebrum.service.unit import unit
from mlx_cerebrum.text import one_line, say, tilde

NOT_RUNNING = 3  # as systemctl has it
_PATIENCE = 2.0  # seconds for it to answer
_EVERY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # addresses that nobody can be reached at


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(words)
    return cli.run(lambda: _run(args, words), args.debug)


def manager() -> Launchd | Systemd:
    """What starts services here. Raises RequestError where nothing is known to."""
    if sys.platform == "darwin":
        return Launchd(Path.home())
    if sys.platform == "linux":
        return Systemd(Path.home())
    raise RequestError(f"services are for macOS and Linux, not {sys.platform}")


def _run(args: argparse.Namespace, words: Sequence[str]) -> int:
    one = manager()
    if args.action == "status":
        return _status(one, args.json)
    if args.action == "remove":
        there = one.file.exists()
        one.remove()
        say("the service is removed; its log stays" if there else "there is no service")
        return 0
    at = list(words).index("install")
    wanted = unit([*words[:at], *words[at + 1 :]], one.log)
    one.install(wanted)
    say(f"installed: {tilde(one.file)}; {one.note}")
    say(f"its log: {tilde(one.log)}")
    say("whether it answers: mlx-cerebrum service status")
    return 0


def _status(one: Launchd | Systemd, as_json: bool) -> int:
    state = one.state()
    told: dict[str, Any] = {"manager": one.manager, "installed": state.installed}
    if state.installed:
        words = one.words()
        served = server_parser().parse_args(list(words[words.index("mlx_cerebrum.server") + 1 :]))
        host = _EVERY.get(served.host, served.host)
        told |= {
            "running": state.pid is not None,
            "pid": state.pid,
            "note": state.note or None,
            "address": f"http://{f'[{host}]' if ':' in host else host}:{served.port}",
            "answers": answers(host, served.port),
            "model": served.name or served.model,
            "log": tilde(one.log),
        }
    works = bool(told.get("running") and told.get("answers"))
    if as_json:
        say(json.dumps(told))
        return 0 if works else NOT_RUNNING
    if not state.installed:
        say("there is no service; to have one: mlx-cerebrum service install NAME")
        return NOT_RUNNING
    running = f"runs, process {state.pid}" if state.pid else f"does not run: {state.note}"
    say(f"service: {running}")
    say(f"model:   {one_line(str(told['model']), 200)}")
    answered = "answers" if told["answers"] else "does not answer (yet: a model may be loading)"
    say(f"address: {told['address']}, which {answered}")
    say(f"log:     {told['log']}")
    return 0 if works else NOT_RUNNING


def answers(host: str, port: int) -> bool:
    """Whether a server like ours takes requests there."""
    connection = http.client.HTTPConnection(host, port, timeout=_PATIENCE)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        found = json.loads(answer.read(1000))
        return answer.status == 200 and isinstance(found, dict) and found.get("status") == "ok"
    except (OSError, ValueError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def parser() -> cli.ArgumentParser:
    p = cli.ArgumentParser(
        prog="mlx-cerebrum service",
        description="Let the server start by itself when you log in: as a LaunchAgent on macOS, a"
        " systemd user unit on Linux.",
    )
    actions = p.add_subparsers(dest="action", required=True, metavar="install|remove|status")
    actions.add_parser(
        "install",
        parents=[server_parser()],
        add_help=False,
        help="install it and start it, with `mlx-cerebrum serve`'s flags; again to change them",
        description="Install the service and start it. The flags are `mlx-cerebrum serve`'s.",
    )
    remove = actions.add_parser("remove", help="stop it and remove it; its log stays")
    remove.add_debug()
    status = actions.add_parser("status", help="say whether it runs and answers (exit code 3: no)")
    status.add_json()
    status.add_debug()
    return p


if __name__ == "__main__":
    sys.exit(main())
