"""Make `mergekit.json` again: what mergekit writes for about fifty plans, as hashes.

    pip install -e '.[oracle]' mergekit==0.1.5
    PYTHONPATH=tests python tests/golden/make_mergekit.py

The sources' weights come from `tiny.py`, so any machine can make them again. mergekit computes
on the CPU, and neither a cast nor a product depends on the machine: the same file comes out
everywhere.
"""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from oracle import versions
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_weights
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

FOLDER = Path(__file__).resolve().parent
TOKENS = 259  # as many as the tests' tokenizer has
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in DTYPES.items()}
# Written over the first values of every tensor: both zeros, subnormal float16 and float32,
# the largest number that both 16-bit formats hold, and ties for rounding to them.
AWKWARD = [0.0, -0.0, 1e-7, -6e-8, 1e-40, -1e-38, 65280.0, -65280.0, 1.00390625, -1.0009765625]

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": TOKENS,
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "sliding_window": None,
}
# The spelling of transformers 5; None stands for a key left out.
FIVE: dict[str, Any] = {
    "torch_dtype": None,
    "dtype": "bfloat16",
    "rope_theta": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}


def source(
    code: str, other: dict[str, str] | None = None, head: bool | None = None, **changes: Any
) -> dict[str, Any]:
    """`code`: safetensors' name of the dtype; `other`: that of tensors with a text in their name;
    `head`: whether `lm_head` is stored (None: unless it is tied)."""
    named = {"torch_dtype": str(DTYPES[code]).removeprefix("torch.")}
    config = tiny_config(**(SMALL | named | changes))
    return {
        "config": {k: v for k, v in config.items() if v is not None},
        "dtype": code,
        "other": other or {},
        "head": not config["tie_word_embeddings"] if head is None else head,
    }


SOURCES = {
    "float32": source("F32"),
    "float16": source("F16"),
    "bfloat16": source("BF16"),
    "tied": source("F16", tie_word_embeddings=True),
    "tied_with_head": source("BF16", head=True, tie_word_embeddings=True),
    "norms_float32": source("BF16", {"norm": "F32"}),
    "mixed": source("F32", {"mlp": "BF16", "_proj": "F16"}),
    "five": source("BF16", **FIVE),
    "llama": source("F16", **LLAMA),
    "odd": source(
        "BF16", hidden_size=36, intermediate_size=52, num_attention_heads=3, num_key_value_heads=3
    ),
    "rows_to_spare": source("F16", vocab_size=TOKENS + 5),
    "blocks_32": source("F16", num_hidden_layers=32),
}

HALVES = [[0, 4], [2, 6], [4, 8]]
CARD = [[first, first + 8] for first in range(0, 25, 4)]
DAMPED = [{"filter": "o_proj", "value": 0.5**0.5}, {"filter": "down_proj", "value": 0.5**0.5}]


def plan(model: str, ranges: list[list[int]] | None = None, **top: Any) -> dict[str, Any]:
    slices = [{"sources": [{"model": model, "layer_range": r}]} for r in ranges or HALVES]
    return {"merge_method": "passthrough", **top, "slices": slices}


def scaled(model: str, scale: Any, ranges: list[list[int]] | None = None, **top: Any) -> Any:
    return plan(model, ranges, parameters={"scale": scale}, **top)


def levels(model: str, **scales: Any) -> dict[str, Any]:
    """Scales at `top`, `module`, `slice` and `source` (the first of each)."""
    config = plan(model, dtype="bfloat16")
    first = config["slices"][0]
    if "module" in scales:
        module = {"slices": config.pop("slices")}
        config["modules"] = {"default": module}
        module["parameters"] = {"scale": scales["module"]}
    for key, place in (("top", config), ("slice", first), ("source", first["sources"][0])):
        if key in scales:
            place["parameters"] = {"scale": scales[key]}
    return config


