"""Machines that die, stop, come late, or are set up otherwise: all of them end, in one line."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

import httpx
import psutil
import pytest
from command import run
from conftest import write_checkpoint
from ranks_ring import ROOT, SIZES, Ended, end, free_ports, host_file, start
from terminal import Program
from tiny import tiny_config, tiny_weights

PATIENCE = 6.0  # seconds, where a machine stops or stays away
PATIENT = "30"  # where none does, and this one may be busy
IMPATIENT = ("--patience", str(PATIENCE))
SOON = 5.0  # seconds; it takes some 0.1 where this machine is not busy
LAUNCHER = Path(sys.executable).with_name("mlx.launch")
HOST = socket.gethostname()[:48]
GONE = "error: machine {} ({}) is gone: start all of them again\n"
FAILED = "error: machine {} ({}) has ended by an error, which it says itself\n"
SILENT = (
    f"error: no word from machine {{}} ({{}}) for {PATIENCE:g} s: start all of them again, with"
    " more --patience if it was only slow\n"
)
ABSENT = (
    f"error: not all machines came within {PATIENCE:g} s: start them together, the one with rank 0"
    " last, or give --patience more seconds\n"
)
ELSEWHERE = (
    "error: 192.0.2.7:5000 can't be this machine's address; it is another machine's: check the host"
    " file and MLX_RANK\n"
)
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
ASK = ("--raw", "--prompt", "a b a b", "--max-tokens")
drawn = pytest.mark.one_in(24)  # of all that start processes
HEADER = "/help lists the commands\n"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 tiny blocks that never end an answer."""
    config = tiny_config(vocab_size=260, max_position_embeddings=1_000_000, **SIZES)
    weights = tiny_weights(config, 3)
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "model", config, weights)


class Ring:
    """Machines as processes: `words` with each one's own flags. Leaving it, all are gone."""

    def __init__(self, folder: Path, machines: int, words: Sequence[str], **how: Any) -> None:
        self.hosts, self.machines, self.words = folder / "hosts.json", machines, list(words)
        self.stdin: int = how.get("stdin", subprocess.DEVNULL)
        if not self.hosts.exists():
            host_file(self.hosts, machines)
        self.started: dict[int, subprocess.Popen[str]] = {}
        self.since = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        left = [rank for rank, each in self.started.items() if each.poll() is None]
        for each in self.started.values():
            with suppress(ProcessLookupError):
                each.kill()
            end(each)
        assert left == []

    def start(
        self, *ranks: int, flags: Sequence[str] = (), more: Mapping[str, str] | None = None
    ) -> Self:
        for rank in ranks or range(self.machines):
            words = [*self.words, *flags]
            stdin = self.stdin if rank == 0 else subprocess.DEVNULL
            self.started[rank] = start(words, rank, self.hosts, more, stdin)
        return self

    def until(self, text: str = "", of: str = "stdout", seconds: float = 30.0) -> str:
        """Read what rank 0 says until `text` is in it, or anything at all; what was read."""
        stream, limit, read = getattr(self.started[0], of), time.monotonic() + seconds, ""
        while not read or text not in read:
            ready, _, _ = select.select([stream], [], [], max(0.0, limit - time.monotonic()))
            data = os.read(stream.fileno(), 4096) if ready else b""
            assert data, f"waited for {text!r}; rank 0 said {read!r}"
            read += data.decode(errors="replace")
        return read

    def say(self, text: str) -> Self:
        """To rank 0."""
        given = self.started[0].stdin
        assert given is not None
        given.write(text)
        given.flush()
        return self

    def signal(self, signum: int, *ranks: int) -> Self:
        self.since = time.monotonic()
        for rank in ranks:
            self.started[rank].send_signal(signum)
            if signum == signal.SIGKILL:
                self.started[rank].wait()
        return self

    def ended(self, within: float, besides: Sequence[int] = ()) -> dict[int, Ended]:
        """How the others ended, seconds after the last signal at most."""
        since = self.since or time.monotonic()
        waited = {rank: each for rank, each in self.started.items() if rank not in besides}
        took: dict[int, float] = {}
        while len(took) < len(waited) and time.monotonic() < since + within + 20:
            for rank, each in waited.items():
                if rank not in took and each.poll() is not None:
                    took[rank] = time.monotonic() - since
            time.sleep(0.01)
        found = {rank: end(each, 5) for rank, each in waited.items()}
        for rank, how in found.items():
            print(f"  rank {rank}: {took.get(rank, -1):.2f} s, code {how.code}, {how.err!r}")
        assert max(took.values(), default=0.0) < within
        assert len(took) == len(waited)
        return found


