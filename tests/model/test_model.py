"""The forward pass against itself: chunking, folding, fusing, views, peers' caches."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import parameters, resting, slow
from tiny import tiny_config, tiny_prompt, tiny_weights

from mlx_cerebrum.errors import ConfigError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import MLP, Model
from mlx_cerebrum.weights.loading import fuse_projections

MAP = (0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7)
SCALES = tuple((1.0 - p / 20, 0.5 + p / 20) for p in range(len(MAP)))
WINDOW = 12


def build(layer_map: tuple[int, ...] = MAP, scales: Any = None, **changes: Any) -> Model:
    raw = tiny_config(**({"num_hidden_layers": 8} | changes))
    config = ModelConfig.from_dict(raw).with_map(layer_map, scales)
    model = Model(config)
    weights = tiny_weights(raw, seed=11)
    model.load_weights([(name, mx.array(value)) for name, value in weights.items()])
    return model


def tokens(length: int, seed: int = 5) -> mx.array:
    return mx.array([tiny_prompt(tiny_config(), length, seed)])


def in_chunks(model: Model, ids: mx.array, chunk: int, cache: Sequence[Any]) -> mx.array:
    parts = [model(ids[:, i : i + chunk], cache) for i in range(0, ids.shape[1], chunk)]
    return mx.concatenate(parts, axis=1)


def assert_close(a: mx.array, b: mx.array, within: float = 2e-5) -> None:
    assert a.shape == b.shape
    assert mx.abs(a - b).max() <= within


@pytest.mark.parametrize("scales", [None, SCALES])
@pytest.mark.parametrize("window", [WINDOW, None, 1])
@pytest.mark.parametrize("chunk", [1, 5, WINDOW - 1, WINDOW, WINDOW + 1, 50])
@pytest.mark.one_in(12)
def test_prefill_in_chunks_is_prefill_in_one_piece(
    chunk: int, window: int | None, scales: Any
) -> None:
    model = build(scales=scales, sliding_window=window)
    ids = tokens(6 * WINDOW)
    assert_close(in_chunks(model, ids, chunk, model.make_cache()), model(ids))


def test_the_window_matters() -> None:
    ids = tokens(6 * WINDOW)
    with_window, without = build()(ids), build(sliding_window=None)(ids)
    assert_close(with_window[:, :WINDOW], without[:, :WINDOW])
    assert mx.abs(with_window[:, WINDOW:] - without[:, WINDOW:]).max() > 1e-2


def test_far_tokens_are_invisible_only_past_every_window() -> None:
    """A token reaches `positions * (window - 1)` ahead through the stack, and no further."""
    model = build((0, 1), sliding_window=4)
    ids = tokens(20)
    changed = mx.concatenate([(ids[:, :1] + 1) % 256, ids[:, 1:]], axis=1)
    moved = mx.abs(model(ids) - model(changed)).max(axis=-1)[0]
    reach = 2 * 3
    assert mx.all(moved[: reach + 1] > 0)
    assert mx.all(moved[reach + 1 :] == 0)


@pytest.mark.parametrize("scales", [None, SCALES])
def test_folded_is_unrolled(scales: Any) -> None:
    folded = build(scales=scales)
    unrolled = Model(
        replace(
            folded.config,
            num_hidden_layers=len(MAP),
            layer_map=tuple(range(len(MAP))),
            residual_scales=None,
        )
    )
    blocks = parameters(folded)
    for name in parameters(unrolled):
        source = name
        if "layers." in name:
            position = int(name.split(".")[2])
            source = name.replace(f"layers.{position}.", f"layers.{MAP[position]}.")
        value = blocks[source]
        kind = name.split(".")[-2]
        if scales and kind in ("o_proj", "down_proj"):
            value = value * scales[position][kind == "down_proj"]
        unrolled.load_weights([(name, value)], strict=False)
    ids = tokens(5 * WINDOW)
    # Without scales the arithmetic is the same; a scaled matrix rounds unlike a scaled output.
    assert_close(folded(ids), unrolled(ids), within=2e-5 if scales else 0)


def test_rollback_then_other_tokens_is_as_if_never_seen() -> None:
    model = build()
    ids, wrong = tokens(40), tokens(7, seed=9)
    for offset in range(1, 40, 3):
        cache = model.make_cache()
        model(ids[:, :offset], cache)
        model(wrong, cache)
        for layer_cache in cache:
            layer_cache.trim(7)
        rest = model(ids[:, offset:], cache)
        assert_close(rest, model(ids)[:, offset:])


def test_every_position_has_its_own_cache() -> None:
    model = build()
    assert len(model.make_cache()) == len(MAP)
    with pytest.raises(ValueError, match="8 caches for 12 positions"):
        model(tokens(3), model.make_cache()[:8])


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}])
def test_fused_is_unfused(changes: dict[str, Any]) -> None:
    model, fused = build(**changes), build(**changes)
    for block in fused.model.layers:
        fuse_projections(block)
    assert "qkv_proj" in fused.model.layers[0].self_attn
    assert "q_proj" not in fused.model.layers[0].self_attn
    ids = tokens(30)
    assert_close(fused(ids), model(ids), within=1e-5)


def test_fused_only_where_packed_alike() -> None:
    model = build()
    block = model.model.layers[0]
    block.self_attn.v_proj = block.self_attn.v_proj.to_quantized(32, 8)
    block.mlp.up_proj = block.mlp.up_proj.to_quantized(32, 4)
    block.mlp.gate_proj = block.mlp.gate_proj.to_quantized(32, 4)
    before = block.mlp(mx.ones((1, 2, 64)))
    fuse_projections(block)
    assert "q_proj" in block.self_attn
    assert "gate_up_proj" in block.mlp
    assert_close(block.mlp(mx.ones((1, 2, 64))), before)


def test_blocks_are_counted_and_quantized_once() -> None:
    model = build()
    sizes = sum(v.size for v in parameters(model).values())
    assert sizes == model.config.stored_parameters < model.config.executed_parameters
    seen: list[str] = []

    def note(path: str, module: nn.Module) -> bool:
        seen.append(path)
        return False

    nn.quantize(model, class_predicate=note)
    assert len(seen) == len(set(seen))


def test_view_shares_every_array_and_costs_nothing() -> None:
    model = build()
    mx.eval(model.parameters())
    before = resting()
    view = model.view(tuple(range(8)))
    assert mx.get_active_memory() == before
    assert view.config.num_positions == 8
    ours, theirs = (parameters(m) for m in (model, view))
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in ours)
    ids = tokens(30)
    assert_close(view(ids), build(tuple(range(8)))(ids), within=0)
    assert_close(model(ids), build()(ids), within=0)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.set_dtype(mx.float16),
        lambda m: nn.quantize(m, 32, 4),
        lambda m: m.load_weights([("model.norm.weight", mx.zeros(64))], strict=False),
        lambda m: m.update({}),
        lambda m: nn.quantize(m.model, 32, 4),
        lambda m: m.model.layers[0].set_dtype(mx.float16),
    ],
)
def test_a_viewed_model_cannot_be_changed(change: Any) -> None:
    model = build()
    view = model.view(tuple(range(8)))
    for each in (model, view):
        with pytest.raises(RuntimeError, match="serve several views"):
            change(each)


def test_a_view_keeps_its_scales() -> None:
    assert_close(build().view(MAP, SCALES)(tokens(20)), build(scales=SCALES)(tokens(20)), within=0)


@pytest.mark.parametrize(
    ("layer_map", "scales"), [((-1,), None), ((8,), None), ((), None), ((0, 1), ((1.0, 1.0),))]
)
def test_a_view_the_blocks_cannot_run(layer_map: tuple[int, ...], scales: Any) -> None:
    with pytest.raises(ConfigError):
        build().view(layer_map, scales)


@pytest.mark.usefixtures("pace")
def test_interrupted_between_two_positions_the_caches_agree(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlx_cerebrum.decoding.decoder import generate_step

    model, left = build(), 0
    prompt = tiny_prompt(tiny_config(), 30, 5)
    whole = list(generate_step(prompt, model, max_tokens=10))
    real = MLP.__call__

    def interrupted(self: Any, x: mx.array) -> mx.array:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return real(self, x)

    for at in (4, 17, 40):  # in the first chunk, the second, and a decode step
        left, cache = at, model.make_cache()
        monkeypatch.setattr(MLP, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(generate_step(prompt, model, max_tokens=10, cache=cache, prefill_step_size=16))
        monkeypatch.setattr(MLP, "__call__", real)
        seen = cache[0].offset
        assert {c.offset for c in cache} == {seen}
        known = [*prompt, *whole]
        rest = list(generate_step(known[seen:40], model, max_tokens=1, cache=cache))
        assert rest == list(generate_step(known[:40], model, max_tokens=1))


@pytest.mark.usefixtures("pace")
def test_no_step_is_run_that_nobody_reads() -> None:
    from mlx_cerebrum.decoding.decoder import generate_step

    model, cache = build(), build().make_cache()
    seen: list[tuple[int, int]] = []
    options: dict[str, Any] = {"prefill_step_size": 7, "cache": cache}
    prompt = tiny_prompt(tiny_config(), 20, 5)
    steps = generate_step(
        prompt, model, max_tokens=5, progress=lambda *p: seen.append(p), **options
    )
    assert len(list(steps)) == 5
    assert cache[0].offset == 20 + 5 - 1
    assert seen == [(7, 19), (14, 19), (19, 19)]


def test_batch_is_each_alone() -> None:
    model = build()
    batch = mx.concatenate([tokens(30, seed) for seed in (1, 2, 3)])
    cache = model.make_cache()
    together = in_chunks(model, batch, 7, cache)
    for row in range(3):
        assert_close(together[row : row + 1], model(batch[row : row + 1]))


@slow
def test_mlx_lm_loop_runs_on_our_cache_and_ours_on_its_caches() -> None:
    from mlx_lm.generate import generate_step as their_loop
    from mlx_lm.models.cache import KVCache, RotatingKVCache

    from mlx_cerebrum.decoding.decoder import generate_step as our_loop

    model = build()
    prompt = tokens(3 * WINDOW)[0]
    ids = [int(t) for t in np.array(prompt)]
    ours = list(our_loop(ids, model, max_tokens=40))
    theirs = [token for token, _ in their_loop(prompt, model, max_tokens=40)]
    assert theirs == ours
    for make in (KVCache, lambda: RotatingKVCache(max_size=WINDOW, keep=0)):
        cache = [make() for _ in MAP]
        assert list(our_loop(ids, model, max_tokens=40, cache=cache)) == ours


@pytest.fixture(params=[False, True], ids=["in turn", "one step ahead"])
def pace(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding as on the CPU, and as on a GPU."""
    here = SimpleNamespace(on_gpu=lambda: request.param)
    monkeypatch.setattr("mlx_cerebrum.decoding.decode.device", here)


