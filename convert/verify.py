"""`python -m convert verify`: check every byte of a checkpoint, and report all that is wrong.

Any directory of safetensors (ours, the hub's, mergekit's, mlx-lm's) or a GGUF file. Nothing is
written and no weights are kept: one pass over the bytes, in pieces, hashes them and looks for
NaN and Inf on the way.
"""

import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from convert import examine
from convert.examine import Findings, Span
from convert.integrity import (
    PIECE,
    Bytes,
    HashedFile,
    known_sha256,
    nonfinite,
    recorded_sha256,
    small_files,
)
from mlx_cerebrum import cli
from mlx_cerebrum.errors import CheckpointError, cut
from mlx_cerebrum.model.memory import human
from mlx_cerebrum.progress import progress as live_line
from mlx_cerebrum.text import one_line, say
from mlx_cerebrum.weights import hub
from mlx_cerebrum.weights.checkpoint import FLOATS
from mlx_cerebrum.weights.gguf_file import BLOCK_BYTES
from mlx_cerebrum.weights.gguf_paths import gguf_at
from mlx_cerebrum.weights.safetensors_checkpoint import no_checkpoint

UNSOUND = 1  # the exit code where problems were found
_SHOWN = 8  # tensors that a printed line names; --json has them all
_SOURCES = {
    "provenance": "config.json's provenance has {} (damaged, or rewritten by another tool since)",
    "hub": "the hub gave {} (damaged: download it again)",
}
_INTEGERS = re.compile(r"[IU]\d+|BOOL")
# The bytes of a GGUF block that are float16 scales, from and to. The rest of it is integers.
_SCALES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS", "IQ1_S"), (0, 2)),
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0, 2)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 4)),
    **{"Q2_K": (80, 84), "Q3_K": (108, 110), "Q6_K": (208, 210)},
    **{"TQ1_0": (52, 54), "TQ2_0": (64, 66)},
}


