"""Where the time of one decode step and of one prefill chunk goes, by kind of operation.

python -m bench.step_profile                                 the demo model
python -m bench.step_profile --plan PLAN --context 2048      positions of a plan, longer ago
python -m bench.step_profile --model DIR --context 16384     random weights of bench.random_model

The whole pass and each of its kinds run in turns, after a warm-up, and medians are compared. A
kind is all calls of one name that the model makes in the pass: run again alone, each after the one
before it, with that position's own weights, keys and values, and the first position's inputs. So
its time is what it costs where nothing else interferes.

The whole is timed in two parts: *building* its graph in Python, and evaluating that. A generation
on a GPU builds a step while the one before it runs; here the two do not overlap. What is left is
the *rest*: scheduling where it costs more in a long graph than in short ones, masks, buffers given
back. It is below zero where the kinds apart cost more than together; each of them waits once for
its result, which is stated.

Bytes are those read at least: weights, keys and values, and the inputs. FLOPs are those the
result asks for, each exp or root as one; what a kernel computes beside it counts as time only.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from bench.context import fill
from bench.report import Spread, parser, public, rounds, run, table
from bench.suite import Results
from mlx_cerebrum.decoding.decode import greedy, prefill_step
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model import cpu, forward
from mlx_cerebrum.model.cache import STEP, WindowedKVCache, causal_mask
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.limits import limits
from mlx_cerebrum.model.memory import GB, Workload, require
from mlx_cerebrum.weights.opening import ModelSpec, open_model

# Kinds in their order, and what they are the calls of: modules by the last word of their path,
# functions by their name. The sums of the residual stream are neither.
KINDS = {
    "embedding": ("embed_tokens",),
    "norms": ("input_layernorm", "post_attention_layernorm", "norm"),
    "qkv": ("q_proj", "k_proj", "v_proj", "qkv_proj"),
    "rope": ("rope",),
    "cache": ("update_and_fetch",),
    "attention": ("attend",),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj", "gate_up_proj"),
    "activation": ("swiglu",),
    "down": ("down_proj",),
    "residual sums": (),
    "head": ("lm_head", "as_linear"),
    "argmax": ("greedy",),
}
_KIND_OF = {word: kind for kind, words in KINDS.items() for word in words}
# Of each number that goes in, and key that it meets. Of a matrix product two for each output.
_FLOPS = {"embedding": 0, "cache": 0, "argmax": 1}
_FLOPS |= {"norms": 4, "rope": 3, "attention": 4, "activation": 6}
WHOLE, MOVING, BUILD, REST = "whole", "cache, moving", "building the graph", "the rest"
_COPIES = 3  # of the keys and values: the caches, what attention alone reads, what is moved

Arrays = Sequence[mx.array]


@dataclass
class Kind:
    """One kind of operation in a pass: its calls in order, each with its inputs.

    `held` are bytes it reads beside the inputs: parameters, entries that are moved.
    """

    calls: list[tuple[Callable[..., Any], Arrays]] = field(default_factory=list)
    held: int = 0
    flops: int = 0

    def add(self, call: Callable[..., Any], inputs: Arrays, held: int = 0, flops: int = 0) -> None:
        self.calls.append((call, inputs))
        self.held += held
        self.flops += flops

    @property
    def nbytes(self) -> int:
        """Bytes read at least: what is held, and the inputs."""
        return self.held + sum(x.nbytes for _, inputs in self.calls for x in inputs)

    def graph(self) -> Arrays:
        """Every call, each to run once the one before it is done, as in a forward pass."""
        before: list[mx.array] = []
        for call, inputs in self.calls:
            made = call(*(mx.depends(list(inputs), before) if before else inputs))
            before = [made] if isinstance(made, mx.array) else list(made)
        return before


class Timing(NamedTuple):
    """Seconds on the host until the graph is there, and from there to its result."""

    build: float
    evaluate: float


def timed(graph: Callable[[], Arrays], after: Callable[[], None] = lambda: None) -> Timing:
    forget()
    started = time.perf_counter()
    arrays = graph()
    built = time.perf_counter()
    mx.eval(*arrays)
    after()
    return Timing(built - started, time.perf_counter() - built)


def forget() -> None:
    """Drop the rotary tables of the last step: every step has another offset, and makes its own."""
    cpu._tables_of_one.cache_clear()


class Pass:
    """One token after `context` random others; or a chunk of `length`, as `decode.prefill` runs it.

    In a chunk the caches move. What nothing asks for is not computed: of the last position's block
    only keys and values are, and no logits.
    """

    def __init__(self, model: Model, context: int, length: int | None = None) -> None:
        self.model, self.chunk, self.context = model, length is not None, context
        self.length = 1 if length is None else length
        self.cache = filled(model, context)
        self.tokens = mx.array([[i % model.config.vocab_size for i in range(self.length)]])
        window = model.config.sliding_window
        seen = mx.sum(causal_mask(self.length, context, window)).item()  # keys, by all queries
        self.seen = cast(int, seen)
        self.kinds = {name: Kind() for name in KINDS}
        self.moving = Kind()  # the caches to new buffers: of decoding's steps one in many does
        self._inputs: dict[Any, list[mx.array]] = {}  # by kind and shapes
        forget()
        made = _listen(model, self.graph, self._heard)
        self.kinds = {name: kind for name, kind in self.kinds.items() if kind.calls}
        mx.eval(made, [inputs for kind in self.kinds.values() for _, inputs in kind.calls])
        self._inputs.clear()  # one looks at a cache's buffer

    def graph(self) -> Arrays:
        if self.chunk:
            for layer in self.cache:
                layer.state = layer.state  # has no room to grow: the chunk must move it
        logits = self.model(self.tokens, self.cache)
        if self.chunk:
            arrays = [array for layer in self.cache for array in layer.state[:2]]
        else:
            arrays = [greedy(logits[:, -1])]
        for layer in self.cache:
            layer.rewind_to(self.context)
        return arrays

    def _heard(self, kind: str, call: Callable[..., Any], args: Sequence[Any], made: Any) -> None:
        """Note a call of the pass: `call` of the arrays in `args` makes it anew."""
        if self.chunk and len(self.kinds["cache"].calls) == len(self.cache):
            return  # after the last entries nothing is computed
        own = [arg for arg in args if isinstance(arg, mx.array)]
        inputs = self._inputs.setdefault((kind, *(x.shape for x in own)), own)
        x, work = inputs[0], inputs[0].size
        held = size(args[0]) if isinstance(args[0], nn.Module) else 0
        if kind == "embedding":
            held = held * self.length // self.model.config.vocab_size
        elif kind == "cache":
            window = self.model.config.sliding_window or math.inf
            kept = int(min(self.context, window - 1 + args[0].rewind))
            moved = kept * sum(entry.nbytes for entry in inputs) // self.length
            self.moving.add(partial(self._append, args[0], True), inputs, moved)
            call, held = partial(self._append, args[0], self.chunk), moved * self.chunk
        elif kind == "attention":
            # This position's keys and values, as copies: while someone looks at a cache's buffer,
            # MLX can't write into it in place.
            inputs = [x, own[1] + 0, own[2] + 0, *own[3:]]
            call, work = partial(self._attend, call), work // self.length * self.seen
        each = _FLOPS[kind] if kind in _FLOPS else 2 * made.shape[-1]
        self.kinds[kind].add(call, inputs, held, each * work)
        if kind in ("o", "down"):
            (stream,) = self._inputs["norms", made.shape]
            sums = self._inputs.setdefault("sums", [stream, stream + 0])
            self.kinds["residual sums"].add(mx.add, sums, flops=stream.size)

    def _attend(self, attend: Callable[..., mx.array], *inputs: mx.array) -> mx.array:
        return attend(*inputs).swapaxes(1, 2).reshape(1, self.length, -1)  # a prompt's is copied

    def _append(self, layer: WindowedKVCache, moves: bool, keys: mx.array, values: mx.array) -> Any:
        if moves:
            layer.state = layer.state  # has no room to grow
        seen = layer.update_and_fetch(keys, values)
        layer.rewind_to(self.context)
        return seen

    def times(self, count: int, seconds: float = math.inf) -> dict[str, list[Timing]]:
        """Rounds of the whole, of every kind, and of what moves now and then, in turns."""
        after = mx.clear_cache if self.chunk else lambda: None  # as prefill ends a chunk
        sides = {WHOLE: partial(timed, self.graph, after)}
        sides |= {name: partial(timed, kind.graph) for name, kind in self.kinds.items()}
        if not self.chunk:
            sides[MOVING] = partial(timed, self.moving.graph)
        return rounds(sides, count, seconds=seconds)

    def measured(self, count: int, seconds: float = math.inf) -> Results:
        """Medians of seconds; the rest is what is left of the whole's."""
        times = self.times(count, seconds)
        alone = {name: Spread.of([t.evaluate for t in each]) for name, each in times.items()}
        whole = Spread.of([t.build + t.evaluate for t in times[WHOLE]])
        build = Spread.of([t.build for t in times[WHOLE]])
        kinds = {
            name: {"seconds": alone[name].as_json(), "bytes": kind.nbytes, "flops": kind.flops}
            for name, kind in self.kinds.items()
        }
        rest = whole.median - build.median - sum(alone[name].median for name in kinds)
        results: Results = {
            "rounds": len(times[WHOLE]),
            "whole": whole.as_json(),
            "build": build.as_json(),
            "kinds": kinds,
            "rest": float(f"{rest:.5g}"),
        }
        if not self.chunk:
            results["moving"] = {"seconds": alone[MOVING].as_json(), "bytes": self.moving.nbytes}
        return results


