"""The server's one request on an 8 GB Mac, rehearsed in a real limit of that size, without a GPU.

Everything is held as it is on Metal: the 12.25B's weights in 4 bits, the caches, what a pass makes
of a chunk of 512 tokens, what is kept of the prompt for the next. Nothing is multiplied. Products
with weights, and attention, are put in place by ones that wait for the same inputs and make an
output of the same shape, as Metal's kernels do: a CPU would take hours for what these take minutes
for. So it shows what memory the runtime takes, and no pace and no text.

`python -m bench.rehearsal DIR` writes random weights of 4.1 GB to DIR, unless it is there, and runs
two turns of a conversation in a process that can't have more than an 8 GB Mac's GPU: the second
goes on from what the first computed. Linux only.
"""

import argparse
import json
import os
import queue
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx

from bench import memory_limit
from bench.memory import PLAN
from bench.memory_limit import MAC_8GB
from bench.random_model import GEOMETRIES
from mlx_cerebrum import cli, device
from mlx_cerebrum.decoding.sampling import Sampling
from mlx_cerebrum.errors import CerebrumError
from mlx_cerebrum.model import forward
from mlx_cerebrum.model.config import FORMAT_VERSION, ModelConfig
from mlx_cerebrum.model.memory import GB
from mlx_cerebrum.model.tensors import module_shapes, place
from mlx_cerebrum.plan.layer_plan import resolve
from mlx_cerebrum.server.engine import BatchEngine
from mlx_cerebrum.server.job_bytes import jobs_bytes
from mlx_cerebrum.server.jobs import Event, Failed, Job, Piece
from mlx_cerebrum.text import say, tell
from mlx_cerebrum.weights.opening import ModelSpec, open_model
from mlx_cerebrum.weights.quantize import Packing
from mlx_cerebrum.weights.safetensors_checkpoint import INDEX

PACKING = Packing(4, 64)
TURNS = ((2048, 512), (8192, 512))  # tokens of a prompt and of its answer: the second fills windows
_STEP = 512  # prompt tokens that Metal reads at once


def write(directory: Path, raw: dict[str, Any], plan: str = PLAN) -> None:
    """Write a folded checkpoint whose packed matrices are random, a file for each block."""
    directory.mkdir()
    config = ModelConfig.from_dict(raw)
    files: dict[str, str] = {}
    parts: dict[int | None, list[str]] = {}
    shapes = module_shapes(config)
    for module in shapes:
        inside = place(module)
        parts.setdefault(None if inside is None else inside[0], []).append(module)
    for number, modules in enumerate(parts.values(), 1):
        arrays = {}
        for module in modules:
            shape = shapes[module]
            if len(shape) == 1:
                arrays[f"{module}.weight"] = mx.ones(shape, mx.bfloat16)
                continue
            packed = PACKING.shapes(*shape)
            words = mx.random.randint(0, 2**31 - 1, packed["weight"], mx.uint32)
            arrays[f"{module}.weight"] = words
            for part in ("scales", "biases"):
                arrays[f"{module}.{part}"] = mx.full(packed[part], 0.01, mx.bfloat16)
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        mx.save_safetensors(str(directory / file), arrays, {"format": "mlx"})
        files |= dict.fromkeys(arrays, file)
    folded = raw | {
        "model_type": "cerebrum",
        "format_version": FORMAT_VERSION,
        "layer_map": list(resolve(plan).layer_map(config.num_hidden_layers)),
        "quantization": PACKING.as_config(),
    }
    for name, value in ((INDEX, {"weight_map": files}), ("config.json", folded)):
        (directory / name).write_text(json.dumps(value) + "\n", encoding="utf-8")


def _product(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array | None = None, **_: Any
) -> mx.array:
    """`[..., N]` of a packed `[N, K]`."""
    return x[..., :1] * mx.ones(len(weight), x.dtype)