def generate(path: Path, tokens: int = 100_000, *flags: str) -> list[str]:
    flags = ("--dtype", "float32", "--patience", PATIENT, *flags)
    return ["-m", "mlx_cerebrum.generate", str(path), "--quiet", *ASK, str(tokens), *flags]


def chat(path: Path, *flags: str) -> list[str]:
    own = ["--template", "plain", "--max-tokens", "100000", "--dtype", "float32", "--no-keep"]
    return ["-m", "mlx_cerebrum.chat", str(path), *own, "--patience", PATIENT, *flags]


def said_alone(words: Sequence[str], folder: Path) -> str:
    """By one machine, as a launcher starts it."""
    (hosts := folder / "nobody.json").touch()
    environment = ENVIRONMENT | {"MLX_RANK": "0", "MLX_HOSTFILE": str(hosts)}
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=True,
    ).stdout


def lines(found: Mapping[int, Ended]) -> list[tuple[int, str]]:
    return [(each.code, each.err) for each in found.values()]


@contextmanager
def calling(address: tuple[str, int]) -> Iterator[socket.socket]:
    """A connection, as soon as somebody listens."""
    limit = time.monotonic() + 20
    while True:
        try:
            with socket.create_connection(address) as caller:
                yield caller
            return
        except ConnectionRefusedError:
            assert time.monotonic() < limit
            time.sleep(0.05)


