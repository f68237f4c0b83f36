"""What the page asks for besides answers: the formulas and the code in them, set.

One request is worked on at a time, in the process of `typeset.worker`: the engine's threads and
the event loop go on meanwhile.
"""

import asyncio
import time

from pydantic import Field, field_validator
from starlette.responses import Response

from mlx_cerebrum.server.bodies import Open, parse_body
from mlx_cerebrum.typeset import worker

PATH = "/typeset"
MOST = 50  # formulas and blocks in a request
SECONDS = 3.0  # of work on one; what is left then is answered with null
_PARTS = {"tex": 2, "code": 3}


class TypesetRequest(Open):
    """`["tex", formula with its marks]` and `["code", language, text]`."""

    jobs: list[list[str]] = Field(max_length=MOST)

    @field_validator("jobs")
    @classmethod
    def _known(cls, jobs: list[list[str]]) -> list[list[str]]:
        if not all(job and len(job) == _PARTS.get(job[0]) for job in jobs):
            raise ValueError("each is [tex, formula] or [code, language, text]")
        return jobs


class Typesetter:
    """Answers the page's requests."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def __call__(self, body: bytes) -> Response:
        """JSON of as many answers as jobs: a tree of MathML, parts of code, or null.

        Raises ApiError for a body that is no request.
        """
        jobs = parse_body(TypesetRequest, body).jobs
        async with self._turn:
            answers = await asyncio.to_thread(_worked, jobs)
        return Response(b'{"answers":[' + b",".join(answers) + b"]}", media_type="application/json")


def _worked(jobs: list[list[str]]) -> list[bytes]:
    until = time.monotonic() + SECONDS
    return [worker.ask(tuple(job)) if time.monotonic() < until else b"null" for job in jobs]
