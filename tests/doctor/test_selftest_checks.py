"""Each check of the selftest passes here, and fails where what it checks is broken."""

import fcntl
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import MakeCheckpoint, resting

from bench.primitives import count_as_on_metal
from convert.__main__ import main as convert
from convert.verify import verify
from mlx_cerebrum import device, load
from mlx_cerebrum.doctor import (
    attending,
    buffers,
    kernels,
    packing,
    products,
    racing,
    serving,
    system,
    texts,
)
from mlx_cerebrum.doctor.attending import Shape
from mlx_cerebrum.doctor.check import Found, Settings
from mlx_cerebrum.doctor.peer import as_mlx_lm
from mlx_cerebrum.errors import CerebrumError
from mlx_cerebrum.model import forward
from mlx_cerebrum.model.attention import attend
from mlx_cerebrum.model.cache import WindowedKVCache
from mlx_cerebrum.model.entries import Entries
from mlx_cerebrum.model.limits import NO_WIRE
from mlx_cerebrum.model.memory import Workload
from mlx_cerebrum.weights.quantize import Packing

pytestmark = pytest.mark.one_in(8)

NOWHERE = Settings("", True, "")
drawn = pytest.mark.one_in(8)  # of the checks that load models; the long run takes them all


@pytest.fixture
def small(checkpoint: MakeCheckpoint, tmp_path: Path) -> Settings:
    """A model without a window, 1 MB of cache a position at 4000 tokens."""
    path = str(checkpoint(sliding_window=None, max_position_embeddings=8192))
    return Settings(path, True, str(tmp_path), path)


# ---- What is computed


def test_products(monkeypatch: pytest.MonkeyPatch) -> None:
    found = products.products(NOWHERE)
    assert found.passed, found.words

    def tf32(x: mx.array) -> mx.array:
        """With 10 bits of the 23, rounded."""
        bits = (mx.view(x, mx.uint32) + (1 << 12)) >> 13
        return mx.view((bits << 13).astype(mx.uint32), mx.float32)

    monkeypatch.setattr(products, "_SIZE", 128)
    monkeypatch.setattr(products, "dense", lambda x, weight: tf32(x) @ tf32(weight).T)
    found = products.products(NOWHERE)
    assert found.passed is False
    assert found.data["errors"]["dense"] > 1e-4
    assert found.data["errors"]["4-bit"] < products.MOST


SOME = [
    Shape(width, queries, keys, mask)
    for width, queries, keys, masks in (
        (64, 1, 400, ("none", "rows")),
        (128, 9, 400, ("causal", "window", "rows")),
        (96, 64, 400, ("window",)),
    )
    for mask in masks
]


def test_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attending, "shapes", lambda quick: iter(SOME))
    found = attending.attention(NOWHERE)
    assert found.passed, found.table
    assert len(found.table) == 1 + 9
    assert sum(int(row[2]) for row in found.table[1:]) == 9 * len(SOME)


@pytest.mark.one_in(12)
@pytest.mark.parametrize("fault", ["mask", "scale", "group", "nan", "packed"])
def test_attention_that_is_wrong(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    right = attend

    def wrong(
        queries: mx.array, keys: Entries, values: Entries, scale: float, mask: Any
    ) -> mx.array:
        if fault == "mask" and isinstance(mask, mx.array):
            mask = mx.concatenate([mask[..., 1:], mask[..., -1:]], axis=-1)  # the window, by one
        if fault == "scale":
            scale *= 1.001
        if fault == "group" and isinstance(keys, mx.array):
            keys = keys[:, ::-1]
        out = right(queries, keys, values, scale, mask)
        if fault == "packed" and not isinstance(keys, mx.array):
            out = out + 0.1
        return out * mx.nan if fault == "nan" else out

    monkeypatch.setattr(attending, "attend", wrong)
    monkeypatch.setattr(attending, "shapes", lambda quick: iter(SOME[3:4]))  # its window
    assert attending.attention(NOWHERE).passed is False


@pytest.mark.parametrize("quick", [True, False])
def test_what_attention_is_tried_with(quick: bool) -> None:
    shapes = list(attending.shapes(quick))
    assert len(set(shapes)) == len(shapes)
    assert {s.mask for s in shapes} == set(attending.MASKS)
    assert max(s.keys for s in shapes) == 4607
    if not quick:
        assert {s.queries for s in shapes} == {1, 2, 8, 9, 64, 512}
        assert {s.width for s in shapes} == {64, 96, 128}
        for queries in (1, 2, 8, 9, 64, 512):
            assert {s.mask for s in shapes if s.queries == queries} >= {"causal", "window"}


@pytest.mark.long
def test_all_of_attention() -> None:
    found = attending.attention(Settings("", False, ""))
    assert found.passed, found.table


@pytest.fixture
def short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "WINDOW", 12)
    monkeypatch.setattr(texts, "_QUICK_TOKENS", 40)
    monkeypatch.setattr(texts, "_PROMPT", "Once upon")


