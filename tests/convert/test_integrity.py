"""Hashing and looking for NaN and Inf while a file is read."""

import hashlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert import integrity
from convert.integrity import HashedFile, expected_sha256, nonfinite
from mlx_cerebrum.errors import CheckpointError

# Extremes of each dtype, as bits: NaN and Inf of both signs, and the nearest finite values.
BAD = {
    "F16": (0x7C00, 0xFC00, 0x7C01, 0xFC01, 0x7FFF, 0xFFFF),
    "BF16": (0x7F80, 0xFF80, 0x7F81, 0xFF81, 0x7FFF, 0xFFFF),
    "F32": (0x7F800000, 0xFF800000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF),
}
GOOD = {
    "F16": (0, 0x8000, 0x7BFF, 0xFBFF, 1, 0x8001),
    "BF16": (0, 0x8000, 0x7F7F, 0xFF7F, 1, 0x8001),
    "F32": (0, 0x80000000, 0x7F7FFFFF, 0xFF7FFFFF, 1, 0x80000001),
}


def values(bits: Any, dtype: str) -> npt.NDArray[np.uint8]:
    return np.array(bits, np.uint32 if dtype == "F32" else np.uint16).view(np.uint8)


@pytest.mark.parametrize("dtype", BAD)
def test_every_kind_of_nan_and_infinity_is_counted(dtype: str) -> None:
    assert nonfinite(values(GOOD[dtype], dtype), dtype) == 0
    for bad in BAD[dtype]:
        assert nonfinite(values([*GOOD[dtype], bad], dtype), dtype) == 1
    assert nonfinite(values([*BAD[dtype], *GOOD[dtype]], dtype), dtype) == len(BAD[dtype])


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(("F16", "F32", "BF16")), st.binary(max_size=400))
def test_nonfinite_agrees_with_numpy(dtype: str, raw: bytes) -> None:
    data = np.frombuffer(raw[: len(raw) // 4 * 4], np.uint8)
    floats: npt.NDArray[Any]
    if dtype == "BF16":  # the upper half of a float32
        floats = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        floats = data.view(np.float16 if dtype == "F16" else np.float32)
    assert nonfinite(data, dtype) == np.count_nonzero(~np.isfinite(floats))


@pytest.mark.parametrize("dtype", ["U32", "U8", "I64", "F8_E4M3"])
def test_other_dtypes_have_nothing_to_look_for(dtype: str) -> None:
    assert nonfinite(np.full(64, 0xFF, np.uint8), dtype) == 0


def test_values_need_no_alignment() -> None:
    whole = np.zeros(4 * 100 + 1, np.uint8)
    whole[1:] = values([0x7F800000] * 100, "F32")
    assert nonfinite(whole[1:], "F32") == 100


@pytest.fixture(params=["inline", "threaded"])
def executor(request: pytest.FixtureRequest) -> Iterator[ThreadPoolExecutor | None]:
    if request.param == "inline":
        yield None
        return
    with ThreadPoolExecutor(1) as pool:
        yield pool


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    size=st.integers(0, 300),
    reads=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 120)), max_size=8),
)
def test_any_order_of_reads_gives_the_files_hash(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    executor: ThreadPoolExecutor | None,
    size: int,
    reads: list[tuple[int, int]],
) -> None:
    monkeypatch.setattr(integrity, "PIECE", 16)
    content = np.random.default_rng(size).bytes(size)
    path = tmp_path / "file"
    path.write_bytes(content)
    with HashedFile(path, executor=executor) as file:
        for offset, nbytes in reads:
            if offset + nbytes <= size:
                assert file.read(offset, nbytes).tobytes() == content[offset : offset + nbytes]
            else:
                with pytest.raises(CheckpointError, match="is truncated, or changed while"):
                    file.read(offset, nbytes)
        assert file.finish() == hashlib.sha256(content).hexdigest()


def test_a_byte_is_hashed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executor: ThreadPoolExecutor | None
) -> None:
    class Counting:
        def __init__(self) -> None:
            self.seen = b""

        def update(self, data: memoryview) -> None:
            self.seen += bytes(data)

        def hexdigest(self) -> str:
            return "done"

    digest = Counting()
    monkeypatch.setattr(hashlib, "sha256", lambda: digest)
    path = tmp_path / "file"
    path.write_bytes(bytes(range(200)))
    with HashedFile(path, executor=executor) as file:
        for offset, nbytes in ((8, 20), (0, 30), (25, 50), (100, 10), (90, 40)):
            file.read(offset, nbytes)
        assert file.finish() == "done"
    assert digest.seen == bytes(range(200))


