"""Matrices packed by what a text puts through them: GPTQ through the layer map, a block at a time.

At each position the block that runs there is read, all passages go through it, and what goes into
its matrices is added up. A block that runs at several positions is packed once, after the last of
them, by the sum over all: its two runs get different inputs, and its error is made in both.

What was found lies in a folder of the directory that is being written. A run that was stopped
goes on at the position it was at, and packs the same bytes as one that was not:

    hidden.safetensors          what has come out of the last position that is done, and its number
    sums-LAYER-N.safetensors    the sums of a layer that will run again, once N positions are done
    packed-LAYER.safetensors    a layer's packed matrices

convert/distilled.py goes on from there.
"""

import hashlib
from collections.abc import Mapping
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from convert import gptq
from convert.engine import Parts
from convert.layout import Layout, Output
from convert.passages import LENGTH, Calibration, is_chat, passages
from convert.source import Rows
from convert.walk import LISTENED, block_of, weight
from convert.writer import Progress
from mlx_cerebrum import device
from mlx_cerebrum.errors import ConfigError, RequestError
from mlx_cerebrum.files.replacing import replacing
from mlx_cerebrum.model.cache import attention_mask
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.memory import forward_bytes, require
from mlx_cerebrum.model.tensors import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    MATRICES,
    PARTS,
    matrix_shapes,
    module_path,
    place,
)
from mlx_cerebrum.weights.checkpoint import FLOATS, Checkpoint
from mlx_cerebrum.weights.opening import load_tokenizer
from mlx_cerebrum.weights.quantize import Packing
from mlx_cerebrum.weights.storage import DTYPES

BATCH = 4  # passages at once
DISTILLED = "distilled.safetensors"
_HIDDEN, _HEAD = "hidden.safetensors", "packed-head.safetensors"
# Matrices with the same inputs, by the one that is listened to.
_GROUPS = (MATRICES[:3], MATRICES[3:4], MATRICES[4:6], MATRICES[6:])
_ALIKE = dict(zip(LISTENED, _GROUPS, strict=True))
Sums = dict[str, mx.array]


