"""A server in a process of its own: started, watched, stopped."""

import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.server_client import Address, get
from mlx_cerebrum.errors import CerebrumError

_URL = re.compile(r"http://(?:127\.0\.0\.1|localhost):(\d+)")
_SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{.*\})?\s+(\S+)", re.M)


class Process:
    """`python -m ...` that serves on this machine; a context that ends it.

    Raises CerebrumError, with the last line it printed, where it does not come up.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        port: int | None = None,
        patience: float = 300.0,
    ) -> None:
        """`port` where it listens; None: the first address that it prints says so."""
        self.name = arguments[0]
        self.lines: deque[str] = deque(maxlen=50)  # the last that it printed
        self._found = threading.Event()
        self._port = port
        self._process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=_environment(),
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.address = self._up(time.monotonic() + patience)
        except BaseException:
            self.stop(0)
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def check(self) -> None:
        """Raises CerebrumError, with its last line, where it has ended by itself."""
        code = self._process.poll()
        if code is not None:
            raise CerebrumError(f"python -m {self.name} ended with code {code}: {self._last()}")

    def stop(self, grace: float = 30.0) -> int | None:
        """Ask it to end, and end it after `grace` seconds. Its exit code; None: it was ended."""
        self._process.send_signal(signal.SIGTERM)
        try:
            code: int | None = self._process.wait(grace)
        except subprocess.TimeoutExpired:
            code = None
            self._process.kill()
            self._process.wait()
        self._reader.join()
        if self._process.stdout is not None:
            self._process.stdout.close()
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self.stop()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.strip())
            found = _URL.search(line)
            if found and self._port is None:
                self._port = int(found[1])
                self._found.set()
        self._found.set()

    def _up(self, until: float) -> Address:
        """Where it listens, once it says that it is well."""
        if self._port is None:
            self._found.wait(max(0.0, until - time.monotonic()))
        while self._port is not None and time.monotonic() < until and self._process.poll() is None:
            address = Address("127.0.0.1", self._port)
            with suppress(CerebrumError):
                get(address, "/health")
                return address
            time.sleep(0.1)
        raise CerebrumError(f"python -m {self.name} does not serve: {self._last()}")

    def _last(self) -> str:
        line = next((line for line in reversed(self.lines) if line), "it printed nothing")
        return line.removeprefix("error: ")


def _environment() -> dict[str, str]:
    """Nothing measured may ask the network anything, and a key of the user's is not for it."""
    found = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    found.pop("MLX_CEREBRUM_API_KEY", None)
    return found


def free_port() -> int:
    """A port that nothing listens on, for a server that can't choose one and say so."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def resident(pid: int) -> int | None:
    """Bytes of memory that a process has; None where there is no such process."""
    if not Path("/proc/self").exists():
        return _resident_by_ps(pid)
    with suppress(OSError, LookupError, StopIteration):
        return 1024 * int(_field(Path(f"/proc/{pid}/status").read_text(), "VmRSS"))
    return None


def _resident_by_ps(pid: int) -> int | None:
    words = ["ps", "-o", "rss=", "-p", str(pid)]
    said = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    return 1024 * int(said) if said.isdigit() else None


def handles(pid: int) -> dict[str, int | None]:
    """How many files and connections a process has open, and threads; None where not known."""
    found: dict[str, int | None] = {"open_files": None, "threads": None}
    with suppress(OSError, LookupError, StopIteration):  # Linux
        found["open_files"] = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        found["threads"] = int(_field(Path(f"/proc/{pid}/status").read_text(), "Threads"))
    return found


def metrics(address: Address) -> dict[str, float]:
    """What /metrics says, the samples of a name added up."""
    found: dict[str, float] = {}
    for name, value in _SAMPLE.findall(get(address, "/metrics")):
        with suppress(ValueError):
            found[name] = found.get(name, 0.0) + float(value)
    return found


def _field(status: str, name: str) -> str:
    line = next(line for line in status.splitlines() if line.startswith(f"{name}:"))
    return line.split()[1]


@dataclass
class Watch:
    """Samples a process's resident memory once a second, on a thread of its own.

    And what its server says of itself, every tenth time: the samples of /metrics by name.
    """

    pid: int
    address: Address
    samples: list[tuple[float, int]] = field(default_factory=list)  # seconds since start, bytes
    said: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        started = time.monotonic()
        for number in count():
            size = resident(self.pid)
            if size is not None:
                self.samples.append((time.monotonic() - started, size))
            if number % 10 == 0:
                with suppress(CerebrumError):  # a server too busy to say is seen by its clients
                    self.said.append((time.monotonic() - started, metrics(self.address)))
            if self._stop.wait(1.0):
                return


def slope(samples: Sequence[tuple[float, int]]) -> float | None:
    """Megabytes a minute, by least squares; None where the samples span less than a minute."""
    points = [(seconds / 60, size / 1e6) for seconds, size in samples]
    if not points or points[-1][0] - points[0][0] < 1:
        return None
    mean_x, mean_y = (sum(column) / len(points) for column in zip(*points, strict=True))
    above = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return float(above / sum((x - mean_x) ** 2 for x, _ in points))


def slope_range(samples: Sequence[tuple[float, int]]) -> tuple[float, float] | None:
    """Where the slope lies, by two standard errors of half minutes' means; None for a few of them.

    Neighbouring samples are of the same answers in the making, so single ones would flatter it.
    """
    halves: dict[int, list[int]] = {}
    for seconds, size in samples:
        halves.setdefault(int(seconds // 30), []).append(size)
    most = max(map(len, halves.values()), default=0)  # one that was only begun is left out
    points = [
        (half / 2, sum(sizes) / len(sizes) / 1e6)
        for half, sizes in halves.items()
        if 2 * len(sizes) > most
    ]
    if len(points) < 12:
        return None
    mean_x, mean_y = (sum(column) / len(points) for column in zip(*points, strict=True))
    width = sum((x - mean_x) ** 2 for x, _ in points)
    found = sum((x - mean_x) * (y - mean_y) for x, y in points) / width
    left = sum((y - mean_y - found * (x - mean_x)) ** 2 for x, y in points)
    error = math.sqrt(left / (len(points) - 2) / width)
    return found - 2 * error, found + 2 * error


def floors(samples: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """The lowest of every minute: what answers in the making take and give back is left out."""
    found: dict[int, int] = {}
    for seconds, size in samples:
        minute = int(seconds // 60)
        found[minute] = min(size, found.get(minute, size))
    return [(60.0 * minute, size) for minute, size in found.items()]
