"""What a request asks for that is not looked at: its client, and the log, are told by name."""

import re
from collections.abc import Collection

from mlx_cerebrum.server import log

HEADER = "X-Ignored-Parameters"
MOST_NAMES = 8
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,40}")
_MOST_SETS = 256  # of names that are remembered as logged; more are not logged


class Ignored:
    """Says each set of names once in the log, and in the header of every answer."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def headers(self, said: str) -> dict[str, str]:
        """For an answer to a request that has these, as `listed` says them."""
        if not said:
            return {}
        if said not in self._logged and len(self._logged) < _MOST_SETS:
            self._logged.add(said)
            log.write(f"not used, of what clients send: {said}")
        return {HEADER: said}


def listed(names: Collection[str]) -> str:
    """The names, some at most; those that a header can't hold are only counted."""
    fit = sorted(name for name in names if _NAME.fullmatch(name))[:MOST_NAMES]
    more = len(names) - len(fit)
    return ", ".join([*fit, f"+{more}"] if more else fit)
