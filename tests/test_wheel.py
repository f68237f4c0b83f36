"""The wheel, built and installed outside the repository."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (built,) = out.glob("*.whl")
    return built


def test_what_it_ships(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"mlx_cerebrum", "convert"}
    assert "mlx_cerebrum/py.typed" in names
    plans = ("cerebrum-12.25b", "cerebrum-7b")
    assert {f"mlx_cerebrum/plan/named/{name}.yml" for name in plans} <= set(names)
    page = (ROOT / "mlx_cerebrum/server/page").iterdir()
    assert {f"mlx_cerebrum/server/page/{file.name}" for file in page} <= set(names)
    assert {"convert/mlx_lm_model.py", "convert/data/sensitivity.json"} <= set(names)
    assert not any(name.endswith((".safetensors", ".gguf")) for name in names)


@pytest.mark.long
def test_installed_elsewhere_it_runs(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own that borrows this one's packages, but not this checkout,
    and from a folder with a stray `convert.py`."""
    env = tmp_path / "env"
    venv.create(env, with_pip=False)
    python = env / "bin" / "python"
    site = next((env / "lib").glob("python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    borrowed = [p for p in sys.path if p.endswith("site-packages")]
    (site / "borrow.pth").write_text(f"import sys; sys.path += {borrowed!r}\n")
    (tmp_path / "convert.py").write_text("raise SystemExit('the stray one ran')\n")
    script = env / "bin" / "mlx-cerebrum"  # where an installer puts a console script
    script.write_text("import sys\nfrom mlx_cerebrum.__main__ import main\nsys.exit(main())\n")

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(python), str(script), *words], capture_output=True, text=True, cwd=tmp_path
        )

    where = subprocess.run(
        [str(python), "-P", "-c", "import mlx_cerebrum, convert; print(convert.__file__)"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert str(site) in where.stdout, where.stderr
    done = run("plan", "cerebrum-12.25b")
    assert done.returncode == 0, done.stderr
    assert "12,476,420,096" in done.stdout
    done = run("convert", "--hf-path", "demo", "--plan", "demo-interleaved", "--mlx-path", "out")
    assert done.returncode == 0, done.stderr
    done = run("generate", "--model", "out", "--prompt", "Hi", "--max-tokens", "3", "--quiet")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    for command in ("chat", "serve"):
        assert run(command, "--help").returncode == 0
    assert run("--version").stdout.startswith("mlx-cerebrum 0.")
    assert run("dance").returncode == 2
