"""How many graph primitives one decode step and one prefill chunk are made of.

python -m bench.primitives                          the demo model's shapes
python -m bench.primitives --model DIR --q-bits 4   another's, packed

Where weights are few, or bandwidth is large, launching kernels is what a step costs besides
reading them, so their number is what is left to win. Counted are mlx-lm's model, ours with its
projections as they are stored, ours as it is loaded, and that as one compiled function; as this
backend gets it, and as Metal would, which has one kernel each for RMSNorm, RoPE, attention and
unpacking where the CPU backend composes them of others.

Each primitive that computes is a kernel to launch. Those that only look at another's memory under
other shapes and strides (`VIEWS`) launch nothing, unless no view can have the shape. A graph
depends on shapes alone: nothing is computed, and every parameter is a zero stretched over its
shape, which takes no memory. Every position is counted with a block of its own: one that runs
twice adds the same, except that a compiled function has the views of its weights once.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from bench.pair import formula
from bench.report import parser, public, run, table
from bench.step_profile import forget
from bench.suite import Results
from mlx_cerebrum import device
from mlx_cerebrum.decoding.decode import greedy, prefill_step
from mlx_cerebrum.doctor.graph import VIEWS, count, kernels
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.weights import hub
from mlx_cerebrum.weights.loading import fuse_projections
from mlx_cerebrum.weights.opening import open_checkpoint
from mlx_cerebrum.weights.quantize import AFFINE_BITS

Counts = Counter[str]
Caches = Sequence[Any]

_CONTEXT = 64  # tokens before a pass: any number that leaves the caches room for one more
_CEREBRUM = (32, 56)  # positions of the 7B and the 12.25B
_METAL_HEADS = (64, 96, 128)  # widths with kernels on Metal for one token and for a chunk


def count_as_on_metal(build: Callable[[], Any], head_dim: int) -> Counts:
    """Primitives of the graph that `build` would make on Metal; what it makes here is no use.

    What stands for Metal's kernels are primitives that no model here uses, that keep their input's
    shape, and that mx.compile leaves alone.
    """

    def marker(run: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def mark(x: mx.array, *rest: Any, **named: Any) -> mx.array:
            others = [a for a in (*rest, *named.values()) if isinstance(a, mx.array)]
            return run(mx.depends([x], others)[0] if others else x, axis=-1)

        return mark

    def unpack(weight: mx.array, scales: mx.array, **named: Any) -> mx.array:
        # Counted as Concatenate: a marker has no other shape than its input's.
        others = [weight] if named["biases"] is None else [weight, named["biases"]]
        return mx.concatenate(mx.depends([scales], others) * named["group_size"], axis=-1)

    attend = mx.fast.scaled_dot_product_attention
    if head_dim in _METAL_HEADS:
        attend = marker(mx.cumprod)
    with (
        mock.patch.object(device, "backend", return_value="metal"),
        mock.patch.object(mx, "dequantize", unpack),
        mock.patch.object(mx.fast, "rms_norm", marker(mx.cummax)),
        mock.patch.object(mx.fast, "rope", marker(mx.cummin)),
        mock.patch.object(mx.fast, "scaled_dot_product_attention", attend),
    ):
        found = count(build())
    del found["Depends"]  # holds a marker's other inputs, no more
    names = {"CumMax": "RMSNorm", "CumMin": "RoPE", "CumProd": "ScaledDotProductAttention"}
    return Counter({names.get(name, name): number for name, number in found.items()})


def ours(config: ModelConfig, *, fused: bool = True) -> nn.Module:
    """The model; `fused`: its projections joined, as the loader does."""
    model = Model(config)
    for block in model.model.layers if fused else ():
        fuse_projections(block)
    return model


def mlx_lm(config: ModelConfig) -> nn.Module:
    """mlx-lm's model of the same shapes, with a layer for each position."""
    from mlx_lm.models.llama import Model as Peer
    from mlx_lm.models.llama import ModelArgs

    raw = asdict(config) | {"num_hidden_layers": config.num_positions, "model_type": "llama"}
    peer: nn.Module = Peer(ModelArgs.from_dict(raw))
    return peer


def hollow(model: nn.Module, bits: int | None = None) -> nn.Module:
    """The model, packed to `bits`, its parameters zeros that take one number's memory each."""
    if bits is not None:
        nn.quantize(model, group_size=64, bits=bits)
    model.update(
        tree_map(lambda a: mx.broadcast_to(mx.zeros((), a.dtype), a.shape), model.parameters())
    )
    mx.eval(model.parameters())
    return model


def step(model: nn.Module, cache: Caches, tokens: mx.array) -> Any:
    """What running `tokens [1, L]` evaluates: one is decoded, more are a prompt's chunk."""
    logits = model(tokens, cache)
    return greedy(logits[:, -1]) if tokens.shape[1] == 1 else [layer.state for layer in cache]


