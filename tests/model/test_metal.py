"""What a GPU computes, against the CPU's float32.

Where there is no GPU the CPU stands in for one: it goes the ways that Metal goes, with kernels that
add up in float32 and round once, as Metal's do. So these are known to be right before a Mac runs
them. Some ask for Metal itself.

The bounds are on values of about 1, and on logits as shares of the largest.
"""

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import MakeCheckpoint, parameters, tensors
from tiny import tiny_config, tiny_prompt, tiny_weights

from convert.__main__ import main as convert
from mlx_cerebrum import device, load
from mlx_cerebrum.decoding.decoder import generate_step
from mlx_cerebrum.model.attention import attend
from mlx_cerebrum.model.cache import causal_mask
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.entries import KV_BITS, Packed, pack, unpack
from mlx_cerebrum.model.forward import Model, swiglu
from mlx_cerebrum.model.limits import limits, wire
from mlx_cerebrum.model.memory import available_bytes
from mlx_cerebrum.server.engine import BatchEngine
from mlx_cerebrum.server.jobs import Event, Job, Piece
from mlx_cerebrum.weights.loading import fuse_projections
from mlx_cerebrum.weights.quantize import AFFINE_BITS, AFFINE_GROUPS, Packing

pytestmark = pytest.mark.metal
metal_itself = pytest.mark.skipif(device.backend() != "metal", reason="needs Metal (macOS arm64)")

BOUNDS = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 2e-2}
WIDTHS = (64, 96, 128)  # of heads, for which MLX has kernels of its own
HEADS, KV_HEADS = 8, 2
IDS = {dtype: str(dtype).removeprefix("mlx.core.") for dtype in BOUNDS}.get


