"""`--mlx-lm-shim`: the file that lets stock mlx-lm run a folded directory."""

import shutil
from pathlib import Path
from typing import Any

from convert.destination import write_json
from mlx_cerebrum.config import ModelConfig, read_json
from mlx_cerebrum.errors import ConfigError

NAME = "mlx_lm_model.py"  # here, and in the directory that carries it


def with_shim(raw: dict[str, Any]) -> dict[str, Any]:
    """A folded output's config.json, naming the shim and with every key it reads.

    Pure, so that it can be refused before anything is written. Raises ConfigError for a
    config without a layer map of its own.
    """
    if raw.get("model_type") != "cerebrum":
        raise ConfigError(
            "--mlx-lm-shim is for a folded plan; this output is plain"
            f" {raw.get('model_type')}, which mlx-lm knows: drop the flag"
        )
    config = ModelConfig.from_dict(raw)
    # Keys that our reader has a default for and mlx-lm has another one, or none.
    return raw | {
        "model_file": NAME,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "sliding_window": config.sliding_window,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def write(directory: Path) -> None:
    """Put the shim into `directory`, verbatim, beside tokenizer files that are there already."""
    shutil.copyfile(Path(__file__).with_name(NAME), directory / NAME)
    # mlx-lm's tokenizer is transformers', which does not know this model type and so would
    # rebuild the tokenizer by its class's rules. This class takes tokenizer.json as it is.
    file = directory / "tokenizer_config.json"
    write_json(file, read_json(file) | {"tokenizer_class": "PreTrainedTokenizerFast"})
