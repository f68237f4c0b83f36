"""What doctor says: true of this machine, and nobody's name in it."""

import getpass
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import MakeCheckpoint, slow

from mlx_cerebrum import __version__, device
from mlx_cerebrum.__main__ import main
from mlx_cerebrum.doctor import pace, report
from mlx_cerebrum.doctor.pace import Pace

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    monkeypatch.setenv("MLX_CEREBRUM_MODELS", str(folder))
    return folder


def told(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main(["doctor", "--seconds", "0", "--json", *flags])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return code, found


def test_it_is_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = told(capsys)
    assert (code, found["usable"], found["stops"]) == (0, True, [])
    assert found["version"] == __version__
    assert found["packages"]["mlx"] == metadata.version("mlx")
    assert found["python"] == platform.python_version()
    assert found["architecture"] == platform.machine()
    assert found["backend"] == device.backend()
    assert found["memory_bytes"] > found["available_bytes"] > 0
    assert found["disk_free_bytes"] > 0
    assert found["models"] == []
    assert any("mlx-cerebrum pull" in line for line in found["advice"])


def test_models_on_the_shelf(
    capsys: pytest.CaptureFixture[str],
    checkpoint: MakeCheckpoint,
    shelf: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint().rename(shelf / "small-16bit")
    (shelf / "bad-16bit").mkdir()
    (shelf / "bad-16bit" / "config.json").write_text("{}")
    models = {row["name"]: row for row in told(capsys)[1]["models"]}
    assert models["small:16bit"]["fits"] is True
    assert models["bad:16bit"] == {"name": "bad:16bit", "damaged": True}
    monkeypatch.setattr(report, "available_bytes", lambda: 1)
    models = {row["name"]: row for row in told(capsys)[1]["models"]}
    assert models["small:16bit"]["fits"] is False


def test_the_text_is_fit_for_a_bug_report(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["doctor", "--seconds", "0"]) == 0
    out = capsys.readouterr().out
    assert str(tmp_path) not in out
    assert "models in ~/models" in out
    assert platform.node() not in out or len(platform.node()) < 4
    assert getpass.getuser() not in out or getpass.getuser() == "root"
    assert out.endswith("models can run here\n")
    assert max(map(len, out.splitlines())) < 200


@slow
def test_a_pace_of_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, demo: Path
) -> None:
    monkeypatch.setattr(pace, "_CHUNK", 4)
    assert main(["doctor", "--seconds", "0.2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["pace"]
    assert found["model"].startswith("the demo model")
    assert found["written_per_second"] > 0
    assert found["read_per_second"] > 0
    assert found["weights_bytes"] > 10**8


def test_without_the_demo_a_random_model_is_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pace, "has_demo", lambda: False)
    small = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
    monkeypatch.setattr(pace, "_RANDOM", pace._RANDOM | small)
    found = pace.measure(0.2)
    assert not found.is_demo
    assert "the demo model is not here" in found.model
    assert found.bandwidth > 1e8
    monkeypatch.setattr(pace, "measure", lambda seconds: found)
    assert main(["doctor", "--json"]) == 0
    advice = json.loads(capsys.readouterr().out)["advice"]
    assert any("pull demo" in line for line in advice)


def as_mac(monkeypatch: pytest.MonkeyPatch, machine: str, **values: int) -> None:
    """A Mac, as far as the report asks."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "mac_ver", lambda: ("14.5", ("", "", ""), machine))
    monkeypatch.setattr(report, "sysctl_number", lambda name: values.get(name.split(".")[-1]))
    monkeypatch.setattr(report, "chip", lambda: "Apple M2")
    monkeypatch.setattr(report, "is_short", lambda: False)
    monkeypatch.setattr(report, "unused_bytes", lambda: 3 * 10**9)
    size = {"max_recommended_working_set_size": 11_453_251_584, "max_buffer_length": 8_589_934_592}
    monkeypatch.setattr(mx, "device_info", lambda *_: size)


def test_a_mac(monkeypatch: pytest.MonkeyPatch, checkpoint: MakeCheckpoint, shelf: Path) -> None:
    checkpoint().rename(shelf / "small-16bit")
    as_mac(monkeypatch, "arm64", wired_limit_mb=12000)
    monkeypatch.setattr(device, "backend", lambda: "metal")
    monkeypatch.setattr(report, "memory_bytes", lambda: 16 * 2**30)
    large = {"name": "large:8bit", "needs_bytes": 12_200_000_000, "fits": False}
    monkeypatch.setattr(report, "_entry", lambda entry: (large, "large:8bit: does not fit now"))
    found = report.report(Pace("the demo model", True, 10**9, 100.0, 50.0, 9e10))
    facts = dict(found.facts)
    assert facts["system"] == "macOS 14.5"
    assert facts["Metal"] == "11.45 GB to work with, 8.59 GB in one buffer"
    assert "Metal allows" in facts["memory"]
    assert facts["other programs"] == "leave 3.00 GB before macOS swaps"
    assert facts["wired limit"] == "12000 MB (iogpu.wired_limit_mb)"
    assert facts["bandwidth"] == "about 90 GB/s of weights are read"
    assert found.stops == []
    assert "sudo sysctl iogpu.wired_limit_mb=12717" in found.advice[0]
    large["needs_bytes"] = 16_000_000_000  # nothing helps
    assert not any("sudo" in line for line in report.report(None).advice)


@pytest.mark.parametrize("translated", [1, 0])
def test_a_python_for_intel(monkeypatch: pytest.MonkeyPatch, translated: int) -> None:
    as_mac(monkeypatch, "x86_64", proc_translated=translated)
    monkeypatch.setattr(device, "backend", lambda: "cpu")
    found = report.report(None)
    assert ("Rosetta" in dict(found.facts)["Python"]) == bool(translated)
    assert any("Apple silicon" in line for line in found.stops)
    assert any("Metal" in line for line in found.stops)


def test_a_device_that_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_: Any) -> None:
        raise RuntimeError(f"[cuda] no driver in {Path.home()}/drivers\nat all")

    monkeypatch.setattr(report, "_memory", fails)
    code, found = told(capsys)
    assert (code, found["usable"]) == (1, False)
    assert found["stops"][0].startswith("MLX fails here ([cuda] no driver in ~/drivers at all)")


def test_without_a_backend_it_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "core.py").write_text("raise ImportError('libmlx.so: cannot open')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from mlx_cerebrum.doctor.__main__ import main; sys.exit(main([]))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1
    assert "MLX can't be loaded here" in done.stdout
    assert done.stderr == ""


@pytest.mark.skipif(sys.platform != "linux", reason="a Mac has Accelerate")
def test_an_openblas_older_than_the_processor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device, "backend", lambda: "cpu")
    monkeypatch.setattr(device, "has_openblas", lambda: True)
    monkeypatch.setattr(device, "openblas_kernels", lambda: "Prescott")
    monkeypatch.setattr(device, "better_kernels", lambda: "Haswell")
    _, found = told(capsys)
    assert found["blas"] == "OpenBLAS (Prescott)"
    assert any("OPENBLAS_CORETYPE=Haswell" in line for line in found["advice"])
