"""The blocks of figures in documents, each a function of what lies in bench/results/.

A block that quotes one machine names its run here, so that a table sent by someone else never
changes what README.md says; only the index is of all runs.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from bench.index import LENGTH, chip, index
from bench.markdown import picture
from bench.peers_report import OURS, measured, reasons
from bench.report import Spread, table
from bench.runs import Runs
from bench.suite import Results
from mlx_cerebrum.model.memory import GB

DEMO = "linux-epyc-2-demo"  # the demo model, every suite
FULL = "linux-epyc-2-7b"  # random weights of the 7B's geometry, and its conversion
SHOWN = (DEMO,)  # the runs whose speed README.md shows, a column each
_SUITES = ("memory", "context", "peers", "quality", "plans", "full_size")


def speed(runs: Runs) -> str:
    """B against A, a column for each run shown."""
    documents = [runs.document(run) for run in SHOWN]
    found = [runs.suite(run, "speed") for run in SHOWN]

    def cells(digits: int, find: Callable[[Results], Results | None], ratio: Any) -> list[str]:
        made = []
        for results in found:
            sides = [find(results["sides"][name]) for name in results["names"]]
            if None in sides:
                made.append("-")
                continue
            paces = " / ".join(f"{side['median']:.{digits}f}" for side in sides if side)
            made.append(f"{paces} ({_spread(ratio(results)).text(2)})")
        return made

    def first_token(results: Results) -> Results:
        return {key: 1 / results["ratios"]["prefill"][LENGTH][other] for key, other in _TURNED}

    header = [""]
    for document, results in zip(documents, found, strict=True):
        a, b = results["names"]
        header.append(f"{chip(document['machine'])}, {document['date']}: {a} / {b} (B over A)")
    rows = [
        [
            f"prefill of {LENGTH}, tokens/s",
            *cells(0, lambda s: s["prefill"][LENGTH], lambda r: r["ratios"]["prefill"][LENGTH]),
        ],
        ["decode, tokens/s", *cells(1, lambda s: s["decode"], lambda r: r["ratios"]["decode"])],
        [f"first token after {LENGTH}, s", *cells(2, lambda s: s["ttft"][LENGTH], first_token)],
        ["process start to first token, s", *cells(2, lambda s: s["start"], _start_ratio)],
        [
            "read a token, GB",
            *(_of_sides(r, lambda s: s["bytes_per_token"] / GB, 3) for r in found),
        ],
        [
            "share of the bandwidth measured",
            *(_of_sides(r, lambda s: s["share"]["measured"], 2) for r in found),
        ],
    ]
    return table(header, rows)


_TURNED = (("median", "median"), ("low", "high"), ("high", "low"))


def _start_ratio(results: Results) -> Results:
    found: Results = results["ratios"]["start"]
    return found


def _of_sides(results: Results, find: Callable[[Results], float], digits: int) -> str:
    return " / ".join(f"{find(results['sides'][name]):.{digits}f}" for name in results["names"])


def _spread(found: Results) -> Spread:
    return Spread(found["median"], found["low"], found["high"])


def roofline(runs: Runs) -> str:
    """The picture of the speed suite, for README.md at the root."""
    from bench.speed import plots

    name = "speed-roofline"
    alt = plots(runs.suite(DEMO, "speed"), runs.document(DEMO)["machine"])[name].alt
    return picture(name, alt, f"bench/results/{DEMO}/")


def recipes(runs: Runs) -> str:
    """Perplexity by recipe, a row for each plan."""
    documents = [runs.bench(DEMO, file) for file in ("recipes", "recipes-interleaved")]
    first = documents[0]["results"]
    texts = [key for key in first["dense"] if key != "bits_per_weight"]
    header = [f"{documents[0]['settings']['model']}: perplexity, {' / '.join(texts)}"]
    for name, found in first.items():
        label = name.partition(" at ")[0]  # its bits stand behind it anyway
        bits = f", {found['bits_per_weight']:.2f} bits" if name != "dense" else ""
        header.append(f"{label}{bits}")
    rows, errors = [], []
    for document in documents:
        results = document["results"]
        rows.append(
            [
                document["settings"]["plan"] or "as it is",
                *(
                    " / ".join(f"{found[text]['perplexity']:.1f}" for text in texts)
                    for found in results.values()
                ),
            ]
        )
        errors += [
            100 * found[text]["standard_error"]
            for name, found in results.items()
            if name != "dense"
            for text in texts
        ]
    tokens = first["dense"][texts[0]]["tokens"]
    return (
        f"{table(header, rows)}\n\n(`python -m bench.recipes`: {tokens} tokens a text, standard"
        f" errors of {min(errors):.1f} to {max(errors):.1f} percent of the perplexity.)"
    )


def conversion(runs: Runs) -> str:
    """In a sentence: ours against mergekit and mlx_lm.convert."""
    document = runs.bench(FULL, "conversion")
    costs = document["results"]["costs"]
    ours = costs["ours: folded, 4-bit"]
    peers = [costs["mergekit"], costs["mlx_lm.convert -q of that"]]
    return (
        f"From the 7B to the folded 4-bit 12.25B took {ours['wall']:.0f} s and"
        f" {ours['peak_memory'] / GB:.1f} GB of memory; mergekit and then mlx_lm.convert took"
        f" {sum(cost['wall'] for cost in peers):.0f} s,"
        f" {max(cost['peak_memory'] for cost in peers) / GB:.0f} GB resident (mapped files too) and"
        f" {peers[0]['result'] / GB:.0f} GB of disk in between (`python -m bench.conversion`,"
        f" random weights of the exact geometry, one round, {chip(document['machine'])})."
    )


def conversion_table(runs: Runs) -> str:
    """Each conversion's cost, and what stands out."""
    document = runs.bench(FULL, "conversion")
    results, card = document["results"], document["machine"]
    rows = [
        [
            name,
            f"{cost['wall']:.1f} s",
            f"{cost['cpu']:.0f} s",
            f"{cost['peak_memory'] / GB:.2f} GB",
            "-" if cost["written"] is None else f"{cost['written'] / GB:.2f} GB",
        ]
        for name, cost in results["costs"].items()
    ]
    ratios = "; ".join(f"{name}: {value:.2f}" for name, value in results["ratios"].items())
    cold = results["cold"]
    return "\n\n".join(
        [
            f"{chip(card)}, mlx {card['mlx']} on {card['device']}:",
            table(["", "wall", "CPU", "peak memory", "written"], rows),
            f"Wall time, folded in 4 bits: {ratios}. From a cold disk it took"
            f" {cold['converted']:.0f} s, {cold['ratio']:.1f} times as long as plainly reading the"
            " source.",
        ]
    )