def cases() -> dict[str, tuple[str, Any]]:
    """Name -> source and configuration."""
    found: dict[str, tuple[str, Any]] = {
        "card": ("blocks_32", plan("blocks_32", CARD, dtype="bfloat16")),
        "card, as stored": ("blocks_32", plan("blocks_32", CARD)),
        "card, damped": ("blocks_32", scaled("blocks_32", DAMPED, CARD, dtype="float32")),
    }

    def add(name: str, model: str, config: Any) -> None:
        found[name] = model, config

    for model in ("float32", "float16", "bfloat16"):
        for dtype in ("float32", "float16", "bfloat16"):
            add(f"{model} to {dtype}", model, plan(model, dtype=dtype))
    add("cast twice", "float32", plan("float32", dtype="bfloat16", out_dtype="float16"))
    add("cast on the way out", "bfloat16", plan("bfloat16", out_dtype="float16"))
    add("out_dtype alone, same order", "float16", plan("float16", [[0, 8]], out_dtype="float32"))
    for dtype, out in (("float16", "float32"), ("bfloat16", "float16"), ("float32", "bfloat16")):
        name = f"scaled in {dtype}, stored in {out}"
        add(name, "float32", scaled("float32", 0.3, dtype=dtype, out_dtype=out))
    ranges = {
        "gap": [[0, 3], [6, 8]],
        "first and last missing": [[2, 5]],
        "out of order": [[4, 8], [0, 4]],
        "backwards": [[i, i + 1] for i in range(7, -1, -1)],
        "repeats": [[1, 3], [1, 3], [1, 3]],
        "one": [[5, 6]],
    }
    for name, listed in ranges.items():
        add(f"ranges: {name}", "float16", plan("float16", listed))
    for model in ("tied", "tied_with_head", "norms_float32", "mixed", "five", "llama", "odd"):
        add(f"source {model}", model, plan(model))
        add(f"source {model}, scaled", model, scaled(model, 0.7, dtype="bfloat16"))
    for value in (0, 1, -1, 1 / 3, 1e-30, 1.001):
        add(f"scale {value:.6g}", "bfloat16", scaled("bfloat16", value))
    lists: dict[str, Any] = {
        "filters": [{"filter": "self_attn", "value": 0.5}, {"filter": "layers.3", "value": 0.25}],
        "filters and a default": [*DAMPED, {"value": 0.9}],
        "no match": [{"filter": "MLP", "value": 0.5}],
        "norms and head": [{"filter": "norm", "value": 0.5}, {"filter": "lm_head", "value": 0.1}],
        "star": [{"filter": "*", "value": 0.3}, {"filter": "mlp", "value": 0.5}],
        "gradient": [0.1, 0.9, 0.4],
        "gradients behind filters": [{"filter": "o_proj", "value": [0, 1]}, {"value": [1, 0.2]}],
    }
    for name, scale in lists.items():
        add(f"scale list: {name}", "float32", scaled("float32", scale, [[0, 8], [3, 4], [1, 6]]))
    half = [{"filter": "o_proj", "value": 0.5}]
    add("levels: all", "float16", levels("float16", top=0.1, slice=0.2, source=0.3))
    add("levels: through", "float16", levels("float16", top=0.1, slice=[{**half[0]}], source=half))
    add("levels: module", "float16", levels("float16", top=0.1, module=half, slice=[0.4, 0.8]))
    models = {"merge_method": "passthrough", "models": [{"model": {"model": {"path": "float16"}}}]}
    add("models", "float16", models | {"parameters": {"scale": [0.1, 0.9]}})
    base: dict[str, Any] = {"base_model": "float16", "tokenizer_source": "base"}
    add("base_model", "float16", scaled("float16", 0.5, **base))
    spare = plan("rows_to_spare", tokenizer_source="union")
    add("tokenizer_source, rows to spare", "rows_to_spare", spare)
    # Too large for float16 on the way or at the end: mergekit stores infinities.
    add("overflow: scaled", "float16", scaled("float16", 1.01))
    add("overflow: cast", "float32", scaled("float32", 1.01, dtype="float32", out_dtype="float16"))
    return found


def write_source(directory: Path, what: dict[str, Any]) -> str:
    """Write one of SOURCES; returns its tensors' hashes."""
    config = what["config"]
    tensors = {}
    for name, value in tiny_weights(config | {"tie_word_embeddings": not what["head"]}, 3).items():
        value.reshape(-1)[: len(AWKWARD)] = AWKWARD
        codes = [code for text, code in what["other"].items() if text in name]
        tensors[name] = torch.from_numpy(value).to(DTYPES[[*codes, what["dtype"]][0]])
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(TOKENS)}, unk_token="t0"))
    words.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return digests(tensors)


def digests(tensors: dict[str, torch.Tensor]) -> str:
    """For each tensor in the order of names, the start of a hash of all there is to it."""
    found = []
    for name, tensor in sorted(tensors.items()):
        digest = hashlib.sha256(json.dumps([name, CODES[tensor.dtype], [*tensor.shape]]).encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        found.append(digest.hexdigest()[:12])
    return " ".join(found)


# Of the config, what says how the model computes; the rest is transformers' own defaults.
KEYS = (
    *("architectures", "model_type", "hidden_size", "num_hidden_layers", "intermediate_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "vocab_size"),
    *("max_position_embeddings", "rms_norm_eps", "sliding_window", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "dtype"),
)


def merge(config: Any) -> dict[str, Any]:
    """What mergekit writes for `config`, whose models are in the current directory."""
    text = yaml.safe_dump(config, sort_keys=False, default_flow_style=None)
    LoaderCache().loaders.clear()
    with tempfile.TemporaryDirectory() as out:
        run_merge(
            MergeConfiguration.model_validate(yaml.safe_load(text)),
            out,
            MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False),
        )
        tensors = load_file(Path(out, "model.safetensors"))
        written = json.loads(Path(out, "config.json").read_text())
    nonfinite = sum(int((~t.isfinite()).sum()) for t in tensors.values())
    return {
        "yaml": text,
        "tensors": digests(tensors),
        "dtypes": sorted({CODES[t.dtype] for t in tensors.values()}),
        "nonfinite": nonfinite,
        "config": {key: written[key] for key in KEYS if key in written}
        | {"rope_theta": written["rope_parameters"]["rope_theta"]},
    }


def main() -> None:
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        os.environ["HF_HUB_OFFLINE"] = "1"
        for name, what in SOURCES.items():
            what["tensors"] = write_source(Path(name), what)
        results = {name: {"source": s} | merge(config) for name, (s, config) in cases().items()}
    document = {
        "versions": versions() | {"mergekit": version("mergekit")},
        "awkward": AWKWARD,
        "sources": SOURCES,
        "cases": results,
    }
    lines = json.dumps(document, indent=1)
    (FOLDER / "mergekit.json").write_text(lines + "\n", encoding="utf-8")
    count = sum(len(case["tensors"].split()) for case in results.values())
    print(f"mergekit.json: {len(results)} cases, {count} tensors")


if __name__ == "__main__":
    main()
