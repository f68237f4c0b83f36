"""Damaged sources, given to the real command line: one line each, nothing written, nothing lost."""

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeCheckpoint
from damage import flip, hub_copy
from safetensors.numpy import load_file, save_file

from convert.__main__ import main
from mlx_cerebrum.weights.safetensors_checkpoint import INDEX

FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"
WHOLE = "model.safetensors"
WEIGHT = "model.layers.3.mlp.up_proj.weight"
NORM = "model.layers.5.input_layernorm.weight"
# Every way the bytes can go: copied as they are, cast, packed, laid out anew.
WAYS = {
    "copied": [],
    "cast": ["--dtype", "float16"],
    "packed": ["-q", "--q-group-size", "32"],
    "unrolled": ["--layout", "unrolled"],
}


def contents(root: Path) -> dict[str, tuple[int, str]]:
    """Everything under a directory: time of change and hash, by path."""
    return {
        str(path.relative_to(root)): (
            path.lstat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in sorted(root.rglob("*"))
    }


Refusal = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refusal:
    """`refused(source, *flags)` converts, and returns the one line that refuses to.

    Nothing may appear beside the source, and nothing of it may change.
    """

    def convert(source: Path, *flags: str) -> str:
        before = contents(tmp_path)
        capsys.readouterr()
        code = main(["--hf-path", str(source), "--mlx-path", str(tmp_path / "out"), *flags])
        out, err = capsys.readouterr()
        assert code == 2, err
        assert contents(tmp_path) == before
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    return convert


@pytest.fixture
def accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """`accepted(source, *flags)` converts, and returns the provenance of what is written."""

    def convert(source: Path, *flags: str) -> dict[str, Any]:
        out = tmp_path / "out"
        assert main(["--hf-path", str(source), "--mlx-path", str(out), "--quiet", *flags]) == 0
        provenance: dict[str, Any] = json.loads((out / "config.json").read_text())["provenance"]
        return provenance

    return convert


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header: dict[str, Any] = json.loads(raw[8 : 8 + length])
    return header, raw[8 + length :]


def write(file: Path, header: str, data: bytes) -> None:
    text = header.encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def set_values(file: Path, name: str, *values: float) -> None:
    tensors = dict(load_file(file))
    tensors[name].reshape(-1)[: len(values)] = values
    save_file(tensors, file, {"format": "pt"})


def holder(source: Path, name: str) -> Path:
    index = json.loads((source / INDEX).read_text())
    return source / str(index["weight_map"][name])


# Headers and lengths.


@pytest.mark.parametrize("lost", [1, 5000, -8, 0])
def test_a_truncated_file(checkpoint: MakeCheckpoint, refused: Refusal, lost: int) -> None:
    """By a byte, by more than a tensor, to its first 8 bytes, to none."""
    source = checkpoint(shards=2)
    size = (source / SECOND).stat().st_size
    os.truncate(source / SECOND, size - lost if lost > 0 else -lost)
    assert f"{SECOND} is {'truncated' if lost else 'empty'}" in refused(source)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**63 + 7, 10**9, 40])
def test_a_header_length_that_lies(
    checkpoint: MakeCheckpoint, refused: Refusal, length: int
) -> None:
    """Negative as signed integers, huge, past the end, too short."""
    source = checkpoint()
    with (source / WHOLE).open("r+b") as file:
        file.write(struct.pack("<Q", length))
    assert WHOLE in refused(source)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ((-8, -8), "has no valid shape and offsets"),  # before the data
        ((8, 0), "bytes, but its dtype"),
        ((0, 8), "bytes, but its dtype"),
        ((4, 4), "overlaps another tensor or leaves a gap"),
        ((2**62, 2**62), "overlaps another tensor or leaves a gap"),
        ((2**64, 2**64), "overlaps another tensor or leaves a gap"),
    ],
)
def test_offsets_that_lie(
    checkpoint: MakeCheckpoint, refused: Refusal, change: tuple[int, int], says: str
) -> None:
    source = checkpoint()
    header, data = header_of(source / WHOLE)
    first = min((n for n in header if n[0] != "_"), key=lambda n: header[n]["data_offsets"])
    start, stop = header[first]["data_offsets"]
    header[first]["data_offsets"] = [start + change[0], stop + change[1]]
    write(source / WHOLE, json.dumps(header), data)
    line = refused(source)
    assert says in line
    assert f"{WHOLE}: " in line


def test_tensors_that_overlap(checkpoint: MakeCheckpoint, refused: Refusal) -> None:
    source = checkpoint()
    header, data = header_of(source / WHOLE)
    a, b = (f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1))
    header[a]["data_offsets"] = header[b]["data_offsets"]
    write(source / WHOLE, json.dumps(header), data)
    assert "overlaps another tensor" in refused(source)


