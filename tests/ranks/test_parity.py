"""On several machines a model says what it says on one."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from company import VOCABULARY
from conftest import write_checkpoint
from ranks_program import answers
from ranks_ring import LONG, PROGRAM, SIZES, run
from tiny import tiny_config, tiny_weights

from mlx_cerebrum.weights.opening import ModelSpec, open_model

Found = dict[str, Any]
PIPELINES = ("2", "3", "4", "2 --split 21")  # machines, and their flags
TENSORS = ("2 --tensor-parallel", "2 --tensor-parallel --split 3,1")
PACKED = ("2 --q-bits 4", "2 --tensor-parallel --q-bits 8", "2 --tensor-parallel --q-bits 4")
WINDOWS = pytest.mark.parametrize("window", [12, None])


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[int | None, Path]:
    """The blocks of `company.tiny_views`, by their window."""
    folder, found = tmp_path_factory.mktemp("tiny"), {}
    for window in (12, None):
        config = tiny_config(vocab_size=VOCABULARY, sliding_window=window, **SIZES)
        weights = tiny_weights(config, 3, write=0.05 / 32)
        found[window] = write_checkpoint(folder / str(window), config, weights)
    return found


def found_by(what: str, path: Path, how: str, folder: Path, timeout: float = 60.0) -> Found:
    machines, *flags = how.split()
    out = folder / "found.json"
    words = [str(PROGRAM), what, str(path), str(out), *flags]
    ended = run(words, int(machines), folder, timeout)
    assert [(each.code, each.err) for each in ended] == [(0, "")] * int(machines)
    found: Found = json.loads(out.read_text())
    return found


@cache
def alone(path: Path, bits: int | None) -> Found:
    found = answers(open_model(ModelSpec(path, plan=LONG, dtype="float32", q_bits=bits)).load())
    assert len({*found["greedy"], *found["drawn"]}) > 6
    return found


@WINDOWS
@pytest.mark.parametrize("how", [*PIPELINES, *TENSORS, *PACKED])
@pytest.mark.one_in(9)
def test_the_same_answers(
    how: str, window: int | None, paths: dict[int | None, Path], tmp_path: Path
) -> None:
    """Greedy and drawn, packed caches, edited questions, copies of caches."""
    bits = int(how[-1]) if "bits" in how else None
    found, one = found_by("answers", paths[window], how, tmp_path), alone(paths[window], bits)
    np.testing.assert_allclose(found["logits"], one["logits"], atol=2e-5)
    assert found | {"logits": None} == one | {"logits": None}


@WINDOWS
@pytest.mark.parametrize("how", ["2", TENSORS[0]])
@pytest.mark.one_in(4)
def test_random_company(
    how: str, window: int | None, paths: dict[int | None, Path], tmp_path: Path
) -> None:
    """Of both orders, with guesses, cancels and marks; each is checked by the program."""
    found = found_by("company", paths[window], how, tmp_path)
    assert found["left"] == 12
    assert found["most"] > 1
    assert found["guessed"] > found["held"] > 0
