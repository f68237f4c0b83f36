"""The pass over the weights: read, checked, transformed and written at the same time.

The calling thread reads and writes; one thread hashes what comes, one what goes; a few
transform. Only a handful of pieces of about 4 MB exist at any moment, so the peak of memory
does not depend on the model. Bytes reach the disk in one order, whatever finishes first.
"""

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import local

import mlx.core as mx

from convert.integrity import nonfinite
from convert.layout import Output, Spec
from convert.source import Rows, Source
from convert.writer import Progress, Writer
from mlx_cerebrum import device
from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.weights.checkpoint import FLOATS

_AHEAD = 6  # pieces read while as many as there are workers are being transformed

Parts = dict[str, Rows]
# By source module: packed arrays, where there are some already.
Ready = Callable[[str], Parts | None]
# A transformed piece: for each wanted scale its parts; how many values were not finite, by tensor.
_Done = tuple[dict[float | None, Parts], dict[str, int]]


@dataclass
class Checks:
    """What is looked at on the way, and what was seen."""

    finite: bool = True  # look for NaN and infinities in what is read
    again: bool = True  # also in what an earlier run has looked at and written
    allow_nonfinite: bool = False
    digests_of: frozenset[str] = frozenset()  # modules to hash by themselves
    nonfinite: Counter[str] = field(default_factory=Counter)  # tensor -> how many values
    digests: dict[str, bytes] = field(default_factory=dict)


class _Module:
    """The outputs of one source module that are still to be written, fed piece by piece."""

    def __init__(self, outputs: list[Output], ready: Parts | None) -> None:
        self.outputs = outputs
        self.ready = ready
        self.scales = list(dict.fromkeys(output.scale for output in outputs))
        self._kept: dict[float | None, list[Parts]] = {scale: [] for scale in self.scales}

    def take(self, by_scale: dict[float | None, Parts], writer: Writer) -> None:
        """The first output's weight goes straight to disk; the rest waits for its turn."""
        first = self.outputs[0].scale
        later = {output.scale for output in self.outputs[1:]}
        for scale, parts in by_scale.items():
            if scale == first:
                writer.put(parts["weight"].data)
            if scale not in later:
                parts = {part: rows for part, rows in parts.items() if part != "weight"}
            self._kept[scale].append(parts)

    def finish(self, writer: Writer) -> None:
        for number, output in enumerate(self.outputs):
            for spec in output.specs:
                part = spec.name.rpartition(".")[2]
                if number or part != "weight":
                    for piece in self._kept[output.scale]:
                        writer.put(piece[part].data)
            writer.finish_module()


def run(
    source: Source,
    outputs: Sequence[Output],
    writer: Writer | None,
    checks: Checks,
    progress: Progress | None = None,
    ready: Ready = lambda module: None,
) -> None:
    """Read all of `source`, check it, and write `outputs` (which are in the source's order).
    Without a writer nothing is made of it.

    ready: what is written of a module instead of what its transform would make.

    Outputs that the writer has already are not made again. Raises CheckpointError for values
    that are not finite, or that a cast or scale makes infinite, unless allowed.
    """
    limits = {output.source: output.specs[0].shape[0] for output in outputs}
    due: dict[str, list[Output]] = {}
    for output in () if writer is None else outputs[writer.done :]:
        due.setdefault(output.source, []).append(output)
    read = 0
    waiting: deque[Callable[[], None]] = deque()
    with _workers() as (pool, workers), ThreadPoolExecutor(1, "digest") as digester:
        try:
            for name in source.modules:
                module = _Module(due[name], ready(name)) if name in due else None
                digest = source.new_digest(name) if name in checks.digests_of else None
                if module is None and not (checks.finite and checks.again) and digest is None:
                    continue
                if not source.has(name):  # it may be waited for until all before it is written
                    while waiting:
                        waiting.popleft()()
                row = 0
                for piece in source.pieces(name, limits.get(name)):
                    while len(waiting) > workers + _AHEAD:
                        waiting.popleft()()
                    if digest is not None:
                        for rows in piece.values():
                            digester.submit(digest.update, rows.data.data)
                    future = pool.submit(_transform, name, piece, row, module, checks)
                    waiting.append(partial(_take, future, module, writer, checks))
                    read += sum(rows.data.nbytes for rows in piece.values())
                    row += piece["weight"].shape[0]
                    del piece
                    if progress is not None:
                        done = min(read, source.nbytes)
                        progress(done, source.nbytes, name.removeprefix("model."))
                if module is not None and writer is not None:
                    waiting.append(partial(module.finish, writer))
                    waiting.append(partial(source.leave, name, writer.sync))
                if digest is not None:
                    checks.digests[name] = digester.submit(digest.digest).result()
            while waiting:
                waiting.popleft()()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def in_order(source: Source, outputs: Sequence[Output]) -> list[Output]:
    """`outputs` sorted as their sources lie on disk, so that each is read once."""
    rank = {name: i for i, name in enumerate(source.modules)}
    return sorted(outputs, key=lambda output: rank[output.source])


