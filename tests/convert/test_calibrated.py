"""Packing by what goes through: every position counts, a stop costs nothing, both layouts agree."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import gguf_files
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import (
    SMALL,
    MakeCheckpoint,
    config_of,
    plan_yaml,
    resting,
    slow,
    tensors,
    write_checkpoint,
)
from damage import flip, stopping_at
from disk import watch_disk
from tiny import tiny_config, tiny_weights
from tokenizers import AddedToken, Tokenizer

from convert import calibrated, fold, gptq
from convert import source as reading
from convert.__main__ import main
from convert.calibrated import calibration_bytes
from convert.layout import Options, lay_out
from convert.passages import LENGTH, Calibration, is_chat, passages, shipped
from convert.verify import verify
from mlx_cerebrum import device
from mlx_cerebrum.errors import CheckpointError, RequestError
from mlx_cerebrum.model import memory
from mlx_cerebrum.model.cache import attention_mask
from mlx_cerebrum.model.tensors import MATRICES, module_path
from mlx_cerebrum.tokenizer.chat_formats import BUILT_IN
from mlx_cerebrum.tokenizer.jinja import run as jinja
from mlx_cerebrum.weights.checkpoint import FLOATS, Checkpoint
from mlx_cerebrum.weights.opening import load, load_tokenizer, open_checkpoint
from mlx_cerebrum.weights.quantize import Packing
from mlx_cerebrum.weights.storage import DTYPES

TEXT = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(3 * LENGTH))
RANGES = "0-3,1-4"  # blocks 1 and 2 run twice
POSITIONS = 6
TOKENS = 2 * LENGTH


@dataclass(frozen=True)
class Made:
    """A folder with a source of 4 blocks, a plan, a text, and what gptq made of them: `x`."""

    folder: Path
    peak: int  # bytes that MLX held at most

    def command(self, path: Path, *flags: str) -> list[str]:
        words = ["--hf-path", str(self.folder / "source"), "--mlx-path", str(path), "--quiet", "-q"]
        words += ["--q-recipe", "gptq", "--q-group-size", "32", "--q-bits", "4"]
        words += ["--plan", str(self.folder / "plan.yml"), "--calibrate", str(self.folder / "text")]
        return [*words, "--calibrate-tokens", str(TOKENS), *flags]


@pytest.fixture(scope="module", autouse=True)
def two_batches() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrated, "BATCH", 1)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, two_batches: None) -> Made:
    found = Made(tmp_path_factory.mktemp("made"), 0)
    config = tiny_config(**SMALL | {"num_hidden_layers": 4})
    write_checkpoint(found.folder / "source", config, tiny_weights(config, seed=3))
    (found.folder / "text").write_text(TEXT)
    (found.folder / "plan.yml").write_text(plan_yaml(RANGES))
    before = resting()
    assert main(found.command(found.folder / "x")) == 0
    return replace(found, peak=mx.get_peak_memory() - before)


def positions_done(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Those that are run from here on."""
    runs: list[int] = []
    position = calibrated.Calibrator._position

    def counting(self: Any, at: int, *args: Any) -> None:
        position(self, at, *args)
        runs.append(at)

    monkeypatch.setattr(calibrated.Calibrator, "_position", counting)
    return runs


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


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
        assert said["method"] == "gptq"
        assert (said["tokens"], said["positions"], said["as_chat"]) == (TOKENS, POSITIONS, False)
        assert len(said["text_sha256"]) == 64
        assert not list(path.parent.glob(".*"))
    ids = mx.array([[1, *range(5, 60)]])
    logits = [load(path, dtype="float32")[0](ids) for path in paths]
    assert mx.array_equal(logits[0], logits[1])