def _listen(model: Model, run: Callable[[], Arrays], heard: Callable[..., None]) -> Arrays:
    """Run, and tell of every call of the model's modules without parts, and of its functions.

    `heard` gets the call's kind, a function of its arrays that makes it anew, its arguments, and
    what it made.
    """
    words = {id(module): path.rpartition(".")[2] for path, module in model.named_modules()}
    leaves = {type(module) for module in model.modules() if not module.children()}
    places: list[tuple[Any, str]] = [(owner, "__call__") for owner in leaves]
    places += [(type(model.model.embed_tokens), "as_linear"), (WindowedKVCache, "update_and_fetch")]
    places += [(forward, "attend"), (forward, "swiglu"), (sys.modules[__name__], "greedy")]

    def watched(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            def again(*arrays: mx.array) -> Any:
                rest = iter(arrays)
                return real(*(next(rest) if arg is ... else arg for arg in others), **named)

            others = [... if isinstance(arg, mx.array) else arg for arg in args]
            made = real(*args, **named)
            heard(_KIND_OF[words[id(args[0])] if name == "__call__" else name], again, args, made)
            return made

        return call

    with ExitStack() as stack:
        for owner, name in places:
            patch = mock.patch.object(owner, name, watched(getattr(owner, name), name))
            stack.enter_context(patch)
        return run()


def filled(model: Model, context: int) -> list[WindowedKVCache]:
    """Caches that have seen `context` random tokens."""
    cache = model.make_cache()
    for layer in cache:
        fill(layer, context, prefill_step(), model.config, model.dtype)
    return cache


def size(module: nn.Module) -> int:
    """Bytes of the module's arrays."""
    return sum(array.nbytes for array in dict(tree_flatten(module.parameters())).values())


def main(argv: list[str] | None = None) -> int:
    p = parser("step_profile", "Where one decode step and one prefill chunk spend their time.")
    p.add_argument("--model", metavar="DIR|FILE.gguf|HUBID|demo", help="which (default: demo)")
    p.add_argument("--plan", metavar="NAME|FILE", help="layer plan (default: as it is)")
    p.add_argument("--q-bits", type=int, metavar="N", help="pack dense weights while loading")
    p.add_argument("--window", type=int, metavar="TOKENS", help="sliding window (0: none)")
    p.add_argument("--context", type=int, default=512, metavar="N", help="before (default: 512)")
    p.add_argument("--chunk", type=int, default=prefill_step(), metavar="N", help="of prefill")
    p.add_argument("--rounds", type=int, default=9, metavar="N", help="of each (default: 9)")
    p.add_argument("--seconds", type=float, default=60.0, metavar="S", help="a pass (default: 60)")
    return run(p, _measure, text, argv)


def _measure(args: argparse.Namespace) -> Results:
    """Raises a CerebrumError for what can't be loaded or can't fit."""
    if min(args.context, args.chunk, args.rounds) < 1 or args.seconds < 0:
        raise RequestError("--context, --chunk and --rounds must be at least 1, --seconds 0")
    name, context, chunk = args.model or "demo", args.context, args.chunk
    spec = ModelSpec(name, plan=args.plan, q_bits=args.q_bits, window=args.window)
    with limits():
        model = open_model(spec).load()
        request = Workload(model.config, model.dtype.size, context + chunk + 1, 1, chunk)
        require(_COPIES * request.bytes, f"a context of {context} tokens", "make it shorter")
        nothing = mx.zeros(1)
        mx.eval(nothing)
        waits = [timed(lambda: [nothing + 1]).evaluate for _ in range(50)]
        decode = Pass(model, context).measured(3 * args.rounds, args.seconds)
        prefill = Pass(model, context, chunk).measured(args.rounds, args.seconds)
    return {
        "model": public(name),
        "plan": args.plan,
        "positions": model.config.num_positions,
        "hidden_size": model.config.hidden_size,
        "window": model.config.sliding_window,
        "dtype": str(model.dtype).rpartition(".")[2],
        "context": context,
        "chunk": chunk,
        "wait": Spread.of(waits).as_json(),  # evaluating one addition of one number
        "decode": decode,
        "prefill": prefill,
    }


def text(results: Results) -> list[str]:
    """A table for each pass, and what it leaves out."""
    window = f"a window of {results['window']}" if results["window"] else "no window"
    after = f"after {results['context']} tokens"
    decode, prefill = results["decode"], results["prefill"]
    moving = decode["moving"]["seconds"]["median"] * 1000
    return [
        f"{results['model']}, {results['plan'] or 'as it is'}: {results['positions']} positions,"
        f" {results['hidden_size']} wide, {window}, {results['dtype']}."
        f" Medians of {decode['rounds']} and {prefill['rounds']} rounds; every kind of operation"
        f" alone waits {results['wait']['median'] * 1e6:.0f} µs for its result.",
        _table(f"one decode step {after}", decode),
        f"One step in {STEP} moves the caches to new buffers: {moving:.2f} ms instead of its"
        f" appending, {moving / STEP:.3f} ms a token.",
        _table(f"a prefill chunk of {results['chunk']} {after}", prefill),
        f"Decoding {1 / decode['whole']['median']:.1f} tokens/s, prefilling"
        f" {results['chunk'] / prefill['whole']['median']:.1f}. A rest below zero: the kinds cost"
        f" more apart than together.",
    ]


def _table(title: str, found: Results) -> str:
    kinds = found["kinds"].items()
    whole = found["whole"]["median"]
    lines = [(name, k["seconds"]["median"], k["bytes"], k["flops"]) for name, k in kinds]
    work = [sum(k[what] for _, k in kinds) for what in ("bytes", "flops")]
    lines += [(BUILD, found["build"]["median"], 0, 0), (REST, found["rest"], 0, 0)]
    rows = [
        [name, f"{seconds * 1000:.2f}", f"{seconds / whole:.1%}"]
        + [f"{done / 1e6:.2f}" if done else "" for done in work]
        + [f"{done / GB / seconds:.2f}" if done else "" for done in work]
        for name, seconds, *work in [*lines, ("all of it", whole, *work)]
    ]
    return table([title, "ms", "share", "MB", "MFLOP", "GB/s", "GFLOP/s"], rows)


# ---- In few words: what the peers suite says beside a ratio

# Decode reads every matrix for one token, so its kinds can be held against the memory's bandwidth.
# Prefill uses every matrix for a whole chunk. A kind that is rated as high as the machine goes
# can't be made faster, only smaller.
_UNITS = {"decode": "GB/s", "prefill": "GFLOP/s"}


def measure_short(model: Model, prompt: Sequence[int], count: int = 3) -> Results:
    """Seconds of each kind in one decode step at the end of `prompt`, and in a first chunk."""
    chunk = min(prefill_step(), len(prompt))
    return {
        "context": len(prompt),
        "chunk": chunk,
        "prefill": _rated(Pass(model, 0, chunk).measured(count), "flops"),
        "decode": _rated(Pass(model, len(prompt) - 1).measured(3 * count), "bytes"),
    }


def _rated(found: Results, work: str) -> Results:
    """Each kind's seconds and the `work` it does in one; building the graph is in the rest."""
    kinds: Results = {}
    for name, kind in found["kinds"].items():
        seconds = kind["seconds"]["median"]
        kinds[name] = {"seconds": seconds, "rate": kind[work] / GB / seconds}
    kinds[REST] = {"seconds": found["rest"] + found["build"]["median"], "rate": None}
    return {"total": found["whole"]["median"], "kinds": kinds}


def text_short(results: Results) -> list[str]:
    """A table for each phase, its kinds in the order of their time."""
    what = {
        "decode": f"one decode step after {results['context']} tokens",
        "prefill": f"one prefill chunk of {results['chunk']} tokens",
    }
    tables = []
    for phase, unit in _UNITS.items():
        found, total = results[phase]["kinds"], results[phase]["total"]
        kinds = [(name, kind["seconds"], kind["rate"]) for name, kind in found.items()]
        kinds.sort(key=lambda kind: -kind[1])
        rows = [
            [name, f"{took * 1000:.2f}", f"{took / total:.0%}", f"{rate:.1f}" if rate else ""]
            for name, took, rate in [*kinds, ("all of it", total, None)]
        ]
        tables.append(table([what[phase], "ms", "share", unit], rows))
    return tables


if __name__ == "__main__":
    sys.exit(main())
