"""Many clients of the local server for minutes: is every answer right, and does anything leak?

A server that is right for one client can be wrong for many. Batches can mix up answers, a client
that hangs up can leave its place taken, memory can grow by a little with each request. So clients
(64, for 10 minutes) ask what `bench.server_mix` draws. Every answer is checked to its last line; a
fixed set of questions was asked alone first, and their texts must come again in every company.
Where they do not, it is counted with the place: rows that are computed together are rounded
otherwise than alone, so near a tie of two tokens that is arithmetic. At the end all clients ask
once more and hang up together, after which the server must be idle within a second.

Time to first text is from the first try, waiting in the queue (and for a server that said 429)
included. With more clients than the server decodes at once it is mostly queue, so the pace is the
server's and the spread its fairness.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle, islice
from typing import Any

from bench.report import parser, run
from bench.server_client import CHAT, Count, Heard, Question, ask, get
from bench.server_findings import SPARE_FILES, criteria, memory, summary, text
from bench.server_mix import Mix, chat, fixed_set, user
from bench.server_process import Served, metrics, serving
from mlx_cerebrum.errors import CerebrumError, RequestError
from mlx_cerebrum.text import tell
from mlx_cerebrum.weights.opening import ModelSpec, open_model

# Earlier prompts are kept in so little that they fill it before minute 2: else it is a slope.
_SERVER = ("mlx_cerebrum.server", "--cache-gb", "0.2")
_WARM_UP = 0.2  # of the minutes, before them; of this load only errors count
_PATIENCE = 20.0  # seconds that a server gets to settle


@dataclass
class Load:
    """Clients of one server until `until`, on the clock of `time.monotonic`."""

    server: Served
    models: Sequence[str]
    fixed: Sequence[Question]
    count: Count
    until: float
    seed: int = 0
    seen: list[tuple[Question, Heard]] = field(default_factory=list)
    busy: list[Question] = field(default_factory=list)  # whose answer was 429
    resident: list[tuple[float, int]] = field(default_factory=list)  # when, bytes

    def client(self, number: int) -> None:
        mix = Mix(self.models, self.fixed, 10_000 * self.seed + number)
        asked: Question | None = None
        while time.monotonic() < self.until:
            asked = asked or mix.draw()
            asked = self._next(asked, self._ask(asked))

    def _ask(self, asked: Question) -> Heard:
        """Ask, again after 429 for as long as the server says."""
        began = time.perf_counter()
        while (heard := ask(self.server.address, asked, self.count)).status == 429:
            self.busy.append(asked)
            left = self.until - time.monotonic()
            if left <= 0:
                return heard
            time.sleep(min(left, max(0.1, heard.retry_after)))
        self.server.check()
        heard.sent = began
        self.seen.append((asked, heard))
        self.resident.append((time.monotonic(), self.server.rss()))
        return heard

    def _next(self, asked: Question, heard: Heard) -> Question | None:
        """The next turn of a conversation; None at its end."""
        if not asked.then or heard.faults:
            return None
        said = [{"role": "assistant", "content": heard.choices[0].text}, *user(asked.then[0])]
        body = asked.body | {"messages": asked.body["messages"] + said}
        return replace(asked, body=body, then=asked.then[1:])


def main(argv: list[str] | None = None) -> int:
    p = parser("server_load", "The local server under load: errors, leaks, fairness.")
    p.add_argument("--model", default="demo", help="what to serve (default: demo)")
    p.add_argument("--clients", type=int, default=64, help="at once (default: 64)")
    p.add_argument(
        "--minutes",
        type=float,
        default=10.0,
        help="of load, after a fifth of that to warm up (default: 10)",
    )
    p.add_argument("--seed", type=int, default=0, help="of the mix (default: 0)")
    p.add_argument(
        "--server-flag",
        action="append",
        default=[],
        metavar="FLAG",
        help="one more word for the server's command line, such as --server-flag=--max-queue=64",
    )
    return run(p, measure, text, argv)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Raises CerebrumError where a question alone is answered wrongly, or the server is gone."""
    if args.clients < 1 or args.minutes <= 0:
        raise RequestError("--clients and --minutes must be above 0")
    count = counter(args.model)
    with serving([*_SERVER, "--model", args.model, *args.server_flag]) as server:
        found = _measure(server, args.clients, args.minutes, args.seed, count)
        started = time.monotonic()
        code = server.stop()
        found["stopped"] = {"seconds": time.monotonic() - started, "exit_code": code}
    return found | {"criteria": criteria(found)}


