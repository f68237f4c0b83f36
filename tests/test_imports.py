"""Which room may import which, and what a greedy run must not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Every module of the runtime, lowest room first: it may import only what stands before it.
ROOMS = [
    ["errors"],
    ["foreign"],
    ["open_files"],
    ["text"],
    ["cli", "progress", "json_file"],
    ["config"],
    ["plan_yaml"],
    ["plan_mergekit"],
    ["plan"],
    ["plan_show"],
    ["marks"],
    ["cache"],
    ["attention_cpu"],
    ["attention"],
    ["memory_limits"],
    ["memory"],
    ["shared_weights", "rotary", "linear"],
    ["model"],
    ["quantize"],
    ["safetensors_file"],
    ["gguf_paths"],
    ["gguf_file"],
    ["gguf_blocks"],
    ["gguf"],
    ["detokenizer"],
    ["vocabulary"],
    ["sentencepiece_model", "tokenizer_json"],
    ["gguf_tokenizer"],
    ["template_text"],
    ["template_values"],
    ["template_filters"],
    ["template_run"],
    ["chat_formats"],
    ["template"],
    ["tokenizer_files"],
    ["tokenizer"],
    ["checkpoint"],
    ["gguf_checkpoint"],
    ["hub"],
    ["load"],
    ["decode"],
    ["sampling"],
    ["cost"],
    ["policy"],
    ["drafters"],
    ["draft_models"],
    ["speculative"],
    ["prompt_cache"],
    ["prompt_cache_identity"],
    ["prompt_cache_file"],
    ["stream"],
    ["conversation"],
    ["model_args"],
    ["generate_args"],
    ["generate", "demo"],
    ["views"],
    ["chat", "server"],
    ["__main__"],
]
PURE = [
    "errors",
    "text",
    "json_file",
    "config",
    "plan",
    "plan_yaml",
    "plan_mergekit",
    "plan_show",
    "tokenizer",
    "template",
]
RANK = {name: rank for rank, room in enumerate(ROOMS) for name in room}


def imports(path: Path) -> set[str]:
    """Every module a file imports, at any depth of its code."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def files(room: str) -> list[Path]:
    """A module's file, or all of a package's."""
    path = ROOT / "mlx_cerebrum" / room
    return sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def test_every_module_has_a_room() -> None:
    package = ROOT / "mlx_cerebrum"
    modules = {path.stem for path in package.glob("*.py")} - {"__init__"}
    assert modules | {path.parent.name for path in package.glob("*/__init__.py")} == set(RANK)


def test_imports_go_one_way() -> None:
    for name, rank in RANK.items():
        for module in set().union(*map(imports, files(name))):
            package, _, rest = module.partition(".")
            assert package not in ("convert", "bench", "tests"), f"{name} imports {module}"
            other = rest.split(".")[0]
            if package == "mlx_cerebrum" and other in RANK and other != name:
                lazy = (name, other) in {("plan", "plan_show"), ("checkpoint", "gguf_checkpoint")}
                assert RANK[other] < rank or lazy, f"{name} imports {module}"


def test_rooms_beside_each_other_do_not_meet() -> None:
    for room, other in (("convert", "bench"), ("bench", "convert")):
        for path in (ROOT / room).glob("*.py"):
            assert not any(m.split(".")[0] == other for m in imports(path)), path


def test_heavy_packages_are_imported_where_used() -> None:
    heavy = {"mlx_lm", "transformers", "torch", "huggingface_hub", "rich", "prompt_toolkit"}
    heavy |= {"fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client"}
    own = {"plan_show": {"rich"}, "demo": {"rich"}, "chat": {"rich", "prompt_toolkit"}}
    own["server"] = heavy - {"transformers", "torch", "huggingface_hub", "prompt_toolkit"}
    for path in (path for name in RANK for path in files(name)):
        allowed = own.get(path.parent.name, own.get(path.stem, set()))
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # top level only
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not {name.split(".")[0] for name in names} & (heavy - allowed), path


@pytest.mark.parametrize("name", PURE)
def test_pure_rooms_need_no_mlx(name: str) -> None:
    code = f"import sys, mlx_cerebrum.{name}; sys.exit('mlx.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_greedy_path_loads_neither_transformers_nor_mlx_lm(demo: Path) -> None:
    code = (
        "import sys; from mlx_cerebrum.generate import main;"
        f"main(['--model', {str(demo)!r}, '--prompt', 'Hi', '--max-tokens', '2', '--quiet']);"
        "sys.exit(any(m in sys.modules for m in ('transformers', 'mlx_lm', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_public_names() -> None:
    import mlx_cerebrum
    import mlx_cerebrum.generate
    import mlx_cerebrum.load

    assert callable(mlx_cerebrum.load)
    assert callable(mlx_cerebrum.generate)
    assert callable(mlx_cerebrum.stream_generate)
    assert mlx_cerebrum.LayerPlan.named("cerebrum-7b").layer_map(32) == tuple(range(32))
