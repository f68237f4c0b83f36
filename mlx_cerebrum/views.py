"""The models that one loaded set of weights serves: its blocks in several orders, by name."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath

from mlx_cerebrum import hub
from mlx_cerebrum.errors import PlanError
from mlx_cerebrum.load import load
from mlx_cerebrum.model import Model
from mlx_cerebrum.plan import resolve
from mlx_cerebrum.tokenizer import Tokenizer

CEREBRUM = ("cerebrum-7b", "cerebrum-12.25b")
DEMO = "demo-interleaved"


def load_views(
    name: str | None = None,
    plans: Sequence[str] = (),
    q_bits: int | None = None,
    dtype: str = "auto",
    *,
    q_group_size: int = 64,
    window: int | None = None,
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Model], Tokenizer]:
    """Load one checkpoint and lay its blocks out in every order it is to answer in.

    `name` as `load` takes it (None: Cerebrum 7B from the hub). The views share the weights:
    all of them take one model's memory, and none a second one's time to load. The first is the
    one to answer by default: Cerebrum's 12.25B, else the checkpoint as it is. Raises a
    CerebrumError for what can't be loaded, PlanError for a plan that does not fit.
    """
    source = hub.DEFAULT_REPO if name is None else name
    base, tokenizer = load(
        source,
        q_bits=q_bits,
        dtype=dtype,
        q_group_size=q_group_size,
        window=window,
        revision=revision,
        progress=progress,
    )
    return views(base, source, plans), tokenizer


def views(base: Model, source: str, plans: Sequence[str] = ()) -> dict[str, Model]:
    """Views over `base`'s weights by name; of 32 blocks the 12.25B is always one of them."""
    blocks = base.config.num_hidden_layers
    short = PurePath(source).name.removesuffix(".gguf").lower() or "model"
    cerebrum = blocks == 32 and "cerebrum" in short
    found: dict[str, Model] = {}
    if cerebrum:
        wanted = [*reversed(CEREBRUM), *plans]
    elif blocks == 32:
        found[short], wanted = base, [CEREBRUM[1], *plans]
    else:
        found[short], wanted = base, [*([DEMO] if source == "demo" else []), *plans]
    for plan in wanted:
        resolved = resolve(plan)
        layer_map, scales = resolved.layer_map(blocks), resolved.residual_scales(blocks)
        label = PurePath(plan).stem if PurePath(plan).suffix in (".yml", ".yaml") else plan
        named = label if cerebrum or source == "demo" else f"{short}@{label}"
        wanted_order = (layer_map, scales)
        if named in found and order(found[named]) != wanted_order:
            raise PlanError(f"two models would be called {named}; rename a plan's file")
        if named not in found:
            found[named] = base if order(base) == wanted_order else base.view(layer_map, scales)
    return found


def order(model: Model) -> tuple[object, object]:
    """What tells one view from another: the layer map, and how its positions are scaled."""
    return model.config.layer_map, model.config.residual_scales


def find(names: Iterable[str], asked: str) -> str:
    """The name meant by `asked`: itself, or the only one that ends so after - or @ ("7b").

    Raises PlanError, with the names there are, where there is none or more than one.
    """
    names = list(names)
    if asked in names:
        return asked
    ending = [
        name for name in names if name.lower().endswith((f"-{asked}".lower(), f"@{asked}".lower()))
    ]
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
