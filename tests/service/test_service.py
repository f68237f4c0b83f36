"""The server as a service: what is written, when nothing is, and the tools that are called.

launchd and systemd are stand-ins on PATH that note their words; where systemd's own tools are
installed, they check the unit too.
"""

import json
import os
import plistlib
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeCheckpoint, slow

from mlx_cerebrum.__main__ import main
from mlx_cerebrum.service.launchd import Launchd
from mlx_cerebrum.service.systemd import Systemd
from mlx_cerebrum.service.unit import rotate

ROOT = Path(__file__).parents[2]
WAIT = 60.0  # seconds
# They note what they are asked; `print` and `show` say what the test wrote for them.
STAND_IN = """#!/bin/sh
echo "$*" >> "{notes}"
case "$*" in
  *show-environment | "print gui/$(id -u)") test ! -f "{notes}.away" ;;
  print*) test -f "{notes}.print" && cat "{notes}.print" ;;
  *show*) cat "{notes}.show" 2>/dev/null || true ;;
  bootout*) exit 3 ;;
esac
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home of a user"
    (home / "bin").mkdir(parents=True)
    for name in ("launchctl", "systemctl"):
        program = home / "bin" / name
        program.write_text(STAND_IN.format(notes=home / "notes"))
        program.chmod(0o755)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PATH", f"{home / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("MLX_CEREBRUM_MODELS", str(home / "models"))
    for name in ("XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_DATA_HOME", "MLX_CEREBRUM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return home


@pytest.fixture
def model(home: Path, checkpoint: MakeCheckpoint) -> Path:
    (home / "models").mkdir()
    return checkpoint().rename(home / "models" / "small-16bit")


def on_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_cerebrum.service.__main__.manager", lambda: Launchd(Path.home()))


def on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_cerebrum.service.__main__.manager", lambda: Systemd(Path.home()))


def notes(home: Path) -> list[str]:
    file = home / "notes"
    return file.read_text().splitlines() if file.exists() else []


def plist(home: Path) -> Any:
    return plistlib.loads((home / "Library/LaunchAgents/mlx-cerebrum.server.plist").read_bytes())


def unit(home: Path) -> Path:
    return home / ".config" / "systemd" / "user" / "mlx-cerebrum.service"


def test_a_launch_agent(home: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_macos(monkeypatch)
    monkeypatch.setenv("MLX_CEREBRUM_API_KEY", "sesame")
    assert main(["service", "install", "small", "--port", "8123", "--unload-after", "15m"]) == 0
    found = plist(home)
    words = found["ProgramArguments"]
    assert words[:4] == [sys.executable, "-P", "-m", "mlx_cerebrum.server"]
    assert words[4:] == ["small", "--port", "8123", "--unload-after", "15m"]
    assert found["EnvironmentVariables"]["MLX_CEREBRUM_API_KEY"] == "sesame"
    assert found["EnvironmentVariables"]["MLX_CEREBRUM_MODELS"] == str(home / "models")
    assert found["KeepAlive"] == {"SuccessfulExit": False}
    assert found["RunAtLoad"] is True
    log = home / "Library" / "Logs" / "mlx-cerebrum" / "server.log"
    assert found["StandardOutPath"] == found["StandardErrorPath"] == str(log)
    assert log.parent.is_dir()
    file = home / "Library/LaunchAgents/mlx-cerebrum.server.plist"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600  # it holds the key
    assert f"bootstrap gui/{os.getuid()} {file}" in notes(home)


def test_installing_again_changes_it(
    home: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_macos(monkeypatch)
    for port in ("8123", "8124"):
        assert main(["service", "install", "small", "--port", port]) == 0
    assert plist(home)["ProgramArguments"][-1] == "8124"
    asked = [note.split()[0] for note in notes(home)]
    assert asked.count("bootout") == asked.count("bootstrap") == 2
    assert len(list((home / "Library" / "LaunchAgents").iterdir())) == 1


def test_removed_without_a_trace(
    home: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for system, folder in ((on_macos, "Library/LaunchAgents"), (on_linux, ".config/systemd/user")):
        system(monkeypatch)
        assert main(["service", "install", "small"]) == 0
        assert any((home / folder).iterdir())
        assert main(["service", "remove"]) == 0
        assert not any((home / folder).iterdir())
        capsys.readouterr()
        assert main(["service", "remove"]) == 0
        assert capsys.readouterr().out == "there is no service\n"
        assert main(["service", "status"]) == 3
        assert "mlx-cerebrum service install" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["small", "--host", "0.0.0.0"], "API key"),
        (["small", "--batch", "0"], "batch"),
        (["small", "--port", "0"], "a port of its own"),
        (["small", "--unload-after", "15"], "15m"),
        (["small", "--nonsense"], "--nonsense"),
        (["small", "--plan", "cerebrum-12.25b"], "blocks"),
        (["cerebrum-12.25b"], "mlx-cerebrum pull cerebrum-12.25b"),
        (["owner/unheard-of"], "mlx-cerebrum pull owner/unheard-of"),
        (["~nosuchuser/x"], "does not exist"),
        (["./x"], "does not exist"),
        (["small", "--logit-bias", "99999=1"], "99999"),
    ],
)
def test_what_serve_would_refuse_is_not_written(
    home: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    on_linux(monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "cache"))
    try:
        code = main(["service", "install", *flags])
    except SystemExit as ended:
        code = int(ended.code or 0)
    assert code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not unit(home).exists()
    assert notes(home) == []


def test_paths_are_whole_and_the_key_is_not_in_the_command(
    home: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_macos(monkeypatch)
    monkeypatch.chdir(home / "models")
    monkeypatch.setenv("MLX_CEREBRUM_MODELS", ".")
    (home / "models" / "8080").write_text("a file that is called as the port")
    words = ["--model", "small-16bit", "--port=8080", "--api-key", "open sesame"[5:], "--open"]
    assert main(["service", "install", *words]) == 0
    found = plist(home)
    assert found["ProgramArguments"][4:] == ["--model", str(model), "--port", "8080"]
    assert found["EnvironmentVariables"]["MLX_CEREBRUM_MODELS"] == str(home / "models")
    assert found["EnvironmentVariables"]["MLX_CEREBRUM_API_KEY"] == "sesame"


def test_the_last_model_is_meant_where_none_is_named(
    home: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_macos(monkeypatch)
    assert main(["service", "install"]) == 0
    assert plist(home)["ProgramArguments"][4:] == ["--model", "small:16bit"]


def test_a_unit(home: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_linux(monkeypatch)
    odd = model.rename(home / "models" / 'odd 100% $HOME "name" \\ here')
    words = [str(odd), "--port", "8123"]
    assert main(["service", "install", *words]) == 0
    assert notes(home)[-1] == "--user restart mlx-cerebrum.service"
    assert main(["service", "install", *words]) == 0
    assert notes(home)[-1] == "--user start mlx-cerebrum.service"  # nothing has changed
    assert Systemd(home).words()[4:] == tuple(words)
    assert stat.S_IMODE(unit(home).stat().st_mode) == 0o600
    text = unit(home).read_text()
    assert "Restart=on-failure" in text
    assert f"StandardError=append:{home}/.local/state/mlx-cerebrum/server.log" in text
    if (analyze := shutil.which("systemd-analyze")) is not None:
        done = subprocess.run([analyze, "--user", "verify", str(unit(home))], capture_output=True)
        assert b"mlx-cerebrum" not in done.stderr, done.stderr


@pytest.fixture
def started(home: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


@slow
def test_what_is_written_runs_and_answers(
    home: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    started: list[subprocess.Popen[bytes]],
) -> None:
    """The installed command is started as the system would, in its folder and environment."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    on_linux(monkeypatch)
    words = ["small", "--port", str(port), "--template", "cerebrum", "--api-key", "sesame"]
    assert main(["service", "install", *words]) == 0
    (home / "notes.show").write_text("ActiveState=failed\nSubState=failed\nMainPID=0\n")
    capsys.readouterr()
    assert main(["service", "status"]) == 3
    assert "does not run: it is failed" in capsys.readouterr().out
    lines = unit(home).read_text().splitlines()
    values = [line.partition('="')[2][:-1] for line in lines if line.startswith("Environment=")]
    environment = dict(value.split("=", 1) for value in values)
    assert environment["MLX_CEREBRUM_API_KEY"] == "sesame"
    started.append(subprocess.Popen(Systemd(home).words(), cwd=home, env=environment))
    (home / "notes.show").write_text(f"ActiveState=active\nMainPID={started[0].pid}\n")
    ends = time.monotonic() + WAIT
    while (code := main(["service", "status", "--json"])) != 0:
        assert (code, started[0].poll()) == (3, None)
        assert time.monotonic() < ends
        time.sleep(0.1)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["running"] is True
    assert told["answers"] is True
    assert told["pid"] == started[0].pid
    assert told["log"].startswith("~/")
    assert "sesame" not in json.dumps(told)


