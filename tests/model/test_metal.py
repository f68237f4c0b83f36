"""What only a Mac can show: run there, skipped elsewhere."""

import mlx.core as mx
import pytest
from conftest import MakeCheckpoint

from mlx_cerebrum import device, load
from mlx_cerebrum.decoding.decoder import generate_step
from mlx_cerebrum.model.forward import swiglu
from mlx_cerebrum.model.limits import limits
from mlx_cerebrum.model.memory import available_bytes

pytestmark = [
    pytest.mark.metal,
    pytest.mark.skipif(device.backend() != "metal", reason="needs Metal (macOS arm64)"),
]


def test_the_compiled_activation_is_the_plain_one() -> None:
    gate, up = mx.random.normal((2, 3, 64)), mx.random.normal((2, 3, 64))
    assert mx.allclose(swiglu(gate, up), gate * mx.sigmoid(gate) * up, atol=1e-6)


def test_wired_limit_is_set_and_put_back() -> None:
    megabyte = 1 << 20
    before = mx.set_wired_limit(megabyte)
    with limits():
        inside = mx.set_wired_limit(0)
    assert inside == device.gpu_info()["max_recommended_working_set_size"]
    assert mx.set_wired_limit(before) == megabyte


def test_available_memory_is_the_working_set_less_what_is_held() -> None:
    limit = int(device.gpu_info()["max_recommended_working_set_size"])
    assert 0 < available_bytes() <= limit


@pytest.mark.parametrize("q_bits", [None, 4, 8])
def test_stored_dtype_and_packing_are_kept(checkpoint: MakeCheckpoint, q_bits: int | None) -> None:
    model, _ = load(checkpoint(), q_bits=q_bits, q_group_size=32)
    assert model.dtype == mx.float32
    packed = model.model.layers[0].self_attn.qkv_proj.weight.dtype == mx.uint32
    assert packed is (q_bits is not None)


def test_gpu_and_cpu_choose_the_same_tokens(checkpoint: MakeCheckpoint) -> None:
    model, _ = load(checkpoint(), dtype="float32")
    prompt = [5, 80, 44, 120, 7, 99, 201]
    gpu = list(generate_step(prompt, model, max_tokens=40))
    with mx.stream(mx.cpu):
        assert list(generate_step(prompt, model, max_tokens=40)) == gpu
