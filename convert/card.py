"""The README card of a converted directory, in the form the Hugging Face hub reads."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from mlx_cerebrum.errors import CerebrumError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.memory import human
from mlx_cerebrum.plan.layer_plan import LayerPlan
from mlx_cerebrum.text import one_line
from mlx_cerebrum.tokenizer.chat_formats import DEFAULT_SYSTEM
from mlx_cerebrum.weights.hub import DEFAULT_REPO
from mlx_cerebrum.weights.quantize import Packing

_MERGED_REPO = "Joseph717171/Cerebrum-1.0-12.25B"
# What the cards of the two Cerebrum repositories say.
_KNOWN: dict[str, dict[str, Any]] = {
    DEFAULT_REPO: {"license": "apache-2.0", "language": ["en"]},
    _MERGED_REPO: {"license": "apache-2.0", "language": ["en"], "tags": ["merge", "mergekit"]},
}
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_FRONT_MATTER = re.compile(r"\s*---[\r\n]+(.*?)[\r\n]+---[\r\n]", re.DOTALL)
_INHERITED = ("license", "license_name", "license_link", "language")
_MAX_CARD = 100_000
_QUESTION = "Why is the sky blue?"


def source_card(directory: Path) -> dict[str, Any]:
    """What a source's own README says that its conversions inherit: license, language, and
    whether it is a merge. Empty where there is no card, or none that can be read."""
    try:
        with (directory / "README.md").open(encoding="utf-8") as file:
            text = file.read(_MAX_CARD)
        found = _FRONT_MATTER.match(text)
        front = yaml.safe_load(found[1]) if found else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    if not isinstance(front, dict):
        return {}
    kept = {key: front[key] for key in _INHERITED if _is_text(front.get(key))}
    tags = front.get("tags")
    merged = [t for t in ("merge", "mergekit") if isinstance(tags, list) and t in tags]
    return kept | ({"tags": merged} if merged else {})


def card(config: dict[str, Any], name: str, nbytes: int | None = None) -> str:
    """The card of a directory whose config.json is `config`, as `name` (a path or hub id).

    nbytes: what its tensors take. It says nothing about license or language that the source's
    own card does not.
    """
    provenance = config["provenance"]
    model = ModelConfig.from_dict(config)
    name = one_line(name)
    repo = _repository(provenance)
    sections = [
        _front_matter(config, model, repo),
        f"# {name}",
        _summary(config, model, repo),
        _table(model, nbytes),
        _running(config, model, name),
        _prompt(repo),
        _window(config, model),
    ]
    if provenance.get("plan"):
        whose = "Recovered from the source's layers" if _recovered(provenance) else "Laid out"
        sections.append(
            f"## Layer plan\n\n{whose} as mergekit writes plans, each `layer_range` half-open:\n\n"
            + _fenced("yaml", provenance["plan"])
        )
    return "\n\n".join(sections) + "\n"


def _front_matter(config: dict[str, Any], model: ModelConfig, repo: str | None) -> str:
    provenance = config["provenance"]
    inherited = _KNOWN.get(repo or "", {}) | provenance.get("source_card", {})
    merged = _is_merge(config, model)
    tags = ["mlx", "mlx-cerebrum"]
    tags += ["merge"] if merged and "merge" not in inherited.get("tags", ()) else []
    front: dict[str, Any] = {}
    if repo is not None:
        front["base_model"] = repo
        if merged and not _recovered(provenance):
            front["base_model_relation"] = "merge"
        elif model.quantization is not None:
            front["base_model_relation"] = "quantized"
    front |= {key: inherited[key] for key in _INHERITED if key in inherited}
    front |= {
        "library_name": "mlx",
        "pipeline_tag": "text-generation",
        "tags": tags + [t for t in inherited.get("tags", ()) if t in ("merge", "mergekit")],
    }
    # No value is ever wrapped, so no line of one can look like the end of the block.
    text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=float("inf"))
    return f"---\n{text}---"


def _is_text(value: Any) -> bool:
    """A one-line string, or some of them."""
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(v, str) and v == one_line(v) != "" for v in values)


def _repository(provenance: dict[str, Any]) -> str | None:
    """The hub id this was made from, through conversions in between."""
    entry: Any = provenance
    while isinstance(entry, dict):
        source = entry.get("source")
        if isinstance(source, str) and REPO_ID.fullmatch(source):
            return source
        entry = entry.get("from")
    return None


def _recovered(provenance: dict[str, Any]) -> bool:
    """Whether the plan was found in a source that was merged already."""
    return provenance.get("plan_recovered") is True


def _is_merge(config: dict[str, Any], model: ModelConfig) -> bool:
    """Whether blocks run in another order, or scaled, than in the model they come from."""
    if model.layer_map != tuple(range(model.num_hidden_layers)) or model.residual_scales:
        return True
    text = config["provenance"].get("plan")
    if not text:
        return False
    try:
        plan = LayerPlan.from_text(text)
        blocks = plan.blocks_needed or model.num_hidden_layers
        in_order = plan.layer_map(blocks) == tuple(range(blocks))
        return not in_order or any(part.scales for part in plan.slices)
    except CerebrumError:
        return True


def _summary(config: dict[str, Any], model: ModelConfig, repo: str | None) -> str:
    provenance = config["provenance"]
    source = f"[{repo}](https://huggingface.co/{repo})" if repo else "a local checkpoint"
    revision = provenance.get("revision")
    if repo and isinstance(revision, str) and re.fullmatch(r"[0-9a-f]{40}", revision):
        source += f" (revision `{revision[:12]}`)"
    if model.num_positions == model.num_hidden_layers:
        how = f"{model.num_hidden_layers} layers"
    else:
        how = (
            f"{model.num_hidden_layers} blocks, stored once, run in {model.num_positions}"
            " positions (`layer_map` in config.json)"
        )
    return f"Made from {source} by {provenance['tool']}: {how}."


def _table(model: ModelConfig, nbytes: int | None) -> str:
    rows = {"parameters": f"{_count(model.stored_parameters)} stored"}
    if model.executed_parameters != model.stored_parameters:
        rows["parameters"] += f", {_count(model.executed_parameters)} as run"
    if nbytes is not None:
        bits = 8 * nbytes / model.stored_parameters
        rows["weights"] = f"{human(nbytes)}, {bits:.2f} bits a weight"
    if model.quantization is not None:
        packing = Packing.from_config(model.quantization, "")
        kind = "" if packing.mode == "affine" else f" ({packing.mode})"
        mixed = any(isinstance(value, dict) for value in model.quantization.values())
        rows["quantized"] = f"{packing}{kind}{', some matrices otherwise' if mixed else ''}"
    if model.dtype is not None:
        rows["scales and norms" if model.quantization else "dtype"] = model.dtype
    rows["context"] = f"{model.max_position_embeddings} tokens"
    rows["sliding window"] = f"{model.sliding_window} tokens" if model.sliding_window else "none"
    return "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e8 else f"{parameters / 1e6:.1f} M"


def _running(config: dict[str, Any], model: ModelConfig, name: str) -> str:
    quoted, question = shlex.quote(name), shlex.quote(_QUESTION)
    ours = f"mlx-cerebrum generate --model {quoted} --prompt {question}"
    theirs = f"mlx_lm.generate --model {quoted} --prompt {question}"
    parts = ["## Run it", "With mlx-cerebrum:", _fenced("sh", ours), "With mlx-lm:"]
    if model.model_type == "cerebrum" and config.get("model_file"):
        parts += [
            _fenced("sh", f"{theirs} --trust-remote-code"),
            f"The flag lets mlx-lm run `{one_line(str(config['model_file']))}`, which is in this"
            " directory and lays the stored blocks out; `mlx_lm.chat` and `mlx_lm.server` take it"
            " too.",
        ]
    elif model.model_type == "cerebrum":
        parts.append(
            "It refuses this directory, because it does not know layer maps. Convert with"
            " `--mlx-lm-shim` or `--layout unrolled` for it."
        )
    elif "sliding_attention" in (config.get("layer_types") or ()):
        parts.append("It can't load this directory: it expects a layer with full attention.")
    else:
        parts.append(_fenced("sh", theirs))
    parts.append("With transformers:")
    if model.model_type == "cerebrum" or model.quantization is not None:
        why = "layer maps" if model.model_type == "cerebrum" else "MLX's packed weights"
        parts.append(f"It does not read {why}. An unrolled, dense conversion is for it.")
    else:
        parts.append(
            _fenced(
                "python",
                "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
                f"name = {json.dumps(name, ensure_ascii=False)}\n"
                "tokenizer = AutoTokenizer.from_pretrained(name)\n"
                'model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")\n'
                f'inputs = tokenizer("{_QUESTION}", return_tensors="pt")\n'
                "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))",
            )
        )
    return "\n\n".join(parts)


def _prompt(repo: str | None) -> str:
    if repo not in _KNOWN:
        return (
            "## Prompt format\n\nThe tokenizer's own chat template, where it has one; else"
            " mlx-cerebrum says which it assumes, and `--template` names another."
        )
    return (
        "## Prompt format\n\n"
        + _fenced("text", f"<s>{DEFAULT_SYSTEM}\nUser: {_QUESTION}\nAI:")
        + "\n\nNo space follows `AI:`. The model ends its turn with `</s>`, which is left out of"
        " the answer before the next `User:` line."
    )


def _window(config: dict[str, Any], model: ModelConfig) -> str:
    if model.sliding_window is None:
        return "## Sliding window\n\nNone: every token sees all that came before."
    tokens, lines = model.sliding_window, ["mlx-cerebrum: kept."]
    if model.model_type == "cerebrum":
        if config.get("model_file"):
            lines.append("mlx-lm with the model file of this directory: kept.")
    else:
        lines.append(
            f"mlx-lm: ignored, so its answers may differ from the others' after {tokens} tokens."
        )
        if model.quantization is None:
            lines.append("transformers: kept.")
    return (
        f"## Sliding window\n\nA token sees itself and the {tokens - 1} before it."
        + "\n\n"
        + "\n".join(f"- {line}" for line in lines)
    )


def _fenced(language: str, text: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.strip()}\n{fence}"
