"""The conversion itself: decide what is written, stream it to disk, describe it, rename it."""

import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from convert import fold
from convert.arriving import Arrivals, ArrivingSource
from convert.calibrated import Calibrator, Packed
from convert.card import card, source_card
from convert.copying import Copies, is_copy
from convert.destination import SCRATCH, fingerprint, new_directory, write_json
from convert.distilled import Distiller
from convert.engine import Checks, in_order, run
from convert.layout import SHIM, Layout, Options, Output, lay_out
from convert.source import Source
from convert.writer import Progress, Writer
from mlx_cerebrum import __version__
from mlx_cerebrum.errors import ConfigError
from mlx_cerebrum.model.config import read_json
from mlx_cerebrum.model.memory import Workload, human
from mlx_cerebrum.model.tensors import BLOCK, module_path
from mlx_cerebrum.weights.checkpoint import Checkpoint
from mlx_cerebrum.weights.opening import load_tokenizer, open_checkpoint
from mlx_cerebrum.weights.safetensors_checkpoint import INDEX

# Told what will read a text, and whether it goes on where a run was stopped.
Calibrating = Callable[[Calibrator, bool], None]


class _RefoldError(Exception):
    """Layers that looked alike are not; what the hashes of all of them say."""

    def __init__(self, found: fold.Folding) -> None:
        self.found = found


def convert(
    checkpoint: Checkpoint,
    destination: Path,
    options: Options | None = None,
    *,
    source: str = "",
    revision: str | None = None,
    progress: Progress | None = None,
    arrivals: Arrivals | None = None,
    calibrating: Calibrating | None = None,
) -> dict[str, Any]:
    """Write `checkpoint`, as `options` say, into the new directory `destination`.

    It is written under a hidden name and renamed: it is there whole or not at all. A run that
    was killed, or stopped by a full disk, is resumed by the next one that asks for the same.
    Returns what was written (`_summary`). Raises a CerebrumError for anything that can't be
    honoured, before writing where it can be known.

    source, revision: what provenance calls the source.
    arrivals: brings the checkpoint's files while they are read. They are not looked through for
        blocks that are stored several times.
    calibrating: told, once nothing is refused any more, who will read a text.
    """
    options = options or Options()
    started = time.perf_counter()
    _refuse(checkpoint, destination, options)
    load_tokenizer(checkpoint)  # a broken one is refused before anything is written
    # Copies are stored once, or packed alike: both layouts then give the same answers.
    compares = (options.is_folded or options.packing is not None) and arrivals is None
    found = fold.predict(checkpoint) if compares else fold.none(checkpoint.config)
    named = {"source": source, "revision": revision}
    while True:
        layout = lay_out(checkpoint, options, found)
        try:
            summary = _attempt(
                checkpoint,
                destination,
                options,
                layout,
                found,
                named,
                progress,
                arrivals,
                calibrating,
            )
        except _RefoldError as refold:  # once at most: by then the hashes of all suspects are known
            found = refold.found
        else:
            return summary | {"seconds": time.perf_counter() - started}


def _refuse(checkpoint: Checkpoint, destination: Path, options: Options) -> None:
    """Raise for what does not go together."""
    if options.dequantize and checkpoint.config.quantization is None:
        raise ConfigError(f"{checkpoint.path} is dense already; drop --dequantize")
    changes = options.packing is not None or options.dtype is not None
    if checkpoint.config.quantization is not None and changes and not options.dequantize:
        raise ConfigError(
            f"{checkpoint.path} is quantized already: -q and --dtype need --dequantize"
        )
    if checkpoint.path.is_dir() and destination.absolute().resolve().is_relative_to(
        checkpoint.path.resolve()
    ):
        raise ConfigError(f"{destination} is inside the source; name a directory elsewhere")


