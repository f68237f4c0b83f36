"""llama.cpp's own server, through xllamacpp's prebuilt wheel, for a process of its own.

python -m bench.server_llama FILE.gguf --port 8080 --slots 8 --context 1024 --threads 4
"""

import argparse
import signal
import sys
from pathlib import Path

from bench.llama_cpp import Tuning, serve


def _serve() -> int:
    p = argparse.ArgumentParser(prog="bench.server_llama", description="Serve a GGUF file.")
    p.add_argument("file", type=Path, metavar="FILE.gguf", help="the weights")
    for name in ("port", "slots", "context", "threads", "flash-attention"):
        p.add_argument(f"--{name}", type=int, required=True)
    args = p.parse_args()
    tuning = Tuning(args.threads, bool(args.flash_attention))
    server = serve(args.file, tuning, True, args.context, args.slots, args.port)
    signal.pause()
    del server  # it listened until here
    return 0


if __name__ == "__main__":
    sys.exit(_serve())
