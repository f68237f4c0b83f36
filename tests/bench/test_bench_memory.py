"""bench.memory on tiny models: what it measures, and that a wrong prediction shows.

Needs nothing but the bench itself; the pictures matplotlib.
"""

import json
import operator
import os
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeCheckpoint, slow
from tiny import tiny_config

from bench import memory
from bench.pair import open_pair
from bench.random_model import GEOMETRIES
from bench.suite import Effort
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.memory import GB
from mlx_cerebrum.weights.opening import ModelSpec

Results = dict[str, Any]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The suite on a tiny geometry, dense only, with a pair of 32 blocks."""
    from conftest import write_checkpoint
    from tiny import tiny_weights

    folder = tmp_path_factory.mktemp("memory")
    config = tiny_config(vocab_size=260)
    path = write_checkpoint(folder / "source", config, tiny_weights(config, seed=3))
    settings = Effort(work=folder, say=lambda line: None)
    geometry = tiny_config(torch_dtype="bfloat16", sliding_window=64)
    found = memory.measure(open_pair(str(path)), settings, geometry, bits=(None,))
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


@slow
def test_each_block_is_held_once(results: Results) -> None:
    folded, unrolled = results["random"][:2]
    assert (folded["stored_blocks"], unrolled["stored_blocks"]) == (32, 56)
    assert folded["positions"] == unrolled["positions"] == 56
    held, copied = folded["measured"], unrolled["measured"]
    assert held["blocks"] / copied["blocks"] == pytest.approx(32 / 56, rel=0.03)
    assert held["logits"] == copied["logits"]


@slow
def test_bytes_are_predicted_before(results: Results) -> None:
    for row in results["random"] + results["model"]:
        said, found = row["predicted"], row["measured"]
        assert said["weights"] == pytest.approx(found["weights"], rel=0.05)
        assert said["kv"] == pytest.approx(found["kv"], rel=0.1)
        assert found["peak"] > found["weights"] + found["kv"]
        assert found["view"] == 0
    sides = {row["name"]: row["positions"] for row in results["model"]}
    assert sides == {"cerebrum-7b": 32, "cerebrum-12.25b": 56}


@slow
def test_full_size_is_the_plan_rooms_arithmetic(results: Results) -> None:
    found = {(row["form"], row["bits"]): row for row in results["full_size"]["rows"]}
    wanted = {None: (14.48, 24.95), 8: (7.69, 13.26), 4: (4.07, 7.02)}
    for bits, sizes in wanted.items():
        for form, size in zip(("folded", "unrolled"), sizes, strict=True):
            row = found[form, bits]
            assert row["weights"] / GB == pytest.approx(size, abs=0.01)
            assert row["kv_no_window"] == 7 * 2**30
            assert row["kv"] < 1.2 * 0.875 * 2**30
            assert row["peak"] > row["weights"] + row["kv"]


@pytest.mark.long
def test_text_says_how_far_off(results: Results, tmp_path: Path) -> None:
    doctored = json.loads(json.dumps(results))
    for row in doctored["random"] + doctored["model"]:
        row["measured"] |= row["predicted"]
    right = "\n".join(memory.text(doctored))
    assert "6 of 6 configurations are predicted within 5%" in right
    assert "no more than that in 6" in right
    assert "Same model: yes" in right
    row = doctored["random"][2]
    row["predicted"]["peak"] = int(row["measured"]["peak"] * 1.06)
    row["measured"]["loading"] = int(row["predicted"]["loading"] * 1.06)
    doctored["random"][0]["measured"]["logits"] = [0.0]
    wrong = "\n".join(memory.text(doctored))
    assert "5 of 6 configurations" in wrong
    assert "no more than that in 5" in wrong
    assert "+6.0% (peak)" in wrong
    assert "Same model: NO" in wrong


@pytest.mark.long
def test_what_is_refused_or_killed_is_a_row_that_says_so(
    results: Results,
    checkpoint: MakeCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    effort = Effort(work=tmp_path, say=lambda line: None)
    other = ModelSpec(checkpoint(num_hidden_layers=4), plan="cerebrum-12.25b")
    refused = memory._answer("refused", other, None, effort)
    monkeypatch.setattr(memory, "inspect", operator.call)
    killed = memory._answer("killed", os._exit, 9, effort)  # type: ignore[arg-type]
    text = "\n".join(memory.text(results | {"random": [], "model": [refused, killed]}))
    assert re.search("^refused: not measured: .* blocks", text, re.M)
    assert "killed: not measured: A process in the process pool was terminated" in text
    assert "Block bytes" not in text


def test_prompts_fit_the_machine_and_the_model() -> None:
    config = ModelConfig.from_dict(tiny_config())
    assert memory.prompt_tokens(config, packed=False) + 8 == config.max_position_embeddings
    full = ModelConfig.from_dict(GEOMETRIES["cerebrum-7b"])
    assert 16 <= memory.prompt_tokens(full, packed=True) <= memory.prompt_tokens(full, packed=False)