def test_a_header_that_promises_more_than_there_is(
    checkpoint: MakeCheckpoint, refused: Refusal
) -> None:
    source = checkpoint()
    header, data = header_of(source / WHOLE)
    last = max((n for n in header if n[0] != "_"), key=lambda n: header[n]["data_offsets"])
    entry = header[last]
    entry["shape"][0] += 1000
    entry["data_offsets"][1] += 4 * 1000 * int(np.prod(entry["shape"][1:], dtype=int))
    write(source / WHOLE, json.dumps(header), data)
    assert f"{WHOLE} is truncated" in refused(source)


def test_a_name_twice_in_one_file(checkpoint: MakeCheckpoint, refused: Refusal) -> None:
    source = checkpoint()
    header, data = header_of(source / WHOLE)
    again = f', "{WEIGHT}": {json.dumps(header[WEIGHT])}}}'
    write(source / WHOLE, json.dumps(header)[:-1] + again, data)
    assert f"{WHOLE}: the header names {WEIGHT!r} twice" in refused(source)


def test_a_name_in_two_files(checkpoint: MakeCheckpoint, refused: Refusal) -> None:
    source = checkpoint(shards=2)
    value = load_file(holder(source, WEIGHT))[WEIGHT]
    other = source / (FIRST if holder(source, WEIGHT).name == SECOND else SECOND)
    save_file({**load_file(other), WEIGHT: value}, other, {"format": "pt"})
    assert f"{WEIGHT} is in both {FIRST} and {SECOND}" in refused(source)


# The index and the shards.


def test_a_missing_shard(checkpoint: MakeCheckpoint, refused: Refusal) -> None:
    source = checkpoint(shards=2)
    (source / SECOND).unlink()
    assert f"{SECOND} is missing" in refused(source)


def test_a_link_to_a_blob_that_is_gone(checkpoint: MakeCheckpoint, refused: Refusal) -> None:
    source = checkpoint(shards=2)
    (source / SECOND).unlink()
    (source / SECOND).symlink_to("../blobs/gone")
    assert f"{SECOND} is missing" in refused(source)


@pytest.mark.parametrize("missing", [False, True])
def test_an_index_that_disagrees(
    checkpoint: MakeCheckpoint, refused: Refusal, missing: bool
) -> None:
    """A tensor that is in the other shard, or in none."""
    source = checkpoint(shards=2)
    index = json.loads((source / INDEX).read_text())
    if missing:
        file = holder(source, WEIGHT)
        tensors = load_file(file)
        del tensors[WEIGHT]
        save_file(tensors, file, {"format": "pt"})
    else:
        was = index["weight_map"][WEIGHT]
        index["weight_map"][WEIGHT] = FIRST if was == SECOND else SECOND
        (source / INDEX).write_text(json.dumps(index))
    line = refused(source)
    assert f"{INDEX} says {WEIGHT} is in {index['weight_map'][WEIGHT]}; it is not" in line


@pytest.mark.parametrize("file", ["../source.safetensors", "/etc/passwd", "model.bin", "", 7, None])
def test_an_index_that_points_elsewhere(
    checkpoint: MakeCheckpoint, refused: Refusal, file: Any
) -> None:
    source = checkpoint(shards=2)
    index = json.loads((source / INDEX).read_text())
    index["weight_map"][WEIGHT] = file
    (source / INDEX).write_text(json.dumps(index))
    assert f"{WEIGHT} is said to be in {file!r}" in refused(source)


# Values.


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(
    checkpoint: MakeCheckpoint,
    refused: Refusal,
    accepted: Callable[..., dict[str, Any]],
    plan_file: Callable[..., Path],
    way: str,
    value: float,
) -> None:
    source = checkpoint(shards=2)
    name = NORM if way == "packed" else WEIGHT  # NaN in packed weights is another's business
    set_values(holder(source, name), name, value)
    flags = [*WAYS[way], "--plan", str(plan_file())]
    line = refused(source, *flags)
    assert name in line
    assert "--allow-nonfinite" in line
    provenance = accepted(source, *flags, "--allow-nonfinite")
    assert any(name in note for note in provenance["notes"])
    assert provenance["verified"] is True


