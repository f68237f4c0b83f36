"""README.md's commands on a machine that has nothing: each as it is printed, in a fresh clone,
with a new HOME and an environment that is empty but for how the network is reached.

Long, as it installs what a first run does. `pytest -m long -s` shows what each took.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import shelf_room
from hub_stand_in import REPO, Hub
from terminal import Program

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
COMMANDS = [
    line.partition(" #")[0].strip()
    for block in re.findall(r"^```sh\n(.*?)^```", README, re.M | re.S)
    for line in block.splitlines()
    if line.strip()
]
repository, hub = shelf_room.repository, shelf_room.hub  # fixtures
NETWORK = re.compile(r"(PIP|UV)_\w+|\w*(SSL|CERT|CA_BUNDLE)\w*|(HTTPS?|ALL|NO)_PROXY", re.I)
PORT = 8080  # README's
MINUTES = 40


@dataclass
class Machine:
    """A clone, a HOME, and what has been done there."""

    clone: Path
    home: Path
    hub: Hub
    env: dict[str, str]
    inside: str = ""  # what is typed first in a new terminal

    def types(self, command: str, typed: str = "", **more: str) -> str:
        """Run a line in a new terminal; what it prints. It has to end well."""
        done = subprocess.run(
            self.line(command),
            env=self.env | more,
            cwd=self.clone,
            input=typed,
            capture_output=True,
            text=True,
            timeout=1800,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    def line(self, command: str) -> list[str]:
        return ["/bin/bash", "-c", f"{self.inside}{command}"]

    @contextmanager
    def serving(self, command: str) -> Iterator[None]:
        """A line that goes on until Ctrl-C."""
        with subprocess.Popen(
            self.line(command),
            env=self.env | {"BROWSER": "true"},
            cwd=self.clone,
            stderr=subprocess.PIPE,
            start_new_session=True,
        ) as running:
            try:
                self._until_it_answers(running)
                yield
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(running.pid, signal.SIGINT)
                _, err = running.communicate(timeout=60)
        assert b"Traceback" not in err

    @staticmethod
    def _until_it_answers(running: "subprocess.Popen[bytes]") -> None:
        end = time.monotonic() + 120
        while time.monotonic() < end and running.poll() is None:
            with (
                suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/", timeout=5) as page,
            ):
                assert b"<html" in page.read()
                return
            time.sleep(0.2)
        raise AssertionError("nothing is served")

    def in_cache(self) -> None:
        """Put the hub's repository where its client keeps what it has fetched."""
        folder = self.home / ".cache/huggingface/hub" / f"models--{REPO.replace('/', '--')}"
        shelf_room.into_cache(self.hub, folder)


def ends(machine: Machine, command: str) -> None:
    machine.types(command)


def runs_the_suite(machine: Machine, command: str) -> None:
    """What it installs; the suite itself is being run."""
    out = machine.types(command, PYTEST_ADDOPTS="--collect-only -q")
    assert re.search(r"\d{3,}/?\d* tests? collected|\d{3,} tests", out)


def serves(machine: Machine, command: str) -> None:
    with machine.serving(command):
        pass


def serves_the_next(machine: Machine, command: str) -> None:
    """Its answer is asked for by the line that follows."""
    asked = COMMANDS[COMMANDS.index(command) + 1]
    with machine.serving(command):
        assert '"content":' in machine.types(asked)


def asked_above(machine: Machine, command: str) -> None:
    """The server's line has run it."""


def talks(machine: Machine, command: str) -> None:
    machine.types(command, "Say hello.\n/quit\n")


def activates(machine: Machine, command: str) -> None:
    machine.types(command)
    machine.inside = f"{command} && "


def installs(machine: Machine, command: str) -> None:
    """Where MLX needs a backend named, the first command says so, and how: that is typed then."""
    machine.inside = ""
    machine.types(command)
    if sys.platform == "linux":
        done = subprocess.run(
            ["/bin/bash", "-c", "mlx-cerebrum generate demo --prompt x"],
            env=machine.env,
            cwd=machine.home,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        machine.types(done.stderr.strip().split("GPU: ")[1])


def fetches_and_talks(machine: Machine, command: str) -> None:
    """From a stand-in of the hub."""
    env = machine.env | {"HF_ENDPOINT": machine.hub.address, "TERM": "xterm"}
    with Program(machine.line(f"cd; {command}"), env, columns=110) as program:
        program.until("Go on? [Y/n]", 120)
        program.send("\r")
        program.until("\n12.25b>", 120)
        program.send("/quit\r")
        assert program.end() == 0


def converts(machine: Machine, command: str) -> None:
    """From the hub's cache, as when it was fetched before."""
    machine.inside = "source .venv/bin/activate && "
    machine.in_cache()
    machine.types(command, HF_HUB_OFFLINE="1")


Way = Callable[[Machine, str], None]
WAYS: Sequence[tuple[str, Way]] = (
    ("make demo", ends),
    ("make test", runs_the_suite),
    ("make serve", serves),
    ("make chat", talks),
    ("source ", activates),
    ("python -m mlx_cerebrum.server", serves_the_next),
    ("curl ", asked_above),
    ("uv tool install ", installs),
    ("mlx-cerebrum chat ", fetches_and_talks),
    ("python -m convert ", converts),
    ("python -m mlx_cerebrum.chat ", talks),
)


def way(command: str) -> Way:
    return next(how for begins, how in WAYS if command.startswith(begins))


def test_every_command_of_the_first_page_has_its_way() -> None:
    assert len(COMMANDS) > 8
    for command in COMMANDS:
        assert any(command.startswith(begins) for begins, _ in WAYS), command


@pytest.fixture
def machine(hub: Hub, tmp_path: Path) -> Machine:
    for needed in ("git", "make", "curl"):
        if shutil.which(needed) is None:
            pytest.skip(f"needs {needed}")
    if not (ROOT / ".git").exists():
        pytest.skip("needs the repository's own git")
    with socket.socket() as taken:
        if taken.connect_ex(("127.0.0.1", PORT)) == 0:
            pytest.skip(f"another program listens on port {PORT}")
    clone, home, tools = (tmp_path / name for name in ("clone", "home", "tools"))
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    home.mkdir()
    python = Path(sys.base_prefix) / "bin"
    path = f"{home}/.local/bin:{tools}/bin:{python}:/usr/local/bin:/usr/bin:/bin"
    env = {name: value for name, value in os.environ.items() if NETWORK.fullmatch(name)}
    env |= {"HOME": str(home), "PATH": path, "UV_PYTHON_DOWNLOADS": "never"}
    if links := env.get("PIP_FIND_LINKS"):
        env["UV_FIND_LINKS"] = links
    install = [str(tools / "bin" / "pip"), "install", "-q", "uv"]
    subprocess.run([sys.executable, "-m", "venv", str(tools)], check=True)
    if subprocess.run(install, capture_output=True).returncode != 0:
        pytest.skip("needs an index of packages")
    for name in ("python", "python3", "pip", "pip3"):  # they are no part of a fresh machine's
        for file in (tools / "bin").glob(f"{name}*"):
            file.unlink()
    return Machine(clone, home, hub, env)


@pytest.mark.long
@pytest.mark.skipif("CI" in os.environ, reason="CI is a fresh machine, and runs the first itself")
@pytest.mark.timeout(60 * MINUTES)
def test_each_command_as_it_is_printed(machine: Machine) -> None:
    for command in COMMANDS:
        started = time.monotonic()
        way(command)(machine, command)
        print(f"{time.monotonic() - started:7.1f} s  {command}", flush=True)  # for -s
