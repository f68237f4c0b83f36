"""What `python -m bench.server_peers` found, in words and tables."""

from typing import Any

from bench.report import Spread, table


def text(found: dict[str, Any]) -> list[str]:
    engines = found["engines"]
    measured = {name: one for name, one in engines.items() if "failure" not in one}
    parts = [
        f"{found['clients']} questions at once, and one alone, {found['max_tokens']} tokens an"
        f" answer at most; rounds in turns: {found['rounds']}; every round has questions of its"
        " own. All tokens of the answers over the time from the first request to the last token,"
        " and once all have begun pieces of text a second; median (lowest-highest). Ratios are"
        " ours over theirs, round by round: above 1 ours is faster.",
        *(_paces(measured, kind, found) for kind in ("together", "alone")),
        "\n".join(f"- {name}: {_engine(one)}" for name, one in measured.items()),
    ]
    failures = [f"- {name}: {one['failure']}" for name, one in engines.items() if "failure" in one]
    return [part for part in [*parts, "\n".join(failures)] if part]


def _paces(measured: dict[str, Any], kind: str, found: dict[str, Any]) -> str:
    label = f"{found['clients']} at once" if kind == "together" else "one alone"
    header = [label, "tokens/s", "ours/its", "first text, s", "the last one's, s", "once all go"]
    rows = []
    for name, one in measured.items():
        it = one[kind]
        pace, first, last, going = (Spread(**it[key]) for key in ("pace", "first", "last", "going"))
        share = Spread(**it["ratio"]).text(2) if "ratio" in it else ""
        same = f"{it['same']} of {it['compared']}" if "same" in it else ""
        rows.append([name, pace.text(1), share, first.text(2), last.text(2), going.text(1), same])
    counts = "; ".join(
        f"{name} {it['prompt_tokens']}, {it['cached_tokens']} of them cached, and"
        f" {it['completion_tokens']}"
        for name, it in ((name, one[kind]) for name, one in measured.items())
    )
    return f"{table([*header, 'same texts'], rows)}\n\nTokens of prompts and answers: {counts}."


def _engine(one: dict[str, Any]) -> str:
    size = one["resident"]
    held = "" if size is None else f"; {size / 1e6:.0f} MB resident at the end"
    return f"{one['version']}; {one['settings']}{held}"
