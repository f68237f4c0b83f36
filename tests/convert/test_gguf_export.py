"""GGUF export: read back by our reader, by the `gguf` package, and run by llama.cpp."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from conftest import (
    INTERLEAVED_8,
    MakeCheckpoint,
    byte_tokenizer,
    mistral_model,
    slow,
    write_checkpoint,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config, tiny_weights

from convert.__main__ import main as convert
from convert.gguf_export import KINDS, export, paired
from convert.gguf_vocabulary import PROBES, tokenizer_metadata
from mlx_cerebrum import load
from mlx_cerebrum.decoding.decoder import generate_step
from mlx_cerebrum.decoding.stream import generate
from mlx_cerebrum.errors import CerebrumError, CheckpointError, ConfigError, TokenizerError
from mlx_cerebrum.plan.layer_plan import LayerPlan, resolve
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights.checkpoint import Checkpoint
from mlx_cerebrum.weights.gguf_blocks import half_split
from mlx_cerebrum.weights.gguf_file import GGUFFile
from mlx_cerebrum.weights.opening import open_checkpoint
from mlx_cerebrum.weights.safetensors_checkpoint import SafetensorsCheckpoint

SCALES = """merge_method: passthrough
slices:
- sources:
  - model: source
    layer_range: [0, 5]
    parameters: {scale: [{filter: o_proj, value: 0.7}, {filter: down_proj, value: 0.6}]}
- sources:
  - model: source
    layer_range: [3, 8]
    parameters: {scale: [{filter: norm, value: [1.0, 0.5]}, {filter: q_proj, value: 1.3}]}
"""
RESIDUAL = SCALES.replace("filter: norm", "filter: o_proj").replace("q_proj", "down_proj")


def write(source: Path, out: Path, plan: str | None = None, **options: Any) -> dict[str, Any]:
    """Export as the command line would; `plan` is YAML or a plan's name."""
    known = None
    if plan is not None:
        known = LayerPlan.from_text(plan) if "\n" in plan else resolve(plan)
    return export(open_checkpoint(source), out, known, **options)


