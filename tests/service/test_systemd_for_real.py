"""The service under a systemd of the test's own: started, killed, changed, removed.

It has a /run of its own, so that the machine's systemd, or that there is none, does not matter.
"""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PLACES = ("/lib/systemd/systemd", "/usr/lib/systemd/systemd")
SYSTEMD = next((place for place in PLACES if Path(place).exists()), None)
ROOT = Path(__file__).parents[2]
STEPS = """
mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/system /run/user/0 || exit 77
export XDG_RUNTIME_DIR=/run/user/0
{systemd} --user --log-target=null & SYSTEMD=$!
trap "kill $SYSTEMD" EXIT
for i in $(seq 50); do systemctl --user is-system-running >/dev/null 2>&1 && break; sleep 0.1; done
systemctl --user is-system-running >/dev/null 2>&1 || exit 77
service() {{ "{python}" -m mlx_cerebrum service "$@"; }}
answers() {{ for i in $(seq 60); do service status && return; sleep 0.5; done; exit 1; }}
pid() {{ systemctl --user show mlx-cerebrum.service --property=MainPID --value; }}
set -e
service install demo --port {port}
answers
FIRST=$(pid)
kill -9 $FIRST
for i in $(seq 100); do test "$(pid)" != $FIRST -a "$(pid)" != 0 && break; sleep 0.2; done
answers
service install demo --port {port} --quiet
answers
service remove
! service status
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux" or SYSTEMD is None, reason="needs systemd")
def test_a_whole_life(tmp_path: Path, demo: Path) -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root, for a /run of its own")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    steps = STEPS.format(systemd=SYSTEMD, python=sys.executable, port=port)
    environment = os.environ | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    for name in ("XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_DATA_HOME", "LD_PRELOAD"):
        environment.pop(name, None)
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", steps],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode == 77:
        pytest.skip("a systemd can't be started here")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("which answers") == 3
    assert not list((tmp_path / ".config").rglob("*.service"))
    log = (tmp_path / ".local" / "state" / "mlx-cerebrum" / "server.log").read_text()
    assert log.count(f":{port}  demo") == 3  # its first line, of three starts