@slow
def test_sums_are_those_of_the_whole_model_over_every_run(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[mx.array] = []
    factor = gptq.inputs_of

    def listening(hessian: mx.array) -> Any:
        found.append(mx.array(hessian))
        return factor(hessian)

    monkeypatch.setattr(gptq, "inputs_of", listening)
    assert main(made.command(tmp_path / "x")) == 0
    model, tokenizer = load(made.folder / "source", str(made.folder / "plan.yml"), dtype="float32")
    h = model.embed(passages(tokenizer, TEXT, TOKENS))
    mask = attention_mask(LENGTH, 0, model.config.sliding_window)
    sums: dict[tuple[int, str], mx.array] = {}
    heard: list[mx.array] = []

    class Listening(nn.Module):
        def __call__(self, x: mx.array) -> mx.array:
            heard.append(x)
            return x

    def add(block: int, name: str, x: mx.array) -> None:
        flat = x.reshape(-1, x.shape[-1])
        sums[block, name] = sums.get((block, name), mx.array(0.0)) + flat.T @ flat

    for block in model.config.layer_map:
        layer = model.model.layers[block]
        normed, project = layer.input_layernorm(h), layer.self_attn.o_proj
        layer.self_attn["o_proj"] = Listening()
        heads = layer.self_attn(normed, mask, None)
        layer.self_attn["o_proj"] = project
        h = h + project(heads)
        second = layer.post_attention_layernorm(h)
        gate, up = mx.split(layer.mlp.gate_up_proj(second), 2, axis=-1)
        inner = gate * mx.sigmoid(gate) * up
        for name, x in (("q", normed), ("o", heads), ("gate", second), ("down", inner)):
            add(block, name, x)
        h = h + layer.mlp.down_proj(inner)
    add(-1, "head", model.model.norm(h))
    # In the order in which layers run for the last time.
    expected = [sums[block, name] for block in range(4) for name in ("q", "o", "gate", "down")]
    for ours, theirs in zip(found, [*expected, sums[-1, "head"]], strict=True):
        off = np.abs(np.array(ours) - np.array(theirs)).max()
        assert off < 1e-4 * np.abs(np.array(theirs)).max()


@pytest.mark.parametrize("saves", [1, 4, 7, 13])  # two files a position; the head
@pytest.mark.one_in(10)
def test_interrupted_anywhere_it_writes_the_same_bytes(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: int
) -> None:
    stopping = stopping_at(saves, calibrated.save)
    command = made.command(tmp_path / "x")
    with monkeypatch.context() as patch:
        patch.setattr(calibrated, "save", stopping)
        assert main(command) == 130
    runs = positions_done(monkeypatch)
    assert main(command) == 0
    assert runs == list(range((saves - 1) // 2, POSITIONS))
    assert contents(tmp_path / "x") == contents(made.folder / "x")


@pytest.mark.parametrize("what", ["plan", "scales", "window", "config", "tokens"])
@pytest.mark.one_in(12)
def test_what_was_begun_another_way_is_not_gone_on_with(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """As many positions, the same blocks and files: only what goes through them differs."""
    config = config_of(made.folder / "source")
    source = write_checkpoint(tmp_path / "source", config, tiny_weights(config, seed=3))
    plan = tmp_path / "plan.yml"
    plan.write_text(plan_yaml(RANGES))
    own = json.loads((source / "tokenizer_config.json").read_text())

    def talking(template: str) -> None:
        changed = json.dumps(own | {"chat_template": template})
        (source / "tokenizer_config.json").write_text(changed)

    talking("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    now = [*made.command(tmp_path / "x"), "--hf-path", str(source), "--plan", str(plan)]
    with monkeypatch.context() as patch:
        patch.setattr(calibrated, "save", stopping_at(9, calibrated.save))
        assert main(now) == 130
    if what == "plan":
        plan.write_text(plan_yaml("0-2,0-2,2-4"))
    elif what == "scales":
        values = "{filter: o_proj, value: 0.5}, {filter: down_proj, value: 0.5}, {value: 1.0}"
        plan.write_text(plan_yaml(RANGES, f"{{scale: [{values}]}}"))
    elif what == "window":
        now += ["--window", "16"]
    elif what == "config":
        (source / "config.json").write_text(json.dumps(config | {"rope_theta": 500.0}))
    else:
        talking("{% for m in messages %}User: {{ m['content'] }}{% endfor %}")
    again = [word.replace(str(tmp_path / "x"), str(tmp_path / "y")) for word in now]
    assert main(now) == main(again) == 0
    ours, theirs = (tensors(tmp_path / name) for name in ("x", "y"))
    assert all(mx.array_equal(array, ours[name]) for name, array in theirs.items())


@pytest.mark.parametrize("fails", [RuntimeError, CheckpointError])
@slow
def test_a_disk_that_is_gone_for_a_while_loses_nothing(
    made: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fails: type[Exception],
) -> None:
    dense, reads = Checkpoint.dense, 0

    def failing(self: Checkpoint, module: str) -> mx.array:
        nonlocal reads
        reads += 1
        if reads == 39 + 30:  # all 39 are looked at before
            raise fails("[read] Unable to read from file.")
        return dense(self, module)

    command = made.command(tmp_path / "x")
    with monkeypatch.context() as patch:
        patch.setattr(type(open_checkpoint(made.folder / "source")), "dense", failing)
        assert main(command) == 2
    said = capsys.readouterr().err
    assert "can't be read: [read] Unable to read from file." in said
    assert list(tmp_path.glob(".x.partial/*/packed-*")) or list(tmp_path.glob(".x.partial/*/sums*"))
    stat = reading._stat  # when it is back, the system may number it anew, and its files
    monkeypatch.setattr(reading, "_stat", lambda path: stat(path)._replace(device=7, inode=7))
    runs = positions_done(monkeypatch)
    assert main(command) == 0
    assert len(runs) < POSITIONS
    assert contents(tmp_path / "x") == contents(made.folder / "x")


@slow
def test_a_failing_gpu_loses_nothing(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, position = made.command(tmp_path / "x"), calibrated.Calibrator._position

    def failing(self: Any, at: int, *args: Any) -> None:
        if at == 3:
            raise RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory")
        position(self, at, *args)

    with monkeypatch.context() as patch:
        patch.setattr(calibrated.Calibrator, "_position", failing)
        with pytest.raises(RuntimeError):
            main(command)
    runs = positions_done(monkeypatch)
    command.remove("--quiet")
    assert main(command) == 0
    assert runs == [3, 4, 5]
    assert "going on where it was stopped" in capsys.readouterr().err
    assert contents(tmp_path / "x") == contents(made.folder / "x")


# What a source may have, and the flags that let it get as far as the weights themselves.
FAULTS = {
    "checked": (np.nan, (), "1 values that are NaN or infinite"),
    "not checked": (np.nan, ("--no-verify",), "values that are NaN or infinite"),
    "allowed": (np.inf, ("--allow-nonfinite",), "values that are NaN or infinite"),
    "too large once cast": (1e6, ("--dtype", "float16"), "values that are NaN or infinite"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("tensor", ["lm_head.weight", "model.layers.2.mlp.up_proj.weight"])
@pytest.mark.one_in(10)
def test_a_damaged_weight_is_named_before_any_work(
    made: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tensor: str,
    fault: str,
) -> None:
    value, flags, line = FAULTS[fault]
    config = config_of(made.folder / "source")
    weights = tiny_weights(config, seed=3)
    weights[tensor][0, 0] = value
    source = write_checkpoint(tmp_path / "source", config, weights)
    runs = positions_done(monkeypatch)
    assert main([*made.command(tmp_path / "x"), "--hf-path", str(source), *flags]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert tensor.removesuffix(".weight") in said
    assert line in said
    assert not runs
    assert not list(tmp_path.glob(".*"))


def test_a_file_that_is_not_what_was_recorded_is_found_before_any_work(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    argv = ["--hf-path", str(made.folder / "source"), "--mlx-path", str(source), "--quiet"]
    assert main(argv) == 0
    file = source / "model-00001-of-00001.safetensors"
    flip(file, file.stat().st_size - 4)
    runs = positions_done(monkeypatch)
    command = [*made.command(tmp_path / "x"), "--hf-path", str(source)]
    assert main(command) == 2
    assert "damaged: its SHA-256" in capsys.readouterr().err
    assert not runs
    assert not list(tmp_path.glob(".*"))
    assert main([*command, "--no-verify"]) == 0


def test_layers_that_only_look_alike_are_told_apart_before_any_work(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(made.folder / "source")
    weights = tiny_weights(config, seed=3)
    for name in [name for name in weights if ".layers.1." in name]:
        weights[name.replace(".1.", ".2.")] = weights[name].copy()
    bits = weights["model.layers.2.mlp.up_proj.weight"].reshape(-1).view(np.uint32)
    for index in range(1, bits.size, 97):  # until no sample sees it
        bits[index] ^= 1
        source = write_checkpoint(tmp_path / f"source{index}", config, weights)
        if fold.predict(open_checkpoint(source)).repeats:
            break
        bits[index] ^= 1
    else:
        pytest.fail("samples see every bit")
    runs = positions_done(monkeypatch)
    assert main([*made.command(tmp_path / "x"), "--hf-path", str(source)]) == 0
    assert runs == [*range(POSITIONS)]
    assert config_of(tmp_path / "x")["num_hidden_layers"] == 4


def test_disk_is_asked_for_and_covers_what_is_used(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = watch_disk(monkeypatch, tmp_path)
    assert main(made.command(tmp_path / "x")) == 0
    assert 0.6 * asked.needed < asked.held <= asked.needed


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_it_computes_in_the_matrices_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """GGUF files hold norms in float32 beside 16-bit matrices."""
    file = gguf_files.write(tmp_path / "m.gguf", dtype, gguf_files.Geometry(layers=2))
    checkpoint = open_checkpoint(file)
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    layout = lay_out(checkpoint, Options(packing=Packing(4, 32)), fold.none(checkpoint.config))
    found = calibrated.Calibrator(checkpoint, layout, Calibration("gptq", TEXT * 3, LENGTH))
    assert found.dtype == DTYPES[FLOATS[dtype]]


def test_a_token_that_the_model_has_not_is_refused(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A template may write tokens that were added past the table's last row."""
    source = write_checkpoint(
        tmp_path / "source",
        config_of(made.folder / "source"),
        tiny_weights(config_of(made.folder / "source"), seed=3),
    )
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(f"<|{i}|>", special=True) for i in range(3)])
    tokenizer.save(str(source / "tokenizer.json"))
    last = tokenizer.get_vocab_size() - 1
    own = json.loads((source / "tokenizer_config.json").read_text())
    template = "<|2|>{% for m in messages %}{{ m['content'] }}{% endfor %}"
    changed = json.dumps(own | {"chat_template": template})
    (source / "tokenizer_config.json").write_text(changed)
    assert main([*made.command(tmp_path / "x"), "--hf-path", str(source)]) == 2
    said = capsys.readouterr().err
    assert f"error: the calibration text has token id {last}, and the model 260 tokens" in said


@pytest.mark.parametrize("given", ["none.txt", "~nosuchuser/text", "none.json"])
def test_what_it_reads_is_looked_at_before_a_download(
    made: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: str,
) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("asked the hub")

    monkeypatch.setattr("mlx_cerebrum.weights.hub.resolve", never)
    words = [w for w in made.command(tmp_path / "x") if w not in ("--q-bits", "4")]
    for recipe in ("gptq", "plan"):
        more = ["--hf-path", "owner/name", "--calibrate", given, "--q-recipe", recipe]
        tokens = words.index("--calibrate-tokens")
        own = words if recipe == "gptq" else words[:tokens] + words[tokens + 2 :]
        assert main([*own, *more]) == 2
        said = capsys.readouterr().err
        assert given.partition("/")[0] in said
        assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "bits"), [([], {3, 4, 5}), (["--q-budget", "7"], {5, 6, 8}), (["--q-bits", "3"], {3})]
)
def test_bits_are_the_plans_or_all_alike(
    made: Made, monkeypatch: pytest.MonkeyPatch, flags: list[str], bits: set[int]
) -> None:
    class Chosen(Exception):  # noqa: N818
        pass

    def stop(checkpoint: Any, destination: Any, options: Options, **kwargs: Any) -> None:
        assert options.packing is not None
        config = open_checkpoint(made.folder / "source").config
        raise Chosen({p.bits for p in options.recipe(config, options.packing).values()})

    monkeypatch.setattr("convert.__main__.convert", stop)
    words = made.command(made.folder / "y", *flags, "--debug")
    if "--q-bits" not in flags:
        del words[words.index("--q-bits") : words.index("--q-bits") + 2]
    with pytest.raises(Chosen) as caught:
        main(words)
    assert bits <= caught.value.args[0]
    assert (len(caught.value.args[0]) == 1) == (flags[:1] == ["--q-bits"])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--calibrate-tokens", "100"], "100 tokens of calibration are not from 512 to 65536"),
        (["--q-mode", "mxfp4"], "is for --q-mode affine, not for mxfp4"),
        (["--q-budget", "4.6", "--q-bits", "4"], "can't be combined with --q-budget"),
        (["--q-recipe", "uniform"], "--calibrate-tokens is for --q-recipe gptq"),
        (["--calibrate", "short"], "has 4 tokens; give at least 576"),
        (["--calibrate", "none"], "none can't be read as UTF-8 text"),
        (["--calibrate", "t.json", "--q-bits", "4"], "of no use where all get --q-bits"),
        (["--plan", "scaled.yml", "--layout", "unrolled"], "convert with --layout folded"),
        (["--hf-path", "x", "--plan", "0-4"], "is quantized already: -q and --dtype need"),
        (["--plan", "deeper.yml"], "block"),
    ],
)
def test_refused_in_one_line(
    made: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(made.folder)
    Path("short").write_text("abc\n")
    scale = "{scale: [{filter: o_proj, value: 0.5}, {filter: down_proj, value: 0.5}, {value: 1.0}]}"
    Path("scaled.yml").write_text(plan_yaml(RANGES, scale))
    Path("deeper.yml").write_text(plan_yaml("0-5"))
    words = made.command(tmp_path / "x", *flags)
    if "--q-mode" in flags:
        del words[words.index("--q-group-size") : words.index("--q-group-size") + 2]
    if "--hf-path" in flags:
        del words[words.index("--plan") : words.index("--plan") + 2]
        del words[-2:]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_memory_is_asked_for_first_and_fewer_tokens_named(
    made: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = open_checkpoint(made.folder / "source").config
    needed, half = (calibration_bytes(config, tokens, 4) for tokens in (TOKENS, TOKENS // 2))
    monkeypatch.setattr(memory, "available_bytes", lambda: int((needed + half) / 2 / 0.95))
    assert main(made.command(tmp_path / "x")) == 2
    said = capsys.readouterr().err
    assert f"--q-recipe gptq needs {memory.human(needed)}" in said
    assert f"--calibrate-tokens {TOKENS // 2} " in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("tokens", "warned"), [(LENGTH, True), (2 * LENGTH, False)])
def test_fewer_tokens_than_inputs(
    checkpoint: MakeCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tokens: int,
    warned: bool,
) -> None:
    """A matrix is not fitted to them without a word, nor are they what a refusal asks for."""
    source = checkpoint(num_hidden_layers=1, intermediate_size=LENGTH + 64)
    words = ["--hf-path", str(source), "--mlx-path", str(tmp_path / "x"), "-q", "--q-bits", "4"]
    words += ["--q-recipe", "gptq", "--calibrate", str(tmp_path / "text")]
    (tmp_path / "text").write_text(TEXT)
    words += ["--calibrate-tokens", str(tokens)]
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available_bytes", lambda: 1000)
        assert main([*words, "--q-group-size", "32"]) == 2
    assert "--calibrate-tokens" not in capsys.readouterr().err
    assert main([*words, "--q-group-size", "32"]) == 0
    said = capsys.readouterr().err
    assert ("fewer than a matrix has inputs, 576: fitted to these alone" in said) is warned
    assert f"calibrating on {tokens:,} tokens" in said


def test_prediction_covers_what_is_used(made: Made) -> None:
    config = open_checkpoint(made.folder / "source").config
    predicted = calibration_bytes(config, TOKENS, 4)
    assert 0.3 * predicted < made.peak <= predicted


def test_passages_are_spread_and_whole(checkpoint: MakeCheckpoint) -> None:
    tokenizer = load_tokenizer(open_checkpoint(checkpoint()))
    found = passages(tokenizer, TEXT, 2 * LENGTH)
    assert found.shape == (2, LENGTH)
    assert found[:, 0].tolist() == [1, 1]  # each behind a BOS
    assert tokenizer.decode(np.array(found[0]).tolist()) == TEXT[: LENGTH - 1]
    assert passages(tokenizer, TEXT[:576], 5000).shape == (1, LENGTH)
    with pytest.raises(RequestError):
        passages(tokenizer, TEXT[:575], 5000)


def test_a_chat_model_reads_them_as_answers(checkpoint: MakeCheckpoint) -> None:
    tokenizer = load_tokenizer(open_checkpoint(checkpoint()))
    tokenizer.use_format(BUILT_IN["cerebrum"])
    row = tokenizer.decode(np.array(passages(tokenizer, TEXT, LENGTH)[0]).tolist())
    asked = f"User: Continue this text:\n\n{TEXT[:64]}\nAI:"
    assert asked in row
    assert row.partition(asked)[2].lstrip() == TEXT[64 : 64 + len(row.partition(asked)[2].lstrip())]


def test_what_a_template_says_is_the_same_on_any_day(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = talker(checkpoint, "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}")
    rows = []
    for day in (1, 2):
        monkeypatch.setattr(jinja, "datetime", Mock(now=lambda day=day: datetime(2026, 12, day)))
        assert f"0{day} Dec 2026" in tokenizer.decode(
            tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
        )
        rows.append(passages(tokenizer, TEXT, LENGTH).tolist())
    assert rows[0] == rows[1]


@pytest.mark.parametrize(("length", "talks"), [(200, True), (300, False), (600, False)])
def test_a_template_that_leaves_little_room_is_done_without(
    checkpoint: MakeCheckpoint, length: int, talks: bool
) -> None:
    tokenizer = talker(checkpoint, "#" * length + "{{ messages[0].content }}")
    assert is_chat(tokenizer) is talks
    said = tokenizer.decode(np.array(passages(tokenizer, TEXT, LENGTH)[0]).tolist())
    assert said.startswith("#" * length if talks else TEXT[: LENGTH - 1])


def talker(checkpoint: MakeCheckpoint, template: str) -> Any:
    path = checkpoint()
    own = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(own | {"chat_template": template}))
    return load_tokenizer(open_checkpoint(path))


def test_matrices_of_two_dtypes_are_packed_apart(tmp_path: Path) -> None:
    """What shares its inputs is packed together, and would get the wider one's scales."""
    config = tiny_config(num_hidden_layers=1, vocab_size=260)
    config.pop("torch_dtype", None)
    weights = tiny_weights(config, seed=3)
    narrow = ("up_proj.weight", "k_proj.weight")
    mixed: Any = {n: w.astype(np.float16) if n.endswith(narrow) else w for n, w in weights.items()}
    path = write_checkpoint(tmp_path / "source", config, mixed)
    (tmp_path / "text").write_text(TEXT)
    words = ["--hf-path", str(path), "--mlx-path", str(tmp_path / "x"), "--quiet", "-q"]
    words += ["--q-recipe", "gptq", "--q-group-size", "32", "--q-bits", "4"]
    words += ["--calibrate", str(tmp_path / "text"), "--calibrate-tokens", str(LENGTH)]
    assert main(words) == 0
    made = tensors(tmp_path / "x")
    for name, dtype in (("up_proj", mx.float16), ("gate_proj", mx.float32)):
        assert made[f"model.layers.0.mlp.{name}.scales"].dtype == dtype
    assert verify(tmp_path / "x")["sound"]


def test_the_text_that_ships_is_long_enough_and_not_scored() -> None:
    text = shipped()
    assert 200_000 < len(text.encode()) < 300_000
    for file in (Path(__file__).parents[2] / "bench" / "data").glob("*.txt"):
        scored = file.read_text(encoding="utf-8")
        assert not any(scored[i : i + 60] in text for i in range(0, len(scored) - 60, 60)), file
    assert json.dumps(text, ensure_ascii=True).count("\\u") < 100
