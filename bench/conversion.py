"""What a conversion costs, whole processes side by side: ours, mergekit, mlx_lm.convert.

Someone with the 7B on disk wants the 12.25B in 4 bits. Today's way is two steps with 25 GB
between them; ours is one pass. Each command runs as a process of its own, and the system says
what it took: wall time, CPU time, the most memory held, and bytes handed to the disk. Before a
warm run the source is read once, so that its files are in the page cache as far as memory
allows; before a cold one they are dropped from it, and reading them plainly, with nothing
computed, is timed the same way.

    python -m bench.random_model DIR --geometry cerebrum-7b --tokenizer TOKENIZER_DIR
    python -m bench.conversion --source DIR --work FOLDER --mergekit PYTHON
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.report import parser, publish, table
from mlx_cerebrum import cli
from mlx_cerebrum.errors import CerebrumError, RequestError
from mlx_cerebrum.model.memory import GB
from mlx_cerebrum.plan.layer_plan import resolve
from mlx_cerebrum.text import tell
from mlx_cerebrum.tokenizer.files import FILES

_PIECE = 4_000_000  # bytes the plain reader takes at a time, as the converter does
_MERGEKIT = "from mergekit.scripts.run_yaml import main; main()"
OURS = {
    "folded, 4-bit": ["-q"],
    "folded, 8-bit": ["-q", "--q-bits", "8"],
    "folded, as stored": [],
    "unrolled, as stored": ["--layout", "unrolled"],
    "unrolled, 4-bit": ["--layout", "unrolled", "-q"],
}
FIRST = "folded, 4-bit"


@dataclass(frozen=True)
class Cost:
    """What one process took. Bytes and seconds; `written` is None where the system can't say."""

    wall: float
    cpu: float
    peak_memory: int
    written: int | None
    result: int


def main(argv: list[str] | None = None) -> int:
    p = parser("conversion", "Cost of converting, ours, mergekit and mlx_lm.convert.")
    p.add_argument("--source", type=Path, required=True, metavar="DIR", help="the 7B, dense")
    p.add_argument("--work", type=Path, metavar="DIR", help="where to write (default: a temporary)")
    p.add_argument("--plan", default="cerebrum-12.25b", metavar="NAME|FILE", help="layer plan")
    p.add_argument("--rounds", type=int, default=1, metavar="N", help="of the 4-bit side by side")
    p.add_argument(
        "--mergekit",
        metavar="PYTHON",
        help="interpreter of an environment with mergekit (default: leave it out)",
    )
    p.add_argument("--only-ours", action="store_true", help="no peers")
    args = p.parse_args(argv)
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    files = sorted(args.source.glob("*.safetensors"))
    if args.rounds < 1 or not files:
        raise RequestError("--rounds must be at least 1, --source a directory of safetensors")
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        work = Path(folder)
        costs: dict[str, list[Cost]] = {}
        for _ in range(args.rounds):
            _add(costs, f"ours: {FIRST}", _ours(args, work, OURS[FIRST], files))
            if not args.only_ours:
                _add(costs, "mlx_lm.convert -q of the 7B", _mlx_lm(args.source, work, files))
                if args.mergekit:
                    merged, quantized = _todays_way(args, work, files)
                    _add(costs, "mergekit", merged)
                    _add(costs, "mlx_lm.convert -q of that", quantized)
        for name, flags in OURS.items():
            if name != FIRST:
                _add(costs, f"ours: {name}", _ours(args, work, flags, files))
        cold = _cold(args, work, files)
    rows = {name: _middle(found) for name, found in costs.items()}
    results = {
        "costs": {name: asdict(cost) for name, cost in rows.items()},
        "rounds": {name: [asdict(cost) for cost in found] for name, found in costs.items()},
        "ratios": _ratios(rows),
        "cold": cold,
    }
    publish(args, "conversion", results, text(results))
    return 0


def _add(costs: dict[str, list[Cost]], name: str, cost: Cost) -> None:
    costs.setdefault(name, []).append(cost)
    tell(f"{name}: {cost.wall:.1f} s")


def _middle(found: Sequence[Cost]) -> Cost:
    """The run of median wall time (of two, the slower)."""
    return sorted(found, key=lambda cost: cost.wall)[len(found) // 2]


def _ours(args: argparse.Namespace, work: Path, flags: list[str], files: list[Path]) -> Cost:
    out = work / "ours"
    warm(files)
    command = [sys.executable, "-m", "convert", "--hf-path", args.source, "--mlx-path", out]
    return run([*command, "--plan", args.plan, "--quiet", *flags], out)


def _mlx_lm(source: Path, work: Path, files: list[Path]) -> Cost:
    out = work / "mlx-lm"
    warm(files)
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "mlx_lm",
        "convert",
        "--hf-path",
        source,
        "--mlx-path",
        out,
    ]
    return run([*command, "-q"], out)


