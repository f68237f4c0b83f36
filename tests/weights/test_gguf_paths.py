"""GGUF files under any name, alone in a folder, and split into parts."""

from pathlib import Path
from typing import Any

import gguf_files
import mlx.core as mx
import pytest

from convert.pipeline import convert
from convert.verify import verify
from mlx_cerebrum import load
from mlx_cerebrum.errors import CerebrumError, CheckpointError
from mlx_cerebrum.model.tensors import matrix_shapes
from mlx_cerebrum.weights.opening import open_checkpoint
from mlx_cerebrum.weights.views import orders


def refused(path: Path) -> str:
    """The one line that both opening and verifying fail with."""
    with pytest.raises(CerebrumError) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_files.write(tmp_path_factory.mktemp("whole") / "model.gguf", "Q4_K")


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    return gguf_files.write_split(tmp_path, "model", 3, "Q4_K")


def same(path: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same weights, read from wherever they lie."""
    one, two = open_checkpoint(path), open_checkpoint(other)
    return all(
        mx.array_equal(one.read(module)[part], array)
        for module in matrix_shapes(one.config)
        for part, array in two.read(module).items()
    )


# --- names


@pytest.mark.parametrize("name", ["X.GGUF", "model", "sha256-0a1b2c", "model.gguf.bak", "a.bin"])
def test_the_first_bytes_decide(name: str, whole: Path, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to(whole)
    assert same(tmp_path / name, whole)
    assert verify(tmp_path / name)["sound"]


def test_what_is_called_gguf_and_is_none(tmp_path: Path) -> None:
    for name, content, says in [
        ("a.gguf", b"PK" + bytes(30), "not a GGUF file"),
        ("b.GGUF", b"version https://git-lfs.github.com/spec/v1\noid", "git-lfs pointer"),
        ("c.gguf", b"tjgg" + bytes(60), "is a GGML file, from before GGUF"),
        ("sha256-1", b"\x80\x02" + bytes(60), "is not a checkpoint"),
        ("d", b"", "is empty"),
    ]:
        (tmp_path / name).write_bytes(content)
        assert says in refused(tmp_path / name)


def test_a_folder_that_holds_one(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("GGUF of a model")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "sha256-0a").symlink_to(whole)
    assert same(tmp_path, whole)
    assert verify(tmp_path)["sound"]
    (tmp_path / "other.gguf.part").write_bytes(b"GGUF")  # a download that is not over
    assert same(tmp_path, whole)
    for i in range(4):
        (tmp_path / f"{i}.gguf").symlink_to(whole)
    assert "5 GGUF models: 0.gguf, 1.gguf, 2.gguf and 2 more; name one" in refused(tmp_path)


def test_safetensors_come_first(whole: Path, tmp_path: Path) -> None:
    convert(open_checkpoint(whole), tmp_path / "out")
    (tmp_path / "out" / "model.gguf").write_bytes(b"GGUF")
    assert open_checkpoint(tmp_path / "out").path == tmp_path / "out"


# --- parts


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_split_model_opens_by_any_part(which: int, parts: list[Path], whole: Path) -> None:
    assert same(parts[which], whole)
    assert open_checkpoint(parts[which]).path == parts[0]
    result = verify(parts[which])
    assert result["sound"]
    assert list(result["files"]) == [part.name for part in parts]


def test_a_split_model_alone_in_a_folder(parts: list[Path], whole: Path) -> None:
    assert same(parts[0].parent, whole)
    gguf_files.write_split(parts[0].parent, "other", 2, "Q4_K")
    assert "2 GGUF models: model-00001-of-00003.gguf, other-" in refused(parts[0].parent)


def test_it_is_named_without_its_number(parts: list[Path]) -> None:
    config = open_checkpoint(parts[0]).config
    assert list(orders(config, str(parts[0]))) == ["model"]
    assert list(orders(config, "X.GGUF")) == ["x"]


def test_it_loads_and_converts(parts: list[Path], whole: Path, tmp_path: Path) -> None:
    ids = mx.array([[1, 70, 71]])
    assert mx.array_equal(load(parts[1])[0](ids), load(whole)[0](ids))
    convert(open_checkpoint(parts[2]), tmp_path / "out")
    assert same(tmp_path / "out", whole)
    assert verify(tmp_path / "out")["sound"]


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_part_is_named(missing: int, parts: list[Path]) -> None:
    parts[missing].unlink()
    message = refused(parts[(missing + 1) % 3])
    assert message.startswith(f"{parts[missing]} is missing; ")
    (problem,) = verify(parts[(missing + 1) % 3])["problems"]
    assert f"{parts[missing].name} is missing" in problem["problem"]
    parts[(missing + 2) % 3].unlink()
    assert "and 1 other parts are missing" in refused(parts[(missing + 1) % 3])


def test_an_unfinished_part_is_named(parts: list[Path]) -> None:
    parts[1].rename(f"{parts[1]}.part")
    assert f"({parts[1].name}.part is left of an unfinished download)" in refused(parts[0])


def test_parts_under_names_that_say_nothing(parts: list[Path], tmp_path: Path) -> None:
    parts[0].rename(tmp_path / "sha256-0a")
    message = refused(tmp_path / "sha256-0a")
    assert "is one part of 3" in message
    assert "--merge" in message


def test_parts_of_another_model(parts: list[Path], tmp_path: Path) -> None:
    first = parts[0].read_bytes()
    parts[1].replace(parts[2])
    parts[1].hardlink_to(parts[2])
    assert "says it is part '1' of '3' (counted from 0), not 2 of 3" in refused(parts[0])
    other = tmp_path / "other"
    other.mkdir()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"split.tensors.count": 90}, "of different models"),
        ({"general.name": "another"}, "of another model: its general.name is 'another'"),
    ]
    for changes, says in cases:
        more = gguf_files.write_split(other, "model", 3, "Q4_K", **changes)
        parts[0].write_bytes(first)
        for part, its in zip(parts[1:], more[1:], strict=True):
            its.replace(part)
        if "split.tensors.count" in changes:
            more[0].replace(parts[0])
        assert says in refused(parts[0])


def test_a_tensor_in_two_parts(parts: list[Path]) -> None:
    content = parts[1].read_bytes()
    parts[1].write_bytes(content.replace(b"blk.1.attn_k.weight", b"blk.0.attn_k.weight"))
    assert refused(parts[0]).endswith(
        "tensor 'blk.0.attn_k.weight' is in model-00001-of-00003.gguf too"
    )


@pytest.mark.parametrize("count", ["2", -1, 2.0, True, 100_000, 2**31])
def test_odd_numbers_of_parts(count: Any, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"split.count": count}
    path = gguf_files.write(tmp_path / "x-00001-of-00002.gguf", **changes)
    assert "part" in refused(path)


def test_one_part_is_a_whole(tmp_path: Path, whole: Path) -> None:
    for count in (0, 1):
        changes: dict[str, Any] = {"split.count": count}
        path = gguf_files.write(tmp_path / f"{count}.gguf", "Q4_K", **changes)
        assert same(path, whole)


def test_a_part_that_changes_is_noticed(parts: list[Path]) -> None:
    source = open_checkpoint(parts[0])
    with parts[2].open("ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckpointError, match=r"00003-of-00003\.gguf changed while"):
        source.read("lm_head")
