"""The models that one loaded set of weights serves: its blocks in several orders, by name."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from mlx_cerebrum.errors import PlanError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.plan.layer_plan import resolve
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights.loading import Progress
from mlx_cerebrum.weights.opening import Opened

CEREBRUM = ("cerebrum-7b", "cerebrum-12.25b")
DEMO = "demo-interleaved"

_SUFFIX = re.compile(r"(-\d{5}-of-\d{5})?\.gguf$")  # of a file, or of a part of one

Order = tuple[tuple[int, ...], tuple[tuple[float, float], ...] | None]  # layer map, scales


def load_views(
    opened: Opened, plans: Sequence[str] = (), progress: Progress | None = None
) -> tuple[dict[str, Model], Tokenizer]:
    """Load a model and lay its blocks out in every order it is to answer in.

    The views share the weights: all of them take one model's memory, and none a second one's time
    to load. The first answers unless another is asked for: Cerebrum's 12.25B, unless it is called
    cerebrum-7b; of others the model as it was opened. Raises PlanError for a plan that does not
    fit, and what `Opened.load` and `Opened.tokenizer` raise.
    """
    source = str(opened.spec.name)
    # What needs no weights to refuse is refused before they are read.
    wanted, tokenizer = orders(opened.config, source, plans), opened.tokenizer
    return views(opened.load(progress), wanted), tokenizer


def views(base: Model, wanted: Mapping[str, Order]) -> dict[str, Model]:
    """Views over `base`'s weights by name; `base` itself where it is in that order."""
    own = base.config.layer_map, base.config.residual_scales
    return {name: base if o == own else base.view(*o) for name, o in wanted.items()}


def orders(config: ModelConfig, source: str, plans: Sequence[str] = ()) -> dict[str, Order]:
    """The orders a checkpoint's blocks can answer in, by name; with 32 blocks also the 12.25B's.

    `source` is the name it was asked for by. Raises PlanError for a plan that does not fit.
    """
    blocks = config.num_hidden_layers
    short = _SUFFIX.sub("", PurePath(source).name.lower()) or "model"
    cerebrum = blocks == 32 and "cerebrum" in short
    found: dict[str, Order] = {}
    if cerebrum:
        wanted = [*(CEREBRUM if short.startswith(CEREBRUM[0]) else reversed(CEREBRUM)), *plans]
    else:
        found[short] = config.layer_map, config.residual_scales
        more = [CEREBRUM[1]] if blocks == 32 else [DEMO] if source == "demo" else []
        wanted = [*more, *plans]
    for plan in wanted:
        resolved = resolve(plan)
        order = resolved.layer_map(blocks), resolved.residual_scales(blocks)
        config.with_map(*order)
        label = PurePath(plan).stem if PurePath(plan).suffix in (".yml", ".yaml") else plan
        name = label if cerebrum or source == "demo" else f"{short}@{label}"
        if found.setdefault(name, order) != order:
            raise PlanError(f"two models would be called {name}; rename a plan's file")
    return found


def find(names: Iterable[str], asked: str) -> str:
    """The name that `asked` means: that very name, or the only one with it after a - or @ ("7b").

    Raises PlanError, with the names there are, where there is none or more than one.
    """
    names, wanted = list(names), asked.lower()
    exact = [name for name in names if name.lower() == wanted]
    ending = exact or [n for n in names if n.lower().endswith((f"-{wanted}", f"@{wanted}"))]
    if len(ending) != 1:
        problem = "is none of" if not ending else "could be several of"
        raise PlanError(f"{asked!r} {problem} the models here: {', '.join(names)}")
    return ending[0]


def describe(model: Model) -> Mapping[str, Any]:
    """What a list of models says about each."""
    return described(model.config)


def described(config: ModelConfig) -> Mapping[str, Any]:
    """The same of a model whose weights are not here."""
    packed = config.quantization
    return {
        "positions": config.num_positions,
        "blocks": config.num_hidden_layers,
        "sliding_window": config.sliding_window,
        "context_length": config.max_position_embeddings,
        "vocabulary_size": config.vocab_size,
        "layer_map": list(config.layer_map),
        "bits": None if packed is None else packed["bits"],
    }
