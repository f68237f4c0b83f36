"""Which 16 bits a GPU computes in: those stored, but float16 where bfloat16 is emulated."""

from pathlib import Path

import mlx.core as mx
import pytest
from conftest import MakeCheckpoint, parameters, tensors

from mlx_cerebrum import device, load
from mlx_cerebrum.chat.about import about
from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.weights.opening import ModelSpec, open_model

M1, M3 = "applegpu_g13s", "applegpu_g15g"
LATE = "model.layers.7.mlp.down_proj.weight"  # a matrix that is read when most have been


@pytest.fixture
def source(checkpoint: MakeCheckpoint) -> Path:
    """A checkpoint in bfloat16."""
    path = checkpoint()
    write(path, {name: a.astype(mx.bfloat16) for name, a in tensors(path).items()})
    return path


def write(path: Path, stored: dict[str, mx.array]) -> None:
    mx.eval(stored)  # some are still to be read from this very file
    mx.save_safetensors(str(path / "model.safetensors"), stored, {"format": "pt"})


def on(chip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Mac with this GPU, as far as loading asks."""
    info = {"architecture": chip, "max_recommended_working_set_size": 10**10}
    monkeypatch.setattr(device, "backend", lambda: "metal")
    monkeypatch.setattr(device, "gpu_info", lambda: info)


def put(path: Path, name: str, value: float) -> None:
    stored = tensors(path)
    stored[name][3, 5] = value
    write(path, stored)


def held(model: Model) -> set[mx.Dtype]:
    return {array.dtype for array in parameters(model).values()}


@pytest.mark.parametrize(
    ("chip", "emulated"),
    [
        (M1, True),
        ("applegpu_g14d", True),
        (M3, False),
        ("applegpu_g17s", False),
        ("paravirtual", False),
        ("", False),
    ],
)
def test_who_emulates(chip: str, emulated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    on(chip, monkeypatch)
    assert device.emulates_bfloat16() == emulated
    monkeypatch.setattr(device, "backend", lambda: "cuda")
    assert not device.emulates_bfloat16()


@pytest.mark.parametrize(
    ("chip", "asked", "found"),
    [
        (M1, "auto", mx.float16),
        (M3, "auto", mx.bfloat16),
        (M1, "bfloat16", mx.bfloat16),
        (M1, "float32", mx.float32),
    ],
)
def test_bfloat16_is_held_so(
    chip: str, asked: str, found: mx.Dtype, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(chip, monkeypatch)
    model, _ = load(source, dtype=asked)
    assert held(model) == {found}
    stored = tensors(source)[LATE]
    assert mx.array_equal(parameters(model)[LATE], stored.astype(found))


def test_packed_ones_too_and_float16_stays(
    source: Path, checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(M1, monkeypatch)
    opened = open_model(ModelSpec(source, q_bits=4, q_group_size=32))
    model = opened.load()
    assert held(model) == {mx.uint32, mx.float16}
    assert dict(about(opened, {"": model}))["weights"] == "4 bits in float16"
    assert held(load(checkpoint("half", dtype="float16"))[0]) == {mx.float16}
    assert held(load(checkpoint("single"))[0]) == {mx.float32}


def test_what_float16_can_not_hold_stays_bfloat16(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(source, LATE, 1e5)
    on(M1, monkeypatch)
    opened = open_model(ModelSpec(source))
    assert opened.storage.dtype == mx.float16
    ready: list[int] = []
    model = opened.load(lambda done, _: ready.append(done))
    assert held(model) == {mx.bfloat16}
    assert mx.array_equal(parameters(model)[LATE], tensors(source)[LATE])
    assert ready[-1] == opened.storage.nbytes
    assert dict(about(opened, {"": model}))["weights"] == "bfloat16"
    assert capsys.readouterr().err == (
        "note: model.layers.7.mlp.down_proj has values too large for float16; "
        "loading in bfloat16 instead\n"
    )


def test_asked_for_it_is_refused(source: Path) -> None:
    put(source, LATE, -1e5)
    with pytest.raises(CheckpointError, match=r"down_proj has values too large.*--dtype bfloat16"):
        load(source, dtype="float16")


def test_what_is_stored_as_infinite_is_no_overflow(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(source, LATE, float("-inf"))
    put(source, "lm_head.weight", float("nan"))
    on(M1, monkeypatch)
    assert held(load(source)[0]) == {mx.float16}
