"""Which weights are wired. Metal's part is played by a stand-in for MLX's own functions."""

import os
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import MakeCheckpoint

from mlx_cerebrum import device, load
from mlx_cerebrum.decoding.stream import generate
from mlx_cerebrum.generate import main
from mlx_cerebrum.model.limits import NO_WIRE, limits, wire

PAGE = os.sysconf("SC_PAGE_SIZE")


class Metal:
    """What was wired, latest last; `allows` is the working set it recommends."""

    def __init__(self) -> None:
        self.allows = 10**12
        self.wired = [123]  # somebody's, from before

    def set_wired_limit(self, nbytes: int) -> int:
        self.wired.append(nbytes)
        return self.wired[-2]


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> Metal:
    there = Metal()
    monkeypatch.delenv(NO_WIRE, raising=False)
    # A server of other tests may be within limits of its own.
    monkeypatch.setattr("mlx_cerebrum.model.limits._may_wire", None)
    monkeypatch.setattr(device, "backend", lambda: "metal")
    monkeypatch.setattr(mx, "set_wired_limit", there.set_wired_limit)
    monkeypatch.setattr(
        mx, "device_info", lambda *_: {"max_recommended_working_set_size": there.allows}
    )
    return there


def model(*sizes: int) -> nn.Module:
    made = nn.Module()
    made.weights = [mx.zeros(size, mx.uint8) for size in sizes]
    return made


def test_weights_that_nearly_fill_it_are_wired_to_the_page(metal: Metal) -> None:
    metal.allows = 5 * PAGE
    with limits():
        assert metal.wired == [123, 0]
        wire(model(PAGE + 1, PAGE), model(1))
        assert metal.wired[-1] == 4 * PAGE
        wire(model(PAGE))  # the others are gone
        assert metal.wired[-1] == 0
    assert metal.wired[-1] == 123


def test_others_are_not(metal: Metal) -> None:
    metal.allows = 6 * PAGE
    with limits():
        wire(model(4 * PAGE))  # two thirds
        assert metal.wired == [123, 0, 0]
        wire(model(4 * PAGE + 1))
        assert metal.wired[-1] == 5 * PAGE


def test_no_more_than_is_allowed(metal: Metal) -> None:
    metal.allows = 3 * PAGE
    with limits(memory=2 * PAGE + mx.get_active_memory()):
        wire(model(4 * PAGE))
        assert metal.wired[-1] <= 3 * PAGE


def test_limits_within_limits_leave_it(metal: Metal) -> None:
    metal.allows = PAGE
    with limits():
        with limits():
            wire(model(PAGE))
        assert metal.wired == [123, 0, PAGE]
    assert metal.wired == [123, 0, PAGE, 123]


def test_it_can_be_left(metal: Metal, monkeypatch: pytest.MonkeyPatch) -> None:
    metal.allows = PAGE
    wire(model(PAGE))  # outside
    with limits(wiring=False), limits():
        wire(model(PAGE))
    monkeypatch.setenv(NO_WIRE, "1")
    with limits():
        wire(model(PAGE))
    assert set(metal.wired) == {123, 0}
    monkeypatch.setenv(NO_WIRE, "0")
    with limits():
        wire(model(PAGE))
    assert PAGE in metal.wired


def test_elsewhere_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "set_wired_limit", lambda nbytes: pytest.fail("it was asked"))
    for backend in ("cpu", "cuda"):
        monkeypatch.setattr(device, "backend", lambda backend=backend: backend)
        with limits():
            wire(model(PAGE))


@pytest.fixture
def small(checkpoint: MakeCheckpoint, metal: Metal) -> Path:
    path = checkpoint()
    metal.allows = 10**8
    return path


def test_programs_wire_the_weights_they_generate_with(
    small: Path, metal: Metal, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, tokenizer = load(small, dtype="float32")
    monkeypatch.setattr("mlx_cerebrum.model.limits._NEAR", 0.0)
    generate(loaded, tokenizer, [5, 6, 7], max_tokens=2)
    before, none, held, after = metal.wired
    assert (before, none, after) == (123, 0, 123)
    assert 100_000 < held < metal.allows
    metal.wired = [123]
    with limits():
        load(small, dtype="float32")
        assert metal.wired == [123, 0, held]


def test_the_command_can_be_told_not_to(
    small: Path,
    metal: Metal,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("mlx_cerebrum.model.limits._NEAR", 0.0)
    asked = ["--model", str(small), "--raw", "--prompt", "x", "--max-tokens", "2", "--quiet"]
    assert main([*asked, "--no-wire"]) == 0
    assert set(metal.wired) == {123, 0}
    assert main(asked) == 0
    assert max(metal.wired) > 100_000