@drawn
def test_a_long_text(small: Settings, short_text: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = texts.long_text(small)
    assert found.passed, found.words
    assert found.data["tokens"] == 40
    assert found.data["different"] > 10
    right = WindowedKVCache.size
    # A token too many once the window is full.
    monkeypatch.setattr(WindowedKVCache, "size", lambda self: min(right(self) + 1, self.offset))
    found = texts.long_text(small)
    assert found.passed is False
    assert found.data["wrong"] > 0
    assert "the first that is not: number" in found.words


@drawn
def test_ties_are_no_faults(
    small: Settings, short_text: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "TIE", 1e9)
    monkeypatch.setattr(texts, "generate_step", lambda *a, **k: iter([5] * 40))
    found = texts.long_text(small)
    assert found.passed
    assert found.data["ties"] > 20
    assert "were ties" in found.words


@drawn
def test_guesses(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "_QUICK_GUESSED", 40)
    monkeypatch.setattr(texts, "_LIST", "one two one two one two one")
    path = str(checkpoint(sliding_window=None))
    found = texts.guessing(Settings(path, True, str(tmp_path), path))
    assert found.passed, found.words
    assert set(found.data["guesses"]) == {"ngram", "model"}
    for count in (41, 42, 43):  # also where nothing is left to guess at the end
        monkeypatch.setattr(texts, "_QUICK_GUESSED", count)
        assert texts.guessing(Settings(path, True, str(tmp_path), path)).passed
    # Whatever is guessed is taken.
    monkeypatch.setattr("mlx_cerebrum.decoding.speculative.held_guesses", lambda g, chosen: len(g))
    assert texts.guessing(Settings(path, True, str(tmp_path), path)).passed is False


# ---- Memory


@drawn
def test_caches_in_place(small: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "STEPS", 8)
    found = buffers.in_place(small)
    assert found.passed, found.words
    held: list[Any] = []
    update = WindowedKVCache.update_and_fetch

    def copying(self: WindowedKVCache, keys: mx.array, values: mx.array) -> Any:
        if keys.shape[2] == 1:  # while somebody looks, MLX can't write in place
            held.append([entries[..., :1, :] for entries in (self.keys, self.values)])
            mx.eval(held[-1])
            del held[:-16]
        return update(self, keys, values)

    monkeypatch.setattr(WindowedKVCache, "update_and_fetch", copying)
    assert buffers.in_place(small).passed is False


def test_limits_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = mx.set_cache_limit(7 << 20)
    try:
        found = buffers.put_back(NOWHERE)
        assert found.passed, found.words
        assert "Metal only" in found.words

        @contextmanager
        def forgotten(memory: int) -> Iterator[None]:
            mx.set_cache_limit(1 << 20)
            yield

        monkeypatch.setattr(buffers, "limits", forgotten)
        found = buffers.put_back(NOWHERE)
        assert found.passed is False
        assert found.data["left"] == ["cache"]
        assert mx.set_cache_limit(7 << 20) == 7 << 20  # the check itself leaves all as it was
    finally:
        mx.set_cache_limit(before)


def test_wired_memory_is_looked_at_on_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    wired = [0]

    def change(limit: int) -> int:
        before, wired[0] = wired[0], limit
        return before

    monkeypatch.delenv(NO_WIRE, raising=False)
    monkeypatch.setattr(mx, "set_wired_limit", change)
    monkeypatch.setattr(device, "backend", lambda: "metal")
    monkeypatch.setattr("mlx_cerebrum.model.limits.working_set", lambda: 1 << 40)
    # As outside of `limits`: inside those that a thread of another test is in, nothing is wired.
    monkeypatch.setattr("mlx_cerebrum.model.limits._may_wire", None)
    found = buffers.put_back(NOWHERE)
    assert found.passed, found.words
    assert found.data["checked"] == ["memory", "cache", "wired"]
    assert found.data["wired"] == 16 << 20
    assert "16.8 MB were wired" in found.words
    monkeypatch.setattr(buffers, "limits", lambda memory: nullcontext())  # nobody puts it back
    monkeypatch.setattr(buffers, "wire", lambda model: change(7))
    found = buffers.put_back(NOWHERE)
    assert found.data["left"] == ["wired"]
    assert wired == [0]


@drawn
def test_a_full_window(small: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "_QUICK_WINDOW", 128)
    monkeypatch.setattr(buffers, "PREDICTED", 0.25)  # so small a model makes other things count
    found = buffers.full_window(small)
    assert found.passed, found.words
    swap = iter([0, buffers.SWAP + 1])
    with monkeypatch.context() as patch:
        patch.setattr(buffers, "swapped", lambda: next(swap))
        found = buffers.full_window(small)
    assert found.passed is False
    assert "swap grew by 0.10 GB" in found.words
    monkeypatch.setattr(Workload, "bytes", 1 << 30)
    assert buffers.full_window(small).passed is False


# ---- Packing


def test_quantizing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = packing.quantizing(Settings("", False, ""))
    assert found.passed, found.words
    assert found.data["different"] == 0
    right, calls = packing.quantize, [0]

    def other(change: Callable[[mx.array], mx.array]) -> Callable[..., dict[str, mx.array]]:
        """Here (the first of two calls) other weights are packed."""

        def quantize(how: Packing, weight: mx.array) -> dict[str, mx.array]:
            calls[0] += 1
            return right(how, change(weight) if calls[0] % 2 else weight)

        return quantize

    def flipped(weight: mx.array) -> mx.array:
        columns = mx.arange(weight.size).reshape(weight.shape)
        return mx.where(columns == 5000, -weight, weight)

    def nudged(by: float, weight: mx.array) -> mx.array:
        noise = by * mx.random.normal(weight.shape, key=mx.random.key(2))
        return (weight + noise).astype(weight.dtype)

    # As if a quotient here and there rounded the other way; too many of them; one value wrong.
    for change, passes in ((3e-6, True), (1e-3, False), (flipped, False)):
        by = change if callable(change) else partial(nudged, change)
        monkeypatch.setattr(packing, "quantize", other(by))
        found = packing.quantizing(NOWHERE)
        assert found.passed is passes, found.words
        assert found.data["different"] > 0


@drawn
def test_converting(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(checkpoint(torch_dtype="float32"))
    spoil = {"before": 0, "after": 0}  # words that are hashed as another

    def run(command: list[str], on_cpu: bool = False) -> None:
        if command[0] == "verify":
            if not verify(Path(command[1]))["sound"]:
                raise CerebrumError("unsound")
            return
        if "--dequantize" in command:
            command.remove("--dequantize")  # this one is dense
        with monkeypatch.context() as patch:
            if on_cpu and spoil["before"]:
                right = Packing.quantize
                patch.setattr(
                    Packing, "quantize", lambda self, weight, stream=None: right(self, -weight)
                )
            assert convert(command[1:]) == 0
        (file,) = Path(command[4]).glob("*.safetensors")
        if not on_cpu and spoil["after"]:
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)

    monkeypatch.setattr(packing, "run", run)

    def converted(name: str) -> Found:
        (tmp_path / name).mkdir()
        return packing.converting(Settings("", True, str(tmp_path / name), source))

    found = converted("a")
    assert found.passed, found.words
    assert found.data["different"] == 0
    spoil["before"] = 1
    found = converted("b")
    assert found.passed is False
    assert found.data["different"] > 1000
    assert found.data["tensors"]
    spoil["after"] = 1
    with pytest.raises(CerebrumError, match="unsound"):
        converted("c")


# ---- The server


class Stand:
    """In a server's place: answers by itself, in a way that may be wrong."""

    def __init__(self, fault: str) -> None:
        self.fault, self.asked = fault, 0

    def ask(self, method: str, path: str, body: Any = None) -> str:
        if body is None:
            return json.dumps({"data": [{"id": "demo"}, {"id": "demo-interleaved"}]})
        self.asked += 1
        if self.fault == "status" and self.asked == 3:
            raise CerebrumError("status 503: no memory")
        said = f"{body['model']}: {self.asked if self.fault == 'other' else 'yes'}"
        if body["stream"]:
            events = [{"choices": [{"delta": {"content": part}}]} for part in (said[:4], said[4:])]
            end = [] if self.fault == "cut" else ["[DONE]"]
            return "".join(f"data: {line}\n\n" for line in [*map(json.dumps, events), *end])
        reason = None if self.fault == "endless" else "length"
        return json.dumps({"choices": [{"message": {"content": said}, "finish_reason": reason}]})

    def end(self) -> int | None:
        return {"code": 1, "hangs": None}.get(self.fault, 0)

    def said(self) -> str:
        return "Segmentation fault" if self.fault == "code" else ""


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("", "24 of 24 answered by 2 models; it ended in order"),
        (
            "status",
            "23 of 24 answered by 2 models; it ended in order; the first that failed: status",
        ),
        ("other", "10 of 10 questions had several answers"),
        ("cut", "a stream without an end"),
        ("endless", "an answer without an end"),
        ("code", "it ended with code 1; it said: Segmentation fault"),
        ("hangs", "it ended KILLED"),
    ],
)
def test_a_server(monkeypatch: pytest.MonkeyPatch, fault: str, said: str) -> None:
    @contextmanager
    def server(words: list[str]) -> Iterator[Stand]:
        yield Stand(fault)

    monkeypatch.setattr(serving, "server", server)
    found = serving.serving(Settings("demo", True, ""))
    assert found.passed is (fault == "")
    assert said in found.words


