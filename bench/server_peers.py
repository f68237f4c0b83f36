"""The local server beside mlx_lm.server and llama.cpp's: the same weights, the same questions.

What a server adds to an engine is company: with eight requests at once it reads the weights once
for eight tokens, if it batches. So each server, in a process of its own, is asked the same eight
questions at once over HTTP, and then one alone; greedily, streamed, ending where the model ends.
mlx-lm's reads an unrolled directory, llama.cpp's a GGUF file in F32, both written from the weights
that ours reads; all compute in float32 on a CPU. Each has at least as many places as there are
questions, and else its own defaults; llama.cpp's the threads and the attention that were fastest.

All servers are up, and warm, before anything is timed; they take turns, every second round
backwards. Every round has questions of its own, so that no prompt is found in a cache: what each
server says it had cached is shown. Tokens are counted by each server's own usage, and the texts
compared with ours: where they are equal, the work was too.
"""

import argparse
import json
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench import machine
from bench.attempts import one_line
from bench.chat_prompts import GROUNDED, OPEN
from bench.copies import Copies
from bench.engines import PROSE, required
from bench.pair import open_pair
from bench.peers_report import OURS
from bench.report import Spread, parser, publish, ratio, rounds
from bench.server_answers import Heard, Question, hear
from bench.server_client import Address, ask, get
from bench.server_mix import chat, user
from bench.server_peers_report import text
from bench.server_process import Process, free_port, resident
from mlx_cerebrum import cli
from mlx_cerebrum.errors import CerebrumError, RequestError
from mlx_cerebrum.text import tell

_SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
_CONTEXT = 1024  # tokens a request may take where a server wants to know
_WORDS = 120  # of prose in every other question


@dataclass(frozen=True)
class Engine:
    """A server that is up: where, what it calls the model, what a reader must know of it."""

    address: Address
    model: str
    version: str
    settings: str
    pid: int


@dataclass(frozen=True)
class Round:
    """What a server did with some questions at once."""

    texts: list[str]
    pace: float  # tokens a second, from the first request to the last token
    firsts: list[float]  # seconds to each answer's first text
    going: float  # pieces of text a second, once all answers had begun
    tokens: dict[str, int]  # prompt, completion, cached


def flags() -> cli.ArgumentParser:
    p = parser("server_peers", "The local server's throughput beside mlx-lm's and llama.cpp's.")
    p.add_argument("--model", default="demo", help="what to serve (default: demo)")
    p.add_argument("--clients", type=int, default=8, help="questions at once (default: 8)")
    p.add_argument("--rounds", type=int, default=5, help="rounds in turns (default: 5)")
    p.add_argument("--max-tokens", type=int, default=64, help="tokens an answer (default: 64)")
    p.add_argument(
        "--only",
        action="append",
        choices=("mlx-lm", "llama.cpp"),
        help="beside this one alone (default: both)",
    )
    return p


def main(argv: list[str] | None = None) -> int:
    args = flags().parse_args(argv)
    machine.use_openblas(not args.no_openblas)
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    if min(args.clients, args.rounds) < 1 or not 2 <= args.max_tokens <= _CONTEXT // 2:
        raise RequestError(
            f"--clients and --rounds must be at least 1, --max-tokens 2 to {_CONTEXT // 2}"
        )
    with ExitStack() as stack:
        engines = servers(stack, args.model, args.clients, args.only or ["mlx-lm", "llama.cpp"])
        found = measure(engines, args.clients, args.rounds, args.max_tokens)
    publish(args, "server_peers", found, text(found))
    return 0


