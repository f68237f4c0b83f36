"""Many clients of the local server for minutes: is every answer right, and does anything leak?

A server that is right for one client can be wrong for many. Batches can mix up answers, a client
that hangs up can leave its place taken, a stream can lack its end, memory can grow by a little
with each request. None of it shows in a test of seconds. So this bench lets clients (64, for 10
minutes) ask a mix as `bench.server_mix` draws it: short prompts and long ones, every model,
streams and whole answers, conversations; some hang up in the middle, some read slowly, some send
nonsense. Every polite answer is checked to its last line: the stream's end, finish reasons, stop
strings, prompt tokens counted anew, other counts within what was asked for. A fixed set of
questions was asked alone first; their texts must come again in every company.

At the end all clients ask once more and hang up together, after which the server must be idle
within a second: nothing queued, nothing being decoded. The run fails (exit code 1) where a polite
client saw an error, a malformed body was not refused, a place was not freed, or memory grew by
1 MB a minute: resident memory's slope after minute 2, as well as it can be known while answers take
and give back some hundred MB, and, sharper, what the idle server holds after a first load and in
the end. Texts that came out differently are counted, with where: rows that are computed together
are rounded otherwise than alone, so near a tie of two tokens that is arithmetic; anything more
would show as many.

Time to first token is from the first try to the first text, waiting in the queue (and for a
server that said 429) included. With more clients than the server decodes at once it is mostly
queue, so the pace is the server's and the spread its fairness.
"""

import argparse
import json
import sys
import time
from contextlib import ExitStack
from typing import Any

from bench import machine
from bench.report import parser, publish
from bench.server_answers import CHAT, Count, Question, hear
from bench.server_client import Address, Manner, ask, get
from bench.server_clients import Load, Tally, all_at_once
from bench.server_findings import (
    ACTIVE,
    QUEUED,
    SPARE_FILES,
    criteria,
    gauge,
    generated,
    memory,
    summary,
)
from bench.server_load_report import text
from bench.server_mix import Fixed, chat, fixed_set, user
from bench.server_process import Process, Watch, handles, metrics, resident
from mlx_cerebrum import cli
from mlx_cerebrum.errors import CerebrumError, RequestError
from mlx_cerebrum.text import tell
from mlx_cerebrum.weights.opening import ModelSpec, open_model

WARM_UP = 0.2  # of the minutes, before them; of this load only errors count


def flags() -> cli.ArgumentParser:
    p = parser("server_load", "The local server under load: errors, leaks, fairness.")
    p.add_argument("--model", default="demo", help="what to serve (default: demo)")
    p.add_argument("--url", help="a server that runs already (default: start one)")
    p.add_argument("--pid", type=int, help="of the server at --url, to watch its memory")
    p.add_argument("--clients", type=int, default=64, help="at once (default: 64)")
    p.add_argument(
        "--minutes",
        type=float,
        default=10.0,
        help="of load, after a fifth of that to warm up (default: 10)",
    )
    p.add_argument("--seed", type=int, default=0, help="of the mix (default: 0)")
    p.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        help="seconds of silence that a client bears (default: 600)",
    )
    p.add_argument(
        "--cache-gb",
        type=float,
        default=0.2,
        help="of earlier prompts that the server keeps, 10^9 bytes; it must be full before minute"
        " 2, or filling it is taken for a leak (default: 0.2)",
    )
    p.add_argument(
        "--server-flag",
        action="append",
        default=[],
        metavar="FLAG",
        help="one more word for the server's command line, such as --server-flag=--max-queue=64",
    )
    return p


def main(argv: list[str] | None = None) -> int:
    args = flags().parse_args(argv)
    machine.use_openblas(not args.no_openblas)
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    if args.clients < 1 or args.minutes <= 0 or args.timeout <= 0:
        raise RequestError("--clients, --minutes and --timeout must be above 0")
    if args.pid is not None and args.url is None:
        raise RequestError("--pid is of a server at --url; a server of our own is watched anyway")
    found = measure(args, counter(args.model))
    publish(args, "server_load", found, text(found))
    return 0 if all(one["passed"] is not False for one in found["criteria"]) else 1


def counter(model: str) -> Count:
    """Counts the prompt tokens of a chat's question, by the model's own tokenizer."""
    tokenizer = open_model(ModelSpec(model)).tokenizer

    def count(asked: Question) -> int | None:
        if asked.path != CHAT:
            return len(tokenizer.encode(asked.body["prompt"]))
        return len(tokenizer.apply_chat_template(asked.body["messages"]))

    return count


