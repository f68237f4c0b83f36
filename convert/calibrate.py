"""Measure which matrices of a model can least afford fewer bits.

One matrix at a time is replaced by what is left of it after quantizing, and the model reads a
text again: the measure is how far its predictions move, as the Kullback-Leibler divergence from
the untouched model's, in nats a token. The change of the loss itself would be the obvious
measure and is a poor one here: it can be negative, and on a thousand tokens its noise is larger
than most matrices' effect. The divergence is never negative, is zero for no change, compares
the same tokens with themselves, and to first order its mean is what quantizing adds to the loss.

The model runs in the order of its layer map, so a block that runs twice is measured running
twice. Positions before a block's first one are not run again: for `n` blocks the cost is at
most `7 n + 2` forward passes over the sample (`7 n / 2` where every block runs once).
"""

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, cast

from mlx_cerebrum import cli  # isort: skip  # first: it says what is not installed
import mlx.core as mx

from convert.recipe import Sensitivity
from mlx_cerebrum import __version__, device
from mlx_cerebrum.errors import ConfigError, RequestError
from mlx_cerebrum.model.cache import attention_mask
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.cpu import in_slices, scores_held
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.memory import available_bytes, require
from mlx_cerebrum.model.tensors import EMBEDDING, FUSED, HEAD, MATRICES, matrix_shapes, module_path
from mlx_cerebrum.progress import progress as live
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights import hub
from mlx_cerebrum.weights.checkpoint import FLOATS, Checkpoint
from mlx_cerebrum.weights.loading import load_model
from mlx_cerebrum.weights.opening import load_tokenizer, open_checkpoint, planned_config
from mlx_cerebrum.weights.quantize import Packing
from mlx_cerebrum.weights.storage import DTYPES, Storage

LENGTH = 256  # tokens a sequence


