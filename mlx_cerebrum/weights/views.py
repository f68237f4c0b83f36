"""The models that one loaded set of weights serves: its blocks in several orders, by name."""

import argparse
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePath

from mlx_cerebrum.errors import PlanError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.plan.layer_plan import resolve
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights import hub
from mlx_cerebrum.weights.checkpoint import open_checkpoint
from mlx_cerebrum.weights.loading import load

CEREBRUM = ("cerebrum-7b", "cerebrum-12.25b")
DEMO = "demo-interleaved"

_SUFFIX = re.compile(r"(-\d{5}-of-\d{5})?\.gguf$")  # of a file, or of a part of one

Order = tuple[tuple[int, ...], tuple[tuple[float, float], ...] | None]  # layer map, scales


def load_views(
    name: str | None = None,
    plans: Sequence[str] = (),
    q_bits: int | None = None,
    dtype: str = "auto",
    *,
    q_group_size: int = 64,
    window: int | None = None,
    revision: str | None = None,
    template: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Model], Tokenizer]:
    """Load one checkpoint and lay its blocks out in every order it is to answer in.

    `name` as `load` takes it (None: Cerebrum 7B from the hub). The views share the weights:
    all of them take one model's memory, and none a second one's time to load. The first is the
    one to answer by default: Cerebrum's 12.25B, else the checkpoint as it is. Raises a
    CerebrumError for what can't be loaded, PlanError for a plan that does not fit.
    """
    source = hub.DEFAULT_REPO if name is None else name
    path = hub.resolve(source, revision)
    # What its config is enough to refuse is refused before the weights are read.
    orders(open_checkpoint(path).config, source, plans)
    base, tokenizer = load(
        path,
        q_bits=q_bits,
        dtype=dtype,
        q_group_size=q_group_size,
        window=window,
        template=template,
        progress=progress,
    )
    return views(base, source, plans), tokenizer


def load_asked(
    args: argparse.Namespace, progress: Callable[[int, int], None] | None
) -> tuple[dict[str, Model], Tokenizer]:
    """`load_views` as the flags of `model_args` say, `add_plans_flag` among them."""
    return load_views(
        args.model,
        args.plan,
        args.q_bits,
        args.dtype,
        q_group_size=args.q_group_size or 64,
        window=args.window,
        revision=args.revision,
        template=args.template,
        progress=progress,
    )


def views(base: Model, source: str, plans: Sequence[str] = ()) -> dict[str, Model]:
    """Views over `base`'s weights by name, as `orders` has them."""
    own = base.config.layer_map, base.config.residual_scales
    return {
        name: base if order == own else base.view(*order)
        for name, order in orders(base.config, source, plans).items()
    }


def orders(config: ModelConfig, source: str, plans: Sequence[str] = ()) -> dict[str, Order]:
    """The orders a checkpoint's blocks can answer in, by name; of 32 blocks always the 12.25B's.

    `source` is what the checkpoint was asked for by. Raises PlanError for a plan that does not fit.
    """
    blocks = config.num_hidden_layers
    short = _SUFFIX.sub("", PurePath(source).name.lower()) or "model"
    cerebrum = blocks == 32 and "cerebrum" in short
    found: dict[str, Order] = {}
    if cerebrum:
        wanted = [*reversed(CEREBRUM), *plans]
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
    """The name meant by `asked`: itself, or the only one that ends so after - or @ ("7b").

    Raises PlanError, with the names there are, where there is none or more than one.
    """
    names, wanted = list(names), asked.lower()
    exact = [name for name in names if name.lower() == wanted]
    ending = exact or [n for n in names if n.lower().endswith((f"-{wanted}", f"@{wanted}"))]
    if len(ending) != 1:
        problem = "is none of" if not ending else "could be several of"
        raise PlanError(f"{asked!r} {problem} the models here: {', '.join(names)}")
    return ending[0]


def describe(model: Model) -> Mapping[str, int | None]:
    """What a list of models says of one."""
    config = model.config
    return {
        "positions": config.num_positions,
        "blocks": config.num_hidden_layers,
        "sliding_window": config.sliding_window,
        "context_length": config.max_position_embeddings,
    }
