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
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.report import parser, run, table
from bench.suite import Results
from mlx_cerebrum.errors import CerebrumError, RequestError
from mlx_cerebrum.model.memory import GB
from mlx_cerebrum.plan.layer_plan import resolve
from mlx_cerebrum.text import tell
from mlx_cerebrum.tokenizer.files import FILES

OURS = {
    "ours: folded, 4-bit": ["-q", "--q-bits", "4"],
    "ours: folded, 8-bit": ["-q", "--q-bits", "8"],
    "ours: folded, as stored": [],
    "ours: unrolled, as stored": ["--layout", "unrolled"],
    "ours: unrolled, 4-bit": ["--layout", "unrolled", "-q", "--q-bits", "4"],
}
FIRST, *OTHERS = OURS
MLX_LM, MERGEKIT, OF_THAT = "mlx_lm.convert -q of the 7B", "mergekit", "mlx_lm.convert -q of that"
RATIOS = {
    "ours / (mergekit + mlx_lm.convert)": (MERGEKIT, OF_THAT),
    "ours / mlx_lm.convert of the 7B": (MLX_LM,),
}
_PIECE = 4_000_000  # bytes the plain reader takes at a time, as the converter does
PYTHON = sys.executable
Words = Sequence[str | Path]


def main(argv: list[str] | None = None) -> int:
    p = parser("conversion", "Cost of converting, ours, mergekit and mlx_lm.convert.")
    p.add_argument("--source", type=Path, required=True, metavar="DIR", help="the 7B, dense")
    p.add_argument("--work", type=Path, metavar="DIR", help="where to write (default: a temporary)")
    p.add_argument("--plan", default="cerebrum-12.25b", metavar="NAME|FILE", help="layer plan")
    p.add_argument("--mergekit", metavar="PYTHON", help="one that has it (default: leave it out)")
    return run(p, _measure, text, argv)


def _measure(args: argparse.Namespace) -> Results:
    source: Path = args.source
    if not any(source.glob("*.safetensors")):
        raise RequestError("--source must be a directory of safetensors")
    costs: dict[str, Results] = {}
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        out, merged, plan = (Path(folder) / name for name in ("out", "merged", "plan.yml"))

        def ours(name: str) -> Words:
            paths = ["--hf-path", source, "--mlx-path", out]
            return ["convert", *paths, "--plan", args.plan, "--quiet", *OURS[name]]

        def mlx_lm(directory: Path) -> Words:
            return ["mlx_lm", "convert", "--hf-path", directory, "--mlx-path", out, "-q"]

        def measure(name: str, of: Path, words: Words, made: Path = out, by: str = PYTHON) -> None:
            _read(of)
            costs[name] = _cost(words, made, by)
            tell(f"{name}: {costs[name]['wall']:.1f} s")

        measure(FIRST, source, ours(FIRST))
        measure(MLX_LM, source, mlx_lm(source))
        if args.mergekit:
            named = resolve(args.plan)
            name = rf"\b{re.escape(named.source)}\b"
            plan.write_text(re.sub(name, str(source.absolute()), named.text), "utf-8")
            # What it is told to leave out may want the network.
            less = ["--no-copy-tokenizer", "--no-write-model-card"]
            words: Words = ["mergekit.scripts.run_yaml", plan, merged, *less]
            measure(MERGEKIT, source, words, merged, args.mergekit)
            for file in filter(Path.is_file, (source / name for name in FILES)):
                shutil.copyfile(file, merged / file.name)
            measure(OF_THAT, merged, mlx_lm(merged))
            shutil.rmtree(merged)
        for name in OTHERS:
            measure(name, source, ours(name))
        cold = None
        if hasattr(os, "posix_fadvise"):  # else nothing can be dropped from the page cache
            _drop(source)
            plain = _read(source)
            _drop(source)
            converted = _cost(ours(FIRST), out)["wall"]
            cold = {"read": plain, "converted": converted, "ratio": converted / plain}
    ratios = {
        name: costs[FIRST]["wall"] / sum(costs[peer]["wall"] for peer in peers)
        for name, peers in RATIOS.items()
        if costs.keys() >= set(peers)
    }
    return {"costs": costs, "ratios": ratios, "cold": cold}


def text(results: Results) -> list[str]:
    def gb(nbytes: int | None) -> str:
        return "" if nbytes is None else f"{nbytes / GB:.2f}"

    header = ["", "wall s", "CPU s", "peak GB", "written GB", "result GB"]
    sizes = ("peak_memory", "written", "result")
    rows = [
        [name, f"{cost['wall']:.1f}", f"{cost['cpu']:.1f}", *(gb(cost[size]) for size in sizes)]
        for name, cost in results["costs"].items()
    ]
    said, ratios = [table(header, rows)], dict(results["ratios"])
    if MERGEKIT not in results["costs"]:
        said.append("mergekit: not measured; --mergekit names a Python that has it.")
    if cold := results["cold"]:
        said.append(f"Cold: reading {cold['read']:.1f} s, converting {cold['converted']:.1f} s.")
        ratios["cold: ours / plainly reading the source"] = cold["ratio"]
    shown = [[name, f"{value:.2f}"] for name, value in ratios.items()]
    return [*said, table(["wall time", "ratio"], shown)]


def _read(directory: Path) -> float:
    """Seconds to read the weight files, plainly; they are then in the page cache."""
    buffer, started = bytearray(_PIECE), time.perf_counter()
    for path in directory.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started


def _drop(directory: Path) -> None:
    """Drop the weight files from the page cache."""
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _cost(words: Words, made: Path, python: str = PYTHON) -> Results:
    """What `python -m` these words took, in seconds and bytes; they make a directory."""
    shutil.rmtree(made, ignore_errors=True)  # what an earlier run made
    command = [python, "-m", *map(str, words)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        lines = said.read().strip().splitlines() or ["it printed nothing"]
    if process.returncode != 0:
        raise CerebrumError(f"python -m {words[0]} failed: {lines[-1]}")
    result = sum(file.stat().st_size for file in made.rglob("*") if file.is_file())
    linux = sys.platform == "linux"
    return {
        "wall": wall,
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak_memory": usage.ru_maxrss * (1024 if linux else 1),
        "written": usage.ru_oublock * 512 if linux else None,  # else the system can't say
        "result": result,
    }


if __name__ == "__main__":
    sys.exit(main())
