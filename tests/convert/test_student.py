"""What a packed model learns: its slopes are those of its divergence, over every run of a block."""

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from tiny import tiny_config, tiny_weights

from convert import student as students
from convert.student import Matrix, Student
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.tensors import EMBEDDING, HEAD, matrix_shapes
from mlx_cerebrum.weights.quantize import Packing

ORDER = (0, 1, 0, 1, 2)
PACKING = Packing(3, 32)


def made(**changes: Any) -> tuple[Student, mx.array, mx.array]:
    """A student of three blocks, tokens `[2, 24]`, and what the dense model gives its head."""
    raw = tiny_config(num_hidden_layers=3, layer_map=list(ORDER), **changes)
    raw |= {"model_type": "cerebrum", "format_version": 1}
    config = ModelConfig.from_dict(raw)
    weights = {k: mx.array(v) for k, v in tiny_weights(tiny_config(**raw), seed=3).items()}
    dense = {name.removesuffix(".weight"): array for name, array in weights.items()}
    model = Model(config)
    model.load_weights(list(weights.items()))
    tokens = mx.array(np.random.default_rng(0).integers(3, 256, (2, 24)))
    said = model.model.norm(model.run(model.embed(tokens)))
    packed = {
        name: Matrix(PACKING, PACKING.quantize(dense.pop(name))) for name in matrix_shapes(config)
    }
    head = weights[f"{EMBEDDING if config.tie_word_embeddings else HEAD}.weight"]
    norm = nn.RMSNorm(64, 1e-5)
    norm.weight = dense["model.norm"]
    return Student(config, ORDER, packed, dense, norm, head), tokens, said


def told(student: Student, tokens: mx.array, said: mx.array) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}

    def keep(module: str, slopes: mx.array) -> None:
        assert module not in found
        found[module] = slopes

    student.slopes(tokens, said, keep)
    return found


def nothing(module: str, slopes: mx.array) -> None:
    pass


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scales", [None, [[0.5, 0.7]] * len(ORDER)])
@pytest.mark.one_in(4)
def test_slopes_are_those_of_the_divergence(
    tied: bool, scales: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(students, "ROWS", 20)  # and a piece of fewer
    more = {"residual_scales": scales} if scales else {}
    student, tokens, said = made(tie_word_embeddings=tied, **more)
    found = told(student, tokens, said)
    assert found.keys() == student.matrices.keys() - (set() if tied else {EMBEDDING})
    for module in ("model.layers.0.self_attn.v_proj", EMBEDDING if tied else HEAD):
        matrix = student.matrices[module]
        direction = found[module] / mx.linalg.norm(found[module])
        ends = []
        for step in (1e-2, -1e-2):
            matrix.learned = step * direction
            ends.append(student.slopes(tokens, said, nothing))
        matrix.learned = mx.zeros(direction.shape)
        expected = cast(float, mx.linalg.norm(found[module]).item())
        assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(expected, rel=0.02, abs=1e-3), module


def test_where_something_was_learned_slopes_are_those_from_there() -> None:
    student, tokens, said = made()
    module = "model.layers.1.mlp.up_proj"
    matrix = student.matrices[module]
    random = np.random.default_rng(1).uniform(-0.1, 0.1, matrix.learned.shape)
    there = mx.array(random.astype(np.float32))
    matrix.learned = there
    found = told(student, tokens, said)[module]
    direction = found / mx.linalg.norm(found)
    ends = []
    for step in (1e-2, -1e-2):
        matrix.learned = there + step * direction
        ends.append(student.slopes(tokens, said, nothing))
    assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(mx.linalg.norm(found).item(), rel=0.02)


def test_a_model_that_says_the_same_has_nothing_to_learn() -> None:
    student, tokens, said = made()
    divergence = student.slopes(tokens, said, nothing)
    assert divergence > 0.1
    packed = {name: matrix.dense(mx.float32) for name, matrix in student.matrices.items()}
    model = Model(student.config)
    model.load_weights([(f"{n}.weight", w) for n, w in (packed | dict(student.dense)).items()])
    student.teacher = packed[HEAD]
    same = model.model.norm(model.run(model.embed(tokens)))
    assert student.slopes(tokens, same, nothing) == pytest.approx(0, abs=1e-3)


def test_what_is_learned_moves_a_group_and_is_rounded_as_it_is_stored() -> None:
    weight = mx.random.normal((4, 64), key=mx.random.key(0)).astype(mx.bfloat16)
    matrix = Matrix(Packing(4, 32), Packing(4, 32).quantize(weight))
    before = matrix.dense(mx.float32)
    scales = matrix.start["scales"].astype(mx.float32)
    matrix.learned = mx.zeros((2, 4, 2)).at[0, 1, 0].add(0.25).at[1, 2, 1].add(0.5)
    after = matrix.dense(mx.float32)
    assert matrix.stored()["scales"].dtype == mx.bfloat16
    expected = np.array(before)
    expected[1, :32] *= 1.25
    expected[2, 32:] += 0.5 * cast(float, scales[2, 1].item())
    assert np.abs(np.array(after) - expected).max() < 0.02
    rows = mx.array([2, 0, 2])
    assert mx.array_equal(matrix.dense(mx.float32, rows), after[rows])


def test_a_step_goes_down_by_the_rate_at_first() -> None:
    matrix = Matrix(PACKING, PACKING.quantize(mx.random.normal((4, 64), key=mx.random.key(0))))
    slopes = mx.random.normal(matrix.learned.shape, key=mx.random.key(1))
    matrix.learn(slopes, 0, 0.5)
    assert np.allclose(np.array(matrix.learned), -0.5 * np.sign(np.array(slopes)), atol=1e-5)
    matrix.learn(-slopes, 1, 0.5)
    assert mx.all(mx.abs(matrix.learned) < 0.5)
