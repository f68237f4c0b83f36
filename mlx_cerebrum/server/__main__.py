"""`python -m mlx_cerebrum.server`: OpenAI's API and a chat page on this machine."""

import argparse
import logging
import os
import re
import sys
import threading
import webbrowser
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from mlx_cerebrum import cli  # isort: skip  # first: it says what is not installed
import mlx.core as mx

from mlx_cerebrum.decoding.decode import prefill_step
from mlx_cerebrum.errors import CheckpointError, RequestError, shown
from mlx_cerebrum.flags import (
    add_draft_flag,
    add_kv_bits_flag,
    add_machines_flags,
    add_max_tokens_flag,
    add_model_flags,
    add_plans_flag,
    add_prefill_flag,
    add_sampling_flags,
    machines,
    memory_limit,
    model_spec,
    sampling_of,
    say_assumed,
)
from mlx_cerebrum.machine.awake import awake
from mlx_cerebrum.model.limits import limits
from mlx_cerebrum.model.limits import memory_limit as current_limit
from mlx_cerebrum.model.memory import GB, human
from mlx_cerebrum.progress import progress
from mlx_cerebrum.server import log
from mlx_cerebrum.server.app import Service, Settings
from mlx_cerebrum.server.connections import Room
from mlx_cerebrum.server.engine import BatchEngine
from mlx_cerebrum.server.holding import Laid, Source, weight_files
from mlx_cerebrum.server.intake import Defaults
from mlx_cerebrum.server.listening import Server, bind, url
from mlx_cerebrum.server.menu import Menu
from mlx_cerebrum.server.security import check_key
from mlx_cerebrum.shelf.entries import Entry
from mlx_cerebrum.text import say
from mlx_cerebrum.weights import hub
from mlx_cerebrum.weights.opening import ModelSpec, open_model
from mlx_cerebrum.weights.storage import dtype_name
from mlx_cerebrum.weights.views import described, load_views

if TYPE_CHECKING:
    from mlx_cerebrum.ranks.machines import Machines

KEY_VARIABLE = "MLX_CEREBRUM_API_KEY"
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9.\[\]:_-]+")  # an app's page has its own scheme
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)([smh])", re.ASCII)
_UNITS = {"s": 1, "m": 60, "h": 3600}
_MOST_SECONDS = 31_536_000  # a year
# Of a page that has no site: a file's, a desktop app's; and a frame's that any site may sandbox.
NOBODYS = ("null", "file://")


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", handlers=[log.Handler()])
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    # Everything that can be refused is, cheapest first, before weights are read.
    spec, memory = model_spec(args), memory_limit(args)
    settings = replace(settings_of(args), room=Room.within_limits())
    several = machines(args)
    if several is not None and several.follows:
        with limits(memory, wiring=not args.no_wire):
            return several.follow(spec, args.plan)
    with (
        bind(args.host, args.port, settings.api_key is not None) as listening,
        nullcontext() if several is None else awake(),  # asleep, it would lose the others
    ):
        engine = _loaded(args, spec, memory, settings, several)
        for origin in (each for each in NOBODYS if each in settings.cors_origins):
            say(f"warning: with --cors-origin {origin} any site that knows the API key may ask")
        try:
            service = _service(engine, settings)
            address = url(listening)
            dtype = dtype_name(next(iter(engine.laid.values())).dtype)
            held = f"{human(mx.get_active_memory())} held, {dtype}"
            line = f"{address}  {', '.join(engine.names)}  ({held})"

            def ready() -> None:
                say(line)
                if args.open:
                    open_page(address)

            server = Server(service, args.grace, ready)
            server.run(sockets=[listening])
        finally:
            if several is not None:
                several.rest()
            engine.close(0.0)
    return 0


def _loaded(
    args: argparse.Namespace,
    spec: ModelSpec,
    memory: int | None,
    settings: Settings,
    several: "Machines | None" = None,
) -> BatchEngine:
    """The engine, with the model that the flags name. It alone has the weights: nobody else keeps
    them when it lets them go."""
    with limits(memory), progress("loading", not args.quiet) as report:
        opened = open_model(spec) if several is None else several.open(spec, args.plan)
        settings.defaults.sampling.check_vocabulary(opened.config.vocab_size)
        models, tokenizer = load_views(opened, args.plan, report)
        memory = memory if several is None else current_limit()
    say_assumed(tokenizer)
    engine = BatchEngine(
        models,
        tokenizer,
        max_batch=args.batch,
        max_queue=args.queue,
        cache_bytes=cache_bytes(args),
        prefill_step_size=args.prefill_step_size,
        memory_limit=memory,
        kv_bits=args.kv_bits,
        draft=args.draft,
        source=Source.of(opened) if several is None else None,
        unload_after=args.unload_after,
        wiring=not args.no_wire,
        alone=None if several is None else several.links.watch.end,
    )
    if several is not None:
        several.links.watch.on_end = engine.lose
    return engine


def _service(engine: BatchEngine, settings: Settings) -> Service:
    """The web side, with what stands on the shelf."""
    laid = engine.laid
    first = next(iter(laid.values()))
    models = {name: described(each.config) for name, each in laid.items()}
    service = Service(engine, models, first.tokenizer, settings, str(first.dtype))
    source = engine.holdings[0].source
    if source is None:  # on several machines: others could not follow to another model
        return service

    def held_as(entry: Entry) -> ModelSpec:
        """As the server's own model, where it has the same weights; else as they are stored."""
        with suppress(CheckpointError):
            if weight_files(entry.path) == source.files:
                return replace(source.spec, name=entry.path)
        return ModelSpec(entry.path, dtype=source.spec.dtype)

    def serve(name: str, model: Laid) -> None:
        service.serve(name, described(model.config), model.tokenizer, str(model.dtype))

    service.use(Menu(engine, held_as, serve))
    return service


