"""What a load's figures come to: waits, errors, memory, and whether all that must hold does."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from bench.server_clients import Tally
from bench.server_mix import POLITE
from bench.server_process import Watch, floors, slope, slope_range
from mlx_cerebrum.errors import CerebrumError

SLOPE = 1.0  # MB a minute at most, from minute 2
SETTLE = 1.0  # seconds until nothing is queued or decoded any more
SPARE_FILES = 4  # what a log, a resolver or the like may open meanwhile
_EVERY = 10  # samples of memory that one of the results stands for
QUEUED, ACTIVE = "queued", "active"  # gauges of /metrics, which begin with cerebrum_
_HELD = (QUEUED, ACTIVE, "prefix_cache_bytes", "kv_bytes")


def summary(tally: Tally, seconds: float) -> dict[str, Any]:
    errors: dict[str, dict[str, int]] = {}
    for (kind, fault), times in tally.faults.most_common():
        errors.setdefault(kind, {})[fault] = times
    firsts = {
        "all": [wait for _, wait in tally.firsts],
        "prompts under 64 tokens": [wait for size, wait in tally.firsts if size < 64],
        "64 to 511": [wait for size, wait in tally.firsts if 64 <= size < 512],
        "512 and more": [wait for size, wait in tally.firsts if size >= 512],
    }
    return {
        "requests": dict(tally.requests.most_common()),
        "errors": errors,
        "busy": tally.busy,
        "given_up": tally.given_up,
        "tokens": dict(tally.tokens),
        "tokens_per_second": tally.tokens["completion"] / seconds,
        "finishes": dict(tally.finishes),
        "first": {name: waits(values) for name, values in firsts.items() if values},
        "gap": waits(tally.gaps) if tally.gaps else None,
        "left": dict(tally.left),
        "refusals": {str(status): times for status, times in sorted(tally.refusals.items())},
        "fixed": {
            "same": tally.same.total(),
            "differing": {
                name: {"times": len(places), "of": len(places) + tally.same[name], "from": places}
                for name, places in sorted(tally.differing.items())
            },
        },
    }


def waits(values: Sequence[float]) -> dict[str, float]:
    """Seconds: the median, the worst of 20, the worst; and how often there were any."""
    ordered = sorted(values)
    return {
        "count": len(ordered),
        "median": median(ordered),
        "p95": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
        "max": ordered[-1],
    }


def memory(watch: Watch, end: float) -> dict[str, Any]:
    """What a server of `end` seconds of load had; slopes are of the load alone, from minute 2."""
    sizes = [size for _, size in watch.samples]
    later = [(when, size) for when, size in watch.samples if 120 <= when <= end]
    return {
        "start": sizes[0],
        "peak": max(sizes),
        "end": sizes[-1],
        "slope": slope(later),
        "slope_range": slope_range(later),
        "floor_slope": slope(floors(later)),
        "rest_slope": slope(rest(later, watch)),
        "samples": [[round(when), size] for when, size in watch.samples[::_EVERY]],
        "said": [
            {"seconds": round(when), **{key: gauge(one, key) for key in _HELD}}
            for when, one in watch.said
        ],
    }


def rest(samples: Sequence[tuple[float, int]], watch: Watch) -> list[tuple[float, int]]:
    """Memory without the keys and values that the server counts as held: where a leak would be."""
    found = []
    for when, one in watch.said:
        held = gauge(one, "prefix_cache_bytes") + gauge(one, "kv_bytes")
        near = [(abs(at - when), at, size) for at, size in samples if abs(at - when) <= 1]
        if near:
            _, at, size = min(near)
            found.append((at, size - int(held)))
    return found


def generated(said: Sequence[tuple[float, dict[str, float]]], end: float) -> float | None:
    """Tokens a second by the server's own count, in the first `end` seconds; None if unseen."""
    seen = [(when, gauge(one, "generated_tokens_total")) for when, one in said if when <= end]
    if len(seen) < 2:
        return None
    (start, before), (stop, after) = seen[0], seen[-1]
    return (after - before) / (stop - start)


def gauge(seen: dict[str, float], name: str) -> float:
    """What /metrics says under this name. Raises CerebrumError where it has none such."""
    if f"cerebrum_{name}" not in seen:
        raise CerebrumError(f"/metrics has no cerebrum_{name}")
    return seen[f"cerebrum_{name}"]


def criteria(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What must hold; `passed` is None where it could not be seen."""
    errors, settled, handled = found["errors"], found["settled"], found["handles"]
    asked = sum(found["requests"].get(kind, 0) for kind in POLITE)
    grown = found.get("memory", {}).get("slope")
    resting = found.get("memory", {}).get("at_rest", {})
    kept = None
    long = grown is not None  # what a server takes once is no leak
    if long and None not in (resting.get("before"), resting.get("after")):
        kept = (resting["after"] - resting["before"]) / 1e6 / (found["seconds"] / 60)
    steady = None if grown is None else grown < SLOPE
    if steady is not None and kept is not None and (lies := found["memory"].get("slope_range")):
        # The keys and values of answers come and go: the slope alone may be too rough to say.
        steady = True if lies[1] < SLOPE else False if lies[0] >= SLOPE else None
    first, last = ((handled[when] or {}).get("open_files") for when in ("before", "after"))
    opened = None if first is None or last is None else last - first
    stopped = found.get("stopped")
    checks = {
        "polite clients saw no error": not any(errors.get(kind) for kind in POLITE) and asked > 0,
        "clients that left saw no error before": not errors.get("leaving"),
        "malformed bodies were refused, each with its error": not errors.get("malformed"),
        f"memory grew by less than {SLOPE:g} MB a minute": steady,
        f"at rest it held less than {SLOPE:g} MB more for a minute of load": (
            None if kept is None else kept < SLOPE
        ),
        "nothing queued or decoded a second after all had left": settled["seconds"] <= SETTLE
        and not settled[QUEUED]
        and not settled[ACTIVE],
        "no connection was left open": None if opened is None else opened <= SPARE_FILES,
        "it stopped when asked to": None if stopped is None else stopped["exit_code"] == 0,
    }
    return [{"name": name, "passed": passed} for name, passed in checks.items()]
