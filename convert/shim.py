"""`--mlx-lm-shim`: the file that lets stock mlx-lm run a folded directory."""

import shutil
from pathlib import Path
from typing import Any

from convert.destination import write_json
from mlx_cerebrum.errors import ConfigError
from mlx_cerebrum.model.config import read_json

NAME = "mlx_lm_model.py"  # here, and in the directory that carries it


def with_shim(raw: dict[str, Any]) -> dict[str, Any]:
    """A folded output's config.json, naming the shim (`output_config` wrote every key it reads).

    Pure, so that it can be refused before anything is written. Raises ConfigError for a
    config without a layer map of its own.
    """
    if raw.get("model_type") != "cerebrum":
        raise ConfigError(
            "--mlx-lm-shim is for a folded plan; this output is plain"
            f" {raw.get('model_type')}, which mlx-lm knows: drop the flag"
        )
    return raw | {"model_file": NAME}


def write(directory: Path) -> None:
    """Put the shim into `directory`, verbatim, beside tokenizer files that are there already."""
    shutil.copyfile(Path(__file__).with_name(NAME), directory / NAME)
    # mlx-lm's tokenizer is transformers', which does not know this model type and so would
    # rebuild the tokenizer by its class's rules. This class takes tokenizer.json as it is.
    file = directory / "tokenizer_config.json"
    write_json(file, read_json(file) | {"tokenizer_class": "PreTrainedTokenizerFast"})
