"""macOS: a LaunchAgent, which launchd starts when its user logs in (launchd.plist(5))."""

import os
import plistlib
import re
import time
from pathlib import Path
from typing import Any
from xml.parsers.expat import ExpatError

from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.service.unit import State, Unit, must, rotate, tool, write_private

LABEL = "mlx-cerebrum.server"
_PID = re.compile(r"^\s*pid = (\d+)", re.MULTILINE)
_ENDED = re.compile(r"^\s*last exit code = (.+)$", re.MULTILINE)
_PATIENCE = 15.0  # seconds for what ran before to be gone; it may still answer for --grace


class Launchd:
    """launchd's side of it."""

    manager = "launchd"
    note = "it runs while you are logged in"

    def __init__(self, home: Path) -> None:
        self.file = home / "Library" / "LaunchAgents" / f"{LABEL}.plist"
        self.log = home / "Library" / "Logs" / "mlx-cerebrum" / "server.log"
        self._home = home

    def text(self, unit: Unit) -> bytes:
        """The plist."""
        return plistlib.dumps(
            {
                "Label": LABEL,
                "ProgramArguments": list(unit.words),
                "EnvironmentVariables": dict(unit.environment),
                "WorkingDirectory": str(self._home),
                "RunAtLoad": True,
                "KeepAlive": {"SuccessfulExit": False},  # again where it fails
                "ThrottleInterval": 10,  # seconds between two starts
                "ProcessType": "Interactive",  # else it is slowed down
                "StandardOutPath": str(unit.log),
                "StandardErrorPath": str(unit.log),
                "Umask": 0o077,
            }
        )

    def words(self) -> tuple[str, ...]:
        """The command that is installed. Raises RequestError for a file that is
        not ours."""
        try:
            found: Any = plistlib.loads(self.file.read_bytes())
            return tuple(str(word) for word in found["ProgramArguments"])
        except (OSError, ValueError, KeyError, AttributeError, TypeError, ExpatError):
            raise RequestError(f"{self.file} can't be read; install it again") from None

    def install(self, unit: Unit) -> None:
        if tool("launchctl", "print", self._domain).returncode != 0:
            raise RequestError("this user has no desktop here; log in as that user, not over ssh")
        rotate(unit.log)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_private(self.file, self.text(unit))  # it may hold the key
        self._bootout()
        must("launchctl", "enable", self._service)  # a disabled one could not be started
        ends = time.monotonic() + _PATIENCE
        while tool("launchctl", "bootstrap", self._domain, str(self.file)).returncode != 0:
            if time.monotonic() > ends:
                must("launchctl", "bootstrap", self._domain, str(self.file))
                break
            time.sleep(0.5)  # what ran before is still going

    def remove(self) -> None:
        self._bootout()
        self.file.unlink(missing_ok=True)

    def state(self) -> State:
        if not self.file.exists():
            return State(False)
        done = tool("launchctl", "print", self._service)
        if done.returncode != 0:
            return State(True, None, "launchd does not have it; install it again")
        pid, ended = _PID.search(done.stdout), _ENDED.search(done.stdout)
        if pid is not None:
            return State(True, int(pid[1]))
        code = "" if ended is None or "never" in ended[1] else ended[1].strip()
        return State(True, None, f"it last ended with exit code {code}" if code else "it waits")

    @property
    def _domain(self) -> str:
        return f"gui/{os.getuid()}"

    @property
    def _service(self) -> str:
        return f"{self._domain}/{LABEL}"

    def _bootout(self) -> None:
        """Stop it and forget it, if it is there."""
        tool("launchctl", "bootout", self._service)
        ends = time.monotonic() + _PATIENCE
        while tool("launchctl", "print", self._service).returncode == 0 and time.monotonic() < ends:
            time.sleep(0.2)
