"""The context suite's tables and pictures, from its results alone."""

from collections.abc import Callable, Sequence
from typing import Any

from bench.plots import Picture, curves
from bench.report import Spread, table
from bench.suite import Results

MB = 1e6

Side = dict[str, Any]


def text(results: Results) -> list[str]:
    model, random = results["model"], results["random"]
    return [
        f"Decode at a context, keys and values filled at random; each round decodes"
        f" {results['tokens']} tokens and takes them back. Median (lowest-highest) of rounds in"
        " turns.",
        _model_text(results),
        *_model_table(results),
        *_missing(model["lengths"]),
        *_copies_text(model, results["window"]),
        _random_text(random),
        _table(random, random["names"], "random weights"),
        *_missing(random["lengths"]),
        *_bound(random),
        *_peer_text(random),
        *_bytes_text(random),
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
    model = results["model"]
    if model["missing"]:
        return [f"Not measured: {model['missing']}"]
    return [_table(model, [*results["names"], *model["peers"]], "this model")]


def _copies_text(model: Results, window: int | None) -> list[str]:
    """What mlx-lm ran beside the model itself, and what it could not."""
    reasons = [f"{name}: not measured: {said}" for name, said in model["peers_missing"].items()]
    if not model["peers"]:
        return reasons
    past = "" if window is None else f" Past {window} tokens it attends to all, the model does not."
    differ = [f"{name} {_differ(peer)}" for name, peer in model["peers"].items()]
    return [
        "mlx-lm runs each side's weights in the dtype and bits ours computes with, a layer for"
        f" each position. Its logits for a short prompt: {'; '.join(differ)}.{past}",
        *reasons,
    ]


def _differ(peer: Results) -> str:
    differ = peer["logits_differ_by"]
    return f"differ from ours by {differ:.1g} at most" if differ else "equal ours bit for bit"


def _random_text(random: Results) -> str:
    return (
        f"The Cerebrum models' positions over random {random['dtype']} weights (hidden size"
        f" {random['hidden_size']}) with their window of {random['window']} tokens."
    )


def _table(part: Results, names: Sequence[str], label: str) -> str:
    """A part's lengths: paces, bytes, and ours over each peer that was measured beside it."""
    lengths = part["lengths"]
    measured = [name for name in names if any(name in row["sides"] for row in lengths)]
    header = [f"context, {label}"]
    header += [f"{name}, {unit}" for unit in ("tokens/s", "MB") for name in measured]
    compared = [name for name in part["peers"] if any(name in row["ratios"] for row in lengths)]
    header += [f"ours / {name}" for name in compared]
    rows = []
    for row in lengths:
        sides = [row["sides"].get(name) for name in measured]
        ratios = [row["ratios"].get(name) for name in compared]
        cells = [Spread.read(side["decode"]).text() if side else "" for side in sides]
        cells += [f"{side['kv'] / MB:.1f}" if side else "" for side in sides]
        cells += [Spread.read(ratio).text(2) if ratio else "" for ratio in ratios]
        rows.append([str(row["length"]), *cells, str(row["rounds"])])
    return table([*header, "rounds"], rows)


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
    same = "; ".join(_differ(peer) for peer in random["peers"].values())
    return [
        f"mlx-lm {random['mlx_lm']} runs the same weights, unrolled, with full attention. Inside"
        f" the window (a prompt of 32 tokens) its logits {same}. Past"
        f" {random['window']} tokens the two do not compute the same function: the model was"
        " trained to see the window only, and stock mlx-lm attends to everything. A ratio there"
        " says what the window saves, not how well a kernel is written."
    ]


def _bytes_text(random: Results) -> list[str]:
    """What the window can save of the bytes: less at full size than of the narrow weights."""
    rows = random["bytes_alone"]
    names = list(rows[0]["ratios"])
    return [
        "**From bytes alone, not measured**: what mlx-lm reads for a token (weights, and keys and"
        " values of all tokens) over what ours reads (weights, and the window's). More than that"
        " the window can't save where decoding is bound by bandwidth. The narrow weights are few"
        " for their keys and values, so their ratios above are higher than full size can give.",
        table(
            ["context, from bytes alone", *names],
            [
                [str(row["length"]), *(f"{row['ratios'][name]:.2f}" for name in names)]
                for row in rows
            ],
        ),
    ]


def plots(results: Results, machine: Results) -> dict[str, Picture]:
    random = results["random"]
    pace = _series(random["lengths"], random["names"], lambda side: Spread.read(side["decode"]))
    kv = _series(random["lengths"], random["names"], _held)
    itself = results["model"]
    names = [*results["names"], *itself["peers"]]
    model = _series(itself["lengths"], names, lambda side: Spread.read(side["decode"]))
    x = "tokens of context"
    return {
        "context": curves(
            pace,
            "Decode pace over the context, ours with the window and mlx-lm without.",
            x=x,
            y="tokens/s",
            title="Decode over the context",
        ),
        "context-kv": curves(
            kv,
            "Bytes of keys and values over the context, ours with the window and mlx-lm without.",
            x=x,
            y="MB",
            title="Keys and values held",
            log_y=True,
        ),
        "context-model": curves(
            model,
            f"Decode pace of {', '.join(names)} over the context.",
            x=x,
            y="tokens/s",
            title="Decode over the context, this model",
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
