"""llama.cpp as an engine: its server in this process, through xllamacpp's prebuilt wheel.

The server takes token ids and says in every answer how long prompt and tokens took, so the
figures are its own, without the time that Python takes around them. It counts the tokens of
its pace from the first, which belongs to the prompt; here the first is left out for everyone.

`python -m bench.llama_cpp FILE.gguf --port 8080 ...` serves in a process of its own.
"""

import argparse
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.engines import Loaded, Run, reads, required
from mlx_cerebrum.errors import CerebrumError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.weights.gguf_file import GGUFFile

_SAMPLE = 128  # tokens of the prompt that settings are tried on
_GPU_LAYERS = 1000  # more than any model has: all of them


@dataclass(frozen=True)
class Tuning:
    """What can be set and is not the same best for every machine."""

    threads: int
    flash_attention: bool


def serve(
    path: Path, tuning: Tuning, exact: bool, context: int, slots: int = 1, port: int = 0
) -> Any:
    """Its server, listening until it is let go of; `slots` requests at once share `context`."""
    library: Any = import_module("xllamacpp")  # 100 MB, needed here only
    params = library.CommonParams()
    params.model.path = str(path)
    params.port, params.n_ctx, params.n_parallel = port, context, slots
    params.n_gpu_layers = _GPU_LAYERS
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = tuning.threads
    params.warmup, params.verbosity = False, -1
    kind, flash = library.ggml_type, library.llama_flash_attn_type
    cache = kind.GGML_TYPE_F32 if exact else kind.GGML_TYPE_F16
    params.cache_type_k = params.cache_type_v = cache
    on, off = flash.LLAMA_FLASH_ATTN_TYPE_ENABLED, flash.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.flash_attn_type = on if tuning.flash_attention else off
    return library.Server(params)


def _ask(server: Any, prompt: Sequence[int], max_tokens: int, **more: Any) -> dict[str, Any]:
    """Its answer, greedy; nothing of an earlier prompt is reused. Raises CerebrumError."""
    greedy = {"temperature": 0.0, "samplers": ["top_k"], "top_k": 1, "ignore_eos": True}
    asked = {"prompt": list(prompt), "max_tokens": max_tokens, "cache_prompt": False}
    answer: dict[str, Any] = server.handle_completions(asked | greedy | more)
    if "choices" not in answer:
        raise CerebrumError(f"llama.cpp: {answer.get('error', answer)}")
    return answer


def on_gpu() -> bool:
    library: Any = import_module("xllamacpp")
    return any("GPU" in device["type"].name for device in library.get_device_info())


def settings(tuning: Tuning, exact: bool) -> str:
    """What a reader must know of it."""
    place = "all layers on the GPU" if on_gpu() else f"CPU, threads: {tuning.threads}"
    flash = "on" if tuning.flash_attention else "off"
    keys = "float32" if exact else "float16"
    return f"{place}, flash attention {flash}, keys and values in {keys}"


def tune(path: Path, exact: bool, sample: Sequence[int]) -> Tuning:
    """The fastest of: all cores or half of them; with flash attention or without."""
    sample, tokens = sample[:_SAMPLE], 8

    def took(tuning: Tuning) -> float:
        server = serve(path, tuning, exact, len(sample) + tokens + 1)
        _ask(server, sample[:8], 2)
        spent = _ask(server, sample, tokens)["timings"]
        return float(spent["prompt_ms"] + spent["predicted_ms"])

    cores = os.cpu_count() or 1
    threads = {cores, max(1, cores // 2)}
    return min((Tuning(n, flash) for n in threads for flash in (True, False)), key=took)


def open_engine(
    path: Path, config: ModelConfig, sample: Sequence[int], exact: bool, context: int
) -> Loaded:
    """`exact`: keys and values in float32, for arithmetic like ours in float32; else float16,
    its default. `context` is the most tokens it has to hold. Settings are tried on `sample`."""
    tuning = tune(path, exact, sample)
    server = serve(path, tuning, exact, context)
    said: dict[tuple[tuple[int, ...], int], tuple[str, list[int]]] = {}

    def generate(prompt: Sequence[int], max_tokens: int) -> Run:
        """Which ids it says comes with probabilities, which take time: asked once, untimed."""
        key = tuple(prompt), max_tokens
        if key not in said:
            choice = _ask(server, prompt, max_tokens, n_probs=1)["choices"][0]
            said[key] = choice["text"], [one["id"] for one in choice["logprobs"]["content"]]
        answer = _ask(server, prompt, max_tokens)
        text, ids = said[key]
        if answer["choices"][0]["text"] != text:
            raise CerebrumError("llama.cpp did not say the same twice")
        spent = answer["timings"]
        return Run(ids, spent["prompt_ms"] / 1000, spent["predicted_ms"] / 1000, len(prompt))

    sizes = {name: tensor.nbytes for name, tensor in GGUFFile.open(path).tensors.items()}
    return Loaded(
        version=f"xllamacpp {required('xllamacpp', 'bench')}",
        settings=f"{settings(tuning, exact)}, greedy",
        weights=sum(sizes.values()),
        reads=reads(sizes),
        kv=config.kv_values_per_token() * (4 if exact else 2),
        generate=generate,
    )


def _serve_alone() -> None:
    p = argparse.ArgumentParser(prog="bench.llama_cpp", description="Serve a GGUF file.")
    p.add_argument("file", type=Path, metavar="FILE.gguf", help="the weights")
    for name in ("port", "slots", "context", "threads", "flash-attention"):
        p.add_argument(f"--{name}", type=int, required=True)
    args = p.parse_args()
    tuning = Tuning(args.threads, bool(args.flash_attention))
    server = serve(args.file, tuning, True, args.context, args.slots, args.port)
    signal.pause()
    del server  # it listened until here


if __name__ == "__main__":
    _serve_alone()
