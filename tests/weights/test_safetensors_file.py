"""Safetensors as it is written, read by others and by us; the samples of an array's bytes."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load

from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.weights.checkpoint import Extent
from mlx_cerebrum.weights.safetensors_file import (
    CODES,
    ITEM_BYTES,
    header_bytes,
    read_whole_header,
)


def test_a_header_is_the_formats(tmp_path: Path) -> None:
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "empty": np.zeros((0, 4), np.uint8),
        "one": np.array([7], np.uint32),
        'a "name"\u00e9': np.array(2.5, np.float16),
    }
    codes = {"float32": "F32", "uint8": "U8", "uint32": "U32", "float16": "F16"}
    described = {name: (codes[array.dtype.name], array.shape) for name, array in arrays.items()}
    head = header_bytes(described, {"format": "pt"})
    data = head + b"".join(array.tobytes() for array in arrays.values())
    assert len(head) % 8 == 0
    found = load(data)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    tensors, metadata = read_whole_header(path)
    assert metadata == {"format": "pt"}
    assert {name: (t.dtype, t.shape) for name, t in tensors.items()} == described


@pytest.mark.parametrize("dtype", CODES)
def test_the_codes_are_mlxs_own(dtype: mx.Dtype, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    mx.save_safetensors(str(path), {"a": mx.zeros((3,), dtype)})
    found = read_whole_header(path)[0]["a"]
    assert (found.dtype, found.nbytes) == (CODES[dtype], 3 * dtype.size)
    assert ITEM_BYTES[CODES[dtype]] == dtype.size


def test_samples_are_spread_from_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(range(100)))
    assert [*Extent(path, 10, 60).samples(3, 4)] == [
        bytes(range(10, 14)),
        bytes(range(38, 42)),
        bytes(range(66, 70)),
    ]
    assert [*Extent(path, 10, 2).samples(3, 4)] == [bytes([10, 11])] * 3
    path.unlink()
    with pytest.raises(CheckpointError, match="x can't be read: No such file"):
        next(Extent(path, 10, 60).samples(3, 4))