@contextmanager
def launched(folder: Path, machines: int, words: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """`mlx.launch`, and nobody of its own left afterwards."""
    port = str(free_ports(1)[0])
    command = [
        str(LAUNCHER),
        "-n",
        str(machines),
        "--backend",
        "ring",
        "--starting-port",
        port,
        "--",
    ]
    launcher = subprocess.Popen(
        [*command, sys.executable, *words],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )
    try:
        yield launcher
        assert children(launcher.pid) == []
    finally:
        for each in children(launcher.pid):
            each.kill()
        launcher.kill()
        launcher.communicate()


def listening(pid: int) -> list[int]:
    """The ports at which a process waits for others."""
    found = psutil.Process(pid).net_connections("tcp")
    return [each.laddr.port for each in found if each.status == psutil.CONN_LISTEN]


def children(pid: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


@contextmanager
def both_at_terminals(path: Path, folder: Path) -> Iterator[tuple[Program, Program]]:
    hosts = host_file(folder / "hosts.json", 2)
    removed = {"NO_COLOR", "COLUMNS", "LINES", "XTERM_VERSION", "INPUTRC"}
    env = {name: value for name, value in ENVIRONMENT.items() if name not in removed}
    env |= {"TERM": "xterm-256color", "HOME": str(folder), "XDG_STATE_HOME": str(folder / "state")}
    env |= {"MLX_HOSTFILE": str(hosts)}
    command = [sys.executable, *chat(path), "--no-save"]
    with (
        Program([*command, "--follow"], env | {"MLX_RANK": "1"}) as other,
        Program(command, env | {"MLX_RANK": "0"}, columns=100) as lead,
    ):
        yield lead, other


# Killed.


@pytest.mark.parametrize(
    ("machines", "rank"), [(2, 1), (2, 0), (3, 1), (3, 2), (3, 0), (4, 1), (4, 2)]
)
@drawn
def test_killed_in_an_answer(machines: int, rank: int, path: Path, tmp_path: Path) -> None:
    """The others end at once, and all name the one that was killed."""
    with Ring(tmp_path, machines, generate(path)) as ring:
        ring.start().until()
        found = ring.signal(signal.SIGKILL, rank).ended(SOON, besides=[rank])
        assert lines(found) == [(1, GONE.format(rank, HOST))] * (machines - 1)


@pytest.mark.parametrize(("machines", "rank"), [(2, 1), (2, 0), (3, 1), (3, 2), (3, 0)])
@pytest.mark.parametrize("rested", [0.0, pytest.param(11.0, marks=pytest.mark.long)])
@drawn
def test_killed_at_rest(
    machines: int, rank: int, rested: float, path: Path, tmp_path: Path
) -> None:
    """A chat on a pipe, whose person says nothing."""
    with Ring(tmp_path, machines, chat(path), stdin=subprocess.PIPE) as ring:
        ring.start().until(HEADER, "stderr")
        time.sleep(rested)
        found = ring.signal(signal.SIGKILL, rank).ended(SOON, besides=[rank])
        assert lines(found) == [(1, GONE.format(rank, HOST))] * (machines - 1)


@pytest.mark.parametrize("rank", [1, 0])
@drawn
def test_killed_in_a_chats_answer(rank: int, path: Path, tmp_path: Path) -> None:
    with Ring(tmp_path, 2, chat(path), stdin=subprocess.PIPE) as ring:
        ring.start().until(HEADER, "stderr")
        ring.say("Talk!\n").until()
        found = ring.signal(signal.SIGKILL, rank).ended(SOON, besides=[rank])
        assert lines(found) == [(1, GONE.format(rank, HOST))]


@pytest.mark.parametrize("tensor", [False, True])
@drawn
def test_a_tensor_parallel_machine_is_killed(tensor: bool, path: Path, tmp_path: Path) -> None:
    flags = ["--tensor-parallel"] if tensor else ["--split", "7"]
    with Ring(tmp_path, 2, generate(path, 100_000, *flags)) as ring:
        ring.start().until()
        found = ring.signal(signal.SIGKILL, 1).ended(SOON, besides=[1])
        assert lines(found) == [(1, GONE.format(1, HOST))]


class Asked(threading.Thread):
    """A client of the server: what it got."""

    def __init__(self, address: str, stream: bool) -> None:
        super().__init__()
        self.address, self.stream, self.status, self.text = address, stream, 0, ""
        self.begun = threading.Event()
        self.start()

    def run(self) -> None:
        body = {"prompt": "a b", "max_tokens": 100_000, "stream": self.stream}
        url = f"{self.address}/v1/completions"
        with suppress(httpx.HTTPError), httpx.stream("POST", url, json=body, timeout=60) as answer:
            self.status = answer.status_code
            for piece in answer.iter_text():
                self.text += piece
                self.begun.set()


@pytest.mark.parametrize(
    ("signum", "rank"), [(signal.SIGKILL, 1), (signal.SIGSTOP, 1), (signal.SIGKILL, 2)]
)
@drawn
def test_a_server_tells_its_clients_first(
    signum: int, rank: int, path: Path, tmp_path: Path
) -> None:
    words = ["-m", "mlx_cerebrum.server", str(path), "--port", "0", "--dtype", "float32"]
    words += ["--quiet", "--template", "plain", "--batch", "2", "--patience", str(PATIENCE)]
    with Ring(tmp_path, rank + 1, words) as ring:
        address = ring.start().until("http").split()[0]
        clients = [Asked(address, stream) for stream in (True, False, True, True)]
        assert clients[0].begun.wait(30)
        time.sleep(0.3)
        found = ring.signal(signum, rank).ended(SOON + PATIENCE, besides=[rank])
        ring.signal(signal.SIGKILL, rank)
        for each in clients:
            each.join()
        line = found[0].err.removeprefix("error: ").strip()
        assert f"machine {rank} ({HOST})" in line
        assert lines(found) == [(1, f"error: {line}\n")] * rank
        assert clients[1].status == 503
        assert all(line in each.text for each in clients), [each.text[-200:] for each in clients]


# Stopped.


@pytest.mark.parametrize(
    ("machines", "rank"), [(2, 1), (2, 0), (3, 1), (3, 2), (3, 0), (4, 1), (4, 2)]
)
@drawn
def test_stopped_in_an_answer(machines: int, rank: int, path: Path, tmp_path: Path) -> None:
    """The others end when they have waited long enough, and all name the one that is stopped."""
    with Ring(tmp_path, machines, generate(path, 100_000, *IMPATIENT)) as ring:
        ring.start().until()
        found = ring.signal(signal.SIGSTOP, rank).ended(PATIENCE + SOON, besides=[rank])
        ring.signal(signal.SIGKILL, rank)
        assert lines(found) == [(1, SILENT.format(rank, HOST))] * (machines - 1)


@pytest.mark.parametrize(("machines", "rank"), [(2, 1), (2, 0), (3, 1), (3, 2), (3, 0)])
@drawn
def test_stopped_at_rest(machines: int, rank: int, path: Path, tmp_path: Path) -> None:
    with Ring(tmp_path, machines, chat(path, *IMPATIENT), stdin=subprocess.PIPE) as ring:
        ring.start().until(HEADER, "stderr")
        found = ring.signal(signal.SIGSTOP, rank).ended(PATIENCE + SOON, besides=[rank])
        ring.signal(signal.SIGKILL, rank)
        assert lines(found) == [(1, SILENT.format(rank, HOST))] * (machines - 1)


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_a_tensor_parallel_machine_is_stopped(rank: int, path: Path, tmp_path: Path) -> None:
    with Ring(tmp_path, 2, generate(path, 100_000, "--tensor-parallel", *IMPATIENT)) as ring:
        ring.start().until()
        found = ring.signal(signal.SIGSTOP, rank).ended(PATIENCE + SOON, besides=[rank])
        ring.signal(signal.SIGKILL, rank)
        assert lines(found) == [(1, SILENT.format(rank, HOST))]


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_stopped_for_a_moment_only(rank: int, path: Path, tmp_path: Path) -> None:
    with Ring(tmp_path, 2, generate(path, 300, *IMPATIENT)) as ring:
        ring.start().until()
        ring.signal(signal.SIGSTOP, rank)
        time.sleep(PATIENCE / 2)
        found = ring.signal(signal.SIGCONT, rank).ended(30.0)
        assert [each.code for each in found.values()] == [0, 0]


# Late, absent, or somebody else.


@pytest.mark.long
@pytest.mark.parametrize("late", [0, 1])
def test_a_machine_that_comes_late(late: int, path: Path, tmp_path: Path) -> None:
    with Ring(tmp_path, 2, generate(path, 2)) as ring:
        ring.start(1 - late)
        time.sleep(5.0)
        found = ring.start(late).ended(25.0)
        assert [each.code for each in found.values()] == [0, 0]
        assert found[0].out
        assert found[1] == Ended(0, "", "")


@pytest.mark.parametrize(
    ("machines", "there"),
    [
        pytest.param(2, [0], id="the last"),
        pytest.param(2, [1], id="the lead", marks=pytest.mark.long),
        pytest.param(3, [0, 2], id="one between", marks=pytest.mark.long),
    ],
)
@drawn
def test_a_machine_that_never_comes(
    machines: int, there: list[int], path: Path, tmp_path: Path
) -> None:
    with Ring(tmp_path, machines, generate(path, 100_000, *IMPATIENT)) as ring:
        ring.since = time.monotonic()
        found = ring.start(*there).ended(PATIENCE + 3 * SOON)
        assert lines(found) == [(1, ABSENT)] * len(there)


@pytest.mark.parametrize("says", ["", "GET / HTTP/1.1\r\nHost: me\r\n\r\n" * 9])
@drawn
def test_a_port_that_a_stranger_has(says: str, path: Path, tmp_path: Path) -> None:
    """It is one of ours: refused at once. Whoever would connect to it waits in vain."""
    with (
        Ring(tmp_path, 2, generate(path, 100_000, *IMPATIENT)) as ring,
        socket.socket() as stranger,
    ):
        address = json.loads(ring.hosts.read_text())[0][0]
        host, _, port = address.partition(":")
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        stranger.bind((host, int(port)))
        stranger.listen()
        ring.since = time.monotonic()
        ring.start()
        peer, _ = stranger.accept()
        with peer, suppress(OSError):
            peer.sendall(says.encode())
            found = ring.ended(PATIENCE + 10.0)
        taken = f"{address} can't be this machine's address; another program listens there"
        assert found[0].code == found[1].code == 1
        assert found[0].err == f"error: {taken}: give the machines other ports\n"
        assert found[1].err == ABSENT


@pytest.mark.parametrize("says", [b"", b"GET / HTTP/1.1\r\nHost: me\r\n\r\n" * 9])
@drawn
def test_a_stranger_who_calls(says: bytes, path: Path, tmp_path: Path) -> None:
    """In place of the machine that should connect."""
    with Ring(tmp_path, 2, generate(path, 100_000, *IMPATIENT)) as ring, socket.socket() as second:
        ports = [int(own[0].partition(":")[2]) for own in json.loads(ring.hosts.read_text())]
        first, other = (("127.0.0.1", port) for port in ports)
        second.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        second.bind(other)
        second.listen()
        ring.since = time.monotonic()
        ring.start(0)
        with calling(first) as caller:
            caller.sendall(says)
            found = ring.ended(PATIENCE + 15.0)
        assert found[0].code == 1
        what = "what runs on machine 1 is another program" if says else "no word from machine 1"
        assert found[0].err.startswith(f"error: {what}")
        assert found[0].err.count("\n") == 1


@pytest.mark.parametrize("apart", [0.0, 0.7, pytest.param(6.0, marks=pytest.mark.long)])
@drawn
def test_two_jobs_on_the_same_ports(apart: float, path: Path, tmp_path: Path) -> None:
    """Each ends with its own text, or in one line."""
    one, two = "The first job", "Quite another one"
    alone = {}
    for prompt in (one, two):
        words = generate(path, 12, *IMPATIENT)
        words[words.index("--prompt") + 1] = prompt
        alone[prompt] = said_alone(words, tmp_path)
    assert len({"", *alone.values()}) == 3
    with ExitStack() as stack:
        jobs = []
        for prompt in (one, two):
            words = generate(path, 12, *IMPATIENT)
            words[words.index("--prompt") + 1] = prompt
            jobs.append(stack.enter_context(Ring(tmp_path, 2, words)))
        for ring in jobs:
            ring.start()
            time.sleep(apart)
        for ring, prompt in zip(jobs, (one, two), strict=True):
            found = ring.ended(45.0)
            assert found[0].out in ("", alone[prompt])
            for each in found.values():
                assert (each.code, each.err.count("\n")) in ((0, 0), (1, 1)), each
                assert each.code == 0 or each.err.startswith("error: ")


@pytest.mark.parametrize("file", ["", "\n"])
@drawn
def test_one_machine_alone(file: str, path: Path, tmp_path: Path) -> None:
    """`mlx.launch -n 1` leaves the host file empty."""
    (tmp_path / "hosts.json").write_text(file)
    with Ring(tmp_path, 1, generate(path, 3)) as ring:
        found = ring.start(0).ended(30.0)
        assert found[0].code == 0
        assert found[0].out


@pytest.mark.parametrize(
    ("file", "rank", "says"),
    [
        (None, "0", "hosts.json does not exist"),
        ('[["127.0.0.1:1"], ', "0", "is not valid JSON"),
        ("{}", "0", "is not what MLX_HOSTFILE names"),
        ("[]", "0", "is not what MLX_HOSTFILE names"),
        ('["127.0.0.1:1", "127.0.0.1:2"]', "0", "is not what MLX_HOSTFILE names"),
        ('[{"ssh": "mac1", "ips": ["10.0.0.1"]}]', "0", "is not what MLX_HOSTFILE names"),
        ('[["::1:5000"], ["::2:5000"]]', "0", "IPv4 addresses with ports"),
        ('[["127.0.0.1"], ["127.0.0.1:2"]]', "0", "IPv4 addresses with ports"),
        ('[["a:1", "a:2"], ["b:1"]]', "0", "more addresses than others"),
        ('[["a:1"], ["a:1"]]', "0", "gives 'a:1' to two machines"),
        ('[["a:1"], ["a:2"]]', "2", "MLX_RANK is '2'; "),
        ('[["a:1"], ["a:2"]]', "-1", "MLX_RANK is '-1'; "),
        ('[["a:1"], ["a:2"]]', "one", "MLX_RANK is 'one'; "),
        ('[["a:1"], ["a:2"]]', "", "MLX_RANK is ''; "),
    ],
)
def test_a_host_file_that_is_none(
    file: str | None, rank: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "hosts.json"
    if file is not None:
        path.write_text(file)
    with patch.dict(os.environ, {"MLX_RANK": rank, "MLX_HOSTFILE": str(path)}):
        code, out, err = run(capsys, "demo", "--prompt", "Hi")
    assert (code, out) == (2, "")
    assert says in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_rank_without_a_host_file(capsys: pytest.CaptureFixture[str]) -> None:
    with patch.dict(os.environ, {"MLX_RANK": "0"}):
        os.environ.pop("MLX_HOSTFILE", None)
        code, _, err = run(capsys, "demo", "--prompt", "Hi")
    assert code == 2
    assert "MLX_HOSTFILE, the file with all machines' addresses, is not" in err


@drawn
def test_an_address_of_another_machine(path: Path, tmp_path: Path) -> None:
    (tmp_path / "hosts.json").write_text('[["192.0.2.7:5000"], ["192.0.2.8:5000"]]')
    with Ring(tmp_path, 2, generate(path)) as ring:
        found = ring.start(0).ended(30.0)
        assert lines(found) == [(1, ELSEWHERE)]


@drawn
def test_a_crossed_ring(path: Path, tmp_path: Path) -> None:
    """One of three machines has the addresses of two others in another order."""
    with Ring(tmp_path, 3, generate(path, 100_000, *IMPATIENT)) as ring:
        addresses = json.loads(ring.hosts.read_text())
        crossed = tmp_path / "crossed.json"
        crossed.write_text(json.dumps([addresses[0], addresses[2], addresses[1]]))
        ring.since = time.monotonic()
        ring.start(1, 2).start(0, more={"MLX_HOSTFILE": str(crossed)})
        found = ring.ended(PATIENCE + 3 * SOON)
        for each in found.values():
            assert (each.code, each.err.count("\n")) == (1, 1)
            assert each.err.startswith("error: ")


# Who started it ends it.


@pytest.mark.parametrize("program", ["generate", "chat"])
@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
@drawn
def test_a_signal_ends_all(
    program: str, signum: int, code: int, path: Path, tmp_path: Path
) -> None:
    """In an answer, as on one machine."""
    talks = program == "chat"
    words = chat(path) if talks else generate(path)
    with Ring(tmp_path, 2, words, stdin=subprocess.PIPE) as ring:
        ring.start()
        if talks:
            ring.until(HEADER, "stderr")
            ring.say("Talk!\n")
        ring.until()
        found = ring.signal(signum, 0).ended(SOON)
        assert found[1] == Ended(0, "", "")
        assert found[0].code == code


@drawn
def test_ctrl_c_while_others_do_not_come(path: Path, tmp_path: Path) -> None:
    with Ring(tmp_path, 2, generate(path)) as ring:
        port = int(json.loads(ring.start(0).hosts.read_text())[0][0].partition(":")[2])
        limit = time.monotonic() + 20
        while port not in listening(ring.started[0].pid):
            assert time.monotonic() < limit
            time.sleep(0.05)
        assert ring.signal(signal.SIGINT, 0).ended(SOON)[0] == Ended(-signal.SIGINT, "", "")


@pytest.mark.long
@pytest.mark.parametrize("talks", [False, True])
def test_ctrl_c_while_another_is_stopped(talks: bool, path: Path, tmp_path: Path) -> None:
    """It is waited for as long as `--patience` says."""
    words = chat(path, *IMPATIENT) if talks else generate(path, 100_000, *IMPATIENT)
    with Ring(tmp_path, 2, words, stdin=subprocess.PIPE) as ring:
        ring.start()
        ring.until(HEADER, "stderr") if talks else ring.until()
        ring.signal(signal.SIGSTOP, 1)
        time.sleep(1.0)
        found = ring.signal(signal.SIGTERM, 0).ended(PATIENCE + SOON, besides=[1])
        ring.signal(signal.SIGKILL, 1)
        assert found[0].code in (1, 128 + signal.SIGTERM)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
@drawn
def test_a_launcher_that_is_killed_leaves_nobody(signum: int, path: Path, tmp_path: Path) -> None:
    with launched(tmp_path, 2, generate(path)) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.read(1)
        ranks = children(launcher.pid)
        assert len(ranks) >= 2
        launcher.send_signal(signum)
        _, left = psutil.wait_procs(ranks, SOON)
        assert left == []


@drawn
def test_started_by_mlx_launch(path: Path, tmp_path: Path) -> None:
    words = generate(path, 12)
    alone = said_alone(words, tmp_path)
    with launched(tmp_path, 2, words) as launcher:
        out, err = launcher.communicate(timeout=60)
    assert alone.strip()
    assert alone in out
    assert "error" not in err
    assert launcher.returncode == 0


@drawn
def test_a_chat_in_a_terminal(path: Path, tmp_path: Path) -> None:
    """By hand: rank 0 at its terminal, the other with --follow at another."""
    with both_at_terminals(path, tmp_path) as (lead, other):
        lead.until("/help")
        lead.until(lambda text: text.endswith(">"))
        lead.send("Talk!\r")
        lead.until(lambda text: len(text.partition("Talk!")[2]) > 100)
        lead.send("\x03")
        lead.until("/continue")
        lead.until(lambda text: text.endswith(">"))
        lead.send("\x04")
        assert lead.end() == 0
        assert lead.as_found
        assert other.end() == 0
        assert other.terminal.text == ""


@pytest.mark.parametrize("how", ["closed", "killed", "interrupted"])
@drawn
def test_a_chat_whose_terminal_or_machine_goes(how: str, path: Path, tmp_path: Path) -> None:
    with both_at_terminals(path, tmp_path) as (lead, other):
        lead.until("/help")
        lead.until(lambda text: text.endswith(">"))
        if how == "closed":
            lead.hang_up()
            assert lead.process.wait(5) in (0, 128 + signal.SIGHUP)
            assert other.end(5) == 0
            return
        if how == "killed":
            other.process.kill()
        else:
            other.send("\x03")
            assert other.end(5) == 130
        assert lead.end(5) == 1
        assert lead.as_found
        assert lead.terminal.text.endswith(GONE.format(1, HOST).strip())


# What differs, or is refused.


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--window", "7"], "not the same window: machine 1 ({}) has 7, machine 0 ({}) 12"),
        (
            ["--dtype", "bfloat16"],
            "not the same dtype: machine 1 ({}) has bfloat16, machine 0 ({})",
        ),
        (["--plan", "cerebrum-12.25b"], "not the same layer plan: machine 1 ({}) has 56 positions"),
        (["--split", "9"], "not the same split: machine 1 ({}) has cuts 9, machine 0 ({}) cuts"),
        (
            ["--q-bits", "8"],
            "not the same quantization: machine 1 ({}) has packed as 8-bit groups of 64",
        ),
        (["--tensor-parallel"], "not the same split: machine 1 ({}) has key/value heads"),
        (["--memory-limit", "0.0001"], "machine 1 ({}) would need "),
    ],
)
@drawn
def test_what_differs_is_named_by_all(
    flags: list[str], says: str, path: Path, tmp_path: Path
) -> None:
    with Ring(tmp_path, 2, generate(path)) as ring:
        found = ring.start(0).start(1, flags=flags).ended(30.0)
        (line,) = {each.err for each in found.values()}
        assert line.startswith("error: " + says.format(HOST, HOST))
        assert [each.code for each in found.values()] == [1, 1]
        assert line.count("\n") == 1


@pytest.mark.parametrize("what", ["version", "model weights"])
@drawn
def test_another_version_or_other_weights(what: str, path: Path, tmp_path: Path) -> None:
    words = generate(path)
    if what == "version":
        other = [
            "-c",
            "import mlx_cerebrum as m; m.__version__ = '9.9'; import sys;"
            " from mlx_cerebrum.generate import main; sys.exit(main())",
            *words[2:],
        ]
    else:
        config = tiny_config(vocab_size=260, max_position_embeddings=1_000_000, **SIZES)
        weights = tiny_weights(config, 4)
        other = [*words[:2], str(write_checkpoint(tmp_path / "other", config, weights)), *words[3:]]
    with Ring(tmp_path, 2, words) as ring:
        ring.start(0)
        ring.words = other
        found = ring.start(1).ended(30.0)
        (line,) = {each.err for each in found.values()}
        assert line.startswith(f"error: not the same {what}: machine 1 ({HOST}) has ")
        assert [each.code for each in found.values()] == [1, 1]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--max-tokens", "2000000"], "max-tokens"),
        (["--split", "99"], "--split '99'"),
    ],
)
@drawn
def test_what_the_lead_refuses_ends_the_others_quietly(
    flags: list[str], says: str, path: Path, tmp_path: Path
) -> None:
    """By itself, after all have met."""
    with Ring(tmp_path, 2, generate(path, 5)) as ring:
        found = ring.start(1).start(0, flags=flags).ended(30.0)
        assert found[0].code == 2
        assert says in found[0].err
        assert found[0].err.count("\n") == 1
        assert found[1] == Ended(0, "", "")


