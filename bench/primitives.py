"""How many graph primitives one decode step and one prefill chunk are made of.

python -m bench.primitives                          the demo model's shapes
python -m bench.primitives --geometry cerebrum-7b   the 7B's and the 12.25B's; --q-bits 4

Where weights are few, or bandwidth is large, launching kernels is what a step costs besides
reading them, so their number is what is left to win. Counted are mlx-lm's model, ours with its
projections as they are stored, ours as it is loaded, and that as one compiled function; as this
backend gets it, and as Metal would. Nothing is computed and no weights are loaded
(see bench/graphs.py). Every position is counted with a block of its own: one that runs twice
adds the same, except that a compiled function has the views of its weights once.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from bench import machine
from bench.graphs import VIEWS, Counts, at, count, count_as_on_metal, hollow, kernels, line
from bench.pair import formula
from bench.random_model import GEOMETRIES
from bench.report import parser, public, publish, table
from bench.step_kinds import forget
from bench.suite import Results
from mlx_cerebrum import cli, device
from mlx_cerebrum.decoding.decode import greedy, prefill_step
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.plan.layer_plan import LayerPlan
from mlx_cerebrum.weights import hub
from mlx_cerebrum.weights.loading import fuse_projections
from mlx_cerebrum.weights.opening import open_checkpoint
from mlx_cerebrum.weights.quantize import Packing

Caches = Sequence[Any]
# A model, its caches and tokens [1, L] -> the arrays that running this pass evaluates.
Step = Callable[[nn.Module, Caches, mx.array], Any]
Make = Callable[[ModelConfig, int | None], nn.Module]  # shapes and bits -> a hollow model

_CONTEXT = 64  # tokens before a pass: any number that leaves the caches room for one more
# The fewest that have a first and a last position which differ, and more; both are counted, and
# all other numbers follow.
_COUNTED = (2, 4)


def ours(config: ModelConfig, bits: int | None, *, fused: bool = True) -> nn.Module:
    """The model; `fused`: its projections joined, as the loader does."""
    model = Model(config)
    for block in model.model.layers if fused else ():
        fuse_projections(block)
    return hollow(model, bits)


def mlx_lm(config: ModelConfig, bits: int | None) -> nn.Module:
    """mlx-lm's model of the same shapes, with a layer for each position."""
    from mlx_lm.models.llama import Model as Peer
    from mlx_lm.models.llama import ModelArgs

    raw = asdict(config) | {"num_hidden_layers": config.num_positions, "model_type": "llama"}
    return hollow(Peer(ModelArgs.from_dict(raw)), bits)


def decode(model: nn.Module, cache: Caches, tokens: mx.array) -> Any:
    return greedy(model(tokens, cache)[:, -1])


def prefill(model: nn.Module, cache: Caches, tokens: mx.array) -> Any:
    model(tokens, cache)
    return [layer.state for layer in cache]


def compiled(step: Step, model: nn.Module, cache: Caches, tokens: mx.array) -> Any:
    """`step` as one compiled function of the tokens and of every cache's arrays."""

    def run(tokens: mx.array, held: list[tuple[mx.array, mx.array]]) -> Any:
        for layer, (keys, values) in zip(cache, held, strict=True):
            layer.keys, layer.values = keys, values
        return step(model, cache, tokens), [(layer.keys, layer.values) for layer in cache]

    return mx.compile(run)(tokens, [(layer.keys, layer.values) for layer in cache])


PASSES: dict[str, Step] = {"decode": decode, "prefill": prefill}
SIDES: dict[str, tuple[Make, Callable[[Step], Step]]] = {
    "mlx-lm": (mlx_lm, lambda step: step),
    "ours, not fused": (partial(ours, fused=False), lambda step: step),
    "ours": (ours, lambda step: step),
    "ours, compiled": (ours, lambda step: partial(compiled, step)),
}


def caches(model: nn.Module, config: ModelConfig) -> Caches:
    """The model's own caches after `_CONTEXT` tokens."""
    if isinstance(model, Model):
        cache: Caches = model.make_cache()
    else:
        from mlx_lm.models.cache import make_prompt_cache

        cache = make_prompt_cache(model)
    shape = (1, config.num_key_value_heads, _CONTEXT, config.head_dim)
    entries = mx.zeros(shape, model.model.norm.weight.dtype)
    for layer in cache:
        layer.update_and_fetch(entries, entries)
    mx.eval([(layer.keys, layer.values) for layer in cache])
    return cache


def primitives(
    make: Make, step: Step, config: ModelConfig, length: int, backend: str, bits: int | None = None
) -> Counts:
    """Of one pass over `length` tokens. `backend` is this machine's, or "metal"."""
    model = make(config, bits)
    run = partial(step, model, caches(model, config), mx.zeros((1, length), mx.int32))
    here = backend == device.backend()
    forget()
    counts = count(run()) if here else count_as_on_metal(run, config.head_dim)
    forget()  # the compiled function's are for no one else
    return counts