def test_without_verify_only_what_is_asked_for_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashlib, "sha256", lambda: pytest.fail("hashed"))
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    with path.open("r+b") as writer, HashedFile(path, verify=False) as file:
        assert file.read(90, 10).tobytes() == bytes(10)
        writer.seek(0)
        assert file.finish() is None


def test_what_is_read_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(8))
    with HashedFile(tmp_path / "file") as file:
        data = file.read(0, 8)
    with pytest.raises(ValueError, match="read-only"):
        data[0] = 1


def test_a_file_cut_while_it_is_read(tmp_path: Path, executor: ThreadPoolExecutor | None) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    with HashedFile(path, executor=executor) as file:
        os.truncate(path, 50)
        with pytest.raises(CheckpointError, match=r"is truncated, or changed .* 50 bytes, not 60"):
            file.read(40, 20)


def test_a_file_changed_after_it_was_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    os.utime(path, ns=(0, 0))
    with HashedFile(path) as file:
        file.read(0, 100)
        path.write_bytes(bytes(100))
        with pytest.raises(CheckpointError, match="changed while it was read"):
            file.finish()


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="can't be read: No such file"):
        HashedFile(tmp_path / "file")


def test_an_error_in_the_hash_thread_surfaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def update(self, data: memoryview) -> None:
            raise MemoryError("no room")

    monkeypatch.setattr(hashlib, "sha256", Broken)
    (tmp_path / "file").write_bytes(bytes(8))
    with ThreadPoolExecutor(1) as pool, HashedFile(tmp_path / "file", executor=pool) as file:
        file.read(0, 8)
        with pytest.raises(MemoryError):
            file.finish()


def test_few_pieces_wait_to_be_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading must stop while the hash lags, or the queue would hold the whole file."""
    monkeypatch.setattr(integrity, "PIECE", 10)
    (tmp_path / "file").write_bytes(bytes(1000))
    gate, most = threading.Event(), 0

    class Slow:
        def update(self, data: memoryview) -> None:
            assert gate.wait(10)

        def hexdigest(self) -> str:
            return "done"

    monkeypatch.setattr(hashlib, "sha256", Slow)
    with ThreadPoolExecutor(1) as pool, HashedFile(tmp_path / "file", executor=pool) as file:
        submit = pool.submit

        def counted(*args: Any) -> Any:
            nonlocal most
            most = max(most, len(file._waiting) + 1)
            if most == integrity._QUEUED:
                gate.set()  # the first that would not fit has to wait for this
            return submit(*args)

        monkeypatch.setattr(pool, "submit", counted)
        file.read(0, 1000)
        assert file.finish() == "done"
    assert most == integrity._QUEUED


SHA = "ab" * 32


def test_the_hubs_cache_names_a_blob_by_its_hash(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "c0ffee"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for name, blob in (("model.safetensors", SHA), ("config.json", "cd" * 20)):
        (blobs / blob).write_bytes(b"x")
        (snapshot / name).symlink_to(Path("../../blobs") / blob)
    assert expected_sha256(snapshot / "model.safetensors") == SHA
    assert expected_sha256(snapshot / "config.json") is None  # a git hash, not SHA-256
    (tmp_path / SHA).write_bytes(b"x")
    assert expected_sha256(tmp_path / SHA) is None  # the name alone says nothing


def test_a_local_dir_download_has_its_hash_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x")
    assert expected_sha256(file) is None
    note = tmp_path / ".cache" / "huggingface" / "download" / "model.safetensors.metadata"
    note.parent.mkdir(parents=True)
    saved = file.stat().st_mtime
    note.write_text(f"c0ffee\n{SHA}\n{saved}\n")
    assert expected_sha256(file) == SHA
    os.utime(file, (saved + 60, saved + 60))
    assert expected_sha256(file) is None  # edited since
    note.write_text("nonsense")
    assert expected_sha256(file) is None
