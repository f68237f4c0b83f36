"""How the machines come together, before anything is said.

MLX's ring waits without a limit for whoever should connect to it, hears no signal meanwhile, and
lets no thread of Python run.
"""

import errno
import faulthandler
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import mlx.core as mx

from mlx_cerebrum.errors import MachineError
from mlx_cerebrum.ranks import hosts
from mlx_cerebrum.text import one_line

_RETRIED = "Couldn't connect"  # what MLX says after half a minute
_TOGETHER = "start them together, the one with rank 0 last"
_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def meet(backend: str, patience: float) -> mx.distributed.Group:
    """The group of all machines, once all are there.

    Where one does not come for `patience` seconds, the process ends with one line, exit code 1.
    Raises MachineError where the others can't be reached for another reason.
    """
    rank, last = 0, False
    if backend == "ring":
        lists, rank = hosts(), int(os.environ["MLX_RANK"])
        last = rank == len(lists) - 1
        for address in lists[rank]:
            _check_own(address)
    with _no_longer_than(patience), _plain_signals():
        while True:
            try:
                return mx.distributed.init(strict=True, backend=backend)
            except (RuntimeError, ValueError) as error:
                if _RETRIED not in str(error):
                    raise MachineError(f"the other machines can't be reached: {error}") from None
                if not last:  # the last one connects before anything else, so it can do so again
                    raise MachineError(
                        f"machine {rank + 1} did not come in time: {_TOGETHER}"
                    ) from None


def _absent(seconds: float) -> str:
    return (
        f"not all machines came within {seconds:g} s: {_TOGETHER}, or give --patience more seconds"
    )


def _check_own(address: str) -> None:
    """Raise MachineError where this machine can't listen at an address that should be its own.

    MLX shares a port with whoever else of the same user listens there, and then takes another
    job's machines for its own.
    """
    host, _, port = address.rpartition(":")
    with socket.socket() as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a job may just have ended
        try:
            own.bind((host, int(port)))
        except (OSError, OverflowError) as error:
            number = error.errno if isinstance(error, OSError) else None
            why = {
                errno.EADDRINUSE: "another program listens there: give the machines other ports",
                errno.EADDRNOTAVAIL: "it is another machine's: check the host file and MLX_RANK",
            }.get(number or 0, f"{error}: check the host file")
            raise MachineError(f"{address} can't be this machine's address; {why}") from None


@contextmanager
def _no_longer_than(seconds: float) -> Iterator[None]:
    """End the process after so many seconds. No thread of Python can, while MLX waits: faulthandler
    has one of its own, and whoever reads what it has to say then says our line."""
    speaker = subprocess.Popen(
        [
            "sh",
            "-c",
            'read -r _ && printf "%s\\n" "$0" >&2',
            f"error: {one_line(_absent(seconds))}",
        ],
        stdin=subprocess.PIPE,
        stderr=sys.stderr,
        start_new_session=True,  # Ctrl-C is not for it
    )
    assert speaker.stdin is not None
    faulthandler.dump_traceback_later(seconds, exit=True, file=speaker.stdin)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        with suppress(OSError):
            speaker.stdin.close()
        speaker.wait()


@contextmanager
def _plain_signals() -> Iterator[None]:
    """Inside, signals that end a program end it at once: its own way to do so is never heard."""
    with ExitStack() as stack:
        for signum in _ENDS:
            if signal.getsignal(signum) not in (None, signal.SIG_IGN, signal.SIG_DFL):
                stack.callback(signal.signal, signum, signal.signal(signum, signal.SIG_DFL))
        yield
