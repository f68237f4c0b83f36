"""`python -m mlx_cerebrum.server`: OpenAI's API and a chat page on this machine."""

import argparse
import logging
import os
import sys
import threading
import webbrowser
from dataclasses import replace

import mlx.core as mx

from mlx_cerebrum import cli
from mlx_cerebrum.flags import memory_limit, model_spec, say_assumed
from mlx_cerebrum.model.limits import limits
from mlx_cerebrum.model.memory import human
from mlx_cerebrum.progress import progress
from mlx_cerebrum.server import args as flags
from mlx_cerebrum.server import log
from mlx_cerebrum.server.app import Service
from mlx_cerebrum.server.connections import Room
from mlx_cerebrum.server.engine import BatchEngine
from mlx_cerebrum.server.listening import Server, bind, url
from mlx_cerebrum.text import say
from mlx_cerebrum.weights.opening import open_model
from mlx_cerebrum.weights.views import describe, load_views


def main(argv: list[str] | None = None) -> int:
    args = flags.parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", handlers=[log.Handler()])
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    # Everything that can be refused is, cheapest first, before weights are read.
    spec, memory = model_spec(args), memory_limit(args)
    settings = replace(flags.settings(args), room=Room.within_limits())
    with bind(args.host, args.port, settings.api_key is not None) as listening:
        with limits(memory), progress("loading", not args.quiet) as report:
            models, tokenizer = load_views(open_model(spec), args.plan, report)
        say_assumed(tokenizer)
        dtype = next(iter(models.values())).dtype
        engine = BatchEngine(
            models,
            tokenizer,
            max_batch=args.batch,
            max_queue=args.queue,
            cache_bytes=flags.cache_bytes(args),
            prefill_step_size=args.prefill_step_size,
            memory_limit=memory,
        )
        try:
            described = {name: describe(model) for name, model in models.items()}
            service = Service(engine, described, tokenizer, settings, str(dtype))
            address = url(listening)
            line = f"{address}  {', '.join(models)}  ({human(mx.get_active_memory())} held)"

            def ready() -> None:
                say(line)
                if args.open:
                    open_page(address)

            server = Server(service, args.grace, ready)
            server.run(sockets=[listening])
        finally:
            engine.close(0.0)
    return 0


def open_page(address: str) -> None:
    """Open the address in a browser with windows, if there is one; not in this terminal."""
    if sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        # In a thread: some browsers hold on until they are closed.
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
