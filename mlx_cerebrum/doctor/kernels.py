"""How many kernels a position takes while decoding, counted in MLX's graph.

A capture, which Xcode opens, shows what Metal makes of the graph; MLX writes one where the process
was started for it.
"""

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from mlx_cerebrum import device
from mlx_cerebrum.doctor import graph
from mlx_cerebrum.doctor.check import Found, Settings
from mlx_cerebrum.doctor.peer import as_mlx_lm
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.weights.loading import fuse_projections

CAPTURE = "MTL_CAPTURE_ENABLED"
TRACE = "mlx-cerebrum-selftest.gputrace"  # in the system's folder for temporary files
_WIDTH, _KV_HEADS = 64, 1  # of a head; heads of keys and values
_GEOMETRY = {
    "model_type": "mistral",
    "hidden_size": 4 * _WIDTH,
    "num_hidden_layers": 1,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": _KV_HEADS,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}


def kernels(settings: Settings) -> Found:
    """A position more of a small random model, in ours and in mlx-lm's graph; and a capture."""
    if not device.on_gpu():
        return Found(None, "a CPU has no kernels to launch")
    ours, theirs = position(_step), position(_their_step)
    most, others = graph.kernels(ours), graph.kernels(theirs)
    names = sorted({*ours, *theirs} - graph.VIEWS)
    table = [["kernel", "ours", "mlx-lm's"], *([n, str(ours[n]), str(theirs[n])] for n in names)]
    words = f"{most} a position, {others} in mlx-lm; {capture(_model(2))}"
    data = {"ours": dict(ours), "mlx-lm": dict(theirs)}
    return Found(0 < most <= others, words, table, data)


def position(step: Callable[[Model], mx.array]) -> Counter[str]:
    """The primitives of one position: what three have more than two, a first and a last."""
    found = counted(partial(step, _model(3)))
    found.subtract(counted(partial(step, _model(2))))
    return +found


def counted(build: Callable[[], mx.array]) -> Counter[str]:
    """Those of the graph that is built."""
    return graph.count(build())


def _model(positions: int) -> Model:
    """In the form that the loader leaves, over one block: it is not computed."""
    model = Model(ModelConfig.from_dict(_GEOMETRY))
    model.update(tree_map(lambda array: (0.02 * array).astype(mx.float16), model.parameters()))
    for block in model.model.layers:
        fuse_projections(block)
    mx.eval(model.parameters())
    return model.view((0,) * positions)


def _step(model: Model) -> mx.array:
    """The graph of a token after some others."""
    return _after_some(model, model.make_cache())


def _their_step(model: Model) -> mx.array:
    from mlx_lm.models.cache import make_prompt_cache

    peer: Any = as_mlx_lm(model)
    return _after_some(peer, make_prompt_cache(peer))


def _after_some(model: Any, caches: Sequence[Any]) -> mx.array:
    entries = mx.zeros((1, _KV_HEADS, 3, _WIDTH), mx.float16)
    for cache in caches:
        mx.eval(cache.update_and_fetch(entries, entries))
    logits: mx.array = model(mx.array([[4]]), caches)
    return logits


def capture(model: Model) -> str:
    """In words, whether Metal wrote one of a step."""
    if device.backend() != "metal":
        return "no capture: that is Metal's"
    trace = Path(tempfile.gettempdir()) / TRACE
    shutil.rmtree(trace, ignore_errors=True)
    step = _step(model)
    try:
        mx.metal.start_capture(str(trace))
    except RuntimeError:
        return f"no capture: this process is not allowed one ({CAPTURE})"
    try:
        mx.eval(step)
    finally:
        with suppress(RuntimeError):
            mx.metal.stop_capture()
    return f"a capture of 2 positions is {TRACE}, among the temporary files, for Xcode"