def _take(
    future: Future[_Done], module: _Module | None, writer: Writer | None, checks: Checks
) -> None:
    """Wait for a transformed piece, and have it written."""
    by_scale, found = future.result()
    checks.nonfinite.update(found)
    if module is not None and writer is not None:
        module.take(by_scale, writer)


def _transform(name: str, piece: Parts, row: int, module: _Module | None, checks: Checks) -> _Done:
    """On a worker: look at the values of a piece, which begins at `row`, and make what each scale
    wants of them."""
    found: dict[str, int] = {}
    if checks.finite:
        for part, rows in piece.items():
            if count := nonfinite(rows.data, rows.dtype):
                found[f"{name}.{part}"] = count
        if found and not checks.allow_nonfinite:
            raise _not_finite(*next(iter(found.items())))
    made: dict[float | None, Parts] = {}
    for output in [] if module is None else module.outputs:
        if output.scale not in made:
            made[output.scale] = _made(output, piece, row, module.ready if module else None)
            if not found and made[output.scale] is not piece:
                found |= _overflowed(name, output, piece, made[output.scale], checks)
    return made, found


def _made(output: Output, piece: Parts, row: int, ready: Parts | None) -> Parts:
    if ready is not None:
        stop = row + piece["weight"].shape[0]
        made = {part: rows.slice(row, stop) for part, rows in ready.items()}
    elif output.transform.keeps((rows.dtype for rows in piece.values()), output.scale):
        made = piece
    else:
        # MLX's default device is all threads': it is never changed here, not even for a moment.
        arrays = {part: rows.array(_local.cpu) for part, rows in piece.items()}
        arrays = output.transform.dense(arrays, output.scale, _local.cpu)
        mx.eval(arrays)
        arrays = output.transform.packed(arrays, _local.default)
        mx.eval(arrays)
        made = {part: Rows.of(array, _local.cpu) for part, array in arrays.items()}
    for spec in output.specs:
        _check(spec, made)
    return made


def _overflowed(
    name: str, output: Output, piece: Parts, made: Parts, checks: Checks
) -> dict[str, int]:
    """What a cast or a scale made infinite, by tensor; refused unless that is allowed."""
    found: dict[str, int] = {}
    for part, rows in made.items():
        if count := nonfinite(rows.data, rows.dtype):
            found[f"{output.name}.{part}"] = count
            if checks.allow_nonfinite:
                continue
            for stored_part, stored in piece.items():  # not looked at, without `finite`
                if before := nonfinite(stored.data, stored.dtype):
                    raise _not_finite(f"{name}.{stored_part}", before)
            scaled = "" if output.scale is None else f" once scaled by {output.scale:g}"
            raise CheckpointError(
                f"{output.name}.{part} has values too large for {FLOATS[rows.dtype]}{scaled};"
                " convert with another --dtype, or with --allow-nonfinite"
            )
    return found


def _not_finite(tensor: str, count: int) -> CheckpointError:
    return CheckpointError(
        f"{tensor} has {count} values that are NaN or infinite; the source is damaged, or"
        " convert with --allow-nonfinite"
    )


def _check(spec: Spec, made: Parts) -> None:
    """What the header promised must be what was computed."""
    rows = made[spec.name.rpartition(".")[2]]
    if (rows.dtype, rows.shape[1:]) != (spec.dtype, spec.shape[1:]):
        raise CheckpointError(
            f"{spec.name} came out as {rows.dtype} {list(rows.shape)}, not {spec.dtype} rows of"
            f" {list(spec.shape)}"
        )


_local = local()


@contextmanager
def _workers() -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """Threads that compute, each with its own stream: on the CPU one more than it has cores, for
    some are always waiting or copying (measured); a GPU is kept busy by one."""
    count = 1 if device.on_gpu() else min(4, os.cpu_count() or 1) + 1

    def start() -> None:
        _local.cpu = mx.new_stream(mx.cpu)
        _local.default = mx.new_stream(mx.gpu) if device.on_gpu() else _local.cpu

    with ThreadPoolExecutor(count, "transform", initializer=start) as pool:
        yield pool, count