def _todays_way(args: argparse.Namespace, work: Path, files: list[Path]) -> tuple[Cost, Cost]:
    """mergekit writes the merge, mlx_lm.convert quantizes it."""
    plan, merged = work / "plan.yml", work / "merged"
    text, name = resolve(args.plan).text, resolve(args.plan).source
    plan.write_text(text.replace(name, str(args.source.absolute())), encoding="utf-8")
    warm(files)
    command: list[str | Path] = [args.mergekit, "-c", _MERGEKIT, plan, merged]
    first = run(
        command, merged, keep=True, complete=("config.json", "model.safetensors.index.json")
    )
    for file in FILES:  # not timed: mergekit's own tokenizer step may want the network
        if (args.source / file).is_file() and not (merged / file).exists():
            shutil.copyfile(args.source / file, merged / file)
    second = _mlx_lm(merged, work, sorted(merged.glob("*.safetensors")))
    shutil.rmtree(merged)
    return first, second


def _cold(args: argparse.Namespace, work: Path, files: list[Path]) -> dict[str, float]:
    """Seconds with the source on disk only: reading it, and converting it to 4 bits."""
    out = work / "cold"
    command = [sys.executable, "-m", "convert", "--hf-path", args.source, "--mlx-path", out]
    read, converted = [], []
    for _ in range(args.rounds):
        drop(files)
        started = time.perf_counter()
        warm(files)
        read.append(time.perf_counter() - started)
        drop(files)
        converted.append(run([*command, "--plan", args.plan, "--quiet", "-q"], out).wall)
    return {
        "read": median(read),
        "converted": median(converted),
        "ratio": median(b / a for a, b in zip(read, converted, strict=True)),
    }


def warm(files: Iterable[Path]) -> None:
    """Read files, plainly."""
    buffer = bytearray(_PIECE)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop(files: Iterable[Path]) -> None:
    """Drop files from the page cache, where the system has a call for it."""
    if not hasattr(os, "posix_fadvise"):
        raise CerebrumError("this system can't drop files from its cache: no cold figures")
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(
    command: Sequence[str | Path], out: Path, *, keep: bool = False, complete: Sequence[str] = ()
) -> Cost:
    """Run a command that makes the directory `out`, which is removed again unless `keep`.

    complete: files that say it did its work, whatever its exit code.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [str(part) for part in command], env=environment, stdout=said, stderr=said
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        lines = said.read().strip().splitlines() or ["it printed nothing"]
    made = bool(complete) and all((out / name).exists() for name in complete)
    if process.returncode != 0 and not made:
        raise CerebrumError(f"{' '.join(map(str, command[:4]))} failed: {lines[-1]}")
    result = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    if not keep:
        shutil.rmtree(out)
    linux = sys.platform == "linux"
    return Cost(
        wall,
        usage.ru_utime + usage.ru_stime,
        usage.ru_maxrss * (1024 if linux else 1),
        usage.ru_oublock * 512 if linux else None,
        result,
    )


def _ratios(rows: dict[str, Cost]) -> dict[str, float]:
    ours = rows[f"ours: {FIRST}"].wall
    found = {}
    if "mergekit" in rows:
        both = rows["mergekit"].wall + rows["mlx_lm.convert -q of that"].wall
        found["ours / (mergekit + mlx_lm.convert)"] = ours / both
    if "mlx_lm.convert -q of the 7B" in rows:
        found["ours / mlx_lm.convert of the 7B"] = ours / rows["mlx_lm.convert -q of the 7B"].wall
    return found


def text(results: dict[str, Any]) -> list[str]:
    cells = [
        [
            name,
            f"{cost['wall']:.1f}",
            f"{cost['cpu']:.1f}",
            f"{cost['peak_memory'] / GB:.2f}",
            "" if cost["written"] is None else f"{cost['written'] / GB:.2f}",
            f"{cost['result'] / GB:.2f}",
        ]
        for name, cost in results["costs"].items()
    ]
    cold = results["cold"]
    header = ["", "wall s", "CPU s", "peak GB", "written GB", "result GB"]
    ratios = [[name, f"{value:.2f}"] for name, value in results["ratios"].items()]
    ratios.append(["cold: ours / plainly reading the source", f"{cold['ratio']:.2f}"])
    return [
        table(header, cells),
        f"Cold: reading {cold['read']:.1f} s, converting {cold['converted']:.1f} s.",
        table(["wall time", "ratio"], ratios),
    ]


if __name__ == "__main__":
    sys.exit(main())