@drawn
def test_what_another_machine_refuses_is_said_there(path: Path, tmp_path: Path) -> None:
    words = generate(path, 5)
    with Ring(tmp_path, 2, words) as ring:
        ring.start(0)
        ring.words = [*words[:2], str(tmp_path / "nothing"), *words[3:]]
        found = ring.start(1).ended(30.0)
        assert found[1].code == 2
        assert "nothing" in found[1].err
        ended = f"error: machine 1 ({HOST}) has ended by an error, which it says itself\n"
        assert lines(found) == [(1, ended), (2, found[1].err)]


@pytest.mark.parametrize("machines", [2, 3])
@drawn
def test_a_step_that_fails_on_one_machine(machines: int, path: Path, tmp_path: Path) -> None:
    check_failing(Ring(tmp_path, machines, generate(path)), 1)


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_that_fails_where_all_run_every_block(rank: int, path: Path, tmp_path: Path) -> None:
    """The others are in the middle of it: it can't be taken back."""
    words = generate(path, 100, "--tensor-parallel", *IMPATIENT)
    check_failing(Ring(tmp_path, 2, words), rank, SILENT)


def check_failing(started: Ring, failing: int, said: str = FAILED) -> None:
    """A step fails on one: it says why, and the others who it was."""
    program = f"""
import sys
from mlx_cerebrum.ranks import {"follow" if failing else "lead"} as own
from mlx_cerebrum.generate import main
def run(parts, steps=[]):
    steps.append(1)
    if len(steps) > 5:
        raise RuntimeError("[malloc] Unable to allocate 99 bytes.")
    return before(parts)
before, own.run_together = own.run_together, run
sys.exit(main())
"""
    with started as ring:
        words, ranks = ring.words, range(ring.machines)
        ring.start(*(rank for rank in ranks if rank != failing))
        ring.words = ["-c", program, *words[2:]]
        found = ring.start(failing).ended(30.0)
        own = "error: this machine could not run its part: [malloc] Unable to allocate 99 bytes.\n"
        ended = said.format(failing, HOST)
        assert {rank: (each.code, each.err) for rank, each in found.items()} == {
            rank: (1, own if rank == failing else ended) for rank in ranks
        }


