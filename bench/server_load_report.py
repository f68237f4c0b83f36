"""What `python -m bench.server_load` found, in words and tables."""

from typing import Any

from bench.report import table

_PASSED = {True: "yes", False: "NO", None: "can't be said"}


def text(found: dict[str, Any]) -> list[str]:
    must = [[one["name"], _PASSED[one["passed"]]] for one in found["criteria"]]
    requests = [
        [kind, str(number), str(sum(found["errors"].get(kind, {}).values()))]
        for kind, number in found["requests"].items()
    ]
    parts = [
        _pace(found),
        table(["must hold", ""], must),
        table(["requests", "number", "errors"], requests),
        _waits(found),
        " ".join([_same(found["fixed"]), _rude(found)]),
        _process(found),
    ]
    errors = [
        f"- {kind}, {times} x: {fault}"
        for kind, faults in found["errors"].items()
        for fault, times in faults.items()
    ]
    return [part for part in [*parts, "\n".join(errors[:20])] if part]


def _pace(found: dict[str, Any]) -> str:
    tokens = found["tokens"]
    busy = (
        f" It said 429 {found['busy']} times, and was asked again after its Retry-After;"
        f" {found['given_up']} requests were not taken before the time was over."
    )
    pace = found.get("generated_per_second")
    said = "" if pace is None else f" Under load it generated {pace:.1f} tokens/s by its own count."
    return (
        f"{sum(found['requests'].values())} requests to {' and '.join(found['models'])} in"
        f" {found['seconds'] / 60:.1f} minutes, until the last had its answer:"
        f" {tokens.get('prompt', 0)} prompt tokens of polite clients, {tokens.get('cached', 0)} of"
        f" them known from earlier prompts, and {tokens.get('completion', 0)} tokens of answers,"
        f" {found['tokens_per_second']:.1f} a second.{said}{busy if found['busy'] else ''}"
    )


def _waits(found: dict[str, Any]) -> str:
    header = ["seconds", "number", "median", "19 of 20 within", "longest", "longest / median"]
    rows = [
        [
            name,
            str(one["count"]),
            *(f"{one[key]:.2f}" for key in ("median", "p95", "max")),
            f"{one['max'] / one['median']:.1f}" if one["median"] else "",
        ]
        for name, one in [
            *((f"first text, {name}", one) for name, one in found["first"].items()),
            *([("between two pieces of text", found["gap"])] if found["gap"] else []),
        ]
    ]
    return table(header, rows)


def _same(fixed: dict[str, Any]) -> str:
    differing = fixed["differing"]
    other = sum(one["times"] for one in differing.values())
    places = "; ".join(
        f"{name}: {one['times']} of {one['of']}, from character {min(one['from'])} on"
        for name, one in differing.items()
    )
    return (
        f"Questions asked alone first, and then in company: {fixed['same'] + other}, of which"
        f" {other} came out as another text{f' ({places})' if places else ''}."
    )


def _rude(found: dict[str, Any]) -> str:
    left = ", ".join(f"{times} {when}" for when, times in found["left"].items())
    statuses = ", ".join(f"{times} x {status}" for status, times in found["refusals"].items())
    settled = found["settled"]
    held = settled["queued"], settled["active"]
    after = "{:.0f} were still queued, {:.0f} being decoded".format(*held)
    return (
        f"Clients that hung up: {left or 'none'}. Statuses of malformed bodies:"
        f" {statuses or 'none'}. {settled['seconds']:.2f} s after all had hung up at once"
        f" {after if any(held) else 'nothing was queued or decoded any more'}."
    )


def _process(found: dict[str, Any]) -> str:
    parts = []
    if "memory" in found:
        one = found["memory"]
        sizes = " / ".join(f"{one[key] / 1e6:.0f}" for key in ("start", "peak", "end"))
        grown, floor = one["slope"], one["floor_slope"]
        slope = "too short a run for a slope" if grown is None else f"{grown:+.2f} MB a minute"
        if lies := one.get("slope_range"):
            slope += f" ({lies[0]:+.1f} to {lies[1]:+.1f} by two standard errors of half minutes)"
        lowest = "" if floor is None else f"; of each minute's lowest {floor:+.2f}"
        rest = one.get("rest_slope")
        lowest += "" if rest is None else f"; without keys and values {rest:+.2f}"
        parts.append(
            f"Resident memory, MB, at the start / most / at the end: {sizes}; under load from"
            f" minute 2 on {slope} (least squares of a sample a second{lowest})."
        )
        resting = one.get("at_rest", {})
        if None not in [resting.get(key) for key in ("new", "before", "after")]:
            new, warm, end = (f"{resting[key] / 1e6:.0f}" for key in ("new", "before", "after"))
            parts.append(
                f"At rest, without earlier prompts: {new} MB when it was new, {warm} after a first"
                f" load to warm it up, {end} in the end."
            )
        if one["said"]:
            prompts, entries = (
                " / ".join(f"{said[key] / 1e6:.0f}" for said in _thirds(one["said"]))
                for key in ("prefix_cache_bytes", "kv_bytes")
            )
            parts.append(
                "Of it by the server's own count, MB, at the start / halfway / at the end: earlier"
                f" prompts {prompts}; answers being decoded {entries}."
            )
    before, after = (found["handles"][when] or {} for when in ("before", "after"))
    for key, name in (("open_files", "Open files and connections"), ("threads", "Threads")):
        if before.get(key) is not None:
            parts.append(f"{name} before and after: {before[key]}, {after[key]}.")
    if "stopped" in found:
        stopped = found["stopped"]
        code = stopped["exit_code"]
        how = "it had to be killed" if code is None else f"exit code {code}"
        parts.append(f"Asked to stop it took {stopped['seconds']:.1f} s ({how}).")
    return " ".join(parts)


def _thirds(said: list[dict[str, float]]) -> list[dict[str, float]]:
    return [said[0], said[len(said) // 2], said[-1]]
