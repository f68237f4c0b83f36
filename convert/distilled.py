"""Distillation: a packed model is taught to say what the dense one says.

GPTQ keeps near what each matrix gives; what counts is what the model says in the end. So its
integers stay as they are, and all scales and biases move together (convert/student.py). mlx-lm
names this distilled weight quantization, and starts it from plain rounding.

The dense model is not held for it: what GPTQ's pass leaves, the hidden states after the last
position, says what it would say. A run that was stopped goes on where it last saved what was
learned, and writes the same bytes as one that was not:

    training.safetensors     what was learned of every matrix, Adam's moments, and the steps done
    distilled.safetensors    scales and biases as they are written
"""

import random
import time
from pathlib import Path
from typing import Any

import mlx.core as mx

from convert.calibrated import DISTILLED, Calibrator, Packed, save
from convert.passages import LENGTH
from convert.student import ROWS, Matrix, Student
from convert.walk import weight
from convert.writer import Progress
from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.tensors import BLOCK, EMBEDDING, HEAD, matrix_shapes, module_path

EPOCHS = 1  # how often each passage is read
# Of the first step, as a share of a group's weights; it falls to nothing by the last. What all
# blocks change adds up on the way to the logits, so the head may change more.
RATE, HEAD_RATE = 7e-4, 2e-3
SAVED = 120.0  # seconds between savings
_TRAINING = "training.safetensors"
_KEPT = ("learned", "mean", "square")


class Distiller(Calibrator):
    """GPTQ's pass, and then distillation. Raises what Calibrator raises."""

    @property
    def provenance(self) -> dict[str, Any]:
        rates = {"rate": RATE, "head_rate": HEAD_RATE}
        return super().provenance | {"start": "gptq", "epochs": EPOCHS} | rates

    @property
    def _later(self) -> tuple[int, ...]:
        training = 4 * 2 * len(_KEPT) * self._groups  # twice while it is replaced
        result = 4 * 2 * self._groups + self.outputs[EMBEDDING].nbytes
        return 2 * training, training + result, result + self.layout.nbytes

    def run(self, folder: Path, progress: Progress | None = None) -> None:
        super().run(folder, progress)
        if (folder / DISTILLED).exists():
            return
        student = self._student(folder)
        self._train(student, folder, progress)
        found = {
            f"{module}.{part}": array
            for module, matrix in student.matrices.items()
            for part, array in matrix.stored().items()
            if part != "weight" or module == EMBEDDING  # which GPTQ has not packed
        }
        save(folder / DISTILLED, found)
        (folder / _TRAINING).unlink(missing_ok=True)

    def _student(self, folder: Path) -> Student:
        """As GPTQ packed it."""
        order, packed = self.layout.order, Packed(folder)
        modules = {module_path(layer, kind) for layer in order for kind in BLOCK}
        matrices, dense = {}, {}
        for module in sorted(modules | {EMBEDDING, HEAD} & self.outputs.keys()):
            output = self.outputs[module]
            if output.packing is None:
                dense[module] = weight(self.checkpoint, output)
                continue
            arrays = packed.arrays(module)
            if not arrays:  # a table that is looked up in
                arrays = output.packing.quantize(weight(self.checkpoint, output))
            matrices[module] = Matrix(output.packing, arrays)
        head = self.outputs.get(HEAD, self.outputs[EMBEDDING])
        teacher = weight(self.checkpoint, head).astype(self.dtype)
        mx.eval(dense, teacher)
        return Student(self.layout.config, order, matrices, dense, self.final_norm(), teacher)

    def _train(self, student: Student, folder: Path, progress: Progress | None) -> None:
        """All passages, EPOCHS times, going on from what `folder` has."""
        said = mx.concatenate([student.norm(h) for h in self.hidden(folder)[0]])
        mx.eval(said)
        steps = _passages(len(self.tokens))
        size = self.layout.config.block_parameters * self.dtype.size * len(self.layout.order)
        saved, shown = time.monotonic(), ""
        for step in range(_resumed(folder, student), len(steps)):
            if progress is not None:
                progress(size * step, size * len(steps), f"distilling: step {step + 1}{shown}")
            left = 1 - step / len(steps)

            def learn(module: str, slopes: mx.array, step: int = step, left: float = left) -> None:
                rate = HEAD_RATE if module in (HEAD, EMBEDDING) else RATE
                student.matrices[module].learn(slopes, step, rate * left)

            own = slice(steps[step], steps[step] + 1)
            divergence = student.slopes(self.tokens[own], said[own], learn) / LENGTH
            if not abs(divergence) < float("inf"):
                raise CheckpointError(
                    "the model's logits are not finite; convert with another --dtype"
                )
            shown = f", KL {divergence:.3f}"
            if time.monotonic() - saved >= SAVED:
                _save(folder, student, step + 1)
                saved = time.monotonic()
            mx.clear_cache()

    @property
    def _groups(self) -> int:
        """Of all packed matrices together."""
        shapes = matrix_shapes(self.checkpoint.config)
        return sum(
            rows * columns // output.packing.group_size
            for module, (rows, columns) in shapes.items()
            if (output := self.outputs.get(module)) is not None and output.packing is not None
        )

    def _settings(self) -> list[tuple[str, int]]:
        return [*super()._settings(), ("--q-recipe gptq", super()._needed(self.tokens.size))]

    def _needed(self, tokens: int) -> int:
        packed = sum(output.nbytes for output in self.outputs.values())
        more = distilling_bytes(self.layout.config, tokens, self.dtype.size, packed, self._groups)
        return max(super()._needed(tokens), more)


