"""Bit for bit what mergekit writes (kept as hashes) and what mlx_lm.convert writes (called)."""

import hashlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import byte_tokenizer, plan_yaml
from mlx_lm.convert import convert as mlx_lm_convert
from tiny import tiny_config, tiny_weights

from convert.__main__ import main

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "golden" / "mergekit.json").read_text(encoding="utf-8")
)
DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
CODES = {dtype: code for code, dtype in DTYPES.items()}
UNSIGNED = {2: mx.uint16, 4: mx.uint32}
Tensors = dict[str, mx.array]


def run(*args: Any) -> int:
    return main([str(a) for a in args] + ["--quiet"])


def read(directory: Path) -> Tensors:
    found: Tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        loaded = mx.load(str(file))
        assert isinstance(loaded, dict)
        assert not found.keys() & loaded.keys()
        found |= loaded
    return found


def raw(array: mx.array) -> bytes:
    return np.array(array.view(UNSIGNED[array.dtype.size])).tobytes()


def digests(tensors: Tensors) -> dict[str, str]:
    """As `golden/make_mergekit.py` hashes them: name, dtype, shape and bytes."""
    found = {}
    for name, array in sorted(tensors.items()):
        head = json.dumps([name, CODES[array.dtype], list(array.shape)])
        found[name] = hashlib.sha256(head.encode() + raw(array)).hexdigest()[:12]
    return found


def wrong(tensors: Tensors, golden: str) -> list[str]:
    """Names whose hash is not the golden one (all that are there, if one is missing or extra)."""
    ours, theirs = digests(tensors), golden.split()
    if len(ours) != len(theirs):
        return [f"{len(ours)} tensors, not {len(theirs)}", *ours]
    return [name for (name, one), two in zip(ours.items(), theirs, strict=True) if one != two]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the golden file's sources, the same bits as mergekit read."""
    root = tmp_path_factory.mktemp("sources")
    for source, what in GOLDEN["sources"].items():
        config = what["config"]
        tensors: Tensors = {}
        for name, value in tiny_weights(
            config | {"tie_word_embeddings": not what["head"]}, seed=3
        ).items():
            value.reshape(-1)[: len(GOLDEN["awkward"])] = GOLDEN["awkward"]
            codes = [code for text, code in what["other"].items() if text in name]
            tensors[name] = mx.array(value).astype(DTYPES[[*codes, what["dtype"]][0]])
        assert not wrong(tensors, what["tensors"])
        directory = root / source
        directory.mkdir()
        mx.save_safetensors(str(directory / "model.safetensors"), tensors, {"format": "pt"})
        (directory / "config.json").write_text(json.dumps(config))
        byte_tokenizer(directory)
    return root


