"""What quantizing costs: perplexity, KL and agreement of 8 and 4 bits against the loaded weights.

The reference is what the loaded model says of some windows of text, kept in files, so that one
set of weights is in memory at a time. A checkpoint that is packed already is its own reference:
its packed values, exactly. Every matrix is quantized in groups of 64, embedding and head too.
One whose weights are mostly in so few bits already, and in groups no smaller, comes through nearly
unchanged: what those bits cost was paid before, and nothing is measured.

Two runs of one model differ too where activations have 16 bits: products of other shapes add up in
another order. So the loaded weights are also compared with themselves, read in shorter chunks.

Where quantized matrix products are slow (the CPU backend) the packed weights are made dense again
after packing: the same numbers, in other hands.
"""

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from bench.likelihood import compare, figures, kept, log_probs
from bench.pair import Pair
from bench.suite import Effort
from mlx_cerebrum.errors import CerebrumError
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.memory import human, require
from mlx_cerebrum.model.tensors import matrix_shapes
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights.checkpoint import FLOATS, Checkpoint, Extent
from mlx_cerebrum.weights.opening import Opened
from mlx_cerebrum.weights.quantize import Packing
from mlx_cerebrum.weights.storage import DTYPES, SMALLER

BITS = (8, 4)
GROUP = 64
STEP = 32  # tokens of a chunk, for other shapes than the reference's


@dataclass(frozen=True)
class Reference:
    """One window of text, and the files of both sides' log-probabilities on it."""

    window: list[int]
    files: tuple[Path, Path]


class Repacked(Checkpoint):
    """Another checkpoint with its matrices packed anew as they are read."""

    def __init__(self, source: Checkpoint, packing: Packing) -> None:
        self._source, self._packing = source, packing
        self._shapes = matrix_shapes(source.config)
        self.path = source.path
        self.config = replace(source.config, quantization=packing.as_config())
        self.raw_config = source.raw_config
        self.shapes, self.dtypes, self.spare = source.shapes, source.dtypes, source.spare

    def packing(self, module: str) -> Packing | None:
        """None for what is no matrix, and for one that doesn't divide into groups."""
        columns = self._shapes.get(module, (0, 1))[1]
        return self._packing if self._packing.fits(columns) else None

    def read(self, module: str) -> dict[str, mx.array]:
        arrays = self._source.read(module)
        own, packing = self._source.packing(module), self.packing(module)
        if own is not None:
            dense = own.dequantize(arrays, mx.float32)
            arrays = {"weight": dense.astype(DTYPES[FLOATS[self._source.weight_dtype]])}
        return arrays if packing is None else packing.quantize(arrays["weight"])

    def extents(self, module: str) -> dict[str, Extent]:
        return self._source.extents(module)

    def tokenizer(self) -> Tokenizer:
        return self._source.tokenizer()


def quota(pair: Pair, settings: Effort, texts: int, context: int) -> tuple[int, str]:
    """Windows of each text to keep as references, and if none, why.

    About a quarter of the text: twice as many sets of weights are compared on it.
    """
    if pair.packing is not None:
        return 0, "the weights were packed while loading; leave out --q-bits to compare bits"
    whys = [settled(pair.checkpoint(), Packing(bits, GROUP)) for bits in BITS]
    if all(whys):
        return 0, whys[0]
    count = max(1, settings.text_tokens // 4 // context)
    tokens = count * texts * context
    needed = 2 * tokens * 4 * pair.checkpoint().config.vocab_size
    free = shutil.disk_usage(settings.work).free
    if needed > 0.8 * free:
        return 0, (
            f"log-probabilities of {tokens} tokens take {human(needed)} of disk and {human(free)}"
            " are free; name another folder with --work, or fewer --text-tokens"
        )
    return count, ""


def settled(source: Checkpoint, asked: Packing) -> str:
    """Why packing `source` as `asked` would say nothing of those bits; empty where it would.

    Most of its weights are packed at most as finely: in as many bits or fewer, groups as large or
    larger. Affine packing then finds nearly the same levels again.
    """
    held: Counter[int] = Counter()
    shapes = matrix_shapes(source.config)
    for module, (rows, columns) in shapes.items():
        own = source.packing(module)
        if own is None or own.mode != asked.mode:
            continue
        if own.bits <= asked.bits and own.group_size >= asked.group_size:
            held[own.bits] += rows * columns
    if 2 * held.total() <= sum(rows * columns for rows, columns in shapes.values()):
        return ""
    return f"the source is {held.most_common(1)[0][0]}-bit already; give the dense model"


def files(folder: Path, number: int) -> tuple[Path, Path]:
    """Where both sides' log-probabilities of one window go."""
    return folder / f"logprobs-{number}-a.f32", folder / f"logprobs-{number}-b.f32"


def measure(pair: Pair, references: Sequence[Reference], settings: Effort) -> dict[str, Any]:
    """A row for each side and number of bits. The pair's own weights must be released.

    A form that doesn't fit in memory, and one the source has already, gets a row that says so.
    """
    tokens = sum(len(one.window) - 1 for one in references)
    rows: list[dict[str, Any]] = []
    for bits in BITS:
        packing = Packing(bits, GROUP)
        if why := settled(pair.checkpoint(), packing):
            rows.append({"bits": bits, "not_measured": why})
            continue
        settings.say(f"quality: {bits}-bit weights on {len(references)} windows")
        try:
            models = load(pair, packing)
            for side, model in enumerate(models):
                rows.append({"bits": bits, "side": "ab"[side]} | against(model, references, side))
        except CerebrumError as error:
            rows.append({"bits": bits, "not_measured": str(error)})
        models = ()
        mx.clear_cache()
    for path in (path for one in references for path in one.files):
        path.unlink()
    return {"group": GROUP, "tokens": tokens, "rows": rows}


def noise(
    models: Sequence[Model], references: Sequence[Reference], settings: Effort
) -> list[dict[str, Any]]:
    """A row for each side against itself, read in chunks of STEP: what rounding alone does.

    None in float32, where that is nothing to speak of, and would cost another pass.
    """
    if not references or models[0].dtype.size > 2:
        return []
    settings.say(f"quality: the loaded weights again, {STEP} tokens at a time")
    return [
        {"side": "ab"[side], "step": STEP} | against(model, references, side, STEP)
        for side, model in enumerate(models)
    ]


def load(pair: Pair, packing: Packing) -> tuple[Model, ...]:
    """Both sides over weights packed so. Raises MemoryBudgetError where they don't fit."""
    checkpoint = Repacked(pair.checkpoint(), packing)
    opened = Opened.of(checkpoint, pair.opened.spec)
    storage = opened.storage
    require(storage.nbytes + storage.transient, f"loading {packing}", SMALLER)
    return Pair(opened, pair.a, pair.b).models()


def against(
    model: Model, references: Sequence[Reference], side: int, step: int | None = None
) -> dict[str, Any]:
    """The model, read in chunks of `step`, compared with what the same side said as loaded."""
    found = [
        compare(
            kept(one.files[side], model.config.vocab_size, step),
            log_probs(model, one.window[:-1], step),
            one.window,
        )
        for one in references
    ]
    return figures(found)
