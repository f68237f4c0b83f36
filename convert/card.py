"""The README card of a converted directory."""

from typing import Any

import yaml


def card(config: dict[str, Any], name: str) -> str:
    """A model card in the hub's form: front matter, where it came from, how to run it."""
    provenance = config["provenance"]
    folded = config["model_type"] == "cerebrum"
    front: dict[str, Any] = {
        "library_name": "mlx",
        "pipeline_tag": "text-generation",
        "tags": ["mlx", "mlx-cerebrum", "merge"] if folded else ["mlx", "merge"],
    }
    if "/" in provenance["source"]:  # a hub id
        front["base_model"] = provenance["source"]
    if folded:
        run = f"python -m mlx_cerebrum.generate --model {name} --prompt TEXT"
        what = (
            f"{config['num_hidden_layers']} stored blocks run in {len(config['layer_map'])}"
            " positions (`layer_map` in config.json): for mlx-cerebrum only"
        )
    else:
        run = f"mlx_lm.generate --model {name} --prompt TEXT"
        readers = "MLX tools" if "quantization" in config else "any tool"
        what = f"{config['num_hidden_layers']} layers, plain {config['model_type']}: for {readers}"
    plan = provenance["plan"]
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {name}",
        "",
        f"Made from {provenance['source'] or 'a local checkpoint'} by {provenance['tool']}.",
        f"Layout: {what}.",
        "",
        "```sh",
        run,
        "```",
        "",
    ]
    if plan is not None:
        lines += ["Laid out by this plan:", "", "```yaml", plan.strip(), "```", ""]
    return "\n".join(lines)