def test_a_server_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = ["sh", "-c", "echo 'error: no such model' >&2; exit 2"]
    monkeypatch.setattr("mlx_cerebrum.doctor.program.words", lambda command: ends)
    with (
        pytest.raises(CerebrumError, match="the server does not serve: no such model"),
        serving.server([]),
    ):
        pass


@pytest.mark.long
def test_a_real_server(checkpoint: MakeCheckpoint) -> None:
    found = serving.serving(Settings(str(checkpoint()), True, ""))
    assert found.passed, found.words
    assert found.data["code"] == 0


# ---- Pace


@drawn
@pytest.mark.parametrize("q_bits", [None, 4])
def test_mlx_lm_runs_the_same_arrays(checkpoint: MakeCheckpoint, q_bits: int | None) -> None:
    path = checkpoint(sliding_window=None, max_position_embeddings=8192)
    model, _ = load(path, q_bits=q_bits, q_group_size=32)
    model = model.view((0, 1, 2, 3, 2, 3, 4, 5, 6, 7))
    mx.eval(model.parameters())
    before = resting()
    peer = as_mlx_lm(model)
    mx.eval(peer.parameters())
    assert mx.get_active_memory() - before < 100_000
    ids = mx.array([[5, 80, 44, 120, 7, 99, 201]])
    assert mx.allclose(peer(ids), model(ids), atol=1e-4)


