"""Workers name the stream of what they compute: MLX's default device is all threads'."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import MakeCheckpoint

from convert.__main__ import main
from mlx_cerebrum.weights.quantize import Packing

UNPACKING = {5: {"dequantize"}, 4: {"bitwise_and", "right_shift", "stack", "multiply", "add"}}
COMPUTING = ("quantize", "split", "zeros", "slice_update", *set.union(*UNPACKING.values()))


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What workers had computed; each must have said where, and nobody changes the default."""
    found: set[str] = set()

    def watched(name: str, run: Any) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            if threading.current_thread().name.startswith("transform"):
                assert isinstance(more.get("stream"), mx.Stream), name
                found.add(name)
            return run(*args, **more)

        return call

    for name in COMPUTING:
        monkeypatch.setattr(mx, name, watched(name, getattr(mx, name)))
    for name in ("stream", "set_default_device", "set_default_stream"):
        monkeypatch.setattr(mx, name, lambda *_: pytest.fail("the default is changed"))
    return found


def test_the_default_device_is_never_changed(
    checkpoint: MakeCheckpoint, plan_file: Callable[..., Path], tmp_path: Path, named: set[str]
) -> None:
    source, plan = checkpoint(), plan_file(scale="{scale: 0.5}", dtype="bfloat16")
    packed = ["-q", "--q-bits", "4", "--q-group-size", "32"]
    unrolled = ["--layout", "unrolled", "--plan", str(plan)]
    for number, flags in enumerate((unrolled, packed)):
        words = ["--hf-path", source, "--mlx-path", tmp_path / str(number), *flags, "--quiet"]
        assert main([str(word) for word in words]) == 0
    words = ["--hf-path", tmp_path / "1", "--mlx-path", tmp_path / "2", "--dequantize", "--quiet"]
    assert main([str(word) for word in words]) == 0
    assert named >= {"quantize"} | UNPACKING[4]


@pytest.mark.parametrize("bits", UNPACKING)
def test_a_large_matrix_is_unpacked_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, named: set[str], bits: int
) -> None:
    monkeypatch.setattr("mlx_cerebrum.weights.quantize.PIECE", 3 * 64)
    weight = mx.random.normal((10, 64)).astype(mx.float16)
    arrays = Packing(bits, 32).quantize(weight)
    expected = np.array(Packing(bits, 32).dequantize(arrays, mx.float32))
    mx.eval(arrays)
    done: list[Any] = []

    def run() -> None:
        dense = Packing(bits, 32).dequantize(arrays, mx.float32, mx.new_stream(mx.cpu))
        done.append(np.array(dense))

    thread = threading.Thread(target=run, name="transform")
    thread.start()
    thread.join()
    np.testing.assert_array_equal(done[0], expected)
    assert named == {"split", "zeros", "slice_update"} | UNPACKING[bits]
