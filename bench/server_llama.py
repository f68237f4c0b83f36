"""llama.cpp's own server, through xllamacpp's prebuilt wheel, for a process of its own.

python -m bench.server_llama FILE.gguf --parallel 8 --context 1024

Keys and values in float32, the threads and the attention that were fastest here, tried before it
serves. Its first line is what it runs with, its second where it listens.
"""

import argparse
import json
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from bench import llama_cpp
from bench.engines import required
from mlx_cerebrum import cli
from mlx_cerebrum.text import say

_KEYS = "float32"
_STOP = (signal.SIGTERM, signal.SIGINT)
_SAMPLE = range(1000, 1128)  # token ids that settings are tried on


def main(argv: list[str] | None = None) -> int:
    p = cli.ArgumentParser(prog="bench.server_llama", description="Serve a GGUF file.")
    p.add_argument("file", type=Path, metavar="FILE.gguf", help="the weights, in F32")
    p.add_argument("--parallel", type=int, default=8, help="requests at once (default: 8)")
    p.add_argument("--context", type=int, default=1024, help="tokens a request (default: 1024)")
    p.add_debug()
    args = p.parse_args(argv)
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    version = required("xllamacpp", "bench")
    tuning = llama_cpp.tune(args.file, True, list(_SAMPLE))
    server: Any = _serve(args, tuning)
    place = "all layers on the GPU" if llama_cpp.on_gpu() else f"CPU, threads: {tuning.threads}"
    flash = "on" if tuning.flash_attention else "off"
    settings = f"{args.parallel} slots, {place}, flash attention {flash}, {_KEYS} keys and values"
    say(json.dumps({"version": f"xllamacpp {version}", "settings": settings}))
    say(server.listening_address)
    signal.sigwait(_STOP)
    return 0


def _serve(args: argparse.Namespace, tuning: llama_cpp.Tuning) -> Any:
    """A server that listens until it is let go of."""
    library: Any = import_module("xllamacpp")
    params = library.CommonParams()
    params.model.path = str(args.file)
    params.port = 0  # its host is the loopback by default; it says which port
    params.n_parallel, params.n_ctx = args.parallel, args.parallel * args.context
    params.n_gpu_layers, params.verbosity = 1000, -1  # all layers; silent
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = tuning.threads
    params.cache_type_k = params.cache_type_v = library.ggml_type.GGML_TYPE_F32
    flash = "ENABLED" if tuning.flash_attention else "DISABLED"
    kind = library.llama_flash_attn_type
    params.flash_attn_type = getattr(kind, f"LLAMA_FLASH_ATTN_TYPE_{flash}")
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)  # before its threads begin, to wait for them
    return library.Server(params)


if __name__ == "__main__":
    sys.exit(main())