def measure(args: argparse.Namespace, count: Count | None) -> dict[str, Any]:
    with ExitStack() as stack:
        server = None
        if args.url is None:
            words = ["mlx_cerebrum.server", "--model", args.model, "--port", "0"]
            words += ["--cache-gb", str(args.cache_gb), *args.server_flag]
            server = stack.enter_context(Process(words))
        address = server.address if server else Address.of(args.url)
        pid = server.pid if server else args.pid
        try:
            found = _load(address, pid, args, count)
        except CerebrumError:
            if server is not None:
                server.check()  # if it is gone, that is what to say
            raise
        if server is not None:
            started = time.monotonic()
            code = server.stop()
            found["stopped"] = {"seconds": time.monotonic() - started, "exit_code": code}
    found["criteria"] = criteria(found)
    return found


def _load(
    address: Address, pid: int | None, args: argparse.Namespace, count: Count | None
) -> dict[str, Any]:
    models = [one["id"] for one in json.loads(get(address, "/v1/models"))["data"]]
    fixed = fixed_set(models)
    _say(f"{len(fixed)} questions alone, of {', '.join(models)}")
    expected = alone(address, fixed, count, args.timeout)
    before = None if pid is None else handles(pid)
    patience = min(10.0, 6 * args.minutes)

    def loaded(minutes: float, seed: int, tally: Tally) -> float:
        """Seconds that the load took, to its last answer."""
        _say(f"{args.clients} clients for {minutes:g} minutes")
        started = time.monotonic()
        until = started + 60 * minutes
        load = Load(address, models, fixed, expected, count, until, seed, args.timeout, tally)
        load.run(args.clients)
        return time.monotonic() - started

    # What a server takes once, for the first of each kind of request, is no leak.
    new = None if pid is None else at_rest(address, pid, patience)
    warm = Tally()
    loaded(args.minutes * WARM_UP, args.seed + 1, warm)
    settle(address, pid, before)
    resting = None if pid is None else at_rest(address, pid, patience)
    tally = Tally(faults=warm.faults)
    with ExitStack() as stack:
        watch = None if pid is None else stack.enter_context(Watch(pid, address))
        seconds = loaded(args.minutes, args.seed, tally)
    _say("all clients ask, and leave")
    text = "Tell me a long story."
    asked = [
        chat(models[number % len(models)], user(text), 200, stream=True, temperature=0)
        for number in range(args.clients)
    ]
    all_at_once(address, asked, 3.0)
    settled = settle(address, pid, before)
    found = {
        "models": models,
        "seconds": seconds,
        **summary(tally, seconds),
        "settled": settled,
        "handles": {"before": before, "after": None if pid is None else handles(pid)},
        "metrics": {n: v for n, v in sorted(metrics(address).items()) if "bucket" not in n},
    }
    if watch is not None and watch.samples:
        found["memory"] = memory(watch, 60 * args.minutes)
        after = at_rest(address, watch.pid, patience)
        found["memory"]["at_rest"] = {"new": new, "before": resting, "after": after}
        found["generated_per_second"] = generated(watch.said, 60 * args.minutes)
    return found


def alone(
    address: Address, fixed: list[Fixed], count: Count | None, timeout: float
) -> dict[str, list[str]]:
    """The texts of the fixed questions, one after another. Raises CerebrumError for a fault."""
    found = {}
    for one in fixed:
        asked = one.question
        heard = hear(asked, ask(address, asked.path, asked.body, Manner(timeout)), count)
        if heard.faults:
            raise CerebrumError(f"{one.name}, asked alone: {'; '.join(heard.faults)}")
        found[one.name] = [choice.text for choice in heard.choices]
    return found


def settle(
    address: Address, pid: int | None, before: dict[str, int | None] | None, patience: float = 20.0
) -> dict[str, Any]:
    """How long until nothing is queued and decoded; after that, connections get as long."""
    started = time.monotonic()
    while True:
        asked = time.monotonic() - started
        try:
            seen = metrics(address)
        except CerebrumError:  # too busy to say is not settled
            if asked > patience:
                raise
            continue
        held = {key: gauge(seen, key) for key in (QUEUED, ACTIVE)}
        if not any(held.values()) or asked > patience:
            break
        time.sleep(0.05)
    opened = (before or {}).get("open_files")
    while pid is not None and opened is not None and time.monotonic() - started < patience:
        if (handles(pid)["open_files"] or 0) <= opened + SPARE_FILES:
            break
        time.sleep(0.2)
    return held | {"seconds": asked}


def at_rest(address: Address, pid: int, patience: float) -> int | None:
    """The least memory an idle server has within some seconds, without earlier prompts'."""
    found: list[int] = []
    until = time.monotonic() + patience
    while not found or time.monotonic() < until:
        kept, size = gauge(metrics(address), "prefix_cache_bytes"), resident(pid)
        if size is None:
            return None
        found.append(size - int(kept))
        time.sleep(patience / 20)
    return min(found)


def _say(line: str) -> None:
    tell(line)


if __name__ == "__main__":
    sys.exit(main())