@drawn
def test_paces(small: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(racing, "_CPU_STEPS", (8, 16))
    monkeypatch.setattr(racing, "_CPU_DECODED", 4)
    monkeypatch.setattr(racing, "_BEFORE", 8)
    monkeypatch.setattr(racing, "LEAST", 0.0)
    found = racing.beside_mlx_lm(small)
    assert found.passed
    assert [row[1] for row in found.table[1:]] == [
        "read in steps of 8", "read in steps of 16", "write"
    ]  # fmt: skip
    assert found.data["tokens_per_second"]["float32"]["mlx-lm"]["written"] > 0

    def raced(*args: Any) -> tuple[racing.Paces, racing.Paces]:
        return racing.Paces({8: [50.0, 75.0]}, [8.0]), racing.Paces({8: [100.0]}, [10.0])

    monkeypatch.setattr(racing, "LEAST", 0.9)
    monkeypatch.setattr(racing, "race", raced)
    found = racing.beside_mlx_lm(small)
    assert found.passed is False
    assert found.words.startswith("0.75 float32 reading, 0.80 float32 writing")


@drawn
def test_bandwidth(small: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(racing, "_CPU_DECODED", 4)
    monkeypatch.setattr("mlx_cerebrum.doctor.pace.bandwidth", lambda seconds: 1e12)
    found = racing.bandwidth(small)
    assert found.passed, found.words
    monkeypatch.setattr(racing, "LARGE", 1.0)  # so much of it must then be used
    assert racing.bandwidth(small).passed is False
    monkeypatch.setattr("mlx_cerebrum.doctor.pace.bandwidth", lambda seconds: 1.0)
    assert racing.bandwidth(small).passed is False


@drawn
def test_two_models_at_once(small: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    assert racing.together(small).passed is None
    two = {"a": (tuple(range(8)), None), "b": ((0, 1, 2, 3, 2, 3, 4, 5, 6, 7), None)}
    monkeypatch.setattr(racing, "orders", lambda config, source: two)
    monkeypatch.setattr(racing, "_CPU_DECODED", 4)
    monkeypatch.setattr(racing, "TOGETHER", 100.0)
    found = racing.together(small)
    assert found.passed
    assert "4 tokens of a and b at once" in found.words
    monkeypatch.setattr(racing, "TOGETHER", 1.05)
    monkeypatch.setattr(racing, "_seconds", lambda models, count: 3.0 if len(models) == 2 else 1.0)
    assert racing.together(small).passed is False


def test_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.kernels(NOWHERE).passed is None
    monkeypatch.setattr(kernels, "counted", lambda build: count_as_on_metal(build, head_dim=64))
    monkeypatch.setattr(device, "backend", lambda: "cuda")
    found = kernels.kernels(NOWHERE)
    assert found.passed, found.table
    assert found.words == "13 a position, 17 in mlx-lm; no capture: that is Metal's"
    right = forward.swiglu
    monkeypatch.setattr(forward, "swiglu", lambda *x: right(right(*x), right(*x)))
    monkeypatch.setattr(forward, "_swiglu_in_one", forward._swiglu)
    assert kernels.kernels(NOWHERE).passed is False


def test_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: str) -> None:
        raise RuntimeError("not enabled")

    monkeypatch.setattr(device, "backend", lambda: "metal")
    model = kernels._model(2)
    monkeypatch.setattr(mx.metal, "start_capture", refused)
    assert "not allowed" in kernels.capture(model)
    monkeypatch.setattr(mx.metal, "start_capture", lambda path: None)
    monkeypatch.setattr(mx.metal, "stop_capture", lambda: None)
    assert "for Xcode" in kernels.capture(model)


# ---- The system


def test_what_is_asked_of_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    assert system.system(NOWHERE).passed is (None if sys.platform == "linux" else True)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(system, "ASKED", {"a": lambda: True, "b": lambda: False})
    found = system.system(NOWHERE)
    assert found.passed is False
    assert found.words == "1 of 2 answered; not: b"


def test_its_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers: dict[str, Any] = {
        "processor": lambda: "Apple M2",
        "sysctl_number": lambda name: 1,
        "unused_bytes": lambda: 1 << 30,
        "swapped": lambda: 0,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(system, name, answer)
    monkeypatch.setattr(device, "gpu_info", lambda: {"architecture": "applegpu_g14s"})
    asked = (system.chip, system.pressure, system.unused, system.swap)
    assert all(ask() for ask in asked)
    for name in answers:
        monkeypatch.setattr(system, name, lambda *_: None)
    monkeypatch.setattr(system, "processor", lambda: "Intel")
    assert not any(ask() for ask in asked)
    program = tmp_path / "caffeinate"
    monkeypatch.setattr(system, "_STARTED", 0.05)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("PATH", str(tmp_path))
    for script, holds in (("exec /bin/sleep 20", True), ("exit 1", False)):
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        assert system.awake() is holds
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", fcntl.F_SETFD, raising=False)
    assert system.flushed()
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 9999, raising=False)  # none of the kernel's
    assert not system.flushed()