@pytest.mark.usefixtures("pace")
@slow
def test_resumed_cache_is_uninterrupted() -> None:
    from mlx_cerebrum.decoding.decoder import generate_step

    model = build()
    prompt = tiny_prompt(tiny_config(), 20, 5)
    whole = list(generate_step(prompt, model, max_tokens=40))
    cache = model.make_cache()
    first = list(generate_step(prompt, model, max_tokens=15, cache=cache))
    seen = [*prompt, *first]
    rest = list(generate_step(seen[cache[0].offset :], model, max_tokens=25, cache=cache))
    assert first + rest == whole


@pytest.mark.usefixtures("pace")
def test_abandoned_generation_leaves_a_usable_cache() -> None:
    """The step in flight has already run: the cache holds the first `offset` tokens."""
    from mlx_cerebrum.decoding.decoder import generate_step

    model = build()
    prompt = tiny_prompt(tiny_config(), 20, 5)
    whole = list(generate_step(prompt, model, max_tokens=30))
    cache = model.make_cache()
    steps = generate_step(prompt, model, max_tokens=30, cache=cache)
    seen = [*prompt, *(next(steps) for _ in range(10))]
    steps.close()
    assert len(seen) - 1 <= cache[0].offset <= len(seen)
    for layer_cache in cache:
        layer_cache.trim(1)
    rest = list(generate_step(seen[cache[0].offset :], model, max_tokens=20, cache=cache))
    assert seen[20:] + rest == whole
