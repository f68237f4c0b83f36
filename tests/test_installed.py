"""What is said where something is not installed: a command that can be typed as it stands."""

import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from conftest import slow

import mlx_cerebrum
from mlx_cerebrum import installed

ROOT = Path(__file__).parent.parent
PYTHON = "/opt/it/bin/python"
GIT = {"url": "https://example.org/x", "vcs_info": {"vcs": "git", "commit_id": "abc"}}
WAYS: list[tuple[str, Any, bool, str]] = [
    ("uv-receipt.toml", GIT, False, "uv tool install --force 'mlx-cerebrum[cpu] @ git+{url}@abc'"),
    ("pipx_metadata.json", GIT, False, "pipx install --force 'mlx-cerebrum[cpu] @ git+{url}@abc'"),
    ("", GIT, True, f"{PYTHON} -m pip install 'mlx-cerebrum[cpu] @ git+{{url}}@abc'"),
    ("", GIT, False, f"uv pip install --python {PYTHON} 'mlx-cerebrum[cpu] @ git+{{url}}@abc'"),
    (
        "uv-receipt.toml",
        {"url": "file:///a%20b", "dir_info": {"editable": True}},
        False,
        "uv tool install --force --editable '/a b[cpu]'",
    ),
    (
        "",
        {"url": "file:///a/x.whl", "archive_info": {}},
        True,
        f"{PYTHON} -m pip install 'mlx-cerebrum[cpu] @ file:///a/x.whl'",
    ),
    ("", {"url": "file:///a", "dir_info": {"editable": True}}, True, "pip install -e '/a[cpu]'"),
    ("", None, True, f"{PYTHON} -m pip install 'mlx[cpu]'"),
    ("", {"url": 3}, True, f"{PYTHON} -m pip install 'mlx-cerebrum[cpu] @ 3'"),
    ("", ["no"], True, f"{PYTHON} -m pip install 'mlx[cpu]'"),
]


@pytest.mark.parametrize(("note", "origin", "pip", "command"), WAYS)
def test_the_way_it_was_installed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    note: str,
    origin: Any,
    pip: bool,
    command: str,
) -> None:
    class Known:
        def read_text(self, name: str) -> str | None:
            return None if origin is None else json.dumps(origin)

    if note:
        (tmp_path / note).touch()
    monkeypatch.setattr(metadata, "distribution", lambda name: Known())
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(sys, "executable", PYTHON)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if pip else None)
    url = origin["url"] if isinstance(origin, dict) else ""
    assert installed.install_command("cpu", "mlx[cpu]").endswith(command.format(url=url))


def test_a_dependencys_command_can_be_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert installed.program("hf") == "hf"  # nowhere
    (tmp_path / "hf").touch()
    assert installed.program("hf") == str(tmp_path / "hf")
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/hf")
    assert installed.program("hf") == "hf"


# Every way in, without MLX's backend and without a package.

_BACKEND = "libmlx.so: cannot open shared object file: No such file or directory"
BROKEN = {
    "mlx/core.py": f"raise ImportError({_BACKEND!r}, name='core', path='/x/mlx/core.so')",
    "mlx/__init__.py": "",
}
COMMANDS = [
    "mlx_cerebrum chat demo",
    "mlx_cerebrum generate demo --prompt x",
    "mlx_cerebrum serve demo",
    "mlx_cerebrum pull cerebrum-7b",
    "mlx_cerebrum verify x",
    "mlx_cerebrum convert --mlx-path x",
    "mlx_cerebrum.chat",
    "mlx_cerebrum.server --model demo",
    "mlx_cerebrum.generate --prompt x",
    "mlx_cerebrum.demo",
    "convert --mlx-path x",
    "convert verify x",
    "convert.calibrate",
    "bench",
    "bench.recipes",
]


def started(command: str, before: Path, *, bare: bool = False) -> subprocess.CompletedProcess[str]:
    """`python -m COMMAND`, where `before` hides packages; bare: without any that is installed."""
    path = os.pathsep.join([str(before), str(ROOT)])
    words = [sys.executable, *(["-S"] if bare else []), "-m", *command.split()]
    return subprocess.run(
        words,
        env=os.environ | {"PYTHONPATH": path},
        cwd=before,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="on macOS, Metal comes with MLX")
