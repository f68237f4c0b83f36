"""How fast this machine reads prompts and writes answers, in a few seconds."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import mlx.core as mx
from mlx.utils import tree_map

from mlx_cerebrum import device
from mlx_cerebrum.decoding.decoder import Decoder
from mlx_cerebrum.decoding.generation import Generation
from mlx_cerebrum.decoding.policy import bytes_read
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.limits import limits
from mlx_cerebrum.model.memory import fits, human
from mlx_cerebrum.shelf.entries import find
from mlx_cerebrum.weights.hub import has_demo
from mlx_cerebrum.weights.opening import ModelSpec, open_model

_CHUNK, _CHUNK_GPU = 32, 512  # tokens of a prompt at a time: what is stopped in between
_MOST = 1000  # tokens of an answer
_READING, _SHARE = 0.25, 0.15  # of the time, for a prompt, and for the bandwidth
_LARGE, _SMALL = 2**28, 2**26  # bytes of the matrix that it is measured with
# As many blocks as a small model has, of a shape whose weights are what takes the time.
_RANDOM = {
    "model_type": "mistral",
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "intermediate_size": 3584,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Pace:
    """model: what was timed, in words. nbytes: weights that a token reads. Tokens a second, and
    bytes a second."""

    model: str
    is_demo: bool
    nbytes: int
    read: float
    decoded: float
    bandwidth: float


class _EnoughError(Exception):
    """The time for reading is up."""


def measure(seconds: float, clock: Callable[[], float] = time.perf_counter) -> Pace:
    """Takes about so long, besides loading. Raises CerebrumError where the demo is damaged."""
    began = clock()
    with limits():
        model, words, is_demo = _model()
        left = max(0.1, seconds - (clock() - began))
        read = _read(model, clock() + _READING * left, clock)
        ends = began + seconds - _SHARE * left
        decoded = _written(model, _tokens(8), _MOST, ends, clock)
        able = max(bandwidth(_SHARE * left, clock), decoded * bytes_read(model))
    return Pace(words, is_demo, bytes_read(model), read, decoded, able)


def _model() -> tuple[Model, str, bool]:
    entry = find("demo")
    if entry is not None or has_demo():
        opened = open_model(ModelSpec("demo" if entry is None else entry.path))
        if fits(opened.storage.nbytes + opened.storage.transient):
            return opened.load(), f"the demo model, {human(opened.storage.nbytes)}", True
    config = ModelConfig.from_dict(_RANDOM)
    model = Model(config)
    dtype = mx.float16 if device.on_gpu() else mx.float32
    model.update(tree_map(lambda array: (0.02 * array).astype(dtype), model.parameters()))
    mx.eval(model.parameters())
    size = human(bytes_read(model))
    return model, f"a random model of {size}, as the demo model is not here", False


def _read(model: Model, ends: float, clock: Callable[[], float]) -> float:
    """Tokens of a prompt read in a second; of those that are read until `ends`."""
    chunk = _CHUNK_GPU if device.on_gpu() else _CHUNK
    prompt = _tokens(4 * chunk + 1)
    _written(model, prompt[: chunk + 1], 1, clock(), clock)  # kernels are made and loaded
    came = [(0, clock())]

    def report(done: int, total: int) -> None:
        came.append((done, clock()))
        if clock() >= ends:
            raise _EnoughError

    generation = Generation(model, prompt, model.make_cache(), 1)
    with suppress(_EnoughError):
        for _ in Decoder(chunk).run(generation, report):
            pass
    (_, began), (done, last) = came[0], came[-1]
    return done / (last - began)


def _written(
    model: Model, prompt: list[int], most: int, ends: float, clock: Callable[[], float]
) -> float:
    """Tokens of an answer written in a second, until `ends`: one at least."""
    steps = Decoder(len(prompt)).run(Generation(model, prompt, model.make_cache(), most + 1))
    next(steps)
    began, written = clock(), 0
    for _ in steps:
        written += 1
        if clock() >= ends:
            break
    steps.close()
    return written / (clock() - began)


def _tokens(count: int) -> list[int]:
    return [7 + (31 * i) % 200 for i in range(count)]


def bandwidth(seconds: float, clock: Callable[[], float] = time.perf_counter) -> float:
    """Bytes a second that a product of a large matrix and one vector reads."""
    nbytes = _LARGE if fits(2 * _LARGE) else _SMALL
    dtype = mx.float16 if device.on_gpu() else mx.float32
    matrix = mx.zeros((nbytes // dtype.size // 4096, 4096), dtype=dtype) + 1
    vector = mx.ones((4096, 1), dtype=dtype)
    mx.eval(matrix, vector, matrix @ vector)
    ends, fastest = clock() + seconds, float("inf")
    while True:
        began = clock()
        mx.eval(matrix @ vector)
        now = clock()
        fastest = min(fastest, now - began)
        if now >= ends:
            return nbytes / fastest