@pytest.mark.parametrize("way", ["copied", "unrolled"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_no_verify_looks_at_nothing(
    checkpoint: MakeCheckpoint,
    accepted: Callable[..., dict[str, Any]],
    tmp_path: Path,
    way: str,
    dtype: Any,
) -> None:
    source = checkpoint(dtype=dtype)
    set_values(source / WHOLE, WEIGHT, np.nan)
    provenance = accepted(source, *WAYS[way], "--no-verify")
    assert provenance["verified"] is False
    written: dict[str, Any] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        written |= load_file(file)
    assert np.isnan(written[WEIGHT].reshape(-1)[0])


@pytest.mark.parametrize("way", WAYS)
def test_a_nan_in_the_last_value_of_the_last_tensor(
    checkpoint: MakeCheckpoint, refused: Refusal, way: str
) -> None:
    source = checkpoint()
    header, _ = header_of(source / WHOLE)
    last = max((n for n in header if n[0] != "_"), key=lambda n: header[n]["data_offsets"])
    with (source / WHOLE).open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(struct.pack("<f", float("nan")))
    assert last in refused(source, *WAYS[way])


@pytest.mark.parametrize("layout", ["folded", "unrolled"])
@pytest.mark.parametrize("name", [WEIGHT, NORM])
def test_a_cast_that_overflows(
    checkpoint: MakeCheckpoint,
    refused: Refusal,
    accepted: Callable[..., dict[str, Any]],
    layout: str,
    name: str,
) -> None:
    source = checkpoint()
    set_values(source / WHOLE, name, 70000.0)
    flags = ["--dtype", "float16", "--layout", layout]
    line = refused(source, *flags)
    assert name in line
    assert "float16" in line
    accepted(source, *flags, "--allow-nonfinite")


def test_a_cast_that_does_not_overflow(
    checkpoint: MakeCheckpoint, accepted: Callable[..., dict[str, Any]]
) -> None:
    source = checkpoint()
    set_values(source / WHOLE, WEIGHT, 65504.0, -65504.0)
    accepted(source, "--dtype", "float16")


def test_a_scale_that_overflows(
    checkpoint: MakeCheckpoint, refused: Refusal, plan_file: Callable[..., Path]
) -> None:
    source = checkpoint(dtype=np.float16)
    set_values(source / WHOLE, WEIGHT, 40000.0)
    plan = plan_file("0-8", scale="{scale: 2.0}")
    assert "mlp.up_proj.weight" in refused(source, "--plan", str(plan), "--layout", "unrolled")


# Bits.


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("at", [-4, -300_000])
def test_a_bit_that_flipped_since_the_download(
    checkpoint: MakeCheckpoint,
    tmp_path: Path,
    refused: Refusal,
    accepted: Callable[..., dict[str, Any]],
    way: str,
    at: int,
) -> None:
    snapshot = hub_copy(checkpoint(shards=2), tmp_path)
    blob = (snapshot / SECOND).resolve()
    flip(blob, blob.stat().st_size + at)
    line = refused(snapshot, *WAYS[way])
    assert SECOND in line
    assert "SHA-256" in line
    accepted(snapshot, *WAYS[way], "--no-verify")


def test_a_sound_download(
    checkpoint: MakeCheckpoint, tmp_path: Path, accepted: Callable[..., dict[str, Any]]
) -> None:
    snapshot = hub_copy(checkpoint(shards=2), tmp_path)
    provenance = accepted(snapshot)
    for file in (FIRST, SECOND):
        assert provenance["source_sha256"][file] == (snapshot / file).resolve().name


@pytest.mark.parametrize("way", ["copied", "unrolled"])
def test_a_bit_that_flipped_since_our_own_conversion(
    checkpoint: MakeCheckpoint,
    plan_file: Callable[..., Path],
    tmp_path: Path,
    refused: Refusal,
    accepted: Callable[..., dict[str, Any]],
    way: str,
) -> None:
    ours = tmp_path / "ours"
    common = ["--hf-path", str(checkpoint()), "--plan", str(plan_file()), "--quiet"]
    assert main([*common, "--mlx-path", str(ours)]) == 0
    [file] = ours.glob("*.safetensors")
    flip(file, file.stat().st_size - 4)
    line = refused(ours, *WAYS[way])
    assert file.name in line
    assert "provenance" in line
    accepted(ours, *WAYS[way], "--no-verify")


# What is there already.


@pytest.mark.parametrize("way", WAYS)
def test_a_used_folder_is_left_alone(
    checkpoint: MakeCheckpoint,
    refused: Refusal,
    accepted: Callable[..., dict[str, Any]],
    plan_file: Callable[..., Path],
    way: str,
) -> None:
    source = checkpoint()
    accepted(source, *WAYS[way])
    assert "exists already" in refused(source, *WAYS[way])
    assert "exists already" in refused(source, "--plan", str(plan_file()), "-q")


def test_an_empty_folder_is_left_alone_too(
    checkpoint: MakeCheckpoint, tmp_path: Path, refused: Refusal
) -> None:
    source = checkpoint()
    (tmp_path / "out").mkdir()
    assert "exists already" in refused(source)


def test_a_link_that_leads_nowhere_is_left_alone(
    checkpoint: MakeCheckpoint, tmp_path: Path, refused: Refusal
) -> None:
    source = checkpoint()
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    assert "exists already" in refused(source)
