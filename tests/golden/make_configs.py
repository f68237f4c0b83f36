"""Make `configs.json` and `configs.safetensors` again: what transformers makes of each config.

    PYTHONPATH=tests python tests/golden/make_configs.py

Needs the `oracle` extra of pyproject.toml. Every case is a directory, loaded as people load one.
"""

import dataclasses
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # a config may name files that are not there

import config_cases
import numpy as np
import oracle
import torch
import transformers
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig

FOLDER = Path(__file__).resolve().parent
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def check_keys() -> None:
    """Raise RuntimeError unless the generator has every key of both classes."""
    fields = {f.name for cls in (MistralConfig, LlamaConfig) for f in dataclasses.fields(cls)}
    missing = fields - set(config_cases.ARITHMETIC | config_cases.OTHERS)
    if missing:
        raise RuntimeError(f"tests/config_cases.py has no values for {sorted(missing)}")


def meaning(read: Any) -> dict[str, Any]:
    """The keys that say which weights there are, as transformers' config object has them."""
    found = {key: getattr(read, key) for key in (*_SIZES, "vocab_size", "num_key_value_heads")}
    width = read.head_dim or read.hidden_size // read.num_attention_heads
    return found | {"head_dim": width, "tie_word_embeddings": read.tie_word_embeddings}


def run(case: config_cases.Case, path: Path) -> tuple[config_cases.Floats, bool]:
    """The last logits, and whether a pass with a cache agrees. Raises what transformers does."""
    (path / "config.json").write_text(json.dumps(config_cases.config(case)))
    read = AutoConfig.from_pretrained(path)
    save_file(config_cases.weights(meaning(read), case["head"]), path / "model.safetensors")
    model, loading = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if any(not name.endswith(".bias") for name in loading["missing_keys"]):
        raise RuntimeError(f"{case}: weights missing: {loading['missing_keys']}")
    for name in loading["missing_keys"]:
        model.get_parameter(name).copy_(torch.linspace(-1, 1, model.get_parameter(name).numel()))
    ids = torch.tensor([config_cases.prompt()])
    logits = config_cases.last_logits(model.eval()(ids, use_cache=False).logits)
    model(ids)  # with the cache its config makes; what fails here is refused
    try:
        past = model(ids[:, :-1], use_cache=True)
        last = model(ids[:, -1:], cache=past.cache, use_cache=True)
        agrees = np.allclose(config_cases.last_logits(last.logits), logits, rtol=1e-4, atol=1e-5)
    except Exception:
        agrees = False
    return logits, bool(agrees)


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    check_keys()
    found: list[config_cases.Case] = []
    logits: list[config_cases.Floats] = []
    for case in config_cases.cases():
        with tempfile.TemporaryDirectory() as path:
            try:
                row, cached = run(case, Path(path))
            except Exception as error:
                if isinstance(error, RuntimeError) and "weights missing" in str(error):
                    raise
                found.append(case | {"refused": type(error).__name__})
                continue
        found.append(case | {"row": len(logits), "cached": cached})
        logits.append(row)
    save_file({"logits": np.stack(logits)}, FOLDER / "configs.safetensors")
    document = {"versions": oracle.versions(), "tokens": config_cases.TOKENS, "cases": found}
    oracle.write_json(FOLDER / "configs.json", document, allow_nan=True)
    print(f"{len(found)} configs: {len(logits)} run, {len(found) - len(logits)} refused")


if __name__ == "__main__":
    main()
