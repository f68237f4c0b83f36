"""Where a forward pass spends its time, in few words: what the peers suite says beside a ratio.

`python -m bench.step_profile` has all of it. Here kinds of operations are joined to those a
reader knows from the model's picture, and rated by one figure. Decode reads every matrix for
one token, so its kinds are rated in GB/s and can be held against the memory's bandwidth. Prefill
uses every matrix for a whole chunk, so its kinds are rated in GFLOP/s. A kind that is rated as
high as the machine goes can't be made faster, only smaller.

What the whole pass takes beyond the sum of its kinds is the rest: residual sums, building the
graph in Python, waiting between kernels.
"""

from collections.abc import Sequence
from statistics import median

from bench.report import table
from bench.step_kinds import WHOLE, Pass, decode_pass, prefill_pass
from bench.suite import Results
from mlx_cerebrum.decoding.decode import prefill_step
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.memory import GB

REST = "the rest"
UNITS = {"decode": "GB/s", "prefill": "GFLOP/s"}
JOINED = {
    "embedding": ("embedding",),
    "norms": ("norms",),
    "qkv": ("qkv",),
    "rope, cache": ("rope", "cache"),
    "attention": ("attention",),
    "o": ("o",),
    "mlp": ("gate_up", "activation", "down"),
    "head": ("head", "argmax"),
}
_RATED = ("qkv", "attention", "o", "mlp", "head")


def measure(model: Model, prompt: Sequence[int], count: int = 3) -> Results:
    """Seconds of each kind in one decode step at the end of `prompt`, and in a first chunk."""
    chunk = min(prefill_step(), len(prompt))
    return {
        "context": len(prompt),
        "chunk": chunk,
        "prefill": _joined(prefill_pass(model, 0, chunk), count, "flops"),
        "decode": _joined(decode_pass(model, len(prompt) - 1), 3 * count, "held"),
    }


def _joined(measured: Pass, count: int, work: str) -> Results:
    times = measured.times(count)
    total = median(t.build + t.evaluate for t in times[WHOLE])
    found: Results = {}
    for name, parts in JOINED.items():
        kinds = {part: measured.kinds[part] for part in parts if part in measured.kinds}
        if not kinds:
            continue
        seconds = sum(median(t.evaluate for t in times[part]) for part in kinds)
        rate = sum(getattr(kind, work) for kind in kinds.values()) / GB / seconds
        found[name] = {
            "seconds": float(f"{seconds:.4g}"),
            "rate": float(f"{rate:.4g}") if name in _RATED else None,
        }
    rest = total - sum(each["seconds"] for each in found.values())
    found[REST] = {"seconds": float(f"{rest:.4g}"), "rate": None}
    return {"total": float(f"{total:.4g}"), "kinds": found}


def text(results: Results) -> list[str]:
    """A table for each phase, its kinds in the order of their time."""
    what = {
        "decode": f"one decode step after {results['context']} tokens",
        "prefill": f"one prefill chunk of {results['chunk']} tokens",
    }
    tables = []
    for phase, unit in UNITS.items():
        found = results[phase]
        kinds = sorted(found["kinds"].items(), key=lambda kind: -kind[1]["seconds"])
        rows = [
            [
                name,
                f"{kind['seconds'] * 1000:.2f}",
                f"{kind['seconds'] / found['total']:.0%}",
                f"{kind['rate']:.1f}" if kind["rate"] else "",
            ]
            for name, kind in kinds
        ]
        total = ["all of it", f"{found['total'] * 1000:.2f}", "100%", ""]
        tables.append(table([what[phase], "ms", "share", unit], [*rows, total]))
    return tables