def sample(tokenizer: Tokenizer, text: str, tokens: int) -> mx.array:
    """About `tokens` ids of `text` `[B, LENGTH]`, in pieces spread evenly over it.

    Each piece starts with BOS where the tokenizer wants one. Raises RequestError for a text of
    less than one piece.
    """
    start = tokenizer.encode("")
    ids = tokenizer.encode(text)[len(start) :]
    length = LENGTH - len(start)
    if len(ids) < length:
        raise RequestError(f"the calibration text has {len(ids)} tokens; give at least {length}")
    count = max(1, min(tokens, len(ids)) // LENGTH)
    step = (len(ids) - length) // max(1, count - 1)
    pieces = [start + ids[i * step : i * step + length] for i in range(count)]
    return mx.array(pieces, dtype=mx.int32)


class Probe:
    """A model reading one sample, with one of its matrices changed at a time."""

    def __init__(self, model: Model, tokens: mx.array) -> None:
        self.model = model
        self.tokens = tokens
        self.mask = attention_mask(tokens.shape[1], 0, model.config.sliding_window)
        table = model.model.embed_tokens.weight
        self.head = table if model.config.tie_word_embeddings else model.lm_head.weight
        _unfuse(model)
        self.embedded = table[tokens]
        self.hidden = self._run(self.embedded, 0)
        # The head's row that each token expects: sum of p(v) head[v]. With it a divergence needs
        # no probabilities kept: KL = logsumexp(logits) - hidden @ expected - (the same, untouched).
        self.expected = self._expected(self.head)
        self.entropy = self._cross_entropy(self.hidden, self.head, self.expected)

    def matrices(self) -> int:
        """How many figures `measure` yields."""
        return 2 + len(MATRICES) * len(set(self.model.config.layer_map))

    def measure(self, packing: Packing) -> Iterator[tuple[str, float]]:
        """Each matrix (module path) the model runs, and the divergence it causes when packed.

        A tied table yields its two uses apart, as `model.embed_tokens` and `lm_head`.
        """
        lookup = mx.take(_rounded(self.model.model.embed_tokens.weight, packing), self.tokens, 0)
        yield EMBEDDING, self._divergence(self._run(lookup, 0))
        yield HEAD, self._head_divergence(_rounded(self.head, packing))
        layer_map = self.model.config.layer_map
        h, at = self.embedded, 0
        for block in dict.fromkeys(layer_map):  # in the order they first run
            first = layer_map.index(block)
            h, at = self._run(h, at, first), first
            mx.eval(h)
            for kind in MATRICES:
                parent, name = kind.split(".")
                linear = self.model.model.layers[block][parent][name]
                original = linear.weight
                linear.weight = _rounded(original, packing)
                divergence = self._divergence(self._run(h, first))
                linear.weight = original
                yield module_path(block, kind), divergence

    def _run(self, h: mx.array, start: int, end: int | None = None) -> mx.array:
        """Positions `start` to `end`; a state `[B, L, D]`, normed when it is the last."""
        config = self.model.config
        scales = config.residual_scales or [None] * config.num_positions
        for position in range(start, config.num_positions if end is None else end):
            block = self.model.model.layers[config.layer_map[position]]
            h = block(h, self.mask, None, scales[position])
        return self.model.model.norm(h) if end is None else h

    def _divergence(self, hidden: mx.array) -> float:
        """Mean over all tokens of KL(untouched || this), for changed final states."""
        return self._cross_entropy(hidden, self.head, self.expected) - self.entropy

    def _head_divergence(self, head: mx.array) -> float:
        """The same for a changed head."""
        return self._cross_entropy(self.hidden, head, self._expected(head)) - self.entropy

    def _expected(self, head: mx.array) -> mx.array:
        """The row of `head` that each token of the untouched model expects."""
        parts = []
        for h in self.hidden:
            parts.append(mx.softmax(h @ self.head.T, axis=-1) @ head)
            mx.eval(parts[-1])  # a sequence at a time: its logits are large
        return mx.stack(parts)

    def _cross_entropy(self, hidden: mx.array, head: mx.array, expected: mx.array) -> float:
        """Mean of logsumexp(logits) - E[logit], a sequence at a time: its logits are large."""
        total = 0.0
        for h, row in zip(hidden.astype(mx.float32), expected.astype(mx.float32), strict=True):
            logits = (h @ head.T).astype(mx.float32)
            each = mx.logsumexp(logits, axis=-1) - mx.sum(h * row, axis=-1)
            total += cast(float, mx.sum(each).item())
        return total / self.tokens.size


def calibrate(
    checkpoint: Checkpoint,
    config: ModelConfig,
    text: str,
    *,
    packing: Packing | None = None,
    tokens: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> Sensitivity:
    """Measure `checkpoint` as `config` (its own, or one with a plan's map) runs it.

    packing: what a matrix is put through (default: 4 bits in groups of 64). The figures are
    scaled to other widths, so it should lie in the midst of those that will be chosen.
    tokens: about how many of `text` are read.
    progress: called with how many matrices are measured, and how many there are.

    The whole model is held dense, in float32 where that fits, else in the stored 16 bits.
    Raises MemoryBudgetError with the bytes needed, RequestError for too short a text.
    """
    packing = packing or Packing(4, 64)
    odd = [m for m, (_, columns) in matrix_shapes(config).items() if not packing.fits(columns)]
    if odd:
        raise ConfigError(f"{odd[0]} can't be calibrated: it does not divide into {packing}")
    ids = sample(load_tokenizer(checkpoint), text, tokens)
    storage = _dense(checkpoint, config, ids.size)
    probe = Probe(load_model(checkpoint, config, storage), ids)
    found: dict[str, float] = {}
    for module, divergence in probe.measure(packing):
        found[module] = divergence
        if progress is not None:
            progress(len(found), probe.matrices())
        mx.clear_cache()
    return Sensitivity.of(found, config, packing, provenance(checkpoint, text, ids.size, storage))


def provenance(checkpoint: Checkpoint, text: str, tokens: int, storage: Storage) -> dict[str, Any]:
    """What one has to know to repeat the measurement."""
    return {
        "model": checkpoint.path.name,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "tokens": tokens,
        "tokens_a_sequence": LENGTH,
        "dtype": str(storage.dtype).removeprefix("mlx.core."),
        "device": "gpu" if device.on_gpu() else "cpu",
        "mlx": metadata.version("mlx"),
        "mlx_cerebrum": __version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def calibration_bytes(config: ModelConfig, tokens: int, item_bytes: int) -> int:
    """Bytes held at most: the dense weights, one table rounded, one block's activations (with
    attention scores, which some backends keep), and the logits of one sequence four times."""
    logits = 4 * LENGTH * config.vocab_size * 4
    heads = (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    scores = 2 * config.num_attention_heads * LENGTH
    activations = tokens * (6 * config.hidden_size + 4 * config.intermediate_size + heads + scores)
    if item_bytes == 4 and in_slices(LENGTH, LENGTH, mx.float32, "causal"):
        activations += scores_held(LENGTH, LENGTH, config.num_attention_heads)
    table = 2 * config.vocab_size * config.hidden_size
    return (config.stored_parameters + activations + table) * item_bytes + logits


def _dense(checkpoint: Checkpoint, config: ModelConfig, tokens: int) -> Storage:
    """Dense float32 if it fits, else dense 16 bits as stored. Raises MemoryBudgetError."""
    stored = DTYPES[FLOATS[checkpoint.weight_dtype]]
    exact = calibration_bytes(config, tokens, 4)
    dtype = mx.float32 if exact < 0.9 * available_bytes() or not device.on_gpu() else stored
    require(
        calibration_bytes(config, tokens, dtype.size),
        f"calibrating {checkpoint.path.name} (the whole model, dense)",
        "use the table that comes with the package, or a machine with more",
    )
    packings = {module: checkpoint.packing(module) for module in matrix_shapes(config)}
    return Storage(dtype, packings, True, config.stored_parameters * dtype.size, 0)


def _unfuse(model: Model) -> None:
    """Separate q, k, v and gate, up again, as views of the loader's joined matrices."""
    shapes = matrix_shapes(model.config)
    for i, block in enumerate(model.model.layers):
        for parent in ("self_attn", "mlp"):
            for fused, names in FUSED.items():
                if fused not in block[parent]:
                    continue
                joined, row = block[parent][fused], 0
                for name in names:
                    rows = shapes[module_path(i, f"{parent}.{name}")][0]
                    part = type(joined)(1, 1, bias=False)
                    part.weight = joined.weight[row : row + rows]
                    block[parent][name] = part
                    row += rows
                del block[parent][fused]


def _rounded(weight: mx.array, packing: Packing) -> mx.array:
    return packing.dequantize(packing.quantize(weight), weight.dtype)


def main(argv: list[str] | None = None) -> int:
    """`python -m convert.calibrate`: measure once, keep the table."""
    p = cli.ArgumentParser(prog="python -m convert.calibrate", description=__doc__.split("\n")[0])
    p.add_argument("--hf-path", default=hub.DEFAULT_REPO, metavar="DIR|FILE.gguf|HUBID|demo")
    p.add_argument("--plan", metavar="NAME|FILE", help="the order to run the blocks in")
    p.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text to read")
    p.add_argument("--tokens", type=int, default=1024, metavar="N", help="of it (default: 1024)")
    p.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="the table")
    p.add_debug()
    args = p.parse_args(argv)
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    text = read_text(args.text)
    checkpoint = open_checkpoint(hub.resolve(args.hf_path, as_stored=True))
    config = planned_config(checkpoint.config, args.plan, None)
    with live("calibrating", True, "matrices") as report:
        table = calibrate(checkpoint, config, text, tokens=args.tokens, progress=report)
    table.save(args.out)
    return 0


def read_text(path: Path) -> str:
    """Raises RequestError for a file that is not UTF-8 text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} can't be read as UTF-8 text: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
