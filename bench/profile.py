"""Where a forward pass spends its time: each kind of operation alone, at the model's shapes.

A pass is a long chain of a few kinds of operations. Each kind is run here alone, once for every
position as the pass runs it, with that position's own weights and keys, each after the one
before it; so its time is what it costs where nothing else interferes. What the whole pass takes
beyond the sum is the rest: residual sums, building the graph in Python, waiting between kernels.

Decode reads every matrix for one token, so its kinds are rated in GB/s and can be held against
the memory's bandwidth. Prefill uses every matrix for a whole chunk, so its kinds are rated in
GFLOP/s. A kind that is rated as high as the machine goes can't be made faster, only smaller.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from bench import machine
from bench.bandwidth import seconds_of
from bench.engines import prompt_ids
from bench.report import parser, publish, table
from bench.suite import Results
from mlx_cerebrum import cli, hub
from mlx_cerebrum.cache import WindowedKVCache
from mlx_cerebrum.checkpoint import open_checkpoint
from mlx_cerebrum.decode import PREFILL_STEP, greedy, prefill
from mlx_cerebrum.load import choose_storage, load_model, planned_config
from mlx_cerebrum.memory import GB
from mlx_cerebrum.model import Model, TransformerBlock

REST = "the rest"
UNITS = {"decode": "GB/s", "prefill": "GFLOP/s"}
Operation = Callable[[mx.array], mx.array]
Kinds = dict[str, list[tuple[Operation, mx.array]]]  # operations in order, each with its input


def main(argv: list[str] | None = None) -> int:
    p = parser("profile", "Where one decode step and one prefill chunk spend their time.")
    p.add_argument("--model", default="demo", metavar="DIR|FILE.gguf|HUBID|demo", help="which")
    p.add_argument("--plan", metavar="NAME|FILE", help="layer plan (default: as it is)")
    p.add_argument(
        "--prompt-tokens", type=int, default=512, metavar="N", help="before the step (default: 512)"
    )
    p.add_argument("--rounds", type=int, default=5, metavar="N", help="of each (default: 5)")
    args = p.parse_args(argv)
    machine.use_openblas(not args.no_openblas)
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(hub.resolve(args.model))
    config = planned_config(checkpoint.config, args.plan, None)
    prompt = prompt_ids(checkpoint, max(2, args.prompt_tokens))
    model = load_model(checkpoint, config, choose_storage(checkpoint, None, "auto"))
    results = measure(model, prompt, max(1, args.rounds))
    publish(args, "profile", results, text(results))
    return 0


def measure(model: Model, prompt: list[int], count: int = 3) -> Results:
    """Seconds of each kind in one decode step after `prompt`, and in its first prefill chunk."""
    chunk = min(PREFILL_STEP, len(prompt))
    return {
        "context": len(prompt),
        "chunk": chunk,
        "prefill": _prefill(model, mx.array(prompt[:chunk]), count),
        "decode": _decode(model, mx.array(prompt), count),
    }


def _prefill(model: Model, tokens: mx.array, count: int) -> Results:
    total = seconds_of(lambda: prefill(model, tokens, model.make_cache()), count)
    kinds = _kinds(model, tokens[None], None)
    # Keys and values are all that prefill is for: after the last position's nothing is computed.
    for kind in ("attention", "o", "mlp"):
        kinds[kind].pop()
    del kinds["head"], kinds["norms"][-2:]
    positions = len(model.config.layer_map)
    length, config = tokens.size, model.config
    width, hidden = config.head_dim, config.hidden_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    visible = min(length, config.sliding_window or length)
    flops = {
        "qkv": 2 * length * hidden * (heads + 2 * kv_heads) * width * positions,
        "o": 2 * length * hidden * heads * width * (positions - 1),
        "mlp": 6 * length * hidden * config.intermediate_size * (positions - 1),
        # Scores and weighted sums of the half of the square that is not masked.
        "attention": 2 * length * visible * heads * width * (positions - 1),
    }
    return _timed(kinds, total, {kind: n / 1e9 for kind, n in flops.items()}, count)


def _decode(model: Model, tokens: mx.array, count: int) -> Results:
    cache = model.make_cache()
    prefill(model, tokens[:-1], cache)
    last = tokens[None, -1:]

    def step() -> None:
        mx.eval(greedy(model(last, cache)[:, -1]))
        for layer in cache:
            layer.trim(1)

    total = seconds_of(step, 3 * count)
    blocks = [model.model.layers[b] for b in model.config.layer_map]
    config = model.config
    head = model.model.embed_tokens if config.tie_word_embeddings else model.lm_head
    visible = min(tokens.size, config.sliding_window or tokens.size)
    values = config.kv_values_per_token() * model.model.norm.weight.dtype.size
    gigabytes = {
        "qkv": sum(_size(m) for block in blocks for m in _qkv(block)) / GB,
        "o": sum(_size(block.self_attn.o_proj) for block in blocks) / GB,
        "mlp": sum(_size(block.mlp) for block in blocks) / GB,
        "head": _size(head) / GB,
        "attention": values * visible / GB,
    }
    return _timed(_kinds(model, last, cache), total, gigabytes, 3 * count)


def _timed(kinds: Kinds, total: float, work: dict[str, float], count: int) -> Results:
    found: Results = {}
    for kind, steps in kinds.items():
        seconds = seconds_of(partial(_chain, steps), count)
        rate = work[kind] / seconds if kind in work else None
        found[kind] = {"seconds": float(f"{seconds:.4g}"), "rate": rate and float(f"{rate:.4g}")}
    rest = total - sum(each["seconds"] for each in found.values())
    found[REST] = {"seconds": float(f"{rest:.4g}"), "rate": None}
    return {"total": float(f"{total:.4g}"), "kinds": found}


def _chain(steps: Iterable[tuple[Operation, mx.array]]) -> None:
    """Run each step once the one before it is done, as in a forward pass."""
    before: list[mx.array] = []
    for run, x in steps:
        before = [run(mx.depends([x], before)[0] if before else x)]
    mx.eval(before)


def _kinds(model: Model, tokens: mx.array, cache: list[WindowedKVCache] | None) -> Kinds:
    """What a pass over `tokens [1, L]` runs, by kind; `cache` holds what came before them."""
    config, decoder = model.config, model.model
    (_, L), dtype = tokens.shape, decoder.norm.weight.dtype
    H, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def noise(*shape: int) -> mx.array:
        return mx.random.normal(shape).astype(dtype)

    x, joined = noise(1, L, config.hidden_size), noise(1, L, H * width)
    queries = noise(1, H, L, width)
    rotated, values = noise(1, H + kv_heads, L, width), noise(1, kv_heads, L, width)
    blocks = [decoder.layers[b] for b in config.layer_map]
    caches = model.make_cache() if cache is None else cache
    mask = caches[0].make_mask(L, return_array=False, window_size=config.sliding_window)
    held = []
    for layer in caches:
        found = layer.update_and_fetch(rotated[:, :kv_heads], values)
        # Copies: while someone looks at a buffer, MLX can't write into it in place.
        held.append([array + 0 for array in found])
        layer.trim(L)
    mx.eval(x, joined, queries, rotated, values, held)

    def attend(keys: mx.array, values: mx.array) -> Operation:
        return lambda q: mx.fast.scaled_dot_product_attention(
            q, keys, values, scale=width**-0.5, mask=mask
        )

    def rope(block: TransformerBlock, layer: WindowedKVCache) -> Operation:
        def run(x: mx.array) -> mx.array:
            turned = block.self_attn.rope(x, offset=layer.offset)
            keys, _ = layer.update_and_fetch(turned[:, H:], values)
            layer.trim(L)
            return keys

        return run

    def project(block: TransformerBlock) -> Operation:
        return lambda x: mx.concatenate([m(x) for m in _qkv(block)], -1)

    norms = [n for b in blocks for n in (b.input_layernorm, b.post_attention_layernorm)]
    head = decoder.embed_tokens.as_linear if config.tie_word_embeddings else model.lm_head
    return {
        "embedding": [(decoder.embed_tokens, tokens)],
        "norms": [(norm, x) for norm in [*norms, decoder.norm]],
        "qkv": [(project(block), x) for block in blocks],
        "rope, cache": [
            (rope(block, layer), rotated) for block, layer in zip(blocks, caches, strict=True)
        ],
        "attention": [(attend(keys, values), queries) for keys, values in held],
        "o": [(block.self_attn.o_proj, joined) for block in blocks],
        "mlp": [(block.mlp, x) for block in blocks],
        "head": [(head, x)],
    }


def _qkv(block: TransformerBlock) -> list[nn.Module]:
    attention = block.self_attn
    if "qkv_proj" in attention:
        return [attention.qkv_proj]
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def _size(module: nn.Module) -> int:
    return sum(array.nbytes for array in dict(tree_flatten(module.parameters())).values())


def text(results: Results) -> list[str]:
    """A table for each phase, its kinds in the order of their time."""
    what = {
        "decode": f"one decode step after {results['context']} tokens",
        "prefill": f"one prefill chunk of {results['chunk']} tokens",
    }
    tables = []
    for phase, unit in UNITS.items():
        found = results[phase]
        kinds = sorted(found["kinds"].items(), key=lambda kind: -kind[1]["seconds"])
        rows = [
            [
                name,
                f"{kind['seconds'] * 1000:.2f}",
                f"{kind['seconds'] / found['total']:.0%}",
                f"{kind['rate']:.1f}" if kind["rate"] else "",
            ]
            for name, kind in kinds
        ]
        total = ["all of it", f"{found['total'] * 1000:.2f}", "100%", ""]
        tables.append(table([what[phase], "ms", "share", unit], [*rows, total]))
    return tables


if __name__ == "__main__":
    sys.exit(main())