def _attempt(
    checkpoint: Checkpoint,
    destination: Path,
    options: Options,
    layout: Layout,
    found: fold.Folding,
    named: dict[str, Any],
    progress: Progress | None,
    arrivals: Arrivals | None,
    calibrating: Calibrating | None,
) -> dict[str, Any]:
    """Write it all; raises _RefoldError when layers taken for the same turn out not to be."""
    calibrator = None
    if options.calibration is not None:
        kind = Distiller if options.calibration.method == "dwq" else Calibrator
        calibrator = kind(checkpoint, layout, options.calibration)
    suspects = [module_path(i, kind) for i in found.suspects() for kind in BLOCK]

    def new_checks() -> Checks:
        again = arrivals is None
        return Checks(options.verify, again, options.allow_nonfinite, frozenset(suspects))

    def opened(hasher: ThreadPoolExecutor) -> Source:
        if arrivals is not None:
            return ArrivingSource(checkpoint, arrivals, hasher)
        return Source(checkpoint, options.verify, hasher, options.dequantize)

    checks = new_checks()
    with ThreadPoolExecutor(1, "hash-source") as hasher, opened(hasher) as source:
        outputs = in_order(source, layout.outputs)
        ours = options.is_folded or any(output.packing for output in outputs)
        form = {"format": "mlx" if ours else "pt"}  # pt: as mergekit writes it
        said = () if calibrator is None else calibrator.identity
        identity = fingerprint(source, outputs, form, options.allow_nonfinite, *said)
        needed = layout.nbytes if calibrator is None else calibrator.disk_bytes
        with new_directory(destination, identity, needed) as partial:
            if arrivals is None and is_copy(source, outputs):
                copies = Copies(source, partial.path)
                read = copies.write(source, partial, checks, progress)
                hashes, weight_map, resumed = copies.hashes, copies.weight_map, copies.resumed
            else:
                with Writer(partial.path, outputs, form, partial.journal) as writer:
                    writer.resume(progress)
                    resumed = writer.done
                    if isinstance(source, ArrivingSource):
                        source.expect([output.source for output in outputs[resumed:]])
                    packed = Packed(partial.path / SCRATCH)
                    if calibrator is not None and resumed < len(outputs):
                        begun = packed.folder.exists()
                        if options.verify and not begun:  # a fault is found now, not hours later
                            with opened(hasher) as first:
                                _examine(first, outputs, new_checks(), found, progress)
                        if calibrating is not None:
                            calibrating(calibrator, begun)
                        calibrator.run(packed.folder, progress)
                    run(source, outputs, writer, checks, progress, packed)
                    read = source.finish()
                    hashes, weight_map = writer.hashes, writer.weight_map
            exact = _confirmed(found, checks)
            notes = (fold.notes(exact) if options.is_folded else []) + layout.notes
            notes += [
                f"{name} has {count} values that are NaN or infinite"
                for name, count in checks.nonfinite.items()
            ]
            provenance = {
                "tool": f"mlx-cerebrum {__version__}",
                **named,
                "layout": options.layout,
                "plan": layout.plan_text,
                "calibration": None if calibrator is None else calibrator.provenance,
                "plan_recovered": options.is_folded and options.plan is None and found.repeats,
                "source_card": source_card(checkpoint.path),
                "window_override": options.window,
                "sha256": hashes,
                "verified": options.verify,
                "source_sha256": read,
                "notes": notes,
                "from": checkpoint.raw_config.get("provenance"),
            }
            describe(checkpoint, partial.path, destination.name, layout, provenance, weight_map)
            if options.shim:
                _write_shim(partial.path)
            load_tokenizer(open_checkpoint(partial.path))  # what was written reads back
    if partial.replaced:
        done = human(partial.replaced)
        notes = [*notes, f"{done} of a stopped conversion, of something else, were given up"]
    return _summary(layout, options, hashes, notes, resumed)


def _confirmed(found: fold.Folding, checks: Checks) -> fold.Folding:
    """The folding that the hashes of all layers give. Raises _RefoldError where it is another."""
    exact = fold.group(len(found.block_of), checks.digests, found)
    if exact.block_of != found.block_of:
        raise _RefoldError(exact)
    return exact


def _examine(
    source: Source,
    outputs: Sequence[Output],
    checks: Checks,
    found: fold.Folding,
    progress: Progress | None,
) -> None:
    """Read all of `source` for what the pass that writes would refuse."""

    def checking(done: int, total: int, item: str = "") -> None:
        if progress is not None:
            progress(done, total, "(checking the source)")

    run(source, outputs, None, checks, checking)
    source.finish()
    _confirmed(found, checks)


def describe(
    checkpoint: Checkpoint,
    directory: Path,
    name: str,
    layout: Layout,
    provenance: dict[str, Any],
    weight_map: dict[str, str],
) -> None:
    """Write all of an output but its weights: index, tokenizer, card, config.json.

    weight_map: tensor name -> file name.
    """
    raw = layout.raw | {"provenance": provenance}
    index = {
        "metadata": {"total_size": layout.nbytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_json(directory / INDEX, index)
    checkpoint.tokenizer().save(directory)
    (directory / "README.md").write_text(card(raw, name, layout.nbytes), encoding="utf-8")
    write_json(directory / "config.json", raw)


def _write_shim(directory: Path) -> None:
    """Add the code that lets stock mlx-lm run the directory, whose tokenizer is there already."""
    shutil.copyfile(Path(__file__).with_name(SHIM), directory / SHIM)
    # mlx-lm's tokenizer is transformers', which does not know this model type and so would
    # rebuild the tokenizer by its class's rules. This class takes tokenizer.json as it is.
    file = directory / "tokenizer_config.json"
    write_json(file, read_json(file) | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _summary(
    layout: Layout, options: Options, hashes: dict[str, str], notes: list[str], resumed: int
) -> dict[str, Any]:
    """Sizes in bytes; `bits_per_weight` counts all bytes over all weights, as mlx-lm does, and
    `bits` has every quantized matrix; the cache is that of a full window, in 16 bits."""
    config = layout.config
    weights = config.stored_parameters if options.is_folded else config.executed_parameters
    tokens = min(config.sliding_window or 4096, config.max_position_embeddings)
    return {
        "layout": options.layout,
        "positions": config.num_positions,
        "layers": layout.raw["num_hidden_layers"],
        "bytes": layout.nbytes,
        "parameters": weights,
        "bits_per_weight": 8 * layout.nbytes / weights,
        "bits": {o.name: o.packing.bits for o in layout.outputs if o.packing is not None},
        "cache_tokens": tokens,
        "cache_bytes": Workload(config, 2, tokens, 1, 512).cache_bytes,
        "sha256": hashes,
        "verified": options.verify,
        "resumed_modules": resumed,
        "notes": notes,
    }
