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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench import llama_cpp
from bench.attempts import one_line
from bench.chat_prompts import GROUNDED, OPEN
from bench.copies import Copies
from bench.engines import PROSE, required
from bench.pair import open_pair
from bench.peers import OURS
from bench.report import Spread, parser, ratio, rounds, run, table
from bench.server_client import Question, ask, get
from bench.server_mix import chat, user
from bench.server_process import Served, serving
from mlx_cerebrum.errors import CerebrumError, RequestError
from mlx_cerebrum.text import tell

_SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
_CONTEXT = 1024  # tokens a request may take where a server wants to know
_WORDS = 120  # of prose in every other question
_FIGURES = {  # their heading, and digits
    "pace": ("tokens/s", 1),  # from the first request to the last token
    "ratio": ("ours/its", 2),
    "first": ("first text, s", 2),  # the median of the answers
    "last": ("the last one's, s", 2),
    "going": ("once all go", 1),  # pieces of text a second, once all answers had begun
}
_TUNING = range(1000, 1128)  # token ids that llama.cpp's settings are tried on


@dataclass(frozen=True)
class Contender:
    """A server that is up, what it calls the model, and what a reader must know of it."""

    server: Served
    model: str
    version: str
    settings: str


@dataclass(frozen=True)
class Round:
    """What a server did with some questions at once."""

    texts: list[str]
    tokens: dict[str, int]  # prompt, completion, cached
    figures: dict[str, float]  # of _FIGURES


def main(argv: list[str] | None = None) -> int:
    p = parser("server_peers", "The local server's throughput beside mlx-lm's and llama.cpp's.")
    p.add_argument("--model", default="demo", help="what to serve (default: demo)")
    p.add_argument("--clients", type=int, default=8, help="questions at once (default: 8)")
    p.add_argument("--rounds", type=int, default=5, help="rounds in turns (default: 5)")
    p.add_argument("--max-tokens", type=int, default=64, help="tokens an answer (default: 64)")
    return run(p, measure, text, argv)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    if min(args.clients, args.rounds) < 1 or not 2 <= args.max_tokens <= _CONTEXT // 2:
        raise RequestError(
            f"--clients and --rounds must be at least 1, --max-tokens 2 to {_CONTEXT // 2}"
        )
    with ExitStack() as stack:
        up = servers(stack, args.model, args.clients)
        return compare(up, args.clients, args.rounds, args.max_tokens)


def servers(stack: ExitStack, model: str, clients: int) -> dict[str, Contender | str]:
    """Ours and its peers, each up; or the one line why a peer is not."""
    pair = open_pair(model)
    copies = Copies(pair, pair.a, Path(stack.enter_context(tempfile.TemporaryDirectory())))

    def start(*words: str) -> Served:
        return stack.enter_context(serving(words))

    def ours() -> Contender:
        batch = max(8, clients)  # 8: its default
        server = start("mlx_cerebrum.server", "--model", model, "--batch", str(batch))
        name = json.loads(get(server.address, "/v1/models"))["data"][0]["id"]
        version = required("mlx-cerebrum", "bench")
        return Contender(server, name, version, f"batches of up to {batch}")

    def mlx_lm() -> Contender:
        version, batch = required("mlx-lm", "bench"), max(32, clients)  # 32: its default
        words = ["mlx_lm", "server", "--model", str(copies.directory()), "--log-level", "WARNING"]
        server = start(*words, "--decode-concurrency", str(batch))
        return Contender(server, "default_model", version, f"batches of up to {batch}")

    def llama() -> Contender:
        if copies.kind != "F32":
            raise RequestError(f"its server is started in F32 here; ours computes in {copies.kind}")
        version, path = required("xllamacpp", "bench"), copies.gguf("F32")
        tuning = llama_cpp.tune(path, True, list(_TUNING))
        words = ["bench.llama_cpp", str(path), "--threads", str(tuning.threads)]
        words += ["--flash-attention", str(int(tuning.flash_attention))]
        server = start(*words, "--slots", str(clients), "--context", str(clients * _CONTEXT))
        settings = f"{clients} slots, {llama_cpp.settings(tuning, exact=True)}"
        return Contender(server, model, f"xllamacpp {version}", settings)

    up: dict[str, Contender | str] = {OURS: ours()}
    for name, peer in {"mlx-lm": mlx_lm, "llama.cpp": llama}.items():
        tell(f"{name}: writing its weights, starting it")
        try:
            up[name] = peer()
        except Exception as error:
            up[name] = one_line(error)
    return up


