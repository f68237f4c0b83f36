"""Which models one set of weights serves, and what they are called."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import MakeCheckpoint, slow

from mlx_cerebrum import load
from mlx_cerebrum.errors import PlanError
from mlx_cerebrum.plan.layer_plan import LayerPlan
from mlx_cerebrum.weights.opening import ModelSpec, open_model
from mlx_cerebrum.weights.views import describe, find, load_views, orders, views

MAP_12B = LayerPlan.named("cerebrum-12.25b").layer_map(32)


def test_cerebrum_is_two_models(checkpoint: MakeCheckpoint) -> None:
    base, _ = load(checkpoint(num_hidden_layers=32))
    found = views(base, orders(base.config, "AetherResearch/Cerebrum-1.0-7b"))
    assert list(found) == ["cerebrum-12.25b", "cerebrum-7b"]
    assert found["cerebrum-12.25b"].config.layer_map == MAP_12B
    assert found["cerebrum-7b"] is base
    assert found["cerebrum-12.25b"].model is base.model


def test_a_folded_directory_is_its_own_12b(checkpoint: MakeCheckpoint) -> None:
    base, _ = load(checkpoint(num_hidden_layers=32), plan="cerebrum-12.25b")
    found = views(base, orders(base.config, "./cerebrum-12.25b-4bit"))
    assert found["cerebrum-12.25b"] is base
    assert found["cerebrum-7b"].config.layer_map == tuple(range(32))


def test_other_models_keep_their_names(checkpoint: MakeCheckpoint) -> None:
    base, _ = load(checkpoint(num_hidden_layers=32))
    assert list(views(base, orders(base.config, "owner/Mistral-7B-v0.1"))) == [
        "mistral-7b-v0.1",
        "mistral-7b-v0.1@cerebrum-12.25b",
    ]


def test_a_plan_file_is_named_by_its_stem(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    base, _ = load(checkpoint(num_hidden_layers=32))
    text = LayerPlan.named("cerebrum-12.25b").text
    plans = [tmp_path / "mine.yml", tmp_path / "more" / "mine.yml"]
    plans[1].parent.mkdir()
    for plan in plans:
        plan.write_text(text)
    assert list(views(base, orders(base.config, "cerebrum", [str(plans[0])])))[-1] == "mine"
    both = [str(plan) for plan in plans]
    plans[1].write_text(LayerPlan.named("cerebrum-7b").text)
    with pytest.raises(PlanError, match="two models would be called mine"):
        views(base, orders(base.config, "cerebrum", both))


@slow
def test_views_of_the_demo_take_one_models_memory(demo: Path) -> None:
    found, tokenizer = load_views(open_model(ModelSpec("demo")))
    assert list(found) == ["demo", "demo-interleaved"]
    assert describe(found["demo-interleaved"]) == {
        "positions": 34,
        "blocks": 30,
        "sliding_window": None,
        "context_length": 8192,
        "vocabulary_size": 49152,
        "layer_map": list(found["demo-interleaved"].config.layer_map),
        "bits": 4,
    }
    assert len(found["demo-interleaved"].config.layer_map) == 34
    assert found["demo"].model is found["demo-interleaved"].model
    ids = mx.array([tokenizer.encode("Hello")])
    assert not mx.allclose(found["demo"](ids), found["demo-interleaved"](ids))


def test_a_plan_that_does_not_fit_is_refused_before_weights_are_read(
    checkpoint: MakeCheckpoint,
    plan_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = checkpoint(num_hidden_layers=8)
    monkeypatch.setattr(
        "mlx_cerebrum.weights.opening.load_model", lambda *_, **__: pytest.fail("it was loaded")
    )
    for plan, said in (("no-such-plan", "no-such-plan"), (str(plan_file("0-4,2-9")), "8 blocks")):
        with pytest.raises(PlanError, match=said):
            load_views(open_model(ModelSpec(path)), [plan])


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("7b", "cerebrum-7b"),
        ("12.25B", "cerebrum-12.25b"),
        ("Cerebrum-7B", "cerebrum-7b"),
        ("cerebrum-7b", "cerebrum-7b"),
        ("mine", "x@mine"),
    ],
)
def test_a_short_name_is_enough(asked: str, name: str) -> None:
    assert find(["cerebrum-7b", "cerebrum-12.25b", "x@mine"], asked) == name


@pytest.mark.parametrize(("asked", "said"), [("8b", "none of"), ("", "none of"), ("b", "none of")])
def test_an_unknown_name_lists_those_there_are(asked: str, said: str) -> None:
    with pytest.raises(PlanError, match=f"{said} the models here: cerebrum-7b, cerebrum-12.25b"):
        find(["cerebrum-7b", "cerebrum-12.25b"], asked)


def test_an_ambiguous_name_is_not_guessed() -> None:
    with pytest.raises(PlanError, match="could be several of"):
        find(["a-7b", "b-7b"], "7b")
