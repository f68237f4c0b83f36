"""Opening a model: its headers are read once, and all that needs no weights is decided.

What can be refused is refused here, before a weight is read: a wrong name, a plan of other
blocks, bits that can't be had, a tokenizer of another model, weights that would not fit.
"""

from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from mlx_cerebrum.errors import CheckpointError, ConfigError
from mlx_cerebrum.machine.pressure import would_swap
from mlx_cerebrum.model.config import MOST, ModelConfig
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.limits import wire
from mlx_cerebrum.model.memory import fits, require
from mlx_cerebrum.model.tensors import matrix_shapes
from mlx_cerebrum.plan.layer_plan import LayerPlan
from mlx_cerebrum.plan.layer_plan import resolve as resolve_plan
from mlx_cerebrum.text import tell
from mlx_cerebrum.tokenizer.chat_formats import BUILT_IN, ChatFormat, read_format
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights import hub
from mlx_cerebrum.weights.checkpoint import Checkpoint
from mlx_cerebrum.weights.gguf_paths import gguf_at
from mlx_cerebrum.weights.loading import Progress, load_model
from mlx_cerebrum.weights.quantize import Packing, matrix_bytes
from mlx_cerebrum.weights.safetensors_checkpoint import SafetensorsCheckpoint, no_checkpoint
from mlx_cerebrum.weights.storage import Storage, choose_storage, smaller_weights


@dataclass(frozen=True)
class ModelSpec:
    """Which model, in which order its blocks run, how it is held: `load` says what each is.

    Raises ConfigError for bits that MLX has no kernel for.
    """

    name: str | Path
    revision: str | None = None
    plan: str | LayerPlan | None = None
    q_bits: int | None = None
    q_group_size: int = 64  # weights
    dtype: str = "auto"
    window: int | None = None  # tokens; 0 for none
    template: ChatFormat | None = None

    def __post_init__(self) -> None:
        _ = self.packing

    @property
    def packing(self) -> Packing | None:
        """What dense matrices are packed to on the way in."""
        return None if self.q_bits is None else Packing(self.q_bits, self.q_group_size)


@dataclass(frozen=True)
class Opened:
    """A model whose headers are read, and none of its weights yet."""

    spec: ModelSpec
    checkpoint: Checkpoint
    config: ModelConfig  # with the plan's layer map and the window asked for
    storage: Storage

    @classmethod
    def of(cls, checkpoint: Checkpoint, spec: ModelSpec) -> "Opened":
        """`checkpoint` as `spec` wants it. Raises PlanError or ConfigError where it can't be."""
        config = planned_config(checkpoint.config, spec.plan, spec.window)
        return cls(spec, checkpoint, config, choose_storage(checkpoint, spec.packing, spec.dtype))

    @property
    def here(self) -> ModelConfig:
        """The config of the positions whose caches this machine holds: all of them."""
        return self.config

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Read when it is first asked for; raises as `load_tokenizer` does."""
        return load_tokenizer(self.checkpoint, self.spec.template)

    def smaller(self) -> list[tuple[str, Storage]]:
        """The flags that would hold the weights in fewer bits, and how they would."""
        return smaller_weights(self.checkpoint, self.spec.packing, self.spec.dtype)

    def load(self, progress: Progress | None = None) -> Model:
        """Read the weights, and have them wired (`limits.wire`). Raises MemoryBudgetError, before
        any is read, where they don't fit."""
        needed = self.storage.nbytes + self.storage.transient
        name = str(self.spec.name)
        name = self.checkpoint.path.name if Path(name).exists() else name
        if not fits(needed):
            ways = [(flag, s.nbytes + s.transient) for flag, s in self.smaller()]
            require(needed, f"loading {name}", "take a smaller model", ways)
        if (warning := would_swap(needed, name)) is not None:
            tell(f"warning: {warning}")
        model = load_model(self.checkpoint, self.config, self.storage, progress)
        wire(model)
        return model


def open_model(spec: ModelSpec) -> Opened:
    """Find the model, read its headers, and decide how its weights will be held.

    Raises a CerebrumError, one line, for whatever can't be honoured.
    """
    path = hub.resolve(spec.name, spec.revision, check=partial(_require_memory, spec))
    return Opened.of(open_checkpoint(path), spec)