def compare(
    up: dict[str, Contender | str], clients: int, number: int, max_tokens: int
) -> dict[str, Any]:
    """All of them in turns, `clients` questions at once and one alone."""
    found: dict[str, Any] = {
        name: {"failure": one}
        if isinstance(one, str)
        else {"version": one.version, "settings": one.settings}
        for name, one in up.items()
    }
    contenders = {name: one for name, one in up.items() if isinstance(one, Contender)}
    for kind, many in (("together", clients), ("alone", 1)):
        tell(f"{kind}: {', '.join(contenders)}")
        sides = {name: _side(one, many, number, max_tokens) for name, one in contenders.items()}
        runs = rounds(sides, number)
        for name, done in runs.items():
            found[name][kind] = _row(done, runs[OURS])
    for name, one in contenders.items():
        found[name]["resident"] = one.server.rss()
    return {"clients": clients, "rounds": number, "max_tokens": max_tokens, "engines": found}


def _side(one: Contender, many: int, number: int, max_tokens: int) -> Callable[[], Round]:
    """Runs its next round at every call; round k has the same questions for every server."""
    asked = iter([questions(one.model, k, many, max_tokens) for k in range(number + 1)])
    return lambda: at_once(one.server.address, next(asked))


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


def at_once(address: str, asked: Sequence[Question]) -> Round:
    """Ask all together. Raises CerebrumError where an answer is none."""
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda question: ask(address, question), asked))
    for heard in answers:
        if heard.usage is None or heard.first is None:
            raise CerebrumError(f"no answer to measure: {'; '.join(heard.faults) or 'no text'}")
    times = [heard.choices[0].times for heard in answers]
    tokens = {key: sum(heard.tokens[key] for heard in answers) for key in answers[0].tokens}
    ended = max(pieces[-1] for pieces in times)
    all_go = max(pieces[0] for pieces in times)
    later = sum(when > all_go for pieces in times for when in pieces)
    firsts = [pieces[0] - heard.sent for pieces, heard in zip(times, answers, strict=True)]
    figures = {
        "pace": tokens["completion"] / (ended - min(heard.sent for heard in answers)),
        "first": median(firsts),
        "last": max(firsts),
        "going": later / (ended - all_go) if later else 0.0,
    }
    return Round([heard.choices[0].text for heard in answers], tokens, figures)


def _row(done: Sequence[Round], ours: Sequence[Round]) -> dict[str, Any]:
    found = {key: [one.figures[key] for one in done] for key in done[0].figures}
    row: dict[str, Any] = {key: Spread.of(values).as_json() for key, values in found.items()}
    row |= {f"{key}_tokens": sum(one.tokens[key] for one in done) for key in done[0].tokens}
    if done is not ours:
        row["ratio"] = ratio([one.figures["pace"] for one in ours], found["pace"]).as_json()
        texts = [[text for one in side for text in one.texts] for side in (ours, done)]
        row["same"] = sum(a == b for a, b in zip(*texts, strict=True))
        row["compared"] = len(texts[0])
    return row


def text(found: dict[str, Any]) -> list[str]:
    engines = found["engines"]
    notes = [
        f"- {name}: {one['failure']}"
        if "failure" in one
        else f"- {name}: {one['version']}; {one['settings']}; {one['resident'] / 1e6:.0f} MB"
        " resident at the end"
        for name, one in engines.items()
    ]
    return [
        f"{found['clients']} questions at once, and one alone, {found['max_tokens']} tokens an"
        f" answer at most; rounds in turns: {found['rounds']}; every round has questions of its"
        " own. All tokens of the answers over the time from the first request to the last token,"
        " and once all have begun pieces of text a second; median (lowest-highest). Ratios are"
        " ours over theirs, round by round: above 1 ours is faster.",
        _paces(engines, "together", f"{found['clients']} at once"),
        _paces(engines, "alone", "one alone"),
        "\n".join(notes),
    ]


def _paces(engines: dict[str, Any], kind: str, label: str) -> str:
    rows = []
    for name, one in engines.items():
        if kind in one:
            it = one[kind]
            spreads = [
                Spread(**it[key]).text(digits) if key in it else ""
                for key, (_, digits) in _FIGURES.items()
            ]
            same = f"{it['same']} of {it['compared']}" if "same" in it else ""
            tokens = [it[f"{key}_tokens"] for key in ("prompt", "cached", "completion")]
            rows.append([name, *spreads, same, "{} ({}), {}".format(*tokens)])
    headings = [heading for heading, _ in _FIGURES.values()]
    return table([label, *headings, "same texts", "tokens asked (cached), answered"], rows)


if __name__ == "__main__":
    sys.exit(main())