@pytest.mark.parametrize("name", GOLDEN["cases"])
@pytest.mark.one_in(4)
def test_unrolled_is_what_mergekit_writes(
    name: str, sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = GOLDEN["cases"][name]
    plan, out = tmp_path / "plan.yml", tmp_path / "out"
    plan.write_text(case["yaml"])
    command = ["--hf-path", sources / case["source"], "--plan", plan, "--layout", "unrolled"]
    if case["nonfinite"]:  # mergekit says nothing
        assert run(*command, "--mlx-path", out) == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert not out.exists()
        command.append("--allow-nonfinite")
    assert run(*command, "--mlx-path", out) == 0
    tensors = read(out)
    assert not wrong(tensors, case["tensors"])
    assert sum(int((~mx.isfinite(t)).sum()) for t in tensors.values()) == case["nonfinite"]
    assert sorted({CODES[t.dtype] for t in tensors.values()}) == case["dtypes"]
    config = json.loads((out / "config.json").read_text())
    # transformers 4 and 5 spell these two differently; ours keeps the source's spelling.
    config["dtype"] = config.get("dtype", config.get("torch_dtype"))
    config["rope_theta"] = config.get("rope_parameters", config)["rope_theta"]
    if case["source"] == "tied_with_head":  # mergekit goes on calling its own head tied
        case["config"]["tie_word_embeddings"] = False
    assert {key: config.get(key) for key in case["config"]} == case["config"]


def test_a_wrong_tensor_is_named(sources: Path) -> None:
    tensors, golden = read(sources / "float32"), GOLDEN["sources"]["float32"]["tensors"]
    assert wrong(tensors, golden) == []
    zeros = tensors["model.norm.weight"] * mx.array([1.0, -1.0] + [1.0] * 30)  # -0.0 to 0.0
    assert wrong(tensors | {"model.norm.weight": zeros}, golden) == ["model.norm.weight"]
    del tensors["lm_head.weight"]
    assert wrong(tensors, golden)


def test_the_mergekit_cases_cover_what_they_should() -> None:
    cases = GOLDEN["cases"].values()
    assert GOLDEN["versions"]["mergekit"] == "0.1.5"
    assert len(cases) >= 40
    assert len(GOLDEN["cases"]["card"]["tensors"].split()) == 56 * 9 + 3
    assert {case["source"] for case in cases} == set(GOLDEN["sources"])
    assert {tuple(case["dtypes"]) for case in cases} >= {("F32",), ("F16",), ("BF16",)}
    assert sum(case["nonfinite"] > 0 for case in cases) == 2


# Quantized: MLX has one kernel for each of these, so what can differ is what is asked of it.
PACKINGS = [("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
PACKINGS += [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
WIDTHS = {
    "hidden_size": 128,
    "head_dim": 32,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "vocab_size": 260,
}


def write(directory: Path, dtype: mx.Dtype, **changes: Any) -> Path:
    name = str(dtype).removeprefix("mlx.core.")
    config = tiny_config(**(WIDTHS | {"torch_dtype": name} | changes))
    directory.mkdir()
    weights = {k: mx.array(v).astype(dtype) for k, v in tiny_weights(config, seed=5).items()}
    mx.save_safetensors(str(directory / "model.safetensors"), weights, {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    byte_tokenizer(directory)
    return directory


def theirs(source: Path, out: Path, mode: str, bits: int, group: int) -> Path:
    mlx_lm_convert(str(source), str(out), True, group, bits, mode)
    return out


def options(mode: str, bits: int, group: int) -> list[str]:
    affine = ["--q-bits", str(bits), "--q-group-size", str(group)]
    return ["-q", *(affine if mode == "affine" else ["--q-mode", mode])]


def assert_same(ours: Path, other: Path, count: int) -> None:
    found, wanted = read(ours), read(other)
    assert found.keys() == wanted.keys()
    assert len(found) == count
    for name, array in wanted.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert mx.array_equal(found[name], array), name
    one, two = (json.loads((path / "config.json").read_text()) for path in (ours, other))
    for key in ("quantization", "quantization_config"):
        assert one[key] == two[key]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dense")
    for code, dtype in DTYPES.items():
        write(root / code, dtype)
    write(root / "tied", mx.bfloat16, tie_word_embeddings=True)
    write(root / "uneven", mx.float16, hidden_size=96, intermediate_size=128)
    return root


@pytest.mark.parametrize(("mode", "bits", "group"), PACKINGS)
@pytest.mark.parametrize("code", DTYPES)
@pytest.mark.one_in(4)
def test_quantized_is_what_mlx_lm_writes(
    code: str, mode: str, bits: int, group: int, dense: Path, tmp_path: Path
) -> None:
    packed = options(mode, bits, group)
    assert run("--hf-path", dense / code, "--mlx-path", tmp_path / "ours", *packed) == 0
    out = theirs(dense / code, tmp_path / "theirs", mode, bits, group)
    parts = 3 if mode == "affine" else 2
    assert_same(tmp_path / "ours", out, (2 * 7 + 2) * parts + 2 * 2 + 1)


@pytest.mark.parametrize(("mode", "bits", "group"), [("affine", 4, 64), ("nvfp4", 4, 16)])
@pytest.mark.parametrize("source", ["F16", "tied"])
def test_quantized_in_one_step_is_merging_first(
    source: str, mode: str, bits: int, group: int, dense: Path, tmp_path: Path
) -> None:
    """mergekit, then mlx_lm.convert; the first of them in our hands, as the tests above allow."""
    plan = tmp_path / "plan.yml"
    plan.write_text(plan_yaml("0-2,1-2,0-1", "{scale: [{filter: o_proj, value: 0.7}]}", "bfloat16"))
    command = ["--hf-path", dense / source, "--plan", plan, "--layout", "unrolled"]
    assert run(*command, "--mlx-path", tmp_path / "merged") == 0
    packed = options(mode, bits, group)
    assert run(*command, "--mlx-path", tmp_path / "ours", *packed) == 0
    out = theirs(tmp_path / "merged", tmp_path / "theirs", mode, bits, group)
    parts, tables = 3 if mode == "affine" else 2, 1 if source == "tied" else 2
    assert_same(tmp_path / "ours", out, (4 * 7 + tables) * parts + 4 * 2 + 1)


def test_matrices_that_do_not_divide_stay_dense_in_both(dense: Path, tmp_path: Path) -> None:
    packed = options("affine", 4, 64)
    assert run("--hf-path", dense / "uneven", "--mlx-path", tmp_path / "ours", *packed) == 0
    out = theirs(dense / "uneven", tmp_path / "theirs", "affine", 4, 64)
    dense_ones = 2 * 5 + 2  # whose inputs are 96 wide; those of o_proj and down_proj are 128
    assert_same(tmp_path / "ours", out, dense_ones + 2 * 2 * 3 + 2 * 2 + 1)


def test_quantizing_takes_the_dtype_of_the_config(dense: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "source", mx.float32, torch_dtype="bfloat16")
    packed = options("affine", 4, 64)
    assert run("--hf-path", source, "--mlx-path", tmp_path / "ours", *packed) == 0
    out = theirs(source, tmp_path / "theirs", "affine", 4, 64)
    assert_same(tmp_path / "ours", out, (2 * 7 + 2) * 3 + 2 * 2 + 1)