_SAME_FILES = "mlx-cerebrum, mlx-lm's directory"  # ours, started on what mlx-lm reads


def peers_short(runs: Runs) -> str:
    """Ours over each peer, both sides; above 1 ours is faster."""
    results = runs.suite(DEMO, "peers")
    rows = []
    for side in results["sides"].values():
        for name, row in side["engines"].items():
            if "failure" in row:
                rows.append([f"{name}, {side['name']}", "not measured", "", "", "", ""])
            elif "ratios" in row:
                same = "yes" if row["equal"] else f"{row['agreeing']} of {row['compared']}"
                pair = [_spread(row["ratios"][phase]).text(2) for phase in ("prefill", "decode")]
                started = side["start"].get("ratios", {}) if name == "mlx-lm" else {}
                start = _spread(started[_SAME_FILES]).text(2) if started else ""
                read = row["token_bytes"] / measured(side)[OURS]["token_bytes"]
                rows.append([f"{name}, {side['name']}", *pair, start, f"{read:.2f}", same])
    header = ["ours over", "prefill", "decode", "process start", "bytes it reads / ours"]
    return table([*header, "same tokens"], rows)


def peers_why(runs: Runs) -> str:
    """The measured reason for every ratio below 1."""
    results = runs.suite(DEMO, "peers")
    lines = [
        f"- {side['name']}: {line}" for side in results["sides"].values() for line in reasons(side)
    ]
    return "\n".join(lines) or "No ratio was below 1."