def _require_memory(spec: ModelSpec, config: ModelConfig) -> None:
    """Raise MemoryBudgetError for a model of the hub that could not be loaded: before gigabytes
    come. A quantized one is only judged by its files."""
    if config.quantization is not None:
        return

    def held(packing: Packing | None) -> int:
        return sum(matrix_bytes(shape, packing, 2) for shape in matrix_shapes(config).values())

    fewer = [bits for bits in (8, 4) if bits < (spec.q_bits or 16)]
    ways = [(f"--q-bits {bits}", held(Packing(bits, spec.q_group_size))) for bits in fewer]
    require(held(spec.packing), f"loading {spec.name}", "take a smaller model", ways)


def open_checkpoint(path: Path) -> Checkpoint:
    """A directory or a GGUF file, its tensors checked against its config (see `gguf_at`).

    Raises CheckpointError or ConfigError, one line each, for anything else.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if (gguf := gguf_at(path)) is not None:
        # Imported here because they bring numpy: 0.1 s.
        from mlx_cerebrum.weights.gguf_checkpoint import GGUFCheckpoint
        from mlx_cerebrum.weights.gguf_file import GGUFFile

        checkpoint: Checkpoint = GGUFCheckpoint(GGUFFile.open(gguf))
    elif path.is_dir():
        checkpoint = SafetensorsCheckpoint.open(path)
    else:
        raise CheckpointError(no_checkpoint(path))
    checkpoint.check()
    return checkpoint


def load(
    path_or_repo: str | Path,
    plan: str | LayerPlan | None = None,
    q_bits: int | None = None,
    dtype: str = "auto",
    *,
    q_group_size: int = 64,
    window: int | None = None,
    revision: str | None = None,
    template: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[Model, Tokenizer]:
    """A model and its tokenizer from a directory, a `.gguf` file, a hub id, or `"demo"`.

    `plan` (a LayerPlan, a named plan or a YAML file) lays the blocks out anew; without it the
    checkpoint's own order stands. `q_bits` packs a dense checkpoint on the way in. `dtype`
    is "auto" or float32, float16, bfloat16. `window` overrides the sliding window (tokens; 0
    for none). `template` is how conversations are written: a name of `chat_formats.BUILT_IN` or a
    Jinja file; without it the checkpoint's own, Cerebrum's for a Cerebrum that has none, else
    what `tokenizer.format.assumed` says. Raises a CerebrumError, one line, for whatever can't be
    honoured.
    """
    chosen = None if template is None else read_format(template)
    spec = ModelSpec(path_or_repo, revision, plan, q_bits, q_group_size, dtype, window, chosen)
    opened = open_model(spec)
    tokenizer = opened.tokenizer  # a wrong one is refused before the weights are read
    return opened.load(progress), tokenizer


def load_tokenizer(checkpoint: Checkpoint, chosen: ChatFormat | None = None) -> Tokenizer:
    """The checkpoint's tokenizer, writing conversations as `chosen`, by default as `load` has it.

    Raises ConfigError if it is of another model. Added tokens past the model's last row, such as
    a padding that nobody writes, are named on stderr; a prompt that has one is refused.
    """
    tokenizer = checkpoint.tokenizer()
    rows = checkpoint.config.vocab_size
    beyond = tokenizer.vocab_size - rows
    if beyond > 0 and not tokenizer.only_added(rows):
        raise ConfigError(
            f"{checkpoint.path}: the tokenizer has {tokenizer.vocab_size} tokens, the model {rows}"
        )
    if beyond > 0:
        tell(
            f"note: the tokenizer's added tokens from {rows} on ({beyond} of them) are past the "
            f"model's {rows} rows; a prompt that has one will be refused"
        )
    if chosen is not None:
        tokenizer.use_format(chosen)
    elif tokenizer.chat_template is None and any(
        "cerebrum" in n.lower() for n in checkpoint.names()
    ):
        tokenizer.use_format(BUILT_IN["cerebrum"])
    return tokenizer


def planned_config(
    config: ModelConfig, plan: str | LayerPlan | None, window: int | None
) -> ModelConfig:
    """The checkpoint's config with a plan's layer map and a window override applied.

    A plan always names stored blocks: it replaces a folded source's own map and scales.
    """
    if plan is not None:
        plan = resolve_plan(plan) if isinstance(plan, str) else plan
        blocks = config.num_hidden_layers
        config = config.with_map(plan.layer_map(blocks), plan.residual_scales(blocks))
    if window is not None:
        if window < 0:
            raise ConfigError(f"window {window} is negative; use 0 for full attention")
        config = replace(config, sliding_window=min(window, MOST) or None)
    return config
