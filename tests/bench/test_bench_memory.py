"""bench.memory on tiny models: what it measures, and that a wrong prediction shows.

Needs nothing but the bench itself; the pictures matplotlib.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeCheckpoint
from tiny import tiny_config

from bench import memory, plots
from bench.memory_report import errors
from bench.pair import open_pair
from bench.random_model import GEOMETRIES
from bench.suite import Effort
from mlx_cerebrum.errors import CerebrumError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.memory import GB

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


@pytest.mark.long
def test_each_block_is_held_once(results: Results) -> None:
    folded, unrolled = results["random"][:2]
    assert results["block_ratio"] == pytest.approx(32 / 56, rel=0.03)
    assert results["expected_ratio"] == 32 / 56
    assert results["same_logits"] is True
    assert (folded["stored_blocks"], unrolled["stored_blocks"]) == (32, 56)
    assert folded["positions"] == unrolled["positions"] == 56


def test_bytes_are_predicted_before(results: Results) -> None:
    for row in results["random"] + results["model"]:
        assert row["predicted"]["weights"] == pytest.approx(row["measured"]["weights"], rel=0.05)
        assert row["predicted"]["kv"] == pytest.approx(row["measured"]["kv"], rel=0.1)
        assert row["measured"]["peak"] > row["measured"]["weights"] + row["measured"]["kv"]
        assert row["measured"]["view"] == 0


def test_the_models_own_sides_are_measured(results: Results) -> None:
    a, b = results["model"]
    assert [a["name"], b["name"]] == ["cerebrum-7b", "cerebrum-12.25b"]
    assert (a["positions"], b["positions"]) == (32, 56)
    assert a["predicted"]["weights"] == b["predicted"]["weights"]


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


def test_text_says_how_far_off(results: Results) -> None:
    doctored = copy.deepcopy(results)
    for row in doctored["random"] + doctored["model"]:
        row["measured"] |= row["predicted"] | {"loading": row["predicted"]["loading"] - 1}
    right = "\n".join(memory.text(doctored))
    assert "6 of 6 configurations are predicted within 5%" in right
    assert "NO" not in right
    row = doctored["random"][2]
    row["predicted"]["peak"] = int(row["measured"]["peak"] * 1.06)
    row["measured"]["loading"] = row["predicted"]["loading"] + 1
    doctored["same_logits"] = False
    wrong = "\n".join(memory.text(doctored))
    assert "5 of 6 configurations" in wrong
    assert "+6.0% (peak)" in wrong
    assert wrong.count("NO") == 3
    assert errors(row)["peak"] == pytest.approx(0.06, abs=1e-3)


def test_text_and_plots_come_from_the_results_alone(results: Results, tmp_path: Path) -> None:
    before = json.dumps(results)
    assert memory.text(results) == memory.text(json.loads(before))
    pictures = memory.plots(results, {})
    assert set(pictures) == {"memory", "memory-full-size"}
    for name, picture in pictures.items():
        assert plots.save(picture, tmp_path, name).stat().st_size
    assert json.dumps(results) == before


def test_what_can_not_be_measured_says_why(
    results: Results, monkeypatch: pytest.MonkeyPatch, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    def refuse(arguments: Any) -> None:
        raise CerebrumError("too large for this machine")

    monkeypatch.setattr("bench.process.answer", refuse)
    settings = Effort(work=tmp_path, say=lambda line: None)
    geometry = tiny_config(torch_dtype="bfloat16")
    found = memory.measure(open_pair(str(checkpoint())), settings, geometry, bits=(None,))
    text = "\n".join(memory.text(found))
    assert text.count("not measured: too large for this machine") == 6
    assert found["same_logits"] is None
    assert "predicted, not measured" in text
    memory.plots(found, {})


def test_a_model_that_does_not_fit_is_refused(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mlx_cerebrum.model.memory.available_bytes", lambda: 100_000)
    assert memory.main([str(checkpoint())]) == 2
    said = capsys.readouterr().err
    assert "are free" in said
    assert said.count("\n") == 1


def test_prompts_fit_the_machine_and_the_model() -> None:
    config = ModelConfig.from_dict(tiny_config())
    assert memory.prompt_tokens(config, packed=False) + 8 == config.max_position_embeddings
    full = ModelConfig.from_dict(GEOMETRIES["cerebrum-7b"])
    assert 16 <= memory.prompt_tokens(full, packed=True) <= memory.prompt_tokens(full, packed=False)
