"""A grammar compiled in a process of its own, before it is compiled here.

Hostile ones take minutes, gigabytes, or more stack than there is, which would end the program:
llguidance's limits are met too late. There they end a child, which knows no model and no
vocabulary but that of the bytes. What passes takes about as much here.
"""

import json
import os
import random
import resource
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

from mlx_cerebrum.decoding.grammar_text import Json, Written, blamed, first_line
from mlx_cerebrum.text import say

SECONDS = 1  # of CPU, Python's own start included
BYTES = 150 << 20  # more than it starts with
STACK = 1 << 20  # bytes; a thread has 8 MiB where it is to be compiled after this
STEPS = 16  # of an answer
LIMITS = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 30_000,
    "max_grammar_size": 100_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,  # they quote the grammar and the text so far
}


def found_wrong(written: Written) -> str:
    """What keeps a grammar from being compiled, with its place; empty if nothing does."""
    command = [sys.executable, "-P", "-c", f"from {__name__} import child; child()"]
    asked = {"place": written.place, "text": written.text, "schemas": written.schemas}
    try:
        done = subprocess.run(
            command,
            input=json.dumps(asked).encode(),
            capture_output=True,
            timeout=20 * SECONDS,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    except subprocess.TimeoutExpired:
        return f"{written.place}: it takes too long to compile; make it simpler"
    lines = [str(json.loads(line)) for line in done.stdout.splitlines()]
    if not lines:
        return f"{written.place}: it takes too much time or memory to compile; make it simpler"
    return lines[-1] or lines[0]


def child() -> None:
    """Write what is wrong as a line of JSON, and a better one where there is time for it."""
    _bound()
    asked = json.load(sys.stdin.buffer)
    threading.stack_size(STACK)
    work = threading.Thread(target=_try, args=(asked["place"], asked["text"], asked["schemas"]))
    work.start()
    work.join()


def _bound() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    with suppress(OSError, ValueError):  # only Linux tells, and only there the limit is kept
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _try(place: str, text: str, schemas: list[tuple[str, Json]]) -> None:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    vocabulary, limits = LLTokenizer("byte"), LLParserLimits(**LIMITS)  # type: ignore[arg-type]

    def matcher(text: str) -> LLMatcher:
        return LLMatcher(vocabulary, text, log_level=0, limits=limits)

    held, draw = matcher(text), random.Random(0)
    for _ in range(STEPS):
        if held.is_stopped():
            break
        mask = int.from_bytes(held.compute_bitmask(), "little")
        held.consume_token(draw.choice([i for i in range(vocabulary.vocab_size) if mask >> i & 1]))
    error = held.get_error()
    say(json.dumps(f"{place}: {first_line(error)}" if error else ""))
    if error:
        say(json.dumps(blamed(schemas, lambda part: matcher(part).get_error()) or ""))
