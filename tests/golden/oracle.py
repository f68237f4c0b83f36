"""Hugging Face transformers as the oracle: float32, eager attention, CPU."""

import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

Floats = npt.NDArray[np.float32]

torch.set_grad_enabled(False)
torch.set_num_threads(2)  # the order of a sum, and so its last bit, depends on it


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def build(
    config: dict[str, Any],
    weights: dict[str, Floats],
    layer_map: list[int],
    scales: list[tuple[float, float]] | None = None,
) -> PreTrainedModel:
    """An unrolled model: one physical layer, with its own copy of the weights, per position.

    `scales` holds a pair for each position; o_proj is multiplied by the first (what
    attention writes) and down_proj by the second (what the MLP writes), in float32.
    """
    keys = {k: v for k, v in config.items() if k != "model_type"}
    keys["num_hidden_layers"] = len(layer_map)
    hf_config = AutoConfig.for_model(config["model_type"], **keys)
    model = AutoModelForCausalLM.from_config(
        hf_config, attn_implementation="eager", dtype=torch.float32
    )
    state = {k: torch.from_numpy(v) for k, v in weights.items() if ".layers." not in k}
    if config["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    for position, block in enumerate(layer_map):
        prefix = f"model.layers.{block}."
        attention, mlp = scales[position] if scales else (1.0, 1.0)
        factors = {"self_attn.o_proj.weight": attention, "mlp.down_proj.weight": mlp}
        for name, value in weights.items():
            if name.startswith(prefix):
                kind = name.removeprefix(prefix)
                scaled = value * np.float32(factors.get(kind, 1.0))
                state[f"model.layers.{position}.{kind}"] = torch.from_numpy(scaled)
    model.load_state_dict(state, strict=True)
    _check(model, config)
    return model.eval()


def _check(model: PreTrainedModel, config: dict[str, Any]) -> None:
    """The settings that would be wrong in silence."""
    got = model.config
    if got._attn_implementation != "eager":
        raise RuntimeError(f"attention is {got._attn_implementation}, not eager")
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    asked = (config.get("sliding_window"), config["rms_norm_eps"], theta)
    have = (
        getattr(got, "sliding_window", None),
        got.rms_norm_eps,
        got.rope_parameters["rope_theta"],
    )
    if asked != have:
        raise RuntimeError(f"transformers reads window, eps, theta as {have}, not {asked}")


def greedy(
    model: PreTrainedModel, prompt: list[int], max_tokens: int, eos: int | None = None
) -> tuple[list[int], Floats]:
    """`generate` with its KV cache: the new ids (an EOS included) and their logits [N, V]."""
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=eos,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    ids: list[int] = out.sequences[0, len(prompt) :].tolist()
    return ids, torch.cat(out.logits).float().numpy()


def sequence_logits(model: PreTrainedModel, ids: list[int]) -> Floats:
    """One pass over the whole sequence, no cache: logits [len(ids), V]; row i follows ids[i]."""
    out: Floats = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    return out


def peakedness(model: PreTrainedModel, ids: list[int], skip: int) -> list[float]:
    """For each position, the largest attention probability, averaged over heads and queries.

    The first `skip` queries see fewer keys than the others and are left out.
    """
    attentions = model(torch.tensor([ids]), use_cache=False, output_attentions=True).attentions
    return [float(a[0, :, skip:].amax(-1).mean()) for a in attentions]


def checked_greedy(
    model: PreTrainedModel, prompt: list[int], max_tokens: int, eos: int | None = None
) -> tuple[list[int], Floats, float]:
    """Greedy ids, the logits of prompt + ids, and how far the cached logits are from those.

    Raises RuntimeError where the cached and the uncached pass would choose differently.
    """
    ids, cached = greedy(model, prompt, max_tokens, eos)
    logits = sequence_logits(model, prompt + ids)
    full = logits[len(prompt) - 1 : -1]
    if full.argmax(-1).tolist() != ids:
        raise RuntimeError("transformers' cached generation differs from its uncached pass")
    return ids, logits, float(np.abs(full - cached).max())


def margins(logits: Floats, prompt_length: int) -> list[float]:
    """At each greedy step, the best logit less the second best."""
    steps = np.sort(logits[prompt_length - 1 : -1].astype(np.float64), axis=-1)
    return [round(float(m), 6) for m in steps[:, -1] - steps[:, -2]]


def rounded(figures: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Two significant digits (counts stay whole): enough to judge by, and stable between runs."""
    return {
        name: {
            key: value if isinstance(value, int) else float(f"{value:.2g}")
            for key, value in values.items()
        }
        for name, values in figures.items()
    }


def write_json(path: Path, document: dict[str, Any], allow_nan: bool = False) -> None:
    """One line for each key, and for each item of a list of objects: diffs stay readable."""

    def dump(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=allow_nan)

    lines = []
    for key, value in document.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n " + ",\n ".join(dump(item) for item in value) + "\n]"
        else:
            text = dump(value)
        lines.append(f"{dump(key)}: {text}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
