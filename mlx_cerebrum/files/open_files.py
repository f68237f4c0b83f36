"""How many files, connections among them, this process may have open."""

import resource
from contextlib import suppress

from mlx_cerebrum.errors import RequestError


def raise_limit(wanted: int, least: int, why: str) -> int:
    """Allow `wanted` open files, or as many as the system lets us; return how many.

    Raises RequestError where fewer than `least` are.
    """
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed != resource.RLIM_INFINITY and allowed < wanted:
        more = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
        with suppress(ValueError, OSError):  # a system's own bound may be below the limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, most))
            allowed = more
    found = wanted if allowed == resource.RLIM_INFINITY else min(allowed, wanted)
    if found < least:
        raise RequestError(
            f"only {found} files may be open and {why} needs {least}; raise it: ulimit -n {least}"
        )
    return found
