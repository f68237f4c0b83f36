"""How fast: beside mlx-lm on the same arrays, against the bandwidth, and two models at once.

Of several rounds the fastest counts: what else runs on the machine only makes one slower.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_cerebrum import device
from mlx_cerebrum.decoding.decoder import Decoder, generate_step
from mlx_cerebrum.decoding.generation import Generation
from mlx_cerebrum.decoding.policy import bytes_read
from mlx_cerebrum.doctor import pace
from mlx_cerebrum.doctor.check import Found, Settings
from mlx_cerebrum.doctor.peer import as_mlx_lm
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.limits import limits
from mlx_cerebrum.model.memory import GB
from mlx_cerebrum.weights.opening import ModelSpec, open_model
from mlx_cerebrum.weights.storage import dtype_name
from mlx_cerebrum.weights.views import orders, views

LEAST = 0.9  # of mlx-lm's pace: what two runs of one program may differ by
TOGETHER = 1.05  # of the time that they take one after the other
SHARE = 1.1  # of the bandwidth: more is no pace but a fault of the clock
LARGE, LARGE_SHARE = 2e9, 0.5  # bytes that a token reads, from which on the weights decide
TYPES = ("float16", "bfloat16")
_STEPS, _CPU_STEPS = (128, 256, 512, 1024), (32, 64, 128, 256)
_BEFORE, _SHORT, _DECODED, _CPU_DECODED = 64, 8, 96, 24  # tokens

# A prompt, tokens wanted, prefill step -> tokens as they come.
Engine = Callable[[Sequence[int], int, int], Iterator[int]]


@dataclass
class Paces:
    """Tokens a second of one engine, by what was done."""

    read: dict[int, list[float]] = field(default_factory=dict)  # by prefill step
    written: list[float] = field(default_factory=list)

    def fastest(self) -> float:
        return max(map(max, self.read.values()))


def _loaded(settings: Settings, dtype: str = "auto") -> Model:
    """As `generate` has it, inside `limits`."""
    return open_model(ModelSpec(settings.model, dtype=dtype)).load()


def beside_mlx_lm(settings: Settings) -> Found:
    """Reading a prompt in four steps, and writing, in both 16-bit types; on a CPU in what it
    computes in."""
    gpu = device.on_gpu()
    table = [["type", "what", "ours, tokens/s", "mlx-lm's", "ours / mlx-lm's"]]
    ratios: dict[str, float] = {}
    paces: dict[str, Any] = {}
    for dtype in TYPES if gpu else ("auto",):
        with limits():
            model = _loaded(settings, dtype)
            name = dtype_name(model.dtype)
            large = bytes_read(model) >= LARGE  # a round takes long, and varies little
            ours, theirs = race(model, 1 if large else 2 if settings.quick else 3, settings.quick)
        for step in ours.read:
            table.append(_row(name, f"read in steps of {step}", ours.read[step], theirs.read[step]))
        table.append(_row(name, "write", ours.written, theirs.written))
        ratios[f"{name} reading"] = ours.fastest() / theirs.fastest()
        ratios[f"{name} writing"] = max(ours.written) / max(theirs.written)
        paces[name] = {
            who: {"read": {str(k): max(v) for k, v in found.read.items()}}
            | {"written": max(found.written)}
            for who, found in (("ours", ours), ("mlx-lm", theirs))
        }
        del model
        mx.clear_cache()
    words = ", ".join(f"{ratio:.2f} {what}" for what, ratio in ratios.items())
    words += "" if gpu else "; a CPU has no fast 16-bit arithmetic in MLX"
    data = {"ratios": ratios, "tokens_per_second": paces}
    return Found(min(ratios.values()) >= LEAST, words, table, data)


def _row(dtype: str, what: str, ours: list[float], theirs: list[float]) -> list[str]:
    a, b = max(ours), max(theirs)
    return [dtype, what, f"{a:.1f}", f"{b:.1f}", f"{a / b:.2f}"]


def race(model: Model, rounds: int, quick: bool) -> tuple[Paces, Paces]:
    """In turns, after one round that warms both up."""
    peer = as_mlx_lm(model)
    engines: list[tuple[Engine, Paces]] = [(_ours(model), Paces()), (_mlx_lm(peer), Paces())]
    gpu = device.on_gpu()
    steps = _STEPS if gpu else _CPU_STEPS
    prompt = _tokens(steps[-2 if quick else -1] + 1, model)
    wanted = (_DECODED if gpu else _CPU_DECODED) // (2 if quick else 1)
    for number in range(rounds + 1):
        for engine, paces in engines:
            if number == 0:
                _timed(engine, prompt[:_BEFORE], 2, steps[-1])
                continue
            for step in steps:
                first, _ = _timed(engine, prompt, 1, step)
                paces.read.setdefault(step, []).append(len(prompt) / first)
            _, rest = _timed(engine, prompt[:_BEFORE], wanted + 1, steps[-1])
            paces.written.append(wanted / rest)
    return engines[0][1], engines[1][1]


def _ours(model: Model) -> Engine:
    def run(prompt: Sequence[int], wanted: int, step: int) -> Iterator[int]:
        return generate_step(prompt, model, max_tokens=wanted, prefill_step_size=step)

    return run


def _mlx_lm(peer: Any) -> Engine:
    from mlx_lm.generate import generate_step as theirs

    def run(prompt: Sequence[int], wanted: int, step: int) -> Iterator[int]:
        ids = mx.array(list(prompt))
        return (int(t) for t, _ in theirs(ids, peer, max_tokens=wanted, prefill_step_size=step))

    return run


def _timed(engine: Engine, prompt: Sequence[int], wanted: int, step: int) -> tuple[float, float]:
    """Seconds to the first token, and from there to the last."""
    began = time.perf_counter()
    tokens = engine(prompt, wanted, step)
    next(tokens)
    first = time.perf_counter()
    for _ in tokens:
        pass
    rest = time.perf_counter() - first
    mx.clear_cache()
    return first - began, rest


def _tokens(count: int, model: Model) -> list[int]:
    return [7 + (31 * i) % min(200, model.config.vocab_size - 7) for i in range(count)]


def bandwidth(settings: Settings) -> Found:
    """Bytes of weights that writing reads a second, against what this machine can read."""
    with limits():
        model = _loaded(settings)
        prompt, count = _tokens(_BEFORE, model), _DECODED if device.on_gpu() else _CPU_DECODED
        _timed(_ours(model), prompt, 2, _BEFORE)
        _, rest = _timed(_ours(model), prompt, count + 1, _BEFORE)
        able = pace.bandwidth(1.0)
    nbytes = bytes_read(model)
    reached = nbytes * count / rest
    share = reached / able
    least = LARGE_SHARE if nbytes >= LARGE else 0.0
    words = f"{share:.0%}: {reached / GB:.1f} of {able / GB:.1f} GB/s, {count / rest:.1f} tokens/s"
    data = {"reached": reached, "able": able, "bytes_a_token": nbytes}
    return Found(least < share <= SHARE, words, data=data)


def together(settings: Settings) -> Found:
    """Two models over the same blocks, answering at once and one after the other."""
    with limits():
        wanted = orders(open_model(ModelSpec(settings.model)).config, settings.model)
        if len(wanted) < 2:
            return Found(None, "this model's blocks have one order only")
        models = list(views(_loaded(settings), wanted).values())[:2]
        count = _DECODED if device.on_gpu() else _CPU_DECODED
        rounds = 2 if settings.quick else 3
        _seconds(models, 2)
        at_once, apart = [], []
        for _ in range(rounds):
            at_once.append(_seconds(models, count))
            apart.append(sum(_seconds([model], count) for model in models))
    ratio = min(at_once) / min(apart)
    words = (
        f"{ratio:.2f} of the time: {min(at_once):.2f} s for {count} tokens of"
        f" {' and '.join(list(wanted)[:2])} at once, {min(apart):.2f} s one after the other"
    )
    data = {"at_once": min(at_once), "apart": min(apart), "tokens": count}
    return Found(ratio <= TOGETHER, words, data=data)


def _seconds(models: Sequence[Model], count: int) -> float:
    """For answers of so many tokens to a short prompt, all at once."""
    decoder, prompt = Decoder(), _tokens(_SHORT, models[0])
    began = time.perf_counter()
    runs = [decoder.run(Generation(m, prompt[:], m.make_cache(), count)) for m in models]
    for _ in range(count):
        for run in runs:
            next(run)
    taken = time.perf_counter() - began
    for run in runs:
        run.close()
    mx.clear_cache()
    return taken
