"""What MLX computes on is asked in one place, and at the moment it matters."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from bench.random_model import GEOMETRIES
from mlx_cerebrum import device
from mlx_cerebrum.chat.session import DecodingOptions
from mlx_cerebrum.decoding.decode import prefill_step
from mlx_cerebrum.model import attention, cpu, forward
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.cpu import Rotary
from mlx_cerebrum.model.memory import keeps_scores

TF32 = "MLX_ENABLE_TF32"
ROOT = Path(__file__).parent.parent
FILES = [
    p for folder in ("mlx_cerebrum", "convert", "bench") for p in (ROOT / folder).rglob("*.py")
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_else_asks_mlx(path: Path) -> None:
    if path == ROOT / "mlx_cerebrum" / "device.py":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("mx", "mx.metal"):
            asked = ("default_device", "is_available", "is_gpu", "device_info")
            assert node.attr not in asked, node.lineno
        if isinstance(node, ast.ImportFrom):  # a function's name would keep the one there was
            assert node.module != "mlx_cerebrum.device", node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_asks_while_it_is_imported(path: Path) -> None:
    """Nor in a default, which is computed then too."""
    left: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while left:
        node = left.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            left += [*node.decorator_list, node.args]
        elif not isinstance(node, ast.Lambda):
            left += ast.iter_child_nodes(node)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert not called.startswith("device."), node.lineno
            assert called not in ("prefill_step", "packed_rows"), node.lineno


def test_the_answer_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for metal in (False, True):
        monkeypatch.setattr(mx.metal, "is_available", lambda metal=metal: metal)
        for kind, expected in ((mx.gpu, "metal" if metal else "cuda"), (mx.cpu, "cpu")):
            monkeypatch.setattr(mx, "default_device", lambda kind=kind: mx.Device(kind))
            assert device.backend() == expected
            assert device.on_gpu() == (expected != "cpu")
            assert device.on_linux_cpu() == (expected == "cpu" and sys.platform == "linux")


def test_the_gpu_is_asked_about_whichever_device_is_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mx, "device_info", lambda of: {"of": str(of)})
    assert device.gpu_info() == {"of": str(mx.gpu)}


@pytest.mark.parametrize(("chosen", "used"), [(None, "0"), ("1", "1")])
def test_float32_is_not_tf32_unless_someone_chose_so(chosen: str | None, used: str) -> None:
    """As C sees the environment, after the package and before MLX."""
    environment = {name: value for name, value in os.environ.items() if name != TF32}
    environment |= {} if chosen is None else {TF32: chosen}
    code = (
        "import ctypes, sys; import mlx_cerebrum; assert 'mlx.core' not in sys.modules;"
        "get = ctypes.CDLL(None).getenv; get.restype = ctypes.c_char_p;"
        f"print(get(b'{TF32}').decode())"
    )
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert run.stdout.decode().strip() == used, run.stderr.decode()


@pytest.mark.parametrize("backend", ["cpu", "cuda", "metal"])
def test_every_place_follows(backend: device.Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "backend", lambda: backend)
    gpu, linux_cpu = backend != "cpu", backend == "cpu" and sys.platform == "linux"
    called: list[str] = []

    def note(owner: Any, name: str) -> None:
        run = getattr(owner, name)

        def noted(*args: Any, **named: Any) -> Any:
            called.append(name)
            return run(*args, **named)

        monkeypatch.setattr(owner, name, noted)

    note(mx.fast, "rope")
    note(cpu, "_pieces")
    monkeypatch.setattr(forward, "_swiglu_in_one", lambda *_: called.append("compiled"))
    x = mx.ones((1, 1, 1, 32))
    Rotary(32, 10000.0)(x, 3)
    cpu.multiply(x, mx.ones((4, 32)))
    forward.swiglu(x, x)
    assert called == ["rope", "compiled"] * gpu + ["_pieces"] * linux_cpu
    assert prefill_step() == DecodingOptions().prefill_step_size == (512 if gpu else 256)
    assert prefill_step(7) == 7
    assert attention.packed_rows() == {"cpu": 1, "cuda": 0, "metal": 64}[backend]
    assert cpu.in_slices(512, 512, mx.float32, "causal") == linux_cpu
    config = ModelConfig.from_dict(GEOMETRIES["cerebrum-7b"])
    assert keeps_scores(config, 4) == (backend != "metal")


@pytest.mark.parametrize(
    ("chosen", "able", "better"),
    [
        ("Prescott", "sse2 avx2 fma avx512f avx512vl", "SkylakeX"),
        ("Prescott", "sse2 avx2 fma", "Haswell"),
        ("Prescott", "sse2", None),
        ("Zen", "sse2 avx2 fma avx512f avx512vl", None),
    ],
)
def test_kernels_for_a_processor_that_openblas_does_not_know(
    chosen: str, able: str, better: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cpuinfo").write_text(f"model name: x\nflags: {able}\n")
    monkeypatch.setattr(device, "has_openblas", lambda: True)
    monkeypatch.setattr(device, "openblas_kernels", lambda: chosen)
    monkeypatch.setattr(device, "_CPU", tmp_path / "cpuinfo")
    assert device.better_kernels() == better


@pytest.mark.skipif(sys.platform != "linux", reason="a Mac has Accelerate")
def test_make_takes_the_same_kernels() -> None:
    """Its rule is the one here, said again before there is a Python to ask."""
    openblas = device.installed_openblas()
    if openblas is None or shutil.which("make") is None:
        pytest.skip("needs make and OpenBLAS")
    bare = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "OPENBLAS_CORETYPE")}

    def said(*command: str, **more: str) -> str:
        done = subprocess.run(command, cwd=ROOT, env=bare | more, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    asking = "from mlx_cerebrum import device; print(device.better_kernels())"
    better = said(sys.executable, "-c", asking, LD_PRELOAD=str(openblas)).strip()
    made = said("make", "-n", "serve")
    assert f"LD_PRELOAD={openblas} " in made
    assert re.findall(r"OPENBLAS_CORETYPE=(\w+)", made) == ([] if better == "None" else [better])
