"""The kinds of operations in a decode step and in a prefill chunk, each to be run alone.

Each kind runs once for every position as the pass runs it, with that position's own weights and
keys, each operation after the one before it; so its time is what it costs where nothing else
interferes. Inputs are random and already there, and so are the keys and values of the tokens
before: times depend on how many there are, not on what they say.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from bench.context_sides import fill
from bench.report import rounds
from mlx_cerebrum.decoding.decode import greedy, prefill_step
from mlx_cerebrum.model import cpu
from mlx_cerebrum.model.attention import attend
from mlx_cerebrum.model.cache import WindowedKVCache
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model, TransformerBlock, swiglu

WHOLE, MOVING = "whole", "cache, moving"

Arrays = Sequence[mx.array]
Operation = Callable[[mx.array], Arrays]


@dataclass(frozen=True)
class Kind:
    """One kind of operation in a pass.

    `held` are the bytes it reads of parameters, or of keys and values from before. `flops` are
    what the result asks for: additions, multiplications, and each exp or root as one.
    """

    steps: Sequence[tuple[Operation, mx.array]]  # in order, each with its input
    held: int = 0
    flops: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes read at least: what is held, and the inputs."""
        return self.held + sum(x.nbytes for _, x in self.steps)

    def graph(self) -> Arrays:
        """Every step, each to run once the one before it is done, as in a forward pass."""
        before: Arrays = []
        for run, x in self.steps:
            before = run(mx.depends([x], list(before))[0] if before else x)
        return before


class Timing(NamedTuple):
    """Seconds on the host until the graph is there, and from there to its result."""

    build: float
    evaluate: float


@dataclass(frozen=True)
class Pass:
    """One decode step, or one prefill chunk: the whole of it, and its kinds in their order."""

    graph: Callable[[], Arrays]
    kinds: dict[str, Kind]
    moving: Kind | None = None  # what is needed only now and then, besides
    after: Callable[[], None] = lambda: None  # what ends the whole

    def times(self, count: int, seconds: float = math.inf) -> dict[str, list[Timing]]:
        """Rounds of the whole, of every kind, and of what moves, in turns."""
        sides = {WHOLE: partial(timed, self.graph, self.after)}
        sides |= {name: partial(timed, kind.graph) for name, kind in self.kinds.items()}
        if self.moving is not None:
            sides[MOVING] = partial(timed, self.moving.graph)
        return rounds(sides, count, seconds=seconds)


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


def decode_pass(model: Model, context: int) -> Pass:
    """One token after `context` others."""
    cache, token = filled(model, context), _tokens(model, 1)
    parts = _Parts(model, cache, 1)

    def graph() -> Arrays:
        chosen = greedy(model(token, cache)[:, -1])
        parts.rewind()
        return [chosen]

    return Pass(graph, parts.kinds(), parts.appending(moves=True))


def prefill_pass(model: Model, context: int, length: int) -> Pass:
    """A chunk of `length` tokens after `context` others, as `decode.prefill` runs it.

    The caches move for every chunk. What nothing asks for is not computed: of the last
    position's block only keys and values are, and no logits.
    """
    cache, tokens = filled(model, context), _tokens(model, length)
    parts = _Parts(model, cache, length, moves=True)

    def graph() -> Arrays:
        for layer in cache:
            layer.state = layer.state  # has no room to grow: the chunk must move it
        model(tokens, cache)
        arrays = [array for layer in cache for array in layer.state[:2]]
        parts.rewind()
        return arrays

    return Pass(graph, parts.kinds(keys_only=True), after=mx.clear_cache)  # as prefill ends one


def filled(model: Model, context: int) -> list[WindowedKVCache]:
    """Caches that have seen `context` random tokens."""
    cache = model.make_cache()
    for layer in cache:
        fill(layer, context, prefill_step(), model.config, model.dtype)
    return cache


def _tokens(model: Model, length: int) -> mx.array:
    return mx.array([[i % model.config.vocab_size for i in range(length)]])


def pairs(config: ModelConfig, before: int, length: int) -> int:
    """Queries times the keys each sees: `length` queries after `before` tokens."""
    window = config.sliding_window or before + length
    return sum(min(before + i + 1, window) for i in range(length))