def _attention(q: mx.array, k: mx.array, v: mx.array, **_: Any) -> mx.array:
    """As a fused kernel: no scores are held."""
    last = k[..., -1:, :] + v[..., -1:, :]
    return q + mx.repeat(last, q.shape[1] // last.shape[1], axis=1)


@contextmanager
def metal(allows: int) -> Iterator[None]:
    """Inside, the runtime takes this for a Mac whose Metal allows so many bytes, and multiplies
    nothing."""
    size = {"max_recommended_working_set_size": allows, "memory_size": allows}
    with ExitStack() as patched:
        for patch in (
            mock.patch.object(device, "backend", return_value="metal"),
            mock.patch.object(mx, "device_info", return_value=size),
            mock.patch.object(mx, "set_wired_limit", return_value=0),
            mock.patch.object(mx, "quantized_matmul", _product),
            mock.patch.object(mx.fast, "scaled_dot_product_attention", _attention),
            mock.patch.object(forward, "_swiglu_in_one", mx.multiply),  # one output too
        ):
            patched.enter_context(patch)
        yield


def converse(path: Path, turns: tuple[tuple[int, int], ...], allows: int) -> dict[str, Any]:
    """Turns of one conversation, asked of the server's engine. Sizes in bytes."""
    found: list[dict[str, int]] = []
    with metal(allows):
        tokenizer = open_model(ModelSpec("demo")).tokenizer
        models = {"m": open_model(ModelSpec(path)).load()}
        weights = mx.get_active_memory()
        engine = BatchEngine(
            models, tokenizer, cache_bytes=2 * 10**9, prefill_step_size=_STEP, draft="ngram"
        )
        seen: list[int] = []
        try:
            for prompt, most in turns:
                ids = tuple(seen) + tuple(1 + n % 255 for n in range(prompt - len(seen)))
                job = Job("m", ids, most, sampling=Sampling(ignore_eos=True))
                mx.reset_peak_memory()
                pieces = _asked(engine, job)
                seen = [*ids, *(piece.token for piece in pieces)]
                found.append(
                    {
                        "prompt": prompt,
                        "cached": pieces[0].cached_tokens,
                        "tokens": len(pieces),
                        "predicted": jobs_bytes(models, [job], _STEP, None, "ngram"),
                        "taken": mx.get_peak_memory() - weights,
                    }
                )
        finally:
            engine.close(0)
    tokens = sum(turn["tokens"] for turn in found)
    return {"weights": weights, "turns": found, "generation_tokens": tokens}


def _said(turn: dict[str, int]) -> str:
    return (
        f"{turn['prompt']} + {turn['tokens']} tokens ({turn['cached']} kept): predicted"
        f" {turn['predicted'] / GB:.2f} GB, taken {turn['taken'] / GB:.2f} GB"
    )


def _asked(engine: BatchEngine, job: Job) -> list[Piece]:
    """All of the answer. Raises CerebrumError where there is none."""
    came: queue.SimpleQueue[Event] = queue.SimpleQueue()
    engine.submit(job, came.put)
    pieces: list[Piece] = []
    while not pieces or pieces[-1].finish_reason is None:
        event = came.get()
        if isinstance(event, Failed):
            raise CerebrumError(event.message)
        if isinstance(event, Piece):
            pieces.append(event)
    return pieces


def main(argv: list[str] | None = None) -> int:
    p = cli.ArgumentParser(
        prog="bench.rehearsal",
        description="The server's requests on an 8 GB Mac, rehearsed in a real limit.",
    )
    p.add_argument("directory", type=Path, metavar="DIR", help="made if it is not there: 4.1 GB")
    p.add_argument(
        "--limit-gb",
        type=float,
        default=MAC_8GB / GB,
        metavar="GB",
        help=f"of the process, and of Metal (default: {MAC_8GB / GB:.2f}, an 8 GB Mac's)",
    )
    p.add_argument("--here", action="store_true", help="in this process, without a real limit")
    p.add_debug()
    args = p.parse_args(argv)
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    limit = int(args.limit_gb * GB)
    if args.here:
        found = converse(args.directory, TURNS, limit)
        tell("; ".join(map(_said, found["turns"])))
        say(json.dumps(found))
        return 0
    if not args.directory.exists():
        write(args.directory, GEOMETRIES["cerebrum-7b"])
    words = ["bench.rehearsal", str(args.directory), "--here", f"--limit-gb={args.limit_gb}"]
    # As Metal does, malloc gives back what is freed: else it keeps a tenth of all for itself.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    outcome = memory_limit.run(words, limit)
    how = "finished" if outcome.code == 0 else f"ended with {outcome.code}"
    say(
        f"{outcome.kind} of {limit / GB:.2f} GB: {how}, {outcome.tokens} tokens in"
        f" {outcome.seconds:.0f} s, peak resident {outcome.peak / GB:.2f} GB; {outcome.said}"
    )
    return 0 if outcome.code == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
