"""Distillation: nearer to what the dense model says, a stop costs nothing, layouts agree."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest
from conftest import SMALL, config_of, plan_yaml, resting, slow, tensors, write_checkpoint
from damage import stopping_at
from disk import watch_disk
from tiny import tiny_config, tiny_weights

from convert import calibrated, distilled, passages
from convert.__main__ import main
from convert.student import Student
from convert.verify import verify
from mlx_cerebrum.model import memory
from mlx_cerebrum.model.tensors import MATRICES, module_path
from mlx_cerebrum.weights.opening import load

LENGTH = 128  # tokens a passage, here
TEXT = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(3 * LENGTH))
TOKENS = 2 * LENGTH
STEPS = 4  # two passages, each twice


@dataclass(frozen=True)
class Made:
    """A folder with a source of 2 blocks, a plan that runs one twice, a text, and what dwq made of
    them: `x`."""

    folder: Path
    peak: int  # bytes that MLX held at most

    def command(self, path: Path, *flags: str, recipe: str = "dwq") -> list[str]:
        words = ["--hf-path", str(self.folder / "source"), "--mlx-path", str(path), "--quiet", "-q"]
        words += ["--q-recipe", recipe, "--q-group-size", "32", "--q-bits", "3"]
        words += ["--plan", str(self.folder / "plan.yml"), "--calibrate", str(self.folder / "text")]
        return [*words, "--calibrate-tokens", str(TOKENS), *flags]


@pytest.fixture(scope="module", autouse=True)
def small_steps() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for module in (passages, calibrated, distilled):
            patch.setattr(module, "LENGTH", LENGTH)
        patch.setattr(calibrated, "BATCH", 1)
        patch.setattr(distilled, "EPOCHS", 2)
        patch.setattr(distilled, "RATE", 0.02)
        patch.setattr(distilled, "HEAD_RATE", 0.02)
        patch.setattr(distilled, "SAVED", 0.0)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, small_steps: None) -> Made:
    found = Made(tmp_path_factory.mktemp("made"), 0)
    config = tiny_config(**SMALL | {"num_hidden_layers": 2})
    write_checkpoint(found.folder / "source", config, tiny_weights(config, seed=3))
    (found.folder / "text").write_text(TEXT)
    (found.folder / "plan.yml").write_text(plan_yaml("0-2,1-2"))
    before = resting()
    assert main(found.command(found.folder / "x")) == 0
    return replace(found, peak=mx.get_peak_memory() - before)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_it_is_nearer_to_the_dense_model_than_gptq_is(made: Made, tmp_path: Path) -> None:
    assert main(made.command(tmp_path / "gptq", recipe="gptq")) == 0
    ids = mx.array([[1, *(ord(letter) - 94 + 64 for letter in TEXT[LENGTH:])]])

    def said(path: Path, plan: str | None = None) -> mx.array:
        logits = load(path, plan, dtype="float32")[0](ids)
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    dense = said(made.folder / "source", str(made.folder / "plan.yml"))

    def divergence(path: Path) -> float:
        return cast(float, (mx.exp(dense) * (dense - said(path))).sum(-1).mean().item())

    assert divergence(made.folder / "x") < 0.9 * divergence(tmp_path / "gptq")
    ours, theirs = tensors(made.folder / "x"), tensors(tmp_path / "gptq")
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():  # integers stay as they were, scales don't
        learned = name.endswith((".scales", ".biases")) and "embed_tokens" not in name
        assert mx.array_equal(array, ours[name]) != learned, name


@pytest.mark.parametrize(("tied", "head"), [(False, "lm_head"), (True, "model.embed_tokens")])
@slow
def test_the_head_learns_at_a_rate_of_its_own(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool, head: str
) -> None:
    config = tiny_config(**SMALL | {"num_hidden_layers": 2, "tie_word_embeddings": tied})
    source = write_checkpoint(tmp_path / "source", config, tiny_weights(config, seed=3))
    flags = ["--hf-path", str(source)]
    assert main(made.command(tmp_path / "gptq", *flags, recipe="gptq")) == 0
    start = tensors(tmp_path / "gptq")
    blocks = {"model.layers.0", "model.layers.1"}
    parts = {"model.embed_tokens", "lm_head", *blocks}
    for still, learns in (("RATE", {head}), ("HEAD_RATE", blocks)):
        with monkeypatch.context() as patch:
            patch.setattr(distilled, still, 0.0)
            assert main(made.command(tmp_path / still, *flags)) == 0
        ours = tensors(tmp_path / still)
        moved = {name for name, array in start.items() if not mx.array_equal(array, ours[name])}
        assert {part for part in parts if any(n.startswith(f"{part}.") for n in moved)} == learns
    assert config_of(tmp_path / "RATE")["provenance"]["calibration"]["head_rate"] == 0.02


@slow
def test_both_layouts_have_the_same_matrices_and_are_sound(made: Made, tmp_path: Path) -> None:
    paths = made.folder / "x", tmp_path / "unrolled"
    assert main(made.command(paths[1], "--layout", "unrolled")) == 0
    folded, unrolled = map(tensors, paths)
    for position, block in enumerate(config_of(paths[0])["layer_map"]):
        for kind in MATRICES:
            for part in ("weight", "scales", "biases"):
                ours = folded[f"{module_path(block, kind)}.{part}"]
                assert mx.array_equal(ours, unrolled[f"{module_path(position, kind)}.{part}"])
    for path in paths:
        assert verify(path)["problems"] == []
        said = config_of(path)["provenance"]["calibration"]
        assert said["method"] == "dwq"
        assert (said["start"], said["tokens"], said["positions"]) == ("gptq", TOKENS, 3)
        assert len(said["text_sha256"]) == 64
        assert not list(path.parent.glob(".*"))


@pytest.mark.parametrize("saves", [8, 9, 11, 12])  # after GPTQ's 7: one a step, the result
@pytest.mark.one_in(10)
def test_interrupted_anywhere_it_writes_the_same_bytes(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: int
) -> None:
    stopping = stopping_at(saves, calibrated.save)
    command = made.command(tmp_path / "x")
    with monkeypatch.context() as patch:
        patch.setattr(calibrated, "save", stopping)
        patch.setattr(distilled, "save", stopping)
        assert main(command) == 130
    steps = 0
    slopes = Student.slopes

    def counting(*args: Any) -> float:
        nonlocal steps
        steps += 1
        return slopes(*args)

    monkeypatch.setattr(Student, "slopes", counting)
    assert main(command) == 0
    assert steps == STEPS - (saves - 8)
    assert contents(tmp_path / "x") == contents(made.folder / "x")


def test_memory_is_asked_for_first_and_covers_what_is_used(
    made: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[int] = []
    settings: dict[str, int] = {}

    def refusing(needed: int, what: str, *rest: Any) -> None:
        asked.append(needed)
        settings.update(rest[1])
        memory.require(needed, what, *rest)

    monkeypatch.setattr(calibrated, "require", refusing)
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    assert main(made.command(tmp_path / "x")) == 2
    said = capsys.readouterr().err
    assert f"--q-recipe dwq needs {memory.human(asked[0])}" in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())
    assert 0.3 * asked[0] < made.peak <= asked[0]
    assert list(settings) == [f"--calibrate-tokens {LENGTH}", "--q-recipe gptq"]
    assert all(size < asked[0] for size in settings.values())


def test_disk_is_asked_for_and_covers_what_is_used(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = watch_disk(monkeypatch, tmp_path)
    assert main(made.command(tmp_path / "x")) == 0
    assert 0.6 * asked.needed < asked.held <= asked.needed


def test_a_model_that_overflows_is_refused_in_one_line(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Student, "slopes", lambda *args: float("nan"))
    assert main(made.command(tmp_path / "x")) == 2
    assert "not finite; convert with another --dtype" in capsys.readouterr().err


def test_every_passage_is_read_as_often() -> None:
    steps = distilled._passages(5)
    assert sorted(steps[:5]) == sorted(steps[5:]) == [*range(5)]
    assert steps[:5] != steps[5:]
