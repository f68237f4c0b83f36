"""`convert verify`: sound checkpoints of every tool pass, and each fault is found, with others."""

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import MakeCheckpoint, slow
from damage import flip
from safetensors.numpy import load_file, save_file

from convert import verify as module
from convert.__main__ import main as convert
from convert.verify import main, verify
from mlx_cerebrum.weights.safetensors_checkpoint import INDEX

FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"
WEIGHT = "model.layers.1.mlp.up_proj.weight"


def problems(path: Path) -> list[str]:
    result = verify(path)
    assert result["sound"] is (not result["problems"])
    return [
        line.removeprefix("problem").strip()
        for line in module.lines(result)
        if "problem" in line[:8]
    ]


def edit(path: Path, **changes: Any) -> None:
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (raw | changes).items() if v is not ...}))


def rewrite(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors: dict[str, Any] = dict(load_file(file))
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def poison(file: Path, name: str, *values: float) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors[name].reshape(-1)[: len(values)] = values

    rewrite(file, change)


def holder(path: Path, name: str) -> Path:
    """The file of a sharded checkpoint that has this tensor."""
    index = json.loads((path / INDEX).read_text())
    return path / str(index["weight_map"][name])


# Sound checkpoints.


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--layout", "unrolled"],
        ["-q", "--q-group-size", "32"],
        ["--layout", "unrolled", "-q", "--q-group-size", "32", "--dtype", "bfloat16"],
    ],
)
def test_what_we_write_is_sound(
    checkpoint: MakeCheckpoint, plan_file: Callable[..., Path], tmp_path: Path, flags: list[str]
) -> None:
    common = ["--hf-path", str(checkpoint(shards=2)), "--plan", str(plan_file()), "--quiet"]
    assert convert([*common, "--mlx-path", str(tmp_path / "o"), *flags]) == 0
    result = verify(tmp_path / "o")
    assert result["problems"] == []
    assert result["unchecked"] == []
    files = list((tmp_path / "o").glob("*.safetensors"))
    assert set(result["files"]) == {file.name for file in files}
    for file in files:
        entry = result["files"][file.name]
        assert entry["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert entry["compared_with"] == ["provenance"]
        assert entry["bytes"] == file.stat().st_size


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_plain_directory_is_sound(checkpoint: MakeCheckpoint, shards: int, dtype: Any) -> None:
    source = checkpoint(shards=shards, dtype=dtype)
    before = {file: file.stat().st_mtime_ns for file in source.iterdir()}
    result = verify(source)
    assert result["problems"] == []
    assert any("none recorded" in line for line in result["unchecked"])
    assert before == {file: file.stat().st_mtime_ns for file in source.iterdir()}


def test_what_mlx_lm_writes_is_sound(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    from mlx_lm.convert import convert as mlx_lm_convert

    source = checkpoint(dtype=np.float16)
    mlx_lm_convert(str(source), str(tmp_path / "t"), quantize=True, q_group_size=32, q_bits=4)
    assert problems(tmp_path / "t") == []


@slow
def test_a_gguf_file_is_sound(demo: Path) -> None:
    seen: list[tuple[int, int]] = []
    result = verify(demo, lambda done, total: seen.append((done, total)))
    assert result["problems"] == []
    assert result["tensors"] == 272
    size = demo.stat().st_size
    assert result["bytes"] == size
    assert seen == sorted(seen)
    assert seen[-1] == (size, size)


# Faults.


def test_every_fault_is_reported(checkpoint: MakeCheckpoint) -> None:
    source = checkpoint(shards=2)
    poison(holder(source, WEIGHT), WEIGHT, np.nan, np.inf, -np.inf)
    poison(holder(source, "model.norm.weight"), "model.norm.weight", np.nan)
    edit(source / INDEX, metadata={"total_size": 12})
    edit(source / "config.json", vocab_size=200)
    (source / "model.safetensors").write_bytes(b"old")
    found = problems(source)
    for text in (
        f"NaN or infinite: {WEIGHT} (3), model.norm.weight (1)",
        "wrong shape: model.embed_tokens.weight is [260, 64], not [200, 64]",
        "model.safetensors: is truncated",
        "model.safetensors: the index does not list it, but transformers would read it alone",
    ):
        assert sum(text in line for line in found) == 1, (text, found)
    assert len(found) == 4
    assert "the tokenizer has 259 tokens, the model 200" in verify(source)["notes"]
    assert any(f"{INDEX}: total_size is 12, the" in note for note in verify(source)["notes"])


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_nan_in_16_bits(checkpoint: MakeCheckpoint, dtype: str) -> None:
    source = checkpoint()
    weights = mx.load(str(source / "model.safetensors"))
    assert isinstance(weights, dict)
    kind = mx.float16 if dtype == "F16" else mx.bfloat16
    weights = {name: value.astype(kind) for name, value in weights.items()}
    weights[WEIGHT][5, 5] = float("inf")
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    assert problems(source) == [f"model.safetensors: values that are NaN or infinite: {WEIGHT} (1)"]


def test_a_tensor_of_many_pieces(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint()
    monkeypatch.setattr(module, "PIECE", 1000)
    values = np.zeros(128 * 64, np.float32)
    values[[0, 300, -1]] = np.nan
    poison(source / "model.safetensors", WEIGHT, *values)
    [only] = problems(source)
    assert only.endswith(f": {WEIGHT} (3)")


def test_nan_in_the_scales_of_packed_weights(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    out = tmp_path / "q"
    common = ["--hf-path", str(checkpoint()), "--quiet", "--mlx-path", str(out)]
    assert convert([*common, "-q", "--q-group-size", "32"]) == 0
    file = out / "model-00001-of-00001.safetensors"
    name = WEIGHT.replace("weight", "biases")
    poison(file, name, np.nan)
    found = problems(out)
    assert any(f"NaN or infinite: {name} (1)" in line for line in found)
    assert any("SHA-256" in line for line in found)


def test_a_flipped_bit_is_found_by_the_provenance(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    out = tmp_path / "o"
    assert convert(["--hf-path", str(checkpoint()), "--quiet", "--mlx-path", str(out)]) == 0
    file = out / "model-00001-of-00001.safetensors"
    flip(file, file.stat().st_size - 20_000)
    [only] = problems(out)
    assert only.startswith(f"{file.name}: its SHA-256 is ")
    assert "provenance" in only


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_flipped_bit_is_found_by_the_hubs_hash(
    checkpoint: MakeCheckpoint, tmp_path: Path, name: str
) -> None:
    source, snapshot = checkpoint(), tmp_path / "repo" / "snapshots" / "c0ffee"
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in source.iterdir():
        data = file.read_bytes()
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        blob = hashlib.sha256(data).hexdigest() if file.suffix == ".safetensors" else git
        (blobs / blob).write_bytes(data)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob)
    result = verify(snapshot)
    assert result["problems"] == []
    assert result["unchecked"] == []
    assert (
        "the hub's hashes of config.json, tokenizer.json, tokenizer_config.json"
        in (result["checked"])
    )
    target = (snapshot / name).resolve()
    if name == "config.json":
        target.write_bytes(target.read_bytes() + b" ")  # sound, but not the hub's
    elif name == "tokenizer.json":
        target.write_bytes(target.read_bytes().replace(b"<unk>", b"<unK>"))
    else:
        flip(target, target.stat().st_size - 20_000)
    found = problems(snapshot)
    assert [line for line in found if line.startswith(f"{name}: its ")], found
    assert all("hub gave" in line for line in found)


def test_a_blob_that_is_gone(checkpoint: MakeCheckpoint) -> None:
    source = checkpoint(shards=2)
    (source / SECOND).unlink()
    (source / SECOND).symlink_to("../blobs/gone")
    found = problems(source)
    assert any(line.startswith(f"{SECOND}: can't be read") for line in found)


@pytest.mark.parametrize("shards", [1, 2])
def test_truncated(checkpoint: MakeCheckpoint, shards: int) -> None:
    source = checkpoint(shards=shards)
    file = sorted(source.glob("*.safetensors"))[0]
    os.truncate(file, file.stat().st_size - 1)
    [only] = problems(source)
    assert only.startswith(f"{file.name}: is truncated")
    assert str(source) not in only


@pytest.mark.parametrize("length", [2**63 + 5, 2**64 - 1, 10**9, 3])
def test_header_lengths_that_lie(checkpoint: MakeCheckpoint, length: int) -> None:
    source = checkpoint()
    with (source / "model.safetensors").open("r+b") as file:
        file.write(struct.pack("<Q", length))
    assert problems(source)[0].startswith("model.safetensors: ")


def test_a_missing_shard(checkpoint: MakeCheckpoint) -> None:
    source = checkpoint(shards=2)
    (source / SECOND).unlink()
    found = problems(source)
    assert f"{INDEX}: {SECOND} is missing, but the index lists it" in found[0]
    assert any(line.startswith("tensors missing: ") and "more" in line for line in found)


def test_an_index_that_disagrees_both_ways(checkpoint: MakeCheckpoint) -> None:
    source = checkpoint(shards=2)
    index = json.loads((source / INDEX).read_text())["weight_map"]
    moved = next(name for name, file in index.items() if file == FIRST)
    absent = {name: file for name, file in index.items() if name != "model.norm.weight"}
    edit(source / INDEX, weight_map=absent | {moved: SECOND})
    found = problems(source)
    assert f"{INDEX}: the index says {SECOND} holds tensors it does not: {moved}" in found
    notes = [note for note in verify(source)["notes"] if "does not place there" in note]
    assert any(note.startswith(FIRST) for note in notes)


@pytest.mark.parametrize("file", ["../outside.safetensors", "weights.bin", 5])
def test_an_index_that_points_elsewhere(checkpoint: MakeCheckpoint, file: Any) -> None:
    source = checkpoint(shards=2)
    index = json.loads((source / INDEX).read_text())["weight_map"]
    edit(source / INDEX, weight_map=index | {"model.norm.weight": file})
    assert "is not a safetensors file of the directory" in problems(source)[0]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{"])
def test_an_index_that_is_none(checkpoint: MakeCheckpoint, text: str) -> None:
    source = checkpoint(shards=2)
    (source / INDEX).write_text(text)
    [only] = problems(source)
    assert only.startswith(f"{INDEX}: ")


def test_one_tensor_in_two_files(checkpoint: MakeCheckpoint) -> None:
    source = checkpoint(shards=2)
    name = "model.norm.weight"
    other = source / (FIRST if holder(source, name).name == SECOND else SECOND)
    value = load_file(holder(source, name))[name]
    rewrite(other, lambda tensors: tensors.update({name: value}))
    found = problems(source)
    assert found == [f"{SECOND}: tensors that an earlier file has too: {name}"]


def test_old_shards_left_by_a_second_merge(checkpoint: MakeCheckpoint) -> None:
    source = checkpoint(shards=2)
    old = source / "model-00007-of-00007.safetensors"
    old.write_bytes((source / FIRST).read_bytes())
    (source / "consolidated.safetensors").write_bytes((source / FIRST).read_bytes())
    result = verify(source)
    assert result["sound"]  # the index says what is the model
    assert f"{old.name} is no part of the model, but mlx-lm would load it too" in result["notes"]
    assert "consolidated.safetensors is no part of the model" in result["notes"]


def test_shards_without_an_index(checkpoint: MakeCheckpoint) -> None:
    source = checkpoint(shards=2)
    (source / INDEX).unlink()
    assert problems(source) == [f"2 safetensors files, but no {INDEX}"]


def test_names_shapes_and_dtypes(checkpoint: MakeCheckpoint) -> None:
    source = checkpoint()

    def change(tensors: dict[str, Any]) -> None:
        del tensors["model.layers.0.self_attn.q_proj.weight"]
        tensors["model.extra.weight"] = np.ones(3, np.float32)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
        tensors[WEIGHT] = tensors[WEIGHT].T.copy()
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int32)

    rewrite(source / "model.safetensors", change)
    assert problems(source) == [
        "tensors missing: model.layers.0.self_attn.q_proj.weight",
        "tensors the model has no place for: model.extra.weight",
        f"tensors of the wrong shape: {WEIGHT} is [64, 128], not [128, 64]",
        "tensors of a dtype they can't have: model.norm.weight is I32",
    ]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_attention_heads": 0}, "config.json: num_attention_heads must be"),
        ({"layer_map": [0, 99]}, "config.json: layer_map[1] is 99"),
        ({"num_hidden_layers": 9}, "tensors missing: model.layers.8."),
    ],
)
def test_a_config_that_does_not_fit(
    checkpoint: MakeCheckpoint, changes: dict[str, Any], says: str
) -> None:
    source = checkpoint()
    edit(source / "config.json", **changes)
    [only] = problems(source)
    assert only.startswith(says)


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_config_that_is_none(checkpoint: MakeCheckpoint, text: str | None) -> None:
    source = checkpoint()
    (source / "config.json").unlink()
    if text is not None:
        (source / "config.json").write_text(text)
    [only] = problems(source)
    assert only.startswith("config.json: ")


def test_another_architecture_is_checked_as_far_as_it_can_be(checkpoint: MakeCheckpoint) -> None:
    source = checkpoint()
    edit(source / "config.json", model_type="other")
    result = verify(source)
    assert result["sound"]
    assert "shapes against config.json: model_type 'other' is not known here" in result["unchecked"]
    poison(source / "model.safetensors", WEIGHT, np.nan)
    assert len(problems(source)) == 1


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_tokenizer_that_does_not_load(checkpoint: MakeCheckpoint, damage: str) -> None:
    source = checkpoint()
    file = source / "tokenizer.json"
    if damage == "gone":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size // 2)
    [only] = problems(source)
    assert "tokenizer" in only


def test_holes_are_mentioned(checkpoint: MakeCheckpoint) -> None:
    source = checkpoint()
    poison(source / "model.safetensors", WEIGHT, *([0.0] * (128 * 64)))
    result = verify(source)
    assert result["sound"]
    assert f"model.safetensors: all zero: {WEIGHT}" in result["notes"]


def test_a_file_of_the_provenance_is_missing(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    out = tmp_path / "o"
    assert convert(["--hf-path", str(checkpoint()), "--quiet", "--mlx-path", str(out)]) == 0
    raw = json.loads((out / "config.json").read_text())
    raw["provenance"]["sha256"]["model-9.safetensors"] = "00"
    (out / "config.json").write_text(json.dumps(raw))
    [note] = verify(out)["notes"]
    assert note.startswith("model-9.safetensors is missing, but config.json's provenance")


@slow
def test_damaged_gguf(demo: Path, tmp_path: Path) -> None:
    from mlx_cerebrum.weights.gguf_file import GGUFFile

    data = bytearray(demo.read_bytes())
    tensors = GGUFFile.open(demo).tensors
    packed = next(t for t in tensors.values() if t.ggml_type == "Q4_1")
    norm = next(t for t in tensors.values() if t.ggml_type == "F32")
    data[packed.offset + 20 * 7 + 2 : packed.offset + 20 * 7 + 4] = struct.pack("<H", 0xFC00)
    data[norm.offset + 8 : norm.offset + 12] = struct.pack("<f", float("nan"))
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    [only] = verify(path)["problems"]
    assert only["tensors"] == [
        f"{name} (1)" for _, name in sorted((t.offset, t.name) for t in (packed, norm))
    ]
    os.truncate(path, len(data) - 100)
    [only] = verify(path)["problems"]
    assert "truncated" in only["problem"]


# The command line.


def test_exit_codes_and_forms(
    checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint(shards=2)
    assert main([str(source)]) == 0
    out, err = capsys.readouterr()
    assert "sound; 2 files, 75 tensors" in out
    assert "not checked  hashes of" in out
    assert err == ""
    assert main([str(source), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    poison(holder(source, WEIGHT), WEIGHT, np.nan)
    assert main([str(source), "--quiet"]) == 1
    out, _ = capsys.readouterr()
    assert out == (
        f"problem      {holder(source, WEIGHT).name}: values that are NaN or infinite:"
        f" {WEIGHT} (1)\n"
    )
    assert main([str(source), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["sound"] is False
    assert result["problems"][0]["tensors"] == [f"{WEIGHT} (1)"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    for nothing in ("empty", "file.txt", "absent"):
        assert main([str(tmp_path / nothing)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1


def test_names_from_a_file_do_not_reach_the_terminal_raw(
    checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint()
    evil = "\x1b[2J\nsound\ud800"
    raw = (source / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = raw[8 : 8 + length].replace(b"model.norm.weight", json.dumps(evil)[1:-1].encode())
    (source / "model.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header + raw[8 + length :]
    )
    assert main([str(source)]) == 1
    out, _ = capsys.readouterr()
    assert "\x1b" not in out
    assert "\nsound" not in out