def test_status_on_macos(
    home: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_macos(monkeypatch)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert main(["service", "install", "small", "--port", str(port)]) == 0
    for text, said in (
        ("\tstate = running\n\tpid = 4711\n", "runs, process 4711"),
        ("\tstate = not running\n\tlast exit code = 2\n", "it last ended with exit code 2"),
    ):
        (home / "notes.print").write_text(text)
        monkeypatch.setattr("mlx_cerebrum.service.launchd._PATIENCE", 0.0)
        capsys.readouterr()
        assert main(["service", "status"]) == 3
        out = capsys.readouterr().out
        assert said in out
        assert "does not answer" in out
        assert str(home) not in out


@pytest.mark.parametrize("data", [b"", b"garbage", b"<plist><dict>", b"[Service]\nExecStart=x"])
def test_a_file_that_is_not_ours(
    home: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    data: bytes,
) -> None:
    for system, one in ((on_macos, Launchd(home)), (on_linux, Systemd(home))):
        system(monkeypatch)
        one.file.parent.mkdir(parents=True, exist_ok=True)
        one.file.write_bytes(data)
        assert main(["service", "status"]) == 2
        assert "install it again" in capsys.readouterr().err
        assert main(["service", "install", "small"]) == 0
        assert one.words()[-1] == "small"


def test_without_a_session_nothing_is_written(
    home: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "notes.away").touch()
    for system, one in ((on_macos, Launchd(home)), (on_linux, Systemd(home))):
        system(monkeypatch)
        assert main(["service", "install", "small"]) == 2
        assert "log in as that user" in capsys.readouterr().err
        assert not one.file.exists()


def test_a_large_log_begins_anew(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "server.log"
    rotate(log)
    log.write_text("x" * 100)
    rotate(log, 100)
    assert log.exists()
    rotate(log, 99)
    assert not log.exists()
    assert (tmp_path / "logs" / "server.log.1").read_text() == "x" * 100
