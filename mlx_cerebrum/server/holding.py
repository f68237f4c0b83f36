"""The checkpoints that a server answers with, each loaded, on its way, or at rest.

At rest a checkpoint takes no memory, and is known well enough to take requests for it.
"""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from mlx_cerebrum.decoding.decode import prefill_step
from mlx_cerebrum.errors import CerebrumError, CheckpointError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.memory import Workload
from mlx_cerebrum.server.batch import Batch
from mlx_cerebrum.text import one_line
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights.gguf_paths import gguf_at
from mlx_cerebrum.weights.loading import load_in_pieces
from mlx_cerebrum.weights.opening import ModelSpec, Opened, open_model
from mlx_cerebrum.weights.storage import Storage
from mlx_cerebrum.weights.views import Order, views

_TALK = (256, 256)  # tokens of a prompt and of its answer: with less it would be of no use
# Of each file with weights: device and inode, which a later file may get again; bytes, and when it
# was written.
Files = frozenset[tuple[int, int, int, int]]


@dataclass(frozen=True)
class Laid:
    """A model without its weights, as far as requests go (`job_bytes.Sized`)."""

    config: ModelConfig
    dtype: mx.Dtype
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Source:
    """Where weights are read, and how they are held. The files are not kept open."""

    spec: ModelSpec  # its name is the path itself
    path: Path
    config: ModelConfig
    storage: Storage
    files: Files

    @classmethod
    def of(cls, opened: Opened) -> "Source":
        """Raises CheckpointError where the files are gone by now."""
        path = opened.checkpoint.path
        spec = replace(opened.spec, name=path, revision=None)
        return cls(spec, path, opened.config, opened.storage, weight_files(path))

    @property
    def needed(self) -> int:
        """Bytes that loading takes at most, or a short conversation after it."""
        config, item = self.config, self.storage.dtype.size
        talk = Workload(config, item, *_TALK, prefill_step()).bytes
        return self.storage.nbytes + max(self.storage.transient, talk)

    def shares(self, other: "Source") -> bool:
        """Whether one loaded set of weights would do for both, whatever their orders."""
        # Not the storage: it is decided by the memory that is free, for one as for the other.
        asked, others = self.spec, other.spec
        if (self.files, asked.packing, asked.dtype) != (other.files, others.packing, others.dtype):
            return False
        return _unordered(self.config) == _unordered(other.config)

    def open(self) -> Opened:
        """Read the headers anew. Raises CheckpointError where the files are gone, or others."""
        if not self.path.exists():
            raise CheckpointError("its files are gone")
        opened = open_model(self.spec)
        again = Source.of(opened)
        if (again.files, again.config) != (self.files, self.config):
            raise CheckpointError("its files are others than those that were served; start anew")
        return replace(opened, storage=self.storage)  # as they were held before


def _unordered(config: ModelConfig) -> ModelConfig:
    """The config but for the order of the blocks."""
    order = tuple(range(config.num_hidden_layers))
    return replace(config, layer_map=order, residual_scales=None, model_type="")


def pathless(error: CerebrumError, path: Path, name: str) -> str:
    """An error in one line that shows no path: the model at `path` is called by its name."""
    text = str(error)
    for each in (path, path.resolve()):
        text = text.replace(f"{each}/", "").replace(str(each), name)
    return text


def weight_files(path: Path) -> Files:
    """The files of a checkpoint that have weights; links to them are the same.

    Raises CheckpointError for none that can be read.
    """
    gguf = gguf_at(path)
    files = [gguf] if gguf is not None else sorted(path.glob("*.safetensors"))
    try:
        stats = [file.stat() for file in files]
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from None
    if not stats:
        raise CheckpointError(f"{path} has no weights")
    return frozenset((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in stats)


class Holding:
    """One checkpoint. What changes is the engine's thread's business; others may look.

    source: None for weights that can't be read again: they stay.
    """

    def __init__(self, laid: Mapping[str, Laid], source: Source | None) -> None:
        self.laid, self.source = dict(laid), source
        self.models: Mapping[str, Model] | None = None
        self.batch: Batch | None = None
        self.pieces: Generator[int, None, Model] | None = None  # of what is being loaded
        self.ready = 0  # bytes of it
        self.used = 0.0  # when it last had work, by time.monotonic

    @property
    def name(self) -> str:
        """The first of its models', for people."""
        return one_line(next(iter(self.laid)))

    @property
    def loading(self) -> tuple[int, int] | None:
        """Bytes that are ready, and bytes in all, while it loads."""
        if self.pieces is None or self.source is None:
            return None
        return self.ready, self.source.storage.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of weights that it holds now."""
        if self.models is None:
            return self.ready
        return 0 if self.source is None else self.source.storage.nbytes

    def begin(self, opened: Opened | None = None) -> None:
        """Begin to load: `next(pieces)` goes on. Raises CerebrumError.

        opened: its headers, where they have just been read.
        """
        assert self.source is not None
        opened = self.source.open() if opened is None else opened
        self.ready = 0
        self.pieces = load_in_pieces(opened.checkpoint, opened.config, opened.storage)

    def take(self, base: Model) -> None:
        """Its weights are there."""
        self.models = views(base, {name: _order(of.config) for name, of in self.laid.items()})
        self.pieces = None

    def add(self, name: str, new: Laid) -> None:
        """A further view of the same weights."""
        dtype = next(iter(self.laid.values())).dtype
        self.laid = {**self.laid, name: replace(new, dtype=dtype)}
        if self.models is not None and self.batch is not None:
            base = next(iter(self.models.values()))
            self.models = {**self.models, name: base.view(*_order(new.config))}
            self.batch.add(name, self.models[name])

    def drop(self) -> None:
        """Let go of the weights, whole or half loaded."""
        if self.pieces is not None:
            self.pieces.close()
        self.models = self.batch = self.pieces = None
        self.ready = 0


def _order(config: ModelConfig) -> Order:
    return config.layer_map, config.residual_scales
