"""Which room may import which, and what a greedy run must not load."""

import ast
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# The runtime's rooms, lowest floor first: one imports its own modules and what is on a lower floor.
FLOORS = [
    ["errors"],
    ["device", "text", "files", "typeset", "installed"],
    ["cli", "progress"],
    ["tokenizer", "model"],
    ["plan", "machine"],
    ["shelf"],
    ["weights"],
    ["ranks"],
    ["decoding"],
    ["flags"],
    ["generate", "demo", "chat", "server", "doctor", "prompt_cache", "speculative"],
    ["service"],
    ["__main__"],
]
PURE = [
    "errors",
    "text",
    "typeset.plain",
    "typeset.worker",
    "files.json_file",
    "model.config",
    "model.tensors",
    "tokenizer.tokenizer",
]
PURE += [f"plan.{name}" for name in ("layer_plan", "yaml_places", "mergekit", "show", "__main__")]
FLOOR = {name: floor for floor, rooms in enumerate(FLOORS) for name in rooms}
PACKAGES = ("mlx_cerebrum", "convert")


def imports(path: Path) -> set[str]:
    """Every module a file imports, at any depth of its code."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def modules(*packages: str) -> dict[str, Path]:
    """Every module of these packages by its dotted name, a package by its own."""
    found = {}
    for path in (path for package in packages for path in sorted((ROOT / package).rglob("*.py"))):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


RUNTIME = modules("mlx_cerebrum")


def room(module: str) -> str:
    """The room of a module of the runtime: `weights` of `mlx_cerebrum.weights.hub`."""
    return [*module.split("."), ""][1]


def test_every_module_has_a_room() -> None:
    assert {room(name) for name in RUNTIME} - {""} == set(FLOOR)


@pytest.mark.parametrize("name", RUNTIME)
def test_imports_go_down(name: str) -> None:
    for module in imports(RUNTIME[name]):
        package = module.split(".")[0]
        assert package not in ("convert", "bench", "tests"), f"{name} imports {module}"
        if package == "mlx_cerebrum" and room(name) and room(module) in FLOOR:
            lower = FLOOR[room(module)] < FLOOR[room(name)]
            assert lower or room(module) == room(name), f"{name} imports {module}"


def test_nothing_imports_in_a_circle() -> None:
    known = modules(*PACKAGES)
    del known["mlx_cerebrum"]  # it loads its names when they are asked for
    left = {name: imports(path) & known.keys() - {name} for name, path in known.items()}
    while ends := {name for name, wanted in left.items() if not wanted & left.keys()}:
        left = {name: wanted for name, wanted in left.items() if name not in ends}
    while starts := left.keys() - {*chain(*left.values())}:
        left = {name: wanted for name, wanted in left.items() if name not in starts}
    assert not left, f"these import each other: {sorted(left)}"


def test_the_forward_pass_knows_no_memory_budget() -> None:
    known = RUNTIME.keys() - {"mlx_cerebrum"}  # it loads its names when they are asked for
    left, seen = {"mlx_cerebrum.model.forward"}, set[str]()
    while left:
        name = left.pop()
        seen.add(name)
        left |= imports(RUNTIME[name]) & known - seen
    assert "mlx_cerebrum.model.cpu" in seen
    assert not seen & {"mlx_cerebrum.model.memory", "mlx_cerebrum.model.limits"}


def test_rooms_beside_each_other_do_not_meet() -> None:
    for room, other in (("convert", "bench"), ("bench", "convert")):
        for path in (ROOT / room).glob("*.py"):
            assert not any(m.split(".")[0] == other for m in imports(path)), path


def test_heavy_packages_are_imported_where_used() -> None:
    heavy = {"mlx_lm", "transformers", "torch", "huggingface_hub", "rich", "prompt_toolkit"}
    heavy |= {"fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client", "llguidance"}
    heavy |= {"math_core", "pygments"}
    own = {"plan.show": {"rich"}, "demo": {"rich"}, "chat": {"rich", "prompt_toolkit"}}
    own["server"] = heavy - {"transformers", "torch", "huggingface_hub", "prompt_toolkit"}
    own["server"].remove("llguidance")
    for name, path in RUNTIME.items():
        allowed = own.get(name.removeprefix("mlx_cerebrum."), own.get(room(name), set()))
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # top level only
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not {name.split(".")[0] for name in names} & (heavy - allowed), path


@pytest.mark.parametrize("name", ["model", "plan"])
def test_these_packages_import_nothing_of_ours(name: str) -> None:
    wanted = imports(RUNTIME[f"mlx_cerebrum.{name}"]) - {"mlx_cerebrum", "mlx_cerebrum.lazily"}
    assert not [module for module in wanted if module.startswith(("mlx", "convert"))]


@pytest.mark.parametrize("name", PURE)
def test_pure_rooms_need_no_mlx(name: str) -> None:
    code = f"import sys, mlx_cerebrum.{name}; sys.exit('mlx.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("flags", [[], ["--temp", "0.7", "--top-p", "0.9", "--min-p", "0.05"]])
def test_an_answer_loads_neither_transformers_nor_mlx_lm(demo: Path, flags: list[str]) -> None:
    code = (
        "import sys; from mlx_cerebrum.generate import main;"
        f"main(['--model', {str(demo)!r}, '--prompt', 'Hi', '--max-tokens', '2', *{flags}]);"
        "sys.exit(any(m in sys.modules for m in ('transformers', 'mlx_lm', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_public_names() -> None:
    import mlx_cerebrum
    import mlx_cerebrum.generate
    import mlx_cerebrum.prompt_cache
    import mlx_cerebrum.speculative

    assert callable(mlx_cerebrum.load)
    assert callable(mlx_cerebrum.prompt_cache.PromptCache)
    assert callable(mlx_cerebrum.speculative.speculation)
    assert callable(mlx_cerebrum.generate)
    assert callable(mlx_cerebrum.stream_generate)
    assert mlx_cerebrum.LayerPlan.named("cerebrum-7b").layer_map(32) == tuple(range(32))


OLD = """
from mlx_cerebrum import hub
from mlx_cerebrum.checkpoint import Checkpoint
from mlx_cerebrum.gguf_file import GGUFFile
from mlx_cerebrum.load import load
from mlx_cerebrum.model import Model
from mlx_cerebrum.plan import LayerPlan
from mlx_cerebrum.sentencepiece_model import read_pieces
from mlx_cerebrum.template_text import Budget
from mlx_cerebrum.tokenizer.template_run import parse
from mlx_cerebrum.tokenizer import Tokenizer
from convert.arguments import parser
from convert.gguf_stream import new_file
from convert.sensitivity import Sensitivity
import mlx_cerebrum.quantize, mlx_cerebrum
import mlx_cerebrum.weights.quantize, mlx_cerebrum.weights.hub, mlx_cerebrum.weights.gguf_file
assert mlx_cerebrum.quantize is mlx_cerebrum.weights.quantize
assert hub is mlx_cerebrum.weights.hub and hub.__spec__.name == hub.__name__
assert GGUFFile is mlx_cerebrum.weights.gguf_file.GGUFFile
assert load is mlx_cerebrum.load
assert parse.__module__ == "mlx_cerebrum.tokenizer.jinja.run"
try:
    import mlx_cerebrum.nothing
except ModuleNotFoundError as error:
    assert error.name == "mlx_cerebrum.nothing"
else:
    raise SystemExit("found")
"""


def test_names_from_before_the_rooms_are_found() -> None:
    done = subprocess.run([sys.executable, "-c", OLD], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