def widened(run: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """`run`, computed in float32 and rounded to its first argument's dtype."""

    def wide(x: mx.array, *rest: Any, **named: Any) -> mx.array:
        def widen(value: Any) -> Any:
            half = isinstance(value, mx.array) and value.dtype in (mx.float16, mx.bfloat16)
            return value.astype(mx.float32) if half else value

        named = {name: widen(value) for name, value in named.items()}
        return run(widen(x), *map(widen, rest), **named).astype(x.dtype)

    return wide


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The GPU, or the CPU in its place."""
    if device.on_gpu():
        yield
        return
    monkeypatch.setattr(device, "backend", lambda: "metal")
    for owner, name in (
        (mx, "quantized_matmul"),
        (mx.fast, "rope"),
        (mx.fast, "scaled_dot_product_attention"),
    ):
        monkeypatch.setattr(owner, name, widened(getattr(owner, name)))
    mx.disable_compile()  # on a CPU it would start a C++ compiler
    yield
    mx.enable_compile()


@contextmanager
def cpu() -> Iterator[None]:
    with mx.stream(mx.cpu), pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "backend", lambda: "cpu")
        yield


def random(*shape: int, dtype: mx.Dtype) -> mx.array:
    drawn = np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)
    return mx.array(drawn).astype(dtype)


def wide(array: mx.array) -> mx.array:
    return array.astype(mx.float32)


def number(array: mx.array) -> float:
    return float(np.array(array))


def off(found: mx.array, wanted: mx.array) -> float:
    return number(mx.abs(wide(found) - wanted).max())


def masks(kind: str, batch: int, length: int, keys: int) -> Any:
    """As caches make them; "rows": of several sequences, with holes."""
    if kind == "window":
        return causal_mask(length, keys - length, 20)
    if kind == "rows":
        holes = np.random.default_rng(keys).random((batch, 1, length, keys)) < 0.3
        own = np.arange(keys) == np.arange(keys - length, keys)[:, None]
        return causal_mask(length, keys - length, None) & mx.array(~holes | own)
    return None if kind == "none" else kind


# ---- Products


@pytest.mark.usefixtures("gpu")
def test_float32_is_float32() -> None:
    """TF32 would be wrong by some 5e-4."""
    a, b = (random(512, 512 + i, dtype=mx.float32)[:, :512] for i in range(2))
    exact = np.array(a, np.float64) @ np.array(b, np.float64)
    wrong = np.array(a @ b, np.float64) - exact
    assert np.linalg.norm(wrong) < 1e-6 * np.linalg.norm(exact)


@pytest.mark.usefixtures("gpu")
def test_the_compiled_activation_is_the_plain_one() -> None:
    gate, up = (random(2, 3, 64 + i, dtype=mx.float32)[..., :64] for i in range(2))
    assert off(swiglu(gate, up), gate * mx.sigmoid(gate) * up) < 1e-6


# ---- Attention


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", BOUNDS, ids=IDS)
@pytest.mark.usefixtures("gpu")
@pytest.mark.one_in(8)
def test_attention_over_dense_entries(dtype: mx.Dtype, width: int) -> None:
    """Lengths on both sides of every change of kernel: 8 queries, 1024 and 4096 keys."""
    for length, keys, kind in (
        (1, 1, "none"),
        (1, 300, "none"),
        (1, 1100, "none"),
        (1, 4200, "none"),
        (2, 40, "causal"),
        (8, 70, "causal"),
        (8, 70, "window"),
        (9, 70, "causal"),
        (64, 200, "window"),
        (64, 64, "causal"),
        (1, 60, "rows"),
        (3, 60, "rows"),
        (10, 60, "rows"),
    ):
        batch = 2 if kind == "rows" else 1
        queries = random(batch, HEADS, length, width, dtype=dtype)
        # A cache has room behind what is seen.
        k, v = (random(batch, KV_HEADS, keys + i, width, dtype=dtype) for i in (5, 6))
        k, v = k[..., :keys, :], v[..., :keys, :]
        mask = masks(kind, batch, length, keys)
        found = attend(queries, k, v, width**-0.5, mask)
        with cpu():
            wanted = attend(wide(queries), wide(k), wide(v), width**-0.5, mask)
            mx.eval(wanted)
        assert found.dtype == dtype
        assert off(found, wanted) <= BOUNDS[dtype], (length, keys, kind)


@pytest.mark.parametrize(("bits", "width"), [(4, 64), (8, 96), (4, 96), (8, 128)])
@pytest.mark.parametrize("dtype", BOUNDS, ids=IDS)
@pytest.mark.usefixtures("gpu")
def test_attention_over_packed_entries(dtype: mx.Dtype, width: int, bits: int) -> None:
    """The products' kernels change at 4 rows, at 1024 keys, and from some 6 to 32 rows."""
    for length, keys, kind in (
        (1, 300, "none"),
        (1, 1100, "none"),
        (2, 300, "causal"),
        (3, 1100, "window"),
        (4, 300, "causal"),
        (9, 40, "causal"),
        (70, 100, "causal"),
        (1, 60, "rows"),
        (3, 60, "rows"),
    ):
        batch = 2 if kind == "rows" else 1
        queries = random(batch, HEADS, length, width, dtype=dtype)
        with cpu():
            k, v = (
                Packed(*(part[..., :keys, :] for part in pack(entries, bits)))
                for entries in (
                    random(batch, KV_HEADS, keys + i, width, dtype=dtype) for i in (5, 6)
                )
            )
            mask = masks(kind, batch, length, keys)
            dense = [
                wide(unpack(Packed(e.weight, wide(e.scales), wide(e.biases)), width))
                for e in (k, v)
            ]
            wanted = attend(wide(queries), dense[0], dense[1], width**-0.5, mask)
            mx.eval(wanted, k, v)
        found = attend(queries, k, v, width**-0.5, mask)
        assert found.dtype == dtype
        assert off(found, wanted) <= BOUNDS[dtype], (length, keys, kind)


# ---- Packing


@pytest.mark.parametrize("bits", AFFINE_BITS)
@pytest.mark.parametrize("dtype", BOUNDS, ids=IDS)
@pytest.mark.usefixtures("gpu")
def test_packing(dtype: mx.Dtype, bits: int) -> None:
    """A value between two steps may go either way; almost none does, and none goes further."""
    weight = random(16, 384, dtype=dtype) / 4  # Metal unpacks with two roundings
    for group in AFFINE_GROUPS:
        packing = Packing(bits, group)
        found = packing.quantize(weight)
        mx.eval(found)
        with cpu():
            wanted = packing.quantize(weight)
            ours, theirs = (packing.dequantize(a, mx.float32) for a in (found, wanted))
            mx.eval(ours, theirs, wanted)
        assert {n: a.dtype for n, a in found.items()} == {n: a.dtype for n, a in wanted.items()}
        step = number(wide(mx.abs(wanted["scales"])).max())
        assert off(ours, theirs) <= 1.01 * step
        assert number(mx.mean(mx.abs(ours - theirs) > 0.5 * step)) <= 0.01
        rounded = packing.dequantize(found, dtype)
        assert rounded.dtype == dtype
        assert off(rounded, ours) <= BOUNDS[dtype]


def test_convert_packs_as_the_cpu_does(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    command = ["--hf-path", str(checkpoint()), "-q", "--q-group-size", "32", "--mlx-path"]
    assert convert([*command, str(tmp_path / "gpu")]) == 0
    with cpu():
        assert convert([*command, str(tmp_path / "cpu")]) == 0
        found, wanted = tensors(tmp_path / "gpu"), tensors(tmp_path / "cpu")
        assert found.keys() == wanted.keys()
        words = [number(mx.mean(found[name] != a)) for name, a in wanted.items()]
    assert max(words) <= 0.01
    assert convert(["verify", str(tmp_path / "gpu")]) == 0


@pytest.mark.parametrize("q_bits", [None, 4, 8])
@pytest.mark.usefixtures("gpu")
def test_stored_dtype_and_packing_are_kept(checkpoint: MakeCheckpoint, q_bits: int | None) -> None:
    model, _ = load(checkpoint(), q_bits=q_bits, q_group_size=32)
    assert model.dtype == mx.float32
    packed = parameters(model)["model.layers.0.self_attn.qkv_proj.weight"].dtype == mx.uint32
    assert packed is (q_bits is not None)


# ---- The model

WINDOW = 12
MAP = (0, 1, 2, 1, 2, 3)


def build(dtype: mx.Dtype, width: int) -> tuple[Model, Model]:
    """A model in `dtype`, as it is loaded, and one of the same numbers in float32."""
    raw = tiny_config(head_dim=width, num_hidden_layers=4, sliding_window=WINDOW)
    models = []
    weights = {n: mx.array(a).astype(dtype) for n, a in tiny_weights(raw, seed=11).items()}
    for change in (lambda a: a, wide):
        model = Model(ModelConfig.from_dict(raw).with_map(MAP))
        model.load_weights([(name, change(a)) for name, a in weights.items()])
        for block in model.model.layers:
            fuse_projections(block)
        models.append(model)
    return models[0], models[1]


PIECES = (9, 1, 2, 1, 18, 1, 2, 1, 3, 1, 5, 1)  # every other one a single token


def pieces() -> Iterator[mx.array]:
    """One prompt's ids `[1, L]`, in pieces of these lengths."""
    ids, start = mx.array([tiny_prompt(tiny_config(), sum(PIECES), 5)]), 0
    for length in PIECES:
        yield ids[:, start : (start := start + length)]


def run(model: Model) -> mx.array:
    """The logits of the prompt, read in pieces."""
    cache, parts = model.make_cache(), []
    for piece in pieces():
        parts.append(model(piece, cache))
        mx.eval(parts[-1])
    return mx.concatenate(parts, axis=1)


@pytest.mark.parametrize(("dtype", "width"), list(zip(BOUNDS, WIDTHS, strict=True)))
@pytest.mark.usefixtures("gpu")
def test_a_model_past_its_window(dtype: mx.Dtype, width: int) -> None:
    model, exact = build(dtype, width)
    found = run(model)
    with cpu():
        wanted = run(exact)
    assert found.dtype == dtype
    assert off(found, wanted) <= BOUNDS[dtype] * number(mx.abs(wanted).max())


@pytest.mark.parametrize("bits", KV_BITS)
@pytest.mark.usefixtures("gpu")
@pytest.mark.one_in(4)
def test_a_model_with_a_packed_cache(bits: int) -> None:
    """A value between two steps may go either way, and every later token's logits with it. So each
    piece goes on from the CPU's entries, and half the pieces of either kind must be exact."""
    model, exact = build(mx.float32, 64)
    packed, dense = exact.make_cache(bits), exact.make_cache()
    errors, steps = [], []  # of each piece: the GPU's, and packing's own
    for piece in pieces():
        found = model(piece, copy.deepcopy(packed))
        mx.eval(found)
        with cpu():
            wanted, unpacked = exact(piece, packed), exact(piece, dense)
            mx.eval(wanted, unpacked)
        errors.append(off(found, wanted))
        steps.append(off(unpacked, wanted))
    for kind in (errors[::2], errors[1::2]):
        assert sorted(kind)[len(kind) // 2 - 1] <= BOUNDS[mx.float32]
    assert max(errors) <= max(steps)


@pytest.mark.parametrize("kv_bits", [None, *KV_BITS])
def test_gpu_and_cpu_choose_the_same_tokens(kv_bits: int | None, gpu: None) -> None:
    model, _ = build(mx.float32, 64)

    def tokens() -> list[int]:
        prompt = tiny_prompt(tiny_config(), 7, 3)
        return list(generate_step(prompt, model, max_tokens=24, cache=model.make_cache(kv_bits)))

    found = tokens()
    with cpu():
        assert tokens() == found


def test_the_engines_thread_computes_what_this_one_does(checkpoint: MakeCheckpoint) -> None:
    """Two in company, past the window, on the default device; alone on the CPU."""
    model, tokenizer = load(checkpoint(), dtype="float32")
    prompts = [tuple(tiny_prompt(tiny_config(), n, n)) for n in (5, 19)]
    found: dict[int, list[int]] = {0: [], 1: []}
    over = threading.Semaphore(0)

    def hear(which: int) -> Callable[[Event], None]:
        def heard(event: Event) -> None:
            if isinstance(event, Piece):
                found[which].append(event.token)
                if event.finish_reason is not None:
                    over.release()

        return heard

    engine = BatchEngine({"m": model}, tokenizer, max_batch=2, prefill_step_size=8)
    try:
        for which, prompt in enumerate(prompts):
            engine.submit(Job("m", prompt, 16), hear(which))
        assert all(over.acquire(timeout=60) for _ in prompts)
    finally:
        engine.close(0)
    with cpu():
        for which, prompt in enumerate(prompts):
            assert list(generate_step(list(prompt), model, max_tokens=16)) == found[which]


# ---- Metal itself


@metal_itself
def test_weights_are_wired_and_the_limit_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    megabyte, weights = 1 << 20, nn.Linear(1024, 1024, bias=False)
    mx.eval(weights.parameters())
    before = mx.set_wired_limit(megabyte)
    with limits():
        wire(weights)  # far from all that Metal allows
        assert mx.set_wired_limit(0) == 0
        monkeypatch.setattr("mlx_cerebrum.model.limits._NEAR", 0.0)
        wire(weights)
        assert mx.set_wired_limit(0) == 4 * megabyte
    assert mx.set_wired_limit(before) == megabyte


@metal_itself
def test_available_memory_is_the_working_set_less_what_is_held() -> None:
    limit = int(device.gpu_info()["max_recommended_working_set_size"])
    assert 0 < available_bytes() <= limit