def open_page(address: str) -> None:
    """Open the address in a browser with windows, if there is one; not in this terminal."""
    if sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        # In a thread: some browsers hold on until they are closed.
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()


def parser() -> cli.ArgumentParser:
    p = cli.ArgumentParser(
        prog="python -m mlx_cerebrum.server",
        description="Serve OpenAI's API and a chat page from one copy of the weights.",
    )
    add_model_flags(p, f"{hub.DEFAULT_REPO}, as cerebrum-12.25b and cerebrum-7b")
    add_plans_flag(p)
    where = p.add_argument_group("where, and for whom")
    where.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; one that others can reach needs a key (default: 127.0.0.1)",
    )
    where.add_argument(
        "--port", type=int, default=8080, help="port; 0 takes any free one (default: 8080)"
    )
    where.add_argument(
        "--api-key",
        metavar="KEY",
        help="ask for this key; other users of the machine can see it on the command line, so"
        f" rather set {KEY_VARIABLE} (default: ${KEY_VARIABLE}, else no key)",
    )
    where.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="answer to this Host name too, without a port; may be repeated (default: loopback"
        " names and the address listened on)",
    )
    where.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of this origin call, such as https://example.org; may be repeated"
        " (default: none but the server's own page)",
    )
    where.add_argument(
        "--open",
        action="store_true",
        help="open the page in a browser once it is there (default: only print its address)",
    )
    load = p.add_argument_group("load")
    load.add_argument(
        "--batch",
        type=int,
        default=16,
        metavar="N",
        help="answers of one model generated together, at most (default: 16)",
    )
    load.add_argument(
        "--queue", type=int, default=64, metavar="N", help="requests that may wait (default: 64)"
    )
    load.add_argument(
        "--cache-gb",
        type=float,
        default=2.0,  # with 1 a 12.25B in 16 bits could not go back past its window of 4096
        metavar="GB",
        help="kept of earlier prompts, for those that begin alike, while no answer needs it; 10^9"
        " bytes, 0 keeps nothing (default: 2)",
    )
    load.add_argument(
        "--unload-after",
        type=_duration,
        metavar="TIME",
        help="release weights and caches after so long without a request, and load them again for"
        " the next: 90s, 15m, 2h; 0 or never keeps them (default: never)",
    )
    load.add_argument(
        "--max-body-mb",
        type=float,
        default=2.0,
        metavar="MB",
        help="largest request body, 10^6 bytes (default: 2)",
    )
    add_prefill_flag(load, "; fewer while others are answered, so that they need not wait")
    add_kv_bits_flag(load)
    add_draft_flag(load, "ngram", "ngram")
    load.add_argument(
        "--grace",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="how long answers may go on after Ctrl-C; a second one ends them (default: 10)",
    )
    add_machines_flags(p)
    answers = p.add_argument_group("answers to requests that do not say")
    add_max_tokens_flag(answers, 1024)
    add_sampling_flags(answers)
    p.add_argument("--quiet", action="store_true", help="no line for each request")
    p.add_debug()
    return p


def _duration(text: str) -> float | None:
    """The type of --unload-after: seconds, or None for never."""
    if text.lower() in ("0", "never"):
        return None
    found = _DURATION.fullmatch(text)
    seconds = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if not 0 < seconds <= _MOST_SECONDS:
        message = (
            f"{shown(text)} is no time such as 90s, 15m or 2h (at most {_MOST_SECONDS // 3600}h)"
        )
        raise argparse.ArgumentTypeError(message)
    return seconds


def settings_of(args: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> Settings:
    """What the flags say of the web side. Raises RequestError for what can't be honoured."""
    key = args.api_key if args.api_key is not None else environment.get(KEY_VARIABLE) or None
    if key is not None:
        try:
            check_key(key)
        except ValueError as error:
            raise RequestError(str(error)) from None
    prefill_step(args.prefill_step_size)
    for name in ("batch", "max_tokens"):
        if getattr(args, name) < 1:
            flag = name.replace("_", "-")
            raise RequestError(f"{flag} must be at least 1, not {getattr(args, name)}")
    if args.queue < 0:
        raise RequestError(f"queue must be 0 or more, not {args.queue}")
    for name, least, most in (
        ("cache_gb", 0.0, 1e9),
        ("max_body_mb", 0.001, 1e9),
        ("grace", 0.0, 86_400.0),  # a day; threads can't wait for ever
    ):
        value, flag = getattr(args, name), name.replace("_", "-")
        if not least <= value <= most:
            raise RequestError(f"{flag} must be from {least:g} to {most:g}, not {value:g}")
    sampling = sampling_of(args)
    for host in args.allowed_host:
        if not re.fullmatch(r"[A-Za-z0-9.:-]+", host) or "://" in host:
            raise RequestError(f"allowed-host must be a name such as mac.local, not {host!r}")
    for origin in args.cors_origin:
        if origin in NOBODYS and key is None:
            raise RequestError(
                f"cors-origin {origin} lets pages of any site ask, through a sandboxed frame:"
                " it needs --api-key too"
            )
        if origin not in NOBODYS and not _ORIGIN.fullmatch(origin):
            raise RequestError(
                f"cors-origin must be a page's scheme and host, https://example.org, not {origin!r}"
            )
    return Settings(
        api_key=key,
        allowed_hosts={args.host, *args.allowed_host},
        cors_origins=frozenset(args.cors_origin),
        max_body=int(args.max_body_mb * 1e6),
        defaults=Defaults(args.max_tokens, sampling),
        log=not args.quiet,
        debug=args.debug,
    )


def cache_bytes(args: argparse.Namespace) -> int:
    return int(args.cache_gb * GB)


if __name__ == "__main__":
    sys.exit(main())
