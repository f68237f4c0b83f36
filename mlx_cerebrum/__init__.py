"""Cerebrum on Apple silicon: blocks stored once, run in any order.

The names below load on first use, so that planning never imports MLX and `python -m
mlx_cerebrum.generate` imports its module once.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036, the first thing that an older Python reads
    sys.exit("error: Python 3.11 or newer is needed, and this is " + sys.version.split()[0])

import importlib
import os
import types
from collections.abc import Callable, Mapping
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_cerebrum.decoding.sampling import make_sampler
    from mlx_cerebrum.decoding.stream import generate, stream_generate
    from mlx_cerebrum.errors import CerebrumError
    from mlx_cerebrum.model.config import ModelConfig
    from mlx_cerebrum.plan.layer_plan import LayerPlan
    from mlx_cerebrum.weights.opening import load

__version__ = "0.1.0"

# Left alone, MLX multiplies several rows of float32 in TF32, which has 10 bits of mantissa, on GPUs
# that can (M5, NVIDIA's from Ampere on), and a single row in float32: a token would depend on its
# company. It reads this at its first product. Products in 16 bits are the same either way.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

_HOMES = {
    "load": "mlx_cerebrum.weights.opening",
    "generate": "mlx_cerebrum.decoding.stream",
    "stream_generate": "mlx_cerebrum.decoding.stream",
    "make_sampler": "mlx_cerebrum.decoding.sampling",
    "LayerPlan": "mlx_cerebrum.plan.layer_plan",
    "ModelConfig": "mlx_cerebrum.model.config",
    "CerebrumError": "mlx_cerebrum.errors",
}

__all__ = [
    "CerebrumError",
    "LayerPlan",
    "ModelConfig",
    "__version__",
    "generate",
    "load",
    "make_sampler",
    "stream_generate",
]


def lazily(home: str, *names: str) -> Callable[[str], Any]:
    """A room's `__getattr__`: these names of its module `home`, loaded when one is asked for."""

    def get(name: str) -> Any:
        if name in names:
            return getattr(importlib.import_module(home), name)
        raise AttributeError(f"module {home.rpartition('.')[0]!r} has no attribute {name!r}")

    return get


def _home(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(_HOMES[name])
    except ImportError as error:
        from mlx_cerebrum.installed import unfit

        if (line := unfit()) is None:
            raise
        raise ImportError(line, name=error.name, path=error.path) from error


class _Package(types.ModuleType):
    """Resolves the public names. `generate` is also a command's module, and importing that would
    otherwise put the module where the function is expected."""

    def __getattribute__(self, name: str) -> Any:
        if name in _HOMES:
            return getattr(_home(name), name)
        return super().__getattribute__(name)


class Moved(Loader):
    """Modules by the names they had before they moved: finds `mlx_cerebrum.hub` as
    `mlx_cerebrum.weights.hub`, for programs that import it so. Asked when all else has failed."""

    PACKAGE = __name__
    ROOMS: tuple[str, ...] = ("files", "model", "plan", "tokenizer", "weights", "decoding")
    RENAMED: Mapping[str, str] = types.MappingProxyType(
        {
            "load": "weights.opening",
            "gguf": "weights.gguf_checkpoint",
            "gguf_tokenizer": "tokenizer.gguf_vocabulary",
            "tokenizer_files": "tokenizer.files",
            "memory_limits": "model.limits",
            "plan_mergekit": "plan.mergekit",
            "plan_yaml": "plan.yaml_places",
            "plan_show": "plan.show",
            "model_args": "flags",
            **{
                f"{room}template_{name}": f"tokenizer.jinja.{name}"
                for room in ("", "tokenizer.")
                for name in ("text", "values", "filters", "run")
            },
        }
    )

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, old = name.partition(".")
        if package != self.PACKAGE or ("." in old and old not in self.RENAMED):
            return None
        homes = [self.RENAMED[old]] if old in self.RENAMED else [f"{r}.{old}" for r in self.ROOMS]
        found = next((home for home in homes if find_spec(f"{package}.{home}")), None)
        return None if found is None else ModuleSpec(name, self, origin=f"{package}.{found}")

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        module = importlib.import_module(str(spec.origin))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """It has run; it keeps its own name's spec."""
        state = module.__spec__.loader_state if module.__spec__ else None
        if isinstance(state, ModuleSpec):
            module.__spec__ = state


sys.modules[__name__].__class__ = _Package
sys.meta_path.append(Moved())