def measure(
    config: ModelConfig, positions: Sequence[int], chunk: int, bits: int | None = None
) -> Results:
    """By backend, pass and side: primitives for each position, besides, and at `positions`."""

    def side(make: Make, step: Step, length: int, backend: str) -> Results:
        found = {}
        for n in _COUNTED:
            shapes = replace(config, num_hidden_layers=n, layer_map=tuple(range(n)))
            shapes = replace(shapes, residual_scales=None)
            found[n] = primitives(make, step, shapes, length, backend, bits)
        per, besides = line(found)
        every = {str(n): at(n, per, besides) for n in positions}
        return {
            "per_position": dict(per),
            "besides": dict(besides),
            "primitives": {n: counts.total() for n, counts in every.items()},
            "kernels": {n: kernels(counts) for n, counts in every.items()},
        }

    peer = machine.version("mlx-lm") is not None
    backends = dict.fromkeys((device.backend(), "metal"))
    return {
        "chunk": chunk,
        "positions": list(positions),
        "backends": {
            backend: {
                name: {
                    label: side(make, how(step), chunk if step is prefill else 1, backend)
                    for label, (make, how) in SIDES.items()
                    if peer or make is not mlx_lm
                }
                for name, step in PASSES.items()
            }
            for backend in backends
        },
    }


def main(argv: list[str] | None = None) -> int:
    p = parser("primitives", "Graph primitives of one decode step and of one prefill chunk.")
    p.add_argument("--model", metavar="DIR|FILE.gguf|HUBID|demo", help="shapes (default: demo)")
    p.add_argument("--geometry", choices=sorted(GEOMETRIES), help="named shapes instead")
    p.add_argument("--q-bits", type=int, metavar="N", help="packed weights (default: dense ones)")
    p.add_argument("--chunk", type=int, default=prefill_step(), metavar="N", help="of prefill")
    args = p.parse_args(argv)
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    if args.geometry is not None and args.model is not None:
        raise RequestError("--geometry names shapes of its own: drop --model")
    if args.chunk < 2:
        raise RequestError("--chunk must be at least 2: one token is a decode step")
    if args.q_bits is not None:
        Packing(args.q_bits, 64)  # refused here if MLX has none
    if args.geometry is not None:
        config = ModelConfig.from_dict(GEOMETRIES[args.geometry])
    else:
        config = open_checkpoint(hub.resolve(args.model or "demo")).config
    results = measure(config, _positions(config), args.chunk, args.q_bits)
    results = {"model": args.geometry or public(args.model or "demo")} | results
    publish(args, "primitives", results, text(results))
    return 0


def _positions(config: ModelConfig) -> list[int]:
    """The model's, those of the formula over its blocks, and the two Cerebrum models'."""
    blocks = config.num_hidden_layers
    cerebrum = LayerPlan.named("cerebrum-12.25b").layer_map(32)
    merged = formula(blocks).layer_map(blocks) if blocks > 2 else ()
    return sorted({config.num_positions, len(merged), 32, len(cerebrum)} - {0})


def text(results: Results) -> list[str]:
    """A table for each backend and pass, and the decode step's positions by name."""
    positions = [str(n) for n in results["positions"]]
    what = {"decode": "a decode step", "prefill": f"a prefill chunk of {results['chunk']}"}
    parts = [
        f"Shapes of {results['model']}. Primitives, and in brackets those of them that compute:"
        " kernels to launch. A position is one layer's run; at so many positions, all of it."
    ]
    for backend, passes in results["backends"].items():
        for name, sides in passes.items():
            rows = []
            for side, found in sides.items():
                per = found["per_position"]
                every = [f"{found['primitives'][n]} ({found['kernels'][n]})" for n in positions]
                rows.append([side, f"{sum(per.values())} ({kernels(per)})", *every])
            header = ["a position", *(f"{n} positions" for n in positions)]
            parts.append(table([f"{what[name]}, {backend}", *header], rows))
        parts.append(_named(f"a position of it, {backend}", passes["decode"]))
    return parts


def _named(title: str, sides: Mapping[str, Results]) -> str:
    counts = {side: found["per_position"] for side, found in sides.items()}
    names = {name for found in counts.values() for name in found}
    rows = [
        [name, *(str(found.get(name, "")) for found in counts.values())]
        for name in sorted(names - VIEWS)
    ]
    views = [sum(n for name, n in found.items() if name in VIEWS) for found in counts.values()]
    return table([title, *counts], [*rows, ["views", *map(str, views)]])


if __name__ == "__main__":
    sys.exit(main())