def compiled(model: nn.Module, cache: Caches, tokens: mx.array) -> Any:
    """`step` as one compiled function of the tokens and of every cache's arrays."""

    def run(tokens: mx.array, held: list[tuple[mx.array, mx.array]]) -> Any:
        for layer, (keys, values) in zip(cache, held, strict=True):
            layer.keys, layer.values = keys, values
        return step(model, cache, tokens), [(layer.keys, layer.values) for layer in cache]

    return mx.compile(run)(tokens, [(layer.keys, layer.values) for layer in cache])


SIDES: dict[str, tuple[Callable[[ModelConfig], nn.Module], Callable[..., Any]]] = {
    "mlx-lm": (mlx_lm, step),
    "ours, not fused": (partial(ours, fused=False), step),
    "ours": (ours, step),
    "ours, compiled": (ours, compiled),
}


def counted(
    side: str, config: ModelConfig, length: int, backend: str, bits: int | None = None
) -> Counts:
    """Of one pass over `length` tokens. `backend` is this machine's, or "metal"."""
    make, how = SIDES[side]
    model = hollow(make(config), bits)
    build = partial(how, model, _caches(model, config), mx.zeros((1, length), mx.int32))
    forget()
    here = backend == device.backend()
    counts = count(build()) if here else count_as_on_metal(build, config.head_dim)
    forget()  # the compiled function's are for no one else
    return counts


def _caches(model: nn.Module, config: ModelConfig) -> Caches:
    """The model's own caches after `_CONTEXT` tokens."""
    from mlx_lm.models.cache import make_prompt_cache

    cache: Caches = make_prompt_cache(model)  # ours too has a `make_cache`
    shape = (1, config.num_key_value_heads, _CONTEXT, config.head_dim)
    entries = mx.zeros(shape, model.model.norm.weight.dtype)
    for layer in cache:
        layer.update_and_fetch(entries, entries)
    mx.eval([(layer.keys, layer.values) for layer in cache])
    return cache


def measure(
    config: ModelConfig, positions: Sequence[int], chunk: int, bits: int | None = None
) -> Results:
    """By backend, pass and side: primitives for each position, besides, and at `positions`.

    The fewest positions that have a first and a last which differ are two. What three have more is
    what every position has, so all other numbers follow.
    """

    def side(label: str, length: int, backend: str) -> Results:
        def at(n: int) -> Counts:
            shapes = replace(config, num_hidden_layers=n, layer_map=tuple(range(n)))
            return counted(label, replace(shapes, residual_scales=None), length, backend, bits)

        per, besides = at(3), at(2)
        per.subtract(besides)
        besides.subtract({key: 2 * n for key, n in per.items()})
        return {
            "per_position": {key: n for key, n in per.items() if n},
            "besides": {key: n for key, n in besides.items() if n},
            "primitives": {str(n): besides.total() + n * per.total() for n in positions},
            "kernels": {str(n): kernels(besides) + n * kernels(per) for n in positions},
        }

    return {
        "chunk": chunk,
        "positions": list(positions),
        "backends": {
            backend: {
                name: {label: side(label, length, backend) for label in SIDES}
                for name, length in {"decode": 1, "prefill": chunk}.items()
            }
            for backend in dict.fromkeys((device.backend(), "metal"))
        },
    }


def main(argv: list[str] | None = None) -> int:
    p = parser("primitives", "Graph primitives of one decode step and of one prefill chunk.")
    p.add_argument("--model", metavar="DIR|FILE.gguf|HUBID|demo", help="shapes (default: demo)")
    p.add_argument("--q-bits", type=int, choices=AFFINE_BITS, help="a weight (default: dense)")
    p.add_argument("--chunk", type=int, default=prefill_step(), metavar="N", help="of prefill")
    return run(p, _measure, text, argv)


def _measure(args: argparse.Namespace) -> Results:
    if args.chunk < 2:
        raise RequestError("--chunk must be at least 2: one token is a decode step")
    name = args.model or "demo"
    config = open_checkpoint(hub.resolve(name)).config
    blocks = config.num_hidden_layers
    merged = formula(blocks).layer_map(blocks) if blocks > 2 else ()
    positions = {config.num_positions, len(merged), *_CEREBRUM} - {0}
    return {"model": public(name)} | measure(config, sorted(positions), args.chunk, args.q_bits)


def text(results: Results) -> list[str]:
    """A table for each backend and pass, and the decode step's positions by name."""
    positions = [str(n) for n in results["positions"]]
    what = {"decode": "a decode step", "prefill": f"a prefill chunk of {results['chunk']}"}
    header = ["a position", *(f"{n} positions" for n in positions)]
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
            parts.append(table([f"{what[name]}, {backend}", *header], rows))
        counts = {side: found["per_position"] for side, found in passes["decode"].items()}
        names = sorted({name for per in counts.values() for name in per} - VIEWS)
        rows = [[name, *(str(per.get(name, "")) for per in counts.values())] for name in names]
        views = [str(sum(per.values()) - kernels(per)) for per in counts.values()]
        title = f"a position of it, {backend}"
        parts.append(table([title, *counts], [*rows, ["views", *views]]))
    return parts


if __name__ == "__main__":
    sys.exit(main())
