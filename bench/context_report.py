"""The context suite's tables and pictures, from its results alone."""

from collections.abc import Callable, Sequence
from typing import Any

from bench.plots import Picture, curves
from bench.report import Spread, table
from bench.suite import Results

MB = 1e6

Side = dict[str, Any]


def text(results: Results) -> list[str]:
    random = results["random"]
    return [
        f"Decode at a context, keys and values filled at random; each round decodes"
        f" {results['tokens']} tokens and takes them back. Median (lowest-highest) of rounds in"
        " turns.",
        _model_text(results),
        *_model_table(results),
        *_missing(results["model"]),
        _random_text(random),
        _table(random["lengths"], random["names"], "random weights", with_ratio=True),
        *_missing(random["lengths"]),
        *_bound(random),
        *_peer_text(random),
    ]


def _model_text(results: Results) -> str:
    window = results["window"]
    if window is None:
        return (
            f"This model has no window and {results['positions']} positions: its caches grow with"
            " the context, as any engine's would."
        )
    return f"This model has a window of {window} tokens and {results['positions']} positions."


def _model_table(results: Results) -> list[str]:
    if results["model_missing"]:
        return [f"Not measured: {results['model_missing']}"]
    return [_table(results["model"], results["names"], "this model", with_ratio=False)]


def _random_text(random: Results) -> str:
    return (
        f"The Cerebrum models' positions over random {random['dtype']} weights (hidden size"
        f" {random['hidden_size']}) with their window of {random['window']} tokens."
    )


def _table(
    lengths: Sequence[Results], names: Sequence[str], label: str, *, with_ratio: bool
) -> str:
    measured = [name for name in names if any(name in row["sides"] for row in lengths)]
    header = [f"context, {label}"]
    header += [f"{name}, {unit}" for unit in ("tokens/s", "MB") for name in measured]
    compared = with_ratio and any(row["ratio"] for row in lengths)
    rows = []
    for row in lengths:
        sides = [row["sides"].get(name) for name in measured]
        cells = [spread(side["decode"]).text() if side else "" for side in sides]
        cells += [f"{side['kv'] / MB:.1f}" if side else "" for side in sides]
        if compared:
            cells.append(Spread(**row["ratio"]).text(2) if row["ratio"] else "")
        cells.append(str(row["rounds"]))
        rows.append([str(row["length"]), *cells])
    return table([*header, *(["ours / mlx-lm"] if compared else []), "rounds"], rows)


def _missing(lengths: Sequence[Results]) -> list[str]:
    return [
        f"{row['length']} tokens, {name}: not measured: {reason}"
        for row in lengths
        for name, reason in row["missing"].items()
    ]


def _bound(random: Results) -> list[str]:
    """Whether our caches stayed inside what the window allows."""
    bound, ours = random["most_held"], random["names"][0]
    held = [row["sides"][ours]["kv"] for row in random["lengths"] if ours in row["sides"]]
    if bound is None or not held:
        return []
    kept = "never exceeded" if max(held) <= bound else "EXCEEDED"
    return [
        f"Ours may hold the window, what can be taken back and one chunk, {bound / MB:.1f} MB for"
        f" {ours}: {kept} ({max(held) / MB:.1f} MB)."
    ]


def _peer_text(random: Results) -> list[str]:
    if random["mlx_lm"] is None:
        return ["mlx-lm is not installed (pip install mlx-lm): no comparison."]
    differ = random["logits_differ_by"]
    same = f"differ from ours by {differ:.1g} at most" if differ else "equal ours bit for bit"
    return [
        f"mlx-lm {random['mlx_lm']} runs the same weights, unrolled, with full attention. Inside"
        f" the window (a prompt of 32 tokens) its logits {same}. Past"
        f" {random['window']} tokens the two do not compute the same function: the model was"
        " trained to see the window only, and stock mlx-lm attends to everything. A ratio there"
        " says what the window saves, not how well a kernel is written."
    ]


def spread(found: dict[str, float]) -> Spread:
    return Spread(found["median"], found["low"], found["high"])


def plots(results: Results, machine: Results) -> dict[str, Picture]:
    random = results["random"]
    pace = _series(random["lengths"], random["names"], lambda side: spread(side["decode"]))
    kv = _series(random["lengths"], random["names"], _held)
    model = _series(results["model"], results["names"], lambda side: spread(side["decode"]))
    x = "tokens of context"
    return {
        "context": Picture(
            lambda figure, theme: curves(
                figure, theme, pace, x=x, y="tokens/s", title="Decode over the context"
            ),
            "Decode pace over the context, ours with the window and mlx-lm without.",
        ),
        "context-kv": Picture(
            lambda figure, theme: curves(
                figure, theme, kv, x=x, y="MB", title="Keys and values held", log_y=True
            ),
            "Bytes of keys and values over the context, ours with the window and mlx-lm without.",
        ),
        "context-model": Picture(
            lambda figure, theme: curves(
                figure, theme, model, x=x, y="tokens/s", title="Decode over the context, this model"
            ),
            f"Decode pace of {' and '.join(results['names'])} over the context.",
        ),
    }


def _held(side: Side) -> Spread:
    megabytes = side["kv"] / MB
    return Spread(megabytes, megabytes, megabytes)


def _series(
    lengths: Sequence[Results], names: Sequence[str], value: Callable[[Side], Spread]
) -> dict[str, list[tuple[float, Spread]]]:
    return {
        name: [
            (float(row["length"]), value(row["sides"][name]))
            for row in lengths
            if name in row["sides"]
        ]
        for name in names
    }
