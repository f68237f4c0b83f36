"""On several machines a model says what it says on one."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from company import VOCABULARY
from conftest import INTERLEAVED_8, plan_yaml, write_checkpoint
from ranks_program import answers
from ranks_ring import LONG, PROGRAM, SIZES, run
from tiny import tiny_config, tiny_weights

from mlx_cerebrum.weights.opening import ModelSpec, open_model

Found = dict[str, Any]
MakePath = Callable[[int, int | None], Path]
PIPELINES = ("2", "3", "4", "2 --split 7")  # machines, and their flags
TENSORS = ("2 --tensor-parallel", "2 --tensor-parallel --split 3,1")
PACKED = ("2 --q-bits 4", "2 --tensor-parallel --q-bits 8", "2 --tensor-parallel --q-bits 4")
SOME = pytest.mark.one_in(24)  # of them all
WINDOWS = pytest.mark.parametrize("window", [12, None])


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> MakePath:
    """The blocks of `company.tiny_views`: so many, with this window."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "8.yml").write_text(plan_yaml(INTERLEAVED_8))

    @cache
    def made(blocks: int, window: int | None) -> Path:
        sizes: Found = {"vocab_size": VOCABULARY, "num_hidden_layers": blocks, **SIZES}
        config = tiny_config(sliding_window=window, **sizes)
        weights = tiny_weights(config, 3, write=0.05 / blocks)
        return write_checkpoint(folder / f"{blocks} {window}", config, weights)

    return made


def plan(path: Path) -> str:
    """The order with repeats over its blocks."""
    return LONG if path.name.startswith("32") else str(path.with_name("8.yml"))


def found_by(what: str, path: Path, how: str, folder: Path, timeout: float = 90.0) -> Found:
    machines, *flags = how.split()
    if "--tensor-parallel" in flags:  # where all share one slow core, 200 s were seen
        timeout *= 7
    out = folder / "found.json"
    words = [str(PROGRAM), what, str(path), str(out), "--plan", plan(path), *flags]
    ended = run(words, int(machines), folder, timeout)
    assert [(each.code, each.err) for each in ended] == [(0, "")] * int(machines)
    found: Found = json.loads(out.read_text())
    return found


@cache
def alone(path: Path, bits: int | None) -> Found:
    spec = ModelSpec(path, plan=plan(path), dtype="float32", q_bits=bits)
    found = answers(open_model(spec).load())
    assert len({*found["greedy"], *found["drawn"]}) > 6
    return found


# Machines that wait for a sum keep a core busy each: with others beside them that takes long.
BUSY = [pytest.param(how, marks=pytest.mark.long) for how in (*TENSORS, *PACKED)]
HOWS = pytest.mark.parametrize("how", [*PIPELINES, *BUSY])
DEPTHS = pytest.mark.parametrize("blocks", [8, pytest.param(32, marks=pytest.mark.long)])


@WINDOWS
@HOWS
@DEPTHS
@SOME
def test_the_same_answers(
    how: str, blocks: int, window: int | None, paths: MakePath, tmp_path: Path
) -> None:
    """Greedy and drawn, packed caches, edited questions, copies of caches."""
    path = paths(blocks, window)
    bits = int(how[-1]) if "bits" in how else None
    found, one = found_by("answers", path, how, tmp_path), alone(path, bits)
    np.testing.assert_allclose(found["logits"], one["logits"], atol=2e-5)
    assert found | {"logits": None} == one | {"logits": None}


@WINDOWS
@pytest.mark.parametrize("how", ["2", "3", BUSY[0]])
@DEPTHS
@SOME
def test_random_company(
    how: str, blocks: int, window: int | None, paths: MakePath, tmp_path: Path
) -> None:
    """Of both orders, with guesses, cancels and marks; each is checked by the program."""
    found = found_by("company", paths(blocks, window), how, tmp_path)
    assert found["left"] == 12
    assert found["most"] > 1
    assert found["guessed"] > found["held"] > 0
