"""A tiny random model that only ever says some characters, so that its text is its tokens."""

import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from conftest import INTERLEAVED_8, SMALL, byte_tokenizer, plan_yaml, write_checkpoint
from tiny import tiny_config, tiny_weights

from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights.opening import ModelSpec, open_model
from mlx_cerebrum.weights.views import load_views

# Its answers are in the next prompt as they were said: what was computed holds.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
LETTERS = string.ascii_letters + ".,!?"


def talker(folder: Path, says: str = LETTERS, **config: Any) -> Path:
    """A checkpoint in `folder` (and `twice.yml`, a plan for it) that says nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    byte_tokenizer(folder)
    tokenizer = Tokenizer.from_directory(folder)
    said = {tokenizer.encode(char, add_bos=False)[-1] for char in says}
    made = tiny_config(
        **(SMALL | {"sliding_window": None, "max_position_embeddings": 4096} | config)
    )
    weights = tiny_weights(made, seed=3)
    for name in weights:  # what is said must depend on all that was said before
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] *= 10
    unsaid = np.array([token not in said for token in range(made["vocab_size"])])
    weights["lm_head.weight"][unsaid] = 0
    checkpoint = write_checkpoint(folder / "talker", made, weights)
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    settings["chat_template"] = TEMPLATE
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "twice.yml").write_text(plan_yaml(INTERLEAVED_8))
    return checkpoint


def talkers(folder: Path, **config: Any) -> tuple[Mapping[str, Model], Tokenizer]:
    """The views of one: `talker` as it is, and `talker@twice`."""
    return load_views(open_model(ModelSpec(talker(folder, **config))), [str(folder / "twice.yml")])
