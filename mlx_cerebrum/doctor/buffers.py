"""Memory: caches written in place, limits put back, a request that takes what was predicted."""

import struct
import sys

import mlx.core as mx
import mlx.nn as nn

from mlx_cerebrum import device
from mlx_cerebrum.decoding.decode import prefill_step
from mlx_cerebrum.decoding.decoder import Decoder, generate_step
from mlx_cerebrum.decoding.generation import Generation
from mlx_cerebrum.doctor.check import Found, Settings
from mlx_cerebrum.machine.facts import sysctl
from mlx_cerebrum.model.cache import STEP, WindowedKVCache
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.limits import PROC, limits, sizes, wire
from mlx_cerebrum.model.memory import Workload, human, require
from mlx_cerebrum.weights.opening import ModelSpec, open_model

SEEN, STEPS = 4000, 64  # tokens in the caches; steps that must not copy them
COPIES = 2  # positions' caches that the steps may take besides
PREDICTED = 0.05  # of the prediction
SWAP = 100_000_000  # bytes that other programs may cause
_WINDOW, _QUICK_WINDOW = 4096, 1024  # where the model has none
_ANSWER = 64  # tokens
_SIDE = 2048  # of a matrix that is wired


def in_place(settings: Settings) -> Found:
    """64 steps at 4000 tokens: what they hold at most besides the caches."""
    opened = open_model(ModelSpec(settings.model))
    config, storage = opened.config, opened.storage
    seen = min(SEEN, config.max_position_embeddings - STEPS - 1)
    request = Workload(config, storage.dtype.size, seen, STEPS, prefill_step())
    require(storage.nbytes + request.bytes, f"{seen} tokens", "close other programs")
    model = opened.load()
    caches = model.make_cache()
    for cache in caches:
        fill(cache, seen, model)
    one = sum(cache.nbytes for cache in caches) // len(caches)
    before = _settled()
    mx.reset_peak_memory()
    tokens = [1 + n % (config.vocab_size - 1) for n in range(seen + 1)]
    for _ in Decoder().run(Generation(model, tokens, caches, STEPS)):
        pass
    most = mx.get_peak_memory() - before
    words = f"{human(most)} at most in {STEPS} steps; one position's cache is {human(one)}"
    data = {"bytes": most, "position_bytes": one, "positions": len(caches), "tokens": seen}
    return Found(most < COPIES * one, words, data=data)


def fill(cache: WindowedKVCache, tokens: int, model: Model) -> None:
    """As if so many had been read; with room for the next ones."""
    config = model.config
    for count in (max(1, tokens - STEP // 2), min(tokens - 1, STEP // 2)):
        entries = mx.zeros((1, config.num_key_value_heads, count, config.head_dim), model.dtype)
        cache.update_and_fetch(entries + 0.01, entries + 0.02)
        mx.eval(cache.state)


def put_back(settings: Settings) -> Found:
    """Limits of memory, kept buffers and, on Metal, wired memory after work within others."""
    asked = {"memory": mx.set_memory_limit, "cache": mx.set_cache_limit}
    if metal := device.backend() == "metal":
        asked["wired"] = mx.set_wired_limit
    marks = {"memory": 3 << 30, "cache": 5 << 20, "wired": 1 << 20}
    before = {name: change(marks[name]) for name, change in asked.items()}
    try:
        weights = nn.Linear(_SIDE, _SIDE, bias=False)
        mx.eval(weights.parameters())
        with limits(memory=5 * _SIDE**2):  # nearly filled by the weights: they are wired
            wire(weights)
            mx.eval(weights(mx.ones((1, _SIDE))))
            wired = _wired() if metal else 0
    finally:
        after = {name: change(before[name]) for name, change in asked.items()}
    left = [name for name in asked if after[name] != marks[name]]
    words = f"put back: {', '.join(name for name in asked if name not in left) or 'none'}"
    words += f"; left changed: {', '.join(left)}" if left else ""
    words += f"; {human(wired)} were wired" if metal else "; memory is wired on Metal only"
    return Found(not left, words, data={"left": left, "checked": list(asked), "wired": wired})


def _wired() -> int:
    """The limit as it is: MLX only says it when it is changed."""
    limit = mx.set_wired_limit(0)
    mx.set_wired_limit(limit)
    return limit


def full_window(settings: Settings) -> Found:
    """A prompt that fills the window, and an answer: bytes predicted and taken, and swap."""
    window = _QUICK_WINDOW if settings.quick else None
    opened = open_model(ModelSpec(settings.model, window=window))
    if opened.config.sliding_window is None:
        most = min(_WINDOW, opened.config.max_position_embeddings // 2)
        opened = open_model(ModelSpec(settings.model, window=most))
    config, item = opened.config, opened.storage.dtype.size
    assert config.sliding_window is not None
    request = Workload(config, item, config.sliding_window - _ANSWER // 2, _ANSWER, prefill_step())
    require(opened.storage.nbytes + request.bytes, "a full window", "close other programs")
    before = swapped()
    with limits():
        model = opened.load()
        held = _settled()
        mx.reset_peak_memory()
        prompt = [1 + n % (config.vocab_size - 1) for n in range(request.prompt)]
        for _ in generate_step(prompt, model, max_tokens=request.generated):
            pass
        taken = mx.get_peak_memory() - held
    grown = None if before is None else (swapped() or 0) - before
    weights, predicted = opened.storage.nbytes, request.bytes
    share = (weights + taken) / (weights + predicted)
    words = (
        f"{human(weights + taken)} of {human(weights + predicted)} predicted ({share - 1:+.1%});"
        f" without the weights {human(taken)} of {human(predicted)}"
    )
    words += "" if grown is None else f"; swap grew by {human(max(0, grown))}"
    # Less than predicted costs nobody anything; more may cost what else is in memory.
    passed = abs(share - 1) <= PREDICTED and taken <= (1 + PREDICTED) * predicted
    data = {"predicted": predicted, "taken": taken, "weights": weights, "swap_grown": grown}
    return Found(passed and (grown is None or grown <= SWAP), words, data=data)


def _settled() -> int:
    mx.synchronize()
    mx.clear_cache()
    return mx.get_active_memory()


def swapped() -> int | None:
    """Bytes in swap: the system's on macOS, this process's on Linux; None where nobody says."""
    if sys.platform == "darwin":
        usage = sysctl("vm.swapusage")  # xsw_usage of sys/sysctl.h: total, free, used, ...
        return None if usage is None else int(struct.unpack_from("=QQQ", usage)[2])
    return sizes(PROC / "self" / "status").get("VmSwap")
