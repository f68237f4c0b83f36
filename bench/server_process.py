"""A server in a process of its own: started, watched, stopped."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import IO

import psutil
from prometheus_client.parser import text_string_to_metric_families

from bench.server_client import get
from mlx_cerebrum.errors import CerebrumError

_PATIENCE = 300.0  # seconds that loading a model may take
_GRACE = 30.0  # seconds that a server may take to end


@dataclass(frozen=True)
class Served:
    """A server's process, what it prints, and where it listens."""

    name: str
    address: str
    process: psutil.Process
    _popen: subprocess.Popen[bytes]
    _output: IO[bytes]

    def rss(self) -> int:
        """Bytes of memory that it has."""
        return int(self.process.memory_info().rss)

    def stop(self) -> int | None:
        """Its exit code; None where it had to be killed."""
        self._popen.terminate()
        try:
            return self._popen.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
            return None

    def check(self) -> None:
        """Raises CerebrumError, with the last line it printed, where it has ended by itself."""
        code = self._popen.poll()
        if code is not None:
            self._output.seek(0)
            lines = self._output.read().decode(errors="replace").strip().splitlines()
            last = (lines or ["it printed nothing"])[-1].removeprefix("error: ")
            raise CerebrumError(f"python -m {self.name} ended with code {code}: {last}")


@contextmanager
def serving(words: Sequence[str]) -> Iterator[Served]:
    """`python -m ...` that listens on --port of this machine, once it says that it is well.

    Raises CerebrumError where it does not come up, or is gone when something failed."""
    port = _free_port()
    # Nothing measured may ask the network anything, and a key of the user's is not for it.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    environment.pop("MLX_CEREBRUM_API_KEY", None)
    with TemporaryFile() as output:
        popen = subprocess.Popen(
            [sys.executable, "-m", *words, "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        process = psutil.Process(popen.pid)
        server = Served(words[0], f"127.0.0.1:{port}", process, popen, output)
        try:
            _wait(server)
            yield server
        except (CerebrumError, psutil.Error):
            server.check()
            raise
        finally:
            server.stop()


def _wait(server: Served) -> None:
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        server.check()
        with suppress(CerebrumError):
            get(server.address, "/health")
            return
        time.sleep(0.1)
    raise CerebrumError(f"python -m {server.name} does not serve after {_PATIENCE:.0f} s")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def metrics(address: str) -> dict[str, float]:
    """What /metrics says, without the cerebrum_ that its names begin with."""
    families = text_string_to_metric_families(get(address, "/metrics"))
    samples = [sample for family in families for sample in family.samples]
    return {sample.name.removeprefix("cerebrum_"): sample.value for sample in samples}