class _Parts:
    """The kinds of a pass over `length` new tokens; `cache` holds those before, and is left so.

    `moves`: whether the pass finds the caches full, and moves what is needed to new buffers.
    """

    def __init__(
        self, model: Model, cache: list[WindowedKVCache], length: int, moves: bool = False
    ) -> None:
        self.model, self.cache, self.length, self.moves = model, cache, length, moves
        self.config = config = model.config
        self.blocks = [model.model.layers[block] for block in config.layer_map]
        self.before = cache[0].offset
        self.mask = cache[0].make_mask(
            length, return_array=False, window_size=config.sliding_window
        )
        self.new = self.noise(config.num_key_value_heads, length, config.head_dim)
        self.seen = [self.copied(layer) for layer in cache]
        mx.eval(self.seen, [self.mask] if isinstance(self.mask, mx.array) else [])

    def noise(self, *shape: int) -> mx.array:
        """Random `[1, *shape]`, evaluated."""
        array = mx.random.normal((1, *shape)).astype(self.model.dtype)
        mx.eval(array)
        return array

    def rewind(self) -> None:
        for layer in self.cache:
            layer.rewind_to(self.before)

    def copied(self, layer: WindowedKVCache) -> list[mx.array]:
        """The keys and values attention reads, in buffers of their own with the same gaps.

        While someone looks at the cache's buffer, MLX can't write into it in place.
        """
        visible = layer.update_and_fetch(self.new, self.new)[0].shape[2]
        used = layer.state[0].shape[2]
        buffers = [layer.keys + 0, layer.values + 0]
        mx.eval(buffers)
        layer.rewind_to(self.before)
        return [buffer[..., used - visible : used, :] for buffer in buffers]

    def append(self, layer: WindowedKVCache, moves: bool, new: mx.array) -> Arrays:
        if moves:
            layer.state = layer.state
        seen = layer.update_and_fetch(new, new)
        layer.rewind_to(self.before)
        return seen

    def appending(self, moves: bool) -> Kind:
        """Appending to every position's cache; one that moves reads all that is kept, too."""
        steps = [(partial(self.append, layer, moves), self.new) for layer in self.cache]
        # The new entries count twice: they are written as keys, and as values.
        held = self.new.nbytes
        if moves:
            window = self.config.sliding_window or math.inf
            kept = min(self.before, window - 1 + self.cache[0].rewind)
            held += 2 * self.new.nbytes // self.length * int(kept)
        return Kind(steps, held * len(steps))

    def attention(self, keys: mx.array, values: mx.array, queries: mx.array) -> Arrays:
        out = attend(queries, keys, values, self.config.head_dim**-0.5, self.mask)
        return [out.swapaxes(1, 2).reshape(1, self.length, -1)]

    def rope(self, block: TransformerBlock, x: mx.array) -> Arrays:
        """Rotates queries and keys: at once where they come from one matrix, else apart."""
        attention = block.self_attn
        both = x.reshape(1, self.length, -1, self.config.head_dim).swapaxes(1, 2)
        heads = [self.config.num_attention_heads]
        parts = [both] if "qkv_proj" in attention else mx.split(both, heads, axis=1)
        return [attention.rope(part, offset=self.before) for part in parts]

    def kinds(self, keys_only: bool = False) -> dict[str, Kind]:
        """`keys_only`: without what the last position's keys and values do not need."""
        config, decoder, L, blocks = self.config, self.model.model, self.length, self.blocks
        H, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        D, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
        stream, added, joined = self.noise(L, D), self.noise(L, D), self.noise(L, H * width)
        gates, product = self.noise(L, 2 * inner), self.noise(L, inner)
        rotated, queries = self.noise(L, (H + kv_heads) * width), self.noise(H, L, width)
        done, seen = (blocks[:-1], self.seen[:-1]) if keys_only else (blocks, self.seen)
        norms = [n for b in blocks for n in (b.input_layernorm, b.post_attention_layernorm)]
        norms = norms[:-1] if keys_only else [*norms, decoder.norm]
        qkv = [_either(b.self_attn, "qkv_proj", ("q_proj", "k_proj", "v_proj")) for b in blocks]
        gate_up = [_either(b.mlp, "gate_up_proj", ("gate_proj", "up_proj")) for b in done]
        rows = size(decoder.embed_tokens) // vocab * L
        scaled, sums = 4 * stream.size * len(norms), 2 * len(done)
        found = {
            "embedding": Kind([(_one(self.model.embed), _tokens(self.model, L))], rows),
            "norms": Kind([(_one(norm), stream) for norm in norms], size(*norms), scaled),
            "qkv": _products(qkv, stream, D * (H + 2 * kv_heads) * width),
            "rope": Kind(
                [(partial(self.rope, block), rotated) for block in blocks],
                flops=3 * rotated.size * len(blocks),
            ),
            "cache": self.appending(self.moves),
            "attention": Kind(
                [(partial(self.attention, keys, values), queries) for keys, values in seen],
                sum(array.nbytes for held in seen for array in held),
                4 * H * width * pairs(config, self.before, L) * len(seen),
            ),
            "o": _products([[b.self_attn.o_proj] for b in done], joined, H * width * D),
            "gate_up": _products(gate_up, stream, 2 * D * inner),
            "activation": Kind(
                [(_activate, gates)] * len(done), flops=6 * product.size * len(done)
            ),
            "down": _products([[b.mlp.down_proj] for b in done], product, inner * D),
            "residual sums": Kind(
                [(lambda x: [x + added], stream)] * sums, added.nbytes * sums, stream.size * sums
            ),
        }
        if keys_only:
            return found
        tied = config.tie_word_embeddings
        head = decoder.embed_tokens if tied else self.model.lm_head
        logits = self.noise(vocab)
        project = _one(head.as_linear if tied else head)
        found["head"] = Kind([(project, stream)], size(head), 2 * L * D * vocab)
        found["argmax"] = Kind([(_one(greedy), logits)], flops=vocab)
        return found


def _one(run: Callable[[mx.array], mx.array]) -> Operation:
    return lambda x: [run(x)]


def _activate(gates: mx.array) -> Arrays:
    return [swiglu(*mx.split(gates, 2, axis=-1))]


def _either(parent: nn.Module, fused: str, names: Sequence[str]) -> list[nn.Module]:
    return [parent[fused]] if fused in parent else [parent[name] for name in names]


def _products(groups: Sequence[Sequence[nn.Module]], x: mx.array, weights: int) -> Kind:
    """`x [1, L, inputs]` by the matrices of each group, of `weights` numbers a group."""

    def project(modules: Sequence[nn.Module], x: mx.array) -> Arrays:
        return [module(x) for module in modules]

    steps = [(partial(project, group), x) for group in groups]
    held = size(*(module for group in groups for module in group))
    return Kind(steps, held, 2 * x.shape[1] * weights * len(groups))


def size(*modules: nn.Module) -> int:
    """Bytes of the modules' arrays."""
    return sum(a.nbytes for m in modules for a in dict(tree_flatten(m.parameters())).values())