def distilling_bytes(
    config: ModelConfig, tokens: int, item_bytes: int, packed: int, groups: int
) -> int:
    """Bytes held at most: the packed model (`packed` bytes) and what its `groups` learn, the dense
    head and what it is given, what goes into each position; and on top of them a block's matrices
    and their slopes while a batch goes back through it, or the head's."""
    D, V, rows = config.hidden_size, config.vocab_size, LENGTH
    held = packed + 4 * 2 * len(_KEPT) * groups
    held += (V + tokens + (config.num_positions + 2) * rows) * D * item_bytes
    heads, inner = config.num_attention_heads, config.intermediate_size
    # All of a block there and back, about twice what it makes; attention holds every score.
    values = rows * (6 * heads * config.head_dim + 8 * D + 4 * inner)
    back = (2 * values + 4 * heads * rows * LENGTH + 3 * config.block_parameters) * item_bytes
    back += 3 * 4 * D * inner + (V * D * (4 + item_bytes) if config.tie_word_embeddings else 0)
    head = V * D * (3 * 4 + item_bytes) + 6 * 4 * ROWS * V
    return held + max(back, head)


def _passages(count: int) -> list[int]:
    """Which one each step reads: all of them in some order, then all again in another."""
    return [i for e in range(EPOCHS) for i in random.Random(e).sample(range(count), count)]


def _save(folder: Path, student: Student, steps: int) -> None:
    found = {
        f"{module}.{name}": getattr(matrix, name)
        for module, matrix in student.matrices.items()
        for name in _KEPT
    }
    save(folder / _TRAINING, found, {"steps": str(steps)})


def _resumed(folder: Path, student: Student) -> int:
    """How many steps a stopped run had saved; `student` has learned what it had."""
    path = folder / _TRAINING
    if not path.exists():
        return 0
    found: Any = mx.load(str(path), return_metadata=True)
    arrays, metadata = found
    for module, matrix in student.matrices.items():
        for name in _KEPT:
            setattr(matrix, name, arrays[f"{module}.{name}"])
        mx.eval(matrix.learned, matrix.mean, matrix.square)
    return int(metadata["steps"])