def dense(path: Path) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Every tensor of a checkpoint in float32, by Hugging Face name."""
    checkpoint = open_checkpoint(path)
    found = {}
    for module in {name.rpartition(".")[0] for name in checkpoint.shapes}:
        arrays, packing = checkpoint.read(module), checkpoint.packing(module)
        weight = packing.dequantize(arrays, mx.float32) if packing else arrays["weight"]
        found[module] = np.asarray(weight.astype(mx.float32))
    return found


def assert_same(one: Path, other: Path) -> None:
    expected, found = dense(one), dense(other)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_row_order_is_the_readers_undone(heads: int, pairs: int, columns: int) -> None:
    rows = np.arange(heads * pairs * 2 * columns).reshape(-1, columns)
    np.testing.assert_array_equal(
        half_split(np.asarray(paired(mx.array(rows), heads)), heads), rows
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.one_in(8)
def test_reads_back_as_gguf_rounds_it(
    checkpoint: MakeCheckpoint, tmp_path: Path, kind: str
) -> None:
    source, out = checkpoint(), tmp_path / "out.gguf"
    report = write(source, out, kind=kind)
    assert out.stat().st_size == report["bytes"]
    assert hashlib.sha256(out.read_bytes()).hexdigest() == report["sha256"]
    stored = gguf.GGMLQuantizationType[kind]
    found = dense(out)
    for name, value in dense(source).items():
        if value.ndim == 2:
            value = gguf.quants.dequantize(gguf.quants.quantize(value, stored), stored)
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    # gguf's own reader agrees on types: norms in float32, matrices as asked for.
    reader = gguf.GGUFReader(out)
    assert report["tensors"] == len(reader.tensors) == 8 * 9 + 3
    for tensor in reader.tensors:
        matrix = len(tensor.shape) == 2
        assert tensor.tensor_type.name == (kind if matrix else "F32"), tensor.name
        assert tensor.data_offset % 32 == 0
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType[KINDS[kind]]


def test_config_survives(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = checkpoint(rope_theta=12345.0, rms_norm_eps=3e-6)
    write(source, tmp_path / "out.gguf", plan_text(INTERLEAVED_8), kind="F32")
    before, after = open_checkpoint(source).config, open_checkpoint(tmp_path / "out.gguf").config
    assert after.layer_map == tuple(range(12))
    kept = vars(before) | {"num_hidden_layers": 12, "layer_map": after.layer_map}
    assert vars(after) == kept


def plan_text(ranges: str) -> str:
    parts = [part.split("-") for part in ranges.split(",")]
    slices = [f"- sources: [{{model: source, layer_range: [{a}, {b}]}}]" for a, b in parts]
    return "\n".join(["merge_method: passthrough", "slices:", *slices, ""])


@slow
def test_float32_gives_the_sources_tokens_and_logits(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source, plan = checkpoint(), plan_text(INTERLEAVED_8)
    write(source, tmp_path / "out.gguf", plan, kind="F32")
    model, tokenizer = load(source, LayerPlan.from_text(plan), dtype="float32")
    other, their_tokenizer = load(tmp_path / "out.gguf", dtype="float32")
    prompt = "Past the window of twelve tokens"
    ids = mx.array([tokenizer.encode(prompt)])
    assert mx.array_equal(model(ids, model.make_cache()), other(ids, other.make_cache()))
    text = generate(model, tokenizer, prompt, max_tokens=24)
    assert len(set(text)) > 4
    assert generate(other, their_tokenizer, prompt, max_tokens=24) == text


def test_any_scale_as_the_unrolled_directory_has_it(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source, plan, unrolled = checkpoint(), tmp_path / "plan.yml", tmp_path / "unrolled"
    plan.write_text(SCALES)
    flags = ["--plan", str(plan), "--layout", "unrolled", "--quiet"]
    assert convert(["--hf-path", str(source), "--mlx-path", str(unrolled), *flags]) == 0
    write(source, tmp_path / "out.gguf", SCALES, kind="F32")
    assert_same(unrolled, tmp_path / "out.gguf")


@slow
def test_folded_source_brings_its_own_scales(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source, plan, folded = checkpoint(), tmp_path / "plan.yml", tmp_path / "folded"
    plan.write_text(RESIDUAL)
    flags = ["--plan", str(plan), "--quiet"]
    assert convert(["--hf-path", str(source), "--mlx-path", str(folded), *flags]) == 0
    assert open_checkpoint(folded).config.residual_scales is not None
    write(folded, tmp_path / "folded.gguf", kind="F32")
    write(source, tmp_path / "planned.gguf", RESIDUAL, kind="F32")
    assert_same(tmp_path / "planned.gguf", tmp_path / "folded.gguf")


def test_packed_source_is_made_dense(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    flags = ["-q", "--q-group-size", "32", "--quiet"]
    assert convert(["--hf-path", str(checkpoint()), "--mlx-path", str(packed), *flags]) == 0
    write(packed, tmp_path / "out.gguf", kind="F32")
    assert_same(packed, tmp_path / "out.gguf")


def test_tied_and_tall_and_indivisible(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = checkpoint(tie_word_embeddings=True, intermediate_size=72, sliding_window=None)
    report = write(source, tmp_path / "out.gguf", kind="Q8_0")
    file = GGUFFile.open(tmp_path / "out.gguf")
    assert "output.weight" not in file.tensors
    assert file.tensors["blk.0.ffn_down.weight"].ggml_type == "F16"
    assert file.tensors["blk.0.ffn_up.weight"].ggml_type == "Q8_0"
    assert any("8 matrices don't divide" in note for note in report["notes"])
    assert not any("window" in note for note in report["notes"])


def test_notes_say_what_llama_cpp_will_not_do(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    notes = write(checkpoint(), tmp_path / "out.gguf")["notes"]
    assert any("chat template" in note for note in notes)
    assert any("past 12 tokens" in note for note in notes)


def test_each_block_is_read_once(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    read = SafetensorsCheckpoint.read

    def counted(self: SafetensorsCheckpoint, module: str) -> dict[str, mx.array]:
        reads.append(module)
        return read(self, module)

    monkeypatch.setattr(SafetensorsCheckpoint, "read", counted)
    seen: list[tuple[int, int]] = []
    plan = plan_text(INTERLEAVED_8)
    write(checkpoint(), tmp_path / "o.gguf", plan, progress=lambda *a: seen.append(a))
    assert len(reads) == len(set(reads)) == 8 * 9 + 3
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


# The tokenizer.


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tiny model over Mistral's real vocabulary, its table padded by 64 rows."""
    path = tmp_path_factory.mktemp("mistral") / "source"
    config = tiny_config(num_hidden_layers=1, vocab_size=32064, torch_dtype="float32")
    write_checkpoint(path, config, tiny_weights(config, seed=5))
    (path / "tokenizer.json").unlink()
    shutil.copyfile(mistral_model(), path / "tokenizer.model")
    settings = {"add_bos_token": True, "chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return open_checkpoint(path)


@slow
def test_sentencepiece_survives(mistral: Checkpoint, tmp_path: Path) -> None:
    export(mistral, tmp_path / "out.gguf", kind="Q8_0")
    before, after = mistral.tokenizer(), open_checkpoint(tmp_path / "out.gguf").tokenizer()
    for text in PROBES:
        assert after.encode(text) == before.encode(text)
        assert after.decode(before.encode(text)) == before.decode(before.encode(text))
    assert after.encode("a")[0] == 1
    assert after.eos_token_ids == before.eos_token_ids == {2}
    assert after.chat_template == before.chat_template
    metadata = GGUFFile.open(tmp_path / "out.gguf").metadata
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.tokens"][32063] == "[PAD32063]"
    assert metadata["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]  # <unk> <s> </s> <0x00>
    assert metadata["tokenizer.ggml.add_space_prefix"] is True


@pytest.fixture(scope="module")
def mistral_pair(mistral: Checkpoint) -> tuple[Tokenizer, Tokenizer]:
    return mistral.tokenizer(), Tokenizer.from_gguf(tokenizer_metadata(mistral, 32064)[0])


@given(st.text(st.sampled_from("ab e<>/s_▁\n\t éß漢🎉=019.,'")) | st.text())
@settings(max_examples=150, deadline=None)
@slow
def test_sentencepiece_survives_any_text(
    mistral_pair: tuple[Tokenizer, Tokenizer], text: str
) -> None:
    before, after = mistral_pair
    ids = before.encode(text)
    assert after.encode(text) == ids
    assert after.decode(ids) == before.decode(ids)


@slow
def test_byte_level_is_what_the_demo_has(demo: Path, tmp_path: Path) -> None:
    """tokenizer.json, made from the demo's GGUF, becomes that GGUF's metadata again."""
    expected = GGUFFile.open(demo).metadata
    config = tiny_config(num_hidden_layers=1, vocab_size=49152 + 8, bos_token_id=None)
    path = write_checkpoint(tmp_path / "source", config, tiny_weights(config, seed=5))
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").unlink()
    open_checkpoint(demo).tokenizer().save(path)
    found, notes = tokenizer_metadata(open_checkpoint(path), 49160)
    assert not notes
    assert found.pop("tokenizer.ggml.tokens")[49152:] == [f"[PAD{i}]" for i in range(49152, 49160)]
    assert found.pop("tokenizer.ggml.token_type")[:49152] == expected["tokenizer.ggml.token_type"]
    for key in ("model", "pre", "merges", "bos_token_id", "eos_token_id", "add_bos_token"):
        assert found[f"tokenizer.ggml.{key}"] == expected[f"tokenizer.ggml.{key}"], key
    assert found["tokenizer.chat_template"] == expected["tokenizer.chat_template"]


def test_rows_that_mergekit_cuts_are_cut(
    checkpoint: MakeCheckpoint, plan_file: Callable[..., Path], tmp_path: Path
) -> None:
    """With `tokenizer_source` the tables keep a row for each token, as unrolled they do."""
    plan = plan_file()
    plan.write_text(plan.read_text() + "tokenizer_source: base\n")
    flags = ["--hf-path", str(checkpoint(vocab_size=300)), "--plan", str(plan), "--quiet"]
    unrolled, file = tmp_path / "unrolled", tmp_path / "out.gguf"
    assert convert([*flags, "--layout", "unrolled", "--mlx-path", str(unrolled)]) == 0
    assert convert([*flags, "--gguf", "F32", "--mlx-path", str(file)]) == 0
    assert open_checkpoint(file).config.vocab_size == 259
    assert_same(unrolled, file)


def test_end_tokens_keep_their_roles(checkpoint: MakeCheckpoint) -> None:
    source = checkpoint(eos_token_id=[2, 7, 5, 9])
    metadata, notes = tokenizer_metadata(open_checkpoint(source), 260)
    roles = [metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")]
    assert roles == [2, 5, 7]
    assert any("[9]" in note for note in notes)


def normalized(raw: dict[str, Any]) -> None:
    raw["normalizer"] = {"type": "NFKC"}


def prefixed(raw: dict[str, Any]) -> None:
    raw["pre_tokenizer"]["add_prefix_space"] = True


def byte_fallback(raw: dict[str, Any]) -> None:
    raw["model"]["byte_fallback"] = True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (normalized, "can't be expressed in GGUF"),
        (prefixed, "can't be expressed in GGUF"),
        (byte_fallback, "tokenizer.model beside it"),
    ],
)
def test_tokenizers_that_would_change_are_refused(
    checkpoint: MakeCheckpoint, tmp_path: Path, change: Any, message: str
) -> None:
    source = checkpoint()
    byte_tokenizer(source)
    raw = json.loads((source / "tokenizer.json").read_text())
    change(raw)
    (source / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(TokenizerError, match=message):
        write(source, tmp_path / "out.gguf")
    assert not list(tmp_path.glob("*.gguf"))


# What is refused, and that nothing is left behind.


def test_never_overwrites(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("precious")
    with pytest.raises(CheckpointError, match="exists already"):
        write(checkpoint(), out)
    assert out.read_text() == "precious"


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("out.bin", "F16", "named something.gguf"),
        ("out.gguf", "Q4_0", "F32, F16, BF16, Q8_0"),
        ("no/out.gguf", "F16", "does not exist"),
    ],
)
def test_wrong_requests(
    checkpoint: MakeCheckpoint, tmp_path: Path, name: str, kind: str, message: str
) -> None:
    with pytest.raises(CerebrumError, match=message) as error:
        write(checkpoint(), tmp_path / name, kind=kind)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (70000.0, "F16", "down_proj reaches 70000, too large for F16"),
        (1e7, "Q8_0", r"down_proj reaches 1e\+07, too large for Q8_0"),
        (3.4e38, "BF16", "down_proj reaches 3.4e"),
        (np.nan, "F32", "down_proj has values that are not finite"),
        (-np.inf, "Q8_0", "down_proj has values that are not finite"),
    ],
)
def test_values_that_do_not_fit(tmp_path: Path, value: float, kind: str, message: str) -> None:
    config = tiny_config(num_hidden_layers=2, vocab_size=260)
    weights = tiny_weights(config, seed=3)
    weights["model.layers.1.mlp.down_proj.weight"][3, 4] = value
    source = write_checkpoint(tmp_path / "source", config, weights)
    with pytest.raises(CheckpointError, match=f"layers.1.mlp.{message}"):
        write(source, tmp_path / "out.gguf", kind=kind)
    assert not list(tmp_path.glob("**/*.gguf"))


