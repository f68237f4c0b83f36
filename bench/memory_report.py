"""The memory suite's tables and pictures, from its results alone."""

from bench.plots import Picture, bars
from bench.report import table
from bench.suite import Results
from mlx_cerebrum.model.memory import GB

MB = 1e6


def errors(row: Results) -> dict[str, float]:
    """How far each prediction is off, as a share of what was measured."""
    return {
        key: row["predicted"][key] / row["measured"][key] - 1 for key in ("weights", "kv", "peak")
    }


def text(results: Results) -> list[str]:
    everything = results["random"] + results["model"]
    rows = [row for row in everything if "measured" in row]
    tolerance, full = results["tolerance"], results["full_size"]
    right = sum(_within(row, tolerance) for row in rows)
    return [
        f"Random weights of a small geometry (hidden size {results['hidden_size']}, a window of"
        f" {results['window']} tokens unless a smaller is named), then the model itself. Each line"
        " is a process of its own, read by MLX's counters. Predicted before / measured, MB:",
        table(
            [
                "",
                "held in",
                "prompt",
                "weights",
                "keys and values",
                "peak",
                "off by at most",
                f"within {tolerance:.0%}",
            ],
            [_accuracy(row, tolerance) for row in rows],
        ),
        f"{right} of {len(rows)} configurations are predicted within {tolerance:.0%}.",
        table(
            ["", "loaded, MB", "peak loading, MB", "bound, MB", "kept", "a second view, bytes"],
            [_loading(row) for row in rows],
        ),
        *_folding(results),
        *(
            f"{row['name']}: not measured: {row['not_measured']}"
            for row in everything
            if "measured" not in row
        ),
        "The 7B's geometry at full size, GB: **predicted, not measured**, for a prompt of"
        f" {full['prompt']} tokens in chunks of {full['chunk']} on Metal, which fills the window."
        " Folded holds the 7B, the 12.25B or both, and the caches are the 12.25B's; unrolled is"
        f" the 12.25B as mergekit writes it. Last, the caches of {full['positions']} tokens in an"
        " engine that ignores the window.",
        table(
            ["", "weights", "keys and values", "peak", "keys and values, no window"],
            [_full(row) for row in full["rows"]],
        ),
    ]


def _folding(results: Results) -> list[str]:
    if results["block_ratio"] is None:
        return []
    return [
        f"Block bytes folded / unrolled: {results['block_ratio']:.4f}"
        f" (expected {results['expected_ratio']:.4f}). Same model:"
        f" {'yes, logits equal' if results['same_logits'] else 'NO, logits differ'}."
    ]


def _within(row: Results, tolerance: float) -> bool:
    return all(abs(error) <= tolerance for error in errors(row).values())


def _accuracy(row: Results, tolerance: float) -> list[str]:
    found = errors(row)
    worst = max(found, key=lambda key: abs(found[key]))

    def both(key: str) -> str:
        return f"{row['predicted'][key] / MB:.1f} / {row['measured'][key] / MB:.1f}"

    return [
        row["name"],
        row["dtype"],
        str(row["prompt"]),
        *(both(key) for key in found),
        f"{found[worst]:+.1%} ({'keys and values' if worst == 'kv' else worst})",
        "yes" if _within(row, tolerance) else "NO",
    ]


def _loading(row: Results) -> list[str]:
    measured, bound = row["measured"], row["predicted"]["loading"]
    return [
        row["name"],
        f"{measured['weights'] / MB:.1f}",
        f"{measured['loading'] / MB:.1f}",
        f"{bound / MB:.1f}",
        "yes" if measured["loading"] <= bound else "NO",
        str(measured["view"]),
    ]


def _full(row: Results) -> list[str]:
    figures = (row["weights"], row["kv"], row["peak"], row["kv_no_window"])
    return [f"{row['form']}, {_precision(row)}", *(f"{figure / GB:.2f}" for figure in figures)]


def _precision(row: Results) -> str:
    return "bfloat16" if row["bits"] is None else f"{row['bits']}-bit"


def plots(results: Results, machine: Results) -> dict[str, Picture]:
    measured: dict[str, dict[str, float]] = {}
    for row in results["random"]:
        if "measured" in row:
            form, _, held = row["name"].partition(", ")
            measured.setdefault(held, {})[form] = row["measured"]["peak"] / MB
    full: dict[str, dict[str, float]] = {}
    for row in results["full_size"]["rows"]:
        full.setdefault(_precision(row), {})[row["form"]] = row["peak"] / GB
    return {
        "memory": bars(
            measured,
            "Peak memory folded and unrolled, in each precision, of a small random model.",
            y="MB",
            title="Peak memory of a small model, measured",
        ),
        "memory-full-size": bars(
            full,
            "Predicted peak memory of the 12.25B at full size, folded and unrolled.",
            y="GB",
            title="Peak memory of the 12.25B, predicted",
        ),
    }