class Calibrator:
    """One model, laid out, and the passages it reads.

    Raises, before anything is computed, RequestError for a text that is too short or has tokens
    that the model has not, ConfigError for a layout whose copies of a layer differ,
    MemoryBudgetError for a machine that is too small.
    """

    def __init__(self, checkpoint: Checkpoint, layout: Layout, calibration: Calibration) -> None:
        self.checkpoint, self.layout, self.calibration = checkpoint, layout, calibration
        self.outputs: Mapping[str, Output] = {output.source: output for output in layout.outputs}
        if any(output.scale is not None for output in layout.outputs):
            raise ConfigError(
                f"{calibration.method} packs a block once, and this plan scales its copies:"
                " convert with --layout folded"
            )
        matrix = self.outputs[module_path(layout.order[0], MATRICES[0])]  # norms may be wider
        written = DTYPES[FLOATS[matrix.transform.final(checkpoint.weight_dtype)]]
        self.dtype = written if device.on_gpu() else mx.float32
        tokenizer = load_tokenizer(checkpoint)
        self.tokens = passages(tokenizer, calibration.text, calibration.tokens)
        self.chat = is_chat(tokenizer)
        rows, highest = checkpoint.config.vocab_size, cast(int, mx.max(self.tokens).item())
        if highest >= rows:
            raise RequestError(
                f"the calibration text has token id {highest}, and the model {rows} tokens:"
                " leave the token out of the text, or the template"
            )
        self._require_memory()

    @property
    def identity(self) -> tuple[object, ...]:
        """What must be the same for a stopped run to go on: what is read, and through what."""
        return (
            self.provenance,
            self.dtype,
            self.layout.order,
            self.layout.config,
            self.tokens.tolist(),
        )

    @property
    def provenance(self) -> dict[str, Any]:
        """What one has to know to repeat it."""
        return {
            "method": self.calibration.method,
            "text_sha256": hashlib.sha256(self.calibration.text.encode()).hexdigest(),
            "tokens": self.tokens.size,
            "tokens_a_passage": LENGTH,
            "as_chat": self.chat,
            "positions": len(self.layout.order),
        }

    @property
    def inputs(self) -> int:
        """Of the widest matrix. By fewer tokens it is fitted to what they are, and to no other."""
        return max(_columns(self.layout.config))

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory held at most."""
        return self._needed(self.tokens.size)

    def _require_memory(self) -> None:
        require(
            self.memory_bytes,
            f"--q-recipe {self.calibration.method}",
            "--q-recipe plan needs next to none",
            self._settings(),
        )

    def _settings(self) -> list[tuple[str, int]]:
        """Flags that need less, and the bytes of memory they need."""
        fewer = (self.tokens.size // 2**i for i in range(1, 8))
        least = max(LENGTH, self.inputs)
        return [(f"--calibrate-tokens {n}", self._needed(n)) for n in fewer if n >= least]

    def _needed(self, tokens: int) -> int:
        return calibration_bytes(self.layout.config, tokens, self.dtype.size)

    @property
    def disk_bytes(self) -> int:
        """Bytes of disk that the folder and the output take at most, together."""
        order, config = self.layout.order, self.layout.config
        last = {layer: position for position, layer in enumerate(order)}
        live = (len({x for x in order[:n] if last[x] >= n}) for n in range(1, len(order) + 1))
        hidden = self.tokens.size * config.hidden_size * self.dtype.size  # twice while replaced
        packed = sum(o.nbytes for o in self.outputs.values() if o.packing is not None)
        return hidden + packed + max(hidden + (max(live) + 1) * _sums_bytes(config), *self._later)

    @property
    def _later(self) -> tuple[int, ...]:
        """Bytes of disk beside hidden states and packed matrices, in each of what follows."""
        return (self.layout.nbytes,)

    def run(self, folder: Path, progress: Progress | None = None) -> None:
        """Fill `folder` with packed matrices, going on from what is there."""
        folder.mkdir(exist_ok=True)
        order = self.layout.order
        hidden, done = self.hidden(folder)
        if not done:
            self._look_through(progress)
        head = self.outputs.get(HEAD)
        for position in range(done, len(order)):
            layer, sums = order[position], _sums_of(folder, order[position], position)
            self._position(position, hidden, sums, progress)
            kept = folder / f"sums-{layer}-{position + 1}.safetensors"
            again = layer in order[position + 1 :]
            if again:
                save(kept, sums)
            else:
                kinds = {kind: [module_path(layer, k) for k in _ALIKE[kind]] for kind in LISTENED}
                self._pack(folder / f"packed-{layer}.safetensors", kinds, sums)
            _save_hidden(folder, hidden, position + 1)
            for path in folder.glob(f"sums-{layer}-*.safetensors"):
                if path != kept or not again:
                    path.unlink()
            mx.clear_cache()
        if head is not None and head.packing is not None and not (folder / _HEAD).exists():
            norm, total = self.final_norm(), Sums()
            for h in hidden:
                _add(total, HEAD, norm(h).reshape(-1, h.shape[-1]))
            self._pack(folder / _HEAD, {HEAD: [HEAD]}, total)

    def _look_through(self, progress: Progress | None) -> None:
        """Read all weights: one that can't be used is found now, not hours later."""
        done, total = 0, sum(output.nbytes for output in self.outputs.values())
        for output in self.outputs.values():
            weight(self.checkpoint, output)
            mx.clear_cache()
            done += output.nbytes
            if progress is not None:
                progress(done, total, "(checking the weights)")

    def final_norm(self) -> nn.RMSNorm:
        norm = nn.RMSNorm(self.layout.config.hidden_size)
        norm.eps = self.layout.config.rms_norm_eps  # given above, MLX refuses a zero
        norm.weight = weight(self.checkpoint, self.outputs[FINAL_NORM]).astype(self.dtype)
        return norm

    def _position(
        self, position: int, hidden: list[mx.array], sums: Sums, progress: Progress | None
    ) -> None:
        """All passages through one position: `hidden` becomes what comes out of it, and `sums`
        has what went into its matrices added."""
        layout, config = self.layout, self.layout.config
        scales = None if config.residual_scales is None else config.residual_scales[position]
        mask = attention_mask(LENGTH, 0, config.sliding_window)
        heard = partial(_add, sums)
        block = block_of(
            self.checkpoint, self.outputs, layout.order[position], config, self.dtype, heard
        )
        size = config.block_parameters * self.dtype.size
        total = size * len(layout.order)
        for i, h in enumerate(hidden):
            if progress is not None:
                done = size * position + size * i // len(hidden)
                progress(done, total, f"calibrating: position {position + 1}")
            hidden[i] = block(h, mask, None, scales)
            mx.eval(hidden[i], sums)

    def _pack(self, path: Path, alike: Mapping[str, list[str]], sums: Sums) -> None:
        """Pack a layer's matrices, or the head: `alike` by the name of their sums."""
        found: dict[str, mx.array] = {}
        for name, modules in alike.items():
            together: dict[tuple[Packing, *tuple[str, ...]], list[str]] = {}
            for module in modules:
                output = self.outputs[module]
                if (packing := output.packing) is not None:  # of one dtype: no other's scales
                    dtypes = (spec.dtype for spec in output.specs)
                    together.setdefault((packing, *dtypes), []).append(module)
            hessian = sums.pop(name)
            if not together:
                continue
            inputs = gptq.inputs_of(hessian)
            del hessian
            for (packing, *_), same in together.items():
                parts = [weight(self.checkpoint, self.outputs[module]) for module in same]
                ends = list(accumulate(len(part) for part in parts))
                arrays = gptq.pack(mx.concatenate(parts), inputs, packing)
                for part, array in arrays.items():
                    rows = mx.split(array, ends[:-1])
                    found |= {f"{m}.{part}": own for m, own in zip(same, rows, strict=True)}
                mx.eval(found)
        save(path, found)

    def hidden(self, folder: Path) -> tuple[list[mx.array], int]:
        """Hidden states `[BATCH, LENGTH, D]`, and how many positions they have been through."""
        path = folder / _HIDDEN
        if path.exists():
            found: Any = mx.load(str(path), return_metadata=True)
            saved, metadata = found
            return [saved[str(i)] for i in range(len(saved))], int(metadata["positions"])
        table = weight(self.checkpoint, self.outputs[EMBEDDING]).astype(self.dtype)
        batches = [table[self.tokens[i : i + BATCH]] for i in range(0, len(self.tokens), BATCH)]
        mx.eval(batches)
        return batches, 0