@pytest.mark.parametrize("command", COMMANDS)
@slow
def test_without_a_backend_one_line_says_which_extra(command: str, tmp_path: Path) -> None:
    for name, text in BROKEN.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    done = started(command, tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: MLX has no backend here: install the extra [cpu], or")
    assert "[cpu]" in done.stderr.split(" install ")[-1]
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["bench", "bench.recipes", "bench.speed", "bench.render x"])
def test_without_an_extra_one_line_installs_it(command: str, tmp_path: Path) -> None:
    (tmp_path / "psutil.py").write_text("raise ModuleNotFoundError('none', name='psutil')")
    done = started(command, tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: psutil is not installed in {sys.executable}: ")
    assert "[bench]" in done.stderr.split(" install ")[-1]
    assert done.stderr.count("\n") == 1


def test_which_extra_brings_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", "/nowhere")
    needs = ["mlx>=1", "mlx[cpu]>=1; (sys_platform == 'linux') and extra == 'cpu'", "py-x>=2"]
    needs += ["lm-eval[math]>=0.4; extra == 'bench'", 'lm-eval[api]; extra == "test"', "rich"]
    monkeypatch.setattr(metadata, "requires", lambda name: needs)
    extra = {
        name: re.findall(r"\[(\w+)]'?$", str(installed.remedy(ModuleNotFoundError(name=name))))
        for name in ("mlx", "mlx.core", "py_x", "lm_eval.tasks", "lm", "rich", "other")
    }
    assert extra.pop("lm_eval.tasks") == ["bench"]
    assert not any(extra.values())


@pytest.mark.parametrize("command", ["mlx_cerebrum chat demo", "mlx_cerebrum.server", "convert"])
def test_without_an_environment_one_line_says_how_to_get_into_it(
    command: str, tmp_path: Path
) -> None:
    done = started(command, tmp_path, bare=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert f" is not installed in {sys.executable}" in done.stderr
    assert "make -C" in done.stderr or "source " in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_needs_no_mlx_runs_without_a_backend(tmp_path: Path) -> None:
    (tmp_path / "mlx").mkdir()
    for name, text in BROKEN.items():
        (tmp_path / name).write_text(text)
    for command in ("--version", "list", "plan cerebrum-12.25b"):
        done = started(f"mlx_cerebrum --models {tmp_path} {command}", tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), command


def test_a_fault_of_the_programs_own_is_shown_whole() -> None:
    assert installed.remedy(ModuleNotFoundError("x", name="mlx_cerebrum.nothing")) is None
    assert installed.remedy(ImportError("cannot import name", name="rich")) is None


def as_mac(monkeypatch: pytest.MonkeyPatch, machine: str, version: str) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "mac_ver", lambda: (version, ("", "", ""), machine))


@pytest.mark.parametrize(
    ("machine", "version", "said"),
    [
        ("arm64", "14.0", None),
        ("arm64", "26.2", None),
        ("arm64", "", None),
        ("arm64", "13.6.1", "needs macOS 14 or later, and this is 13.6.1"),
        ("x86_64", "26.2", "is a Python for Intel Macs"),
    ],
)
def test_a_mac_that_mlx_can_not_run_on(
    monkeypatch: pytest.MonkeyPatch, machine: str, version: str, said: str | None
) -> None:
    as_mac(monkeypatch, machine, version)
    line = installed.unfit()
    assert line is None if said is None else said in str(line)
    # Whichever way MLX fails there.
    errors = [
        ModuleNotFoundError("No module named 'mlx'", name="mlx"),
        ImportError("incompatible architecture", name="mlx.core", path="/x/mlx/core.so"),
    ]
    for error in errors:
        remedy = installed.remedy(error)
        assert remedy == line if said is not None else remedy != line or remedy is None
    own = ModuleNotFoundError("No module named 'mlx_cerebrum.x'", name="mlx_cerebrum.x")
    assert installed.remedy(own) is None  # a fault of the program's own


def test_a_program_is_told_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'mlx'", name="mlx")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match="No module named 'mlx'"):
        _ = mlx_cerebrum.load
    as_mac(monkeypatch, "x86_64", "26.2")
    with pytest.raises(ImportError, match="is a Python for Intel Macs"):
        _ = mlx_cerebrum.load


AS_INTEL = """
import platform, runpy, sys
sys.platform, platform.machine = "darwin", lambda: "x86_64"
sys.modules["mlx"] = None
words = sys.argv[1:]
sys.argv = ["x", *words[1:]]
runpy.run_module(words[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("command", ["mlx_cerebrum.chat", "mlx_cerebrum doctor", "convert"])
def test_a_python_for_intel_is_told_so_by_every_command(command: str, tmp_path: Path) -> None:
    words = [sys.executable, "-c", AS_INTEL, *command.split()]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == (1 if "doctor" in command else 2)
    assert "is a Python for Intel Macs: MLX needs one for Apple silicon" in (
        done.stdout + done.stderr
    )
    assert "Traceback" not in done.stderr