def verify(path: Path, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Check the checkpoint at `path`; `progress(done, total)` counts bytes.

    Returns `sound`, `problems` (each with `file`, `problem`, `tensors`), the lines of `checked`,
    `unchecked` and `notes`, the number of `tensors`, and `files`: for each its bytes, its SHA-256
    and what that was compared with. Raises CheckpointError where there is nothing to check.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if (gguf := gguf_at(path)) is not None:
        found = examine.gguf_file(gguf)
    elif path.is_dir():
        found = examine.directory(path)
    else:
        raise CheckpointError(no_checkpoint(path))
    files = _read_all(found, progress)
    if gguf is None:
        _small_files(found)
    compared = [file for file, entry in files.items() if entry["compared_with"]]
    if len(compared) < len(files):
        rest = [file for file in files if file not in compared]
        found.unchecked.append(f"hashes of {_some(rest)}: none recorded")
    if compared:
        found.checked.append(f"SHA-256 of {_some(compared)}")
    return {
        "path": str(path),
        "sound": not found.problems,
        "problems": found.problems,
        "checked": found.checked,
        "unchecked": found.unchecked,
        "notes": found.notes,
        "tensors": sum(len(spans or ()) for spans in found.spans.values()),
        "bytes": sum(entry["bytes"] for entry in files.values()),
        "files": files,
    }


def _read_all(
    found: Findings, progress: Callable[[int, int], None] | None
) -> dict[str, dict[str, Any]]:
    """Read every weight file once: hash it, compare, look at its values."""
    for file in recorded_sha256(found.config):
        if not (found.path / file).exists():
            found.notes.append(f"{file} is missing, but config.json's provenance lists it")
    sizes = {file: _size(found.path / file) for file in found.spans}
    files: dict[str, dict[str, Any]] = {}
    odd: set[str] = set()
    with ThreadPoolExecutor(1) as executor:
        for file, spans in found.spans.items():
            before, actual = sum(entry["bytes"] for entry in files.values()), None
            wanted = known_sha256(found.path / file, found.config)
            with (
                found.catch(file),
                HashedFile(found.path / file, executor=executor) as reader,
            ):
                for done in _look_at(found, reader, file, spans or {}):
                    if progress is not None:
                        progress(before + done, sum(sizes.values()))
                actual = reader.finish()
            for source, sha256 in wanted.items():
                if actual not in (None, sha256):
                    text = _SOURCES[source].format(sha256)
                    found.problem(f"its SHA-256 is {actual}; {text}", file)
            odd |= {span.dtype for span in (spans or {}).values()} - {*FLOATS, *_SCALES}
            files[file] = {"bytes": sizes[file], "sha256": actual, "compared_with": list(wanted)}
    found.checked.append("finite values")
    if odd := {kind for kind in odd if not _INTEGERS.fullmatch(kind)}:
        found.unchecked.append(f"finite values of the types {', '.join(sorted(odd))}")
    return files


def _look_at(
    found: Findings, reader: HashedFile, file: str, spans: dict[str, Span]
) -> Iterator[int]:
    """Read a file's tensors in pieces and note what is not finite; yields the bytes done."""
    bad: list[str] = []
    empty: list[str] = []
    for name, span in sorted(spans.items(), key=lambda item: item[1].offset):
        count, zero = 0, True
        width = BLOCK_BYTES.get(span.dtype, 8)
        step = PIECE // width * width
        for at in range(span.offset, span.offset + span.nbytes, step):
            data = reader.read(at, min(step, span.offset + span.nbytes - at))
            count += _nonfinite(data, span.dtype)
            zero = zero and not data.any()
            yield at + data.size
        if count:
            bad.append(f"{name} ({count})")
        if zero and span.nbytes > 1000:  # a hole that an interrupted download left, perhaps
            empty.append(name)
    if bad:
        found.problem("values that are NaN or infinite", file, bad)
    if empty:
        found.notes.append(f"{file}: all zero: {_some(empty)}")


def _nonfinite(data: Bytes, kind: str) -> int:
    """Values of a piece that are NaN or infinite: floats, or the scales of GGUF blocks."""
    if kind not in _SCALES:
        return nonfinite(data, kind)
    scales = data.reshape(-1, BLOCK_BYTES[kind])[:, slice(*_SCALES[kind])]
    return nonfinite(np.ascontiguousarray(scales).reshape(-1), "F16")


def _small_files(found: Findings) -> None:
    """Config and tokenizer files against the hub's cache."""
    with found.catch():
        compared, wrong = small_files(found.path)
        for name, actual, wanted in wrong:
            found.problem(f"its hash is {actual}; {_SOURCES['hub'].format(wanted)}", name)
        if compared:
            found.checked.append(f"the hub's hashes of {_some(compared)}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0  # a link whose blob is gone


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def lines(result: dict[str, Any]) -> Iterator[str]:
    """`verify`'s result for a person, problems first."""
    for problem in result["problems"]:
        where = f"{problem['file']}: " if problem["file"] else ""
        names = f": {_some(problem['tensors'])}" if problem["tensors"] else ""
        yield f"problem      {where}{problem['problem']}{names}"
    for label, key in (("checked", "checked"), ("not checked", "unchecked"), ("note", "notes")):
        yield from (f"{label:<12} {text}" for text in result[key])


def parser() -> cli.ArgumentParser:
    p = cli.ArgumentParser(
        prog="python -m convert verify",
        description="Check a checkpoint: headers, index, shapes, tokenizer, hashes, finite values."
        " Exit code 0: sound; 1: problems were found; 2: it can't be examined.",
    )
    p.add_argument("path", metavar="NAME|DIR|FILE.gguf|HUBID", help="what to check; never changed")
    p.add_argument("--quiet", action="store_true", help="print only the problems")
    p.add_argument("--json", action="store_true", help="print one JSON object with everything")
    p.add_debug()
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)

    def run() -> int:
        path, started = hub.resolve(args.path), time.perf_counter()
        with live_line("verifying", not (args.quiet or args.json)) as report:
            result = verify(path, report)
        if args.json:
            say(json.dumps(result))
        else:
            for line in lines(result):
                if not args.quiet or line.startswith("problem"):
                    say(one_line(cut(line)))
        if not (args.json or args.quiet):
            count = len(result["problems"])
            verdict = f"{count} problem{'s' * (count > 1)}" if count else "sound"
            say(
                f"{one_line(result['path'])}: {verdict}; {len(result['files'])} files,"
                f" {result['tensors']} tensors, {human(result['bytes'])},"
                f" {time.perf_counter() - started:.1f} s"
            )
        return UNSOUND if result["problems"] else 0

    return cli.run(run, args.debug)