def servers(
    stack: ExitStack, model: str, clients: int, peers: Sequence[str]
) -> dict[str, Engine | str]:
    """Ours and its peers, each up; or the one line why a peer is not."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    pair = open_pair(model)
    copies = Copies(pair, pair.a, folder)
    starts: dict[str, Callable[[], Engine]] = {
        "mlx-lm": lambda: _mlx_lm(stack, copies, clients),
        "llama.cpp": lambda: _llama_cpp(stack, copies, clients),
    }
    found: dict[str, Engine | str] = {OURS: _ours(stack, model, clients)}
    for name in peers:
        tell(f"{name}: writing its weights, starting it")
        try:
            found[name] = starts[name]()
        except Exception as error:
            found[name] = one_line(error)
    return found


def _ours(stack: ExitStack, model: str, clients: int) -> Engine:
    batch = max(8, clients)  # 8: its default
    words = ["mlx_cerebrum.server", "--model", model, "--port", "0", "--batch", str(batch)]
    server = stack.enter_context(Process(words))
    name = json.loads(get(server.address, "/v1/models"))["data"][0]["id"]
    version = machine.version("mlx-cerebrum") or ""
    return Engine(server.address, name, version, f"batches of up to {batch}", server.pid)


def _mlx_lm(stack: ExitStack, copies: Copies, clients: int) -> Engine:
    version, port, batch = required("mlx-lm", "bench"), free_port(), max(32, clients)
    words = ["mlx_lm", "server", "--model", str(copies.directory()), "--port", str(port)]
    words += ["--decode-concurrency", str(batch), "--log-level", "WARNING"]  # 32: its default
    server = stack.enter_context(Process(words, port=port))
    settings = f"batches of up to {batch}"
    return Engine(server.address, "default_model", version, settings, server.pid)


def _llama_cpp(stack: ExitStack, copies: Copies, clients: int) -> Engine:
    if copies.kind != "F32":
        raise RequestError(f"its server is started in F32 here; ours computes in {copies.kind}")
    words = ["bench.server_llama", str(copies.gguf("F32"))]
    words += ["--parallel", str(clients), "--context", str(_CONTEXT)]
    server = stack.enter_context(Process(words))
    said = json.loads(next(line for line in server.lines if line.startswith("{")))
    return Engine(
        server.address, copies.pair.path.name, said["version"], said["settings"], server.pid
    )


def measure(
    engines: dict[str, Engine | str], clients: int, count: int, max_tokens: int
) -> dict[str, Any]:
    """All of them in turns, `clients` questions at once and one alone."""
    up = {name: engine for name, engine in engines.items() if isinstance(engine, Engine)}
    found: dict[str, Any] = {
        name: {"failure": engine} if isinstance(engine, str) else {
            "version": engine.version, "settings": engine.settings
        }
        for name, engine in engines.items()
    }  # fmt: skip
    for kind, many in (("together", clients), ("alone", 1)):
        tell(f"{kind}: {', '.join(up)}")
        sides = {name: _Turns(engine, many, max_tokens).run for name, engine in up.items()}
        runs = rounds(sides, count)
        for name, done in runs.items():
            found[name][kind] = _row(done, None if name == OURS else runs[OURS])
    for name, engine in up.items():
        found[name]["resident"] = resident(engine.pid)
    return {"clients": clients, "rounds": count, "max_tokens": max_tokens, "engines": found}


class _Turns:
    """One server's rounds: the questions of round k are the same for every server."""

    def __init__(self, engine: Engine, many: int, max_tokens: int) -> None:
        self._engine, self._many, self._max_tokens = engine, many, max_tokens
        self._round = 0

    def run(self) -> Round:
        asked = questions(self._engine.model, self._round, self._many, self._max_tokens)
        self._round += 1
        return at_once(self._engine.address, asked)


def questions(model: str, number: int, many: int, max_tokens: int) -> list[Question]:
    """The questions of a round: short ones, and every other with some prose to read first."""
    words = PROSE.read_text(encoding="utf-8").split()
    texts = [*OPEN.values(), *GROUNDED.values()]
    found = []
    for place in range(many):
        # From its first word on no prompt is an earlier one's: a cache has nothing to give.
        serial = number * many + place
        text = f"Question {1000 * many + serial}. {texts[serial % len(texts)]}"
        if place % 2:
            start = (serial * 137) % (len(words) - _WORDS)
            text += "\n\n" + " ".join(words[start : start + _WORDS])
        messages = [_SYSTEM, *user(text)]
        found.append(chat(model, messages, max_tokens, stream=True, temperature=0))
    return found


def at_once(address: Address, asked: Sequence[Question]) -> Round:
    """Ask all together. Raises CerebrumError where an answer is none."""
    replies: dict[int, Any] = {}

    def one(place: int) -> None:
        replies[place] = ask(address, asked[place].path, asked[place].body)

    places = range(len(asked))
    threads = [threading.Thread(target=one, args=(place,), daemon=True) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    heard: list[Heard] = []
    for place, question in enumerate(asked):
        answer = hear(question, replies[place])
        if answer.usage is None or answer.first is None:
            raise CerebrumError(f"no answer to measure: {'; '.join(answer.faults) or 'no text'}")
        heard.append(answer)
    began = min(reply.asked for reply in replies.values())
    ended = max(reply.events[-1][0] for reply in replies.values())
    all_go = max(answer.first or 0.0 for answer in heard)
    later = sum(when > all_go for answer in heard for when in answer.choices[0].times)
    tokens = {
        key: sum(answer.usage_of(f"{key}_tokens") for answer in heard)
        for key in ("prompt", "completion")
    }
    return Round(
        [answer.choices[0].text for answer in heard],
        tokens["completion"] / (ended - began),
        [(answer.first or 0.0) - replies[place].asked for place, answer in enumerate(heard)],
        later / (ended - all_go) if later else 0.0,
        tokens | {"cached": sum(answer.cached for answer in heard)},
    )


def _row(done: Sequence[Round], ours: Sequence[Round] | None) -> dict[str, Any]:
    paces = [one.pace for one in done]
    row: dict[str, Any] = {
        "pace": Spread.of(paces).as_json(),
        "first": Spread.of([median(one.firsts) for one in done]).as_json(),
        "last": Spread.of([max(one.firsts) for one in done]).as_json(),
        "going": Spread.of([one.going for one in done]).as_json(),
    }
    row |= {f"{key}_tokens": sum(one.tokens[key] for one in done) for key in done[0].tokens}
    if ours is not None:
        pairs = [
            (a, b)
            for mine, theirs in zip(ours, done, strict=True)
            for a, b in zip(mine.texts, theirs.texts, strict=True)
        ]
        row["ratio"] = ratio([one.pace for one in ours], paces).as_json()
        row |= {"same": sum(a == b for a, b in pairs), "compared": len(pairs)}
    return row


if __name__ == "__main__":
    sys.exit(main())