class Packed:
    """The matrices that a folder has, for the pass that writes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, module: str) -> Parts | None:
        """The arrays of one matrix, by the source's module path; None where it has none: tables
        that are looked up in, and blocks that never run, are packed by rounding."""
        return {part: Rows.of(array) for part, array in self.arrays(module).items()} or None

    def arrays(self, module: str) -> dict[str, mx.array]:
        """The same, as MLX's."""
        inside, arrays = place(module), dict[str, mx.array]()
        for name in (_HEAD if inside is None else f"packed-{inside[0]}.safetensors", DISTILLED):
            if (self.folder / name).exists():
                found: Any = mx.load(str(self.folder / name))
                arrays |= found
        return {part: arrays[name] for part in PARTS if (name := f"{module}.{part}") in arrays}


def calibration_bytes(config: ModelConfig, tokens: int, item_bytes: int) -> int:
    """Bytes held at most: a block, hidden states, its sums, and on top of them a batch on its way
    through it or one matrix being packed."""
    inner, rows = config.intermediate_size, BATCH * LENGTH
    held = config.block_parameters * item_bytes + tokens * config.hidden_size * item_bytes
    batch = BATCH * forward_bytes(config, LENGTH, LENGTH, item_bytes) + rows * inner * 4
    batch += 4 * inner**2  # sums old and new
    widest = max(gptq.pack_bytes(*shape) for shape in matrix_shapes(config).values())
    return held + _sums_bytes(config) + max(batch, widest)


def _columns(config: ModelConfig) -> tuple[int, ...]:
    """Inputs of the matrices listened to, in their order."""
    D = config.hidden_size
    return D, config.num_attention_heads * config.head_dim, D, config.intermediate_size


def _sums_bytes(config: ModelConfig) -> int:
    return 4 * sum(n * n for n in _columns(config))


def _add(sums: Sums, kind: str, x: mx.array) -> None:
    """Add the sum of x x^T over inputs `[N, n]`."""
    x = x.astype(mx.float32)
    sums[kind] = mx.addmm(sums[kind], x.T, x) if kind in sums else x.T @ x


def _sums_of(folder: Path, layer: int, done: int) -> Sums:
    """A layer's sums over what it ran at in the first `done` positions."""
    saved = (int(path.stem.rpartition("-")[2]) for path in folder.glob(f"sums-{layer}-*"))
    last = max((n for n in saved if n <= done), default=None)
    if last is None:
        return {}
    found: Any = mx.load(str(folder / f"sums-{layer}-{last}.safetensors"))
    mx.eval(found)
    return dict(found)


def _save_hidden(folder: Path, hidden: list[mx.array], positions: int) -> None:
    """With it a position is done: whatever else a stopped run left is made again."""
    arrays = {str(i): h for i, h in enumerate(hidden)}
    save(folder / _HIDDEN, arrays, {"positions": str(positions)})


def save(path: Path, arrays: dict[str, mx.array], metadata: dict[str, str] | None = None) -> None:
    mx.eval(arrays)
    with replacing(path, path.with_name(f".{path.name}")) as file:
        mx.save_safetensors(file, arrays, metadata)