def counter(model: str) -> Count:
    """Counts the prompt tokens of a question, by the model's own tokenizer."""
    tokenizer = open_model(ModelSpec(model)).tokenizer

    def count(asked: Question) -> int:
        if asked.path != CHAT:
            return len(tokenizer.encode(asked.body["prompt"]))
        return len(tokenizer.apply_chat_template(asked.body["messages"]))

    return count


def _measure(
    server: Served, clients: int, minutes: float, seed: int, count: Count
) -> dict[str, Any]:
    models = [one["id"] for one in json.loads(get(server.address, "/v1/models"))["data"]]
    fixed = fixed_set(models)
    tell(f"{len(fixed)} questions alone, of {', '.join(models)}")
    expected = alone(server.address, fixed, count)
    before = handles(server)
    patience = min(10.0, 6 * minutes)

    def load(minutes: float, seed: int) -> Load:
        tell(f"{clients} clients for {minutes:g} minutes")
        until = time.monotonic() + 60 * minutes
        load = Load(server, models, fixed, count, until, seed)
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(load.client, range(clients)))  # until all have their last answer
        return load

    # What a server takes once, for the first of each kind of request, is no leak.
    new = at_rest(server, patience)
    warm = load(minutes * _WARM_UP, seed + 1)
    settle(server, before["open_files"])
    rested = at_rest(server, patience)
    made, started = metrics(server.address)["generated_tokens_total"], time.monotonic()
    timed = load(minutes, seed)
    seconds = time.monotonic() - started
    made = metrics(server.address)["generated_tokens_total"] - made
    samples = [(when - started, size) for when, size in timed.resident]
    tell("all clients ask, and leave")
    story = [chat(model, user("Tell me a long story."), 200, stream=True) for model in models]
    asked = [replace(one, leave_within=3.0) for one in islice(cycle(story), clients)]
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(partial(ask, server.address), asked))
    settled = settle(server, before["open_files"])
    at_rests = {"new": new, "before": rested, "after": at_rest(server, patience)}
    return {
        "models": models,
        "seconds": seconds,
        **summary(warm.seen, timed.seen, seconds, expected, count),
        "busy": len(timed.busy),
        "generated_per_second": made / seconds,
        "settled": settled,
        "handles": {"before": before, "after": handles(server)},
        "memory": memory(samples, 60 * minutes) | {"at_rest": at_rests},
    }


def alone(address: str, fixed: Sequence[Question], count: Count) -> dict[str, str]:
    """The texts of the fixed questions, one after another. Raises CerebrumError for a fault."""
    found = {}
    for asked in fixed:
        heard = ask(address, asked, count)
        if heard.faults:
            raise CerebrumError(f"{asked.name}, asked alone: {'; '.join(heard.faults)}")
        found[asked.name] = heard.choices[0].text
    return found


def handles(server: Served) -> dict[str, int]:
    """How many files and connections the server has open, and threads."""
    return {"open_files": server.process.num_fds(), "threads": server.process.num_threads()}


def settle(server: Served, opened: int) -> dict[str, float]:
    """How long until nothing is queued and decoded; after that, connections get as long."""
    started = time.monotonic()
    while True:
        asked = time.monotonic() - started
        seen = metrics(server.address)
        if not seen["queued"] + seen["active"] or asked > _PATIENCE:
            break
        time.sleep(0.05)
    while handles(server)["open_files"] > opened + SPARE_FILES:
        if time.monotonic() - started > _PATIENCE:
            break
        time.sleep(0.2)
    return {"queued": seen["queued"], "active": seen["active"], "seconds": asked}


def at_rest(server: Served, patience: float) -> int:
    """The least memory an idle server has within some seconds, without earlier prompts'."""
    found = []
    for _ in range(20):
        found.append(server.rss() - int(metrics(server.address)["prefix_cache_bytes"]))
        time.sleep(patience / 20)
    return min(found)


if __name__ == "__main__":
    sys.exit(main())