def full_size_short(runs: Runs) -> str:
    """Bytes at full size, and what they say about other machines."""
    results = runs.suite(FULL, "full_size")
    weights, sides = results["weights"], results["sides"]
    a, b = results["names"]
    peaks = " and ".join(f"{sides[name]['peak'] / GB:.1f} GB ({name})" for name in (a, b))
    chips = ("Apple M2", "Apple M4 Pro", "Apple M2 Ultra")
    models = {
        f"{name}, 4-bit": results["projection"]["models"][f"{name}, 4-bit"] for name in (a, b)
    }
    roofs = [[of, *(f"{max(one['roof'][of]):.0f}" for one in models.values())] for of in chips]
    return (
        f"Both models held in {weights['loaded'] / GB:.2f} GB of {weights['dtype']}"
        f" (predicted {weights['predicted'] / GB:.2f}), at most {peaks} while generating.\n\n"
        f"{table(['projected, not measured: the roof in tokens/s', *models], roofs)}\n\n"
        "Published bandwidth over the bytes a token reads; of that engines are known to reach"
        f" {_range(results['projection']['known'])}."
    )


def _range(known: list[float]) -> str:
    return " to ".join(f"{share:.0%}" for share in known)


def plans_short(runs: Runs) -> str:
    """The card's plans, and the picture of the sweep."""
    from bench.plans import plots

    results = runs.suite(DEMO, "plans")
    found = plots(results, runs.document(DEMO)["machine"])
    name = next(iter(found))
    said = _paragraphs(runs, "plans")[:3]
    return "\n\n".join([*said, picture(name, found[name].alt, f"bench/results/{DEMO}/")])


def quality_short(runs: Runs) -> str:
    """The verdict: its table, its sentence, how far to trust it."""
    return "\n\n".join(_paragraphs(runs, "quality")[:3])


def _whole(runs: Runs, suite: str) -> str:
    return "\n\n".join(_paragraphs(runs, suite))


def _first_table(runs: Runs, suite: str) -> str:
    return next(part for part in _paragraphs(runs, suite) if part.startswith("|"))


def _paragraphs(runs: Runs, suite: str) -> list[str]:
    """The suite's own words on the results of its run."""
    run = FULL if suite == "full_size" else DEMO
    module: Any = importlib.import_module(f"bench.{suite}")
    found: list[str] = module.text(runs.suite(run, suite))
    return found


def _single(runs: Runs, file: str, module: str) -> str:
    """All a bench on its own said of the run in `file`."""
    said: list[str] = importlib.import_module(f"bench.{module}").text(
        runs.bench(DEMO, file)["results"]
    )
    return "\n\n".join(said)


Block = Callable[[Runs], str]
BLOCKS: dict[str, Block] = {
    "index": index,
    "speed": speed,
    "roofline": roofline,
    "recipes": recipes,
    "conversion": conversion,
    "conversion-table": conversion_table,
    "peers-short": peers_short,
    "peers-why": peers_why,
    "quality-short": quality_short,
    "full-size-short": full_size_short,
    "plans-short": plans_short,
    "speculation": partial(_single, file="speculation", module="speculation_report"),
    "kv-bits": partial(_single, file="kv-bits", module="kv_bits"),
    "step-profile": partial(_single, file="step-profile", module="step_profile"),
    "primitives": partial(_single, file="primitives", module="primitives"),
    "server-load": partial(_single, file="server-load", module="server_load_report"),
    "server-peers": partial(_single, file="server-peers", module="server_peers_report"),
    # Of the other suites everything they say, or their first table.
    **{suite: partial(_whole, suite=suite) for suite in _SUITES},
    **{f"{suite}-table": partial(_first_table, suite=suite) for suite in _SUITES},
}