def test_the_largest_values_that_fit(tmp_path: Path) -> None:
    config = tiny_config(num_hidden_layers=1, vocab_size=260)
    for kind, value in (("F16", 65519.0), ("Q8_0", 8321039.5), ("BF16", 3.396e38)):
        weights = tiny_weights(config, seed=3)
        weights["lm_head.weight"][3, 4] = value
        source = write_checkpoint(tmp_path / kind, config, weights)
        write(source, tmp_path / f"{kind}.gguf", kind=kind)
        assert np.isfinite(dense(tmp_path / f"{kind}.gguf")["lm_head"]).all()


def test_disk_space_is_asked_for_first(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil._ntuple_diskusage(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"needs \d.* of disk and 0.0 MB are free"):
        write(checkpoint(), tmp_path / "out.gguf")
    assert not list(tmp_path.glob("**/*.gguf"))


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_failed_write_leaves_nothing(
    checkpoint: MakeCheckpoint, tmp_path: Path, failure: BaseException
) -> None:
    def failing(done: int, total: int) -> None:
        if done > total // 2:
            raise failure

    kind = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else CheckpointError
    with pytest.raises(kind):
        write(checkpoint(), tmp_path / "out.gguf", progress=failing)
    assert not list(tmp_path.glob("**/*.gguf"))


@slow
def test_leftovers_are_replaced_and_a_running_export_is_not(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source, out = checkpoint(), tmp_path / "out.gguf"
    (tmp_path / ".out.partial.gguf").write_bytes(b"x" * 10_000_000)

    def second(done: int, total: int) -> None:
        with pytest.raises(CheckpointError, match="another run"):
            write(source, out)

    report = write(source, out, progress=second)
    assert hashlib.sha256(out.read_bytes()).hexdigest() == report["sha256"]
    assert [path.name for path in tmp_path.glob("*.gguf")] == ["out.gguf"]


def test_without_the_package(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"needs the gguf package: .* install "):
        write(checkpoint(), tmp_path / "out.gguf")


# llama.cpp itself.


def llama_cpp(path: Path) -> Any:
    """llama.cpp's server on the CPU, with a float32 cache and plain attention."""
    xllamacpp: Any = import_module("xllamacpp")  # 100 MB, needed here only
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 256, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # more would spin
    params.warmup, params.verbosity = False, -1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


@pytest.mark.long
def test_llama_cpp_says_what_we_say(demo: Path, tmp_path: Path) -> None:
    """The interleaved demo in float32: greedy text, and the chat template's prompt."""
    out = tmp_path / "out.gguf"
    write(demo, out, "demo-interleaved", kind="F32")
    server = llama_cpp(out)
    model, tokenizer = load(out, dtype="float32")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    expected = generate(model, tokenizer, tokenizer.apply_chat_template(chat), max_tokens=12)
    request = {"temperature": 0.0, "messages": chat, "max_tokens": 12}
    answer = server.handle_chat_completions(request)["choices"][0]
    assert answer["message"]["content"] == expected
    prompt = "In 1969,  Neil Armstrong"
    expected = generate(model, tokenizer, prompt, max_tokens=12)
    request = {"temperature": 0.0, "prompt": prompt, "max_tokens": 12}
    assert server.handle_completions(request)["choices"][0]["text"] == expected


@slow
def test_llama_cpp_reads_sentencepiece_and_no_window(mistral: Checkpoint, tmp_path: Path) -> None:
    """A random model answers other ids with other ids: Mistral's vocabulary is read as ours."""
    out = tmp_path / "out.gguf"
    export(mistral, out, kind="F32")
    server = llama_cpp(out)
    model, tokenizer = load(out, dtype="float32", window=0)
    for text in PROBES[:5]:
        ids = tokenizer.encode(text)
        assert len(ids) > 12  # the window
        request = {"temperature": 0.0, "prompt": text, "max_tokens": 4, "n_probs": 1}
        answer = server.handle_completions(request | {"ignore_eos": True})["choices"][0]
        found = [token["id"] for token in answer["logprobs"]["content"]]
        assert found == list(generate_step(ids, model, max_tokens=4)), text