# At rest.


@pytest.mark.long
@pytest.mark.parametrize("machines", [2, 3])
def test_a_follower_at_rest_is_cheap_and_soon_there(
    machines: int, path: Path, tmp_path: Path
) -> None:
    """Of one core, and of the time to the first token."""
    words = ["-m", "mlx_cerebrum.server", str(path), "--port", "0", "--dtype", "float32"]

    def asked(address: str) -> float:
        since = time.monotonic()
        body = {"prompt": "a b", "max_tokens": 1}
        httpx.post(f"{address}/v1/completions", json=body, timeout=60).raise_for_status()
        return time.monotonic() - since

    with Ring(tmp_path, machines, [*words, "--quiet", "--template", "plain"]) as ring:
        address = ring.start().until("http").split()[0]
        asked(address)
        soon = min(asked(address) for _ in range(3))
        time.sleep(11.0)
        used = {r: psutil.Process(each.pid).cpu_times() for r, each in ring.started.items()}
        time.sleep(10.0)
        shares = {}
        for rank, before in used.items():
            now = psutil.Process(ring.started[rank].pid).cpu_times()
            shares[rank] = (now.user + now.system - before.user - before.system) / 10.0
        later = asked(address)
        print(f"  at rest {shares}; first token after {soon:.3f} s, after rest {later:.3f} s")
        assert all(share < 0.15 for rank, share in shares.items() if rank)
        assert later < soon + 0.5
        found = ring.signal(signal.SIGTERM, 0).ended(5.0)
        assert lines(found) == [(0, "")] * machines
