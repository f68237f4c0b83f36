"""What formulas cost those who are waiting for words: eight answers, without and with a reader.

python -m bench.typeset_pace                  two minutes on the demo model

Eight clients stream answers all the time. In every other stretch somebody reads an answer full of
formulas besides, whose page asks for each formula as it comes: none twice, so that none is
remembered. The measure is the tokens that the eight get a second, with over without, of
neighbouring stretches.
"""

import argparse
import json
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from http.client import HTTPConnection
from itertools import count
from typing import Any

from bench.report import Spread, parser, ratio, rounds, run, table
from bench.server_client import Question, ask
from bench.server_process import metrics, serving
from mlx_cerebrum.errors import CerebrumError, RequestError

CLIENTS = 8
_TOKENS = 64  # of an answer: the last ones are waited for
_SETTLE = 2.0  # seconds at the start of a stretch that don't count
_JSON = {"Content-Type": "application/json"}


class Load:
    """Clients that stream, and a reader who can be let in."""

    def __init__(self, address: str, model: str, rate: float) -> None:
        self._address, self._model, self._rate = address, model, rate
        self._reading, self.over = threading.Event(), threading.Event()
        self.formulas = 0

    def client(self, number: int) -> None:
        for turn in count():
            if self.over.is_set():
                return
            said = [{"role": "user", "content": f"Tell me {number + 2} stories, part {turn}."}]
            body = {"model": self._model, "messages": said, "max_tokens": _TOKENS, "stream": True}
            heard = ask(self._address, Question(body | {"ignore_eos": True}))
            if heard.faults and not self.over.is_set():
                raise CerebrumError(f"an answer failed: {heard.faults[0]}")

    def reader(self) -> None:
        """One formula after the other, at the rate asked for, each another one."""
        for number in count():
            while not (self.over.is_set() or self._reading.wait(0.05)):
                pass
            if self.over.is_set():
                return
            started = time.monotonic()
            # A connection each: the server closes one that has long been silent.
            with closing(HTTPConnection(self._address, timeout=60)) as connection:
                body = json.dumps({"jobs": [_job(number)]})
                connection.request("POST", "/typeset", body, _JSON)
                if b"null" in connection.getresponse().read():
                    raise CerebrumError("a formula was not set")
            self.formulas += 1
            time.sleep(max(0.0, 1 / self._rate - (time.monotonic() - started)))

    def pace(self, reading: bool, seconds: float) -> float:
        """Tokens a second that all clients together get."""
        (self._reading.set if reading else self._reading.clear)()
        time.sleep(_SETTLE)
        before, started = metrics(self._address)["generated_tokens_total"], time.monotonic()
        time.sleep(seconds)
        after = metrics(self._address)["generated_tokens_total"]
        return (after - before) / (time.monotonic() - started)


def _job(number: int) -> list[str]:
    return [
        "tex",
        rf"\[\sum_{{k=0}}^{{{number}}} \binom{{n}}{{k}} x^k = \frac{{a_{{{number}}}"
        rf" + \sqrt{{b^2 - 4ac}}}}{{2\pi}} \begin{{pmatrix}} 1 & {number} \\ 0 & 1"
        r" \end{pmatrix}\]",
    ]


def main(argv: list[str] | None = None) -> int:
    p = parser("typeset_pace", "What formulas cost those who are waiting for words.")
    p.add_argument("--model", default="demo", help="what to serve (default: demo)")
    p.add_argument("--seconds", type=float, default=10.0, help="of a stretch (default: 10)")
    p.add_argument("--rounds", type=int, default=4, help="of two stretches (default: 4)")
    p.add_argument("--rate", type=float, default=20.0, help="formulas a second (default: 20)")
    return run(p, measure, text, argv)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Raises CerebrumError where an answer or a formula fails."""
    if min(args.seconds, args.rounds, args.rate) <= 0:
        raise RequestError("--seconds, --rounds and --rate must be above 0")
    with (
        serving(["mlx_cerebrum.server", "--model", args.model]) as server,
        ThreadPoolExecutor(CLIENTS + 1) as pool,
    ):
        load = Load(server.address, args.model, args.rate)
        working = [pool.submit(load.client, number) for number in range(CLIENTS)]
        working.append(pool.submit(load.reader))
        try:
            sides = {
                side: partial(load.pace, side == "with", args.seconds)
                for side in ("without", "with")
            }
            paces = rounds(sides, args.rounds, warm=False)
        finally:
            load.over.set()
        for each in working:
            each.result()
    seconds = len(paces["with"]) * (args.seconds + _SETTLE)
    return {
        "clients": CLIENTS,
        "formulas_a_second": round(load.formulas / seconds, 1),
        "paces": {side: Spread.of(pace).as_json() for side, pace in paces.items()},
        "ratio": ratio(paces["with"], paces["without"]).as_json(),
    }


def text(results: dict[str, Any]) -> list[str]:
    rows: list[Sequence[str]] = [
        [f"{side} formulas", Spread.read(pace).text()] for side, pace in results["paces"].items()
    ]
    rows.append(["with / without", Spread.read(results["ratio"]).text(3)])
    head = (
        f"{results['clients']} answers at once; {results['formulas_a_second']} formulas a second."
    )
    return [head, table(["", "tokens/s"], rows)]


if __name__ == "__main__":
    sys.exit(main())
