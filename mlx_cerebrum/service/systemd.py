"""Linux: a unit of the user's systemd (systemd.service(5))."""

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.service.unit import State, Unit, must, rotate, tool, write_private
from mlx_cerebrum.text import one_line

NAME = "mlx-cerebrum.service"
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')


class Systemd:
    """systemd's side of it."""

    manager = "systemd"
    note = (
        "it runs while you are logged in; from the start of the machine on: loginctl enable-linger"
    )

    def __init__(self, home: Path, environment: Mapping[str, str] = os.environ) -> None:
        config = environment.get("XDG_CONFIG_HOME") or home / ".config"
        state = environment.get("XDG_STATE_HOME") or home / ".local" / "state"
        self.file = Path(config) / "systemd" / "user" / NAME
        self.log = Path(state) / "mlx-cerebrum" / "server.log"
        self._home = home

    def text(self, unit: Unit) -> bytes:
        """The unit file."""
        lines = [
            "[Unit]",
            "Description=mlx-cerebrum, a local server of language models",
            "",
            "[Service]",
            f"ExecStart={' '.join(_quoted(word, '$') for word in unit.words)}",
            *(f"Environment={_quoted(f'{n}={v}')}" for n, v in sorted(unit.environment.items())),
            "WorkingDirectory=%h",
            f"StandardOutput=append:{_escaped(str(unit.log))}",
            f"StandardError=append:{_escaped(str(unit.log))}",
            "UMask=0077",
            "Restart=on-failure",
            "RestartSec=5",
            "RestartPreventExitStatus=2",  # a flag or a model that is refused: it would be again
            "",
            "[Install]",
            "WantedBy=default.target",
            "",
        ]
        return "\n".join(lines).encode()

    def words(self) -> tuple[str, ...]:
        """The command that is installed. Raises RequestError for a file that is
        not ours."""
        try:
            lines = self.file.read_text().splitlines()
        except (OSError, ValueError):
            lines = []
        command = next((line for line in lines if line.startswith("ExecStart=")), "")
        words = tuple(_unquoted(word).replace("$$", "$") for word in _QUOTED.findall(command))
        if not words:
            raise RequestError(f"{self.file} can't be read; install it again")
        return words

    def install(self, unit: Unit) -> None:
        done = tool("systemctl", "--user", "show-environment")
        if done.returncode != 0:
            said = one_line(done.stderr, 200)
            raise RequestError(f"this user has no systemd here ({said}); log in as that user")
        rotate(unit.log)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        before = self.file.read_bytes() if self.file.exists() else None
        write_private(self.file, self.text(unit))  # it may hold the key
        must("systemctl", "--user", "daemon-reload")
        must("systemctl", "--user", "enable", NAME)
        changed = before != self.text(unit)
        must("systemctl", "--user", "restart" if changed else "start", NAME)

    def remove(self) -> None:
        tool("systemctl", "--user", "disable", "--now", NAME)
        self.file.unlink(missing_ok=True)
        tool("systemctl", "--user", "daemon-reload")
        tool("systemctl", "--user", "reset-failed", NAME)

    def state(self) -> State:
        if not self.file.exists():
            return State(False)
        names = "ActiveState,SubState,MainPID,ExecMainStatus"
        done = tool("systemctl", "--user", "show", NAME, f"--property={names}")
        if done.returncode != 0:
            return State(True, None, "systemd can't be asked; is this a session of this user's?")
        found = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
        pid = int(found.get("MainPID") or 0)
        note = f"it is {found.get('ActiveState')} ({found.get('SubState')})"
        if found.get("ExecMainStatus", "0") != "0":
            note += f", and last ended with exit code {found['ExecMainStatus']}"
        return State(True, pid or None, "" if pid else note)


def _escaped(text: str) -> str:
    """A value in which nothing is expanded: `%` begins a specifier."""
    return text.replace("%", "%%")


def _quoted(text: str, *more: str) -> str:
    """One word; in commands `$` would begin a variable."""
    if any(ord(char) < 32 for char in text):
        raise RequestError(
            f"{shlex.quote(text)!r} can't be written into a unit: it has control codes"
        )
    text = _escaped(text).replace("\\", "\\\\").replace('"', '\\"')
    for char in more:
        text = text.replace(char, 2 * char)
    return f'"{text}"'


def _unquoted(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text).replace("%%", "%")
